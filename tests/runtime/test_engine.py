"""The engine against a model that notices a wrong block: same tokens whatever else runs, and nothing left behind."""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Edits, Sampled, Samples, Sampling
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import MOST_BAD_TOKENS, Constraint, Output, Request, SamplingParams, Step, Token
from fgsnap.runtime.roster import NO_CHOICE, NO_TOKEN
from fgsnap.runtime.scheduler import MOST_SCORED, Work
from fgsnap.runtime.sequence import Sequence
from tests.doubles import StubGrammars, StubModel, pick, said_next

VOCAB = 24
EOS = (3, 7)


def stub(**settings) -> StubModel:
    return StubModel(**({"vocab_size": VOCAB, "max_length": 64, "blocks": 16, "block_size": 4} | settings))


def finish(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left, within the bound that progress promises; outputs by request."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(2000):
        if not (engine.has_work() or engine.awaited()):
            return outputs
        for output in engine.step().outputs():
            outputs.setdefault(output.request, []).append(output)
    raise AssertionError("the engine makes no progress")


def summary(outputs: list[Output]) -> tuple[list[int], str | None]:
    assert all(output.finish is None for output in outputs[:-1])
    return [token.id for output in outputs for token in output.tokens], outputs[-1].finish


def alone(request: Request, **settings) -> tuple[list[int], str | None]:
    engine = Engine(stub(**settings), eos_token_ids=EOS, grammars=lambda: StubGrammars(VOCAB, EOS))
    engine.submit(request)
    return summary(finish(engine)[request.id])


def of_prompt(outputs: list[Output]) -> list[Token]:
    """What was told of the prompt's tokens, which comes before any of the answer's."""
    answering = [bool(output.tokens) for output in outputs if output.tokens or output.prompt]
    assert answering == sorted(answering)
    return [token for output in outputs for token in output.prompt]


def request(name: str, prompt=(1, 2, 3), max_tokens: int = 8, **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | params)))


params = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([*range(10)]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    seed=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (5,), (5, 6)]),
    ignore_eos=st.sampled_from([True, True, False]),
    logprobs=st.sampled_from([-1, -1, 0, 2]),
    prompt_logprobs=st.sampled_from([-1, -1, 0, 2]),
)
edited = (
    st.builds(
        msgspec.structs.replace,
        params,
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.sampled_from([(), ((1, 3.0), (2, -100.0)), ((5, 6.0),)]),
        min_tokens=st.sampled_from([0, 0, 1]),
        constraint=st.sampled_from([None, None, None, "1", "4", "6", "20", "0 unfit", "3 breaks"]).map(
            lambda text: text and Constraint("lark", text)
        ),
        allowed=st.sampled_from([b"", b"", b"\x7e\x00\x00\x00"]),
        bad_words=st.sampled_from([(), ((1,), (2, 3)), ((4, 5), (4, 4, 6), (5, 1))]),
    )
    .map(lambda made: msgspec.structs.replace(made, allowed=b"") if made.constraint else made)
    .filter(lambda made: made.min_tokens <= made.max_tokens)
)
# Many begin alike, and some are equal.
prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.builds(lambda same, own: [*range(same), *own], st.integers(1, 14), st.lists(st.integers(0, 2), max_size=6)),
)
LONGEST = 29  # tokens of a prompt and its answer
SICK = 9  # the token after which some models fail
SHRINKING = [Phase.shrink] if os.environ.get("FGSNAP_SHRINK", "1") == "1" else []
HISTORIES = int(os.environ.get("FGSNAP_HISTORIES", "2000"))


def said(request: Request, sick: int | None = None) -> tuple[list[Token], str]:
    """The answer as the rules of sampling word it, of a text and nothing else: no engine, no blocks, no state."""
    params, tokens, given = request.params, list(request.prompt), []
    follower = None
    if params.constraint is not None:
        grammars = StubGrammars(VOCAB, EOS)
        follower = grammars.matcher(params.constraint, open_end=params.ignore_eos)
        while follower.pending:
            grammars.hear()
        if follower.error:
            return [], "error"
    if params.prompt_logprobs >= 0 and sick in tokens[:-1]:
        return [], "error"
    enders = {*params.stop_token_ids, *(() if params.ignore_eos and follower is None else EOS)}
    while len(given) < params.max_tokens:
        edits = Edits(
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias=dict(params.logit_bias),
            banned=[*(enders if len(given) < params.min_tokens else ()), *unsayable(params.bad_words, given)],
            allowed=memoryview(params.allowed) if params.allowed else None,
            prompt=sorted({*request.prompt}),
        )
        for token in tokens[len(request.prompt) :]:
            edits.count(token)
        if follower is not None:
            while follower.pending:
                grammars.hear()
            edits.allowed = follower.mask()
            edits.banned = () if follower.complete else edits.banned
        how = Sampling(
            params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.logprobs, edits
        )
        picked = Sampled(-1) if tokens[-1] == sick else pick(said_next(tokens, VOCAB), how, len(tokens))
        if picked.token == -1 or picked.token in enders:
            return given, "error" if picked.token == -1 else "stop"
        if follower is not None:
            follower.accept(picked.token)
        tokens.append(picked.token)
        given.append(Token(picked.token, *((picked.logprob, picked.top) if params.logprobs >= 0 else ())))
    return given, "length"


