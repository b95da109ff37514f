"""The reverse of the proof that everybody finishes: the same requests under DeepSpeed-FastGen's published rules.

A model that only counts tokens, a small KV cache, and three workloads:

- crowd: requests that come at once and want several times the cache; each fits it alone;
- large: the same, and one whose prompt takes nearly the whole cache. It fits alone too;
- outgrowing: the crowd, one that is longer than the cache, and some more that come when the crowd is through.

They are scheduled by fgsnap's engine (``--admission`` reserve and optimistic) and by the rules of FastGen
(``fastgen.py``), with finished requests' blocks given back when the original does it, and kindly at once. The engine's
steps are compared with bounds that are computed beforehand: of each prompt when it is admitted (see
``fgsnap.runtime.scheduler``), and of the whole workload before its first step.

Nothing is timed: the result is the same on every machine.

    python benchmarks/starvation.py [--output benchmarks/results]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Row
from typing import Any, NamedTuple

from common import arguments, finish
from fastgen import Dead, FastGen

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Samples, Sampling
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.scheduler import Admission, Scheduler, Work
from fgsnap.runtime.sequence import Sequence

BLOCKS, BLOCK_SIZE = 16, 64  # FastGen's blocks have 64 or 128 tokens
BUDGET, SEQUENCES = 100, 16
REQUESTS = 40
PATIENCE = 2000
"""Steps without anybody finishing after which nobody is waited for any more."""

LATE = 2500
"""The step before which the last ones come, in one of the workloads."""


class Wish(NamedTuple):
    """A request: tokens of its prompt and of its answer, and the step before which it comes."""

    prompt: int
    answer: int
    comes: int = 0

    @property
    def longest(self) -> int:
        return self.prompt + self.answer


class Story(NamedTuple):
    """What became of a workload.

    Attributes:
        finished: how many requests had finished after each step.
        refused: how many were refused when they came.
        forwarded: tokens that were computed.
        preempted: how often a request lost its blocks.
        end: "finished", "starved" or "dead".
        prompts: steps that each prompt took from its admission, and the most it might take.
    """

    finished: list[int]
    refused: int
    forwarded: int
    preempted: int
    end: str
    prompts: list[tuple[int, int]]


class Counting:
    """A model whose forward costs nothing."""

    vocab_size, max_length, blocks, block_size = 1 << 16, 1 << 20, BLOCKS, BLOCK_SIZE

    def __init__(self) -> None:
        self.forwarded = 0

    def forward(self, batch: Batch) -> int:
        self.forwarded += len(batch.tokens)
        return len(batch.rows)

    def sample(self, logits: int, how: list[Sampling], positions: list[int]) -> Samples:
        return Samples([1] * logits, {})


class Watched(Scheduler):
    """Notes how many steps each prompt takes from its admission, beside the most that its older ones let it take."""

    def __init__(self, pool: BlockPool, admission: Admission) -> None:
        super().__init__(pool, BUDGET, SEQUENCES, admission)
        self.took: list[tuple[int, int]] = []
        self._step = 0
        self._since: dict[Sequence, tuple[int, int]] = {}

    def schedule(self) -> Work | None:
        self._step += 1
        return super().schedule()

    def advance(self, work: Work) -> tuple[int, int]:
        for sequence in work.through:
            step, most = self._since.pop(sequence)
            self.took.append((self._step - step + 1, most))
        return super().advance(work)

    def _start(self, sequence: Sequence) -> bool:
        older = [prompt.remaining for prompt in self._prompts]
        started = super()._start(sequence)
        if started:
            self._since[sequence] = self._step, sum(map(steps_of, [*older, sequence.remaining]))
        return started


def main() -> None:
    options = arguments(__doc__, 1).parse_args()
    crowd = workload(REQUESTS)
    # Ten forwards of 100 tokens end in the last block of 16, so none is free for the four tokens that are left.
    large = [*crowd[:20], Wish(1004, 16), *crowd[20:]]
    outgrowing = [*crowd[:20], Wish(600, 600), *crowd[20:], *(wish._replace(comes=LATE) for wish in crowd[:10])]
    result = {
        "cache": {"blocks": BLOCKS, "block_size": BLOCK_SIZE},
        "budget": BUDGET,
        "most_sequences": SEQUENCES,
        "patience": PATIENCE,
        "workloads": {
            name: row(wishes) for name, wishes in (("crowd", crowd), ("large", large), ("outgrowing", outgrowing))
        },
    }
    finish("starvation", result, options.output)


def workload(count: int) -> list[Wish]:
    draw = random.Random(7)
    return [Wish(draw.randint(30, 300), draw.randint(32, 256)) for _ in range(count)]


def row(wishes: Row[Wish]) -> dict[str, Any]:
    """What became of the requests under each scheduler, and the engine's bound."""
    stories = {name: play(wishes) for name, play in PLAYS.items()}
    fitting = [wish for wish in wishes if wish.longest <= BLOCKS * BLOCK_SIZE]
    for name, story in stories.items():
        print(f"{name}: {story.end} {story.finished[-1]} in {len(story.finished)}, {story.preempted} preempted")
    return {
        "requests": len(wishes),
        "tokens": sum(wish.longest for wish in wishes),
        "bounds": {"reserve": bound_of_reserve(fitting), "optimistic": bound_of_optimistic(fitting)},
        "stories": {name: told(story) for name, story in stories.items()},
    }


