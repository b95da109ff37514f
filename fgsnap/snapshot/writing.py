"""Writing a snapshot: beside its target, digested as the bytes pass, on disk before it gets its name."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec
from blake3 import blake3

from fgsnap.atomic import PartialDirectory, create_file, host_errors, write_file
from fgsnap.snapshot.format import (
    CANARY,
    CHUNK,
    COMMIT,
    FORMAT,
    MANIFEST,
    SAFE_NAME,
    UNCOVERED,
    Canary,
    Commit,
    FileEntry,
    Manifest,
    RankLayout,
    TensorEntry,
    canonical,
    chunks_file,
    rank_file,
    rank_header,
    required_features,
)
from fgsnap.spec import DecoderSpec

if TYPE_CHECKING:
    from concurrent.futures import Future

DIGESTS_BEHIND = 4
"""Slabs that the digests may lag behind the disk."""

HUGE_PAGE = 2 << 20
"""A file that is written in whole ones lies in the page cache in whole ones, where kernel and file system can: weights
are then mapped by hundreds of entries instead of hundreds of thousands."""

MOST_PARTS = 1024
"""Pieces that one call may write (IOV_MAX of Linux)."""


class SnapshotWriter:
    """Builds a snapshot in ``<target>.partial`` and gives it its name only when it is whole.

    A context manager: leaving it without ``publish`` removes everything it wrote. The partial directory is locked, so a
    second writer to the same target is refused, and one that a killed process left behind is taken over and emptied.
    """

    def __init__(self, target: Path, spec: DecoderSpec, tp: int) -> None:
        self.spec = spec
        self.tp = tp
        self.id = ""
        self._manifest: Manifest | None = None
        self._entries: dict[str, FileEntry] = {}
        self._tables: dict[int, tuple[TensorEntry, ...]] = {}
        self._partial = PartialDirectory(target)
        self.directory = self._partial.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def files(self) -> dict[str, FileEntry]:
        """Entries of all covered files written so far, for the manifest."""
        return dict(sorted(self._entries.items()))

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """The table of all ranks written so far, in rank order, for the manifest."""
        return tuple(entry for rank in sorted(self._tables) for entry in self._tables[rank])

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader has to know, for the manifest."""
        return required_features(self.tensors)

    def check_space(self, needed: int) -> None:
        """Raise HostError when the disk has visibly less than ``needed`` bytes left."""
        self._partial.check_space(needed)

    def rank(self, rank: int, layout: RankLayout) -> RankWriter:
        """Begin one rank file. Several may be open at once, each used by one thread."""
        assert 0 <= rank < self.tp
        self.check_space(layout.size)
        name = rank_file(rank, self.tp)
        self._tables[rank] = tuple(
            TensorEntry(t.name, name, t.offset, t.bytes, t.dtype, t.shape, t.segments, t.layout) for t in layout.tensors
        )
        return RankWriter(self.directory / name, layout, self._entries)

    def add_file(self, name: str, data: bytes) -> None:
        """Write one text file; the manifest covers it."""
        assert SAFE_NAME.fullmatch(name) and name not in UNCOVERED, name
        write_file(self.directory / name, data)
        self._entries[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())

    def write_manifest(self, manifest: Manifest) -> str:
        """Write ``manifest.json`` and return the snapshot's id."""
        assert manifest.tp == self.tp and manifest.files == self._entries and manifest.tensors == self.tensors
        assert manifest.requires == self.requires
        assert not manifest.provenance.source.startswith("/"), "a snapshot does not say where it was made"
        # Through the decoder once, so that 1 and 1.0 in a float field give one text and one id.
        self._manifest = msgspec.json.decode(canonical(manifest), type=Manifest)
        text = canonical(self._manifest)
        write_file(self.directory / MANIFEST, text)
        self.id = hashlib.sha256(text).hexdigest()
        return self.id

    def publish(self, canary: Canary | None) -> Path:
        """Commit: write what is left, ``snapshot.json`` last, and rename the directory to its final name."""
        assert self._manifest is not None, "publish before write_manifest"
        digest = None
        if canary is not None:
            assert canary.id == self.id
            text = canonical(canary)
            digest = hashlib.sha256(text).hexdigest()
            write_file(self.directory / CANARY, text)
        write_file(self.directory / "README.md", _readme(self._manifest, self.id).encode())
        large = b"".join(b"*.%b filter=lfs diff=lfs merge=lfs -text\n" % suffix for suffix in _LARGE)
        write_file(self.directory / ".gitattributes", large)
        commit = Commit(FORMAT, self._manifest.requires, self.id, self.id, digest)
        write_file(self.directory / COMMIT, canonical(commit))
        target = self._partial.publish()
        self.close()
        return target

    def close(self) -> None:
        """Stop; without a published snapshot, remove everything that was written."""
        self._partial.close()


_LARGE = (b"safetensors", b"chunks")