def unsayable(words: tuple[tuple[int, ...], ...], given: list[Token]) -> list[int]:
    said = [token.id for token in given]
    return [last for *before, last in words if said[len(said) - len(before) :] == before]


def lateness(how: str | None, draw: random.Random) -> Callable[[], int]:
    """How late masks come, in looks; there are one or two a step."""
    if how is None:
        return lambda: 0
    return lambda: draw.randint(0, 7) if how == "often" or draw.random() < 0.2 else 0


def scored(request: Request) -> list[Token]:
    """The logprobs of a prompt's tokens, from the same rules."""
    prompt, count = request.prompt, request.params.prompt_logprobs
    if count < 0:
        return []
    how = [Sampling(logprobs=count, target=token) for token in prompt]
    sure = [pick(said_next(prompt[:at], VOCAB), how[at], at) for at in range(1, len(prompt))]
    return [Token(one.token, one.logprob, one.top) for one in sure]


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Witness:
    """Watches who starts and who gives up its blocks, and computes by when each request has to have ended.

    The rule is that of the scheduler's docstring: every step brings the one that started first a token of its answer,
    or the share of the oldest prompt, so a start delays those that wait by its ``cost`` at most, and is itself delayed
    by the older prompts only.
    """

    def __init__(self, engine: Engine, budget: int, most: int) -> None:
        self.scheduler = scheduler = engine._scheduler
        room = budget - min(budget, most) + 1
        self.share = room - room // 2
        self.latest: dict[str, int] = {}
        self.waiting: dict[str, Sequence] = {}
        self.leader = ""  # the tenant whose first kept its blocks when somebody last gave up its own
        self.ended: set[str] = set()  # tenants of which one that ran or had run has ended since then
        self.add, self.start, self.preempt = scheduler.add, scheduler._start, scheduler._preempt
        self.remove, self.commit = scheduler.remove, engine._commit
        engine._commit = self.on_commit
        self.lost = 0  # steps in which somebody was held
        scheduler.add, scheduler._start, scheduler._preempt = self.on_add, self.on_start, self.on_preempt
        scheduler.remove = self.on_remove

    @property
    def step(self) -> int:
        return self.scheduler.roster.step - self.lost

    def prefill(self, sequence: Sequence) -> int:
        scoring = sequence.scored < sequence.to_score
        return -(-sequence.remaining // (min(self.share, self.scheduler._most_scored) if scoring else self.share))

    def cost(self, sequence: Sequence) -> int:
        """The steps that it takes if each brings it as little as it may."""
        left = sequence.params.max_tokens - sequence.generated
        return left if sequence.row >= 0 else self.prefill(sequence) + max(left, 1) - 1

    def running(self) -> list[Sequence]:
        return [*self.scheduler._prompts, *self.scheduler.roster.sequences, *self.scheduler.held]

    def on_commit(self, work: Work, *others) -> Step:
        late = [one for one in [*self.scheduler.roster.sequences, *work.through] if one.matcher and one.matcher.pending]
        self.lost += bool(late or self.scheduler.held)
        EngineLife.seen["held"] += len(late)
        return self.commit(work, *others)

    def on_add(self, sequence: Sequence) -> None:
        """It is submitted, or its constraint has been compiled."""
        self.add(sequence)
        self.on_wait(sequence)

    def on_wait(self, sequence: Sequence) -> None:
        self.waiting[sequence.id] = sequence
        self.latest[sequence.id] = self.step + sum(map(self.cost, self.running()))

    def on_start(self, sequence: Sequence) -> bool:
        older = [*self.scheduler._prompts]
        turns = {tenant: line.turn for tenant, line in self.scheduler._turns._lines.items()}
        if not self.start(sequence):
            return False
        self.waiting.pop(sequence.id)
        parked = {id(one) for group in self.scheduler._parked.values() for one in group}
        mine = sequence.request.tenant
        for other in self.waiting.values():
            if id(other) not in parked:
                assert turns[mine] <= turns[other.request.tenant], "it was another tenant's turn"
                same = other.request.tenant == mine
                assert not same or sequence.order < other.order, "it overtook one that was ready"
            self.latest[other.id] += self.cost(sequence)
        from_here = self.step + sum(map(self.prefill, older)) + self.cost(sequence)
        assert from_here <= self.latest[sequence.id] + self.cost(sequence)
        self.latest[sequence.id] = from_here
        return True

    def on_preempt(self, sequence: Sequence) -> None:
        begun = [one for one in (*self.waiting.values(), *self.running()) if one.charged]
        leader = next(one.request.tenant for one in begun if self.scheduler._turns.leads(one))
        assert leader == self.leader or self.leader in {"", *self.ended}, "another tenant's turn ended before its time"
        self.leader, self.ended = leader, set()
        first = min((one for one in begun if one.request.tenant == leader), key=lambda one: one.order)
        assert sequence is not first, "the first of all gave up its blocks"
        EngineLife.seen["held and preempted"] += sequence in self.scheduler.held
        self.preempt(sequence)
        self.on_wait(sequence)

    def on_remove(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        self.waiting.pop(sequence.id, None)
        EngineLife.seen["held and ended"] += sequence in self.scheduler.held
        if sequence.charged:
            self.ended.add(sequence.request.tenant)
        self.remove(sequence, spoiled=spoiled)
        assert self.step <= self.latest.pop(sequence.id), "it took longer than is proven"


class EngineLife(RuleBasedStateMachine):
    """Random arrivals, aborts, deadlines and steps over a cache that holds only two or three sequences."""

    seen: ClassVar[Counter] = Counter()

    @initialize(
        budget=st.integers(1, 16),
        most=st.integers(1, 20),
        block_size=st.integers(1, 6),
        spare=st.integers(0, 5),
        admission=st.sampled_from(["reserve", "optimistic"]),
        caching=st.sampled_from([True, True, False]),
        sick=st.sampled_from([None, None, SICK]),
        queue=st.sampled_from([1, 100]),
        most_scored=st.sampled_from([1, 3, MOST_SCORED]),
        pushing=st.sampled_from([False, False, True]),
        late=st.sampled_from([None, None, "now and then", "often"]),
        seed=st.integers(0, 99),
    )
    def begin(self, budget, most, block_size, spare, admission, caching, sick, queue, most_scored, pushing, late, seed):
        self.sick, self.queue, self.budget, self.most, self.clock = sick, queue, budget, most, Clock()
        blocks = -(-LONGEST // block_size) + spare
        self.model = stub(blocks=blocks, block_size=block_size, nan_after=sick)
        self.grammars = StubGrammars(VOCAB, EOS, lateness(late, random.Random(seed)))
        self.engine = Engine(
            self.model, eos_token_ids=EOS, token_budget=budget, max_sequences=most, admission=admission,
            max_waiting=queue, prefix_caching=caching, clock=self.clock, grammars=lambda: self.grammars,
        )  # fmt: skip
        self.engine._scheduler._most_scored = most_scored
        self.witness = Witness(self.engine, budget, most)
        self.pushing, self.urgent = pushing, set()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.live: set[str] = set()
        self.parked = self.compiled = False

    @rule(
        prompt=prompts,
        params=st.one_of(params, edited),
        copies=st.sampled_from([1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, -1, 1]),
        tenant=st.sampled_from("ab"),
        timeout=st.sampled_from([None, None, None, 3.0]),
        salt=st.sampled_from(["", "", "x"]),
    )
    def submit(self, prompt, params, copies, priority, tenant, timeout, salt):
        for copy in range(copies):
            own = msgspec.structs.replace(params, seed=params.seed + copy)
            request = Request(f"r{len(self.requests)}", tuple(prompt), own, priority, tenant, timeout, salt)
            if len(self.live) >= min(self.most, self.budget) + self.queue:
                with pytest.raises(RequestError) as refused:
                    self.engine.submit(request)
                assert refused.value.status == 429
                EngineLife.seen["a full queue"] += 1
                return
            self.requests[request.id] = request
            self.live.add(request.id)
            self.engine.submit(request)

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 1000))
    def abort(self, pick):
        name = f"r{pick % len(self.requests)}"
        self.engine.abort(name)
        if name in self.live:
            self.live.remove(name)
            self.outputs.pop(name, None)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            self.one_step()

    @rule()
    def wait(self):
        self.clock.now += 2

    def push(self):
        """Keep up one tenant's stream of requests that are more urgent than all others."""
        while self.pushing and len(self.live & self.urgent) < 3 and len(self.live) < self.engine._max_live:
            params = SamplingParams(2, 0.0, ignore_eos=True)
            request = Request(f"r{len(self.requests)}", (1,), params, priority=-5, tenant="c")
            self.requests[request.id] = request
            self.live.add(request.id)
            self.urgent.add(request.id)
            self.engine.submit(request)

    def one_step(self):
        self.push()
        before, compiling = len(self.model.batches), len(self.engine._compiling)
        step = self.engine.step()
        for output in step.outputs():
            assert output.request in self.live, "one that was aborted or had ended spoke"
            self.outputs.setdefault(output.request, []).append(output)
            if output.finish is not None:
                self.live.remove(output.request)
        made = self.model.batches[before:]
        assert len(made) == 1 or not (made or self.engine.has_work()), "no step while there is work"
        self.compiled |= len(self.engine._compiling) < compiling
        assert all(len(batch.tokens) <= self.budget for batch in made)
        self.parked |= bool(self.engine._scheduler._parked)

    @invariant()
    def the_books_are_right(self):
        if not hasattr(self, "engine"):
            return
        stats, scheduler = self.engine.stats(), self.engine._scheduler
        assert stats.running + stats.waiting == len(self.live) == len(self.engine._live)
        compiling = len(self.engine._compiling)
        held = len(scheduler.held)
        assert self.engine.has_work() == (len(self.live) > compiling) or held, "who has work must not sleep"
        assert (self.engine.awaited() is None) == (not compiling and not held)
        assert self.engine.has_work() or not (scheduler._prompts or scheduler.roster.sequences)
        assert len(self.grammars.matchers) == sum(self.requests[n].params.constraint is not None for n in self.live)
        assert stats.running <= min(self.most, self.budget)
        assert 0 <= stats.kv_blocks_free <= stats.kv_blocks
        assert stats.waiting == len(self.witness.waiting) + compiling
        assert scheduler._parked.keys() <= scheduler._computing.keys(), "who waits for a prefix waits for ever"
        if not self.live:
            nothing_is_left(self.engine)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        tokens = sum(len(r.prompt) + r.params.max_tokens for r in self.requests.values())
        for _ in range((tokens + self.pushing * 3 * LONGEST) ** 2 * 8 + 3):
            self.pushing = self.pushing and not self.live <= self.urgent
            if not self.live:
                break
            self.one_step()
        assert not self.engine.has_work(), "the engine makes no progress"
        nothing_is_left(self.engine)
        for name, outputs in self.outputs.items():
            self.compare(outputs, said(self.requests[name], self.sick), scored(self.requests[name]))
        self.count()

    def compare(self, outputs, expected, told):
        tokens, finish = [token for output in outputs for token in output.tokens], outputs[-1].finish
        assert all(output.finish is None for output in outputs[:-1])
        prompt = of_prompt(outputs)
        assert prompt == told[: len(prompt)] and (prompt == told or (finish == "error" and not tokens))
        EngineLife.seen["prompt_scored"] += bool(prompt)
        if outputs[-1].code == "deadline_exceeded":
            assert tokens == expected[0][: len(tokens)] and finish == "error"
        else:
            assert (tokens, finish) == expected, "differs from what the rules say"
            EngineLife.seen[f"ended by {finish}"] += 1

    def count(self):
        stats, whole = self.engine.stats(), self.outputs.keys() == self.requests.keys()
        prompts = sum(len(request.prompt) for request in self.requests.values())
        ends = [outputs[-1] for outputs in self.outputs.values()]
        unread = any(
            end.code == "not_finite" and self.requests[end.request].params.prompt_logprobs >= 0 for end in ends
        )
        if whole and not unread and all(end.code != "deadline_exceeded" and end.error != "unfit" for end in ends):
            assert stats.prompt_tokens == prompts, "a prompt's token was counted twice, or another's as one"
            assert stats.generated_tokens == sum(len(o.tokens) for given in self.outputs.values() for o in given)
        assert stats.prompt_tokens <= prompts
        EngineLife.seen += Counter(
            histories=1,
            preempted=stats.preemptions > 0,
            prefix_hit=stats.cached_tokens > 0,
            parked=self.parked,
            compiled=self.compiled,
            urgent=len(self.urgent) > 3,
            requests=len(self.requests),
        )


def nothing_is_left(engine: Engine) -> None:
    """Assert that an engine without requests holds nothing of those it had, but what it caches."""
    stats, pool, scheduler, roster = engine.stats(), engine._pool, engine._scheduler, engine._roster
    assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, stats.kv_blocks), "blocks leaked"
    assert sorted([*pool._free, *pool._idle]) == list(range(pool.blocks))
    assert not pool._promised and not any(pool._users)
    assert {*pool._found.values()} == {*pool._idle} and len(pool._found) == len(pool._idle)
    assert all(pool._found[digest] == block for block, digest in enumerate(pool._digests) if digest is not None)
    assert not scheduler._computing and not scheduler._parked and not scheduler._prompts and not scheduler.held
    turns = scheduler._turns
    assert not (turns or turns.waiting or turns._leading)
    assert not any(line.queue or line.waiting or line.live or line.begun for line in turns._lines.values())
    columns = (roster.sequences, roster.ids, roster.texts, roster.tables, roster.how, roster.last, roster.cached)
    assert not any(columns) and not any(roster._growing) and not roster._due and not roster._edited
    assert roster._enders == {NO_TOKEN: 1, NO_CHOICE: 1}


