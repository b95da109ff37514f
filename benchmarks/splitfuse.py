"""Dynamic SplitFuse beside the two policies that it replaces, on a real model, under a standing backlog of prompts.

SmolLM2-135M-Instruct, packed for CPUs, in this process. Some answers are being generated all the time; meanwhile
clients ask one prompt after the other, long and short, and take a few tokens each, so that there is always a prompt
left to read. What counts is how long those who generate wait for their next token. In turn within every round:

- SplitFuse (``fgsnap.runtime.scheduler``) at the default budget, and at the knee that ``fgsnap bench budget`` finds,
  measured in this run;
- prefill first: whole prompts before decodes, as many as fit a limit, which is what vLLM did when SplitFuse was
  published;
- no chunking: the decodes and, beside them, whole prompts.

The last line is JSON. Goal: P95 / P50 of the gaps between tokens at most 1.5 with SplitFuse.

    python benchmarks/splitfuse.py [--rounds 3] [--requests 64] [--budget N] [--quick] [--output benchmarks/results]

--quick only looks whether it works.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, finish, smollm2_gguf

from fgsnap.bench.budget import SHARE, knee, measured
from fgsnap.bench.record import quantile, summary
from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.budget import default_budget
from fgsnap.runtime.decoder import Decoder
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.roster import Roster
from fgsnap.runtime.scheduler import Scheduler, Slice, Work
from fgsnap.snapshot import open_snapshot

DECODES, CLIENTS, ANSWER = 8, 16, 8
SHORTEST, LONGEST = 64, 1536
"""Tokens of the prompts, whose logarithms are spread evenly."""

CONTEXT = 4096
PREFILL_FIRST = 2048
"""Tokens of prompts that are forwarded at once where they come first: vLLM's default for a context of 2048."""

BUDGET_OF_OTHERS = 512
"""Tokens of a forward with the policies that are replaced, as far as they keep to it."""

BINS = tuple(round(2 ** (at / 2)) for at in range(2, 25))
QUANTILES = 40
GOAL = 1.5
ENDLESS = "endless"


