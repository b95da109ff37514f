"""A plan needs no weights, and is what conversion then does."""

from __future__ import annotations

import json

import pytest

from fgsnap.convert import families
from fgsnap.convert.families import llama
from fgsnap.convert.files import KEPT
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import SLAB, checked_ranks, kept_memory, plan, plan_source
from fgsnap.errors import SourceError, UsageError
from tests.convert.models import CONFIG, folder, weights

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_plan_is_what_is_written(tmp_path, tp):
    source = folder(tmp_path / "model", {**CONFIG, "vocab_size": 51}, weights({**CONFIG, "vocab_size": 51}))
    planned = plan_source(str(source), tp=tp)
    result = convert(str(source), tmp_path / "snap", tp=tp, canary=False)
    assert planned.bytes == result.bytes
    for rank in planned.ranks:
        assert (tmp_path / "snap" / rank.file).stat().st_size == rank.bytes
    assert len(planned.ranks) == tp and planned.dtype == "bfloat16" and planned.dtype_from == "source"


def test_only_config_json_is_needed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    planned = plan_source(str(tmp_path), tp=3)
    assert planned.possible_tp == (1, 3, 6, 9)
    assert planned.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    assert [rank.file for rank in planned.ranks] == [f"rank-{rank:05d}-of-00003.safetensors" for rank in range(3)]
    assert planned.ranks[0].tensors[:2] == ("embed.weight", "layers.0.attn_in.weight")


def test_a_degree_that_cannot_work_is_refused_with_those_that_can(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    with pytest.raises(UsageError) as caught:
        plan_source(str(tmp_path), tp=2)
    assert "1, 3, 6, 9" in caught.value.next_step


def test_bytes_of_a_real_size():
    """Llama-3-8B has 8,030,261,248 parameters; alignment adds less than a ten-thousandth."""
    planned = plan(llama.spec(LLAMA_8B), 1, "bfloat16")
    assert 1 <= planned.bytes / (8_030_261_248 * 2) < 1.0001
    assert planned.kv_bytes_per_token == 131_072
    assert SLAB <= planned.peak_memory <= 256 << 20


def test_the_peak_counts_the_process_that_computes_the_canary():
    """157 MiB of its own were measured for SmolLM2, which a plan for the converting process alone would leave out."""
    assert 157 << 20 <= plan(llama.spec(SMOLLM2), 1, "bfloat16").peak_memory <= 220 << 20


def test_more_workers_take_more_memory():
    one, many = (plan(llama.spec(SMOLLM2), 1, "bfloat16", workers=workers).peak_memory for workers in (1, 64))
    assert many > one + (1 << 30)


def test_experts_that_may_come_in_one_stack_are_kept():
    """Two of Mixtral's, gates above ups; of other models no more than KEPT is kept."""
    mixtral = {**LLAMA_8B, "model_type": "mixtral", "num_local_experts": 8}
    assert kept_memory(families.find(mixtral).spec(mixtral), "bfloat16") == 2 * (2 * 14336 * 4096 * 2)
    assert kept_memory(llama.spec(LLAMA_8B), "float32") == KEPT


def test_weights_that_ranks_share_are_put_together_for_the_canary():
    """Embedding, head and two layers of Llama-3-8B."""
    shared = 2 * (2 * 128256 * 4096 + 2 * (4096 * (4096 * 2 + 1024 * 2 + 14336 * 3)))
    planned = plan(llama.spec(LLAMA_8B), 8, "bfloat16")
    assert shared < planned.peak_memory < shared + (256 << 20)


@pytest.mark.parametrize(
    ("stated", "asked", "dtype", "origin"),
    [
        ({"torch_dtype": "float16"}, None, "float16", "source"),
        ({"dtype": "bfloat16"}, None, "bfloat16", "source"),
        ({"torch_dtype": "torch.float16"}, None, "float16", "source"),
        ({"torch_dtype": "float16"}, "float32", "float32", "asked"),
        ({}, None, "float32", "assumed"),
        ({"torch_dtype": "int4"}, None, "float32", "unknown"),
        ({"torch_dtype": ["float16"]}, None, "float32", "unknown"),
    ],
)
def test_the_dtype_of_a_plan(tmp_path, stated, asked, dtype, origin):
    config = {key: value for key, value in SMOLLM2.items() if key != "torch_dtype"} | stated
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = plan_source(str(tmp_path), dtype=asked)
    assert (planned.dtype, planned.dtype_from) == (dtype, origin)


def test_the_canary_s_memory_is_told_apart_and_only_where_it_is_recorded():
    spec = llama.spec(LLAMA_8B)
    recorded, without = (plan(spec, 2, "bfloat16", canary=canary) for canary in (True, False))
    assert recorded.canary_memory is not None and without.canary_memory is None
    assert without.peak_memory == recorded.conversion_memory < 256 << 20 < recorded.canary_memory
    assert recorded.canary_memory <= recorded.peak_memory <= recorded.canary_memory + (64 << 20)


@pytest.mark.parametrize(("tp", "hint"), [(1, "--tp"), (2, "--ranks 0,1"), (8, "--ranks 0,7")])
def test_ranks_that_do_not_exist_are_refused_with_those_that_do(tp, hint):
    with pytest.raises(UsageError) as caught:
        checked_ranks([tp], tp)
    assert f"rank {tp}" in caught.value.what and hint in caught.value.next_step


def test_a_dtype_that_does_not_exist(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    with pytest.raises(UsageError, match="float8"):
        plan_source(str(tmp_path), dtype="float8")


def test_a_config_that_cannot_be_converted_cannot_be_planned(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SMOLLM2, "logit_scale": 2.0}))
    with pytest.raises(SourceError, match="logit_scale"):
        plan_source(str(tmp_path))
