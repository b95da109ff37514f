"""The benchmarks of the scheduler: other policies give the same tokens, and FastGen's rules do what they do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import check_scheduler
import splitfuse
import starvation
from fastgen import Dead, FastGen
from report_scheduling import scheduler as scheduler_section
from report_scheduling import splitfuse as splitfuse_section

from fgsnap.runtime.engine import Engine
from fgsnap.runtime.scheduler import Scheduler
from tests.doubles import StubModel

# ---------------------------------------------------------------------------------------------------- policies


def answers(policy: type[Scheduler], budget: int = 12) -> tuple[dict[str, list[int]], StubModel]:
    """The tokens of three requests that come at once, and of one that comes when these generate."""
    model = StubModel(blocks=256)
    engine = Engine(model, prefix_caching=False)
    engine._scheduler = policy(engine._pool, budget, 8)
    engine._roster = engine._scheduler.roster
    found: dict[str, list[int]] = {}
    for index, length in enumerate((5, 30, 9)):
        engine.submit(small(str(index), length, 10))
    steps = 0
    while engine.has_work():
        for output in engine.step().outputs():
            found.setdefault(output.request, []).extend(token.id for token in output.tokens)
        steps += 1
        if steps == 6:
            engine.submit(small("late", 40, 3))
    return found, model


def small(name: str, length: int, answer: int):
    wanted = splitfuse.request(name, length, answer, 0)
    return type(wanted)(wanted.id, tuple(token % 256 for token in wanted.prompt), wanted.params)


def test_every_policy_gives_the_same_tokens():
    expected, _ = answers(Scheduler)
    assert {name: len(tokens) for name, tokens in expected.items()} == {"0": 10, "1": 10, "2": 10, "late": 3}
    for policy in (splitfuse.PrefillFirst, splitfuse.NoChunking):
        assert answers(policy)[0] == expected


def shapes(policy: type[Scheduler]) -> list[list[int]]:
    """The lengths of the sequences in each forward."""
    _, model = answers(policy)
    return [[end - begin for begin, end in zip(b.starts, b.starts[1:], strict=False)] for b in model.batches]


def test_prefill_first_forwards_whole_prompts_alone():
    found = shapes(splitfuse.PrefillFirst)
    assert found[0] == [5, 30, 9] and [40] in found
    assert all(set(step) == {1} for step in found if step not in ([5, 30, 9], [40]))


def test_no_chunking_forwards_whole_prompts_beside_the_decodes():
    found = shapes(splitfuse.NoChunking)
    assert found[:3] == [[5], [1, 30], [1, 1, 9]] and [1, 1, 1, 40] in found


def test_splitfuse_fills_its_forwards():
    assert [sum(step) for step in shapes(Scheduler)][:3] == [12, 12, 12]


def test_a_histogram_counts_every_forward():
    bins = splitfuse.histogram([1, 2, 3, 96, 96, 512])
    assert sum(count for _, count in bins) == 6 and dict(bins)[128] == 0 + 2
    assert bins[-1] == (512, 1)


# ----------------------------------------------------------------------------------------------------- fastgen


def fastgen(blocks: int = 8, budget: int = 16, *, flush_at_once: bool = True) -> FastGen:
    return FastGen(blocks, 4, budget, 8, flush_at_once=flush_at_once)


def test_fastgen_answers_what_fits():
    engine = fastgen(blocks=64)
    for name in range(5):
        engine.submit(name, 10, 6)
    for _ in range(40):
        engine.step()
    assert sorted(engine.finished) == [0, 1, 2, 3, 4]
    assert engine.free == 64 and engine.evictions == 0 and engine.answered == 30
    assert engine.forwarded == 5 * (10 + 5)


def test_fastgen_evicts_who_came_last_and_keeps_its_tokens():
    engine = fastgen()
    for name in range(2):
        engine.submit(name, 12, 12)
    for _ in range(60):
        engine.step()
    assert engine.finished == [0, 1] and engine.evictions == 1
    assert engine.answered == 24 and engine.free == 8


def test_fastgen_never_reads_the_end_of_a_prompt_in_the_last_block():
    engine = fastgen(budget=15)  # two forwards of 15 tokens take all 8 blocks, and one token is left
    engine.submit(0, 31, 1)
    for _ in range(300):
        engine.step()
    assert engine.finished == [] and engine.evictions > 50


def test_fastgen_dies_of_a_request_that_outgrows_the_cache():
    engine = fastgen()
    engine.submit(0, 16, 30)
    with pytest.raises(Dead):
        for _ in range(100):
            engine.step()


def test_fastgen_dies_when_blocks_come_back_a_step_too_late():
    for flush_at_once, dies in ((True, False), (False, True)):
        engine = fastgen(flush_at_once=flush_at_once)
        engine.submit(0, 12, 2)
        engine.submit(1, 30, 1)
        try:
            for _ in range(20):
                engine.step()
        except Dead:
            assert dies
        else:
            assert not dies and engine.finished == [0, 1]


def test_the_committed_story_is_told_again():
    committed = json.loads((Path(starvation.__file__).parent / "results" / "starvation.json").read_text())
    crowd = starvation.workload(starvation.REQUESTS)
    told = json.loads(json.dumps(starvation.row(crowd)))
    assert told == committed["workloads"]["crowd"]
    for workload in committed["workloads"].values():
        for name, story in workload["stories"].items():
            if name.startswith("fgsnap"):
                assert story["end"] == "finished"
                assert story["steps"] <= workload["bounds"][name.split()[-1]]
                assert story["longest_prompt_of_its_bound"] <= 1


# ------------------------------------------------------------------------------------------------------- report


def test_the_check_knows_both_limits(tmp_path):
    path = tmp_path / "scheduler.json"
    assert check_scheduler.limit_of_committed(path) == {}
    path.write_text('{"us_per_sequence_2048": 0.1}')
    assert check_scheduler.limit_of_committed(path) == {"twice the committed result": 0.2}


def some(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value, "runs": 1}


def test_the_sections_take_what_the_benchmarks_write():
    row = {
        "kind": "decoding", "sequences": 2048, "schedule_us": some(60.0), "plan_us": some(60.0),
        "commit_us": some(65.0), "us_per_sequence": some(0.061), "sample_us_per_sequence": None,
        "detokenise_us_per_sequence": some(1.5),
    }  # fmt: skip
    peers = [{"engine": "nano-vllm", "sequences": 2048, "us_per_sequence": some(0.55)}]
    result = {
        "us_per_sequence_2048": 0.061, "goals": {"us_per_sequence_2048": 0.5}, "loops": peers,
        "rows": [row, {**row, "kind": "mixed"}],
        "ratios_2048": {"of_nano_vllm": some(0.11)},
    }  # fmt: skip
    text = scheduler_section(result)
    assert "| decoding | 2,048 | 60.0 " in text and "fgsnap's over nano-vllm's at 2048: 0.110" in text
    assert "loops" not in scheduler_section({**result, "loops": []})
    runs = [splitfuse.Round(1.0, 500, [96, 96, 40], [0.1, 0.1, 0.05], [0.1, 0.1, 0.05], 2)]
    said = {
        "model": "m", "knee": 96, "goal": 1.5, "prefill_first_tokens": 2048,
        "workload": {"decodes": 8, "clients": 16, "answer": 8, "shortest": 64, "longest": 1536, "requests": 48},
        "contestants": {"SplitFuse, 96 tokens": splitfuse.row(runs)},
    }  # fmt: skip
    assert "| SplitFuse, 96 tokens | 96 / 96 | 100 " in splitfuse_section(said)