class Pausable(Roster):
    """A roster that can sit out a step."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self._sitting: list[str] | None = None

    def pause(self) -> None:
        """Take no part in the step that is being made."""
        self._sitting, self.ids = self.ids, []

    def append(self, tokens: list[int]) -> list[int]:
        if self._sitting is None:
            return super().append(tokens)
        self.ids, self._sitting = self._sitting, None
        return []


class PrefillFirst(Scheduler):
    """Waiting prompts are forwarded whole and alone; those who generate go on when there is none."""

    def __init__(self, pool: BlockPool, token_budget: int, max_sequences: int) -> None:
        super().__init__(pool, token_budget, max_sequences)
        self.roster: Pausable = Pausable(pool.block_size)

    def schedule(self) -> Work | None:
        self._grow()
        self._admit()
        if not self._prompts:
            return super().schedule()
        roster = self.roster
        roster.pause()
        self.roster = Pausable(self._pool.block_size)
        work = self._mixed(whole(self._prompts, PREFILL_FIRST))
        self.roster = roster
        return work


class NoChunking(Scheduler):
    """Decodes first, and beside them prompts that are never cut: at least one, and more where they fit the budget."""

    def _share(self, room: int) -> list[Slice]:
        return whole(self._prompts, room)


def whole(prompts: Mapping[Any, None], room: int) -> list[Slice]:
    """The oldest prompt, and those after it as long as they fit."""
    slices: list[Slice] = []
    for sequence in prompts:
        if slices and sequence.remaining > room:
            break
        slices.append(Slice(sequence, sequence.remaining))
        room -= sequence.remaining
    return slices


class Contestant(NamedTuple):
    policy: type[Scheduler]
    budget: int


class Round(NamedTuple):
    """What one run of a contestant took.

    Attributes:
        seconds: of all of it.
        read: prompt tokens.
        sizes: tokens of each forward.
        steps: seconds of each.
        gaps: seconds between two tokens of the answers that are generated all the time.
        left: how many steps left prompt tokens behind.
    """

    seconds: float
    read: int
    sizes: list[int]
    steps: list[float]
    gaps: list[float]
    left: int


class Watched:
    """A decoder that tells the size of its last forward."""

    def __init__(self, decoder: Decoder) -> None:
        self.vocab_size, self.max_length = decoder.vocab_size, decoder.max_length
        self.blocks, self.block_size = decoder.blocks, decoder.block_size
        self.size = 0
        self._decoder = decoder

    def forward(self, batch: Batch) -> Any:
        self.size = len(batch.tokens)
        return self._decoder.forward(batch)

    def sample(self, logits: Any, how: list[Sampling], positions: list[int]) -> Any:
        return self._decoder.sample(logits, how, positions)


def main() -> None:
    parser = arguments(__doc__, 3)
    parser.add_argument("--requests", type=int, default=64, help="prompts of a round")
    parser.add_argument("--budget", type=int, help="take this for the knee instead of measuring it")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.budget = 1, CLIENTS + 4, options.budget or 96
    with tempfile.TemporaryDirectory() as scratch:
        decoder = loaded(Path(scratch) / "snap")
        found = options.budget or measured_knee(decoder)
        budgets = dict.fromkeys((found, default_budget(decoder.ops.device)))
        contestants = {
            **{f"SplitFuse, {tokens} tokens": Contestant(Scheduler, tokens) for tokens in budgets},
            "prefill first": Contestant(PrefillFirst, BUDGET_OF_OTHERS),
            "no chunking": Contestant(NoChunking, BUDGET_OF_OTHERS),
        }
        rounds: dict[str, list[Round]] = {name: [] for name in contestants}
        for number in range(options.rounds):
            for name in contestants if number % 2 else reversed(contestants):
                rounds[name].append(run(decoder, contestants[name], options.requests, number))
                tell(name, rounds[name][-1])
    rows = {name: row(of_one) for name, of_one in rounds.items()}
    finish(
        "splitfuse",
        {
            "quick": options.quick,
            "model": "SmolLM2-135M-Instruct, bfloat16, --target cpu",
            "backend": f"{decoder.ops.name}, {decoder.setting}",
            "knee": found,
            "prefill_first_tokens": PREFILL_FIRST,
            "workload": {
                "decodes": DECODES,
                "clients": CLIENTS,
                "answer": ANSWER,
                "shortest": SHORTEST,
                "longest": LONGEST,
                "requests": options.requests,
            },
            "contestants": rows,
            "goal": GOAL,
            "met": {
                name: rows[name]["p95_over_p50"]["median"] <= GOAL for name in rows if name.startswith("SplitFuse")
            },
        },
        options.output,
    )


def loaded(folder: Path) -> Decoder:
    fgsnap = str(Path(sys.executable).with_name("fgsnap"))
    command = [fgsnap, "convert", str(smollm2_gguf()), "-o", str(folder), "--target", "cpu", "--no-canary"]
    subprocess.run(command, check=True, capture_output=True)
    return load_as_chosen(open_snapshot(folder), EngineOptions(tp=1, max_model_len=CONTEXT, kv_memory=1 << 30))


def measured_knee(decoder: Decoder) -> int:
    rows = measured(decoder, 5)
    found = knee({row.tokens: row.tokens / summary(row.seconds, 9)["median"] for row in rows}, SHARE)
    print(f"the knee is at {found} tokens", flush=True)
    return max(found, 2 * (DECODES + CLIENTS))  # so that prompts have half of it whatever generates


# --- one run ----------------------------------------------------------------------------------------------------------


def run(decoder: Decoder, contestant: Contestant, requests: int, seed: int) -> Round:
    """Answer so many prompts while others generate."""
    model = Watched(decoder)
    engine = engine_of(model, contestant)
    for index in range(DECODES):
        engine.submit(request(f"{ENDLESS} {index}", 16, CONTEXT - 32, seed))
    while engine.stats().prompt_tokens < 16 * DECODES:
        engine.step()
    asked = prompts(requests, seed)
    for _ in range(CLIENTS):
        submit_next(engine, asked)
    first = engine.stats().prompt_tokens
    sizes, steps, gaps, left, answered = [], [], [], 0, 0
    begin = before = time.perf_counter()
    last = dict.fromkeys(range(DECODES), begin)
    while answered < requests - CLIENTS:  # as long as all clients have one: the backlog stands
        step = engine.step()
        now = time.perf_counter()
        sizes.append(model.size)
        steps.append(now - before)
        before = now
        for name in step.requests:
            if name.startswith(ENDLESS):
                index = int(name.removeprefix(ENDLESS))
                gaps.append(now - last[index])
                last[index] = now
        left += bool(engine._scheduler._prompts or engine._scheduler.waiting)
        for _ in step.ends:
            answered += 1
            submit_next(engine, asked)
    return Round(before - begin, engine.stats().prompt_tokens - first, sizes, steps, gaps, left)


def engine_of(model: Watched, contestant: Contestant) -> Engine:
    engine = Engine(model, prefix_caching=False)
    engine._scheduler = contestant.policy(engine._pool, contestant.budget, min(256, contestant.budget))
    engine._roster = engine._scheduler.roster
    return engine


def prompts(count: int, seed: int) -> Iterator[Request]:
    draw = random.Random(seed)
    for index in range(count):
        length = round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))))
        yield request(f"prompt {index}", length, ANSWER, draw.random())


def request(name: str, length: int, answer: int, seed: float) -> Request:
    tokens = random.Random(f"{name} {seed}").choices(range(1000, 30000), k=length)
    return Request(name, tuple(tokens), SamplingParams(answer, temperature=0.0, ignore_eos=True))


def submit_next(engine: Engine, asked: Iterator[Request]) -> None:
    if (one := next(asked, None)) is not None:
        engine.submit(one)


# --- what it says -----------------------------------------------------------------------------------------------------


def row(rounds: list[Round]) -> dict[str, Any]:
    """The rounds of one contestant: quantiles within each round, and all forwards and gaps of all rounds."""
    sizes = [size for each in rounds for size in each.sizes]
    gaps = [gap for each in rounds for gap in each.gaps]
    return {
        "forward_tokens": {"p50": round(quantile(sizes, 0.5)), "p95": round(quantile(sizes, 0.95)), "max": max(sizes)},
        "forward_sizes": histogram(sizes),
        "forward_p50": summary([quantile(each.steps, 0.5) for each in rounds], 5),
        "gap_p50": summary([quantile(each.gaps, 0.5) for each in rounds], 5),
        "gap_p95": summary([quantile(each.gaps, 0.95) for each in rounds], 5),
        "gap_max": summary([max(each.gaps) for each in rounds], 5),
        "p95_over_p50": summary([quantile(each.gaps, 0.95) / quantile(each.gaps, 0.5) for each in rounds], 3),
        "gap_quantiles": [round(quantile(gaps, at / QUANTILES), 5) for at in range(QUANTILES + 1)],
        "prompt_tokens_per_second": summary([each.read / each.seconds for each in rounds], 1),
        "backlog": round(sum(each.left for each in rounds) / len(sizes), 3),
    }


def histogram(sizes: list[int]) -> list[tuple[int, int]]:
    """For each bin its largest size, and how many forwards are in it; from the first to the last that has any."""
    counts = [0] * len(BINS)
    for size in sizes:
        counts[bisect_left(BINS, size)] += 1
    known = [at for at, count in enumerate(counts) if count]
    return [(BINS[at], counts[at]) for at in range(max(0, known[0] - 1), known[-1] + 1)]


def tell(name: str, found: Round) -> None:
    p50, p95 = (1000 * quantile(found.gaps, share) for share in (0.5, 0.95))
    print(f"{name}: {len(found.sizes)} steps, P50 {p50:.0f} ms, P95 {p95:.0f} ms, {p95 / p50:.2f}", flush=True)


if __name__ == "__main__":
    main()