@pytest.mark.timeout(1200 + HISTORIES)  # one takes 20 ms; a failure is made smaller, which takes long
class Life(EngineLife.TestCase):
    """Each of these has to have happened often enough, or what the histories show is worth little."""

    settings = settings(
        max_examples=HISTORIES,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, *SHRINKING],
    )

    @classmethod
    def tearDownClass(cls):
        seen = EngineLife.seen
        print(f"\n{seen['histories']} histories: {dict(seen)}")
        if seen["histories"] >= 1000:
            for what in (
                "preempted",
                "prefix_hit",
                "parked",
                "compiled",
                "held",
                "urgent",
                "prompt_scored",
                "a full queue",
                "ended by error",
                "ended by stop",
            ):
                assert seen[what] > seen["histories"] / 100, what


@given(seed=st.integers(0, 2**64 - 1), others=st.lists(prompts, max_size=6), budget=st.integers(1, 20))
@settings(deadline=None)
def test_the_same_seed_gives_the_same_tokens_in_any_company(seed, others, budget):
    engine = Engine(stub(), eos_token_ids=EOS, token_budget=budget)
    mine = request("mine", temperature=1.0, seed=seed, ignore_eos=True)
    for index, prompt in enumerate(others):
        engine.submit(request(f"other{index}", prompt, temperature=1.0))
    engine.submit(mine)
    assert summary(finish(engine)["mine"]) == alone(mine)


