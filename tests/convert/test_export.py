"""Export is the inverse of conversion, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from fgsnap.atomic import MARK
from fgsnap.convert.export import export
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import rank_layouts
from fgsnap.errors import FgsnapError, HostError, NotFound, SnapshotRefused, UnsupportedModel, UsageError
from fgsnap.layout import logical_shapes
from fgsnap.snapshot import SnapshotWriter, open_snapshot
from tests.convert.models import CONFIG, DTYPES, folder, loaded, same_bits, weights
from tests.convert.test_pipeline import write_gguf

ROOT = Path(__file__).parent.parent.parent
TIED = {**CONFIG, "tie_word_embeddings": True}
BIASED = {**CONFIG, "num_key_value_heads": 1, "vocab_size": 53, "attention_bias": True, "mlp_bias": True}
PROPORTIONAL = {
    **CONFIG, "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}  # fmt: skip
CONFIGS = {"plain": CONFIG, "tied": TIED, "biased": BIASED, "permuted": PROPORTIONAL}


def snapshot(tmp_path, config, tensors, *, shards=1, files=None, **settings):
    source = folder(tmp_path / "model", config, tensors, shards=shards, **(files or {}))
    convert(str(source), tmp_path / "snap", canary=False, **settings)
    return tmp_path / "snap"


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp", [1, 3])
def test_every_tensor_comes_back(tmp_path, config, dtype, tp):
    tensors = weights(CONFIGS[config], dtype)
    files = {"generation_config__json": {"eos_token_id": [2]}, "tokenizer_config__json": {"bos_token": "x"}}
    result = export(snapshot(tmp_path, CONFIGS[config], tensors, files=files, tp=tp), tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)
    assert (result.tensors, result.notes) == (len(tensors), ())
    assert result.bytes == sum(value.nbytes for value in tensors.values())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_mixed_dtypes_come_back(tmp_path):
    tensors = {name: value.float() if "norm" in name else value for name, value in weights(CONFIG).items()}
    export(snapshot(tmp_path, CONFIG, tensors, tp=2), tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)


def test_odd_bits_come_back(tmp_path):
    """NaNs with payloads, infinities, subnormals and negative zeros are bits like any other."""
    tensors = weights(CONFIG)
    name = "model.layers.0.mlp.up_proj.weight"
    odd = torch.tensor([0x7F81, 0xFFFF - 0x10000, 0x7F80, 0x0001, -0x8000], dtype=torch.int16).view(torch.bfloat16)
    tensors[name] = odd.repeat(1000)[: tensors[name].numel()].reshape(tensors[name].shape)
    export(snapshot(tmp_path, CONFIG, tensors), tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)


@pytest.mark.parametrize("slab", [1, 1000])
def test_slabs_do_not_show(tmp_path, monkeypatch, slab):
    tensors = weights(PROPORTIONAL)
    monkeypatch.setattr("fgsnap.convert.export.SLAB", slab)
    export(snapshot(tmp_path, PROPORTIONAL, tensors, tp=4), tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)


def test_many_shards_with_an_index(tmp_path):
    tensors = weights(CONFIG)
    export(snapshot(tmp_path, CONFIG, tensors, shards=3), tmp_path / "back", shard_bytes=20_000)
    back = tmp_path / "back"
    shards = sorted(file.name for file in back.glob("*.safetensors"))
    assert shards == [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    assert len(shards) > 3 and same_bits(loaded(back), tensors)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == set(shards)


def test_what_was_exported_converts_to_the_same_weights(tmp_path):
    first = snapshot(tmp_path, BIASED, weights(BIASED), tp=4)
    export(first, tmp_path / "back", shard_bytes=30_000)
    convert(str(tmp_path / "back"), tmp_path / "again", tp=4, canary=False)
    for rank in sorted(first.glob("rank-*.safetensors")):
        assert rank.read_bytes() == (tmp_path / "again" / rank.name).read_bytes()


def test_transformers_reads_it(tmp_path):
    tensors = weights(TIED)
    export(snapshot(tmp_path, TIED, tensors, tp=2), tmp_path / "back")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    state = {name: value for name, value in model.state_dict().items() if name in tensors}
    assert same_bits(state, tensors)


def test_a_gguf_file_comes_back_in_the_order_of_hugging_face(tmp_path):
    tensors = weights(BIASED, "float32")
    write_gguf(tmp_path / "m.gguf", BIASED, tensors)
    convert(str(tmp_path / "m.gguf"), tmp_path / "snap", canary=False)
    result = export(tmp_path / "snap", tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), tensors)
    assert any("no Hugging Face checkpoint" in note for note in result.notes)


def test_it_says_what_was_cast_and_dropped(tmp_path):
    tensors = weights(TIED, "float32")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    made = snapshot(tmp_path, TIED, {**tensors, **extra}, dtype="float16")
    result = export(made, tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), {name: value.half() for name, value in tensors.items()})
    assert "float16" in result.notes[0] and "inv_freq" in result.notes[1]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**TIED, "torch_dtype": "float16"}


def test_a_cast_is_stated_where_the_config_says_nothing(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key not in ("dtype", "torch_dtype")}
    convert(str(folder(tmp_path / "m", config, weights(config))), tmp_path / "snap", dtype="float16", canary=False)
    export(tmp_path / "snap", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**config, "torch_dtype": "float16"}


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    return snapshot(tmp_path, CONFIG, weights(CONFIG))


def test_an_existing_target_is_not_touched(tmp_path, small):
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "precious").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export(small, tmp_path / "back")
    assert (tmp_path / "back" / "precious").read_text() == "x"


def test_an_empty_target_is_taken_and_a_stale_partial_goes(tmp_path, small):
    (tmp_path / "back").mkdir()
    (tmp_path / "back.partial" / "deep").mkdir(parents=True)
    (tmp_path / "back.partial" / "half").write_text("x")
    (tmp_path / "back.partial" / MARK).touch()
    export(small, tmp_path / "back")
    assert {file.name for file in (tmp_path / "back").iterdir()} == {"config.json", "model.safetensors"}
    assert not (tmp_path / "back.partial").exists()


def test_two_exports_to_one_target(tmp_path, small):
    def again(done, total):
        with pytest.raises(UsageError, match="Another process"):
            export(small, tmp_path / "back")

    export(small, tmp_path / "back", again)
    assert same_bits(loaded(tmp_path / "back"), weights(CONFIG))


def test_an_interrupt_leaves_nothing(tmp_path, small):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(small, tmp_path / "back", stop)
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()


def test_no_snapshot(tmp_path, small):
    with pytest.raises(NotFound):
        export(tmp_path / "nowhere", tmp_path / "back")
    (small / "snapshot.json").unlink()
    with pytest.raises(SnapshotRefused):
        export(small, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_a_text_file_that_was_changed(tmp_path, small):
    config = (small / "config.json").read_text()
    (small / "config.json").write_text(config.replace("llama", "lhama"))
    with pytest.raises(SnapshotRefused, match="refused"):
        export(small, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_a_flipped_bit_in_a_rank_file(tmp_path, small):
    rank = small / "rank-00000-of-00001.safetensors"
    data = bytearray(rank.read_bytes())
    data[-5] ^= 1
    rank.write_bytes(data)
    with pytest.raises(SnapshotRefused, match="damaged in chunk 0"):
        export(small, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_progress_counts_verifying_and_writing(tmp_path, small):
    told = []
    export(small, tmp_path / "back", lambda *step: told.append(step))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]}
    assert done[-1] > 2 * sum(tensor.nbytes for tensor in weights(CONFIG).values())


FULL = """
import resource, sys
from fgsnap.convert.export import export
from fgsnap.errors import FgsnapError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    export(sys.argv[1], sys.argv[2])
except FgsnapError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_nothing(tmp_path, small):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(small), str(tmp_path / "back")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == HostError.exit_code, done.stderr
    assert "No room" in done.stdout and not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_manifest_that_lies_about_its_family(tmp_path, family):
    """Such a snapshot opens, for the family is only told; it cannot be exported."""
    source = folder(tmp_path / "model", CONFIG, weights(CONFIG))
    convert(str(source), tmp_path / "snap", canary=False)
    with open_snapshot(tmp_path / "snap") as snapshot:
        manifest = snapshot.manifest
    other = msgspec.structs.replace(manifest.provenance, family=family)
    spec = manifest.spec
    if family == "llama":
        kind = msgspec.structs.replace(spec.layer_kinds[0], mlp_out=spec.final_norm)
        spec = msgspec.structs.replace(spec, layer_kinds=(kind,))
    lie(tmp_path, msgspec.structs.replace(manifest, provenance=other, spec=spec))
    with pytest.raises(UnsupportedModel):
        export(tmp_path / "lie", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def lie(tmp_path, manifest):
    """A snapshot of zeros whose manifest says what it is told to."""
    layouts = rank_layouts(manifest.spec, 1, dict.fromkeys(logical_shapes(manifest.spec), "bfloat16"))
    with SnapshotWriter(tmp_path / "lie", manifest.spec, 1) as writer:
        with writer.rank(0, layouts[0]):
            pass
        writer.write_manifest(msgspec.structs.replace(manifest, tensors=writer.tensors, files=writer.files))
        writer.publish(None)


def test_errors_are_three_lines(tmp_path):
    with pytest.raises(FgsnapError) as caught:
        export(tmp_path, tmp_path / "back")
    assert 1 <= len(caught.value.lines()) <= 3
