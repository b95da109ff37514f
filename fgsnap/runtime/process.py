"""The engine worker as a process, from its parent's side: forked or spawned, killed, waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fgsnap.runtime import wire
from fgsnap.runtime.worker import ENDING, live

# Where fgsnap is not installed, it is found where this process found it.
BOOT_OF = """
import sys
sys.path.append(sys.argv.pop(1))
from {module} import main
sys.exit(main(sys.argv[1:]))
"""
BOOT = BOOT_OF.format(module="fgsnap.runtime.worker")
USUAL_REASONS = {
    signal.SIGKILL: "out of memory is the usual reason",
    signal.SIGBUS: "a page of a mapped file could not be read",
}
LINGER_SECONDS = 1.0  # a worker whose pipe is closed gets so long to end by itself


class Worker(NamedTuple):
    """A started engine worker, as its parent holds it.

    Attributes:
        pipe: the server's end of the socket pair.
        kill: end it at once; harmless when it already ended.
        wait: block until it has ended, killing it if it lingers, and say how it ended.
    """

    pipe: socket.socket
    kill: Callable[[], None]
    wait: Callable[[], str]


class _Child:
    """A child process by its id: killed at once, or waited for."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def kill(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):  # another thread may have waited for it just now
                os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> str:
        """How it ended, in words; it is killed if it lingers."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
            else:
                time.sleep(0.005)
        return ended(self._status)


def ended(code: int) -> str:
    """How a process ended, in words; ``code`` is that of os.waitstatus_to_exitcode."""
    if code >= 0:
        return f"ended with exit code {code}"
    killer = signal.Signals(-code)
    usual = USUAL_REASONS.get(killer)
    return f"was killed by {killer.name}{f' ({usual})' if usual else ''}"


def tell(worker: Worker, begin: wire.Begin) -> Worker:
    """Say what to serve. A worker that has ended already is noticed by who listens to it."""
    with contextlib.suppress(BrokenPipeError):
        worker.pipe.sendall(wire.frame(begin))
    return worker


def fork(started: float) -> Worker:
    """Start the first worker: a copy of this process, which so far has one thread and few imports.

    Its first phase begins at ``started``. It waits to be told what to serve.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()

    def be() -> int:
        ours.close()
        return live(theirs, started, parent)

    pid = child(be, "engine worker")
    theirs.close()
    return _worker(ours, pid)


def child(be: Callable[[], int], role: str) -> int:
    """Fork a process that is ``be`` and nothing else, and ends with the code that it returns; gives its id.

    The signals that end a service reach the whole process group; the parent decides what they mean.
    """
    # A signal between the fork and the child's own handlers would send the child up this process's stack.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    pid = os.fork()
    if pid == 0:
        _become(be, role, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _become(be: Callable[[], int], role: str, mask: set[int | signal.Signals]) -> None:
    """In the child: live and end here, whatever happens, without running what the parent has on its stack."""
    code = 1
    try:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = be()
    except BaseException as error:
        print(f"fgsnap: the {role} failed: {error!r}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def spawn(module: str = "fgsnap.runtime.worker", *more: str) -> Worker:
    """Start a worker in a fresh interpreter: the server has threads by now, and may no longer fork.

    It is the ``main`` of ``module``, whose arguments are a socket's descriptor, this process and ``more``.
    The interpreter is told not to look for modules in the working directory, as ``-m`` alone would make it.
    """
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    arguments = [str(theirs.fileno()), str(os.getpid()), *more]
    boot = BOOT_OF.format(module=module)
    command = [sys.executable, "-P", "-c", boot, str(Path(__file__).parents[2]), *arguments]
    try:
        pid = os.posix_spawn(sys.executable, command, os.environ)
    finally:
        theirs.close()
    return _worker(ours, pid)


def _worker(pipe: socket.socket, pid: int) -> Worker:
    child = _Child(pid)
    return Worker(pipe, child.kill, child.wait)
