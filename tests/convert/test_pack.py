"""Conversion for a target: packed matrices that are the same model as plain ones, and come back bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgsnap.convert import weights as weights_loop
from fgsnap.convert.export import export
from fgsnap.convert.families import llama
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import plan, plan_source
from fgsnap.errors import UsageError
from fgsnap.runtime import canary
from fgsnap.runtime.decoder import load_decoder
from fgsnap.snapshot import open_snapshot, read_logical, verify
from tests.convert.models import CONFIG, DTYPES, at_tp1, folder, loaded, same_bits, weights
from tests.convert.test_plan import SMOLLM2
from tests.snapshots import words32

ROOT = Path(__file__).parent.parent.parent
MQA = {**CONFIG, "num_key_value_heads": 1, "vocab_size": 53, "attention_bias": True, "mlp_bias": True}
ODD = {**CONFIG, "intermediate_size": 99}


def packed(source, target, **settings):
    return convert(str(source), target, target="cpu", canary=False, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("source") / "tiny", MQA, weights(MQA))


def test_matrices_are_packed_and_vectors_are_not(tmp_path, model):
    packed(model, tmp_path / "cpu")
    with open_snapshot(tmp_path / "cpu") as snapshot:
        assert {(len(entry.shape), entry.layout) for entry in snapshot.manifest.tensors} == {(1, "row"), (2, "words32")}
        entry = next(entry for entry in snapshot.manifest.tensors if entry.name == "layers.1.down.weight")
        down = weights(MQA)["model.layers.1.mlp.down_proj.weight"].view(torch.int16).numpy()
        assert snapshot.tensor(entry) == words32(down)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp", [1, 3, 4])
def test_export_is_that_of_the_generic_target(tmp_path, dtype, tp):
    tensors = weights(MQA, dtype)
    source = folder(tmp_path / "model", MQA, tensors)
    assert packed(source, tmp_path / "cpu", tp=tp).id == verify(tmp_path / "cpu").id
    convert(str(source), tmp_path / "generic", tp=tp, canary=False)
    for name in ("cpu", "generic"):
        export(tmp_path / name, tmp_path / f"{name}-back")
    assert same_bits(loaded(tmp_path / "cpu-back"), tensors)
    for file in (tmp_path / "generic-back").iterdir():
        assert file.read_bytes() == (tmp_path / "cpu-back" / file.name).read_bytes()


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_degree_opens_as_the_rows_of_one(tmp_path, model, tp):
    packed(model, tmp_path / "cpu", tp=tp)
    convert(str(model), tmp_path / "one", canary=False)
    assert at_tp1(tmp_path / "cpu") == at_tp1(tmp_path / "one")


def test_rows_that_are_no_whole_words_stay_rows(tmp_path):
    tensors = weights(ODD)
    packed(folder(tmp_path / "model", ODD, tensors), tmp_path / "cpu")
    with open_snapshot(tmp_path / "cpu") as snapshot:
        rows = {entry.name for entry in snapshot.manifest.tensors if len(entry.shape) == 2 and entry.layout == "row"}
    assert rows == {"layers.0.down.weight", "layers.1.down.weight"}
    export(tmp_path / "cpu", tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)


def test_a_cast_is_packed(tmp_path):
    tensors = weights(MQA, "float32")
    source = folder(tmp_path / "model", MQA, tensors)
    packed(source, tmp_path / "cpu", dtype="bfloat16", tp=2)
    convert(str(source), tmp_path / "generic", dtype="bfloat16", canary=False)
    assert at_tp1(tmp_path / "cpu") == at_tp1(tmp_path / "generic")


def test_slabs_of_any_size_and_any_workers_give_one_snapshot(tmp_path, model, monkeypatch):
    first = packed(model, tmp_path / "first", tp=2)
    for slab in (1, 1000, 3300, 7000):
        monkeypatch.setattr(weights_loop, "SLAB", slab)
        assert packed(model, tmp_path / f"slab{slab}", tp=2, workers=slab % 3 + 1).id == first.id


def test_the_target_is_part_of_the_recipe(tmp_path, model):
    generic = convert(str(model), tmp_path / "generic", canary=False).id
    assert convert(str(model), tmp_path / "named", target="generic", canary=False).id == generic
    assert packed(model, tmp_path / "cpu").id != generic
    assert packed(model, tmp_path / "again").id == packed(model, tmp_path / "third").id


@pytest.mark.parametrize("tp", [1, 2])
def test_the_canary_is_that_of_the_generic_target(tmp_path, model, tp):
    convert(str(model), tmp_path / "cpu", target="cpu", tp=tp)
    convert(str(model), tmp_path / "generic", tp=tp)
    with open_snapshot(tmp_path / "cpu") as ours, open_snapshot(tmp_path / "generic") as theirs:
        assert (ours.canary.tokens, ours.canary.next) == (theirs.canary.tokens, theirs.canary.next)
        assert ours.canary.margins == pytest.approx(theirs.canary.margins, abs=1e-4)
        decoder = load_decoder(ours, backend="reference", device="cpu", dtype="float32", blocks=8)
        assert canary.check(decoder, ours.canary, 1e-3).ok


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_plan_counts_the_rows_that_fill_up_panels(tmp_path, model, tp):
    planned, generic = (plan_source(str(model), tp=tp, target=target) for target in ("cpu", "generic"))
    assert planned.bytes == packed(model, tmp_path / "cpu", tp=tp).bytes > generic.bytes
    assert (planned.target, generic.target) == ("cpu", "generic")
    for rank in planned.ranks:
        assert (tmp_path / "cpu" / rank.file).stat().st_size == rank.bytes


def test_the_peak_counts_what_the_canary_unpacks():
    spec = llama.spec(SMOLLM2)
    generic, cpu = (plan(spec, 1, "bfloat16", target=target).peak_memory for target in ("generic", "cpu"))
    assert cpu - generic == 2 * (49152 * 576 + 2 * (576 * (576 * 2 + 192 * 2 + 1536 * 3)))


def test_a_target_that_does_not_exist(tmp_path, model):
    for call in (lambda: convert(str(model), tmp_path / "s", target="tpu"), lambda: plan_source("x", target="tpu")):
        with pytest.raises(UsageError, match="tpu") as caught:
            call()
        assert "generic, cpu" in caught.value.next_step
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_packed_tensors(tmp_path):
    """96 MiB of weights in one tensor pass through slabs of 4 MiB, and through read_logical by panels.

    On a busy machine the digests lag behind by the 32 MiB that they may.
    """
    config = {**CONFIG, "vocab_size": 1_000_000, "tie_word_embeddings": True}
    source = folder(tmp_path / "m", config, weights(config))
    program = (
        "import sys\n"
        "from fgsnap.convert.pipeline import convert\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return max(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) >> 10\n"
        "seen = [anonymous()]\n"
        "watch = lambda *_: seen.append(anonymous())\n"
        "convert(sys.argv[1], sys.argv[2], target='cpu', canary=False, workers=2, progress=watch)\n"
        "print(max(seen) - seen[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "snap")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 64
    with open_snapshot(tmp_path / "snap") as snapshot:
        got = bytearray(1000 * 48 * 2)
        read_logical(snapshot, "embed.weight", (999_000, 0), (1000, 48), memoryview(got))
    tail = weights(config)["model.embed_tokens.weight"][999_000:]
    assert bytes(got) == tail.contiguous().view(torch.int16).numpy().tobytes()


def cli(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fgsnap", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_line(tmp_path, model):
    done = cli("convert", model, "-o", tmp_path / "cpu", "--no-canary", "--target", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    twin = cli("convert", model, "-o", tmp_path / "twin", "--no-canary", "--json", FGSNAP_TARGET="cpu")
    assert json.loads(twin.stdout)["id"] == json.loads(done.stdout)["id"]
    assert "layout words32 (--target cpu)" in cli("inspect", tmp_path / "cpu").stdout
    listed = cli("inspect", tmp_path / "cpu", "--tensors").stdout.splitlines()
    assert any("words32" in line and "layers.0.qkv.weight" in line for line in listed)
    assert any("words32" not in line and "layers.0.attn_in.weight" in line for line in listed)
    assert "target     cpu, layout words32" in cli("convert", model, "--dry-run", "--target", "cpu").stdout
    wrong = cli("convert", model, "-o", tmp_path / "x", "--target", "tpu")
    assert wrong.returncode == 2 and "'generic', 'cpu'" in wrong.stderr and not (tmp_path / "x").exists()