def test_unseeded_requests_differ():
    hot = [alone(request("r", temperature=3.0, ignore_eos=True, max_tokens=30))[0] for _ in range(3)]
    assert hot[0] != hot[1] or hot[1] != hot[2]


def test_an_almost_zero_temperature_is_greedy():
    cold = alone(request("r", temperature=1e-300, ignore_eos=True))
    assert cold == alone(request("r", ignore_eos=True))


class Scripted:
    """A model that says a fixed list of tokens, position by position."""

    vocab_size, max_length, blocks, block_size = 100, 64, 16, 4

    def __init__(self, script: dict[int, int]) -> None:
        self.script = script

    def forward(self, batch: Batch) -> list[int]:
        return [batch.positions[row] + 1 for row in batch.rows]

    def sample(self, logits: list[int], how: list[Sampling], positions: list[int]) -> Samples:
        assert positions == logits
        tokens = [self.script.get(position, 50) for position in positions]
        return Samples(tokens, {row: Sampled(token, -0.5, ((50, -0.5),)) for row, token in enumerate(tokens)})


@pytest.mark.parametrize(
    ("script", "params", "expected"),
    [
        ({5: 90}, {}, ([50, 50], "stop")),
        ({5: 91}, {}, ([50, 50], "stop")),
        ({5: 90}, {"ignore_eos": True, "max_tokens": 4}, ([50, 50, 90, 50], "length")),
        ({5: 60}, {"stop_token_ids": (60, 61)}, ([50, 50], "stop")),
        ({5: 60}, {"stop_token_ids": (60,), "ignore_eos": True}, ([50, 50], "stop")),
        ({5: 90, 4: 90}, {"ignore_eos": True, "stop_token_ids": (90,)}, ([50], "stop")),
        ({3: 90}, {}, ([], "stop")),
        ({}, {"max_tokens": 1}, ([50], "length")),
        ({4: 90}, {"max_tokens": 2}, ([50], "stop")),
        ({4: NO_TOKEN}, {}, ([50], "error")),
        ({4: NO_TOKEN}, {"max_tokens": 2}, ([50], "error")),
        ({3: NO_TOKEN}, {"max_tokens": 1}, ([], "error")),
    ],
)
def test_how_a_request_ends(script, params, expected):
    engine = Engine(Scripted(script), eos_token_ids=(90, 91))
    engine.submit(request("r", **params))
    assert summary(finish(engine)["r"]) == expected


