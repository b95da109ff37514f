"""The scheduler's promises, on its own: what goes into a step, in which order, out of which blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.scheduler import Scheduler, Sequence


def sequence(name: str, prompt: int, max_tokens: int = 4) -> Sequence:
    return Sequence(Request(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens)), seed=0)


def scheduler(blocks: int = 1000, block_size: int = 4, budget: int = 10, max_sequences: int = 10) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), budget, max_sequences)


def run_step(queue: Scheduler) -> dict[str, int]:
    """Schedule, pretend to forward, and append a token wherever one was due; returns the lengths by name."""
    slices = queue.schedule()
    queue.advance(slices)
    for live, _ in slices:
        if live.cached == len(live.tokens):
            live.tokens.append(0)
            if live.generated == live.params.max_tokens:
                queue.remove(live)
    return {live.id: length for live, length in slices}


def test_decodes_come_first_and_prompts_fill_the_budget_exactly():
    queue = scheduler(budget=10)
    for name in "ab":
        queue.add(sequence(name, prompt=2))
    assert run_step(queue) == {"a": 2, "b": 2}
    queue.add(sequence("long", prompt=30))
    assert run_step(queue) == {"a": 1, "b": 1, "long": 8}
    assert list(run_step(queue)) == ["a", "b", "long"]


def test_several_prompts_may_be_partial_in_one_step():
    queue = scheduler(budget=10)
    queue.add(sequence("first", prompt=40))
    queue.add(sequence("second", prompt=30))
    assert run_step(queue) == {"first": 5, "second": 5}


def test_a_long_prompt_does_not_block_short_ones():
    queue = scheduler(budget=10)
    queue.add(sequence("long", prompt=1000))
    run_step(queue)
    for name in ("s1", "s2"):
        queue.add(sequence(name, prompt=2))
    assert run_step(queue) == {"long": 6, "s1": 2, "s2": 2}


def test_a_stream_of_short_prompts_does_not_starve_a_long_one():
    queue = scheduler(budget=10, max_sequences=10)
    queue.add(sequence("long", prompt=200))
    steps = 0
    while True:
        queue.add(sequence(f"short{steps}", prompt=20, max_tokens=1))
        done = run_step(queue)
        assert done["long"] >= 5
        steps += 1
        if sum(1 for live in queue._decodes.values() if live.id == "long"):
            break
    assert steps <= 40


def test_equal_prompts_finish_one_after_the_other():
    queue = scheduler(budget=10)
    for name in "abc":
        queue.add(sequence(name, prompt=10))
    assert run_step(queue) == {"a": 10}


def test_admission_is_first_come_first_served_and_waits_for_blocks():
    queue = scheduler(blocks=4, block_size=4)
    queue.add(sequence("half", prompt=4, max_tokens=4))
    queue.add(sequence("whole", prompt=8, max_tokens=8))
    queue.add(sequence("small", prompt=1, max_tokens=1))
    assert run_step(queue) == {"half": 4}
    assert (queue.running, queue.waiting) == (1, 2)
    started = [run_step(queue) for _ in range(4)]
    assert [list(lengths) for lengths in started] == [["half"], ["half"], ["half"], ["whole"]]
    assert queue.waiting == 1, "a small one overtook the one before it"


def test_the_number_of_running_sequences_is_bounded():
    queue = scheduler(max_sequences=2)
    for name in "abc":
        queue.add(sequence(name, prompt=1))
    assert set(run_step(queue)) == {"a", "b"}
    assert queue.waiting == 1


def test_removal_works_in_every_state():
    pool = BlockPool(4, 4)
    queue = Scheduler(pool, token_budget=4, max_sequences=4)
    decoding, prefilling, waiting = sequence("d", 2, 2), sequence("p", 5, 3), sequence("w", 8, 8)
    for live in (decoding, prefilling, waiting):
        queue.add(live)
    run_step(queue)
    assert (queue.running, queue.waiting, pool.available) == (2, 1, 1)
    for live in (waiting, decoding, prefilling):
        queue.remove(live)
    assert (queue.running, queue.waiting, pool.available) == (0, 0, 4)
    assert sorted(pool._free) == [0, 1, 2, 3]


@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    budget=st.integers(1, 24),
    data=st.data(),
)
def test_every_step_is_full_while_there_is_work(prompts, budget, data):
    max_sequences = data.draw(st.integers(1, budget))
    queue = scheduler(blocks=60, block_size=4, budget=budget, max_sequences=max_sequences)
    for index, prompt in enumerate(prompts):
        queue.add(sequence(str(index), prompt, max_tokens=data.draw(st.integers(1, 6))))
    while queue.running or queue.waiting:
        decodes = set(queue._decodes)
        slices = queue.schedule()
        lengths = {live.id: length for live, length in slices}
        work = len(decodes) + sum(live.prompt_length - live.cached for live in queue._prompts.values())
        assert sum(lengths.values()) == min(budget, work)
        assert all(lengths[name] == 1 for name in decodes), "a decode was delayed or overfed"
        assert list(lengths)[: len(decodes)] == list(queue._decodes)
        assert queue.running == max_sequences or not queue.waiting or not fits(queue)
        queue.advance(slices)
        for live, _ in slices:
            if live.cached == len(live.tokens):
                live.tokens.append(0)
                if live.generated == live.params.max_tokens:
                    queue.remove(live)
    assert queue._pool.available == 60


def fits(queue: Scheduler) -> bool:
    return queue._pool.needed(queue._waiting[0].longest) <= queue._pool.available


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), max_size=60), st.integers(1, 9))
def test_the_pool_never_lends_a_block_twice(steps, block_size):
    pool = BlockPool(16, block_size)
    held = []
    for tokens, choice in steps:
        if choice < 0.4 and held:
            pool.release(held.pop(int(choice * len(held))))
        elif (reservation := pool.reserve(tokens)) is not None:
            held.append(reservation)
            pool.grow(reservation, max(1, int(tokens * choice)))
        lent = [block for reservation in held for block in reservation.table]
        assert len(lent) == len(set(lent)) == 16 - len(pool._free)
        assert pool.available == 16 - sum(reservation.promised for reservation in held) >= 0


def test_outgrowing_a_reservation_is_our_own_fault():
    pool = BlockPool(4, 4)
    reservation = pool.reserve(4)
    assert reservation is not None
    with pytest.raises(AssertionError, match="outgrew"):
        pool.grow(reservation, 5)
