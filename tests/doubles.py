"""Stand-ins for a model and a tokenizer, small enough to see through.

StubModel reads every token it answers from back out of its paged cache, through the block table it was given: a wrong,
shared or freed block changes the answer. ByteText is a tokenizer whose tokens are bytes.
"""

from __future__ import annotations

import functools
import math
import random
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Edits, Sampled, Samples, Sampling
from fgsnap.kernels.philox import uniform
from fgsnap.runtime.request import Constraint
from fgsnap.runtime.text import TextStream


class StubModel:
    """A model whose logits are a fixed pseudo-random function of all tokens of the sequence.

    Args:
        nan_after: a token id after which the logits are NaN.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 258,
        max_length: int = 256,
        blocks: int = 64,
        block_size: int = 4,
        nan_after: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.blocks = blocks
        self.block_size = block_size
        self.nan_after = nan_after
        self.batches: list[Batch] = []
        self._cache = [[(-1, -1)] * block_size for _ in range(blocks)]

    def forward(self, batch: Batch) -> list[list[float]]:
        check_batch(batch, self.block_size)
        self.batches.append(Batch(*map(list, batch[:4]), [*map(list, batch.block_tables)], list(batch.rows)))
        for table, (begin, end) in zip(batch.block_tables, _spans(batch), strict=True):
            for token, position in zip(batch.tokens[begin:end], batch.positions[begin:end], strict=True):
                self._cache[table[position // self.block_size]][position % self.block_size] = (token, position)
        return [self._logits(batch, row) for row in batch.rows]

    def sample(self, logits: list[list[float]], how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
        return picks(logits, how, positions)

    def _logits(self, batch: Batch, row: int) -> list[float]:
        table = batch.block_tables[bisect_right(batch.starts, row) - 1]
        tokens = []
        for position in range(batch.positions[row] + 1):
            token, written_at = self._cache[table[position // self.block_size]][position % self.block_size]
            assert written_at == position, "the cache holds another token there"
            tokens.append(token)
        if tokens[-1] == self.nan_after:
            return [math.nan] * self.vocab_size
        return said_next(tokens, self.vocab_size)


def said_next(tokens: Sequence[int], vocab_size: int) -> list[float]:
    """The logits that a StubModel has after these tokens."""
    return _random_logits(zlib.crc32(array("q", tokens).tobytes()), vocab_size)


@functools.lru_cache(1 << 14)
def _random_logits(seed: int, vocab_size: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(-4, 4) for _ in range(vocab_size)]


def check_batch(batch: Batch, block_size: int) -> None:
    """Assert everything that ops.Batch promises."""
    assert len(batch.tokens) == len(batch.positions) == batch.starts[-1] > 0
    assert batch.starts[0] == 0 and len(batch.starts) == len(batch.lengths) + 1 == len(batch.block_tables) + 1
    for table, length, (begin, end) in zip(batch.block_tables, batch.lengths, _spans(batch), strict=True):
        assert list(batch.positions[begin:end]) == list(range(length - (end - begin), length))
        assert begin < end and len(table) * block_size >= length
    own = [
        {table[position // block_size] for position in batch.positions[begin:end]}
        for table, (begin, end) in zip(batch.block_tables, _spans(batch), strict=True)
    ]
    assert sum(map(len, own)) == len(set().union(*own)), "two sequences write into a block"
    assert list(batch.rows) == sorted(set(batch.rows))


def _spans(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.starts, batch.starts[1:], strict=False))


def picks(logits: Sequence[Sequence[float]], how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
    """What Ops.sample gives."""
    found = [pick(row, rule, position) for row, rule, position in zip(logits, how, positions, strict=True)]
    asked = {row: one for row, one in enumerate(found) if how[row].logprobs >= 0 and one.token >= 0}
    return Samples([one.token for one in found], asked)


def pick(row: Sequence[float], how: Sampling, position: int) -> Sampled:
    """One row's token exactly as ops.Sampling words it, of float64 logits."""
    if any(math.isnan(value) for value in row) or not any(math.isfinite(value) for value in row):
        return Sampled(-1)
    edited = edit(row, how.edits if how.target < 0 else None)
    if any(math.isnan(value) for value in edited) or max(edited) == -math.inf:
        return Sampled(-1)
    if how.target >= 0:
        token = how.target
    elif how.temperature == 0:
        token = descending(edited)[0]
    else:
        token = _draw(edited, how, uniform(how.seed, position))
    if how.logprobs < 0:
        return Sampled(token)
    most = max(row)
    total = math.log(sum(_weight(value, most, 1.0) for value in row))
    logprobs = [(0.0 if value == most else value - most) - total for value in row]
    return Sampled(token, logprobs[token], tuple((t, logprobs[t]) for t in descending(row)[: how.logprobs]))