class RankWriter:
    """Writes one rank file front to back, while two threads digest the bytes. Gaps are filled with zeros.

    The digests take as long as the disk, and one of them longer than the other, so neither waits for the others at the
    end of each slab: they may fall a few slabs behind.
    """

    def __init__(self, path: Path, layout: RankLayout, entries: dict[str, FileEntry]) -> None:
        from concurrent.futures import ThreadPoolExecutor  # brings logging, which opening a snapshot can do without

        self.path = path
        self.layout = layout
        self._entries = entries
        self._sha256 = hashlib.sha256()
        self._chunk = blake3()
        self._chunk_bytes = 0
        self._chunks: list[bytes] = []
        self._at = 0
        self._written = 0
        self._waiting: deque[memoryview] = deque()  # what has been appended and not written
        with host_errors(path, layout.size):
            self._fd = create_file(path)
        self._digesters = tuple(ThreadPoolExecutor(1, thread_name_prefix="digest") for _ in range(2))
        self._behind: deque[list[Future[None]]] = deque()
        try:
            self.write(0, memoryview(rank_header(path.name, layout.tensors, layout.data_start)))
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._release()

    def write(self, offset: int, data: memoryview) -> None:
        """Write one slab at ``offset`` of the file, not before the end of the last one.

        ``data`` is kept until it is digested, and must not change any more.
        """
        assert offset >= self._at, f"{self.path.name}: slab at {offset} after {self._at}"
        self._fill(offset)
        self._append(data.cast("B"))

    def close(self) -> FileEntry:
        """Finish the file and its ``.chunks``, both on disk when this returns, and give the manifest's entry."""
        assert self._fd >= 0, f"{self.path.name} is closed already"
        try:
            self._fill(self.layout.size)
            assert self._at == self.layout.size
            with host_errors(self.path, self.layout.size):
                self._write_out(self._at)
                os.fsync(self._fd)
            self._catch_up(0)
        finally:
            self._release()
        if self._chunk_bytes:
            self._chunks.append(self._chunk.digest())
        chunks = b"".join(self._chunks)
        with host_errors(self.path, self.layout.size):
            write_file(self.path.with_name(chunks_file(self.path.name)), chunks)
        entry = FileEntry(self._at, self._sha256.hexdigest(), hashlib.sha256(chunks).hexdigest())
        self._entries[self.path.name] = entry
        return entry

    def _release(self) -> None:
        for digester in self._digesters:
            digester.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fill(self, offset: int) -> None:
        while self._at < offset:
            self._append(memoryview(bytes(min(offset - self._at, CHUNK))))

    def _append(self, data: memoryview) -> None:
        digests = (self._sha256.update, self._digest_chunks)
        jobs = [digester.submit(digest, data) for digester, digest in zip(self._digesters, digests, strict=True)]
        self._behind.append(jobs)
        self._waiting.append(data)
        self._at += len(data)
        with host_errors(self.path, self.layout.size):
            self._write_out(self._at // HUGE_PAGE * HUGE_PAGE)
        self._catch_up(DIGESTS_BEHIND)

    def _write_out(self, stop: int) -> None:
        """Write what waits, up to byte ``stop`` of the file."""
        while self._written < stop:
            parts, left = [], stop - self._written
            for part in itertools.islice(self._waiting, MOST_PARTS):
                parts.append(part[:left])
                left -= len(parts[-1])
            done = os.writev(self._fd, parts)
            self._written += done
            while done:
                first = self._waiting.popleft()
                if done < len(first):
                    self._waiting.appendleft(first[done:])
                done -= min(done, len(first))

    def _catch_up(self, behind: int) -> None:
        """Wait until the digests are no more than ``behind`` slabs behind."""
        while len(self._behind) > behind:
            for job in self._behind.popleft():
                job.result()

    def _digest_chunks(self, data: memoryview) -> None:
        while data:
            part = data[: CHUNK - self._chunk_bytes]
            self._chunk.update(part)
            self._chunk_bytes += len(part)
            data = data[len(part) :]
            if self._chunk_bytes == CHUNK:
                self._chunks.append(self._chunk.digest())
                self._chunk = blake3()
                self._chunk_bytes = 0


def _readme(manifest: Manifest, identity: str) -> str:
    provenance = manifest.provenance
    name = "a local checkpoint" if provenance.source == "local" else provenance.source
    origin = f"{name} at {provenance.revision}" if provenance.revision else name
    return (
        "---\nlibrary_name: fgsnap\n---\n\n"
        f"# fgsnap snapshot of {name}\n\n"
        f"Converted from {origin} by fgsnap {provenance.converter}.\n"
        f"Tensor parallel degree: {manifest.tp}.\n\n"
        f"Snapshot id: `{identity}`\n\n"
        "Serve it with `fgsnap serve DIRECTORY`; check every byte with `fgsnap verify DIRECTORY`.\n"
    )
