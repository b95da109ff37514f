"""A directory of files that appears whole or not at all, and what the disk refuses in words.

Everything is written in ``<target>.partial`` and is on disk before that directory gets the target's name. Opening a
snapshot imports this module, so what is only needed to write is imported where it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from fgsnap.errors import HostError, UsageError

MARK = ".fgsnap-partial"
"""A file that tells a directory which a killed writer left behind from one that is somebody's own."""


class Busy(UsageError):
    """Another process is writing there."""


class PartialDirectory:
    """A locked, empty ``<target>.partial``, which ``publish`` renames to ``target``.

    A context manager: leaving it without ``publish`` removes everything, parents it had to make included. The lock
    refuses a second writer to the same target; a directory that a killed writer left behind is taken over and emptied.

    Attributes:
        target: the final name, absolute.
        path: where to write meanwhile.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.parent / (self.target.name + ".partial")
        self._made: list[Path] = []
        self._lock = -1
        try:
            with undisturbed(), host_errors(self.path):
                refuse_taken(self.target)
                self._make_parents()
                self._lock = _lock_directory(self.path)
                _empty(self.path)
                (self.path / MARK).touch()
                if self.target.exists():  # empty, and replaced: who may look into it stays as it is
                    os.fchmod(self._lock, stat.S_IMODE(self.target.stat().st_mode))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_space(self, needed: int) -> None:
        """Raise HostError when the disk has visibly less than ``needed`` bytes left."""
        with host_errors(self.path, needed):
            disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and free < needed:  # a filesystem that does not count its blocks says 0 of 0
            raise _disk_full(self.target, needed, f"{free} bytes are free")

    def publish(self) -> Path:
        """Give the directory its name, on disk when this returns. Its files must be on disk already."""
        with undisturbed(), host_errors(self.path):
            os.fsync(self._lock)
            try:
                self.path.rename(self.target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    refuse_taken(self.target)
                raise
            (self.target / MARK).unlink()
            os.fsync(self._lock)
            for changed in (self.target.parent, *(made.parent for made in self._made)):
                sync_directory(changed)
            self._made = []
            self.close()
        return self.target

    def close(self) -> None:
        """Stop; what is not published is removed. What cannot be removed is the next writer's to empty."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                if _is_at(self._lock, self.path):
                    _empty(self.path)
                    # The mark goes last, so that what could not be removed is still known as ours.
                    (self.path / MARK).unlink(missing_ok=True)
                    self.path.rmdir()
            os.close(self._lock)
            self._lock = -1
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().rmdir()

    def _make_parents(self) -> None:
        parent = self.target.parent
        for path in reversed([path for path in (parent, *parent.parents) if not path.exists()]):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                self._made.append(path)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off signals that would raise in the main thread, for steps of which half would be worse than all or none."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    raising = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in raising}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def create_file(path: Path) -> int:
    """A descriptor of a new file, to write and to map."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write until nothing is left, for one call may take less."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, on disk when this returns; HostError says why it cannot be."""
    with host_errors(path, len(data)):
        descriptor = create_file(path)
        try:
            write_all(descriptor, memoryview(data))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """Give a finished file a second name; a copy, on disk when this returns, where the file system has no links."""
    import shutil

    with host_errors(target, source.stat().st_size):
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            descriptor = create_file(target)
            with source.open("rb") as original, os.fdopen(descriptor, "wb") as copy:
                shutil.copyfileobj(original, copy, 1 << 20)
                copy.flush()
                os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def host_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals to write ``path``, of ``needed`` bytes, into errors of ours."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(path, needed, reason) from error
        raise HostError(f"Cannot write {path}.", f"{reason}.", "Choose a directory that you may write to.") from error


def _disk_full(path: Path, needed: int, why: str) -> HostError:
    need = f": it needs {needed} bytes ({needed / (1 << 20):.1f} MiB)" if needed else ""
    return HostError(
        f"No room to write {path}{need}.",
        f"{why}.",
        "Free some space or choose a directory on another disk.",
    )


def refuse_taken(target: Path) -> None:
    """Raise UsageError where nothing can be published."""
    next_step = "Choose another directory or remove this one."
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        reason = "It exists and is not a directory."
    elif os.path.ismount(target):
        reason, next_step = "It is a mount point, which nothing can be renamed to.", "Name a directory inside it."
    elif target.is_dir() and any(target.iterdir()):
        reason = "The directory exists and is not empty."
    elif target.is_dir() and target.samefile("."):
        reason, next_step = "It is the current directory, which would be replaced.", "Name another directory."
    else:
        return
    raise UsageError(f"Cannot write to {target}.", reason, next_step)


def _lock_directory(path: Path) -> int:
    """Create ``path`` if need be and lock it: a descriptor that holds the lock until it is closed."""
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        with contextlib.suppress(FileNotFoundError):  # its writer finished between the two calls
            lock = _locked(path)
            if _is_at(lock, path):
                _refuse_strange(lock, path)
                return lock
            os.close(lock)  # its writer renamed or removed it before the lock was ours


def _locked(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise UsageError(f"{path} is in the way.", "It is not a directory.", "Remove it, then try again.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise Busy(
            f"Another process is writing {path.name.removesuffix('.partial')}.",
            f"It holds the lock of {path}.",
            "Wait until it ends, or choose another directory.",
        ) from error
    return descriptor


def _refuse_strange(lock: int, path: Path) -> None:
    """Leave a directory alone that no writer of ours has made."""
    if any(path.iterdir()) and not (path / MARK).exists():
        os.close(lock)
        raise UsageError(
            f"{path} is in the way.",
            "It holds files that fgsnap did not write.",
            "Move it away, or choose another directory.",
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the directory that ``descriptor`` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _empty(directory: Path) -> None:
    """Remove everything but the mark."""
    import shutil

    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name == MARK:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
