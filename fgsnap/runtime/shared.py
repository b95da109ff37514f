"""An engine in this process, shared by whoever waits for answers of it.

Nobody runs it in the background: who waits runs a step, and everything that is open moves on by a token. So answers
that are wanted at the same time, of one call or of several, from one thread or from many, are one batch.
"""

from __future__ import annotations

import itertools
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Unpack

from fgsnap.errors import FgsnapError, RequestError, UsageError
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Constraint, EngineStats, FinishReason, Output, Request, SamplingParams, Token
from fgsnap.runtime.text import TextStream, Told

PATIENCE_MS = 50
"""While all that is wanted is being compiled, whoever waits lets others ask so often."""


class Ask(NamedTuple):
    """One answer that is wanted; ``place`` says which prompt it is, where there are several."""

    prompt: Sequence[int]
    params: SamplingParams
    place: str = ""
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""


class Delta(NamedTuple):
    """What one step added to answer number ``answer``. Its last one carries ``finish``.

    ``prompt`` are the next of the prompt's tokens with their logprobs, where these are wanted; the first has none.
    ``ending`` is the token that ended the answer, if one did, and is not among ``tokens``.
    """

    answer: int
    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None
    prompt: tuple[Token, ...] = ()
    ending: Token | None = None


class Streams(Protocol):
    """What is needed of a Text."""

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = (), **how: Unpack[Told]) -> TextStream: ...


