"""The arithmetic behind ``make peers``: rates, shares, ratios and verdicts, on numbers that can be checked by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
import report_peers
from engines.contest import Failed, steady_rate
from measures import speed, startup
from measures.machine import Limits
from measures.models import Model
from measures.speed import Job
from measures.verdict import verdict

from fgsnap.bench.client import Timeline
from fgsnap.bench.workload import Work

WORK = Work([1], 1, 4)


def answered(*chunks, tokens=None):
    return Timeline(WORK, 0.0, chunks, chunks[-1], 1, tokens or len(chunks))


def test_a_rate_counts_what_came_while_all_answers_were_being_written():
    first, second = answered(1.0, 2.0, 3.0, 4.0), answered(2.0, 2.5, 3.0, 3.5)
    assert steady_rate([first, second]) == pytest.approx((1 + 3) / 1.5)  # from 2.0 to 3.5


def test_a_chunk_of_several_tokens_counts_as_its_share():
    assert steady_rate([answered(0.0, 1.0, 2.0, tokens=6)]) == pytest.approx(4 / 2.0)


def test_answers_that_were_never_written_at_once_have_no_rate():
    with pytest.raises(Failed, match="never all"):
        steady_rate([answered(0.0, 1.0), answered(2.0, 3.0)])


def test_ratios_are_of_the_rounds_that_both_took_part_in():
    rates = {"fgsnap": {"decode_1": [100.0, 90.0, 60.0]}, "vLLM": {"decode_1": [50.0, None, 20.0]}}
    assert speed.ratios(rates, "fgsnap", "vLLM")["decode_1"] == {"median": 2.5, "min": 2.0, "max": 3.0, "runs": 2}
    assert speed.ratios(rates, "fgsnap", "absent") == {}
    times = {"fgsnap": [0.2, 0.25], "vLLM": [40.0, None]}
    assert startup.ratios(times, "vLLM")["median"] == 200.0


def a_model(folder):
    """Two layers' worth of one matrix each, an embedding that is also the head, and a norm."""
    shapes = {"embed": [10, 4], "a": [4, 6], "b": [6, 4], "norm": [4]}
    end, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(end))
    config = {"vocab_size": 10, "hidden_size": 4, "num_attention_heads": 2, "head_dim": 3, "num_hidden_layers": 2}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    return Model("tiny", folder)


def test_the_work_of_a_prompt_and_the_bytes_of_a_token(tmp_path):
    model = a_model(tmp_path)
    assert model.weight_bytes == 2 * (40 + 24 + 24 + 4)
    layers, head, attention = 5 * (24 + 24), 40, 2 * 2 * 3 * (1 + 2 + 3 + 4 + 5) * 2
    assert model.prefill_operations(5) == 2 * (layers + head + attention)


def test_shares_are_of_the_limits_measured_beside_it(tmp_path):
    model = a_model(tmp_path)
    host = {"decode_1": [Limits(1840.0, 1000.0, "x"), Limits(18400.0, 1000.0, "x")]}
    rates = {"fgsnap": {"decode_1": [5.0, 50.0], "decode_8": [9.0, 9.0]}}
    shares = speed._shares(model, [Job(1, 9), Job(8, 9)], rates, host)
    assert shares == {"fgsnap": {"decode_1": {"median": 0.5, "min": 0.5, "max": 0.5, "runs": 2}}}


def rows_of(**parts):
    return {row["name"]: row for row in verdict(parts)}


def test_a_promise_is_met_from_its_goal_on():
    rates = {
        "fgsnap": {"decode_1": [105.0], "decode_8": [149.0]},
        "llama.cpp": {"decode_1": [100.0], "decode_8": [100.0]},
    }
    shares = {"fgsnap": {"decode_1": {"median": 0.87, "min": 0.8, "max": 0.9}}}
    rows = rows_of(speed={"rates": rates, "shares": shares})
    assert rows["decode_1: rate / that of llama.cpp"]["met"]
    assert not rows["decode_8: rate / that of llama.cpp"]["met"]
    assert not rows["decode_1: share of the memory bandwidth"]["met"]


def test_start_up_is_held_against_the_faster_of_a_peers_ways():
    times = {"fgsnap": [0.2, 0.2], "llama.cpp": [0.5, 0.5], "llama.cpp, read": [0.1, 0.1], "vLLM": [40.0, None]}
    seconds = {name: {"median": of[0], "min": of[0], "max": of[0]} for name, of in times.items()}
    rows = rows_of(startup={"seconds": seconds, "times": times})
    assert rows["start-up: seconds"]["met"]
    beside = rows["start-up: seconds / those of llama.cpp"]
    assert beside["value"] == 2.0 and not beside["met"]
    assert rows["start-up: seconds of vLLM / fgsnap's"]["value"] == 200.0


def curve_of(**rates):
    curves = {name: [{"effective": [{"requests_per_second": r} for r in row]}] for name, row in rates.items()}
    return {
        "prompt": 9,
        "answer": 3,
        "curves": {name.replace("llama", "llama.cpp"): row for name, row in curves.items()},
    }


def test_a_peer_that_keeps_no_answer_within_the_sla_still_has_its_row():
    rows = rows_of(curve=curve_of(fgsnap=[9.0, 3.0, 0.0], llama=[9.0, 2.0, 0.0], vLLM=[9.0, 0.0, 0.0]))
    assert rows["effective throughput, 9/3: / that of llama.cpp"]["value"] == 1.5
    alone = rows["effective throughput, 9/3: / that of vLLM"]
    assert alone["value"] is None and alone["met"]
    nobody = rows_of(curve=curve_of(fgsnap=[0.0] * 3, llama=[0.0] * 3, vLLM=[0.0] * 3))
    assert not any(row["met"] for row in nobody.values())


def test_the_table_says_what_is_not_met():
    rates = {"fgsnap": {"decode_1": [90.0]}, "llama.cpp": {"decode_1": [100.0]}}
    shares = {"fgsnap": {"decode_1": {"median": 0.95, "min": 0.9, "max": 0.97}}}
    found = report_peers.promises(verdict({"speed": {"rates": rates, "shares": shares}}))
    assert "| decode_1: rate / that of llama.cpp | 0.9 (0.9 to 0.9) | at least 1.05 | **no** |" in found
    assert "| decode_1: share of the memory bandwidth | 0.95 (0.9 to 0.97) | at least 0.88 | yes |" in found


def test_what_nobody_has_measured_is_said():
    said = report_peers.absent({name: {} for name in report_peers.PARTS if name not in ("large", "curve-500-500")})
    assert said == "\nNot measured, though promises were made: the larger model, the load curve 500/500.\n"
    assert report_peers.absent({part: {} for part in peers.PARTS}) == ""
    assert report_peers.PARTS.keys() == peers.PARTS.keys()