def test_logprobs_reach_the_output():
    engine = Engine(Scripted({}))
    engine.submit(request("r", max_tokens=1, logprobs=1))
    [output] = engine.step().outputs()
    assert output.tokens[0].logprob == -0.5
    assert output.tokens[0].top == ((50, -0.5),)


def logprobs_of(prompt: list[int], count: int) -> list[Token]:
    """The prompt's tokens but the first as the stub model scores them, each by a forward of what is before it."""
    found = []
    for length in range(1, len(prompt)):
        batch = Batch(prompt[:length], range(length), (0, length), (length,), (range(16),), (length - 1,))
        model = stub()
        how = Sampling(logprobs=count, target=prompt[length])
        found.append(Token(*model.sample(model.forward(batch), [how], [length]).logprobs[0]))
    return found


@pytest.mark.parametrize("budget", [3, 7, 512])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_logprobs_of_prompts_are_told_once_and_before_the_answer(budget, max_tokens):
    """Several prompts at once, cut anywhere; beside others that want none, and answer as ever."""
    engine = Engine(stub(blocks=64), eos_token_ids=EOS, token_budget=budget)
    prompts = {"a": [*range(20)], "b": [5], "c": [*range(18), 1, 1], "d": [2, 9]}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, max_tokens, prompt_logprobs=2, ignore_eos=True))
    engine.submit(request("plain", range(24), 5, ignore_eos=True))
    outputs = finish(engine)
    for name, prompt in prompts.items():
        assert of_prompt(outputs[name]) == logprobs_of(prompt, 2), name
        tokens, end = summary(outputs[name])
        assert (len(tokens), end) == (max_tokens, "length")
    assert summary(outputs["plain"]) == alone(request("plain", range(24), 5, ignore_eos=True))
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks and stats.waiting_tokens == 0


