"""The SLA and the effective throughput, on timelines made by hand."""

from __future__ import annotations

import pytest

from fgsnap.bench.client import Timeline
from fgsnap.bench.load import Level, row
from fgsnap.bench.sla import Sla, met, moving_averages
from fgsnap.bench.workload import Work

SLA = Sla(prompt_rate=512, generation_rate=4)


def test_the_moving_average_weighs_all_gaps_so_far():
    gaps = [0.5, 0.1, 0.3, 0.2, 0.9]
    kept = 1 - 2 / 17
    for end, found in enumerate(moving_averages(gaps), start=1):
        weights = [kept ** (end - 1 - i) for i in range(end)]
        expected = sum(w * gap for w, gap in zip(weights, gaps, strict=False)) / sum(weights)
        assert found == pytest.approx(expected)
    assert list(moving_averages([0.2] * 40)) == pytest.approx([0.2] * 40)
    assert list(moving_averages([])) == []


@pytest.mark.parametrize(
    ("prompt", "first", "gaps", "kept"),
    [
        (1024, 2.0, [0.1] * 50, True),  # exactly at the limit of the prompt
        (1024, 2.001, [0.1] * 50, False),
        (1024, 1.0, [], True),  # an answer of one token
        (1024, 1.0, [0.24] * 50, True),
        (1024, 1.0, [0.25] * 50, False),  # at the limit of the generation is too slow
        (1024, 1.0, [0.1] * 20 + [1.0] + [0.1] * 20, True),  # one pause that the average forgives
        (1024, 1.0, [0.1] * 20 + [2.0] + [0.1] * 20, False),  # and one that it does not
        (1024, 1.0, [0.3] + [0.1] * 40, False),  # a first gap has no past to be averaged with
    ],
)
def test_an_answer_keeps_to_the_sla_or_not(prompt, first, gaps, kept):
    assert met(SLA, prompt, first, gaps) is kept


def answer(began, first, gaps, *, prompt=512, tokens=None, failure=""):
    chunks = [began + first]
    for gap in gaps:
        chunks.append(chunks[-1] + gap)
    count = len(chunks) if tokens is None else tokens
    return Timeline(Work([1] * prompt, prompt, len(chunks)), began, tuple(chunks), chunks[-1], prompt, count, failure)


def test_a_level_counts_failures_and_takes_its_times_from_whole_answers():
    level = Level(
        2,
        [
            answer(100.0, 0.5, [0.1] * 5),  # in time: 1.0 s
            answer(100.0, 0.5, [0.5] * 3),  # too slow between tokens: 2.0 s
            answer(101.0, 1.5, [0.1] * 15),  # its first token comes too late: 3.0 s
            answer(102.0, 0.2, [], failure="HTTP 500: no luck"),
            answer(103.0, 0.2, [0.1] * 8, tokens=4),  # in time; 1.0 s
        ],
        cpu_seconds=0.4,
    )
    found = row(level, [SLA, Sla(512, 1)])
    assert (found["requests"], found["answered"], found["failed"]) == (5, 4, 1)
    assert found["failures"] == {"HTTP 500: no luck": 1}
    assert found["ended_early"] == 1
    assert found["seconds"] == 4.0  # from the first request to the last answer
    assert found["requests_per_second"] == 1.0
    assert found["answer_tokens_per_second"] == pytest.approx((6 + 4 + 16 + 4) / 4)
    assert found["latency"] == {"mean": 1.75, "p50": 1.5, "p95": 2.85, "max": 3.0, "count": 4}
    assert found["first_token"]["max"] == 1.5 and found["first_token"]["count"] == 4
    assert found["between_tokens"]["count"] == 5 + 3 + 15 + 8
    strict, mild = found["effective"]
    assert strict == {"prompt_rate": 512, "generation_rate": 4, "share": 0.4, "requests_per_second": 0.5}
    assert mild["share"] == 0.6 and mild["requests_per_second"] == 0.75
    assert found["client_cpu"] == 0.1


def test_a_level_without_an_answer_has_no_times():
    found = row(Level(1, [answer(0.0, 2.0, [], failure="no whole answer within 2 s")], 0.0), [SLA])
    assert found["requests_per_second"] == 0 and found["failed"] == 1
    assert found["latency"] is None and found["first_token"] is None
    assert found["effective"][0]["share"] == 0
