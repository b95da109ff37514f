"""Writing a snapshot: beside its target, digested as the bytes pass, on disk before it gets its name."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from blake3 import blake3

from fgsnap.atomic import PartialDirectory, create_file, host_errors, link_file, write_file
from fgsnap.snapshot.backlog import Backlog
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
    tensor_entries,
)
from fgsnap.spec import DecoderSpec

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
        self._backlog = Backlog()
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
        """Begin one rank file. Several may be open at once, all used by one thread."""
        assert 0 <= rank < self.tp
        self.check_space(layout.size)
        name = rank_file(rank, self.tp)
        self._tables[rank] = tensor_entries(name, layout)
        return RankWriter(self.directory / name, layout, self._entries, self._backlog)

    def take(self, rank: int, layout: RankLayout, directory: Path, entry: FileEntry) -> None:
        """Take a rank file and its chunks, which were written by themselves, out of another directory.

        It keeps them too: they are linked where the file system can, and what is not published is not lost.
        """
        assert 0 <= rank < self.tp
        name = rank_file(rank, self.tp)
        for file in (name, chunks_file(name)):
            link_file(directory / file, self.directory / file)
        self._tables[rank] = tensor_entries(name, layout)
        self._entries[name] = entry

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
    """Writes one rank file front to back; threads write and digest the bytes. Gaps are filled with zeros.

    Args:
        path: the file, which must not exist.
        layout: what is to lie where in it.
        entries: gets the file's entry under its name when it is closed.
        backlog: bounds what waits, over all files that are written at a time.
    """

    def __init__(self, path: Path, layout: RankLayout, entries: dict[str, FileEntry], backlog: Backlog) -> None:
        from concurrent.futures import ThreadPoolExecutor  # brings logging, which opening a snapshot can do without

        self.path = path
        self.layout = layout
        self._entries = entries
        self._backlog = backlog
        self._sha256 = hashlib.sha256()
        self._chunk = blake3()
        self._chunk_bytes = 0
        self._chunks: list[bytes] = []
        self._at = 0
        self._written = 0
        self._arrived = 0
        self._waiting: deque[memoryview] = deque()  # what has arrived to be written and is not
        with host_errors(path, layout.size):
            self._fd = create_file(path)
        self._threads = tuple(ThreadPoolExecutor(1, thread_name_prefix="write") for _ in range(3))
        try:
            self.write(0, memoryview(rank_header(path.name, layout.tensors, layout.data_start)))
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def write(self, offset: int, data: memoryview) -> None:
        """Write one slab at ``offset`` of the file, not before the end of the last one.

        ``data`` is kept until it is on its way to the disk and digested, and must not change any more. What goes wrong
        with it may be raised by a later call.
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
            self._backlog.drain()
            with host_errors(self.path, self.layout.size):
                self._write_out(self._at)
                os.fsync(self._fd)
        finally:
            self.abandon()
        if self._chunk_bytes:
            self._chunks.append(self._chunk.digest())
        chunks = b"".join(self._chunks)
        with host_errors(self.path, self.layout.size):
            write_file(self.path.with_name(chunks_file(self.path.name)), chunks)
        entry = FileEntry(self._at, self._sha256.hexdigest(), hashlib.sha256(chunks).hexdigest())
        self._entries[self.path.name] = entry
        return entry

    def abandon(self) -> None:
        """Stop, and leave what was written to whoever removes its directory."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fill(self, offset: int) -> None:
        while self._at < offset:
            self._append(memoryview(bytes(min(offset - self._at, CHUNK))))

    def _append(self, data: memoryview) -> None:
        work = (self._write, self._sha256.update, self._digest_chunks)
        self._at += len(data)
        self._backlog.add(len(data), [thread.submit(do, data) for thread, do in zip(self._threads, work, strict=True)])

    def _write(self, data: memoryview) -> None:
        self._waiting.append(data)
        self._arrived += len(data)
        with host_errors(self.path, self.layout.size):
            self._write_out(self._arrived // HUGE_PAGE * HUGE_PAGE)

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
