"""Conversion end to end: the right bytes, the same bytes, and nothing left behind when it fails."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from blake3 import blake3

from fgsnap.convert import pipeline
from fgsnap.convert import weights as weights_loop
from fgsnap.convert.families import llama
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import rank_layouts
from fgsnap.errors import FgsnapError, HostError, SnapshotRefused, SourceError, UnsupportedModel, UsageError
from fgsnap.layout import logical_shapes
from fgsnap.snapshot import SnapshotWriter, open_snapshot, read_logical, verify
from tests.convert.models import CONFIG, DTYPES, at_tp1, folder, weights

ROOT = Path(__file__).parent.parent.parent
TIED = {**CONFIG, "tie_word_embeddings": True}
MQA = {**CONFIG, "num_key_value_heads": 1, "vocab_size": 53, "attention_bias": True, "mlp_bias": True}


def plain(source, target, **settings):
    return convert(str(source), target, canary=False, **settings)


def digests(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.rglob("*"))
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("source") / "tiny", CONFIG, weights(CONFIG))


def test_a_checkpoint_becomes_a_snapshot(tmp_path, model):
    seen, stages = [], []
    result = convert(str(model), tmp_path / "snap", progress=lambda *counts: seen.append(counts), stage=stages.append)
    assert stages == ["weights", "canary"]
    report = verify(tmp_path / "snap")
    with open_snapshot(tmp_path / "snap") as snapshot:
        origin = snapshot.manifest.provenance
        assert snapshot.id == result.id == report.id
        assert snapshot.canary is not None and len(snapshot.canary.tokens) == len(snapshot.canary.next) > 0
        assert snapshot.manifest.text.eos_token_ids == (2,)
    assert (origin.source, origin.revision, origin.family, origin.dtype) == ("local", None, "llama", None)
    assert origin.files["model.safetensors"] == blake3((model / "model.safetensors").read_bytes()).hexdigest()
    assert str(tmp_path) not in (tmp_path / "snap" / "manifest.json").read_text()
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]} and 0 < done[0] < done[-1] <= result.bytes
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("config", [CONFIG, TIED, MQA], ids=["plain", "tied", "mqa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logical_tensors_are_those_of_the_source(tmp_path, config, dtype):
    tensors = weights(config, dtype)
    plain(folder(tmp_path / "m", config, tensors), tmp_path / "snap", tp=2 if config is MQA else 1)
    with open_snapshot(tmp_path / "snap") as snapshot:
        for logical, name in (
            ("layers.1.q.weight", "model.layers.1.self_attn.q_proj.weight"),
            ("layers.1.k.weight", "model.layers.1.self_attn.k_proj.weight"),
            ("layers.0.down.weight", "model.layers.0.mlp.down_proj.weight"),
            ("layers.0.mlp_in.weight", "model.layers.0.post_attention_layernorm.weight"),
            ("embed.weight", "model.embed_tokens.weight"),
            ("final_norm.weight", "model.norm.weight"),
        ):
            wanted = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            got = bytearray(len(wanted))
            shape = tuple(tensors[name].shape)
            read_logical(snapshot, logical, (0,) * len(shape), shape, memoryview(got))
            assert bytes(got) == wanted, logical


@pytest.mark.parametrize(("config", "tp"), [*itertools.product([CONFIG, MQA], [2, 3, 4]), (TIED, 4)])
def test_every_degree_holds_the_same_model(tmp_path, config, tp):
    """Vocabularies of 50 and 53 rows need padding at some degrees; a single KV head is replicated."""
    source = folder(tmp_path / "m", config, weights(config))
    plain(source, tmp_path / "one")
    plain(source, tmp_path / "many", tp=tp)
    assert at_tp1(tmp_path / "many") == at_tp1(tmp_path / "one")
    assert verify(tmp_path / "many").bytes > 0


def test_slabs_of_any_size_give_one_snapshot(tmp_path, model, monkeypatch):
    first = plain(model, tmp_path / "first", tp=2)
    for slab in (1, 100, 1000, 5000):
        monkeypatch.setattr(weights_loop, "SLAB", slab)
        assert plain(model, tmp_path / f"slab{slab}", tp=2).id == first.id


def test_shards_do_not_matter_to_the_weights(tmp_path, model):
    plain(model, tmp_path / "one")
    plain(folder(tmp_path / "m", CONFIG, weights(CONFIG), shards=5), tmp_path / "five")
    assert at_tp1(tmp_path / "one") == at_tp1(tmp_path / "five")


@pytest.mark.parametrize("target", DTYPES)
def test_a_cast_rounds_as_torch_does(tmp_path, target):
    tensors = weights(CONFIG, "float32")
    plain(folder(tmp_path / "m", CONFIG, tensors), tmp_path / "snap", dtype=target, tp=3)
    rounded = {name: value.to(DTYPES[target]) for name, value in tensors.items()}
    plain(folder(tmp_path / "rounded", CONFIG, rounded), tmp_path / "wanted")
    assert at_tp1(tmp_path / "snap") == at_tp1(tmp_path / "wanted")
    with open_snapshot(tmp_path / "snap") as snapshot:
        assert snapshot.manifest.provenance.dtype == target


def test_norms_may_have_their_own_dtype(tmp_path):
    tensors = {name: value.float() if "norm" in name else value for name, value in weights(CONFIG).items()}
    plain(folder(tmp_path / "m", CONFIG, tensors), tmp_path / "snap")
    found = {name: dtype for name, (dtype, _, _) in at_tp1(tmp_path / "snap").items()}
    assert found["layers.0.attn_in.weight"] == "float32" and found["layers.0.qkv.weight"] == "bfloat16"


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path, config, tensors, name=None):
    """The checkpoint as llama.cpp's converter would write it: other names, query and key rows in pair order."""
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if name is not None:
        writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(3, config["vocab_size"]))])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    table = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, value in tensors.items():
        array = value.numpy()
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        for old, new in table.items():
            name = name.replace(old, new)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_weights_of_the_folder(tmp_path):
    tensors = weights(MQA, "float32")
    plain(folder(tmp_path / "m", MQA, tensors), tmp_path / "hf", tp=2)
    plain(write_gguf(tmp_path / "m.gguf", MQA, tensors), tmp_path / "gguf", tp=2)
    assert at_tp1(tmp_path / "gguf") == at_tp1(tmp_path / "hf")
    with open_snapshot(tmp_path / "gguf") as ours, open_snapshot(tmp_path / "hf") as theirs:
        assert ours.manifest.provenance.rules != theirs.manifest.provenance.rules
        assert ours.manifest.spec.layer_kinds == theirs.manifest.spec.layer_kinds


