"""What a client gets back: OpenAI's bodies, whole or in chunks, and errors in the form its clients read."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from fgsnap.errors import RequestError
from fgsnap.runtime.request import Token, likelihood

PART = 64  # tokens of a prompt whose logprobs are encoded at once: nothing else runs meanwhile
INLINE_ENTRIES = 1 << 12  # more logprobs than so are made JSON on a thread, so that the streams of others flow on

MARK = b"\0"  # JSON has none: texts have it escaped

Spell = Callable[[int], bytes]  # the bytes a token stands for
Place = tuple[int, tuple[bytes, int]]  # characters before it, and what the decoder has of the next


class Piece(NamedTuple):
    """What one step gave one choice.

    Attributes:
        text: what may be shown now.
        tokens: what was generated, shown or not: they are counted.
        shown: the tokens that now have a part in the text shown so far: their log probabilities may be told.
        finish: why the choice ended, if it did.
        prompt: of a first piece without tokens all tokens of the prompt, where their logprobs are wanted. The first one
            has none.
        ending: of a last piece the token that ended the choice and is not among ``tokens``.
        stop_reason: of a last piece the stop text, or of the stop tokens that the client named the one, that ended it.
        cached: of the prompt's tokens those that the prefix cache had, where it is known by now.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...]
    shown: tuple[Token, ...]
    finish: str | None
    prompt: tuple[Token, ...] = ()
    ending: Token | None = None
    stop_reason: str | int | None = None
    cached: int = 0


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
        each: how many of each prompt.
        best: so many of each prompt's the client gets, the likeliest by the mean logprob of their tokens; None: all.
        prompt_tokens: of all prompts together.
        spell: a token's bytes, where log probabilities are wanted; None where not.
        usage: a stream's client wants the token counts at its end.
        echo_top: the prompt's tokens have log probabilities too, with so many of the likeliest; -1: they have not.
        prompt_top: the same, told in a field of its own, as vLLM does; it needs ``prompt_spell``.
        entries: of the prompts' logprobs, in all choices together.
    """

    def __init__(
        self,
        heading: Heading,
        *,
        choices: int,
        each: int = 1,
        prompt_tokens: int,
        spell: Spell | None,
        usage: bool = False,
        best: int | None = None,
        echo_top: int = -1,
        prompt_top: int = -1,
        prompt_spell: Spell = lambda token: b"",
        entries: int = 0,
    ) -> None:
        self._heading = heading
        self._each = each
        self._best_of = best
        self._prompt_tokens = prompt_tokens
        self._spell = spell
        self._usage = usage
        self._echo_top = echo_top
        self._prompt_top = prompt_top
        self._prompt_spell = prompt_spell
        self.large = entries > INLINE_ENTRIES
        # By prompt: its choices tell the same of it, so it is encoded once.
        self._tables: dict[int, msgspec.Raw] = {}
        self._echoes: dict[int, _Echo] = {}
        self._inserts: list[list[bytes]] = []
        self._completion_tokens = 0
        self._cached = [0] * choices
        self._places = [_Places() for _ in range(choices)]
        self._pieces: list[list[Piece]] = [[] for _ in range(choices)]

    def opening(self) -> bytes:
        """What a stream begins with: for a chat, each choice's role and nothing said yet."""
        if not self._heading.chat:
            return b""
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return b"".join(self._chunk([{"index": index, **start}]) for index in range(len(self._places)))

    def chunk(self, piece: Piece) -> bytes:
        """The piece as a server-sent event; nothing where it has nothing to tell."""
        self._count(piece)
        told = piece.shown or piece.prompt
        if not piece.text and piece.finish is None and (self._spell is None or not told):
            return b""
        said: dict[str, Any] = {"text": piece.text}
        if self._heading.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        logprobs = self._logprobs(piece.choice, [piece]) if told else None
        ended = {} if piece.finish is None else {"stop_reason": piece.stop_reason}
        choice = {"index": piece.choice, **said, "logprobs": logprobs, "finish_reason": piece.finish, **ended}
        return self._chunk([choice])

    def closing(self) -> bytes:
        """What a stream ends with."""
        if not self._usage:
            return DONE
        body = {**self._heading.body(streamed=True), "choices": [], "usage": self.usage()}
        return event(msgspec.json.encode(body)) + DONE

    def add(self, piece: Piece) -> None:
        self._count(piece)
        self._pieces[piece.choice].append(piece)

    def _count(self, piece: Piece) -> None:
        self._completion_tokens += len(piece.tokens)
        self._cached[piece.choice] = max(self._cached[piece.choice], piece.cached)

    def whole(self) -> list[bytes]:
        """The answer that the added pieces make, in parts: what choices share is not copied for each."""
        choices = [self._choice(*each) for each in enumerate(self._best())]
        body: dict[str, Any] = {**self._heading.body(streamed=False), "choices": choices, "usage": self.usage()}
        if self._heading.chat and self._prompt_top >= 0:
            body["prompt_logprobs"] = self._prompt_logprobs(self._pieces[0])
        return self._encoded(body)

    def _best(self) -> list[list[Piece]]:
        """The pieces of the choices that the client gets."""
        if self._best_of is None:
            return self._pieces
        groups = [self._pieces[first : first + self._each] for first in range(0, len(self._pieces), self._each)]
        ranked = [sorted(group, key=_likelihood, reverse=True) for group in groups]
        return [pieces for group in ranked for pieces in group[: self._best_of]]

    def usage(self) -> dict[str, Any]:
        # A prompt is counted once, as its first choice found it: the others share with that one in any case.
        cached = sum(self._cached[:: self._each])
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        said = {"message": {"role": "assistant", "content": text}} if self._heading.chat else {"text": text}
        choice: dict[str, Any] = {
            "index": index,
            **said,
            "logprobs": self._logprobs(index, pieces),
            "finish_reason": pieces[-1].finish,
            "stop_reason": pieces[-1].stop_reason,
        }
        if not self._heading.chat and self._prompt_top >= 0:
            choice["prompt_logprobs"] = self._prompt_logprobs(pieces)
        return choice

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        # A client that asked for usage gets the key in every chunk, null until the last.
        waiting = {"usage": None} if self._usage else {}
        body = {**self._heading.body(streamed=True), "choices": choices, **waiting}
        return event(b"".join(self._encoded(body)))

    def _encoded(self, body: dict[str, Any]) -> list[bytes]:
        """The body in parts, with what was put aside in its place."""
        parts: list[bytes] = []
        for number, part in enumerate(msgspec.json.encode(body).split(MARK)):
            parts += self._inserts[int(part)] if number % 2 else (part,)
        return parts

    def _aside(self, parts: list[bytes]) -> msgspec.Raw:
        """What stands in a body for these parts of it."""
        self._inserts.append(parts)
        return msgspec.Raw(MARK + b"%d" % (len(self._inserts) - 1) + MARK)

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._spell is None:
            return None
        tokens = [token for piece in pieces for token in piece.shown]
        if self._heading.chat:
            return _chat_logprobs(tokens, self._spell)
        echo = self._echo(pieces)
        if echo is None:
            return _completion_logprobs(tokens, self._spell, self._places[index])
        self._places[index] = places = _Places(*echo.end)
        own = _completion_logprobs(tokens, self._spell, places)
        return {name: [of_prompt, *own[name]] for name, of_prompt in echo.columns.items()}

    def _echo(self, pieces: Sequence[Piece]) -> _Echo | None:
        """The prompt's tokens that are told as if they were the answer's."""
        if self._spell is None or self._echo_top < 0 or not pieces[0].prompt:
            return None
        prompt = self._prompt_of(pieces)
        if prompt not in self._echoes:
            columns, end = _echoed(pieces[0], self._echo_top, self._spell)
            self._echoes[prompt] = _Echo({name: self._aside(parts) for name, parts in columns.items()}, end)
        return self._echoes[prompt]

    def _prompt_logprobs(self, pieces: Sequence[Piece]) -> msgspec.Raw:
        """An entry for each token of the prompt, as vLLM has it: by token id, itself and the likeliest."""
        prompt = self._prompt_of(pieces)
        if prompt not in self._tables:
            self._tables[prompt] = self._aside(_table(pieces[0].prompt, self._prompt_top, self._prompt_spell))
        return self._tables[prompt]

    def _prompt_of(self, pieces: Sequence[Piece]) -> int:
        return pieces[0].choice // self._each


