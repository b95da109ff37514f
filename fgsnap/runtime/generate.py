"""Answers in this process, without a server: for ``fgsnap run``, ``fgsnap chat`` and Python programs."""

from __future__ import annotations

import contextlib
import functools
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from fgsnap.errors import FgsnapError, RequestError, UsageError
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.runtime.request import Constraint, FinishReason, Output, Request, SamplingParams, Token
from fgsnap.runtime.text import Text, TextStream
from fgsnap.runtime.worker import begin_grammars, check_canary, end_when_unreadable
from fgsnap.snapshot import open_snapshot

_DEFAULT_ENGINE = EngineOptions()


class Delta(NamedTuple):
    """What one step added to an answer. The last one carries ``finish``."""

    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason | None


class Answer(msgspec.Struct, frozen=True):
    """A whole answer and what it cost."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Streams(Protocol):
    """What ``generate`` needs of a Text."""

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> TextStream: ...


def generate(
    engine: Engine, text: Streams, prompt: Sequence[int], params: SamplingParams, stop: Sequence[str] = ()
) -> Iterator[Delta]:
    """One answer, step by step. The engine must have no other request; leaving the iterator early ends this one.

    Raises:
        RequestError: the engine cannot run it.
        FgsnapError: the model failed on it.
    """
    request = Request("generate", tuple(prompt), params)
    stream = text.stream(stop, prompt)
    engine.submit(request)
    try:
        while _goes_on(engine):
            for output in engine.step().outputs():
                if output.finish == "error":
                    raise _failed(params, output)
                delta = stream.feed([token.id for token in output.tokens])
                finish = output.finish
                if finish is not None:
                    delta += stream.flush()
                if stream.finished:
                    finish = "stop"
                yield Delta(delta, output.tokens, finish)
                if finish is not None:
                    return
    finally:
        engine.abort(request.id)


def _goes_on(engine: Engine) -> bool:
    """Whether a step would bring anything; while all that may do so is compiled, this waits."""
    awaited = engine.awaited()
    if awaited is not None and not engine.has_work():
        readiness = select.poll()
        readiness.register(awaited, select.POLLIN)
        readiness.poll()
    return awaited is not None or engine.has_work()


def _failed(params: SamplingParams, output: Output) -> FgsnapError:
    if params.constraint is not None and output.code != "not_finite":
        return RequestError(
            "The constraint failed.", f"{output.error}.", param=params.constraint.field, code=output.code
        )
    return FgsnapError("The model failed on this prompt.", output.error, "Try another --backend.")


def answer(
    path: Path | str,
    prompt: str,
    *,
    emit: Callable[[str], None] | None = None,
    engine: EngineOptions = _DEFAULT_ENGINE,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
    constraint: Constraint | None = None,
) -> Answer:
    """Open a snapshot, check its canary, answer one prompt, and close it.

    Args:
        path: the snapshot's directory.
        prompt: a user's message where the snapshot has a chat template, unless ``raw``; else plain text to continue.
        emit: called with each piece of text as it appears.
        engine: how to run it, as ``fgsnap serve`` would be told.
        max_tokens: most tokens to generate; fewer if the context ends first.
        raw: continue the prompt as plain text.

    The other arguments are those of SamplingParams.
    """
    with opened(path, engine) as model:
        text = model.text
        ids = text.encode(prompt) if raw or not text.has_chat_template else text.encode_chat([_user(prompt)])
        params = SamplingParams(max_tokens, temperature, top_k, top_p, seed=seed, constraint=constraint)
        return model.answer(ids, params, stop, emit)


def chat(
    path: Path | str,
    *,
    read: Callable[[], str | None],
    emit: Callable[[str], None],
    engine: EngineOptions = _DEFAULT_ENGINE,
    system: str | None = None,
    params: SamplingParams,
) -> None:
    """Hold a conversation: read a message, answer it, and so on until ``read`` gives None.

    SIGINT during an answer ends the answer and not the conversation, and a second one both; what came stays said.

    Raises:
        UsageError: the snapshot has no chat template.
        RequestError: the conversation no longer fits the context.
    """
    with opened(path, engine) as model:
        if not model.text.has_chat_template:
            raise UsageError(
                "This snapshot has no chat template.",
                "It was made from a model that continues text.",
                'Use fgsnap run SNAPSHOT "...".',
            )
        messages = [] if system is None else [{"role": "system", "content": system}]
        while (said := read()) is not None:
            messages.append(_user(said))
            prompt, answered = model.text.encode_chat(messages), _Heard(emit)
            with answered.until_interrupted():
                model.answer(prompt, params, (), answered.add)
            emit("\n")
            messages.append({"role": "assistant", "content": answered.text})


class _Interrupted(Exception):
    """Somebody has heard enough of an answer."""


class _Heard:
    """What has been shown of an answer so far."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self.text = ""
        self._emit = emit
        self._interrupted = False

    def add(self, piece: str) -> None:
        self.text += piece
        self._emit(piece)
        if self._interrupted:
            raise _Interrupted

    @contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """SIGINT ends what is done here after the next piece of text, and a second one at once.

        In the middle of a step an exception would leave tensor parallel ranks with different batches.
        """
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with contextlib.suppress(_Interrupted):
                yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True


class Model(NamedTuple):
    """A snapshot that is open and has proved itself."""

    engine: Engine
    text: Text
    max_length: int

    def answer(
        self, prompt: Sequence[int], params: SamplingParams, stop: Sequence[str], emit: Callable[[str], None] | None
    ) -> Answer:
        """One answer, of no more tokens than the context has room for. RequestError: it has none."""
        room = _room(self.max_length, len(prompt))
        fitting = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room))
        return _collect(generate(self.engine, self.text, prompt, fitting, stop), len(prompt), emit)


@contextmanager
def opened(path: Path | str, options: EngineOptions = _DEFAULT_ENGINE) -> Iterator[Model]:
    """The snapshot at ``path``, loaded and checked by its canary, for one request at a time."""
    snapshot = open_snapshot(path)
    try:
        decoder = load_as_chosen(snapshot, options)  # before the tokenizer has threads: it may fork
        end_when_unreadable(snapshot)
        text = Text(snapshot)
        check_canary(decoder, snapshot)
        engine = Engine(
            decoder,
            eos_token_ids=text.eos_token_ids,
            token_budget=options.max_batch_tokens,
            max_sequences=1,
            grammars=functools.partial(begin_grammars, str(path)),
        )
        with contextlib.closing(engine):
            yield Model(engine, text, decoder.max_length)
    finally:
        snapshot.close()


def _room(context: int, prompt: int) -> int:
    if prompt >= context:
        raise RequestError(
            "The prompt does not fit the context.",
            f"It has {prompt} tokens and the context {context}, of which the answer needs at least one.",
            "Shorten the prompt, or raise --max-model-len if it was lowered.",
        )
    return context - prompt


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def _collect(deltas: Iterator[Delta], prompt_tokens: int, emit: Callable[[str], None] | None) -> Answer:
    parts: list[str] = []
    tokens = 0
    finish: FinishReason = "length"
    for delta in deltas:
        parts.append(delta.text)
        tokens += len(delta.tokens)
        finish = delta.finish or finish
        if emit is not None and delta.text:
            emit(delta.text)
    return Answer("".join(parts), finish, prompt_tokens, tokens)
