"""Checkpoints of families whose config.json and tensors do not belong together, and decoders inside larger models."""

from __future__ import annotations

import pytest
import torch

from fgsnap.convert import families
from fgsnap.convert.folder import Folder
from fgsnap.convert.pipeline import convert
from fgsnap.convert.recipe import settle
from fgsnap.convert.rules import sources
from fgsnap.errors import SourceError, UsageError
from tests.convert.models import folder

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 4,
    "num_attention_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip
WITH_MORE_LAYERS = {
    "deepseek_v2": {**DEEPSEEK, "model_type": "deepseek_v2"},
    "deepseek_v3": {**DEEPSEEK, "model_type": "deepseek_v3"},
    "glm4_moe": {
        "model_type": "glm4_moe", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "moe_intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "max_position_embeddings": 64,
    },
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def weights(config):
    """Random tensors for every name that the family's first rules take."""
    family = families.find(config)
    shapes = sources(family.rules[0](family.spec(config)))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def settled(path, config, tensors):
    source = Folder(folder(path, config, tensors), label="local")
    try:
        return settle(source, None)
    finally:
        source.close()


def test_a_missing_expert_is_named(tmp_path):
    tensors = weights(MIXTRAL)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del tensors[gone]
    with pytest.raises(SourceError, match="is missing") as caught:
        settled(tmp_path, MIXTRAL, tensors)
    assert gone in caught.value.what


def test_leftovers_are_listed_by_name(tmp_path):
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(16),
        "model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(24, 16),
    }
    with pytest.raises(SourceError, match="does not imply") as caught:
        settled(tmp_path, MIXTRAL, weights(MIXTRAL) | extra)
    assert all(name in caught.value.what for name in extra)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"num_local_experts": 5}, "experts.4"),
        ({"intermediate_size": 25}, "wrong shape"),
        ({"num_key_value_heads": 4}, "wrong shape"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
    ],
    ids=str,
)
def test_a_config_that_lies_about_its_tensors(tmp_path, lie, words):
    with pytest.raises(SourceError) as caught:
        settled(tmp_path, {**MIXTRAL, **lie}, weights(MIXTRAL))
    assert words in caught.value.what


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("family", WITH_MORE_LAYERS)
def test_a_config_that_lies_about_its_layers(tmp_path, family, layers):
    """Families whose checkpoints may hold more layers than are computed."""
    config = WITH_MORE_LAYERS[family]
    with pytest.raises(SourceError, match=rf"model\.layers\.{min(layers, 4)}\."):
        settled(tmp_path, {**config, "num_hidden_layers": layers}, weights(config))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_the_layer_that_predicts_further_ahead_is_left_out(tmp_path, family):
    config = WITH_MORE_LAYERS[family]
    further = {
        f"model.layers.4.{name}.weight": torch.ones(16)
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "input_layernorm")
    }
    assert set(settled(tmp_path / "whole", config, weights(config) | further).dropped) == {*further}
    del further["model.layers.4.enorm.weight"]
    with pytest.raises(SourceError, match="does not imply"):
        settled(tmp_path / "without", config, weights(config) | further)


@pytest.mark.parametrize("tp", [0, 3, 8, 10**12])
def test_a_degree_that_does_not_divide_is_refused_with_those_that_do(tmp_path, tp):
    checkpoint = folder(tmp_path / "checkpoint", MIXTRAL, weights(MIXTRAL))
    with pytest.raises(UsageError, match=f"degree {tp} does not divide") as caught:
        convert(str(checkpoint), tmp_path / "snapshot", tp=tp)
    assert caught.value.next_step == "Degrees that work: 1, 2, 4."
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "nothing was written"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_decoder_beside_a_vision_tower_is_the_same_decoder(tmp_path, prefix):
    tensors = weights(GEMMA3)
    text = folder(tmp_path / "text", GEMMA3, tensors)
    inside = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    seen = {"vision_tower.embeddings.weight": torch.zeros(3), "multi_modal_projector.weight": torch.zeros(2, 2)}
    whole = folder(tmp_path / "whole", {"model_type": "gemma3", "text_config": GEMMA3}, inside | seen)
    for checkpoint in (text, whole):
        convert(str(checkpoint), checkpoint / "snapshot", tp=1, canary=False)
    rank = "snapshot/rank-00000-of-00001.safetensors"
    assert (text / rank).read_bytes() == (whole / rank).read_bytes()
