"""``fgsnap serve``: two processes from one, in the order that gives the first token soonest.

    fork the engine worker, read the command line, open the snapshot, tell the worker of it, bind the port, and only
    then import what HTTP and text need

The worker is forked before it is known what to serve, so that each process imports its own program on a core of its
own. The listening socket exists before anything slow is done, so clients that come early are queued by the kernel and
answered when the engine is ready. This module imports nothing that the worker has no use for.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fgsnap.errors import HostError, NotFound, UsageError
from fgsnap.runtime import process, startup, torchrun, wire
from fgsnap.runtime.options import ServeOptions
from fgsnap.runtime.worker import ENDING
from fgsnap.snapshot import open_snapshot

BACKLOG = 2048


class Begun(NamedTuple):
    """A service whose worker has been forked, and its phases so far."""

    clock: startup.Clock
    worker: process.Worker


def begin() -> Begun:
    """Fork the engine worker, which ends with this process if there is nothing to serve."""
    clock = startup.Clock(startup.process_start())
    clock.mark(startup.BEFORE_FORK)
    worker = process.fork(clock.last)
    clock.mark("fork")
    return Begun(clock, worker)


def serve(options: ServeOptions, begun: Begun | None = None) -> int:
    """Serve until a signal ends it; returns the exit code. ``begun`` is what ``begin`` returned, if it was called.

    As another tensor parallel rank than torchrun's first, follow that one instead, and never return.

    Raises:
        SnapshotRefused, NotFound: the snapshot cannot be opened.
        HostError: the port is taken, or this host cannot run the model.
        UsageError: an option points nowhere.
    """
    with _leaving_on_signals():
        if torchrun.follows():
            from fgsnap.runtime.ranks import load_as_chosen

            load_as_chosen(open_snapshot(options.snapshot), options.engine)
        return _serve(options, *(begun or begin()))


def _serve(options: ServeOptions, clock: startup.Clock, child: process.Worker) -> int:
    try:
        clock.mark("command line")
        gc.disable()  # until there is anything but what stays
        keys = _read_keys(options.api_key_file)
        _check_report(options.startup_report)
        snapshot = open_snapshot(Path(options.snapshot))
        place = str(Path(options.snapshot).absolute())
        what = wire.Begin(snapshot=place, id=snapshot.id, engine=options.engine, verify=options.verify)
        process.tell(child, what)
        clock.mark("open")
        with _listen(options.host, options.port) as listener:
            clock.mark("listen")
            import asyncio

            from fgsnap.runtime import service

            clock.mark("import http")
            from fgsnap.runtime.text import Text

            text = Text(snapshot)
            clock.mark("tokenizer")
            # What torchrun has started it starts anew, all of it together.
            respawn = None if torchrun.place() else lambda: process.tell(process.spawn(), what)
            running = service.Service(options, snapshot, text, keys, clock, respawn)
            return asyncio.run(running.run(listener, child))
    finally:
        child.kill()


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Until the event loop handles signals, let them end this process at once.

    The kernel would do so too, except for the first process of a container. There is nothing to unwind: the worker
    ends with its parent. An exception would be lost where it comes in the middle of an import's own clean-up.
    """

    def leave(number: int, _: object) -> None:
        os._exit(128 + number)

    heeded = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """The bound and listening socket. HostError when it cannot be had."""
    try:
        # As bytes: for a text Python loads the tables of international names first, whatever is in it.
        name = host.encode("ascii") if host.isascii() else host
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError(
            f"Cannot listen on {host} port {port}.",
            f"{reason}.",
            "Choose another with --host and --port, or end the process that has it.",
        ) from error


def _read_keys(path: str | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise NotFound(
            f"The API key file {path} cannot be read.", f"{error.strerror}.", "Write one key a line into it."
        ) from error
    stripped = [line.strip() for line in lines]
    keys = tuple(dict.fromkeys(line for line in stripped if line and not line.startswith(b"#")))
    if not keys:
        raise UsageError(f"The API key file {path} holds no key.", "", "Write one key a line into it.")
    return keys


def _check_report(path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UsageError(f"The start-up report cannot be written to {path}.", "Its folder does not exist.")
