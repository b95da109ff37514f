"""The values that pass between a front door and the engine."""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are picked and when it ends.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off. ``seed`` None draws one at submission.
    ``logprobs`` -1: none; 0: of the picked token; n: also of the n most likely. Stop *strings* belong to the text side.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = -1


class Request(msgspec.Struct, frozen=True):
    """A tokenized request. ``id`` is unique among live requests; ``prompt`` has at least one token."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token; ``top`` holds (token id, logprob) of the most likely, when asked for."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for one request. The last output of a request carries ``finish``.

    The token that ended the request (an eos or stop token) is not among ``tokens``. ``error`` says why finish is
    "error".
    """

    request: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    error: str = ""


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and counters of an engine at one moment. Token counts are totals since it started."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