def test_no_step_has_more_rows_of_prompts_than_memory_is_meant_for():
    model = stub(blocks=256, max_length=512)
    engine = Engine(model, token_budget=512)
    prompts = {str(n): [*range(n, 24)] * 10 for n in range(4)}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, 1, prompt_logprobs=0))
    outputs = finish(engine)
    assert {name: len(of_prompt(found)) + 1 for name, found in outputs.items()} == {
        n: len(p) for n, p in prompts.items()
    }
    rows = [len(batch.rows) for batch in model.batches]
    assert max(rows) <= MOST_SCORED + len(prompts) and sum(rows) == sum(map(len, prompts.values()))


@pytest.mark.parametrize(("logprobs", "steps"), [(-1, 4), (0, 32)])
def test_a_prompt_that_is_scored_takes_the_steps_that_its_rows_need(logprobs, steps):
    """Its bound is 2000 over 64, not over the half of the 257 tokens that generating leaves at least."""
    model = Scripted({})
    model.max_length, model.blocks = 2048, 512
    engine = Engine(model, token_budget=512, max_sequences=256)
    engine.submit(request("r", [1] * 2000, 0, prompt_logprobs=logprobs))
    finish(engine)
    assert engine.stats().steps == steps


def test_a_prompt_that_is_scored_is_not_found_cached_but_others_find_it():
    engine = Engine(stub(), token_budget=64)
    prompt = [*range(20)]
    expected = logprobs_of(prompt, 1)
    for name, logprobs, cached in (("first", -1, 0), ("scored", 1, 0), ("plain", -1, 16), ("again", 1, 16)):
        engine.submit(request(name, prompt, 1, prompt_logprobs=logprobs))
        outputs = finish(engine)[name]
        assert of_prompt(outputs) == (expected if logprobs >= 0 else [])
        assert engine.stats().cached_tokens == cached


def test_a_preempted_prompt_is_not_scored_twice():
    """Blocks are short, so whoever has the least to lose starts again, and tells nothing again."""
    model = stub(blocks=12, block_size=2)
    engine = Engine(model, token_budget=8, admission="optimistic")
    names = [f"r{n}" for n in range(6)]
    for n, name in enumerate(names):
        engine.submit(request(name, range(n, n + 9), 12, prompt_logprobs=1, ignore_eos=True))
    outputs = finish(engine)
    assert engine.stats().preemptions > 0
    for n, name in enumerate(names):
        assert of_prompt(outputs[name]) == logprobs_of([*range(n, n + 9)], 1)


def test_a_prompt_that_fills_the_cache_needs_no_room_for_an_answer_that_nobody_wants():
    for admission in ("reserve", "optimistic"):
        engine = Engine(stub(blocks=4), token_budget=8, admission=admission)
        engine.submit(request("r", range(16), 0, prompt_logprobs=0))
        outputs = finish(engine)["r"]
        assert len(of_prompt(outputs)) == 15 and outputs[-1].finish == "length"


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_broken_row_of_a_prompt_ends_its_request_alone(max_tokens):
    model = stub(nan_after=23)
    engine = Engine(model, eos_token_ids=EOS)
    good = request("good", (1, 2), ignore_eos=True, stop_token_ids=(23,), prompt_logprobs=0)
    engine.submit(good)
    engine.submit(request("bad", (1, 23, 2), max_tokens, prompt_logprobs=0))
    outputs = finish(engine)
    assert (outputs["bad"][-1].finish, outputs["bad"][-1].code) == ("error", "not_finite")
    assert summary(outputs["good"]) == alone(good)
    assert engine.stats().kv_blocks_free == model.blocks


def test_not_a_number_ends_only_the_request_it_belongs_to():
    model = stub(nan_after=23)
    engine = Engine(model, eos_token_ids=EOS)
    good = request("good", (1, 2), ignore_eos=True, stop_token_ids=(23,))
    engine.submit(good)
    engine.submit(request("bad", (1, 23)))
    outputs = finish(engine)
    assert outputs["bad"][-1].finish == "error"
    assert "finite" in outputs["bad"][-1].error
    assert summary(outputs["good"]) == alone(good)
    assert engine.stats().kv_blocks_free == model.blocks


def test_an_end_tells_the_token_that_made_it_and_its_logprob():
    (likeliest,) = pick(said_next([1, 2, 3], VOCAB), Sampling(logprobs=1), 3).top
    ends = []
    for params in ({"logprobs": 0}, {}, {"min_tokens": 1, "max_tokens": 1}):
        engine = Engine(stub())
        engine.submit(request("r", (1, 2, 3), stop_token_ids=(likeliest[0],), **params))
        ends.append(finish(engine)["r"][-1].ending)
    assert ends == [Token(*likeliest), Token(likeliest[0]), None]


def test_a_prompt_tells_once_how_much_of_it_was_cached():
    engine = Engine(stub(), eos_token_ids=EOS)
    found = {}
    for name, prompt in {"first": range(8), "same": range(8), "longer": range(10)}.items():
        engine.submit(request(name, prompt, max_tokens=3, ignore_eos=True))
        found[name] = [output.cached for output in finish(engine)[name]]
    assert found == {"first": [0, 0, 0], "same": [4, 0, 0], "longer": [8, 0, 0]}