# --- one id -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
os.umask(int(sys.argv[4], 8))
from fgsnap.convert.pipeline import convert
print(convert(sys.argv[1], sys.argv[2], tp=3, workers=int(sys.argv[3]), canary=False).id)
"""


def test_twenty_rebuilds_give_one_snapshot(tmp_path, monkeypatch):
    """Whatever the number of workers, umask, hash seed and locale, and wherever the source lies."""
    config = {**CONFIG, "vocab_size": 1999}
    source = folder(tmp_path / "model", config, weights(config), shards=3, generation_config__json={"eos_token_id": 2})
    ids, trees = set(), []
    for run, (workers, mask, seed, language) in enumerate(
        [(1, "077", "0", "C"), (7, "000", "1", "C.UTF-8"), (3, "027", "random", "POSIX")]
    ):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": language, "PYTHONPATH": str(ROOT)}
        target = tmp_path / f"process{run}"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(source), str(target), str(workers), mask],
            env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        ids.add(done.stdout.strip())
        trees.append(digests(target))
    monkeypatch.setattr(weights_loop, "SLAB", 3000)  # so that there is work for several workers
    before = os.umask(0)
    try:
        for run in range(17):
            os.umask((0o000, 0o022, 0o077, 0o777 & ~0o700)[run % 4])
            target = tmp_path / f"run{run}"
            ids.add(plain(source, target, tp=3, workers=run % 8 + 1).id)
            trees.append(digests(target))
    finally:
        os.umask(before)
    assert len(ids) == 1 and all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_renamed_folder_gives_the_same_snapshot(tmp_path, shards):
    source = folder(tmp_path / "model", CONFIG, weights(CONFIG), shards=shards)
    first = plain(source, tmp_path / "first")
    copy = tmp_path / "elsewhere" / "my-copy"
    shutil.copytree(source, copy)
    assert plain(copy, tmp_path / "second").id == first.id
    assert digests(tmp_path / "second") == digests(tmp_path / "first")


@pytest.mark.parametrize(("name", "source"), [(None, "local"), ("Tiny Llama 1", "Tiny Llama 1"), ("/home/x", "local")])
def test_a_renamed_gguf_file_gives_the_same_snapshot(tmp_path, name, source):
    first = plain(write_gguf(tmp_path / "model.Q8_0.gguf", CONFIG, weights(CONFIG, "float32"), name), tmp_path / "one")
    copy = shutil.copy(tmp_path / "model.Q8_0.gguf", tmp_path / "Private Name.gguf")
    assert plain(copy, tmp_path / "two").id == first.id
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    with open_snapshot(tmp_path / "two") as snapshot:
        origin = snapshot.manifest.provenance
    assert origin.source == source and list(origin.files) == ["model.gguf"]
    for file in (tmp_path / "two").iterdir():
        assert b"Private" not in file.read_bytes() and b"Q8_0" not in file.read_bytes()


def test_the_readers_order_does_not_matter(tmp_path, model, monkeypatch):
    """Threads that finish in any order still write in one."""
    monkeypatch.setattr(weights_loop, "SLAB", 500)
    fill = weights_loop._make

    def dawdling(*arguments):
        time.sleep(random.random() / 2000)
        return fill(*arguments)

    first = plain(model, tmp_path / "first", workers=1)
    monkeypatch.setattr(weights_loop, "_make", dawdling)
    assert plain(model, tmp_path / "second", workers=8).id == first.id


@pytest.mark.parametrize("change", ["write", "replace", "remove"])
def test_a_source_that_changes_meanwhile_is_refused(tmp_path, change):
    source = folder(tmp_path / "m", CONFIG, weights(CONFIG))
    file = source / "model.safetensors"

    def meddle(done, total):
        if change == "write":
            with file.open("r+b") as opened:
                opened.seek(-4, os.SEEK_END)
                opened.write(b"\x01\x02\x03\x04")
        else:
            data = file.read_bytes()
            file.unlink()
            if change == "replace":
                file.write_bytes(data)

    with pytest.raises(SourceError, match=r"model\.safetensors was changed") as caught:
        convert(str(source), tmp_path / "snap", canary=False, progress=meddle if change != "remove" else once(meddle))
    assert caught.value.next_step and not list(tmp_path.glob("snap*"))


def once(call):
    calls = []

    def first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            call(*arguments)

    return first


def test_a_failure_stops_the_digests_of_the_source(tmp_path, model):
    def fail(done, total):
        raise ValueError("stop")

    before = threading.active_count()
    with pytest.raises(ValueError, match="stop"):
        convert(str(model), tmp_path / "snap", canary=False, progress=fail)
    assert threading.active_count() == before


# --- interrupted ------------------------------------------------------------------------------------------------------

STOPPING = """
import signal, sys, time
from fgsnap.convert.pipeline import convert
def leave(*_):
    raise SystemExit(143)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def wait(done, total):
    if done > total // 3:
        print("writing", flush=True)
        time.sleep(60)