class SharedEngine:
    """Answers of one engine. Any thread may ask, and leave an iterator in the middle.

    SIGINT waits for the end of a step, for one that is cut in the middle leaves engine and ranks in disagreement. When
    a step fails, or a second SIGINT cuts it, the engine is let go, as ``close`` does.
    """

    def __init__(self, engine: Engine, text: Streams) -> None:
        self._engine: Engine | None = engine
        self._text = text
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._inboxes: dict[str, deque[Output]] = {}
        self._left: deque[str] = deque()
        self._ids = map(str, itertools.count())

    @property
    def closed(self) -> bool:
        return self._engine is None

    def generate(self, asks: Sequence[Ask], stop: Sequence[str] = ()) -> Iterator[list[Delta]]:
        """The answers, step by step: of each step what it added. Leaving the iterator early ends them all.

        Raises:
            RequestError: the engine refuses one of them, and then none is begun; or a constraint cannot be followed.
            FgsnapError: the model failed on one of them, and the others are ended.
            UsageError: the engine is closed.
        """
        inbox: deque[Output] = deque()
        making: dict[str, tuple[int, TextStream, Constraint | None]] = {}
        try:
            for index, ask in enumerate(asks):
                stream = self._text.stream(stop, ask.prompt, min_tokens=ask.params.min_tokens)
                making[next(self._ids)] = index, stream, ask.params.constraint
            self._submit(asks, making, inbox)
            while making:
                deltas, ended = [], []
                for output in self._outputs(inbox):
                    if output.request in making:  # one that a stop text has ended may have had more to say
                        deltas.append(delta := _delta(output, *making[output.request]))
                        if delta.finish is not None:
                            del making[output.request]
                            ended.append(output.request)
                self._leave(ended)  # the engine does not know of stop texts
                if deltas:
                    yield deltas
        finally:
            self._leave(making)

    def stats(self) -> EngineStats:
        """Gauges and counters of the engine as of now."""
        with self._alone() as engine:
            return engine.stats()

    def close(self) -> None:
        """Let go of the engine; who still waits for an answer gets an error."""
        with uninterrupted(), self._lock:
            self._let_go()

    def _submit(self, asks: Sequence[Ask], ids: Iterable[str], inbox: deque[Output]) -> None:
        with self._alone() as engine:
            for id, ask in zip(ids, asks, strict=True):
                with placed(ask.place):
                    engine.submit(_request(id, ask))
                self._inboxes[id] = inbox

    def _outputs(self, inbox: deque[Output]) -> list[Output]:
        """What has come for this inbox, after one more step if nothing had."""
        with self._alone() as engine:
            if not inbox:
                self._step(engine)
            found = list(inbox)
            inbox.clear()
            return found

    def _step(self, engine: Engine) -> None:
        try:
            _await(engine)
            step = engine.step()
        except BaseException:
            self._let_go()
            raise
        for output in step.outputs():
            self._inboxes[output.request].append(output)

    def _let_go(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _leave(self, ids: Iterable[str]) -> None:
        """End these requests; those that have ended already are none.

        An iterator may be left wherever garbage is collected, also within a step: whoever has the engine does it then.
        """
        self._left.extend(ids)
        with uninterrupted():
            if self._left and self._lock.acquire(blocking=False):
                try:
                    self._abort_left()
                finally:
                    self._lock.release()

    @contextmanager
    def _alone(self) -> Iterator[Engine]:
        with uninterrupted():
            with self._turn:  # one that comes again and again does not overtake one that waits
                self._lock.acquire()
            try:
                self._abort_left()
                if self._engine is None:
                    raise UsageError("This pipeline is closed.", "Or a step of it failed.", "Load the snapshot again.")
                yield self._engine
                self._abort_left()
            finally:
                self._lock.release()

    def _abort_left(self) -> None:
        while self._left:
            id = self._left.popleft()
            self._inboxes.pop(id, None)
            if self._engine is not None:
                self._engine.abort(id)


def _await(engine: Engine) -> None:
    """Wait where a step would bring nothing yet, as all that is wanted is being compiled."""
    awaited = engine.awaited()
    if awaited is not None and not engine.has_work():
        readiness = select.poll()
        readiness.register(awaited, select.POLLIN)
        readiness.poll(PATIENCE_MS)


def _request(id: str, ask: Ask) -> Request:
    return Request(
        id,
        tuple(ask.prompt),
        ask.params,
        priority=ask.priority,
        timeout=ask.timeout,
        cache_salt=ask.cache_salt,
    )


def _delta(output: Output, answer: int, stream: TextStream, constraint: Constraint | None) -> Delta:
    """What an output adds to an answer; a stop text within it ends the answer."""
    if output.finish == "error":
        if output.code == "deadline_exceeded":
            why = f"{output.error}.".capitalize()
            raise RequestError("The request ran out of time.", why, param="timeout", status=504, code=output.code)
        if constraint is not None and output.code != "not_finite":
            what = f"The constraint in {constraint.field} failed."
            raise RequestError(what, f"{output.error}.".capitalize(), param=constraint.field, code=output.code)
        if output.code == "constraint":
            raise RequestError("The answer cannot go on.", f"{output.error}.".capitalize(), code=output.code)
        raise FgsnapError("The model failed on this prompt.", output.error, "Try another backend.")
    text = stream.feed([token.id for token in output.tokens])
    if output.finish is not None:
        text += stream.flush()
    finish = "stop" if stream.finished else output.finish
    return Delta(answer, text, output.tokens, finish, output.prompt, output.ending)


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Have an error about a prompt say which prompt it is about."""
    try:
        yield
    except RequestError as error:
        if not place or (error.param and not error.param.startswith(("prompt", "messages"))):
            raise
        param = place + error.param.removeprefix("prompt").removeprefix("messages")
        raise RequestError(
            f"{place}: {error.what}", error.why, error.next_step, status=error.status, param=param, code=error.code
        ) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT in here takes effect when this is over; a second one at once."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = _Noted(handler)
    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted.once:
            signal.raise_signal(signal.SIGINT)


class _Noted:
    """A handler that notes one signal, and passes on what follows."""

    def __init__(self, handler: Callable[..., object]) -> None:
        self.once = False
        self._handler = handler

    def __call__(self, number: int, frame: object) -> None:
        if self.once:
            self.once = False
            self._handler(number, frame)
        self.once = True