@pytest.mark.parametrize("constraint", [None, Constraint("lark", "4")])
def test_options_that_leave_no_token_are_no_failure_of_the_model(constraint):
    """The prompt's blocks are sound; where the logits are not, it is the model's failure whatever the options say."""
    nothing = {"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1, "constraint": constraint}
    codes, cached = [], []
    for sick in (None, 22):
        engine = Engine(stub(nan_after=sick), eos_token_ids=EOS, grammars=lambda: StubGrammars(VOCAB, EOS))
        engine.submit(request("bad", (*range(1, 9), 22), **nothing))
        codes.append(finish(engine)["bad"][-1].code)
        engine.submit(request("again", (*range(1, 9), 21), 1))
        finish(engine)
        cached.append(engine.stats().cached_tokens)
    assert codes == ["constraint", "not_finite"] and cached == [8, 0]


def test_abort_frees_blocks_before_the_next_step():
    engine = Engine(stub(blocks=4), token_budget=8)
    for name in ("a", "b"):
        engine.submit(request(name, range(8), max_tokens=8, ignore_eos=True))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting, engine.stats().kv_blocks_free) == (1, 1, 0)
    engine.abort("a")
    assert engine.stats().kv_blocks_free == 4
    assert {output.request for output in engine.step().outputs()} == {"b"}
    engine.abort("a")
    engine.abort("never seen")
    assert engine.stats().running == 1