convert(sys.argv[1], sys.argv[2], progress=wait)
"""


@pytest.fixture
def writing(tmp_path, model):
    """A process in the middle of converting, and its target."""
    target = tmp_path / "out" / "snap"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, str(model), str(target)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    yield process, target
    process.kill()
    process.wait()
    process.stdout.close()


def test_killed_in_the_middle_leaves_no_snapshot_and_the_next_convert_succeeds(writing, model):
    process, target = writing
    assert any(target.with_name("snap.partial").iterdir())
    process.kill()
    process.wait()
    assert not target.exists()
    result = plain(model, target)
    assert verify(target).id == result.id and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(writing, number, code):
    process, target = writing
    process.send_signal(number)
    assert process.wait(20) == code
    assert not target.parent.exists()


def test_a_second_convert_to_a_directory_in_use_is_refused(writing, model):
    _, target = writing
    with pytest.raises(UsageError, match="Another process"):
        plain(model, target)
    assert target.with_name("snap.partial").is_dir()


def test_an_existing_target_is_not_touched(tmp_path, model):
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "precious").write_text("x")
    with pytest.raises(UsageError, match="Cannot write"):
        plain(model, tmp_path / "snap")
    assert (tmp_path / "snap" / "precious").read_text() == "x"


FULL = """
import resource, sys
from fgsnap.convert.pipeline import convert
from fgsnap.errors import FgsnapError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    convert(sys.argv[1], sys.argv[2], canary=False)
except FgsnapError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("room", [2000, 100_000])
def test_a_full_disk_leaves_nothing(tmp_path, model, room):
    target = tmp_path / "out" / "snap"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(model), str(target), str(room)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == HostError.exit_code, done.stderr
    assert "No room" in done.stdout and len(done.stdout.strip().splitlines()) == 3
    assert not target.parent.exists()


