"""Conversion straight from the Hub: each needed byte comes once, and what servers do wrong is met or refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fgsnap.convert.families import falcon, llama, llama4
from fgsnap.convert.files import KEPT
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import kept_memory, peak_memory, rank_layouts
from fgsnap.convert.ranges import Kept
from fgsnap.convert.rules import sources
from fgsnap.layout import logical_shapes
from fgsnap.snapshot import open_snapshot, verify
from tests.convert.hub_server import Hub, serving
from tests.convert.models import CONFIG, folder, weights

ROOT = Path(__file__).parents[2]
MQA = {**CONFIG, "num_key_value_heads": 1}

CONVERT = """
import os, sys
from fgsnap.convert import ranges, weights
from fgsnap.cli import run_cli
ranges.WAITS = (0.0, 0.01)
weights.SLAB = int(os.environ.get("SLAB", weights.SLAB))
weights.GAP, ranges.KEPT = (0, 16 * weights.SLAB) if "SLAB" in os.environ else (weights.GAP, ranges.KEPT)
sys.exit(run_cli(sys.argv[1:]))
"""


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("source") / "tiny", CONFIG, weights(CONFIG), shards=3)


class Command:
    """Runs ``fgsnap convert`` in a fresh process against a Hub, with tiny slabs if asked."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, hub: Hub, *arguments: str, **env: str) -> subprocess.Popen[str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", CONVERT, "convert", *arguments, "--no-canary"],
            env=inherited | settings | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, hub: Hub, *arguments: str, **env: str) -> tuple[int, str, str]:
        process = self.start(hub, *arguments, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def json(self, hub: Hub, *arguments: str, **env: str) -> Any:
        code, out, err = self(hub, *arguments, "--json", **env)
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "hf")


def rank_digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("rank-*"))}


@pytest.mark.parametrize("slab", [None, 500, 4000])
@pytest.mark.parametrize(("config", "tp"), [(CONFIG, 1), (CONFIG, 4), (MQA, 4)], ids=["tp1", "tp4", "shared-heads"])
def test_all_ranks_take_each_byte_once(
    hub: Hub, command: Command, tmp_path: Path, config: dict[str, Any], tp: int, slab: int | None
) -> None:
    source = folder(tmp_path / "tiny", config, weights(config), shards=3)
    hub.commit("org/tiny", files_of(source))
    env = {} if slab is None else {"SLAB": str(slab)}
    told = command.json(hub, "org/tiny", "-o", str(tmp_path / "streamed"), "--tp", str(tp), **env)
    for file in source.glob("*.safetensors"):
        assert set(hub.times_served(file.name, file.stat().st_size)) == {1}, file.name
    data = sum(tensor.numel() * tensor.element_size() for tensor in weights(config).values())
    assert told["network"] == {"fetched": data, "needed": data, "amplification": 1.0}
    convert(str(source), tmp_path / "local", tp=tp, canary=False)
    assert rank_digests(tmp_path / "streamed") == rank_digests(tmp_path / "local")
    assert verify(tmp_path / "streamed").id == told["id"]
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


def test_heads_that_lie_in_groups_are_read_once_too(hub: Hub, command: Command, tmp_path: Path) -> None:
    """Falcon has queries, keys and values of a group side by side, each of which goes to another part of a tensor."""
    config = {
        "model_type": "falcon", "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_kv_heads": 4, "new_decoder_architecture": True, "bias": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    import torch

    shapes = sources(falcon.rules(falcon.spec(config)))
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    source = folder(tmp_path / "falcon", config, tensors)
    hub.commit("org/falcon", files_of(source))
    told = command.json(hub, "org/falcon", "-o", str(tmp_path / "snap"), "--tp", "2", SLAB="2000")
    assert told["network"]["amplification"] == 1
    assert set(hub.times_served("model.safetensors", (source / "model.safetensors").stat().st_size)) == {1}


def test_streamed_and_downloaded_give_one_id(hub: Hub, command: Command, tmp_path: Path, model: Path) -> None:
    hub.commit("org/tiny", files_of(model))
    streamed = command.json(hub, "org/tiny", "-o", str(tmp_path / "one"), "--tp", "2")
    downloaded = command.json(hub, "org/tiny", "-o", str(tmp_path / "two"), "--tp", "2", "--download")
    assert streamed["id"] == downloaded["id"]
    assert streamed["network"] is not None and downloaded["network"] is None
    with open_snapshot(tmp_path / "one") as snapshot:
        digests = snapshot.manifest.provenance.files
    assert {name for name, digest in digests.items() if digest.startswith("sha256:")} == {
        file.name for file in model.glob("*.safetensors")
    }


def test_some_ranks_say_what_they_fetched_beyond_their_needs(
    hub: Hub, command: Command, tmp_path: Path, model: Path
) -> None:
    hub.commit("org/tiny", files_of(model))
    arguments = ("org/tiny", "-o", str(tmp_path / "snap"), "--tp", "2")
    told = command.json(hub, *arguments, "--ranks", "0", SLAB="500")
    spec = llama.spec(CONFIG)
    layout = rank_layouts(spec, 2, dict.fromkeys(logical_shapes(spec), "bfloat16"))[0]
    assert told["network"]["needed"] == sum(tensor.bytes for tensor in layout.tensors)
    sent = sum(served.stop - served.start for served in hub.served)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in model.glob("*.safetensors"))
    assert told["network"]["fetched"] == sent - headers
    assert 1 < told["network"]["amplification"] < 2
    assert told["missing"] == [1] and told["id"] is None
    code, out, err = command(hub, *arguments, "--ranks", "1")
    assert code == 0 and "times what these ranks are made of" in out, err
    convert(str(model), tmp_path / "local", tp=2, canary=False)
    assert rank_digests(tmp_path / "snap") == rank_digests(tmp_path / "local")