def test_counters():
    engine = Engine(stub(), token_budget=4)
    engine.submit(request("r", range(6), max_tokens=3, ignore_eos=True))
    finish(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (6, 3, 4)


def test_as_many_are_taken_as_may_run_and_wait():
    """Also before the first step, when all of them wait."""
    engine = Engine(stub(), max_sequences=2, max_waiting=1)
    for name in "abc":
        engine.submit(request(name, (1, 2), 2))
    assert engine.stats().waiting_tokens == 12
    with pytest.raises(RequestError, match="queue is full") as caught:
        engine.submit(request("d"))
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    engine.abort("b")
    engine.submit(request("d"))
    assert finish(engine).keys() == {*"acd"} and engine.stats().waiting_tokens == 0


def test_an_idle_engine_does_nothing():
    model = stub()
    engine = Engine(model)
    assert not engine.has_work()
    assert not [*engine.step().outputs()]
    assert model.batches == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (request("r", ()), "prompt"),
        (request("r", (1, VOCAB)), "prompt"),
        (request("r", (-1,)), "prompt"),
        (request("r", max_tokens=-1), "max_tokens"),
        (request("r", temperature=-0.1), "temperature"),
        (request("r", temperature=math.nan), "temperature"),
        (request("r", temperature=math.inf), "temperature"),
        (request("r", top_p=0.0), "top_p"),
        (request("r", top_p=1.01), "top_p"),
        (request("r", top_p=math.nan), "top_p"),
        (request("r", top_k=-1), "top_k"),
        (request("r", logprobs=-2), "logprobs"),
        (request("r", prompt_logprobs=-2), "prompt_logprobs"),
        (request("r", bad_words=((1,), ())), "bad_words"),
        (request("r", bad_words=((1, 2), (3, VOCAB))), "bad_words"),
        (request("r", bad_words=((1, 2),) * (MOST_BAD_TOKENS // 2) + ((1,),)), "bad_words"),
    ],
)
def test_malformed_requests_are_refused_naming_the_field(wrong, param):
    engine = Engine(stub())
    with pytest.raises(RequestError) as caught:
        engine.submit(wrong)
    assert caught.value.param == param
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("blocks", "prompt", "max_tokens", "words", "param", "code"),
    [
        (16, 60, 5, "60 prompt tokens + 5 max_tokens = 65 tokens, but the context is 64", "max_tokens", "context_"),
        (16, 70, 1, "70 prompt tokens + 1 max_tokens = 71 tokens", "prompt", "context_"),
        (4, 10, 7, "10 prompt tokens + 7 max_tokens = 17 tokens = 5 blocks of 4, but the cache has 4", "max_", "kv_"),
    ],
)
def test_what_can_never_run_is_refused_with_the_arithmetic(blocks, prompt, max_tokens, words, param, code):
    engine = Engine(stub(blocks=blocks))
    with pytest.raises(RequestError) as caught:
        engine.submit(request("r", [1] * prompt, max_tokens))
    assert words in caught.value.why
    assert caught.value.param.startswith(param)
    assert caught.value.code.startswith(code)


@pytest.mark.parametrize("settings", [{"blocks": 4}, {"max_length": 16}], ids=["cache", "context"])
def test_a_request_that_exactly_fits_runs(settings):
    engine = Engine(stub(**settings))
    engine.submit(request("r", [1] * 10, 6, ignore_eos=True))
    assert len(summary(finish(engine)["r"])[0]) == 6


def test_a_live_id_cannot_be_taken_twice_but_a_finished_one_can():
    engine = Engine(stub())
    engine.submit(request("r"))
    with pytest.raises(RequestError, match="still running"):
        engine.submit(request("r"))
    finish(engine)
    engine.submit(request("r"))
    assert finish(engine)["r"]


def test_what_ended_is_not_kept_until_its_deadline():
    """An id may even be taken again at the same moment."""
    engine = Engine(stub(), clock=Clock())
    for _ in range(500):
        engine.submit(msgspec.structs.replace(request("r"), timeout=3600.0))
        engine.abort("r")
    assert len(engine._deadlines) < 100


class Instant:
    """A model that costs nothing, so that what is measured is the engine."""

    vocab_size, max_length, blocks, block_size = 1000, 4096, 100_000, 16

    def forward(self, batch: Batch) -> int:
        return len(batch.rows)

    def sample(self, logits: int, how: list[Sampling], positions: list[int]) -> Samples:
        return Samples([5] * logits, {})


def test_a_step_costs_microseconds():
    """Scheduling is linear with a small constant: far below a forward's time, even on a busy machine."""
    engine = Engine(Instant(), token_budget=512, max_sequences=64)
    for index in range(64):
        engine.submit(request(str(index), [1] * 4, max_tokens=300))
    engine.step()
    began = time.process_time()
    for _ in range(200):
        engine.step()
    assert (time.process_time() - began) / 200 < 0.002


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_a_row_without_a_token_at_the_last_step_ends_once(max_tokens):
    """It has neither its last token nor another end than the error."""
    model = Scripted({2 + max_tokens: -1})
    engine = Engine(model)
    engine.submit(request("r", max_tokens=max_tokens))
    outputs = finish(engine)["r"]
    assert outputs[-1].code == "not_finite"
    assert len([token for output in outputs for token in output.tokens]) == max_tokens - 1


def test_constraints_that_are_compiled_count_as_waiting_and_end_by_their_deadlines():
    clock, grammars = Clock(), StubGrammars(VOCAB, EOS)
    engine = Engine(stub(), max_sequences=1, max_waiting=2, grammars=lambda: grammars, clock=clock)
    for name in "abc":
        made = request(name, constraint=Constraint("lark", "2"))
        engine.submit(msgspec.structs.replace(made, timeout=1.0))
    assert engine.stats().waiting == 3 and engine.stats().waiting_tokens == 33
    with pytest.raises(RequestError) as refused:
        engine.submit(request("d"))
    assert refused.value.status == 429
    clock.now = 1.0
    assert {output.code for output in engine.step().outputs()} == {"deadline_exceeded"}
    assert not grammars.matchers
    nothing_is_left(engine)


def test_who_is_held_gives_up_its_blocks_as_anybody_does():
    """And goes on as if nothing had happened; its mask may come before it is computed again, or after."""
    preempted = Counter[bool]()
    for seed in range(20):
        draw = random.Random(seed)
        grammars = StubGrammars(VOCAB, EOS, lateness("often", draw))
        engine = Engine(
            stub(blocks=9, block_size=3), eos_token_ids=EOS, admission="optimistic", grammars=lambda made=grammars: made
        )
        preempt = engine._scheduler._preempt

        def counted(victim: Sequence, engine: Engine = engine, preempt: Callable = preempt) -> None:
            preempted[victim in engine._scheduler.held] += 1
            preempt(victim)

        engine._scheduler._preempt = counted
        asked = [
            request(f"r{index}", range(index, index + 4), 12, constraint=Constraint("lark", "20"), ignore_eos=True)
            if index % 2
            else request(f"r{index}", range(index, index + 4), 12, ignore_eos=True)
            for index in range(6)
        ]
        for one in asked:
            engine.submit(one)
        outputs = finish(engine)
        for one in asked:
            assert summary(outputs[one.id]) == ([token.id for token in said(one)[0]], said(one)[1])
        nothing_is_left(engine)
    assert preempted[True] > 5 and preempted[False] > 5


def test_an_answer_whose_mask_is_late_runs_on_without_forwards_until_it_has_come():
    model, grammars = stub(), StubGrammars(VOCAB, EOS, lambda: 4)
    engine = Engine(model, eos_token_ids=EOS, grammars=lambda: grammars)
    asked = request("late", max_tokens=3, constraint=Constraint("lark", "20"), ignore_eos=True)
    engine.submit(asked)
    outputs = []
    while not outputs:
        outputs += engine.step().outputs()
    assert engine.has_work() and engine.awaited() is None
    assert not [*engine.step().outputs()] and len(model.batches) == 2, "its mask did not come in time"
    for _ in range(4):
        assert not engine.has_work() and engine.awaited() is not None and engine.stats().running == 1
        outputs += engine.step().outputs()
    assert len(model.batches) == 3 and len(outputs) == 2
    engine.submit(request("other", max_tokens=4, ignore_eos=True))
    others = [output.request for _ in range(3) for output in engine.step().outputs()]
    assert others == ["other"] * 3
    outputs += finish(engine)["late"]
    assert summary(outputs) == alone(asked)
