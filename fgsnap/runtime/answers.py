"""What a client gets back: OpenAI's bodies, whole or in chunks, and errors in the form its clients read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from fgsnap.errors import RequestError
from fgsnap.runtime.request import Token

Spell = Callable[[int], bytes]  # the bytes a token stands for


class Piece(NamedTuple):
    """What one step gave one choice.

    Attributes:
        text: what may be shown now.
        tokens: what was generated, shown or not: they are counted.
        shown: the tokens that now have a part in the text shown so far: their log probabilities may be told.
        finish: why the choice ended, if it did.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...]
    shown: tuple[Token, ...]
    finish: str | None


class Heading(NamedTuple):
    """What every body and chunk of one answer begins with."""

    chat: bool
    id: str
    created: int
    model: str
    fingerprint: str

    def body(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": ("chat.completion" + ".chunk" * streamed) if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Answer:
    """One answer in the making. Give its pieces to ``chunk`` for a stream, or to ``add`` and then call ``whole``.

    Args:
        heading: of every body.
        choices: how many are made, of all prompts.
        best: the client gets the first number of each second number of choices, the likeliest by the mean logprob of
            their tokens; None: all.
        prompt_tokens: of all prompts together.
        spell: a token's bytes, where log probabilities are wanted; None where not.
        usage: a stream's client wants the token counts at its end.
    """

    def __init__(
        self,
        heading: Heading,
        *,
        choices: int,
        prompt_tokens: int,
        spell: Spell | None,
        usage: bool = False,
        best: tuple[int, int] | None = None,
    ) -> None:
        self._heading = heading
        self._best_of = best
        self._prompt_tokens = prompt_tokens
        self._spell = spell
        self._usage = usage
        self._completion_tokens = 0
        self._offsets = [0] * choices  # characters of each choice's tokens so far
        self._pieces: list[list[Piece]] = [[] for _ in range(choices)]

    def opening(self) -> bytes:
        """What a stream begins with: for a chat, each choice's role and nothing said yet."""
        if not self._heading.chat:
            return b""
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return b"".join(self._chunk([{"index": index, **start}]) for index in range(len(self._offsets)))

    def chunk(self, piece: Piece) -> bytes:
        """The piece as a server-sent event; nothing where it has nothing to tell."""
        self._completion_tokens += len(piece.tokens)
        if not piece.text and piece.finish is None and (self._spell is None or not piece.shown):
            return b""
        said: dict[str, Any] = {"text": piece.text}
        if self._heading.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        logprobs = self._logprobs(piece.choice, piece.shown) if piece.shown else None
        return self._chunk([{"index": piece.choice, **said, "logprobs": logprobs, "finish_reason": piece.finish}])

    def closing(self) -> bytes:
        """What a stream ends with."""
        if not self._usage:
            return DONE
        body = {**self._heading.body(streamed=True), "choices": [], "usage": self.usage()}
        return event(msgspec.json.encode(body)) + DONE

    def add(self, piece: Piece) -> None:
        self._completion_tokens += len(piece.tokens)
        self._pieces[piece.choice].append(piece)

    def whole(self) -> bytes:
        """The answer that the added pieces make."""
        choices = [self._choice(*each) for each in enumerate(self._best())]
        body = {**self._heading.body(streamed=False), "choices": choices, "usage": self.usage()}
        return msgspec.json.encode(body)

    def _best(self) -> list[list[Piece]]:
        """The pieces of the choices that the client gets."""
        if self._best_of is None:
            return self._pieces
        kept, made = self._best_of
        groups = [self._pieces[first : first + made] for first in range(0, len(self._pieces), made)]
        return [pieces for group in groups for pieces in sorted(group, key=_likelihood, reverse=True)[:kept]]

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        said = {"message": {"role": "assistant", "content": text}} if self._heading.chat else {"text": text}
        logprobs = self._logprobs(index, [token for piece in pieces for token in piece.shown])
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish}

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        # A client that asked for usage gets the key in every chunk, null until the last.
        waiting = {"usage": None} if self._usage else {}
        return event(msgspec.json.encode({**self._heading.body(streamed=True), "choices": choices, **waiting}))

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._spell is None:
            return None
        if self._heading.chat:
            return _chat_logprobs(tokens, self._spell)
        body = _completion_logprobs(tokens, self._spell, self._offsets[index])
        self._offsets[index] += sum(map(len, body["tokens"]))
        return body


def _likelihood(pieces: Sequence[Piece]) -> float:
    logprobs = [token.logprob for piece in pieces for token in piece.tokens]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _chat_logprobs(tokens: Sequence[Token], spell: Spell) -> dict[str, Any]:
    def entry(id: int, logprob: float) -> dict[str, Any]:
        raw = spell(id)
        return {"token": _readable(raw), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(id, logprob) for id, logprob in token.top]}
            for token in tokens
        ]
    }


def _completion_logprobs(tokens: Sequence[Token], spell: Spell, offset: int) -> dict[str, Any]:
    names = [_readable(spell(token.id)) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token, name, spell) for token, name in zip(tokens, names, strict=True)],
        "text_offset": offsets,
    }


def _top(token: Token, name: str, spell: Spell) -> dict[str, float]:
    """Likeliest first; the picked token is always there, with the very number it has outside.

    Tokens that read the same share a key: the picked one has it, else the likeliest.
    """
    found: dict[str, float] = {}
    for id, logprob in token.top:
        found.setdefault(_readable(spell(id)), logprob)
    found[name] = token.logprob
    return found


def _readable(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")
KEEP_ALIVE = b": still working\n\n"


def error_body(error: RequestError) -> bytes:
    """The error as OpenAI's clients read it."""
    return msgspec.json.encode(
        {
            "error": {
                "message": " ".join(error.lines()),
                "type": _error_type(error.status),
                "param": error.param or None,
                "code": error.code or None,
            }
        }
    )


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


def error_event(error: RequestError) -> bytes:
    """An error after the headers are out: clients look for a truthy ``error`` in a chunk."""
    return event(error_body(error)) + DONE
