"""The scheduler's promises, on its own: what goes into a step, in which order, out of which blocks."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.roster import Roster
from fgsnap.runtime.scheduler import MOST_PROMPTS, Scheduler
from fgsnap.runtime.sequence import Sequence
from fgsnap.runtime.turns import MANY_GONE, MANY_TENANTS
from tests.doubles import check_batch

ENDING = 1000  # a token that no test gives


class Bench:
    """A scheduler, and a model that says the number of the step."""

    def __init__(
        self, blocks=1000, block_size=4, budget=10, max_sequences=10, admission="reserve", caching=True
    ) -> None:
        self.pool = BlockPool(blocks, block_size, caching=caching)
        self.scheduler = Scheduler(self.pool, budget, min(budget, max_sequences), admission)
        self.roster = self.scheduler.roster
        self.block_size = block_size
        self.live: dict[str, Sequence] = {}

    def add(self, name: str, prompt=4, max_tokens=4, priority=0, tenant="", salt="") -> Sequence:
        """Queue a sequence. A number as its prompt is that of tokens that no other prompt has."""
        tokens = tuple(hash((name, at)) % 2**31 for at in range(prompt)) if isinstance(prompt, int) else tuple(prompt)
        request = Request(name, tokens, SamplingParams(max_tokens=max_tokens), priority, tenant, None, salt)
        sequence = Sequence(request, seed=0, eos=[ENDING], root=self.pool.root(salt))
        self.live[name] = sequence
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[str, int]:
        """Schedule, pretend to forward, and add a token where one was due; gives the tokens of each by name."""
        work = self.scheduler.schedule()
        if work is None:
            return {}
        check_batch(work.batch, self.block_size)
        assert len(work.how) == len(work.positions) == len(work.batch.rows)
        lengths = dict.fromkeys(self.roster.ids, 1) | {sequence.id: length for sequence, length in work.slices}
        self.scheduler.advance(work)
        self.roster.append([self.roster.step] * work.decodes)
        ended = self.roster.due()
        for sequence in work.through:
            sequence.tokens.append(self.roster.step)
            if sequence.generated == sequence.params.max_tokens:
                ended.append(sequence)
            else:
                self.roster.join(sequence)
        for sequence in ended:
            self.remove(sequence.id)
        return lengths

    def remove(self, name: str, **how) -> None:
        self.scheduler.remove(self.live.pop(name), **how)

    def run(self, steps=1000) -> list[dict[str, int]]:
        """Every step until nothing is left."""
        made = []
        while self.live and len(made) < steps:
            made.append(self.step())
        assert not self.live, "no progress"
        return made

    def states(self) -> dict[str, str]:
        return {name: sequence.state for name, sequence in self.live.items()}


# ---- what goes into a step ------------------------------------------------------------------------------------------


def test_those_that_generate_come_first_and_prompts_fill_the_budget_exactly():
    bench = Bench()
    for name in "ab":
        bench.add(name, prompt=2)
    assert bench.step() == {"a": 2, "b": 2}
    bench.add("long", prompt=30)
    assert bench.step() == {"a": 1, "b": 1, "long": 8}
    assert list(bench.step()) == ["a", "b", "long"]


def test_several_prompts_may_be_partial_in_one_step():
    bench = Bench()
    bench.add("first", prompt=40)
    bench.add("second", prompt=30)
    assert bench.step() == {"first": 5, "second": 5}


def test_the_odd_token_is_the_oldest_prompt_s():
    bench = Bench(budget=7, max_sequences=7)
    bench.add("first", prompt=40)
    bench.add("second", prompt=30)
    assert bench.step() == {"first": 4, "second": 3}


def test_a_long_prompt_does_not_block_short_ones():
    bench = Bench()
    bench.add("long", prompt=1000)
    bench.step()
    for name in ("s1", "s2"):
        bench.add(name, prompt=2)
    assert bench.step() == {"long": 6, "s1": 2, "s2": 2}


def test_a_stream_of_short_prompts_does_not_starve_a_long_one():
    bench = Bench()
    long = bench.add("long", prompt=200)
    steps = 0
    while long.row < 0:
        bench.add(f"short{steps}", prompt=20, max_tokens=1)
        assert bench.step()["long"] >= 5
        steps += 1
    assert steps <= 40


def test_equal_prompts_finish_one_after_the_other():
    bench = Bench()
    for name in "abc":
        bench.add(name, prompt=10)
    assert bench.step() == {"a": 10}


def test_a_prompt_may_take_longer_than_twice_its_part_of_the_room_but_not_longer_than_its_bound():
    """An older prompt of one token more than its share costs a whole step more."""
    bench = Bench(max_sequences=4)
    older, long = bench.add("older", prompt=5, max_tokens=1), bench.add("long", prompt=40, max_tokens=1)
    steps = 0
    while long.state != "gone":
        while len(bench.live) < 4:
            bench.add(f"short{steps}.{len(bench.live)}", prompt=3, max_tokens=1)
        bench.step()
        steps += 1
    assert older.state == "gone" and steps <= 2 + 10


@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    budget=st.integers(1, 24),
    caching=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_every_step_is_full_while_there_is_work(prompts, budget, caching, data):
    most = data.draw(st.integers(1, budget))
    bench = Bench(blocks=60, budget=budget, max_sequences=most, caching=caching)
    for index, prompt in enumerate(prompts):
        bench.add(str(index), prompt, max_tokens=data.draw(st.integers(1, 6)))
    scheduler = bench.scheduler
    while bench.live:
        decodes = list(bench.roster.ids)
        before = {name: live.remaining for name, live in bench.live.items() if live.row < 0}
        lengths = bench.step()
        started = [name for name in before if name not in bench.live or bench.live[name].state == "running"]
        assert sum(lengths.values()) == min(budget, len(decodes) + sum(before[name] for name in started))
        assert list(lengths)[: len(decodes)] == decodes
        assert all(lengths[name] == 1 for name in decodes), "a sequence was delayed or overfed"
        assert scheduler.running <= most
    assert bench.pool.available == 60


# ---- who starts, and when -------------------------------------------------------------------------------------------


def test_first_come_first_served_without_overtaking_for_want_of_blocks():
    bench = Bench(blocks=4)
    bench.add("half", prompt=4, max_tokens=4)
    bench.add("whole", prompt=8, max_tokens=8)
    bench.add("small", prompt=1, max_tokens=1)
    assert bench.step() == {"half": 4}
    assert (bench.scheduler.running, bench.scheduler.waiting) == (1, 2)
    assert [list(bench.step()) for _ in range(4)] == [["half"], ["half"], ["half"], ["whole"]]
    assert bench.scheduler.waiting == 1, "a small one overtook the one before it"


def test_who_leaves_the_head_of_the_line_lets_the_next_one_start():
    bench = Bench(blocks=4)
    bench.add("half", prompt=4, max_tokens=4)
    bench.add("whole", prompt=8, max_tokens=8)
    bench.add("small", prompt=1, max_tokens=1)
    bench.step()
    bench.remove("whole")
    assert bench.step() == {"half": 1, "small": 1}


def test_a_new_first_in_line_is_tried_at_once():
    bench = Bench(blocks=4)
    bench.add("half", prompt=4, max_tokens=4)
    bench.add("whole", prompt=8, max_tokens=8)
    bench.step()
    bench.add("urgent", prompt=1, max_tokens=1, priority=-1)
    assert bench.step() == {"half": 1, "urgent": 1}


def test_the_number_of_running_sequences_is_bounded():
    bench = Bench(max_sequences=2)
    for name in "abc":
        bench.add(name, prompt=1)
    assert bench.step() == {"a": 1, "b": 1}
    assert bench.scheduler.waiting == 1


def test_the_number_of_prompts_under_way_is_bounded():
    bench = Bench(blocks=10_000, budget=200, max_sequences=200)
    for index in range(MOST_PROMPTS + 5):
        bench.add(str(index), prompt=100, max_tokens=1)
    bench.step()
    assert bench.scheduler.running == MOST_PROMPTS - 2 and bench.scheduler.waiting == 5
    bench.run()


def test_a_lower_priority_number_goes_first():
    bench = Bench(max_sequences=1)
    for name, priority in (("late", 1), ("usual", 0), ("soon", -1), ("also soon", -1)):
        bench.add(name, prompt=1, max_tokens=1, priority=priority)
    assert [list(made) for made in bench.run()] == [["soon"], ["also soon"], ["usual"], ["late"]]


def test_tenants_take_turns_by_tokens():
    bench = Bench(max_sequences=1)
    for index in range(4):
        bench.add(f"a{index}", prompt=3, max_tokens=1, tenant="a")
    for index in range(2):
        bench.add(f"b{index}", prompt=6, max_tokens=2, tenant="b")
    order = [name for made in bench.run() for name in made]
    assert list(dict.fromkeys(order)) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_a_tenant_that_was_quiet_saves_no_turns_up():
    bench = Bench(max_sequences=1)
    bench.add("b", prompt=1, max_tokens=1, tenant="b")
    for index in range(5):
        bench.add(f"a{index}", prompt=9, max_tokens=1, tenant="a")
    for _ in range(4):
        bench.step()
    for index in range(3):
        bench.add(f"b{index}", prompt=9, max_tokens=1, tenant="b")
    order = [name for made in bench.run() for name in made]
    assert order == ["b0", "a3", "b1", "a4", "b2"] or order == ["a3", "b0", "a4", "b1", "b2"]


def test_tenants_without_a_claim_are_forgotten():
    bench = Bench(blocks=4)
    for index in range(3 * MANY_TENANTS):
        bench.add(str(index), prompt=1, max_tokens=1, tenant=str(index))
        bench.step()
    assert len(bench.scheduler._turns._lines) <= MANY_TENANTS + 1


def test_endless_urgent_requests_keep_back_others_of_their_own_tenant_only():
    bench = Bench(max_sequences=1)
    bench.add("mine", 3, 1, tenant="a")
    bench.add("theirs", 3, 1, tenant="b")
    order = []
    for index in range(10):
        bench.add(f"urgent{index}", 3, 1, priority=-5, tenant="a")
        order += bench.step()
    assert order[:3] == ["theirs", "urgent0", "urgent1"] and "mine" not in order


def test_what_was_queued_and_cancelled_costs_no_turns():
    bench = Bench(max_sequences=1)
    for index in range(50):
        bench.add(f"a{index}", 8, 8, tenant="a")
        bench.add(f"b{index}", 8, 8, tenant="b")
    for index in range(50):
        bench.remove(f"a{index}")
    bench.add("a", 8, 8, tenant="a")
    order = [*dict.fromkeys(name for made in bench.run() for name in made)]
    assert order.index("a") == 1


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_was_promised_and_not_used_is_given_back(cancelled):
    """One of a's may have 100 tokens and has 5; then a is not behind b, which gets 5 at a time."""
    bench = Bench(blocks=60, max_sequences=1)
    long = bench.add("a0", 4, 96, tenant="a")
    for index in range(1, 4):
        bench.add(f"a{index}", 4, 1, tenant="a")
        bench.add(f"b{index}", 4, 1, tenant="b")
    order = [*bench.step()]
    if not cancelled:
        long.tokens[-1] = ENDING
    bench.remove("a0")
    order += [name for made in bench.run() for name in made]
    assert order == ["a0", "b1", "a1", "b2", "a2", "b3", "a3"]


