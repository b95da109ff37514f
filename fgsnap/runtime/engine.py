"""The engine: requests in, tokens out, one forward at a time.

``step()`` is the whole of serving in four words: schedule, forward, sample, commit. The engine knows the model only as
something that turns a ragged batch into logits, and logits into tokens; it touches no tensor and imports no tensor
library. It is not thread-safe: one thread submits, aborts and steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from itertools import accumulate
from typing import Any, Protocol

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Sampled, Samples, Sampling
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.request import EngineStats, FinishReason, Output, Request, SamplingParams, Token
from fgsnap.runtime.scheduler import Scheduler, Sequence, Slice

# Below this a temperature only overflows the softmax; the limit it approaches is greedy.
COLDEST = 1e-5


class Model(Protocol):
    """What the engine needs of a decoder. ``blocks`` x ``block_size`` tokens is the size of its KV cache."""

    vocab_size: int
    max_length: int
    blocks: int
    block_size: int

    def forward(self, batch: Batch) -> Any:
        """Cache the batch's keys and values, and return the logits of its rows."""
        ...

    def sample(self, logits: Any, how: list[Sampling], positions: list[int]) -> Samples:
        """Pick one token a row of logits; -1 where a row has no finite logit."""
        ...


class Engine:
    """Runs any number of requests on one model, each with the tokens it would get alone.

    Args:
        model: the decoder.
        eos_token_ids: tokens that end a request, unless it ignores them.
        token_budget: most tokens in one forward.
        max_sequences: most requests running at once; never more than the budget, for each needs a token in every step.
    """

    def __init__(
        self, model: Model, *, eos_token_ids: Collection[int] = (), token_budget: int = 512, max_sequences: int = 256
    ) -> None:
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._pool = BlockPool(model.blocks, model.block_size)
        self._scheduler = Scheduler(self._pool, token_budget, min(max_sequences, token_budget))
        self._live: dict[str, Sequence] = {}
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._steps = 0

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError if it is malformed or could never run, whatever else is running."""
        self._check(request)
        seed = request.params.seed
        sequence = Sequence(request, int.from_bytes(os.urandom(8)) if seed is None else seed)
        self._live[request.id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request: str) -> None:
        """Drop a request, free its blocks and say no more about it. One that already ended is no error."""
        sequence = self._live.pop(request, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def has_work(self) -> bool:
        """Whether ``step`` would run a forward."""
        return bool(self._live)

    def step(self) -> list[Output]:
        """Run one forward and return what it produced, at most one output a request."""
        slices = self._scheduler.schedule()
        if not slices:
            return []
        batch, picking = _pack(slices)
        logits = self._model.forward(batch)
        if not picking:
            return self._commit(slices, picking, [])
        positions = [len(sequence.tokens) for sequence in picking]
        found = self._model.sample(logits, [_sampling(sequence) for sequence in picking], positions)
        sampled = [found.logprobs.get(row, Sampled(token)) for row, token in enumerate(found.tokens)]
        return self._commit(slices, picking, sampled)

    def stats(self) -> EngineStats:
        """Gauges and counters as of now. Blocks promised to a running request count as taken."""
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            kv_blocks=self._pool.blocks,
            kv_blocks_free=self._pool.available,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
        )

    def _commit(self, slices: list[Slice], picking: list[Sequence], sampled: list[Sampled]) -> list[Output]:
        self._steps += 1
        self._prompt_tokens += self._scheduler.advance(slices)
        return [self._take(sequence, token) for sequence, token in zip(picking, sampled, strict=True)]

    def _take(self, sequence: Sequence, sampled: Sampled) -> Output:
        if sampled.token < 0:
            self._end(sequence)
            return Output(sequence.id, finish="error", error="the model gave no finite logit for this request")
        if self._stops(sequence.params, sampled.token):
            self._end(sequence)
            return Output(sequence.id, finish="stop")
        sequence.tokens.append(sampled.token)
        self._generated_tokens += 1
        finish: FinishReason | None = None
        if sequence.generated == sequence.params.max_tokens:
            self._end(sequence)
            finish = "length"
        return Output(sequence.id, (Token(sampled.token, sampled.logprob, sampled.top),), finish)

    def _stops(self, params: SamplingParams, token: int) -> bool:
        return token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)

    def _end(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        self._scheduler.remove(sequence)

    def _check(self, request: Request) -> None:
        if request.id in self._live:
            raise RequestError(f"A request with the id '{request.id}' is still running.", param="id")
        _check_params(request.params)
        if not request.prompt:
            raise RequestError("The prompt is empty.", "A model continues at least one token.", param="prompt")
        vocab = self._model.vocab_size
        stray = next((token for token in request.prompt if not 0 <= token < vocab), None)
        if stray is not None:
            raise RequestError(f"The prompt holds token id {stray}.", f"The ids are 0 to {vocab - 1}.", param="prompt")
        self._check_size(len(request.prompt), request.params.max_tokens)

    def _check_size(self, prompt: int, max_tokens: int) -> None:
        total = prompt + max_tokens
        wanted = f"{prompt} prompt tokens + {max_tokens} max_tokens = {total} tokens"
        param = "prompt" if prompt >= self._model.max_length else "max_tokens"
        if total > self._model.max_length:
            raise RequestError(
                "The request is longer than the model's context.",
                f"{wanted}, but the context is {self._model.max_length} tokens.",
                "Shorten the prompt or lower max_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        blocks = self._pool.needed(total)
        if blocks > self._pool.blocks:
            raise RequestError(
                "The request does not fit the KV cache, even alone.",
                f"{wanted} = {blocks} blocks of {self._pool.block_size}, but the cache has {self._pool.blocks}.",
                "Shorten the prompt, lower max_tokens, or serve with more --kv-memory.",
                param=param,
                code="kv_cache_exceeded",
            )


def _pack(slices: list[Slice]) -> tuple[Batch, list[Sequence]]:
    """The forward of these slices, and the sequences that get a token from it, in the order of the batch's rows.

    Only a slice that reaches the end of what is known of its sequence yields a token.
    """
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    rows: list[int] = []
    picking: list[Sequence] = []
    for sequence, length in slices:
        start, end = sequence.cached, sequence.cached + length
        if length == 1:
            tokens.append(sequence.tokens[start])
            positions.append(start)
        else:
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
        lengths.append(end)
        if end == len(sequence.tokens):
            rows.append(len(tokens) - 1)
            picking.append(sequence)
    starts = [0, *accumulate(length for _, length in slices)]
    tables = [sequence.reservation.table for sequence, _ in slices]
    return Batch(tokens, positions, starts, lengths, tables, rows), picking


def _sampling(sequence: Sequence) -> Sampling:
    """How to pick the sequence's next token; its random number depends on the seed and the token's position alone."""
    params = sequence.params
    if params.temperature < COLDEST:
        return Sampling(logprobs=params.logprobs)
    return Sampling(params.temperature, params.top_k, params.top_p, 0.0, sequence.seed, params.logprobs)


def _check_params(params: SamplingParams) -> None:
    rules = (
        ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
        ("temperature", params.temperature, 0 <= params.temperature < math.inf, "a number from 0 up"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (off) or more"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("logprobs", params.logprobs, params.logprobs >= -1, "-1 (none) or more"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise RequestError(f"{name} is {value}.", f"It must be {rule}.", param=name)
