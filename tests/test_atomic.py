"""A directory appears whole or not at all, whoever else writes there and whatever the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgsnap import atomic
from fgsnap.atomic import MARK, PartialDirectory, create_file, host_errors, write_all, write_file
from fgsnap.errors import HostError, UsageError

ROOT = Path(__file__).parent.parent


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def descriptors() -> int:
    return len(names(Path("/proc/self/fd")))


def refusing(code: int):
    def refuse(*args: object, **settings: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


# Whole


def test_what_is_published_has_its_name_its_modes_and_its_parents(tmp_path: Path) -> None:
    before, umask = descriptors(), os.umask(0o027)
    try:
        with PartialDirectory(tmp_path / "deep" / "er" / "s") as new:
            assert new.path == tmp_path / "deep" / "er" / "s.partial"
            write_file(new.path / "file", b"data")
            assert not new.target.exists()
            assert new.publish() == new.target
    finally:
        os.umask(umask)
    assert names(tmp_path / "deep" / "er") == {"s"}
    assert (new.target / "file").read_bytes() == b"data"
    assert stat.S_IMODE(new.target.stat().st_mode) == 0o750
    assert stat.S_IMODE((new.target / "file").stat().st_mode) == 0o640
    assert descriptors() == before


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(0o700)
    with PartialDirectory(tmp_path / "s") as new:
        new.publish()
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


@pytest.mark.parametrize("step", ["_refuse_strange", "_empty"])
def test_an_interrupt_while_it_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real, before = getattr(atomic, step), descriptors()

    def interrupted(*arguments: object) -> None:
        real(*arguments)
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(atomic, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        PartialDirectory(tmp_path / "deep" / "s")
    assert names(tmp_path) == set() and descriptors() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_it_is_published_comes_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(KeyboardInterrupt), PartialDirectory(tmp_path / "s") as new:
        write_file(new.path / "file", b"data")
        new.publish()
    assert names(tmp_path) == {"s"} and names(tmp_path / "s") == {"file"}


def test_what_cannot_be_replaced_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here"):
        with pytest.raises(UsageError, match="Cannot write to") as caught:
            PartialDirectory(Path(name))
        assert "current directory" in caught.value.why
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UsageError) as caught:
        PartialDirectory(tmp_path / "volume")
    assert "mount point" in caught.value.why
    assert names(tmp_path) == {"here", "volume"}


def test_a_relative_target_is_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with PartialDirectory(Path("s")) as new:
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert new.publish() == tmp_path / "s"
    assert names(tmp_path) == {"elsewhere", "s"}


def test_every_new_name_is_on_disk_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after ``publish`` loses none of the names on the way to the target."""
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with PartialDirectory(tmp_path / "deep" / "er" / "s") as new:
        new.publish()
    assert synced[:2] == [str(new.path), str(new.target)]
    assert set(synced[2:]) == {str(tmp_path), str(tmp_path / "deep"), str(tmp_path / "deep" / "er")}


def test_a_write_that_takes_only_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_file_that_exists_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = descriptors()
    for name in ("mine", "link"):
        with pytest.raises(HostError, match=f"Cannot write .*{name}"):
            write_file(tmp_path / name, b"data")
    assert (tmp_path / "mine").read_text() == "keep"
    assert names(tmp_path) == {"mine", "link"}
    assert descriptors() == before


# Not at all


def test_parents_that_were_made_go_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), PartialDirectory(tmp_path / "mine" / "deep" / "er" / "s") as new:
        write_file(new.path / "file", b"data")
        (new.path / "inner").mkdir()
        raise KeyError
    assert names(tmp_path) == {"mine"}
    assert names(tmp_path / "mine") == set()


def test_a_made_parent_that_somebody_uses_meanwhile_stays(tmp_path: Path) -> None:
    with PartialDirectory(tmp_path / "deep" / "er" / "s"):
        (tmp_path / "deep" / "theirs").write_text("keep")
    assert names(tmp_path / "deep") == {"theirs"}


def test_parents_go_when_the_directory_itself_cannot_be_made(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(HostError, match="Cannot write") as error:
        PartialDirectory(tmp_path / "deep" / "er" / ("s" * 250))  # which .partial makes too long
    assert error.value.why == f"{os.strerror(errno.ENAMETOOLONG)}."
    assert names(tmp_path) == set()
    assert descriptors() == before


def test_parents_go_when_one_of_them_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir
    monkeypatch.setattr(
        os, "mkdir", lambda path, mode: mkdir(path, mode) if path.name != "er" else refusing(errno.EACCES)()
    )
    with pytest.raises(HostError, match="Cannot write") as error:
        PartialDirectory(tmp_path / "deep" / "er" / "s")
    assert error.value.why == f"{os.strerror(errno.EACCES)}."
    assert names(tmp_path) == set()


def test_a_file_is_no_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for target in (tmp_path / "file" / "s", tmp_path / "file" / "deep" / "s"):
        with pytest.raises(HostError, match="Cannot write"):
            PartialDirectory(target)
    assert (tmp_path / "file").read_text() == "keep"


def test_the_root_directory_is_taken() -> None:
    with pytest.raises(UsageError, match="Cannot write to /"):
        PartialDirectory(Path("/"))


def test_what_cannot_be_removed_hides_no_error_and_the_next_writer_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyError), PartialDirectory(tmp_path / "s") as new:
        write_file(new.path / "file", b"data")
        patch.setattr(os, "unlink", refusing(errno.EBUSY))
        raise KeyError
    assert names(new.path) == {MARK, "file"}
    with PartialDirectory(tmp_path / "s") as again:
        assert names(again.path) == {MARK}
    assert names(tmp_path) == set()


