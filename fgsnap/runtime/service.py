"""The running service: the HTTP server, the engine's supervisor and the signals, from readiness to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsnap.errors import SnapshotRefused, UsageError
from fgsnap.runtime import startup, wire
from fgsnap.runtime.connections import Listener
from fgsnap.runtime.link import STALL_SECONDS, START_SECONDS, Link
from fgsnap.runtime.server import App, Identity, TextSide
from fgsnap.runtime.worker import ENDING

if TYPE_CHECKING:
    from fgsnap.runtime.options import ServeOptions
    from fgsnap.runtime.process import Worker
    from fgsnap.snapshot import Snapshot

INTERRUPT_GRACE_SECONDS = 2.0  # who presses Ctrl-C does not want to wait
DAMAGE_SECONDS = 1.0  # between two looks at files that nobody should change
CLOSE_SECONDS = 2.0  # for connections to take what was written to them, after the last request
MOST_FILES = 1 << 14
LOOPBACK = ("127.", "localhost", "::1")


class Service:
    """One ``fgsnap serve``.

    Args:
        options: the command's.
        snapshot: opened.
        text: its tokenizer and template.
        keys: accepted API keys.
        clock: the phases of this process so far.
        respawn: starts a worker in place of one that died; None: the service ends with it.
    """

    def __init__(
        self,
        options: ServeOptions,
        snapshot: Snapshot,
        text: TextSide,
        keys: Sequence[bytes],
        clock: startup.Clock,
        respawn: Callable[[], Worker] | None,
    ) -> None:
        self._options = options
        self._snapshot = snapshot
        self._clock = clock
        self._worker_phases: list[wire.Phase] = []
        self._started = False
        self._answered = False
        self._url = ""
        self._link = Link(
            respawn,
            tell=_tell,
            on_phase=self._note_phase,
            on_ready=self._note_ready,
            damage=self._damage,
            stall_seconds=_seconds("FGSNAP_STALL_SECONDS", STALL_SECONDS),
            start_seconds=_seconds("FGSNAP_START_SECONDS", START_SECONDS),
        )
        self._app = App(
            text,
            self._link,
            _identity(options, snapshot),
            default_max_tokens=options.default_max_tokens,
            max_open=options.engine.most_live(),
            keys=keys,
            startup=self.report,
            on_request=self._note_request,
            on_token=self._note_token,
        )

    async def run(self, listener: socket.socket, worker: Worker) -> int:
        """Serve on ``listener`` with ``worker`` until a signal or a failure; the exit code.

        Raises:
            FgsnapError: the engine cannot start, or the snapshot proved damaged.
        """
        _allow_many_files()
        self._url = _url(listener)
        self._warn_if_open(listener)
        signals = _signals()
        http = Listener(self._app)
        http.start(listener)
        self._note_serving()
        engine = asyncio.create_task(self._link.supervise(worker))
        stopping = asyncio.create_task(signals.get())
        checking = asyncio.create_task(self._checked_while_serving())
        try:
            await asyncio.wait({engine, stopping, checking}, return_when=asyncio.FIRST_COMPLETED)
            self._app.draining = True
            if stopping.done():
                code = await self._drained(stopping.result(), signals)
                _tell("stopped.")
                return code
            for failed in (engine, checking):
                if failed.done():
                    failed.result()  # raises what ended the service
            return 1
        finally:
            await self._link.close()
            await http.close(CLOSE_SECONDS)
            for task in (engine, stopping, checking):
                task.cancel()
            await asyncio.gather(engine, stopping, checking, return_exceptions=True)

    async def _drained(self, first: int, signals: asyncio.Queue[int]) -> int:
        """Let open requests finish within the grace time; a second signal cuts it short. Returns the exit code."""
        grace = INTERRUPT_GRACE_SECONDS if first == signal.SIGINT else self._options.grace
        idle = asyncio.create_task(self._idle())
        again = asyncio.create_task(signals.get())
        await asyncio.wait({idle, again}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        if again.done():
            return 128 + again.result()
        again.cancel()
        if self._app.open:
            _tell(f"{self._app.open} requests did not finish within {grace:g} s and were cut.")
        return 0 if first == signal.SIGTERM else 128 + first

    async def _idle(self) -> None:
        while self._app.open:
            await asyncio.sleep(0.02)

    async def _checked_while_serving(self) -> None:
        """Look after the snapshot for as long as it is served; SnapshotRefused ends the service.

        The engine looks after every step, so nothing wrong is answered; this is for a service that is not asked. With
        --verify touch everything is hashed once the engine serves.
        """
        if self._options.verify == "touch":
            from fgsnap.snapshot import verify

            await self._link.until_ready()
            await asyncio.to_thread(verify, self._options.snapshot, self._go_on)
        while not (damage := self._damage()):
            await asyncio.sleep(DAMAGE_SECONDS)
        raise damage

    def _damage(self) -> SnapshotRefused | None:
        try:
            self._snapshot.check_unchanged()
        except SnapshotRefused as damage:
            return damage
        return None

    def _go_on(self, done: int, total: int) -> None:
        """Called as the check proceeds; it must not hold up the end of the service."""
        if self._app.draining:
            raise InterruptedError("the service is ending")

    def report(self) -> dict[str, Any]:
        """The start-up so far."""
        engine = self._link.engine
        facts = {
            "snapshot": self._snapshot.id,
            "backend": engine.backend if engine else None,
            "device": engine.device if engine else None,
            "setting": engine.setting if engine else None,
            "canary": engine.canary if engine else None,
        }
        return startup.report(self._clock.phases, self._worker_phases, facts)

    def _note_serving(self) -> None:
        self._clock.mark("serve http")
        startup.collect_garbage()

    def _note_phase(self, phase: wire.Phase) -> None:
        if not self._started:  # a worker that replaces another has phases of its own, which are not the service's
            self._worker_phases.append(phase)

    def _note_ready(self, ready: wire.Ready) -> None:
        self._app.places.resize(self._options.engine.most_live(ready.token_budget))
        if self._started:
            _tell("the engine is ready again.")
            return
        self._started = True
        phase = self._clock.mark(startup.WAIT)
        seconds = phase.end - self._clock.phases[0].begin
        if (self._options.engine.backend, ready.backend, ready.device) == ("auto", "reference", "cpu"):
            _tell(f"{ready.reason}; the reference backend computes, more slowly.")
        what = f"{ready.backend} on {ready.device}, {ready.setting}, {ready.canary}"
        if ready.budget_source == "measured":
            what += f", {ready.token_budget} tokens a forward as measured"
        _tell(f"ready at {self._url} ({what}) in {seconds:.2f} s")
        self._write_report()

    def _note_request(self) -> None:
        if self._started and not self._answered:
            self._clock.mark(startup.IDLE)

    def _note_token(self) -> None:
        if not self._answered:
            self._answered = True
            self._clock.mark("first token")
            self._write_report()

    def _write_report(self) -> None:
        if self._options.startup_report is None:
            return
        try:
            startup.write_report(Path(self._options.startup_report), self.report())
        except OSError as error:
            _tell(f"the start-up report could not be written: {error.strerror}.")

    def _warn_if_open(self, listener: socket.socket) -> None:
        if not self._options.api_key_file and not str(listener.getsockname()[0]).startswith(LOOPBACK):
            _tell("anyone who reaches this address may use the service; --api-key-file asks for a key.")


def _seconds(name: str, default: float) -> float:
    setting = os.environ.get(name)
    try:
        seconds = default if setting is None else float(setting)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} is {setting!r}.", "It is a number of seconds above 0.")
    return seconds


def _allow_many_files() -> None:
    """A connection takes a descriptor; many systems let a process have 1024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MOST_FILES:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_FILES), hard))


def _signals() -> asyncio.Queue[int]:
    """What asks the service to end, from now on, as it comes. Under nohup a hangup does not."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        loop.add_signal_handler(number, queue.put_nowait, int(number))
    return queue


def _identity(options: ServeOptions, snapshot: Snapshot) -> Identity:
    spec = snapshot.manifest.spec
    return Identity(
        _model_name(options, snapshot), snapshot.id, spec.vocab_size, options.engine.max_model_len or spec.max_length
    )


def _model_name(options: ServeOptions, snapshot: Snapshot) -> str:
    """What clients call the model: as told, else its name on the Hub, else that of the snapshot's directory."""
    source = snapshot.manifest.provenance.source
    if options.served_model_name or "/" in source:
        return options.served_model_name or source
    return Path(os.path.abspath(options.snapshot)).name or source  # Path.absolute() would keep a last ".."


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tell(line: str) -> None:
    print(f"fgsnap: {line}", file=sys.stderr, flush=True)
