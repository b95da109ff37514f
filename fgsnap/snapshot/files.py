"""The files of a snapshot as a reader meets them: regular files only, with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from fgsnap.errors import HostError, SnapshotRefused
from fgsnap.snapshot.format import CHUNK


def refused(path: Path, why: str) -> SnapshotRefused:
    """The error for a snapshot that is damaged or never was one."""
    return SnapshotRefused(f"The snapshot {path} is refused.", why, "Convert it again, or copy it again.")


def changed(path: Path, name: str) -> SnapshotRefused:
    """The error for a file whose digest is another than the recorded one."""
    return refused(path, f"{name} does not have the digest that was recorded for it.")


@contextlib.contextmanager
def opened(path: Path, name: str) -> Iterator[int]:
    """A descriptor of one regular file; links, pipes and devices are refused without being followed or waited for."""
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise refused(path, f"{name} is missing.") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise refused(path, f"{name} is not a regular file.") from error
        raise unreadable(path, name, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused(path, f"{name} is not a regular file.")
        try:
            yield descriptor
        except OSError as error:
            raise unreadable(path, name, error) from error
    finally:
        os.close(descriptor)


def unreadable(path: Path, name: str, error: OSError) -> HostError:
    """The error for a file that is there and cannot be read."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = "Check the file's permissions and the disk."
    if error.errno == errno.ENOMEM:
        remedy = "Raise the limit on this process's address space (ulimit -v)."
    return HostError(f"Cannot read {path / name}.", f"{reason}.", remedy)


def present(path: Path, name: str) -> bool:
    """Whether anything has this name. True as well where only opening it can tell."""
    try:
        (path / name).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def listed(path: Path) -> list[str]:
    """The names of everything in the snapshot's directory, sorted."""
    try:
        return sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise unreadable(path, "", error) from error


def check_size(path: Path, name: str, descriptor: int, expected: int) -> None:
    """Refuse a file that is not exactly ``expected`` bytes long."""
    size = os.fstat(descriptor).st_size
    if size != expected:
        raise refused(path, f"{name} has {size} bytes, not {expected}.")


def read_all(descriptor: int, most: int) -> bytes:
    """The file's first ``most`` bytes, or all of a shorter one."""
    parts = []
    while most > 0 and (part := os.read(descriptor, min(most, CHUNK))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


PARTS = ".parts"
_PART_NAME = re.compile(r"rank-(\d{5})-of-(\d{5})", re.ASCII)


def parts_directory(target: Path) -> Path:
    """Where rank files wait that were written by themselves, until all that make a snapshot are there."""
    target = Path(os.path.abspath(target))
    return target.parent / (target.name + PARTS)


def part_directory(target: Path, rank: int, tp: int) -> Path:
    """Where one of them lies."""
    return parts_directory(target) / f"rank-{rank:05d}-of-{tp:05d}"


def unfinished(path: Path) -> SnapshotRefused | None:
    """The error for a snapshot of which so far there are parts only; None where there are none.

    Args:
        path: where the snapshot should be, or the directory of its parts.
    """
    target = path.parent / path.name.removesuffix(PARTS) if path.name.endswith(PARTS) else path
    parts = parts_directory(target)
    if not os.path.isdir(parts):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return None
    what = f"{target} is not a finished snapshot"
    found = [match for match in map(_PART_NAME.fullmatch, listed(parts)) if match]
    there, degrees = sorted(int(match[1]) for match in found), {int(match[2]) for match in found}
    if not found:
        why = f"No rank in {parts.name} is finished; what is there is still being written, or of processes that ended."
        return SnapshotRefused(f"{what}.", why, "Run the conversions again, unless they still run.")
    if len(degrees) != 1:
        why = f"{parts.name} holds parts of {len(degrees)} tensor parallel degrees."
        return SnapshotRefused(f"{what}.", why, "Convert its ranks with 'fgsnap convert --ranks'.")
    tp = degrees.pop()
    missing = sorted(set(range(tp)) - {*there})
    if not missing:
        return SnapshotRefused(
            f"{what}.",
            f"{parts.name} holds all {tp} ranks, but nobody has published them.",
            "Run one of the conversions again: it keeps what is there, and publishes.",
        )
    return SnapshotRefused(
        f"{what}: of {tp} ranks, {show_ranks(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
        f"{parts.name} holds {show_ranks(there)}.",
        f"Convert the rest with --ranks {','.join(map(str, missing))}, or bring here the parts that other hosts made.",
    )


def show_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0, 3``."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