@pytest.mark.parametrize("fault", ["503", "429", "403", "reset", "cut"])
def test_what_passes_is_waited_out(hub: Hub, command: Command, tmp_path: Path, model: Path, fault: str) -> None:
    """A link that has expired is asked for again; a connection that breaks goes on where it broke."""
    hub.commit("org/tiny", files_of(model))
    hub.faults.extend([fault, "", fault, fault, "", "", "", "", "", fault])
    told = command.json(hub, "org/tiny", "-o", str(tmp_path / "snap"), "--tp", "2", SLAB="4000")
    assert verify(tmp_path / "snap").id == told["id"]
    assert told["network"]["amplification"] == 1
    for file in model.glob("*.safetensors"):
        assert set(hub.times_served(file.name, file.stat().st_size)) == {1}, file.name


REFUSED = {
    "503": (5, "did not deliver", "503"),
    "429": (5, "did not deliver", "429"),
    "cut": (5, "did not deliver", ""),
    "reset": (5, "did not deliver", ""),
    "403": (5, "did not deliver", "403"),
    "404": (5, "did not deliver", "404"),
    "416": (1, "was changed on the Hub", "no bytes"),
    "418": (5, "did not deliver", "418"),
    "whole": (5, "does not send ranges", "--download"),
    "other": (5, "does not send ranges", "--download"),
    "unranged": (5, "does not send ranges", "--download"),
    "short": (5, "does not send ranges", "--download"),
    "long": (5, "does not send ranges", "--download"),
    "endless": (5, "does not send ranges", "--download"),
    "etag": (1, "was changed on the Hub", "ETag"),
    "size": (1, "was changed on the Hub", "bytes"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_pass_is_refused_in_words(
    hub: Hub, command: Command, tmp_path: Path, model: Path, fault: str
) -> None:
    code, what, why = REFUSED[fault]
    hub.commit("org/tiny", files_of(model))
    hub.faults.extend([""] * 8)  # headers and the first weights come
    hub.always = fault
    if fault == "cut":
        hub.always = "503"
        hub.faults.append("cut")
    found, out, err = command(hub, "org/tiny", "-o", str(tmp_path / "out" / "snap"), SLAB="4000")
    lines = [line for line in err.splitlines() if not line.startswith("HTTP Error")]
    assert found == code, err
    assert what in lines[-3] and why in "".join(lines[-3:]) and len(lines) == 3, err
    assert out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_the_network_hangs_leaves_nothing(
    hub: Hub, command: Command, tmp_path: Path, model: Path, number: signal.Signals, code: int
) -> None:
    hub.commit("org/tiny", files_of(model))
    hub.faults.extend([""] * 8)
    hub.always = "hang"
    out = tmp_path / "out" / "snap"
    process = command.start(hub, "org/tiny", "-o", str(out), SLAB="4000", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert hub.hanging.wait(60)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert not out.parent.exists()


def test_memory_does_not_grow_with_what_is_streamed(hub: Hub, command: Command, tmp_path: Path) -> None:
    """64 MiB of weights in one tensor, of which no more than 8 MiB are kept."""
    config = {**CONFIG, "vocab_size": 700_000, "tie_word_embeddings": True}
    hub.commit("org/wide", files_of(folder(tmp_path / "wide", config, weights(config))))
    program = (
        "import sys\nfrom fgsnap.convert import ranges\nfrom fgsnap.convert.pipeline import convert\n"
        "ranges.KEPT = 8 << 20\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return max(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) >> 10\n"
        "seen = []\n"
        "look = lambda *_: seen.append(anonymous())\n"
        "convert('org/wide', sys.argv[1], tp=4, canary=False, workers=2, progress=look)\n"
        "print(max(seen) - seen[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "snap")],
        env={**os.environ, "HF_HOME": str(command.home), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 40


def test_memory_for_stacked_experts_is_what_the_plan_says(hub: Hub, command: Command, tmp_path: Path) -> None:
    """Gates and ups of an expert are 32 MiB in one row of the source; little else is kept, and one thread reads."""
    import torch

    config = {
        "model_type": "llama4_text", "vocab_size": 50, "hidden_size": 1024, "intermediate_size": 8192,
        "intermediate_size_mlp": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
        "num_local_experts": 2, "interleave_moe_layer_step": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    spec = llama4.spec(config)
    tensors = {name: torch.zeros(shape).bfloat16() for name, shape in sources(llama4.rules(spec)).items()}
    hub.commit("org/experts", files_of(folder(tmp_path / "experts", config, tensors)))
    program = (
        "import sys\nfrom fgsnap.convert import plan, ranges\nfrom fgsnap.convert.pipeline import convert\n"
        "plan.KEPT = ranges.KEPT = 8 << 20\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return max(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) >> 10\n"
        "seen = [anonymous()]\n"
        "look = lambda *_: seen.append(anonymous())\n"
        "convert('org/experts', sys.argv[1], canary=False, workers=1, progress=look)\n"
        "print(max(seen) - seen[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "snap")],
        env={**os.environ, "HF_HOME": str(command.home), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    layouts = rank_layouts(spec, 1, dict.fromkeys(logical_shapes(spec), "bfloat16"))
    kept = kept_memory(spec, "bfloat16")
    assert kept == max(KEPT, 64 << 20)
    assert kept >> 20 < int(done.stdout) <= peak_memory(layouts, 1, 1, kept) >> 20


def test_the_token_stays_with_the_hub(hub: Hub, command: Command, tmp_path: Path, model: Path) -> None:
    hub.commit("org/secret", files_of(model))
    hub.private["org/secret"] = "hf_test_token"
    command.json(hub, "org/secret", "-o", str(tmp_path / "snap"), HF_TOKEN="hf_test_token")
    assert {token for _, path, token in hub.requests if "org/secret" in path} == {"Bearer hf_test_token"}
    assert {token for _, _, token in hub.storage_requests} == {None}


# What was fetched last


def test_ranges_that_overlap_come_once() -> None:
    data = bytes(range(200))
    asked: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> memoryview:
        asked.append((start, stop))
        return memoryview(data)[start:stop]

    kept = Kept()
    for start, stop in [(50, 60), (40, 70), (0, 200), (0, 200), (10, 55), (7, 7)]:
        assert kept.read("file", start, stop, fetch) == data[start:stop]
    assert asked == [(50, 60), (40, 50), (60, 70), (0, 40), (70, 200)]
    assert kept.read("other", 50, 60, fetch) == data[50:60]
    assert asked[-1] == (50, 60)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgsnap.convert.ranges.KEPT", 100)
    asked: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> memoryview:
        asked.append((start, stop))
        return memoryview(bytes(stop - start))

    kept = Kept()
    for start in [*range(0, 200, 10), 190, 100, 0]:
        kept.read("file", start, start + 10, fetch)
    assert asked.count((190, 200)) == asked.count((100, 110)) == 1 and asked.count((0, 10)) == 2
    kept.read("file", 1000, 3000, fetch)  # one that is longer than all that may be kept is kept, for its neighbours
    kept.read("file", 2000, 2500, fetch)
    assert asked[-1] == (1000, 3000)


def test_who_waits_for_a_range_that_fails_is_told() -> None:
    def fail(start: int, stop: int) -> memoryview:
        raise ValueError("no network")

    kept = Kept()
    for _ in range(2):
        with pytest.raises(ValueError, match="no network"):
            kept.read("file", 0, 10, fail)
    assert kept.read("file", 0, 10, lambda start, stop: memoryview(bytes(stop - start))) == bytes(10)
