"""A snapshot beside the checkpoint it was made of, and how the numbers of two models are compared."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgsnap.cli import run_cli
from fgsnap.convert.diff import measure
from fgsnap.convert.pipeline import convert
from fgsnap.diff import diff, lines
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.snapshot.comparing import Row, Values
from fgsnap.spec import DTYPE_BYTES
from tests.convert.models import CONFIG, DTYPES, folder, weights
from tests.convert.test_pipeline import write_gguf

PROPORTIONAL = {
    **CONFIG, "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}  # fmt: skip
BIASED = {**CONFIG, "num_key_value_heads": 1, "vocab_size": 53, "attention_bias": True, "mlp_bias": True}
CONFIGS = {"plain": CONFIG, "permuted": PROPORTIONAL, "biased": BIASED}
SETTINGS = {
    "native": {}, "tp": {"tp": 4}, "packed": {"target": "cpu"}, "wide": {"dtype": "float32"},
    "cast": {"dtype": "float16", "tp": 2},
}  # fmt: skip
QUERY = "model.layers.1.self_attn.q_proj.weight"


def made(tmp_path, config=CONFIG, dtype="bfloat16", **settings):
    """A checkpoint and a snapshot of it."""
    files = {"generation_config__json": {"eos_token_id": [2]}, "tokenizer_config__json": {"bos_token": "x"}}
    source = folder(tmp_path / "model", config, weights(config, dtype), **files)
    convert(str(source), tmp_path / "snap", canary=False, **settings)
    return str(source), str(tmp_path / "snap")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_snapshot_is_what_its_checkpoint_is_converted_to(tmp_path, config, settings):
    source, snap = made(tmp_path, CONFIGS[config], **SETTINGS[settings])
    for values in (False, True):
        found = diff(source, snap, values=values)
        assert found.equal and not found.same
        assert not (found.tensors.different or found.files or found.text or found.record)
    first, second, *_ = lines(found)
    assert first.startswith(f"A  {source}  checkpoint") and second.startswith(f"B  {snap}  id ")
    assert run_cli(["diff", snap, source]) == 0


def test_a_weight_of_the_checkpoint_that_was_changed(tmp_path):
    source, snap = made(tmp_path, PROPORTIONAL, tp=3)
    tensors = weights(PROPORTIONAL)
    tensors[QUERY][5, 7] += 1
    folder(tmp_path / "model", PROPORTIONAL, tensors)
    (row,) = diff(snap, source, values=True).tensors.different
    gap = abs(float(tensors[QUERY][5, 7]) - float(weights(PROPORTIONAL)[QUERY][5, 7]))
    assert (row.name, row.values) == ("layers.1.q.weight", Values(96 * 48, 1, gap))
    assert run_cli(["diff", snap, source]) == 1


def test_another_config_and_another_eos(tmp_path):
    source, snap = made(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 96}))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    found = diff(snap, source)
    assert found.spec == (Row("max_length", 64, 96),)
    assert found.text == (Row("eos_token_ids", (2,), (2, 3)),)
    assert {row.name: row.inside for row in found.files} == {
        "config.json": (Row("max_position_embeddings", 64, 96),),
        "generation_config.json": (Row("eos_token_id", [2], [2, 3]),),
    }
    assert not found.tensors.different and not found.equal


def test_a_gguf_file_beside_the_checkpoint_it_was_made_of(tmp_path):
    """It has other names, and rows of queries and keys in another order."""
    tensors = weights(BIASED, "float32")
    write_gguf(tmp_path / "m.gguf", BIASED, tensors)
    source = folder(tmp_path / "model", BIASED, tensors)
    found = diff(str(tmp_path / "m.gguf"), str(source))
    assert not found.tensors.different and found.tensors.count > 0
    convert(str(source), tmp_path / "snap", canary=False, tp=2)
    assert not diff(str(tmp_path / "m.gguf"), str(tmp_path / "snap"), values=True).tensors.different


def test_two_dtypes_of_one_checkpoint(tmp_path):
    source, snap = made(tmp_path)
    convert(source, tmp_path / "wide", canary=False, dtype="float32", tp=2)
    found = diff(snap, str(tmp_path / "wide"), values=True)
    assert not found.equal and len(found.tensors.different) == found.tensors.count
    assert not any(row.values.differing for row in found.tensors.different)
    assert found.record == (Row("tp", 1, 2), Row("provenance.dtype", None, "float32"))


# What cannot be compared


def test_a_folder_that_is_no_model(tmp_path):
    _, snap = made(tmp_path)
    folder(tmp_path / "other", {**CONFIG, "model_type": "bert"}, {})
    with pytest.raises(UnsupportedModel, match="bert"):
        diff(snap, str(tmp_path / "other"))


def test_a_weight_that_the_snapshots_dtype_cannot_hold(tmp_path):
    source, snap = made(tmp_path, dtype="float32")
    convert(source, tmp_path / "half", canary=False, dtype="float16")
    tensors = weights(CONFIG, "float32")
    tensors[QUERY][0, 0] = 1e6
    folder(tmp_path / "model", CONFIG, tensors)
    with pytest.raises(SourceError, match="does not fit float16"):
        diff(str(tmp_path / "half"), source)
    assert len(diff(snap, source).tensors.different) == 1


def test_a_checkpoint_that_is_written_to_meanwhile(tmp_path):
    source, snap = made(tmp_path)
    with pytest.raises(SourceError, match="was changed"):
        diff(snap, source, progress=lambda *_: os.utime(tmp_path / "model" / "model.safetensors", (1, 1)))


# Numbers

FORMATS = {"float32": ("<I", "<f"), "float16": ("<H", "<e"), "bfloat16": ("<H", None)}


def number(bits, dtype):
    as_bits, as_number = FORMATS[dtype]
    if as_number is None:
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return struct.unpack(as_number, struct.pack(as_bits, bits))[0]


@st.composite
def tensors(draw):
    """Two lists of numbers, by their bits, of any dtypes; NaNs only where these are one, so that bits tell."""
    one, two = draw(st.sampled_from(list(itertools.product(DTYPES, DTYPES))))
    size = draw(st.integers(1, 20))

    def numbers(dtype):
        bits = st.integers(0, (1 << 8 * DTYPE_BYTES[dtype]) - 1)
        told = bits.filter(lambda b: one == two or not math.isnan(number(b, dtype)))
        return st.lists(told, min_size=size, max_size=size)

    first, second = draw(numbers(one)), draw(numbers(two))
    if one == two:
        kept = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        second = [a if keep else b for a, b, keep in zip(first, second, kept, strict=True)]
    return one, first, two, second


@given(tensors())
def test_numbers_are_compared_exactly(given):
    one, first, two, second = given
    pairs = [(number(a, one), number(b, two)) for a, b in zip(first, second, strict=True)]
    if one == two:
        pairs = [pair for pair, a, b in zip(pairs, first, second, strict=True) if a != b]
    else:
        pairs = [(a, b) for a, b in pairs if a != b or math.copysign(1, a) != math.copysign(1, b)]
    gaps = [abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]
    wanted = Values(len(first), len(pairs), max(gaps, default=0.0))
    packed = [
        bytearray(b"".join(struct.pack(FORMATS[dtype][0], bits) for bits in numbers))
        for dtype, numbers in ((one, first), (two, second))
    ]
    assert measure(packed[0], one, packed[1], two) == wanted
