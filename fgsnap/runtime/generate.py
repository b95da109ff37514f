"""Answers in this process, without a server: for ``fgsnap run`` and for Python programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from fgsnap.errors import FgsnapError, RequestError
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.runtime.request import FinishReason, Request, SamplingParams, Token
from fgsnap.runtime.text import Text, TextStream
from fgsnap.runtime.worker import check_canary
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
        while engine.has_work():
            for output in engine.step():
                if output.finish == "error":
                    raise FgsnapError("The model failed on this prompt.", output.error, "Try another --backend.")
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
    snapshot = open_snapshot(path)
    try:
        decoder = load_as_chosen(snapshot, engine)  # before the tokenizer has threads: it may fork
        text = Text(snapshot)
        ids = text.encode(prompt) if raw or not text.has_chat_template else text.encode_chat([_user(prompt)])
        check_canary(decoder, snapshot)
        running = Engine(
            decoder, eos_token_ids=text.eos_token_ids, token_budget=engine.max_batch_tokens, max_sequences=1
        )
        room = _room(decoder.max_length, len(ids))
        params = SamplingParams(min(max_tokens, room), temperature, top_k, top_p, seed)
        return _collect(generate(running, text, ids, params, stop), len(ids), emit)
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