def test_a_disk_without_room_is_seen_before_anything_is_read(tmp_path, model, monkeypatch):
    free = os.statvfs(tmp_path)
    nothing = os.statvfs_result((free.f_bsize, free.f_frsize, free.f_blocks, 0, 0, *tuple(free)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: nothing)
    with pytest.raises(HostError, match="No room"):
        plain(model, tmp_path / "out" / "snap")
    assert not (tmp_path / "out").exists()


# --- refused ----------------------------------------------------------------------------------------------------------


def broken(change, config=CONFIG):
    tensors = weights(config)
    change(tensors)
    return tensors


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name, value):
    return lambda tensors: tensors.update({name: value})


Q, GATE = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"
WRONG = {
    "missing": (rename(Q, "x"), {}, SourceError, Q),
    "wrong shape": (put(Q, torch.zeros(96, 40)), {}, SourceError, "[96, 40]"),
    "transposed": (put(GATE, torch.zeros(48, 96)), {}, SourceError, "[48, 96]"),
    "too few axes": (put("model.norm.weight", torch.zeros(())), {}, SourceError, "[]"),
    "extra": (put("model.layers.2.mlp.gate_proj.weight", torch.zeros(2)), {}, SourceError, "layers.2.mlp"),
    "a bias that the config does not tell": (
        put("model.layers.0.self_attn.q_proj.bias", torch.zeros(96)), {}, SourceError, "q_proj.bias",
    ),
    "extra of a strange dtype": (put("mask", torch.zeros(2, dtype=torch.bool)), {}, SourceError, "mask"),
    "integers": (put(Q, torch.zeros(96, 48, dtype=torch.int8)), {}, UnsupportedModel, "I8"),
    "mixed fused": (put(Q, torch.zeros(96, 48, dtype=torch.float16)), {}, SourceError, "float16"),
    "mixed gate and up": (put(GATE, torch.zeros(96, 48)), {}, SourceError, "layers.1.gate_up.weight"),
    "config": (lambda tensors: None, {"rope_scaling": {"type": "mrope"}}, UnsupportedModel, "mrope"),
    "unknown key": (lambda tensors: None, {"clip_qkv": 8.0}, UnsupportedModel, "clip_qkv"),
    "quantised": (lambda tensors: None, {"quantization_config": {"bits": 4}}, UnsupportedModel, "quantization_config"),
    "family": (lambda tensors: None, {"model_type": "bert"}, UnsupportedModel, "bert"),
    "more layers than weights": (lambda tensors: None, {"num_hidden_layers": 3}, SourceError, "layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, case):
    change, extra, kind, name = WRONG[case]
    source = folder(tmp_path / "m", {**CONFIG, **extra}, broken(change))
    with pytest.raises(kind) as caught:
        plain(source, tmp_path / "out" / "snap")
    assert name in str(caught.value) and 2 <= len(caught.value.lines()) <= 3
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_convert_with_one_asked_for(tmp_path):
    source = folder(tmp_path / "m", CONFIG, broken(put(Q, torch.ones(96, 48, dtype=torch.float16))))
    plain(source, tmp_path / "snap", dtype="float32")
    assert {dtype for dtype, _, _ in at_tp1(tmp_path / "snap").values()} == {"float32"}


def test_what_is_not_needed_is_dropped_and_recorded(tmp_path):
    tensors = weights(TIED)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    }
    plain(folder(tmp_path / "m", TIED, tensors), tmp_path / "bare")
    plain(folder(tmp_path / "more", TIED, {**tensors, **extra}), tmp_path / "snap")
    assert at_tp1(tmp_path / "snap") == at_tp1(tmp_path / "bare")
    with open_snapshot(tmp_path / "snap") as snapshot:
        assert snapshot.manifest.provenance.dropped == tuple(sorted(extra))


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tensors = weights(TIED)
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    source = folder(tmp_path / "m", TIED, {**tensors, "lm_head.weight": head})
    with pytest.raises(SourceError, match="differs") as caught:
        plain(source, tmp_path / "snap")
    assert "tie_word_embeddings" in caught.value.next_step


def test_a_model_that_gives_no_numbers_fails_its_own_check(tmp_path):
    source = folder(
        tmp_path / "m", CONFIG, broken(put("model.norm.weight", torch.full((48,), float("nan")).bfloat16()))
    )
    with pytest.raises(FgsnapError) as caught:
        convert(str(source), tmp_path / "out" / "snap")
    assert "finite" in caught.value.why and "--no-canary" in caught.value.next_step
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("canary", [True, False])
def test_a_check_that_is_killed_is_told_apart(tmp_path, model, monkeypatch, canary):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(FgsnapError) as caught:
        convert(str(model), tmp_path / "out" / "snap", canary=canary)
    assert "SIGKILL" in caught.value.why and not (tmp_path / "out").exists()
    assert ("--no-canary" in caught.value.next_step) == canary


@pytest.mark.parametrize("canary", [True, False])
def test_a_fresh_process_opens_the_directory_before_it_gets_its_name(tmp_path, model, monkeypatch, canary):
    """A weight file that is not what was written is found, with and without a canary."""
    write = SnapshotWriter.write_manifest

    def and_cut(writer, manifest):
        identity = write(writer, manifest)
        os.truncate(writer.directory / "rank-00000-of-00001.safetensors", 4096)
        return identity

    monkeypatch.setattr(SnapshotWriter, "write_manifest", and_cut)
    with pytest.raises(SnapshotRefused) as caught:
        convert(str(model), tmp_path / "out" / "snap", canary=canary)
    assert "rank-00000-of-00001.safetensors" in caught.value.why and not (tmp_path / "out").exists()


def test_without_torch_only_the_canary_is_missing(tmp_path, model, monkeypatch):
    """torch.py stands for a host where torch cannot be imported."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    stages = []
    plain(model, tmp_path / "snap", tp=2, stage=stages.append)
    assert verify(tmp_path / "snap").files and stages == ["weights"]


def test_torch_is_asked_for_before_anything_is_written(tmp_path, model, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(HostError, match="torch") as caught:
        convert(str(model), tmp_path / "out" / "snap", progress=lambda *_: pytest.fail("something was written"))
    assert "fgsnap[" in caught.value.next_step and "--no-canary" in caught.value.next_step
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_converts_and_says_what_it_lacks(tmp_path, model):
    bare = plain(model, tmp_path / "bare")
    assert len(bare.notes) == 1 and "tokenizer.json" in bare.notes[0]
    source = folder(tmp_path / "m", CONFIG, weights(CONFIG), tokenizer__json={"model": {"vocab": {}}})
    assert plain(source, tmp_path / "snap").notes == ()


def test_overflow_names_the_tensor(tmp_path):
    source = folder(tmp_path / "m", CONFIG, broken(put(GATE, torch.full((96, 48), 1e6).bfloat16())))
    with pytest.raises(SourceError, match="gate_proj"):
        plain(source, tmp_path / "snap", dtype="float16")


@pytest.mark.parametrize(("tp", "dtype", "most"), [(1, "bfloat16", 48), (4, "bfloat16", 64), (4, "float32", 112)])
def test_memory_does_not_grow_with_the_tensors(tmp_path, tp, dtype, most):
    """64 MiB of weights in one tensor pass through slabs of 4 MiB, at float32 128 MiB in copies of their own."""
    config = {**CONFIG, "vocab_size": 700_000, "tie_word_embeddings": True}
    source = folder(tmp_path / "m", config, weights(config))
    program = (
        "import sys\n"
        "from fgsnap.convert.pipeline import convert\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return max(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) >> 10\n"
        "seen = [anonymous()]\n"
        "settings = {'tp': int(sys.argv[3]), 'dtype': sys.argv[4], 'canary': False, 'workers': 2}\n"
        "convert(sys.argv[1], sys.argv[2], **settings, progress=lambda *_: seen.append(anonymous()))\n"
        "print(max(seen) - seen[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "snap"), str(tp), dtype],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < most


def test_dtypes_of_a_fused_tensor_must_agree():
    spec = llama.spec(CONFIG)
    dtypes = dict.fromkeys(logical_shapes(spec), "bfloat16") | {"layers.0.k.weight": "float32"}
    with pytest.raises(SourceError, match=r"layers\.0\.qkv\.weight") as caught:
        rank_layouts(spec, 1, dtypes)
    assert "--dtype" in caught.value.next_step
