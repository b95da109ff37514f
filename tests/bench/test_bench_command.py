"""``fgsnap bench`` from the command line: real servers, results, pictures, errors and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fgsnap.bench.plot import draw
from fgsnap.bench.record import distribution, quantile, summary
from fgsnap.bench.server import serving
from fgsnap.errors import FgsnapError
from fgsnap.runtime.options import EngineOptions
from tests.bench.test_client import answering, chunked, closed_port, text, whole
from tests.serving import real_service, servable_snapshot, until

SMALL = ("--kv-memory", "16MiB", "--threads", "1", "--backend", "reference")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return servable_snapshot(tmp_path_factory.mktemp("bench") / "snap")


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fgsnap", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def result_of(done) -> dict:
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema_version"] == 1 and result["date"]
    assert result["machine"]["cpu"] and result["machine"]["versions"]["fgsnap"]
    return result


# ------------------------------------------------------------------------------------------------------- results


def test_start_up_is_accounted_for(snapshot, tmp_path):
    done = bench("startup", snapshot, "--rounds", 2, *SMALL, "--json", "--progress", "-o", tmp_path / "result.json")
    result = result_of(done)
    assert result["backend"] == "reference" and result["canary"].startswith("canary ok")
    assert result["seconds"]["runs"] == 2 and result["seconds"]["min"] <= result["wall"] <= result["seconds"]["max"]
    assert {"interpreter", "map and bind", "canary", "first token"} <= set(result["phases"])
    assert result["phase_seconds"]["canary"]["runs"] == 2
    assert abs(sum(result["phases"].values()) - result["wall"]) < 0.1 * result["wall"]
    assert "start 2 of 2" in done.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_the_engine_is_measured_at_one_batch_size(snapshot):
    lengths = ("--prompt-tokens", 40, "--max-tokens", 8)
    result = result_of(bench("latency", snapshot, *lengths, "--batch", 2, "--rounds", 3, *SMALL, "--json"))
    assert (result["prompt"], result["answer"], result["batch"], result["backend"]) == (40, 8, 2, "reference")
    names = ("first_token", "between_tokens_p50", "between_tokens_p95")
    assert all(result[name]["runs"] == 3 and result[name]["min"] > 0 for name in names)
    assert all(result[f"{phase}_tokens_per_second"]["median"] > 0 for phase in ("prefill", "decode"))


def test_the_engine_is_measured_at_several_batch_sizes(snapshot):
    lengths = ("--prompt-tokens", 30, "--max-tokens", 6)
    result = result_of(bench("throughput", snapshot, *lengths, "--batch", "1,4", "--rounds", 1, *SMALL, "--json"))
    assert [(row["batch"], row["requests"]) for row in result["batches"]] == [(1, 2), (4, 8)]
    assert all(row["decode_tokens_per_second"]["median"] > 0 for row in result["batches"])


def test_an_endpoint_is_measured_under_load(snapshot, tmp_path):
    with real_service(snapshot, *SMALL) as service:
        result = result_of(
            bench(
                "serve", "--url", f"{service.url}/v1", "--tokenizer", snapshot / "tokenizer.json", "--clients", "1,3",
                "--requests", 2, "--prompt-tokens", 200, "--max-tokens", 10, "--seed", 5, "--json",
                "-o", tmp_path / "result.json", "--plot", tmp_path / "curve.png",
            )
        )  # fmt: skip
    assert result["model"] == "tests/random"
    assert result["workload"]["context"] == 256  # as the endpoint said
    assert [(row["clients"], row["requests"]) for row in result["levels"]] == [(1, 2), (3, 6)]
    for row in result["levels"]:
        assert (row["failed"], row["ended_early"], row["failures"]) == (0, 0, {})
        assert row["prompt_tokens"]["max"] + 1 < 256 and row["answer_tokens"]["count"] == row["requests"]
        assert 0 < row["first_token"]["p50"] <= row["latency"]["max"]
        assert [sla["generation_rate"] for sla in row["effective"]] == [2, 4, 6]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) > 10_000


def test_a_snapshot_is_served_and_measured(snapshot):
    done = bench(
        "serve", snapshot, "--clients", "2", "--requests", 1, "--prompt-tokens", 12, "--max-tokens", 4, *SMALL,
        "--max-batch-tokens", 64, "--progress",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reference on cpu, 12 prompt + 4 answer tokens in the mean" in done.stdout
    assert "0 of 2" in done.stdout and "within prompt tokens / 512 s" in done.stdout
    assert "2 clients: " in done.stderr


def test_failures_are_counted_and_shown():
    good = chunked(text("a"), text("b", "length"), b"data: [DONE]\n\n")
    bad = whole("503 Busy", b'{"error": {"message": "too busy"}}')
    models = whole("200 OK", b'{"data": [{"id": "m"}]}')
    with answering(models, good, bad, good, bad, bad) as target:  # the first good one is a warm-up
        url = f"http://127.0.0.1:{target.port}/v1"
        done = bench("serve", "--url", url, "--clients", 1, "--requests", 4, "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "3 of 4" in done.stdout
    assert "1 clients, 3 failed: HTTP 503: too busy" in done.stderr


# -------------------------------------------------------------------------------------------------------- errors


def failed(done, code: int) -> str:
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ") and len(done.stderr.strip().splitlines()) <= 3
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sreve",), "Did you mean 'fgsnap bench serve'"),
        (("serve",), "SNAPSHOT or --url, and not both"),
        (("serve", "snap", "--url", "http://x/v1"), "SNAPSHOT or --url, and not both"),
        (("serve", "--url", "localhost:8000"), "is no address"),
        (("serve", "--url", "http://x/v1", "--backend", "native"), "--backend has no meaning with --url"),
        (("serve", "--url", "http://x/v1", "--prompt-format", "text"), "needs --tokenizer"),
        (("serve", "--url", "http://x/v1", "--plot", "no/such/curve.png"), "--plot no/such/curve.png cannot"),
        (("serve", "--url", "http://x/v1", "--output", "no/such/result.json"), "--output no/such/result.json cannot"),
        (("serve", "--url", "http://x/v1", "--clients", "1,0"), "is no list of numbers above 0"),
        (("serve", "--url", "http://x/v1", "--clients", "1.5"), "is no list of numbers above 0"),
        (("throughput", "snap", "--batch", "8", "--requests", "4"), "do not fill a batch of 8"),
        (("latency", "snap", "--max-tokens", "1"), "--max-tokens"),
        (("startup", "snap", "--rounds", "0"), "--rounds"),
    ],
)
def test_a_wrong_command_is_a_usage_error(arguments, words):
    assert words in failed(bench(*arguments), 2)


@pytest.mark.parametrize("command", ["startup", "latency", "throughput", "serve"])
def test_no_snapshot_is_not_found(command, tmp_path):
    assert "nowhere" in failed(bench(command, tmp_path / "nowhere"), 4)


def test_an_endpoint_that_is_not_there_is_a_network_error():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    said = failed(bench("serve", "--url", url), 5)
    assert "does not answer" in said and "the connection was refused" in said


def test_an_endpoint_that_refuses_everything_is_one_error():
    with answering(whole("200 OK", b'{"data": [{"id": "m"}]}'), whole("400 Bad", b'{"error": "no ids"}')) as target:
        url = f"http://127.0.0.1:{target.port}/v1"
        assert "HTTP 400: no ids" in failed(bench("serve", "--url", url, "--clients", 2, "--requests", 1), 1)


@pytest.mark.parametrize("command", ["startup", "serve"])
def test_a_server_that_ends_takes_its_reason_along(command, tmp_path):
    path = servable_snapshot(tmp_path / "snap", canary="wrong")
    said = failed(bench(command, path, *SMALL), 1)
    assert "ended with exit code 3" in said and "does not compute what it should" in said


def test_a_server_that_is_killed_is_noticed(snapshot):
    engine = EngineOptions(backend="reference", kv_memory=16 << 20, threads=1)
    with serving(snapshot, engine) as server:
        assert server.wait_until_ready()["backend"] == "reference"
        server.check()
        (child,) = children_with(str(server.port))
        os.kill(child, signal.SIGKILL)
        with pytest.raises(FgsnapError, match="killed by signal 9"):
            until(server.check)


def children_with(word: str) -> list[int]:
    """Processes that this one started with ``word`` among their arguments."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--prompt-tokens", 250, "--max-tokens", 8), 2, "longer than the context of 256"),
        (("--prompt-tokens", 20, "--max-tokens", 4, "--batch", 65, "--max-batch-tokens", 64), 2, "--max-batch-tokens"),
        (("--prompt-tokens", 200, "--max-tokens", 8, "--batch", 500), 6, "does not fit the KV cache"),
    ],
)
def test_a_batch_that_cannot_run_at_once_is_refused_with_the_arithmetic(snapshot, options, code, words):
    assert words in failed(bench("latency", snapshot, *SMALL, *options), code)


def test_a_picture_without_matplotlib_names_the_extra(tmp_path):
    program = (
        "import sys; sys.modules['matplotlib'] = None; from fgsnap.cli import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    )
    arguments = ["bench", "serve", "--url", "http://x/v1", "--plot", str(tmp_path / "curve.png")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert "pip install 'fgsnap[bench]'" in failed(done, 6)


# ------------------------------------------------------------------------------------------------------- figures


def test_summaries():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}
    assert distribution([]) is None
    values = [float(value) for value in range(101)]
    assert distribution(values) == {"mean": 50.0, "p50": 50.0, "p95": 95.0, "max": 100.0, "count": 101}
    assert quantile([7.0], 0.95) == 7.0
    assert quantile([1.0, 2.0], 0.25) == 1.25


def test_a_picture_of_several_results_and_of_none_answered(tmp_path):
    def level(clients, rate, latency):
        effective = [{"prompt_rate": 512.0, "generation_rate": 4.0, "requests_per_second": rate / 2}]
        return {"clients": clients, "requests_per_second": rate, "latency": latency, "effective": effective}

    one = [level(1, 1.0, {"mean": 1.0}), level(8, 4.0, {"mean": 2.0})]
    draw({"one": one, "other": [level(1, 0.0, None)]}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
