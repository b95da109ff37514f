"""The token budget of a snapshot on this host: how long forwards take, and from which size on more is no faster.

A forward is timed as the engine makes it: some sequences generate, and the rest of its tokens is a piece from the
middle of a prompt. Throughput rises with the number of tokens and then hardly any more, while everybody who generates
waits for the whole forward: so the budget is the *knee*, the fewest tokens with nearly the best throughput.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgsnap.atomic import host_errors
from fgsnap.bench.local import loaded
from fgsnap.bench.record import record, summary, write
from fgsnap.errors import HostError
from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.budget import budget_file, cache_folder, host_of
from fgsnap.runtime.decoder import Decoder
from fgsnap.runtime.options import EngineOptions

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
SHARE = 0.9
"""Of the best throughput that the knee has."""

MOST_DECODES = 8
DECODED = 256
"""Tokens that each generating sequence has behind it."""

READ = 512
"""Tokens of each prompt that were read before."""

LONGEST = 5.0
"""Seconds of a forward after which no larger one is tried."""


class Row(NamedTuple):
    """Forwards of one size: their tokens, how many of these decode, and the seconds of each."""

    tokens: int
    decodes: int
    seconds: list[float]


def budget(
    snapshot: Path, options: EngineOptions, share: float, rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure, find the knee, and keep it where ``fgsnap serve`` looks for it."""
    with loaded(snapshot, options) as (decoder, facts):
        rows = measured(decoder, rounds, tell)
        tokens = knee({row.tokens: row.tokens / summary(row.seconds, 9)["median"] for row in rows}, share)
        host = host_of(decoder)
    result = {
        **facts,
        "host": host,
        "max_batch_tokens": tokens,
        "share": share,
        "forwards": [_row(row) for row in rows],
    }
    path = keep(result)
    return {**result, "path": str(path)}


def knee(rates: Mapping[int, float], share: float) -> int:
    """The fewest tokens whose rate is at least ``share`` of the best."""
    best = max(rates.values())
    return min(tokens for tokens, rate in rates.items() if rate >= share * best)


def measured(decoder: Decoder, rounds: int, tell: Callable[[str], None] = lambda line: None) -> list[Row]:
    """The times of forwards of all sizes that the context and the KV cache have room for, in turn in every round."""
    bench = Bench(decoder)
    rows = []
    for size in SIZES:  # once to warm up, and to find the sizes that are worth it
        if not bench.fits(size):
            break
        seconds = bench.seconds(size)
        rows.append(Row(size, decodes_of(size), []))
        tell(f"{size} tokens: {seconds:.3f} s")
        if seconds > LONGEST:
            break
    for number in range(1, rounds + 1):
        for row in rows if number % 2 else reversed(rows):
            row.seconds.append(bench.seconds(row.tokens))
        tell(f"round {number} of {rounds}")
    return rows


def decodes_of(size: int) -> int:
    """How many tokens of a forward decode: an eighth, but not more than a few sequences."""
    return max(1, min(MOST_DECODES, size // 8))


def keep(result: Mapping[str, Any]) -> Path:
    """Put the result into the user's cache, whole or not at all. HostError: it cannot be written."""
    path = budget_file(cache_folder(str(result["snapshot"])), str(result["host"]))
    with host_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(beside, record("budget", dict(result)))
        with host_errors(path):
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


class Bench:
    """Sequences of random tokens in the decoder's cache, and forwards of any size that go on with them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._draw = random.Random(0)
        self._decoded = min(DECODED, decoder.max_length - 1)
        self._read = min(READ, decoder.max_length // 4)
        self._piece = decoder.max_length - self._read
        """Most tokens of one prompt that a forward reads."""
        if not self.fits(1):
            raise HostError(
                "The KV cache is too small to measure in.",
                f"It has {decoder.blocks} blocks of {decoder.block_size} tokens.",
                "Give more with --kv-memory.",
            )
        self._blocks = iter(range(decoder.blocks))
        self._decodes: list[list[int]] = []
        self._prompts: list[list[int]] = []

    def fits(self, size: int) -> bool:
        """Whether the cache holds all sequences of a forward of so many tokens."""
        decodes = decodes_of(size)
        prompts = [self._read + piece for piece in self._pieces(size - decodes)]
        return sum(map(self._needed, [*prompts, *[self._decoded + 1] * decodes])) <= self._decoder.blocks

    def seconds(self, size: int) -> float:
        """The time of one forward, with the picking of its tokens."""
        batch = self._batch(size)
        begin = time.perf_counter()
        logits = self._decoder.forward(batch)
        self._decoder.sample(logits, [Sampling()] * len(batch.rows), [self._decoded] * len(batch.rows))
        return time.perf_counter() - begin

    def _batch(self, size: int) -> Batch:
        decodes = decodes_of(size)
        spans = [(table, self._decoded, 1) for table in self._generating(decodes)]
        spans += self._reading(size - decodes)
        return self._of(spans, rows=decodes)

    def _generating(self, count: int) -> list[list[int]]:
        while len(self._decodes) < count:
            self._decodes.append(self._filled(self._decoded, self._decoded + 1))
        return self._decodes[:count]

    def _reading(self, tokens: int) -> Iterator[tuple[list[int], int, int]]:
        for index, piece in enumerate(self._pieces(tokens)):
            if index == len(self._prompts):
                self._prompts.append(self._filled(self._read, 0))
            table = self._prompts[index]
            table += self._more(self._needed(self._read + piece) - len(table))
            yield table, self._read, piece

    def _pieces(self, tokens: int) -> list[int]:
        whole, rest = divmod(tokens, self._piece)
        return [self._piece] * whole + [rest] * (rest > 0)

    def _filled(self, tokens: int, room: int) -> list[int]:
        """The table of a sequence with so many tokens in the cache. What was never written would be read faster."""
        table = self._more(self._needed(max(tokens, room)))
        for start in range(0, tokens, DECODED):
            self._run([(table, start, min(DECODED, tokens - start))])
        return table

    def _run(self, spans: Sequence[tuple[list[int], int, int]]) -> None:
        batch = self._of(spans, rows=1)
        self._decoder.sample(self._decoder.forward(batch), [Sampling()], [1])

    def _of(self, spans: Sequence[tuple[list[int], int, int]], rows: int) -> Batch:
        """A batch of the next ``length`` tokens from ``start`` of the sequence in each table."""
        positions = [at for _, start, length in spans for at in range(start, start + length)]
        starts = [0]
        for _, _, length in spans:
            starts.append(starts[-1] + length)
        tokens = self._draw.choices(range(self._decoder.vocab_size), k=len(positions))
        lengths = [start + length for _, start, length in spans]
        return Batch(tokens, positions, starts, lengths, [table for table, _, _ in spans], range(rows))

    def _more(self, blocks: int) -> list[int]:
        return [next(self._blocks) for _ in range(blocks)]

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self._decoder.block_size)


def _row(row: Row) -> dict[str, Any]:
    seconds = summary(row.seconds, 6)
    rate = round(row.tokens / summary(row.seconds, 9)["median"], 1)
    return {"tokens": row.tokens, "decodes": row.decodes, "seconds": seconds, "tokens_per_second": rate}