def test_what_is_given_back_saves_no_turns_up_either():
    """The long one was started when nobody else was there: what it leaves over is no claim on those that came since."""
    bench = Bench(blocks=100, max_sequences=2)
    bench.add("a", 4, 296, tenant="a")
    bench.step()
    for index in range(60):
        bench.add(f"b{index}", 4, 1, tenant="b")
    for _ in range(40):
        bench.step()
    for index in range(60):
        bench.add(f"a{index}", 4, 1, tenant="a")
    bench.remove("a")
    bench.step()
    order = [name[0] for _ in range(10) for name in bench.step()]
    assert order.count("b") >= 8, "it takes turns with a"


class Account:
    """What tenants have used, and the widest that two of them were apart while both had somebody ready to start."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.known: list[Sequence] = []
        self.past: Counter = Counter()  # what those used that are gone
        self.longest = self.promised = self.widest = 0
        self.spans: dict[tuple[str, str], tuple[int, int]] = {}

    def look(self) -> None:
        used, promised, ready = self.past.copy(), Counter(), set()
        for one in self.known:
            tenant = one.request.tenant
            used[tenant] += one.used
            self.longest = max(self.longest, one.longest)
            if one.state == "running":
                promised[tenant] += one.longest - one.used
            elif one.state == "waiting":
                ready.add(tenant)
            else:
                self.past[tenant] += one.used
        self.known = [one for one in self.known if one.state != "gone"]
        self.promised = max([self.promised, *promised.values()])
        for pair in combinations("abc", 2):
            if not ready.issuperset(pair):
                self.spans.pop(pair, None)
                continue
            apart = used[pair[0]] - used[pair[1]]
            low, high = self.spans.get(pair, (apart, apart))
            self.spans[pair] = min(low, apart), max(high, apart)
            self.widest = max(self.widest, max(high, apart) - min(low, apart))


@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
@pytest.mark.parametrize("seed", range(4))
def test_tenants_that_wait_are_never_far_apart_whatever_they_do(seed, admission):
    """One sends urgent requests only, one cancels most of what it sends, one sends long ones that end early."""
    draw = random.Random(seed)
    bench = Bench(blocks=12, max_sequences=6, admission=admission)
    account = Account(bench)
    for step in range(600):
        for tenant in "abc":
            mine = sum(live.request.tenant == tenant for live in bench.live.values())
            if draw.random() < draw.choice([0.5, 0.9]) and mine < 12:
                prompt, most, priority = {"a": (20, 2, -5), "b": (9, 9, 0), "c": (3, 30, 1)}[tenant]
                name = f"{tenant}{step}"
                made = bench.add(name, draw.randint(1, prompt), draw.randint(1, most), priority, tenant)
                account.known.append(made)
        for name, live in [*bench.live.items()]:
            odds = {"a": 0.0, "b": 0.2, "c": 0.1 if live.generated else 0.0}[live.request.tenant]
            if draw.random() < odds:
                bench.remove(name)
        account.look()
        bench.step()
        account.look()
    bound = 2 * account.longest + 4 * account.promised
    assert account.widest <= bound, (account.widest, bound)
    assert bench.scheduler.preemptions or admission == "reserve"


# ---- leaving --------------------------------------------------------------------------------------------------------


def test_removal_works_in_every_state():
    bench = Bench(blocks=6, budget=4, max_sequences=3)
    bench.add("generating", 2, 2)
    bench.add("prompt", range(8), 3)
    bench.add("parked", range(8), 3)
    bench.add("waiting", 8, 8)
    bench.step()
    assert bench.scheduler._parked
    assert bench.states() == dict.fromkeys(("generating", "prompt"), "running") | dict.fromkeys(
        ("parked", "waiting"), "waiting"
    )
    for name in ("waiting", "generating", "parked", "prompt"):
        bench.remove(name)
    assert (bench.scheduler.running, bench.scheduler.waiting, bench.pool.available) == (0, 0, 6)
    assert not bench.scheduler._parked and not bench.scheduler._computing
    assert bench.step() == {} and not bench.scheduler._turns


def test_those_that_left_do_not_pile_up_in_the_queue():
    bench = Bench(blocks=2)
    bench.add("running", 4, 4)
    bench.step()
    bench.add("first", 4, 4)
    for index in range(50):
        bench.add(f"kept{index}", 1, 1)
    for index in range(2000):
        bench.add(str(index), 1, 1)
        bench.remove(str(index))
    assert len(bench.scheduler._turns._lines[""].queue) <= 2 * 51 + MANY_GONE + 1
    order = [name for made in bench.run() for name in made if name.startswith("kept")]
    assert order == [f"kept{index}" for index in range(50)]


def test_the_order_survives_that_most_leave_the_queue():
    draw = random.Random(1)
    bench = Bench(max_sequences=1)
    priorities = {str(index): draw.randrange(1000) for index in range(600)}
    for name, priority in priorities.items():
        bench.add(name, 1, 1, priority=priority)
    kept = draw.sample(sorted(priorities), 100)
    for name in sorted(priorities, key=priorities.__getitem__):
        if name not in kept:
            bench.remove(name)
    order = [priorities[name] for made in bench.run() for name in made]
    assert order == sorted(order)


# ---- prefixes -------------------------------------------------------------------------------------------------------


def test_a_prefix_is_computed_once_and_who_waits_for_it_shares_it():
    bench = Bench(budget=10)
    a = bench.add("a", range(9), 8)
    b = bench.add("b", [*range(8), 50, 51], 8)
    bench.add("other", 3, 8)
    assert bench.step() == {"a": 7, "other": 3}, "b waits, and lets others pass"
    assert bench.step() == {"a": 2, "other": 1}, "its first block is there, and not its second"
    assert bench.step() == {"a": 1, "other": 1, "b": 2}
    assert a.table[:2] == b.table[:2] and a.table[2] != b.table[2]
    assert bench.scheduler.cached_tokens == 8


def test_copies_of_a_whole_number_of_blocks_forward_their_last_block_themselves():
    bench = Bench()
    bench.add("a", range(8), 2)
    bench.add("b", range(8), 2)
    assert bench.step() == {"a": 8}
    assert bench.step() == {"a": 1, "b": 4}


def test_who_waits_for_a_prefix_goes_on_as_soon_as_its_first_missing_block_is_there():
    bench = Bench(budget=4)
    bench.add("a", range(40), 1)
    bench.add("b", [*range(4), 99], 1)
    assert bench.step() == {"a": 4}
    assert bench.step() == {"a": 3, "b": 1}


def test_who_waits_for_a_prefix_goes_on_without_it_when_its_prompt_is_aborted():
    bench = Bench(budget=4)
    bench.add("a", range(20), 1)
    bench.add("b", [*range(16), 99, 98], 1)
    bench.step()
    bench.remove("a")
    assert bench.scheduler.waiting == 1
    assert bench.step() == {"b": 4}
    assert bench.scheduler.cached_tokens == 4


def test_a_third_one_waits_for_whoever_computes_the_prefix_now():
    bench = Bench(budget=4)
    for name in "abc":
        bench.add(name, [*range(16), ord(name)], 1)
    bench.step()
    bench.remove("a")
    assert bench.step() == {"b": 4}
    bench.remove("b")
    assert bench.step() == {"c": 4}


def test_who_waits_for_a_prefix_and_leaves_is_not_brought_back():
    bench = Bench(budget=4)
    bench.add("a", range(8), 1)
    bench.add("b", [*range(8), 99], 1)
    bench.step()
    bench.remove("b")
    assert [list(made) for made in bench.run()] == [["a"]]
    assert bench.scheduler.waiting == 0


def test_who_gets_its_prefix_is_tried_before_the_one_that_found_too_few_blocks():
    bench = Bench(blocks=6, budget=4)
    bench.add("a", range(9), 3)
    bench.add("b", [*range(8), 99], 3)
    bench.add("large", 20, 4)
    assert [bench.step(), bench.step()] == [{"a": 4}, {"a": 4}]
    assert "b" in bench.step(), "b needs one block of its own, and three are free"


def test_who_waits_for_a_preempted_prompt_is_released():
    bench = Bench(blocks=4, budget=4, max_sequences=4, admission="optimistic")
    grows = bench.add("grows", 3, 9)
    bench.step()
    long = bench.add("long", range(7), 2)
    bench.add("parked", [*range(4), 99], 1)
    bench.step()
    assert long.state == "running" and bench.scheduler._parked
    bench.scheduler._preempt(long)
    assert not bench.scheduler._parked and not bench.scheduler._computing
    bench.run()
    assert grows.generated == 9


def test_different_salts_share_nothing():
    bench = Bench()
    bench.add("a", range(9), 1)
    bench.add("b", range(9), 1, salt="x")
    assert bench.step() == {"a": 9, "b": 1}
    bench.run()
    assert bench.scheduler.cached_tokens == 0


def test_an_answer_is_found_by_who_continues_it():
    bench = Bench()
    first = bench.add("first", range(5), 6)
    bench.run()
    bench.add("second", [*first.tokens, 77], 1)
    assert bench.step() == {"second": 4}
    assert bench.scheduler.cached_tokens == 8


def test_what_is_spoiled_is_not_found():
    bench = Bench()
    first = bench.add("first", range(9), 6)
    bench.step()
    bench.remove("first", spoiled=True)
    bench.add("second", first.request.prompt, 1)
    assert bench.step() == {"second": 9}


def test_without_caching_nothing_is_shared_and_nobody_waits_for_a_prefix():
    bench = Bench(caching=False, budget=20)
    bench.add("a", range(9), 1)
    bench.add("b", range(9), 1)
    assert bench.step() == {"a": 9, "b": 9}
    assert not bench.pool._idle and len(bench.pool._free) == 1000


# ---- optimistic -----------------------------------------------------------------------------------------------------


def test_optimistic_starts_what_reserve_would_not():
    reserve, optimistic = Bench(blocks=16), Bench(blocks=16, admission="optimistic")
    for bench in (reserve, optimistic):
        for name in "ab":
            bench.add(name, 3, 40)
        bench.step()
    assert (reserve.scheduler.running, optimistic.scheduler.running) == (1, 2)


def test_who_has_least_to_compute_again_gives_up_its_blocks_and_goes_on_where_it_was():
    bench = Bench(blocks=7, admission="optimistic", budget=20)
    bench.add("first", 3, 16)
    bench.add("large", 7, 12)
    bench.add("small", 3, 12)
    small = bench.live["small"]
    while not bench.scheduler.preemptions:
        said = small.tokens.copy()
        bench.step()
    assert bench.states() == {"first": "running", "large": "running", "small": "waiting"}
    assert small.tokens == said and small.generated, "its answer so far is kept"
    made = bench.run()
    assert small.generated == 12
    again = sum(step.get("small", 0) for step in made)
    assert again <= len(said) + (12 - len(said) + 3), "and it computes no more than its tokens again"


def test_the_first_of_all_never_gives_up_its_blocks():
    bench = Bench(blocks=8, admission="optimistic", budget=20)
    bench.add("other", 11, 16)
    bench.step()
    bench.add("urgent", 2, 20, priority=-1)
    preempt, victims = bench.scheduler._preempt, []
    bench.scheduler._preempt = lambda sequence: (victims.append(sequence.id), preempt(sequence))
    bench.run()
    assert set(victims) == {"other"}


def test_lower_priorities_give_up_their_blocks_first():
    bench = Bench(blocks=8, admission="optimistic", budget=30)
    bench.add("first", 3, 20)
    bench.add("background", 11, 8, priority=1)
    bench.add("small", 3, 20)
    while not bench.scheduler.preemptions:
        bench.step()
    assert bench.states() == {"first": "running", "background": "waiting", "small": "running"}


def test_another_tenant_s_priority_takes_nobody_s_blocks():
    bench = Bench(blocks=8, admission="optimistic", budget=30)
    bench.add("first", 3, 20, tenant="c")
    bench.add("large", 11, 8, priority=1, tenant="b")
    bench.add("small", 3, 20, priority=-5, tenant="a")
    while not bench.scheduler.preemptions:
        bench.step()
    assert bench.states() == {"first": "running", "large": "running", "small": "waiting"}


def test_tenants_take_turns_at_keeping_their_blocks():
    bench = Bench(blocks=40, admission="optimistic", budget=30)
    tenants = {"a": ("long", "short", "late"), "b": ("other",)}
    made = {name: bench.add(name, 3, 20, tenant=tenant) for tenant, names in tenants.items() for name in names}
    bench.step()

    def leading() -> list[str]:
        return [name for name in made if bench.scheduler._turns.leads(made[name])]

    assert leading() == ["long", "short", "late"]
    bench.remove("short")
    assert leading() == ["other"]
    bench.remove("late")
    assert leading() == ["other"]
    bench.remove("other")
    assert leading() == ["long", "short", "late"]


def test_of_two_that_cost_the_same_the_later_one_gives_up_its_blocks():
    bench = Bench(blocks=8, admission="optimistic", budget=30)
    for name in "abc":
        bench.add(name, 3, 20)
    while not bench.scheduler.preemptions:
        bench.step()
    assert bench.states() == {"a": "running", "b": "running", "c": "waiting"}


def test_who_grows_gives_up_its_own_blocks_when_it_costs_least():
    bench = Bench(blocks=5, admission="optimistic", budget=30)
    bench.add("first", 7, 12)
    bench.add("last", 4, 12)
    while not bench.scheduler.preemptions:
        bench.step()
    assert bench.states() == {"first": "running", "last": "waiting"}
    bench.run()


def test_optimistic_promises_the_blocks_of_the_prompt_and_of_the_next_token():
    bench = Bench(blocks=4, admission="optimistic")
    bench.add("a", 4, 8)
    bench.step()
    assert bench.pool.available == 2


def test_none_starts_so_that_those_that_generate_soon_take_its_blocks_back():
    bench = Bench(blocks=16, admission="optimistic", budget=30, max_sequences=30)
    for name in "ab":
        bench.add(name, 3, 40)
    bench.step()
    bench.add("large", 51, 1)
    assert "large" not in bench.step(), "it would leave one block, and two may grow"
    bench.remove("a")
    assert "large" in bench.step()


def test_tokens_are_counted_once_however_often_they_are_forwarded():
    bench = Bench(blocks=7, admission="optimistic", budget=20, caching=False)
    names = ("first", "large", "small")
    for name, prompt in zip(names, (3, 7, 3), strict=True):
        bench.add(name, prompt, 12)
    counts: Counter = Counter()
    advance = bench.scheduler.advance

    def counted(work):
        new, again = advance(work)
        counts.update(new=new, again=again)
        return new, again

    bench.scheduler.advance = counted
    bench.run()
    assert bench.scheduler.preemptions and counts["new"] == 13 and counts["again"] > 0


# ---- the roster -----------------------------------------------------------------------------------------------------


def joined(roster: Roster, name: str, prompt: int, max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    sequence = Sequence(Request(name, tuple(range(1, prompt + 1)), params), 0, [ENDING], b"")
    sequence.cached = prompt
    sequence.tokens.append(5)
    sequence.table = list(range(-(-prompt // roster._block_size)))
    roster.join(sequence)
    return sequence


def test_who_leaves_and_joins_again_within_a_step_is_due_once():
    roster = Roster(4)
    sequence = joined(roster, "a", 3, 2)
    roster.leave(sequence)
    roster.join(sequence)
    roster.lengths()
    roster.append([5])
    assert roster.due() == [sequence]


@given(
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(2, 12)), max_size=60),
    block_size=st.integers(1, 6),
)
def test_the_roster_knows_who_grows_and_who_is_due_without_looking(moves, block_size):
    roster, live = Roster(block_size), []
    for move, prompt, max_tokens in moves:
        if move == 0:
            live.append(joined(roster, str(len(live)), prompt, max_tokens))
        elif move == 1 and live:
            left = live.pop(prompt % len(live))
            roster.leave(left)
            assert left.cached == len(left.tokens) - 1
        else:
            growing = [one for one in live if (len(one.tokens) - 1) == len(one.table) * block_size]
            assert {one.id for one in roster.growing()} == {one.id for one in growing}
            for one in growing:
                one.table.append(0)
            roster.lengths()
            assert roster.append([ENDING if row == 0 else 5 for row in range(len(live))]) == ([0] if live else [])
            due = roster.due()
            assert due == [one for one in due if one.generated == one.params.max_tokens]
            assert {one.id for one in due} == {o.id for o in live if o.generated == o.params.max_tokens}
            for one in due:
                roster.leave(one)
                live.remove(one)
        assert all(roster.sequences[one.row] is one and roster.texts[one.row] is one.tokens for one in live)
        assert all(roster.last[one.row] == one.tokens[-1] for one in live)
        assert len(roster) == len(live)
    for one in live:
        roster.leave(one)
    assert not any(roster._growing) and not roster._due and roster._enders == {-1: 1, -2: 1}


# ---- blocks ---------------------------------------------------------------------------------------------------------


def filled(pool: BlockPool, tokens: list[int], salt: str = "") -> tuple[list[int], list[bytes]]:
    """Take, draw and note what a text needs that fills its blocks."""
    digests = pool.digests(pool.root(salt), tokens, 0, len(tokens) // pool.block_size)
    table = pool.take(digests, pool.needed(len(tokens)))
    assert table is not None
    while len(table) < pool.needed(len(tokens)):
        table.append(pool.draw())
    for block, digest in zip(table, digests, strict=False):
        pool.note(block, digest)
    return table, digests


def test_outgrowing_a_promise_is_our_own_fault():
    pool = BlockPool(4, 4)
    assert not pool.take([], 1)
    pool.draw()
    with pytest.raises(AssertionError, match="outgrew"):
        pool.draw()


def test_a_shared_block_is_free_when_its_last_user_lets_go():
    pool = BlockPool(4, 4)
    first, _ = filled(pool, list(range(8)))
    second, _ = filled(pool, list(range(8)))
    assert first == second and pool.available == 2
    pool.release(first, 0)
    assert pool.available == 2
    pool.release(second, 0)
    assert pool.available == 4


def test_the_longest_unused_is_taken_first_and_the_end_of_a_text_before_its_beginning():
    pool = BlockPool(4, 2)
    old, of_old = filled(pool, [1, 2, 3, 4])
    new, of_new = filled(pool, [5, 6, 7, 8])
    pool.release(old, 0)
    pool.release(new, 0)
    again, _ = filled(pool, [1, 2, 3, 4])
    pool.release(again, 0)
    assert pool.promise(4)
    assert [pool.draw() for _ in range(4)] == [new[1], new[0], old[1], old[0]]
    assert not any(pool.holds(digest) for digest in of_old + of_new)


def test_blocks_that_hold_nothing_are_taken_before_those_that_hold_a_text():
    pool = BlockPool(4, 2)
    table, digests = filled(pool, [1, 2, 3])
    pool.release(table, 0)
    assert pool.promise(3)
    assert table[0] not in [pool.draw() for _ in range(3)]
    assert pool.holds(digests[0])


def test_digests_depend_on_the_process_the_salt_all_tokens_before_and_their_order():
    pool, other = BlockPool(4, 2), BlockPool(4, 2)

    def digests(of: BlockPool, tokens: list[int], salt: str = "") -> list[bytes]:
        return of.digests(of.root(salt), tokens, 0, len(tokens) // 2)

    plain = digests(pool, [1, 2, 3, 4])
    assert digests(pool, [1, 2, 3, 4, 5]) == plain
    assert pool.digests(plain[0], [1, 2, 3, 4], 1, 2) == plain[1:]
    others = [
        digests(other, [1, 2, 3, 4]),
        digests(pool, [1, 2, 3, 4], "x"),
        digests(pool, [2, 1, 3, 4]),
        digests(pool, [9, 2, 3, 4]),
        digests(pool, [1 << 24, 2, 3, 4]),
    ]
    for one in others:
        assert not {*one} & {*plain}
    assert len({bytes(digest) for one in others for digest in one}) == 10


def test_what_is_discarded_is_found_no_more_whether_used_or_not():
    pool = BlockPool(4, 2)
    used, of_used = filled(pool, [1, 2])
    idle, of_idle = filled(pool, [3, 4])
    pool.release(idle, 0)
    pool.discard([*used, *idle])
    assert not pool.holds(of_used[0]) and not pool.holds(of_idle[0])
    assert pool.available == 3 and not pool._idle
    pool.release(used, 0)
    assert pool.available == 4 and sorted(pool._free) == [0, 1, 2, 3]


def test_what_cannot_be_had_takes_nothing():
    pool = BlockPool(3, 2)
    table, digests = filled(pool, [1, 2, 3, 4])
    pool.release(table, 0)
    assert pool.take(digests, 4) is None
    assert pool.available == 3 and not any(pool._users)
    assert not pool.promise(4) and pool.promise(3) and not pool.promise(1)


def test_an_idle_block_that_is_shared_cannot_be_promised_to_another_as_well():
    pool = BlockPool(2, 2)
    table, digests = filled(pool, [1, 2])
    pool.release(table, 0)
    assert pool.take(digests, 3) is None
    assert pool.take(digests, 2) == table
    assert pool.available == 0


@given(
    moves=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=12)), max_size=50),
    block_size=st.integers(1, 4),
    caching=st.booleans(),
)
@settings(deadline=None)
def test_the_pool_lends_a_block_to_one_text_at_a_time(moves, block_size, caching):
    """What each block holds is written down here, and compared with what its users believe."""
    pool, holds, held = BlockPool(8, block_size, caching=caching), {}, []
    for move, tokens in moves:
        if move == 0 and held:
            table, promised, _ = held.pop(len(tokens) % len(held))
            pool.release(table, promised)
        elif move == 1 and held:
            pool.discard(held[len(tokens) % len(held)][0])
        else:
            before, needed = pool.available, pool.needed(len(tokens) + 3)
            digests = pool.digests(pool.root(""), tokens, 0, len(tokens) // block_size)
            if (table := pool.take(digests, needed)) is None:
                assert needed > before - sum(not pool._users[pool._found[d]] for d in digests if pool.holds(d)) or (
                    needed > pool.available
                )
                continue
            texts = [tuple(tokens[: (at + 1) * block_size]) for at in range(pool.needed(len(tokens)))]
            assert [holds[block] for block in table] == texts[: len(table)], "it holds another text"
            promised = needed - len(table)
            while len(table) < len(texts):
                table.append(pool.draw())
                promised -= 1
                holds[table[-1]] = texts[len(table) - 1]
            for block, digest in zip(table, digests, strict=False):
                pool.note(block, digest)
            held.append((table, promised, texts))
        for table, _, texts in held:
            assert [holds[block] for block in table] == texts, "a block was lent to another text"
        users = Counter(block for table, _, _ in held for block in table)
        assert [users[block] for block in range(8)] == pool._users
        assert pool.available == 8 - len(users) - sum(promised for _, promised, _ in held) >= 0
        assert sorted([*pool._free, *pool._idle, *users]) == list(range(8))
        assert caching or not pool._found
