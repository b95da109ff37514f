"""The engine's process: map, bind, check the canary, then step while there is work and listen to the pipe.

It is forked before the command line is read, and imports its program meanwhile; when one has died, another is started
in a fresh interpreter; see ``process``. It never outlives its parent.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fgsnap.errors import FgsnapError, HostError, RequestError, SnapshotRefused
from fgsnap.runtime import startup, wire
from fgsnap.runtime.request import NO_STEP

if TYPE_CHECKING:
    from fgsnap.runtime.decoder import Decoder
    from fgsnap.runtime.engine import Engine
    from fgsnap.runtime.grammars import Grammars
    from fgsnap.runtime.options import EngineOptions
    from fgsnap.snapshot import Snapshot


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a service to end."""


AHEAD = ("fgsnap.snapshot", "fgsnap.kernels.native", "fgsnap.runtime.canary")
"""Modules that are most likely needed, and imported while it is not yet known what to serve."""


TELL_SECONDS = 1.0
"""What computes without a rank that has ended gets so long to fail, and to be told why, before its process ends."""


PATIENCE_SECONDS = 1
"""While it waits for a constraint to be compiled, a worker is heard of so often."""


class ParentGone(Exception):
    """The server's end of the pipe is closed."""


class Pipe:
    """The worker's end: sends at once, and waits for messages only when there is nothing else to do."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = wire.FrameBuffer()

    def send(self, message: wire.FromWorker) -> None:
        try:
            self._end.sendall(wire.frame(message))
        except OSError as error:
            raise ParentGone from error

    def begin(self) -> wire.Begin:
        """What to serve: the first message, which this waits for."""
        (message,) = self.receive(wait=True)
        assert isinstance(message, wire.Begin)
        return message

    def receive(self, *, wait: bool, beside: int | None = None, patience: float | None = None) -> list[wire.ToWorker]:
        """Every whole message that has arrived; with ``wait`` sleep until some bytes do.

        Or until there is something to read at the file descriptor ``beside``, for ``patience`` seconds at most.
        """
        messages: list[wire.ToWorker] = []
        if wait and beside is not None:
            self._sleep(beside, PATIENCE_SECONDS if patience is None else min(patience, PATIENCE_SECONDS))
            wait = False
        while True:
            try:
                data = self._end.recv(1 << 16, 0 if wait and not messages else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except OSError as error:
                raise ParentGone from error
            if not data:
                raise ParentGone
            messages += map(wire.decode_to_worker, self._buffer.feed(data))

    def _sleep(self, beside: int, seconds: float) -> None:
        readiness = select.poll()
        readiness.register(self._end, select.POLLIN)
        readiness.register(beside, select.POLLIN)
        readiness.poll(math.ceil(seconds * 1000))


def run(pipe: Pipe, begin: Callable[[Callable[[str], None]], tuple[Engine, wire.Ready]], started: float) -> int:
    """A worker's whole life: start an engine, serve it, and return the process's exit code.

    Args:
        pipe: to the server.
        begin: builds the engine and says what it is; it is given a function that marks the end of a phase.
        started: when the first phase began, on the monotonic clock.
    """
    try:
        engine, ready = begin(_phases(pipe, started))
        startup.collect_garbage()
        pipe.send(ready)
        with contextlib.closing(engine):
            _serve(pipe, engine)
    except ParentGone:
        return 0
    except FgsnapError as error:
        return _fail(pipe, error)
    except Exception as error:
        _show(error)
        return _fail(pipe, FgsnapError("The engine failed.", _brief(error), "Set FGSNAP_DEBUG=1 to see where."))
    return 0


def _serve(pipe: Pipe, engine: Engine) -> None:
    """Take in what has arrived, step, tell; sleep on the pipe when there is no work."""
    while True:
        waiting = not engine.has_work()
        for message in pipe.receive(wait=waiting, beside=engine.awaited(), patience=engine.time_left()):
            if isinstance(message, wire.Stop):
                return
            _take(pipe, engine, message)
        # Also without a step: who aborted the last request wants to see its blocks free.
        step = engine.step() if engine.has_work() or engine.awaited() is not None else NO_STEP
        pipe.send(wire.Outputs(step, engine.stats()))


def _take(pipe: Pipe, engine: Engine, message: wire.ToWorker) -> None:
    assert isinstance(message, wire.Submit | wire.Abort)
    if isinstance(message, wire.Abort):
        engine.abort(message.request)
        return
    try:
        engine.submit(message.request)
    except RequestError as error:
        _refuse(pipe, message.request.id, error)
    except Exception as error:  # whatever a request can carry that nobody has thought of, it ends alone
        print(f"fgsnap: a request failed inside the engine: {type(error).__name__}.", file=sys.stderr, flush=True)
        _show(error)
        failed = RequestError("The engine failed on this request.", status=500, code="engine_error")
        _refuse(pipe, message.request.id, failed)


def _refuse(pipe: Pipe, request: str, error: RequestError) -> None:
    what, why, next_step = error.what, error.why, error.next_step
    pipe.send(wire.Refused(request, what, why, next_step, error.status, error.param, error.code))


def _phases(pipe: Pipe, started: float) -> Callable[[str], None]:
    begin = started

    def mark(name: str) -> None:
        nonlocal begin
        now = time.monotonic()
        pipe.send(wire.Phase(name, begin, now))
        begin = now

    return mark


def begin_engine(told: Callable[[], wire.Begin], mark: Callable[[str], None]) -> tuple[Engine, wire.Ready]:
    """Everything between a bare process and a model that has proved itself.

    Args:
        told: waits until it is known what to serve; everything that can be done without is done first.
        mark: marks the end of a phase.

    Raises:
        SnapshotRefused: damaged, not the one that was served before, or its canary does not match.
        FgsnapError: whatever decoder and backend refuse.
    """
    from fgsnap.runtime.budget import settled_budget
    from fgsnap.runtime.ranks import load_as_chosen

    for module in AHEAD:
        importlib.import_module(module)
    mark("import engine")
    options = told()
    mark("command line")
    snapshot = _open(options)
    mark("open")
    if options.verify == "full":
        from fgsnap.snapshot import verify

        verify(options.snapshot)
        mark("verify")
    decoder = load_as_chosen(snapshot, options.engine, _end_soon)
    mark("map and bind")
    canary = check_canary(decoder, snapshot)
    mark("canary")
    asked = options.engine
    budget = settled_budget(asked, snapshot.id, decoder)
    grammars = functools.partial(begin_grammars, options.snapshot)
    engine = engine_as_chosen(decoder, snapshot, asked, budget.tokens, grammars)
    return engine, wire.Ready(
        backend=decoder.ops.name,
        device=decoder.ops.device,
        setting=_setting(decoder, snapshot),
        reason=decoder.choices[0].reason,
        canary=canary,
        max_length=decoder.max_length,
        kv_blocks=decoder.blocks,
        block_size=decoder.block_size,
        token_budget=budget.tokens,
        budget_source=budget.source,
    )


def engine_as_chosen(
    decoder: Decoder,
    snapshot: Snapshot,
    options: EngineOptions,
    budget: int,
    grammars: Callable[[], Grammars] | None = None,
) -> Engine:
    """The engine that a user has chosen, over a decoder of this snapshot, with so many tokens a forward.

    Without ``grammars`` it refuses constraints.
    """
    from fgsnap.runtime.engine import Engine

    return Engine(
        decoder,
        eos_token_ids=snapshot.manifest.text.eos_token_ids,
        token_budget=budget,
        max_sequences=options.most_running,
        max_waiting=options.max_waiting,
        admission=options.admission,
        prefix_caching=options.prefix_caching,
        grammars=grammars,
    )


def begin_grammars(snapshot: str) -> Grammars:
    """What makes grammars for the tokenizer of a snapshot. Most engines never need it."""
    from fgsnap.runtime import grammars, nursery

    return grammars.Grammars(functools.partial(nursery.start, snapshot))


def _end_soon() -> None:
    """End this process, of which another rank was lost, also where it waits for work or for a device."""
    time.sleep(TELL_SECONDS)
    os._exit(HostError.exit_code)


def _setting(decoder: Decoder, snapshot: Snapshot) -> str:
    own = snapshot.manifest.tp
    return decoder.setting if decoder.tp == own else f"{decoder.setting}, resharded from degree {own}"


def _open(options: wire.Begin) -> Snapshot:
    from fgsnap.snapshot import open_snapshot

    snapshot = open_snapshot(Path(options.snapshot))
    if snapshot.id != options.id:
        raise SnapshotRefused(
            f"{options.snapshot} is another snapshot than the one that was being served.",
            f"Its id is {snapshot.id[:12]}, not {options.id[:12]}.",
            "Start the service again to serve the new one.",
        )
    return snapshot


def check_canary(decoder: Decoder, snapshot: Snapshot) -> str:
    """One prefill of the canary prompt, its outcome in words. It also warms the backend up.

    A snapshot that was recorded without a canary still has to give finite logits.

    Raises:
        SnapshotRefused: this host computes something else than the reference did at conversion.
    """
    from fgsnap.runtime import canary as canaries

    expected = snapshot.canary
    if expected is None:
        tokens = canaries.prompt(snapshot)
        match = canaries.check(decoder, canaries.Values(tokens, tokens, [0.0] * len(tokens)), math.inf)
    else:
        match = canaries.check(decoder, expected, canaries.TOLERANCE[decoder.dtype])
    if not match.ok:
        raise SnapshotRefused(
            f"The model of {snapshot.path} does not compute what it should.",
            f"With {decoder.ops.name}, {len(match.mismatched)} positions of the canary prompt differ from the "
            f"reference or are not finite, the first at {match.mismatched[0]}.",
            "Run 'fgsnap verify' on it, and try --backend reference.",
        )
    if expected is None:
        return "no canary recorded, logits finite"
    if not match.checked:
        return "canary finite, too close to call at every position"
    return f"canary ok at {match.checked} of {len(expected.tokens)} positions"


def _fail(pipe: Pipe, error: FgsnapError) -> int:
    with contextlib.suppress(ParentGone):
        pipe.send(wire.Failed(error.what, error.why, error.next_step, error.exit_code))
    return error.exit_code


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _show(error: Exception) -> None:
    if os.environ.get("FGSNAP_DEBUG"):
        import traceback

        traceback.print_exception(error)


def end_when_unreadable(snapshot: Snapshot) -> None:
    """End this process with three lines and exit code 3 when a page of a rank file cannot be read any more.

    For commands that compute in one process. Under a server the worker just dies, and the server tells.
    """
    from fgsnap.kernels.library import end_on_bus_error

    lines = (
        f"Error: A page of the snapshot {snapshot.path} could not be read.",
        "A rank file was cut short while it was in use, or its disk fails.",
        "Run 'fgsnap verify' on it.",
    )
    end_on_bus_error("\n" + "\n".join(lines) + "\n", SnapshotRefused.exit_code)


def live(end: socket.socket, started: float, parent: int) -> int:
    """Be a worker of the process ``parent`` until it is done, and return the exit code."""
    gc.disable()  # until it serves
    # The server decides when to stop; a Ctrl-C and a hangup reach the whole process group.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    if not die_with(parent):
        return 0
    pipe = Pipe(end)
    return run(pipe, lambda mark: begin_engine(pipe.begin, mark), started)


def die_with(parent: int) -> bool:
    """Ask the kernel to end this process when its parent ends, however it ends and whatever runs here.

    False when the parent has ended already, so that the kernel will never do it.
    """
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    return os.getppid() == parent


def main(arguments: Sequence[str]) -> int:
    """Live in an interpreter of its own. The arguments: the socket's descriptor and the parent."""
    descriptor, parent = map(int, arguments)
    return live(socket.socket(fileno=descriptor), time.monotonic(), parent)