class _Echo(NamedTuple):
    """A prompt told as a part of the answers.

    Attributes:
        columns: by the name of a list in the logprobs, what it begins with.
        end: where the answers' own tokens begin.
    """

    columns: dict[str, msgspec.Raw]
    end: Place


def _echoed(piece: Piece, count: int, spell: Spell) -> tuple[dict[str, list[bytes]], Place]:
    """The columns of an echo, each encoded in parts and without its brackets, and where it ends."""
    # Spelled tokens may be longer than the text by a bos or a space: so they are laid to its end.
    spelled = _readable(b"".join(spell(token.id) for token in piece.prompt))
    places = _Places(len(piece.text) - len(spelled))
    parts: dict[str, list[bytes]] = {}
    for start in range(0, len(piece.prompt), PART):
        tokens = [Token(token.id, token.logprob, token.top[:count]) for token in piece.prompt[start : start + PART]]
        body = _completion_logprobs(tokens, spell, places)
        if start == 0:
            body["token_logprobs"][0] = body["top_logprobs"][0] = None
        for name, column in body.items():
            parts.setdefault(name, []).append(b"," * (start > 0) + msgspec.json.encode(column)[1:-1])
    return parts, places.now()


def _table(prompt: Sequence[Token], count: int, spell: Spell) -> list[bytes]:
    """The prompt's logprobs as vLLM has them, encoded in parts."""
    parts = [b"[null"]
    for start in range(1, len(prompt), PART):
        entries = [_ranked(token, token.top[:count], spell) for token in prompt[start : start + PART]]
        parts.append(b"," + msgspec.json.encode(entries)[1:-1])
    return [*parts, b"]"]