# Other writers


HOLD = """
    import sys, time
    from pathlib import Path
    from fgsnap.atomic import MARK, PartialDirectory, write_file
    with PartialDirectory(Path(sys.argv[1])) as new:
        write_file(new.path / "half", b"data")
        (new.path / "inner").mkdir()
        write_file(new.path / "inner" / "file", b"data")
        (new.path / "link").symlink_to(sys.argv[2])
        print("half", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    return tmp_path / "precious"


@pytest.fixture
def holder(tmp_path: Path, precious: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing ``out/s``."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "out" / "s"), str(precious)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    before = descriptors()
    with pytest.raises(UsageError, match="Another process is writing s") as error:
        PartialDirectory(tmp_path / "out" / "s")
    assert len(error.value.lines()) == 3
    assert names(tmp_path / "out") == {"s.partial"}
    assert names(tmp_path / "out" / "s.partial") == {MARK, "half", "inner", "link"}
    assert descriptors() == before


def test_what_a_killed_holder_left_is_emptied_and_links_are_not_followed(
    tmp_path: Path, precious: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path / "out" / "s.partial") == {MARK, "half", "inner", "link"}
    with PartialDirectory(tmp_path / "out" / "s") as new:
        assert names(new.path) == {MARK}
        write_file(new.path / "file", b"data")
        new.publish()
    assert names(tmp_path / "out") == {"s"}
    assert names(tmp_path / "out" / "s") == {"file"}
    assert (precious / "file").read_text() == "keep"


def test_a_directory_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "thesis").write_text("keep")
    before = descriptors()
    with pytest.raises(UsageError, match=r"s\.partial is in the way"):
        PartialDirectory(tmp_path / "s")
    assert (tmp_path / "s.partial" / "thesis").read_text() == "keep"
    assert names(tmp_path) == {"s.partial"}
    assert descriptors() == before


def test_the_first_writer_publishes_just_before_the_lock_is_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second then holds the lock of what is published by now, and must not take it for its own."""
    first = PartialDirectory(tmp_path / "s")
    write_file(first.path / "file", b"first")
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not first.target.exists():
            first.publish()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with PartialDirectory(tmp_path / "s") as second:
        write_file(second.path / "file", b"second")
        with pytest.raises(UsageError, match="Cannot write to"):
            second.publish()
    assert names(tmp_path) == {"s"}
    assert (tmp_path / "s" / "file").read_bytes() == b"first"


def test_the_first_writer_gives_up_just_before_the_second_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PartialDirectory(tmp_path / "s")

    def late(path: Path, *settings: int) -> int:
        monkeypatch.undo()
        assert path == first.path
        first.close()
        return os.open(path, *settings)

    monkeypatch.setattr(os, "open", late)
    with PartialDirectory(tmp_path / "s") as second:
        second.publish()
    assert names(tmp_path) == {"s"}


def test_a_directory_that_came_in_its_place_is_not_removed(tmp_path: Path) -> None:
    with PartialDirectory(tmp_path / "s") as new:
        new.path.rename(tmp_path / "moved")
        new.path.mkdir()
        (new.path / "theirs").write_text("keep")
    assert names(tmp_path) == {"s.partial", "moved"}
    assert names(new.path) == {"theirs"}


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    with pytest.raises(HostError, match=r"Cannot write .*s\.partial") as error:
        PartialDirectory(tmp_path / "s")
    assert error.value.why == f"{os.strerror(errno.ENOLCK)}."
    assert descriptors() == before


# A full disk


def test_too_little_space_is_told_with_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(os.statvfs(tmp_path))[:11]
    fields[1], fields[2], fields[4] = 4096, 1000, 3  # f_frsize, f_blocks, f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(HostError) as error, PartialDirectory(tmp_path / "deep" / "s") as new:
        new.check_space(3 * 4096)
        new.check_space(3 * 4096 + 1)
    assert error.value.what == f"No room to write {tmp_path / 'deep' / 's'}: it needs 12289 bytes (0.0 MiB)."
    assert error.value.why == "12288 bytes are free."
    assert names(tmp_path) == set()


def test_a_disk_that_counts_no_blocks_is_not_taken_for_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([0] * 11))
    with PartialDirectory(tmp_path / "s") as new:
        new.check_space(1 << 60)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_is_told_with_the_bytes_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    before = descriptors()
    monkeypatch.setattr(os, "write", refusing(code))
    with pytest.raises(HostError) as error, PartialDirectory(tmp_path / "deep" / "s") as new:
        write_file(new.path / "file", b"data")
    assert error.value.what == f"No room to write {new.path / 'file'}: it needs 4 bytes (0.0 MiB)."
    assert error.value.why == f"{os.strerror(code)}."
    assert len(error.value.lines()) == 3
    assert names(tmp_path) == set()
    assert descriptors() == before


def test_a_disk_too_full_for_the_name_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", refusing(errno.ENOSPC))
    with pytest.raises(HostError) as error, PartialDirectory(tmp_path / "deep" / "s") as new:
        new.publish()
    assert error.value.what == f"No room to write {new.path}."
    assert names(tmp_path) == set()


def test_a_file_of_a_full_disk_is_told_by_the_kernel_itself() -> None:
    """/dev/full takes nothing, which no double has to pretend."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(HostError, match="No room to write full: it needs 9 bytes"), host_errors(Path("full"), 9):
            write_all(descriptor, memoryview(b"data"))
    finally:
        os.close(descriptor)


def test_a_new_file_may_be_mapped_for_writing(tmp_path: Path) -> None:
    descriptor = create_file(tmp_path / "file")
    try:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
