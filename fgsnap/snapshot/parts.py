"""Rank files that are written by themselves, by several processes or hosts, until a snapshot is made of all of them.

They lie in ``<target>.parts`` beside the snapshot to be, a directory a rank: the rank file, its chunks, and a record of
what they were made from. A part appears whole or not at all, and its directory may be copied from host to host. What
is made of all parts is the snapshot that one process would have written, with the same id.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from fgsnap.atomic import PartialDirectory, write_file
from fgsnap.errors import SnapshotRefused, UsageError
from fgsnap.snapshot.backlog import Backlog
from fgsnap.snapshot.files import opened, part_directory, parts_directory, read_all
from fgsnap.snapshot.format import (
    FORMAT,
    FileEntry,
    Provenance,
    RankLayout,
    canonical,
    rank_file,
    tensor_entries,
)
from fgsnap.snapshot.verifying import verify_rank
from fgsnap.snapshot.writing import RankWriter

RECORD = "part.json"
_LARGEST_RECORD = 16 << 20


class Part(msgspec.Struct, frozen=True):
    """``part.json``: one rank file, and what it was made from.

    Attributes:
        format: the snapshot format it is for.
        rank, tp: which one of how many.
        plan: sha256 of what every part of one snapshot has in common: spec, tables of all ranks, and text files.
        provenance: the manifest's, digests of the source files included.
        entry: the rank file's entry in the manifest.
    """

    format: int
    rank: int
    tp: int
    plan: str
    provenance: Provenance
    entry: FileEntry


class PartWriter:
    """Writes one part, which has its name only when it is whole. Locked, so that one process writes it.

    A context manager: leaving it without ``publish`` removes everything it wrote. ``file`` writes the rank file.
    """

    def __init__(self, target: Path, rank: int, tp: int, layout: RankLayout, backlog: Backlog) -> None:
        self._rank = rank
        self._tp = tp
        self._entries: dict[str, FileEntry] = {}
        self._directory = PartialDirectory(part_directory(target, rank, tp))
        try:
            self.file = RankWriter(self._directory.path / rank_file(rank, tp), layout, self._entries, backlog)
        except BaseException:
            self._directory.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.abandon()
        self._directory.close()

    def check_space(self, needed: int) -> None:
        """Raise HostError when the disk has visibly less than ``needed`` bytes left."""
        self._directory.check_space(needed)

    def publish(self, plan: str, provenance: Provenance) -> None:
        """Give the part its name; its file must be closed."""
        part = Part(FORMAT, self._rank, self._tp, plan, provenance, self._entries[self.file.path.name])
        write_file(self._directory.path / RECORD, canonical(part))
        self._directory.publish()


def read_parts(target: Path, tp: int) -> dict[int, Part]:
    """The record of every part that is there, by rank. Files beside the record are not looked at."""
    found = {}
    for rank in range(tp):
        directory = part_directory(target, rank, tp)
        if directory.is_dir():
            try:
                found[rank] = _read_record(directory, rank, tp)
            except SnapshotRefused:
                if directory.is_dir():  # else another process has just published, and removed it
                    raise
    return found


def _read_record(directory: Path, rank: int, tp: int) -> Part:
    with _damaged(directory, rank), opened(directory, RECORD) as descriptor:
        raw = read_all(descriptor, _LARGEST_RECORD)
    try:
        part = msgspec.json.decode(raw, type=Part)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(directory, rank, f"{RECORD} cannot be read: {error}") from error
    if (part.format, part.rank, part.tp) != (FORMAT, rank, tp):
        raise _bad(directory, rank, f"{RECORD} is of rank {part.rank} of {part.tp}, format {part.format}.")
    return part


def refuse_other(target: Path, part: Part, plan: str, provenance: Provenance) -> None:
    """Raise UsageError, naming what differs, unless the part was made from the same source in the same way.

    ``provenance`` without digests of files is compared without them.
    """
    theirs, ours = msgspec.to_builtins(part.provenance), msgspec.to_builtins(provenance)
    if not ours["files"]:
        theirs["files"] = ours["files"]
    differ = [name for name in ours if ours[name] != theirs[name]]
    if not differ and part.plan == plan:
        return
    name = differ[0] if differ else "plan"
    if name == "files":
        why = f"The source's files differ: {_first_difference(theirs['files'], ours['files'])}."
    elif name == "plan":
        why = "Its config.json, its text files or the options --dtype and --target were others."
    else:
        why = f"Its {name} is {_shown(theirs[name])}; here it is {_shown(ours[name])}."
    directory = part_directory(target, part.rank, part.tp)
    raise UsageError(
        f"{directory} was not made from this source in this way.",
        why,
        f"Convert rank {part.rank} again after removing {directory.name}, or choose another -o.",
    )


def _first_difference(theirs: dict[str, str], ours: dict[str, str]) -> str:
    return next(name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def verify_parts(target: Path, parts: dict[int, Part], layouts: list[RankLayout]) -> None:
    """Digest every byte of these parts' files; SnapshotRefused names the part that is damaged, and where."""
    for rank, part in parts.items():
        directory, name = part_directory(target, rank, part.tp), rank_file(rank, part.tp)
        with _damaged(directory, rank):
            verify_rank(directory, name, part.entry, tensor_entries(name, layouts[rank]), lambda _: None)


@contextlib.contextmanager
def _damaged(directory: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except SnapshotRefused as error:
        raise _bad(directory, rank, error.why) from error


def _bad(directory: Path, rank: int, why: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"{directory} is damaged.", why, f"Remove that directory, and convert rank {rank} again with --ranks {rank}."
    )


def remove_parts(target: Path, tp: int) -> None:
    """Remove all parts of a snapshot that is published. What cannot be removed stays; nothing needs it."""
    parts = parts_directory(target)
    away = parts.with_name(parts.name + ".done")
    _remove_ranks(away, tp)  # which a process that was killed has left
    with contextlib.suppress(OSError):
        parts.rename(away)  # at once, so that nobody meets half of a part
    for directory in (away, parts):
        _remove_ranks(directory, tp)


def _remove_ranks(directory: Path, tp: int) -> None:
    """Remove the ranks that lie in a directory, and the directory, unless somebody else has something there."""
    for rank in range(tp):
        name = rank_file(rank, tp).removesuffix(".safetensors")
        shutil.rmtree(directory / name, ignore_errors=True)
        shutil.rmtree(directory / f"{name}.partial", ignore_errors=True)  # of a process that was killed
    with contextlib.suppress(OSError):
        directory.rmdir()