def _likelihood(pieces: Sequence[Piece]) -> float:
    return likelihood([token for piece in pieces for token in piece.tokens], pieces[-1].ending)


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


class _Places:
    """Where the tokens of one text begin, in characters; one that begins within a character has the place of that."""

    def __init__(self, at: int = 0, state: tuple[bytes, int] = (b"", 0)) -> None:
        self.at = at  # characters that are whole
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate(state)

    def now(self) -> Place:
        """What to make another with, that goes on from here."""
        return self.at, self._decoder.getstate()

    def next(self, raw: bytes) -> int:
        at = self.at
        self.at += len(self._decoder.decode(raw))
        return max(at, 0)


def _completion_logprobs(tokens: Sequence[Token], spell: Spell, places: _Places) -> dict[str, Any]:
    raws = [spell(token.id) for token in tokens]
    names = [*map(_readable, raws)]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token, name, spell) for token, name in zip(tokens, names, strict=True)],
        "text_offset": [*map(places.next, raws)],
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


def _ranked(token: Token, top: Sequence[tuple[int, float]], spell: Spell) -> dict[str, Any]:
    """The token and the likeliest by their ids. The rank of one that is not among them, nobody has counted."""
    ranks = {id: rank for rank, (id, _) in enumerate(top, 1)}
    return {
        str(id): {"logprob": logprob, "rank": ranks.get(id), "decoded_token": _readable(spell(id))}
        for id, logprob in {token.id: token.logprob, **dict(top)}.items()
    }


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