def told(story: Story) -> dict[str, Any]:
    """A story in few words: at which step each request that finished did."""
    changes = zip([0, *story.finished], story.finished, strict=False)
    finished_at = [step for step, (before, now) in enumerate(changes, start=1) for _ in range(before, now)]
    return {
        "end": story.end,
        "steps": len(story.finished),
        "finished": story.finished[-1],
        "refused": story.refused,
        "forwarded": story.forwarded,
        "preempted": story.preempted,
        "longest_prompt_of_its_bound": max((took / most for took, most in story.prompts), default=None),
        "finished_at": finished_at,
    }


# --- the bounds -------------------------------------------------------------------------------------------------------


def steps_of(prompt: int) -> int:
    """Most steps of the oldest prompt: it gets half of what at least is left beside those that generate."""
    return -(-2 * prompt // (BUDGET - SEQUENCES + 1))


def bound_of_reserve(wishes: Row[Wish]) -> int:
    """Most steps until all have finished. In each, the oldest that runs reads its prompt, or generates."""
    return wishes[-1].comes + sum(steps_of(wish.prompt) + wish.answer for wish in wishes)


def bound_of_optimistic(wishes: Row[Wish]) -> int:
    """The same where all but the first may lose their blocks.

    Before the first has finished, each of the others may hold it up by its prompt and what it has generated, at most.
    """
    held_up = [sum(steps_of(other.longest) for other in wishes[at:]) for at in range(len(wishes))]
    return wishes[-1].comes + sum(held_up) + sum(wish.answer for wish in wishes)


# --- the schedulers ---------------------------------------------------------------------------------------------------


def with_engine(admission: Admission) -> Callable[[Row[Wish]], Story]:
    def play(wishes: Row[Wish]) -> Story:
        model = Counting()
        engine = Engine(model, prefix_caching=False)
        engine._scheduler = scheduler = Watched(engine._pool, admission)
        engine._roster = scheduler.roster
        finished: list[int] = []
        done = refused = 0
        while done + refused < len(wishes) and not stuck(finished):
            for name, wish in arrivals(wishes, len(finished)):
                refused += not submitted(engine, name, wish)
            done += len(engine.step().ends)
            finished.append(done)
        end = "finished" if done + refused == len(wishes) else "starved"
        return Story(finished, refused, model.forwarded, scheduler.preemptions, end, scheduler.took)

    return play


def arrivals(wishes: Row[Wish], step: int) -> list[tuple[int, Wish]]:
    return [(name, wish) for name, wish in enumerate(wishes) if wish.comes == step]


def submitted(engine: Engine, name: int, wish: Wish) -> bool:
    try:
        engine.submit(Request(str(name), tuple([name] * wish.prompt), SamplingParams(wish.answer, temperature=0.0)))
    except RequestError:
        return False
    return True


def with_fastgen(*, flush_at_once: bool) -> Callable[[Row[Wish]], Story]:
    def play(wishes: Row[Wish]) -> Story:
        engine = FastGen(BLOCKS, BLOCK_SIZE, BUDGET, SEQUENCES, flush_at_once=flush_at_once)
        finished: list[int] = []
        end = "starved"
        while len(engine.finished) < len(wishes) and not stuck(finished):
            for name, wish in arrivals(wishes, len(finished)):
                engine.submit(name, wish.prompt, wish.answer)
            try:
                engine.step()
            except Dead:
                end = "dead"
            finished.append(len(engine.finished))
            if end == "dead":
                break
        if len(engine.finished) == len(wishes):
            end = "finished"
        return Story(finished, 0, engine.forwarded, engine.evictions, end, [])

    return play


def stuck(finished: Row[int]) -> bool:
    return len(finished) > PATIENCE and finished[-1] == finished[-PATIENCE]


PLAYS = {
    "fgsnap, reserve": with_engine("reserve"),
    "fgsnap, optimistic": with_engine("optimistic"),
    "FastGen": with_fastgen(flush_at_once=False),
    "FastGen, blocks back at once": with_fastgen(flush_at_once=True),
}


if __name__ == "__main__":
    main()
