"""The server's side of the pipe: one engine worker at a time, watched, and replaced when it dies or stalls.

Everything here runs on the server's event loop. A request's answers arrive in the inbox it was submitted with; when the
worker is lost, every inbox that still waits is told so, and the next worker starts with none of their requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from fgsnap.errors import FgsnapError, RequestError, SnapshotRefused
from fgsnap.runtime import wire
from fgsnap.runtime.process import Worker
from fgsnap.runtime.request import EngineStats, Output, Request

State = Literal["starting", "ready", "stalled", "restarting", "failed", "stopping"]
STALL_SECONDS = 60.0
START_SECONDS = 600.0
RETRIES = 5  # restarts in a row that may fail before the service gives up
STOP_SECONDS = 2.0
RECENT_SECONDS = 10.0  # of which the engine's rate is taken
LONGEST_RETRY = 60  # seconds that a client may be told to stay away
backoff = asyncio.sleep  # between starts that fail; a name of its own for tests to shorten


class Lost(NamedTuple):
    """The engine is gone, and the request with it."""

    why: str


Item = Output | wire.Refused | Lost
Inbox = asyncio.Queue[Item]


class Link:
    """Holds the engine worker for the server.

    Args:
        start: starts a replacement worker; None: nobody does, and ``supervise`` ends with the first one.
        tell: takes a line for the operator.
        on_phase: takes each phase of a worker's start.
        on_ready: called whenever an engine begins to serve.
        damage: what has become of the snapshot since it was opened; None: nothing.
        stall_seconds: how long a worker that has work may say nothing before it counts as hung.
        start_seconds: the same for a worker that starts, which tells of every phase it has done.
    """

    def __init__(
        self,
        start: Callable[[], Worker] | None,
        *,
        tell: Callable[[str], None],
        on_phase: Callable[[wire.Phase], None] = lambda phase: None,
        on_ready: Callable[[wire.Ready], None] = lambda ready: None,
        damage: Callable[[], SnapshotRefused | None] = lambda: None,
        stall_seconds: float = STALL_SECONDS,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.state: State = "starting"
        self.engine: wire.Ready | None = None
        self.stats: EngineStats | None = None
        self.restarts = 0
        self._start = start
        self._tell = tell
        self._on_phase = on_phase
        self._on_ready = on_ready
        self._damage = damage
        self._stall_seconds = stall_seconds
        self._start_seconds = start_seconds
        self._settled = asyncio.Event()  # set while there is nothing to wait for: ready, failed or stopping
        self._open: dict[str, Inbox] = {}
        self._transport: asyncio.WriteTransport | None = None
        self._ended: asyncio.Future[None] | None = None
        self._heard = 0.0
        self._failure: FgsnapError | None = None
        self._began = time.monotonic()  # of the worker's start
        self._start_took = 0.0
        self._paces: deque[tuple[float, int]] = deque(
            maxlen=int(RECENT_SECONDS)
        )  # when, and tokens computed until then

    def retry_after(self) -> int:
        """Whole seconds after which a refused request may be taken: by what waits, or how long a start takes."""
        waits = 0.0
        if self.state == "ready" and self.stats is not None:
            waits = self.stats.waiting_tokens / max(self._rate(), 1.0)
        elif self.state in ("starting", "stalled", "restarting"):
            waits = self._start_took
        return max(1, min(LONGEST_RETRY, math.ceil(waits)))

    def _rate(self) -> float:
        """Tokens a second that the engine has computed lately."""
        now = time.monotonic()
        recent = [(then, tokens) for then, tokens in self._paces if then >= now - 2 * RECENT_SECONDS]
        if not recent or self.stats is None:
            return 0.0
        then, tokens = recent[0]
        return (_computed(self.stats) - tokens) / max(now - then, 0.1)

    def _note_pace(self, stats: EngineStats) -> None:
        """Note once a second how many tokens have been computed."""
        if not self._paces or self._heard >= self._paces[-1][0] + 1.0:
            self._paces.append((self._heard, _computed(stats)))

    async def until_ready(self) -> wire.Ready:
        """Wait until requests can be submitted. RequestError 503 if that will never be."""
        while self.state != "ready" or self.engine is None:
            if self.state in ("failed", "stopping"):
                raise unavailable("The service is shutting down.")
            await self._settled.wait()
        return self.engine

    def submit(self, request: Request, inbox: Inbox) -> None:
        """Send a request to the engine; what it produces comes to ``inbox``."""
        if self.state != "ready":
            inbox.put_nowait(Lost("The engine was lost before the request reached it."))
            return
        if not self._open:
            self._heard = time.monotonic()
        self._open[request.id] = inbox
        self._send(wire.Submit(request))

    def abort(self, request: str) -> None:
        """Drop a request that nobody waits for any more; one that already ended is fine."""
        if self._open.pop(request, None) is not None:
            self._send(wire.Abort(request))

    async def supervise(self, worker: Worker) -> None:
        """Keep a worker alive, ``worker`` first, until cancelled or closed.

        Raises:
            FgsnapError: the first worker could not start, its replacements cannot, time after time, or the snapshot
                was refused: it would be by every other worker too.
        """
        failed_starts = 0
        while True:
            try:
                await self._attend(worker)
            finally:
                if self.state in ("stalled", "stopping"):
                    worker.kill()
            if self.state == "ready":  # it is no more, however it ended; who comes now waits for the next one
                self._settle("restarting")
            how = await asyncio.to_thread(worker.wait)
            if self.state == "stopping":
                return
            failed_starts = 0 if self.engine is not None else failed_starts + 1
            error = self._damage() or self._failure or _died(how)
            refused = error.exit_code == SnapshotRefused.exit_code
            if refused or self._start is None or failed_starts > (RETRIES if self.restarts else 0):
                self._lose_all("The snapshot is damaged." if refused else "The engine cannot start.")
                self._settle("failed")
                raise error
            self._bury(error)
            await backoff(2.0 ** (failed_starts - 1) if failed_starts else 0.0)
            self.restarts += 1
            worker = self._start()

    async def close(self) -> None:
        """End the worker; what is still open is lost. Cancel ``supervise`` afterwards."""
        self._lose_all("The service is shutting down.")
        self._settle("stopping")
        self._send(wire.Stop())
        if self._ended is not None:
            await asyncio.wait({self._ended}, timeout=STOP_SECONDS)

    async def _attend(self, worker: Worker) -> None:
        """Listen to this worker until its pipe closes."""
        self._failure = self.engine = self.stats = None
        self._began = time.monotonic()
        self._paces.clear()
        loop = asyncio.get_running_loop()
        ended = self._ended = loop.create_future()
        self._heard = time.monotonic()
        self._transport, _ = await loop.create_unix_connection(lambda: _Pipe(self._hear, ended), sock=worker.pipe)
        watch = asyncio.create_task(self._watch(worker))
        try:
            await ended
        finally:
            watch.cancel()
            self._transport.close()
            self._transport = self._ended = None

    def _hear(self, message: wire.FromWorker) -> None:
        self._heard = time.monotonic()
        if isinstance(message, wire.Outputs):
            self.stats = message.stats
            self._note_pace(message.stats)
            for output in message.step.outputs():
                self._deliver(output.request, output, last=output.finish is not None)
        elif isinstance(message, wire.Refused):
            self._deliver(message.request, message, last=True)
        elif isinstance(message, wire.Phase):
            self._on_phase(message)
        elif isinstance(message, wire.Failed):
            self._failure = _as_error(message)
        elif self.state != "stopping":
            self.engine = message
            self._start_took = self._heard - self._began
            self._settle("ready")
            self._on_ready(message)

    def _deliver(self, request: str, item: Item, *, last: bool) -> None:
        inbox = self._open.pop(request, None) if last else self._open.get(request)
        if inbox is not None:  # else its client has left
            inbox.put_nowait(item)

    async def _watch(self, worker: Worker) -> None:
        """Kill the worker when it starts, or has work, and says nothing.

        It must be overdue twice: after this process itself has stood still, the first look comes before what the worker
        said meanwhile is read.
        """
        overdue = False
        while True:
            await asyncio.sleep(min(1.0, self._stall_seconds / 4, self._start_seconds / 4))
            was_overdue = overdue
            overdue = self._overdue()
            if overdue and was_overdue:
                self._stall(worker)
                return

    def _overdue(self) -> bool:
        silent = time.monotonic() - self._heard
        if self.engine is None:
            return silent > self._start_seconds
        return bool(self._open) and silent > self._stall_seconds

    def _stall(self, worker: Worker) -> None:
        self._failure = _hung_start(self._start_seconds) if self.engine is None else self._hung_step()
        self._settle("stalled")
        self._lose_all("The engine stalled.")
        worker.kill()

    def _hung_step(self) -> FgsnapError:
        return FgsnapError(
            "The engine stalled.",
            f"It had {len(self._open)} requests and produced nothing for {self._stall_seconds:g} s.",
            "It is replaced. FGSNAP_STALL_SECONDS sets the limit, if single steps take that long here.",
        )

    def _bury(self, error: FgsnapError) -> None:
        if self.state != "stalled":
            self._settle("restarting")
        self._lose_all("The engine worker ended unexpectedly.")
        self._tell(" ".join([*error.lines()[:2], "Restarting the engine."]))

    def _settle(self, state: State) -> None:
        self.state = state
        if state in ("ready", "failed", "stopping"):
            self._settled.set()
        else:
            self._settled.clear()

    def _lose_all(self, why: str) -> None:
        lost, self._open = self._open, {}
        for inbox in lost.values():
            inbox.put_nowait(Lost(why))

    def _send(self, message: wire.ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.frame(message))


class _Pipe(asyncio.Protocol):
    """Frames from the worker; ``ended`` is set when it closes its end, or talks nonsense."""

    def __init__(self, hear: Callable[[wire.FromWorker], None], ended: asyncio.Future[None]) -> None:
        self._hear = hear
        self._ended = ended
        self._buffer = wire.FrameBuffer()

    def data_received(self, data: bytes) -> None:
        for body in self._buffer.feed(data):
            self._hear(wire.decode_from_worker(body))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _computed(stats: EngineStats) -> int:
    return stats.prompt_tokens - stats.cached_tokens + stats.generated_tokens


def unavailable(what: str) -> RequestError:
    """The error for a request that may well succeed a moment later."""
    return RequestError(what, next_step="Try again.", status=503, code="unavailable")


def _as_error(failed: wire.Failed) -> FgsnapError:
    error = FgsnapError(failed.what, failed.why, failed.next_step)
    error.exit_code = failed.exit_code
    return error


def _hung_start(seconds: float) -> FgsnapError:
    return FgsnapError(
        "The engine hung while it started.",
        f"Nothing was heard of it for {seconds:g} s.",
        "FGSNAP_START_SECONDS sets the limit, if reading the snapshot takes that long here.",
    )


def _died(how: str) -> FgsnapError:
    return FgsnapError(f"The engine worker {how}.", "It said nothing about why.", "Set FGSNAP_DEBUG=1 to see more.")
