"""The values that pass between a front door and the engine."""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


MOST_BAD_TOKENS = 4096
"""Of all the bad words of one request."""


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """What an answer has to be.

    Attributes:
        kind: "json" by a schema, "regex", or "lark", a grammar.
        text: the schema, the expression or the grammar.
        field: of the request's body, for errors.
    """

    kind: Literal["json", "regex", "lark"]
    text: str
    field: str = "constraint"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are picked and when it ends.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and penalties of 1, 0 and 0 are off.
    ``repetition_penalty`` looks at prompt and answer, the other two at the answer; ``logit_bias`` is (token id, what is
    added to its logit). ``seed`` None draws one at submission. ``min_tokens``: eos and stop tokens are not picked
    before so many others, and stop texts not heeded. ``logprobs`` -1: none; 0: of the picked token; n: also of the n
    most likely; ``prompt_logprobs`` likewise, of the prompt's tokens but the first, which has none. ``max_tokens`` 0
    only computes the prompt. ``constraint``: what the answer has to be; once it cannot go on it ends, whatever
    ``ignore_eos`` and ``min_tokens`` say. ``allowed`` has a bit for each token, as ops.Edits has them: only those are
    picked, unless it is empty; not with a constraint. ``bad_words``: the last token of each is not picked after the
    others, as far as these are the answer's; together they have at most ``MOST_BAD_TOKENS``. Stop *strings* belong to
    the text side.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    constraint: Constraint | None = None
    allowed: bytes = b""
    bad_words: tuple[tuple[int, ...], ...] = ()


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tokenized request.

    Attributes:
        id: unique among live requests.
        prompt: at least one token.
        priority: of the same tenant those of a lower one go first, always.
        tenant: whose it is; waiting tenants take turns by tokens.
        timeout: seconds from submission after which it ends, wherever it is; None: never.
        cache_salt: prefixes are shared only between requests of the same one.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    tenant: str = ""
    timeout: float | None = None
    cache_salt: str = ""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token; ``top`` holds (token id, logprob) of the most likely, when asked for."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def likelihood(tokens: Iterable[Token], ending: Token | None) -> float:
    """The mean logprob of an answer's tokens, with that of the one that ended it: to end is a choice as any other."""
    logprobs = [token.logprob for token in tokens]
    if ending is not None:
        logprobs.append(ending.logprob)
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for one request. The last output of a request carries ``finish``.

    The token that ended the request (an eos or stop token) is not among ``tokens``. ``error`` says why finish is
    "error", and ``code`` which kind it is: "not_finite", "deadline_exceeded", "constraint" (its constraint cannot be
    compiled or followed, or its options together leave no token), or of its constraint "not_supported" or "unavailable"
    (another attempt may succeed). ``prompt`` are the next of the prompt's tokens with their logprobs, where these were
    asked for: each once, before the first of ``tokens``. ``ending`` is the token that ended it, with its logprob where
    these were asked for. ``cached`` comes with the first token, or instead of it: how many of the prompt's tokens
    the prefix cache had.
    """

    request: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    code: str = ""
    prompt: tuple[Token, ...] = ()
    ending: Token | None = None
    cached: int = 0


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced: a token for each of ``requests``, logprobs by row, and which requests ended, and how.

    In columns, for most steps of a busy engine are many single tokens. An end has no tokens of its own. ``prompts`` are
    outputs that tell of a prompt's tokens. ``cached`` are the tokens of prompts, which are through now, that were.
    """

    requests: list[str]
    tokens: list[int]
    logprobs: dict[int, Token]
    ends: list[Output]
    prompts: list[Output] = []
    cached: dict[str, int] = {}

    def outputs(self) -> Iterator[Output]:
        """The same as one output a request."""
        yield from self.prompts
        for output in self._answers():
            cached = self.cached.get(output.request, 0) if self.cached else 0
            yield msgspec.structs.replace(output, cached=cached) if cached else output

    def _answers(self) -> Iterator[Output]:
        ends = {end.request: end for end in self.ends}
        for row, (request, token) in enumerate(zip(self.requests, self.tokens, strict=True)):
            end = ends.pop(request, None) if ends else None
            tokens = (self.logprobs.get(row) or Token(token),)
            yield Output(request, tokens, end.finish, end.error, end.code) if end else Output(request, tokens)
        yield from ends.values()


NO_STEP = Step([], [], {}, [])


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and counters of an engine at one moment. Token counts are totals since it started.

    ``prompt_tokens`` are those that were forwarded or found cached, each once; ``cached_tokens`` those of them that
    the prefix cache had; ``recomputed_tokens`` what preemptions made the engine forward again. ``waiting_tokens`` is
    the most that those who wait can have, prompts included, as of now.
    """

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    cached_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    waiting_tokens: int = 0
