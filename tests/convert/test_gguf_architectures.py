"""GGUF files of every architecture that is read: each gives the snapshot that its checkpoint gives, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert import gguf_tokenizer
from fgsnap.convert.families import FAMILIES
from fgsnap.convert.gguf_config import ARCHITECTURES
from fgsnap.convert.opening import open_source
from fgsnap.convert.pipeline import convert
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.snapshot import open_snapshot
from tests.convert.gguf_files import as_gguf
from tests.convert.models import at_tp1


class Case(NamedTuple):
    """A tiny checkpoint, and what llama.cpp's converter writes for its architecture besides what it always writes."""

    architecture: str
    family: str
    config: dict[str, Any]
    also: Callable[[gguf.GGUFWriter, dict[str, Any]], None] = lambda writer, config: None
    vectors: dict[str, list[float]] | None = None


def gemma2(writer, config):
    writer.add_sliding_window(config["sliding_window"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def gemma3(writer, config):
    writer.add_sliding_window(config["sliding_window"])


def linear(writer, config):
    gemma3(writer, config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def granite(writer, config):
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_attention_scale(config["attention_multiplier"])


def experts(writer, config):
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def gpt_oss(writer, config):
    experts(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def olmo3(writer, config):
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def phi3(writer, config):
    writer.add_sliding_window(config["sliding_window"] or 0)
    writer.add_rope_dimension_count(8)
    writer.add_rope_scaling_orig_ctx_len(256)


def longrope(writer, config):
    phi3(writer, config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_attn_factors(1.25)


SHORT, LONG = [1.0, 1.25, 2.0, 2.5], [1.0, 2.5, 4.0, 7.5]
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 11}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT, "long_factor": LONG}
CASES = {
    "llama": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case("llama", "mistral", {"sliding_window": 11, "head_dim": 12}, lambda w, c: w.add_sliding_window(11)),
    "mixtral": Case("llama", "mixtral", {"num_local_experts": 4, "sliding_window": None}, experts),
    "gemma2": Case("gemma2", "gemma2", GEMMA, gemma2),
    "gemma3": Case("gemma3", "gemma3_text", {**GEMMA, "num_hidden_layers": 7}, gemma3),
    "gemma3, stretched": Case(
        "gemma3", "gemma3_text", {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, linear
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11, "head_dim": 12,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "truncate": False,
                             "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128}},
        gpt_oss,
    ),
    "granite": Case(
        "granite",
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
        granite,
    ),
    "olmo2": Case("olmo2", "olmo2", {}),
    "olmo3": Case("olmo2", "olmo3", {"sliding_window": 11, "num_hidden_layers": 5}, olmo3),
    "phi3": Case("phi3", "phi3", {"sliding_window": 11}, phi3),
    "phi3, long": Case(
        "phi3",
        "phi3",
        {"rope_parameters": {**LONGROPE, "attention_factor": 1.25}, "original_max_position_embeddings": 256,
         "max_position_embeddings": 1024, "sliding_window": None},
        longrope,
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    ),
    "qwen2": Case("qwen2", "qwen2", {}),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 12}),
    "qwen3moe": Case(
        "qwen3moe",
        "qwen3_moe",
        {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
        experts,
    ),
    "smollm3": Case("smollm3", "smollm3", {"num_hidden_layers": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_what_its_checkpoint_gives(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    # Weights of bfloat16, as published ones are: 1 + w is then exact.
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", case.family, "bfloat16", **case.config)
    file = as_gguf(checkpoint, tmp_path / "model.gguf", case.architecture, case.also, case.vectors)
    for source, made in ((checkpoint, "theirs"), (file, "ours")):
        convert(str(source), tmp_path / made, dtype="float32", canary=False)
    with open_snapshot(tmp_path / "ours") as ours, open_snapshot(tmp_path / "theirs") as theirs:
        assert ours.manifest.spec == theirs.manifest.spec
        assert ours.manifest.provenance.family in FAMILIES
    assert at_tp1(tmp_path / "ours") == at_tp1(tmp_path / "theirs")


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == {*ARCHITECTURES}


# What a file says, and what is known by its architecture.

GEMMA3: dict[str, Any] = {
    "block_count": 18,
    "context_length": 64,
    "embedding_length": 640,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "attention.sliding_window": 512,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
}


def config_of(path: Path, architecture: str, keys: dict[str, Any], norm: Any = None) -> dict[str, Any]:
    writer = gguf.GGUFWriter(path, architecture)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        adders[type(value)](f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32) if norm is None else norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config: dict[str, Any] = open_source(str(path)).config
    return config


def test_what_gemma_does_not_say_is_known_by_its_architecture(tmp_path: Path) -> None:
    config = config_of(tmp_path / "m.gguf", "gemma3", GEMMA3)
    assert (config["model_type"], config["query_pre_attn_scalar"]) == ("gemma3_text", 256)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert not {"layer_types", "final_logit_softcapping", "rope_scaling"} & {*config}
    largest = config_of(tmp_path / "27b.gguf", "gemma3", {**GEMMA3, "block_count": 62})
    assert largest["query_pre_attn_scalar"] == 160


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope.freq_base_swa": 2e4}, {"rope_local_base_freq": 2e4}),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        ({"attention.sliding_window_pattern": 6}, {}),
        (
            {"block_count": 3, "attention.sliding_window_pattern": [True, False, True]},
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
    ],
    ids=str,
)
def test_what_a_file_does_say_counts(tmp_path: Path, keys: dict[str, Any], said: dict[str, Any]) -> None:
    config = config_of(tmp_path / "m.gguf", "gemma3", {**GEMMA3, **keys})
    assert {key: config.get(key) for key in said} == said


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("gemma3", {"attention.sliding_window": None}, r"gemma3\.attention\.sliding_window is None"),
        ("gemma3", {"rope.freq_base": None}, r"gemma3\.rope\.freq_base is None"),
        ("gemma3", {"attention.sliding_window_pattern": 4}, "sliding_window_pattern is 4"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "A yes or no a layer"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"gemma3\.attn_logit_softcapping is not known"),
        ("gemma3", {"rope.dimension_count": 128}, "rope.dimension_count is 128"),
        ("qwen3", {"rope.freq_base_swa": 1e4}, r"qwen3\.attention\.sliding_window is not known"),
        ("qwen3moe", {"attention.sliding_window": None}, r"qwen3moe\.expert_count is None"),
        ("granite", {"attention.sliding_window": None}, r"granite\.logit_scale is None"),
        ("phi3", {"rope.scaling.type": "longrope"}, r"rope\.scaling\.type is 'longrope'"),
        ("llama", {"expert_count": 8}, r"llama\.expert_used_count is None"),
    ],
    ids=str,
)
def test_a_file_that_lacks_something_or_says_more_is_refused(
    tmp_path: Path, architecture: str, keys: dict[str, Any], words: str
) -> None:
    given = {key: value for key, value in {**GEMMA3, **keys}.items() if value is not None}
    with pytest.raises(SourceError, match=words) as caught:
        config_of(tmp_path / "m.gguf", architecture, given)
    assert len(caught.value.lines()) <= 3


@pytest.mark.parametrize("architecture", ["gpt2", "falcon", "gemma3n", "granitemoe", "mamba", "t5"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{architecture}'") as caught:
        config_of(tmp_path / "m.gguf", architecture, {})
    assert all(name in caught.value.why for name in ARCHITECTURES)


def test_norms_of_one_plus_w_must_be_float32(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="output_norm"):
        config_of(tmp_path / "m.gguf", "gemma3", GEMMA3, np.ones(32, np.float16))


# Gemma's tokenizer.


def gemma_vocabulary() -> dict[str, Any]:
    """A small vocabulary of Gemma's kind: control tokens, runs, bytes, then pieces by score, as llama.cpp stores it."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    runs = [mark * count for mark in ("\n", " ", "\t") for count in range(1 if mark == "\n" else 2, 6)]
    pieces = ["▁t", "he", "▁the", "▁a", "aa", "aaa", "▁▁a", "er", "in", "th", "▁th", "▁in"]
    letters = ["▁", "\t", *"aehinrt<>b"]
    tokens = [*control, *runs, "<b>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    kinds = [3] * len(control) + [4] * (len(runs) + 1) + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [-1000.0] * (len(control) + len(runs) + 1 + 256) + [-float(at) for at in range(len(pieces) + len(letters))]
    return {
        "general.architecture": "gemma3",
        "gemma3.context_length": 64,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def test_gemma_merges_are_those_of_its_own_converter() -> None:
    """transformers makes them of the original vocabulary, where runs have U+2581 for a blank and the score 0."""
    keys = gemma_vocabulary()
    tokens = [token if token.strip(" ") else "▁" * len(token) for token in keys["tokenizer.ggml.tokens"]]
    kinds, scores = keys["tokenizer.ggml.token_type"], keys["tokenizer.ggml.scores"]
    theirs = {token: 0.0 if kind == 4 else score for token, kind, score in zip(tokens, kinds, scores, strict=True)}
    expected = generate_merges({token: at for at, token in enumerate(tokens)}, theirs)
    files = gguf_tokenizer.text_files(keys, "m.gguf")
    made = json.loads(files["tokenizer.json"])
    assert [tuple(merge) for merge in made["model"]["merges"]] == expected
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the  in", ["▁▁", "in"]),
        ("   a", ["▁▁▁", "a"]),
        ("a\n\n\na", ["a", "\n\n\n", "a"]),
        ("\t\ta", ["\t\t", "a"]),
        ("<b>é", ["<b>", "<0xC3>", "<0xA9>"]),
        ("aaa", ["aaa"]),
        ("aaaa", ["aa", "aa"]),
        ("<eos>", ["<eos>"]),
    ],
)
def test_gemma_pieces_that_are_known(text: str, expected: list[str]) -> None:
    tokenizer = Tokenizer.from_str(gguf_tokenizer.text_files(gemma_vocabulary(), "m.gguf")["tokenizer.json"].decode())
    assert tokenizer.encode(text, add_special_tokens=False).tokens[-len(expected) :] == expected
    found = tokenizer.encode(text)
    assert found.tokens[0] == "<bos>"
    assert tokenizer.decode(found.ids[1:], skip_special_tokens=False) == text
