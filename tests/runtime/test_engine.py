"""The engine against a model that notices a wrong block: same tokens whatever else runs, and nothing left behind."""

from __future__ import annotations

import math
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Sampled, Samples, Sampling
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Constraint, Output, Request, SamplingParams
from tests.doubles import StubGrammars, StubModel

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


def request(name: str, prompt=(1, 2, 3), max_tokens: int = 8, **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | params)))


params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.sampled_from([(), (5,), (5, 6)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([-1, 0, 2]),
    min_tokens=st.sampled_from([0, 0, 1]),
    constraint=st.sampled_from([None, None, None, "1", "4", "6", "20", "0 unfit", "3 breaks"]).map(
        lambda text: text and Constraint("lark", text)
    ),
)
# Many begin alike, and some are equal.
prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    st.builds(lambda same, own: [*range(same), *own], st.integers(1, 20), st.lists(st.integers(0, 2), max_size=10)),
)
LONGEST = 44  # tokens of a prompt and its answer


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class EngineLife(RuleBasedStateMachine):
    """Random arrivals, aborts, deadlines and steps over a cache that holds only two or three sequences."""

    @initialize(
        budget=st.integers(1, 16),
        data=st.data(),
        block_size=st.integers(1, 6),
        admission=st.sampled_from(["reserve", "optimistic"]),
        caching=st.booleans(),
    )
    def start(self, budget, data, block_size, admission, caching):
        self.model = stub(blocks=-(-LONGEST // block_size) + data.draw(st.integers(0, 10)), block_size=block_size)
        self.budget, self.clock, self.most = budget, Clock(), data.draw(st.integers(1, 20))
        self.grammars = StubGrammars(VOCAB, EOS)
        self.engine = Engine(
            self.model, eos_token_ids=EOS, token_budget=budget, max_sequences=self.most, admission=admission,
            prefix_caching=caching, clock=self.clock, grammars=lambda: self.grammars,
        )  # fmt: skip
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=prompts,
        params=params,
        copies=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("ab"),
        timeout=st.sampled_from([None, None, None, 3.0]),
        salt=st.sampled_from(["", "", "x"]),
    )
    def submit(self, prompt, params, copies, priority, tenant, timeout, salt):
        for _ in range(copies):
            name = f"r{len(self.requests)}"
            self.requests[name] = Request(name, tuple(prompt), params, priority, tenant, timeout, salt)
            self.engine.submit(self.requests[name])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.abort(name)
        if not self.done(name):
            self.aborted.add(name)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            before = len(self.model.batches)
            self.hear(self.engine.step().outputs())
            assert len(self.model.batches) - before <= 1

    @rule()
    def wait(self):
        self.clock.now += 2

    def hear(self, outputs):
        for output in outputs:
            assert output.request not in self.aborted, "an aborted request spoke"
            assert not self.done(output.request), "a finished request spoke"
            self.outputs.setdefault(output.request, []).append(output)

    def done(self, name):
        return name in self.outputs and self.outputs[name][-1].finish is not None

    @invariant()
    def never_over_budget(self):
        if hasattr(self, "model"):
            assert all(len(batch.tokens) <= self.budget for batch in self.model.batches[-5:])

    @invariant()
    def the_gauges_are_true(self):
        if hasattr(self, "model"):
            stats = self.engine.stats()
            live = [name for name in self.requests if name not in self.aborted and not self.done(name)]
            assert stats.running + stats.waiting == len(live)
            constrained = [name for name in live if self.requests[name].params.constraint]
            assert (self.engine.has_work() or self.engine.awaited() is not None) == bool(live)
            assert len(self.grammars.matchers) == len(constrained)
            assert live or stats.kv_blocks_free == stats.kv_blocks, "blocks leaked"
            assert stats.running <= self.most

    def teardown(self):
        if not hasattr(self, "model"):
            return
        left = [name for name in self.requests if name not in self.aborted and not self.done(name)]
        for _ in range(3 + bound(self.budget, self.most, [self.requests[name] for name in left], self.engine)):
            self.hear(self.engine.step().outputs())
        assert not self.engine.has_work(), "the engine makes no progress"
        for name, original in self.requests.items():
            if name not in self.aborted:
                self.compare(self.outputs[name], alone(msgspec.structs.replace(original, timeout=None)))
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, stats.kv_blocks)
        pool = self.engine._pool
        assert sorted([*pool._free, *pool._idle]) == list(range(self.model.blocks))
        assert not pool._promised and not any(pool._users) and len(pool._found) == len(pool._idle)
        assert not self.engine._scheduler._computing and not self.engine._scheduler._parked

    def compare(self, outputs, expected):
        tokens, finish = summary(outputs)
        if outputs[-1].code == "deadline_exceeded":
            assert tokens == expected[0][: len(tokens)] and finish == "error"
        else:
            assert (tokens, finish) == expected, "differs from running alone"


def bound(budget: int, most: int, requests: list[Request], engine: Engine) -> int:
    """Steps in which all of these end, though nothing but the first of them were computed in any step.

    With preemption, what is computed may be lost once for every token that somebody in front of it gets.
    """
    tokens = sum(len(request.prompt) + request.params.max_tokens for request in requests)
    return tokens * (1 + len(requests) * (engine._scheduler._optimistic)) + 1


EngineLife.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_life_of_the_engine = EngineLife.TestCase


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
        (request("r", max_tokens=0), "max_tokens"),
        (request("r", temperature=-0.1), "temperature"),
        (request("r", temperature=math.nan), "temperature"),
        (request("r", temperature=math.inf), "temperature"),
        (request("r", top_p=0.0), "top_p"),
        (request("r", top_p=1.01), "top_p"),
        (request("r", top_p=math.nan), "top_p"),
        (request("r", top_k=-1), "top_k"),
        (request("r", logprobs=-2), "logprobs"),
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
