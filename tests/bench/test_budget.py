"""The token budget: its knee, the forwards it is measured with, where it is kept, and what a start makes of that."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fgsnap.bench import budget as bench
from fgsnap.errors import HostError
from fgsnap.runtime.budget import CPU_BUDGET, GPU_BUDGET, Budget, budget_file, cache_folder, host_of, settled_budget
from fgsnap.runtime.options import EngineOptions
from tests.doubles import StubModel
from tests.serving import real_service, run_serve, servable_snapshot

SMALL = ("--kv-memory", "16MiB", "--threads", "1", "--backend", "reference")
SNAPSHOT = "f" * 64
DECODER = SimpleNamespace(ops=SimpleNamespace(name="stub", device="cpu"), setting="float32, 2 threads")
LEFT_OUT = EngineOptions()
DEFAULT = Budget(CPU_BUDGET, "default")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------------------- measuring


def test_the_knee_is_the_smallest_forward_with_nearly_the_best_throughput():
    rates = {1: 60.0, 8: 400.0, 64: 910.0, 128: 880.0, 256: 1000.0, 2048: 950.0}
    assert bench.knee(rates, 0.9) == 64
    assert bench.knee(rates, 0.95) == 256
    assert bench.knee(rates, 1.0) == 256
    assert bench.knee({1: 5.0}, 0.9) == 1


def test_every_forward_has_its_size_and_reads_what_was_written():
    model = StubModel(max_length=1024, blocks=4096)  # asserts that each token sees all before it in the cache
    rows = bench.measured(model, rounds=2)
    assert [row.tokens for row in rows] == list(bench.SIZES)
    assert all(len(row.seconds) == 2 for row in rows)
    last = [len(batch.tokens) for batch in model.batches[-len(rows) :]]
    assert last == list(reversed(bench.SIZES))
    assert {row.tokens: row.decodes for row in rows}[64] == 8 and rows[0].decodes == 1


def test_a_small_cache_or_context_ends_the_sizes_early():
    sizes = [row.tokens for row in bench.measured(StubModel(max_length=128, blocks=200), rounds=1)]
    assert sizes == list(bench.SIZES[: len(sizes)]) and 8 <= sizes[-1] < 2048
    with pytest.raises(HostError, match="--kv-memory"):
        bench.measured(StubModel(max_length=128, blocks=8), rounds=1)


def test_forwards_that_take_too_long_are_the_largest(monkeypatch):
    monkeypatch.setattr(bench, "LONGEST", 0.0)
    assert [row.tokens for row in bench.measured(StubModel(blocks=4096), rounds=1)] == [1]


# -------------------------------------------------------------------------------------------------- keeping


def kept(**changes) -> dict:
    return {"snapshot": SNAPSHOT, "host": host_of(DECODER), "max_batch_tokens": 96, **changes}


def test_what_was_kept_is_found_for_the_same_snapshot_and_host(cache):
    path = bench.keep(kept())
    assert path.is_relative_to(cache / "fgsnap" / SNAPSHOT) and json.loads(path.read_text())["benchmark"] == "budget"
    assert [file.name for file in path.parent.iterdir()] == ["budget.json"]
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER) == Budget(96, "measured")
    assert settled_budget(EngineOptions(max_batch_tokens=32), SNAPSHOT, DECODER) == Budget(32, "asked for")
    assert settled_budget(LEFT_OUT, "0" * 64, DECODER) == DEFAULT
    other = SimpleNamespace(ops=DECODER.ops, setting="float32, 4 threads")
    assert settled_budget(LEFT_OUT, SNAPSHOT, other) == DEFAULT


def test_the_default_depends_on_where_it_computes():
    on_gpu = SimpleNamespace(ops=SimpleNamespace(name="reference", device="cuda"), setting="bfloat16")
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER).tokens == CPU_BUDGET == 128
    assert settled_budget(LEFT_OUT, SNAPSHOT, on_gpu).tokens == GPU_BUDGET == 512


def test_who_asks_for_sequences_gets_room_for_them_and_for_prompts():
    def budget(**asked) -> Budget:
        return settled_budget(EngineOptions(**asked), SNAPSHOT, DECODER)

    assert budget(max_num_seqs=64) == DEFAULT
    assert budget(max_num_seqs=200) == Budget(400, "asked for")
    assert budget(max_num_seqs=200, max_batch_tokens=100) == Budget(100, "asked for")
    bench.keep(kept())
    assert budget(max_num_seqs=48) == Budget(96, "measured")
    assert budget(max_num_seqs=200) == Budget(400, "asked for")


def test_a_newer_measurement_replaces_the_older():
    bench.keep(kept())
    bench.keep(kept(max_batch_tokens=128))
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER).tokens == 128


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="Cannot write"):
        bench.keep(kept())
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER) == DEFAULT


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        json.dumps(kept(max_batch_tokens=0)).encode(),
        json.dumps(kept(max_batch_tokens=1 << 40)).encode(),
        json.dumps(kept(max_batch_tokens="96")).encode(),
        json.dumps(kept(host="another")).encode(),
        json.dumps(kept(snapshot="0" * 64)).encode(),
        json.dumps({"snapshot": SNAPSHOT}).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(content, capfd):
    path = bench.keep(kept())
    path.write_bytes(content)
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER) == DEFAULT
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"fgsnap: the token budget in {path} is ignored: ") and line.endswith(".")


def test_a_directory_in_its_place_is_ignored_too(capfd):
    budget_file(cache_folder(SNAPSHOT), host_of(DECODER)).mkdir(parents=True)
    assert settled_budget(LEFT_OUT, SNAPSHOT, DECODER).source == "default"
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_relative_cache_directory_is_none(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert str(cache_folder("id")) == "/home/of/mine/.cache/fgsnap/id"


# --------------------------------------------------------------------------------------------- from the command line


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fgsnap", *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


def test_what_was_measured_is_served_with(tmp_path, cache):
    snapshot = servable_snapshot(tmp_path / "snap")
    done = command("bench", "budget", snapshot, *SMALL, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    tokens, rates = result["max_batch_tokens"], {row["tokens"]: row["tokens_per_second"] for row in result["forwards"]}
    assert rates[tokens] >= 0.89 * max(rates.values())
    assert all(rate < 0.91 * max(rates.values()) for size, rate in rates.items() if size < tokens)
    with real_service(snapshot, *SMALL) as service:
        assert service.url and f", {tokens} tokens a forward as measured) in " in service.lines[-1]
    with real_service(snapshot, *SMALL, "--max-batch-tokens", "48") as service:
        assert service.url and "as measured" not in service.lines[-1]
    (path,) = cache.rglob("budget.json")
    path.write_text("{}")
    done = run_serve(snapshot, "--port", "0", *SMALL, "--kv-memory", "1024")
    assert done.returncode == 6, "an engine that cannot start does not look for it"
    with real_service(snapshot, *SMALL) as service:
        assert service.url and f"the token budget in {path} is ignored" in service.lines[0]
    done = command("run", snapshot, "Hi", *SMALL, "--max-tokens", 2)
    assert done.returncode == 0 and "is ignored: " in done.stderr


def test_the_table_names_the_budget_and_its_file(tmp_path, cache):
    snapshot = servable_snapshot(tmp_path / "snap")
    done = command("bench", "budget", snapshot, *SMALL, "--rounds", 1, "--share", 0.5, "--progress")
    assert done.returncode == 0, done.stderr
    assert "A forward should carry " in done.stdout and "50% of the best tokens/s" in done.stdout
    assert str(cache) in done.stdout and "round 1 of 1" in done.stderr