def edit(row: Sequence[float], edits: Edits | None) -> list[float]:
    """One row's logits exactly as ops.Edits words it."""
    found = list(row)
    counts, bias = (edits.counts, edits.bias) if edits is not None else ({}, {})
    for token in range(len(row)) if edits is not None else ():
        words = None if edits.allowed is None else edits.allowed.cast("B")
        if (words is not None and not words[token // 8] >> token % 8 & 1) or token in edits.banned:
            found[token] = -math.inf
        found[token] += bias.get(token, 0.0)
        if token in counts or token in edits.prompt:
            found[token] = found[token] / edits.repetition if found[token] > 0 else found[token] * edits.repetition
        if token in counts:
            found[token] -= edits.presence + counts[token] * edits.frequency
    return found


def descending(row: Sequence[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def _weight(value: float, most: float, temperature: float) -> float:
    return 1.0 if value == most else math.exp((value - most) / temperature)


def _draw(row: Sequence[float], how: Sampling, number: float) -> int:
    kept = descending(row)[: how.top_k or None]
    weights = {token: _weight(row[token], row[kept[0]], how.temperature) for token in kept}
    if how.top_p < 1:
        total, running, nucleus = sum(weights.values()), 0.0, []
        for token in kept:
            nucleus.append(token)
            running += weights[token]
            if running >= how.top_p * total:
                break
        kept = nucleus
    kept = sorted(token for token in kept if weights[token] >= how.min_p and weights[token] > 0)
    target, running = number * sum(weights[token] for token in kept), 0.0
    for token in kept:
        running += weights[token]
        if running > target:
            return token
    return kept[-1]


class StubGrammars:
    """Constraints that are a number n: an answer of n tokens, each of which makes the sum of all of them even.

    It may end from half of them on. With "unfit" it cannot be compiled, and "breaks" it after n tokens. ``late`` tells
    how many looks each of the other masks comes late.
    """

    def __init__(self, vocab_size: int, eos: Sequence[int], late: Callable[[], int] = lambda: 0) -> None:
        self.vocab_size, self.eos, self.late = vocab_size, tuple(eos), late
        self.matchers: set[StubMatcher] = set()

    def matcher(self, constraint: Constraint, *, open_end: bool) -> StubMatcher:
        matcher = StubMatcher(self, constraint.text.split(), open_end)
        self.matchers.add(matcher)
        return matcher

    def flush(self) -> None:
        pass

    def hear(self) -> None:
        for matcher in self.matchers:
            matcher.look()

    def wait(self, matchers: Sequence[Any], seconds: float) -> None:
        assert self.matchers.issuperset(matchers)
        self.hear()

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


class StubMatcher:
    """One of StubGrammars'."""

    def __init__(self, grammars: StubGrammars, words: list[str], open_end: bool) -> None:
        self.pending, self.complete, self.error, self.code = True, False, "", ""
        self._grammars, self._words, self._open_end = grammars, words, open_end
        self._length = int(words[0])
        self._before = 1 + self._length % 3  # looks until it is compiled, or its mask has come
        self._tokens: list[int] = []

    def look(self) -> None:
        self._before -= 1
        if self.pending and self._before <= 0:
            self.pending = False
            self.complete = len(self._tokens) == self._length
            self._fail("breaks" if self._tokens and self.complete else "unfit")

    def accept(self, token: int) -> None:
        assert self in self._grammars.matchers and not self.pending
        assert not self.error and self._allows(token)
        self._tokens.append(token)
        self.pending, self._before = True, 1 + self._grammars.late()

    def mask(self) -> memoryview:
        assert self in self._grammars.matchers and not self.pending
        bits = 0 if self.error else sum(1 << token for token in range(self._grammars.vocab_size) if self._allows(token))
        return memoryview(bits.to_bytes(-(-self._grammars.vocab_size // 32) * 4, "little"))

    def close(self) -> None:
        self._grammars.matchers.remove(self)

    def _allows(self, token: int) -> bool:
        if token in self._grammars.eos:
            return self.complete or (len(self._tokens) >= self._length // 2 and not self._open_end)
        return not self.complete and (sum(self._tokens) + token) % 2 == 0

    def _fail(self, how: str) -> None:
        if how in self._words:
            self.error, self.code = how, "constraint"


class ByteText:
    """A Text whose tokens are the 256 bytes, BOS and EOS."""

    bos, eos = 256, 257
    eos_token_ids: tuple[int, ...] = (257,)
    has_chat_template = True

    def __init__(self, add_bos: bool = False) -> None:
        self._bos = [self.bos] if add_bos else []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return (self._bos if add_special_tokens else []) + list(text.encode())

    def least_tokens(self, text: str) -> int:
        return 0

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        special = {} if skip_special else {self.bos: b"<bos>", self.eos: b"<eos>"}
        return b"".join(bytes([id]) if id < 256 else special.get(id, b"") for id in ids).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise RequestError(f"No role {message['role']!r}.", param="messages")
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            return turns.removesuffix("\n")
        return turns + ("assistant:" if add_generation_prompt else "")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = (), **how: Any) -> TextStream:
        return TextStream(self, tuple(stop), prompt, **how)
