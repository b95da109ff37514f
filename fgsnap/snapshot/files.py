"""The files of a snapshot as a reader meets them: regular files only, with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fgsnap.errors import HostError, SnapshotRefused
from fgsnap.snapshot.format import CHUNK


def refused(path: Path, why: str) -> SnapshotRefused:
    """The error for a snapshot that is damaged or never was one."""
    return SnapshotRefused(f"The snapshot {path} is refused.", why, "Convert or pull it again.")


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
        raise _unreadable(path, name, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused(path, f"{name} is not a regular file.")
        try:
            yield descriptor
        except OSError as error:
            raise _unreadable(path, name, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, name: str, error: OSError) -> HostError:
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
        raise _unreadable(path, "", error) from error


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
