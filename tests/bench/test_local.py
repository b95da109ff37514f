"""The engine measured in this process: what a run counts, and the rates that are made of it."""

from __future__ import annotations

import pytest

from fgsnap.bench import local
from fgsnap.bench.local import Run, Step, decode_rate, prefill_rate, run
from fgsnap.errors import FgsnapError
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from tests.doubles import StubModel
from tests.serving import servable_snapshot


def engine(model=None, *, budget=16, sequences=4) -> Engine:
    return Engine(model or StubModel(blocks=256), token_budget=budget, max_sequences=sequences)


def test_a_run_counts_every_token_once():
    done = run(engine(sequences=2), [(1, 2, 3, 4, 5, 6, 7)] * 3, 5)
    assert isinstance(done, Run)
    assert sum(step.read for step in done.steps) == 21
    assert sum(step.written for step in done.steps) == 15
    assert len(done.first_tokens) == 3 and len(done.gaps) == 12
    assert all(step.seconds >= 0 for step in done.steps)
    assert max(done.first_tokens) <= sum(step.seconds for step in done.steps)
    assert max(step.written for step in done.steps) == 2


def test_a_large_batch_has_room_in_a_budget_that_was_left_out(tmp_path):
    snapshot = servable_snapshot(tmp_path / "snap")
    options = EngineOptions(device="cpu", kv_memory=16 << 20, threads=1)
    found = local.latency(snapshot, options, local.Shape(1, 2), batch=200, rounds=1, tell=lambda line: None)
    assert found["max_batch_tokens"] == 400


def test_an_engine_runs_again_and_counts_anew():
    again = engine()
    for _ in range(2):
        assert sum(step.read for step in run(again, [(1, 2, 3)], 2).steps) == 3


def test_an_eos_token_does_not_end_an_answer():
    everything = Engine(StubModel(), eos_token_ids=range(258), token_budget=16)
    assert sum(step.written for step in run(everything, [(1, 2)], 6).steps) == 6


def test_a_model_that_fails_is_an_error():
    with pytest.raises(FgsnapError, match="failed on a random prompt"):
        run(engine(StubModel(nan_after=9)), [(1, 9)], 4)


STEPS = [
    Step(2.0, read=512, written=0),
    Step(2.0, read=511, written=1),
    Step(0.3, read=0, written=2),
    Step(0.1, read=0, written=2),
    Step(0.1, read=0, written=1),
]


def test_rates_come_from_the_steps_that_do_nothing_else():
    assert prefill_rate(STEPS) == pytest.approx(1023 / 4)
    assert decode_rate(STEPS, 2) == pytest.approx(4 / 0.4)
    assert decode_rate(STEPS, 1) == pytest.approx(1 / 0.1)


def test_a_batch_that_was_never_full_has_no_decode_rate():
    assert decode_rate(STEPS, 8) is None
