"""What a config.json leaves out is what transformers' config class says."""

from __future__ import annotations

import json

import pytest
import transformers

from fgsnap.convert import families
from fgsnap.convert.families import FAMILIES
from fgsnap.errors import UnsupportedModel

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}
OWN_SIZES = {
    "gpt2": {"vocab_size": 1000, "n_embd": 1024, "n_layer": 8, "n_head": 32},
    "gptj": {"vocab_size": 1000, "n_embd": 1024, "n_layer": 8, "n_head": 8},
    "falcon": {key: value for key, value in SIZES.items() if key != "intermediate_size"},
    "opt": {**{key: value for key, value in SIZES.items() if key != "intermediate_size"}, "ffn_dim": 512},
}
INSIDE = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
REMOTE = {"qwen"}  # its config class lies beside its weights
KEYED = {"gemma3", "gemma3_text", "olmo3"}  # by kind of layer
ROTATING = sorted(
    {*FAMILIES} - REMOTE - {"gpt2", "gptj", "opt", "phi3"}
)  # Phi-3 knows longrope alone, which has no defaults


def minimal(family, **changes):
    """A config.json of sizes and ``changes`` alone."""
    if family in INSIDE:
        return {"model_type": family, "text_config": minimal(INSIDE[family], **changes)}
    return {"model_type": family, **OWN_SIZES.get(family, SIZES), **changes}


def full(config):
    """The config.json that transformers writes of one."""
    settings = json.loads(json.dumps(config))  # its classes write into what they are given
    made = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return json.loads(made.to_json_string(use_diff=False))


def same(config):
    whole = full(config)
    return families.find(config).spec(config) == families.find(whole).spec(whole)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - REMOTE))
def test_a_config_of_sizes_alone(family):
    assert same(minimal(family))


@pytest.mark.parametrize("family", ROTATING)
def test_a_scaled_rotation_without_a_base(family):
    assert same(minimal(family, rope_scaling={"rope_type": "linear", "factor": 4.0}))


@pytest.mark.parametrize("family", sorted({*ROTATING} - KEYED))
def test_a_rotation_of_the_newer_dialect_without_a_base(family):
    assert same(minimal(family, rope_parameters={"rope_type": "linear", "factor": 4.0}))


@pytest.mark.parametrize("family", sorted(KEYED))
def test_a_rotation_that_does_not_say_for_which_layers_it_is(family):
    """transformers ignores it."""
    config = minimal(family, rope_parameters={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(UnsupportedModel, match="rope_parameters"):
        families.find(config).spec(config)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"])
@pytest.mark.parametrize("begin", [3, 8])
def test_windows_without_a_list_of_layers(family, begin):
    assert same(minimal(family, use_sliding_window=True, sliding_window=11, max_window_layers=begin))


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_a_rotation_of_one_kind_of_layers(family, kind):
    assert same(minimal(family, rope_parameters={kind: {"rope_type": "linear", "factor": 4.0}}))
