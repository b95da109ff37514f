"""The native backend's shared library: how it is found, what it offers, and how many threads it should use."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from fgsnap.built import built_library
from fgsnap.errors import UsageError

ABI = 7


def available() -> tuple[bool, str]:
    """Whether the backend can be used here, and the instruction set it would use or the reason why not."""
    library, reason = load()
    return (library is not None), reason


def instruction_sets() -> list[str]:
    """The kernels that this machine can run, the best first."""
    library, _ = load()
    return [] if library is None else named_sets(library)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    path = built_library("_native.so", "fgsnap.kernels", "FGSNAP_NATIVE_LIBRARY")
    if path is None:
        return None, "not built: no C++ compiler was found when fgsnap was installed"
    try:
        library = ctypes.CDLL(str(path))
        built_for = library.fgsnap_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    if built_for != ABI:
        return None, f"{path.name} was built for interface {built_for}, this fgsnap has {ABI}: install fgsnap again"
    _declare(library)
    return library, f"{named_sets(library)[0]} instructions"


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.fgsnap_instructions.argtypes = [integer]
    library.fgsnap_instructions.restype = ctypes.c_char_p
    library.fgsnap_open.argtypes = [integer, ctypes.c_char_p]
    library.fgsnap_open.restype = pointer
    library.fgsnap_close.argtypes = [pointer]
    library.fgsnap_close.restype = None
    library.fgsnap_dots.argtypes = [ctypes.c_char_p]
    library.fgsnap_dots.restype = integer
    library.fgsnap_plan.argtypes = [pointer]
    library.fgsnap_plan.restype = integer
    library.fgsnap_run.argtypes = [pointer, pointer, integer, pointer]
    library.fgsnap_ranks_memory.argtypes = [integer, integer]
    library.fgsnap_ranks_memory.restype = integer
    library.fgsnap_join.argtypes = [pointer, pointer, integer, integer, integer]
    library.fgsnap_join.restype = None
    library.fgsnap_give_up.argtypes = [pointer, integer, integer]
    library.fgsnap_give_up.restype = None
    library.fgsnap_end_on_bus_error.argtypes = [ctypes.c_char_p, integer, integer]
    library.fgsnap_end_on_bus_error.restype = None
    rows, answers = (pointer, pointer, integer, integer), (pointer, pointer)
    library.fgsnap_sample.argtypes = [*rows, pointer, pointer, pointer, *answers, integer, pointer, pointer]
    library.fgsnap_top_two.argtypes = [*rows, *answers]


def end_on_bus_error(text: str, code: int) -> None:
    """Have this process write ``text`` to stderr and end with ``code`` when a mapped page cannot be read (SIGBUS).

    No handler in Python could: the read would be tried again for ever. Without the library the signal ends the process.
    """
    library, _ = load()
    if library is not None:
        words = text.encode()
        library.fgsnap_end_on_bus_error(words, len(words), code)


def named_sets(library: ctypes.CDLL) -> list[str]:
    """The kernels that this machine can run, the best first."""
    names: list[str] = []
    while (name := library.fgsnap_instructions(len(names))) is not None:
        names.append(name.decode())
    return names


def default_threads() -> int:
    """As many threads as there are processors to run on, see thread_limits.

    Raises:
        UsageError: OMP_NUM_THREADS is no number of threads.
    """
    return min(count for count, _ in thread_limits())


def thread_limits() -> list[tuple[int, str]]:
    """What bounds the number of threads where nobody asks for one, each with where it comes from.

    The affinity mask, which cpusets, taskset and numactl set; the quota of every cgroup around this process; and
    OMP_NUM_THREADS, of whose list the first number counts.

    Raises:
        UsageError: OMP_NUM_THREADS is no number of threads.
    """
    limits = [(len(os.sched_getaffinity(0)), "the processors this process may run on")]
    limits += [(quota, "the CPU limit of its control group") for quota in _quotas()]
    if setting := os.environ.get("OMP_NUM_THREADS"):
        limits.append((_threads_of(setting), "OMP_NUM_THREADS"))
    return limits


def _threads_of(setting: str) -> int:
    first = setting.split(",")[0].strip()
    if not (first.isascii() and first.isdecimal()) or int(first) == 0:
        raise UsageError(
            f"OMP_NUM_THREADS is {setting!r}.",
            "It is a number of threads, 1 or more, or a list that begins with one.",
            "Unset it, or say --threads N.",
        )
    return int(first)


def _quotas() -> Iterator[int]:
    """Whole processors that each cgroup around this process grants, for those that limit it."""
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in own:
        root = Path("/sys/fs/cgroup") / ("cpu" if "cpu" in controllers.split(",") else "")
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (quota := _quota(folder)) is not None:
                yield quota


def _quota(folder: Path) -> int | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address(data: memoryview) -> int:
    """Where contiguous bytes begin. ctypes itself gives the address of writable memory only."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    at = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return at
