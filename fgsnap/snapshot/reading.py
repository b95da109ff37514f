"""Opening a snapshot: everything but the weights' bytes is checked, and rank files are mapped, not read."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from fgsnap.errors import NotFound, SnapshotRefused
from fgsnap.layout import Segment
from fgsnap.snapshot.checks import canary_fault, manifest_fault, rank_headers
from fgsnap.snapshot.files import changed, check_size, opened, present, read_all, refused, unfinished, unreadable
from fgsnap.snapshot.format import (
    CANARY,
    COMMIT,
    FORMAT,
    KNOWN_FEATURES,
    MANIFEST,
    Canary,
    Commit,
    FileEntry,
    Manifest,
    TensorEntry,
    Version,
    canonical,
    chunks_file,
    chunks_size,
    rank_file,
)

_LARGEST_JSON = 64 << 20

T = TypeVar("T")


class RankFile:
    """A mapped rank file, and when it was last written to before it was opened.

    Its descriptor stays open, so that what becomes of the file can be seen whatever has its name by then.
    """

    def __init__(self, descriptor: int) -> None:
        self.written = os.fstat(descriptor).st_mtime_ns
        self.data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        with contextlib.suppress(OSError, AttributeError):  # not every kernel and file system has them
            self.data.madvise(mmap.MADV_HUGEPAGE)  # what is read from disk now comes in huge pages
        self.descriptor = os.dup(descriptor)
        self._let_go = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Unmap, unless some view is still in use."""
        self._let_go()
        with contextlib.suppress(BufferError):
            self.data.close()


Slices = dict[str, list[tuple[TensorEntry, Segment]]]
"""The stored slices that make up each logical tensor."""


class Snapshot:
    """An opened snapshot: the manifest, and read-only views of tensors over one mapping a rank file.

    Attributes:
        copied: bytes that were copied so far, for tensors that could not be used where they are mapped.
    """

    def __init__(
        self, path: Path, manifest: Manifest, identity: str, canary: Canary | None, ranks: dict[str, RankFile]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.id = identity
        self.canary = canary
        self.copied = 0
        self._ranks = ranks
        self._views = {name: memoryview(rank.data) for name, rank in ranks.items()}
        self._slices: dict[int, Slices] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tensor(self, entry: TensorEntry) -> memoryview:
        """The tensor's bytes, read-only, without a copy."""
        return self._views[entry.file][entry.offset : entry.offset + entry.bytes]

    def read_text(self, name: str) -> bytes:
        """The content of a covered text file, checked against the manifest."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise NotFound(f"{self.path} has no {name}.", "", "Convert again from a source that has this file.")
        with opened(self.path, name) as descriptor:
            data = read_all(descriptor, entry.bytes + 1)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise changed(self.path, name)
        return data

    def read(self, file: str, at: int, parts: Sequence[memoryview]) -> None:
        """Fill ``parts``, one after the other, with the bytes of a rank file from ``at`` on; threads may do so at once.

        Unlike the mapped bytes, those of a file that was cut short raise SnapshotRefused, and nothing is killed.
        """
        descriptor, left = self._ranks[file].descriptor, sum(map(len, parts))
        try:
            while (count := os.preadv(descriptor, parts, at)) < left:
                if count == 0:
                    raise _touched(self.path, f"{file} now ends at byte {at}.")
                parts, at, left = _after(parts, count), at + count, left - count
        except OSError as error:
            raise unreadable(self.path, file, error) from error

    def read_ahead(self, file: str, start: int, stop: int) -> None:
        """Have these bytes of a rank file, a few mebibytes, read from disk while something else is done."""
        with contextlib.suppress(OSError, AttributeError):  # a hint, which not every system takes
            os.posix_fadvise(self._ranks[file].descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def slices(self, near: int = 0) -> Slices:
        """The slices of every logical tensor, each once: where several ranks hold it, the first from ``near`` on."""
        if near not in self._slices:
            tensors, first = self.manifest.tensors, rank_file(near, self.manifest.tp)
            start = next(at for at, entry in enumerate(tensors) if entry.file == first)
            self._slices[near] = _index((*tensors[start:], *tensors[:start]))
        return self._slices[near]

    def check_unchanged(self) -> None:
        """Whether the mapped bytes can still be believed: a call a rank file, no reading.

        A mapping shows what is written to its file, zeros where the last page of a truncated file ends, and what lay
        on pages beyond kills who reads it (SIGBUS). A file that another one replaced by name stays as it was. On
        network file systems a change made elsewhere may be seen some seconds late.

        Raises:
            SnapshotRefused: a rank file was written to, or changed its size, since it was opened.
        """
        for name, rank in self._ranks.items():
            now, size = os.fstat(rank.descriptor), self.manifest.files[name].bytes
            if now.st_size != size:
                raise _touched(self.path, f"{name} now has {now.st_size} bytes, not {size}.")
            if now.st_mtime_ns != rank.written:
                raise _touched(self.path, f"{name} was written to.")

    def close(self) -> None:
        """Unmap. Views that are still in use keep their mapping alive until they go."""
        for view in self._views.values():
            view.release()
        for rank in self._ranks.values():
            rank.close()
        self._views, self._ranks = {}, {}


def _touched(path: Path, why: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"The snapshot {path} was changed while it was in use.",
        why,
        "Run 'fgsnap verify' on it. Give a new snapshot a directory of its own, and never write into one.",
    )


def _after(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the parts after their first ``count`` bytes."""
    left = []
    for part in parts:
        if count < len(part):
            left.append(part[count:])
        count = max(0, count - len(part))
    return left


def _index(tensors: Iterable[TensorEntry]) -> Slices:
    slices: Slices = {}
    seen: set[tuple[str, int, int, int]] = set()
    for entry in tensors:
        for segment in entry.segments:
            if segment.tensor is None:
                continue
            key = (segment.tensor, segment.axis, segment.start, segment.stop)
            if key not in seen:
                seen.add(key)
                slices.setdefault(segment.tensor, []).append((entry, segment))
    return slices


def _no_directory(path: Path) -> NotFound:
    what = f"There is no snapshot at {path}."
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        return NotFound(what, "This is a file; a snapshot is a directory.", "Give the directory that convert made.")
    return NotFound(what, "The directory does not exist.", "Check the path.")


def open_snapshot(path: Path | str, *, committed: bool = True) -> Snapshot:
    """Open and check everything but the weights' bytes, in time proportional to the number of tensors.

    Args:
        path: the snapshot directory.
        committed: False opens a directory that its writer has not published yet, which has no ``snapshot.json``.

    Raises:
        NotFound: there is no such directory.
        SnapshotRefused: it is no snapshot, unfinished, damaged, or needs a newer reader.
    """
    path = Path(path)
    if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise unfinished(path) or _no_directory(path)
    commit = _read_commit(path) if committed else None
    raw = _read_json(path, MANIFEST)
    identity = hashlib.sha256(raw).hexdigest()
    if commit is not None and not commit.id == commit.manifest == identity:
        raise changed(path, MANIFEST)
    _check_version(path, MANIFEST, raw)
    manifest = _decode(path, MANIFEST, raw, Manifest)
    if commit is not None and (commit.format, commit.requires) != (manifest.format, manifest.requires):
        raise refused(path, f"{COMMIT} and {MANIFEST} disagree.")
    if fault := manifest_fault(manifest):
        raise refused(path, fault)
    canary = _read_canary(path, manifest, identity, commit.canary) if commit is not None else None
    return Snapshot(path, manifest, identity, canary, _map_ranks(path, manifest))


def _map_ranks(path: Path, manifest: Manifest) -> dict[str, RankFile]:
    headers = rank_headers(manifest)
    ranks: dict[str, RankFile] = {}
    try:
        for name, entry in manifest.files.items():
            if name in headers:
                ranks[name] = _map_rank(path, name, entry, headers[name])
            else:
                _check_file(path, name, entry.bytes)
    except BaseException:
        for rank in ranks.values():
            rank.close()
        raise
    return ranks


def _map_rank(path: Path, name: str, entry: FileEntry, header: bytes) -> RankFile:
    _check_file(path, chunks_file(name), chunks_size(entry.bytes))
    with opened(path, name) as descriptor:
        check_size(path, name, descriptor, entry.bytes)
        # Through the mapping this would read a huge page of a file that may not be needed.
        if os.pread(descriptor, len(header), 0) != header:
            raise refused(path, f"The header of {name} is not the one that {MANIFEST} implies.")
        return RankFile(descriptor)


def _check_file(path: Path, name: str, size: int) -> None:
    with opened(path, name) as descriptor:
        check_size(path, name, descriptor, size)


def chunk_digests(path: Path, name: str, entry: FileEntry) -> bytes:
    """The BLAKE3 digests of the chunks of rank file ``name``, one after the other, checked against its ``entry``."""
    with opened(path, chunks_file(name)) as descriptor:
        recorded = read_all(descriptor, chunks_size(entry.bytes) + 1)
    if hashlib.sha256(recorded).hexdigest() != entry.chunks:
        raise changed(path, chunks_file(name))
    return recorded


def _read_commit(path: Path) -> Commit:
    if not present(path, COMMIT):
        if error := unfinished(path):
            raise error
        raise SnapshotRefused(
            f"{path} is not a finished snapshot.",
            f"It has no {COMMIT}, which is written last.",
            "Convert it again, or copy it again; a checkpoint becomes a snapshot by 'fgsnap convert'.",
        )
    raw = _read_json(path, COMMIT)
    _check_version(path, COMMIT, raw)
    commit = _decode(path, COMMIT, raw, Commit)
    if canonical(msgspec.json.decode(raw)) != raw:
        raise refused(path, f"{COMMIT} is not in canonical form.")
    return commit


def _check_version(path: Path, name: str, raw: bytes) -> None:
    """Refuse what a newer writer made before its fields are looked at, for they may have changed."""
    version = _decode(path, name, raw, Version)
    if version.format != FORMAT:
        raise SnapshotRefused(
            f"{path} has snapshot format {version.format}.",
            f"This fgsnap reads format {FORMAT}.",
            "Upgrade fgsnap, or convert the checkpoint again with this version.",
        )
    unknown = sorted(set(version.requires) - KNOWN_FEATURES)
    if unknown:
        raise SnapshotRefused(
            f"{path} requires {', '.join(map(repr, unknown))}.",
            "This version of fgsnap does not know it.",
            "Upgrade fgsnap, or convert the checkpoint again with this version.",
        )


def _read_canary(path: Path, manifest: Manifest, identity: str, digest: str | None) -> Canary | None:
    if digest is None:
        if present(path, CANARY):
            raise refused(path, f"{CANARY} is there, but {COMMIT} knows of none.")
        return None
    raw = _read_json(path, CANARY)
    if hashlib.sha256(raw).hexdigest() != digest:
        raise changed(path, CANARY)
    canary = _decode(path, CANARY, raw, Canary)
    if fault := canary_fault(canary, manifest, identity):
        raise refused(path, f"{CANARY} is unusable: {fault}")
    return canary


def _decode(path: Path, name: str, raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refused(path, f"{name} cannot be read: {error}") from error


def _read_json(path: Path, name: str) -> bytes:
    with opened(path, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > _LARGEST_JSON:
            raise refused(path, f"{name} has {size} bytes, more than the {_LARGEST_JSON} allowed.")
        return read_all(descriptor, size)
