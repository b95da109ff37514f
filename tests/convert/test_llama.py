"""The Llama family: what its configs mean, compared with transformers, and what is refused by which key."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fgsnap.convert import families
from fgsnap.convert.families import llama
from fgsnap.convert.families.naming import gguf_paired_rules
from fgsnap.convert.rules import sources
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.layout import logical_shapes
from fgsnap.spec import Linear, rope_frequencies

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
MISTRAL = {**CONFIG, "model_type": "mistral"}


def spec(**changes):
    config = {**CONFIG, **changes}
    return llama.spec({key: value for key, value in config.items() if value is not ...})


def shapes_of(model_class, config):
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_the_rules_take_exactly_the_tensors_that_transformers_has(extra):
    config = {**CONFIG, **extra}
    assert sources(llama.rules(llama.spec(config))) == shapes_of(LlamaForCausalLM, LlamaConfig(**config))


def test_mistral_is_the_same_family():
    config = {**MISTRAL, "head_dim": 16, "sliding_window": 8}
    made = families.find(config).spec(config)
    assert sources(llama.rules(made)) == shapes_of(MistralForCausalLM, MistralConfig(**config))
    assert made.layer_kinds[0].attention.window == 8


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
def test_every_key_that_transformers_writes_is_known(config_class):
    """Its defaults are ours, too: an empty config and the full one that transformers makes of it say the same."""
    full = json.loads(config_class().to_json_string(use_diff=False))
    sizes = {key: full[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads")}  # fmt: skip
    assert llama.spec(full) == llama.spec({"model_type": config_class.model_type, **sizes})


def test_the_dialect_of_transformers_4_with_its_leftovers():
    """A config.json as the Hub has it (SmolLM2's keys), beside the one that transformers 5 would write."""
    old = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.04, "is_llama_config": True, "mlp_bias": False,
        "pad_token_id": 2, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 5e5,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"},
        "transformers_version": "4.42.3", "use_cache": True, "_name_or_path": "somewhere", "temperature": 0.6,
    }  # fmt: skip
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True, "dtype": "x"}
    assert spec(**old) == spec(**new)
    assert spec(**old).ropes[0].theta == 5e5


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5,
     "beta_fast": 20, "beta_slow": 2, "truncate": False},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
     "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "attention_factor": 1.3,
     "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    {"rope_type": "proportional", "factor": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values()))[:40])
@pytest.mark.parametrize("dialect", ["old", "type", "new"])
@pytest.mark.filterwarnings("ignore")
def test_rope_scalings_give_the_angles_of_transformers(scaling, dialect):
    config = {**CONFIG, "max_position_embeddings": 64}
    if dialect == "new":
        config["rope_parameters"] = {**scaling, "rope_theta": 5000.0}
    else:
        old = dict(scaling)
        if dialect == "type":
            old["type"] = old.pop("rope_type")
        config |= {"rope_theta": 5000.0, "rope_scaling": old}
    made = llama.spec(config)
    module = LlamaRotaryEmbedding(LlamaConfig(**config))
    for longest in (8, 64, 256):
        module(torch.zeros(1), torch.arange(longest)[None])
        frequencies, factor = rope_frequencies(made.ropes[0], longest)
        torch.testing.assert_close(torch.tensor(frequencies), module.inv_freq, rtol=2e-6, atol=0)
        assert factor == pytest.approx(module.attention_scaling)


@pytest.mark.filterwarnings("ignore")
def test_proportional_rotation_of_a_part_puts_the_rotated_dimensions_first():
    scaling = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0, "rope_theta": 5000.0}
    config = {**CONFIG, "rope_parameters": scaling}
    made = llama.spec(config)
    rope = made.ropes[0]
    assert (rope.dims, rope.proportional_head_dim, rope.linear) == (4, 8, Linear(2.0))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    torch.testing.assert_close(torch.tensor([*rope_frequencies(rope, 64)[0], 0.0, 0.0]), theirs)
    q = next(rule for rule in llama.rules(made) if rule.tensor == "layers.0.q.weight")
    assert len(q.takes) == 2 * 4


def test_beside_the_rope_parameters_the_original_length_wins():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    made = spec(rope_scaling=scaling, original_max_position_embeddings=32)
    assert made.ropes[0].yarn.original_length == 32


def test_two_dialects_must_agree():
    both = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    same = {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}
    assert spec(**both, rope_parameters=same) == spec(**both)
    with pytest.raises(SourceError, match="two different rotations"):
        spec(**both, rope_parameters={**same, "factor": 4})


def test_defaults_of_transformers():
    assert spec().layer_kinds[0].attention.window is None
    assert llama.spec(MISTRAL).layer_kinds[0].attention.window == 4096
    assert llama.spec({**MISTRAL, "sliding_window": None}).layer_kinds[0].attention.window is None
    assert spec(num_key_value_heads=...).layer_kinds[0].attention.kv_heads == 4
    assert spec(num_key_value_heads=None).layer_kinds[0].attention.kv_heads == 4
    wide = {**MISTRAL, "num_attention_heads": 16, "num_key_value_heads": ...}
    absent = {key: value for key, value in wide.items() if value is not ...}
    assert llama.spec(absent).layer_kinds[0].attention.kv_heads == 8
    assert llama.spec({**absent, "num_key_value_heads": None}).layer_kinds[0].attention.kv_heads == 16
    assert spec(head_dim=None).layer_kinds[0].attention.head_dim == 8


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("silu", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
    ],
)  # fmt: skip
def test_activations(name, meaning):
    assert spec(hidden_act=name).layer_kinds[0].mlp.activation == meaning


UNSUPPORTED = {
    "an unknown key": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "compressed": ({"compression_config": {"format": "int"}}, "compression_config"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "an encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    "pruned": ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
    "per layer": ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    "pairs": ({"rope_interleaved": True}, "rope_interleaved"),
    "activation": ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    "activation of a wrong type": ({"hidden_act": ["silu"]}, "silu"),
    "a window that readers ignore": ({"sliding_window": 16}, "sliding_window"),
    "mixed layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotation inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "rope type": ({"rope_scaling": {"rope_type": "mrope"}}, "mrope"),
    "rope key": ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2]}}, "mrope_section"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_spec_cannot_express_is_refused_by_name(case):
    change, name = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModel) as caught:
        spec(**change)
    assert name in caught.value.what and 1 <= len(caught.value.lines()) <= 3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.5, "high_freq_factor": 4.0}
DAMAGED = {
    "no width": ({"hidden_size": ...}, "hidden_size"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "too many layers": ({"num_hidden_layers": 10**9}, "1000000000"),
    "a size that is text": ({"vocab_size": "50"}, "vocab_size"),
    "a size that is a boolean": ({"vocab_size": True}, "vocab_size"),
    "a huge size": ({"vocab_size": 1 << 70}, "vocab_size"),
    "heads that do not share": ({"num_key_value_heads": 3}, "3 key-value heads"),
    "heads that do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 3}, "3 heads"),
    "odd heads": ({"head_dim": 7}, "rotation"),
    "eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "theta": ({"rope_theta": -1.0}, "rope_theta"),
    "theta that is infinite": ({"rope_theta": float("inf")}, "rope_theta"),
    "a flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "window": ({"sliding_window": -1}, "sliding_window"),
    "rope is a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "dynamic factor": ({"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}}, "factor"),
    "yarn theta": ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta"),
    "llama3 band": ({"rope_scaling": LLAMA3}, "low_freq_factor"),
    "longrope list": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short",
    ),
    "longrope zero": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4}}, "short",
    ),
    "rotation beyond the head": ({"partial_rotary_factor": 1.5}, "rotation"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_config_is_refused_by_key(case):
    change, name = DAMAGED[case]
    with pytest.raises(SourceError) as caught:
        spec(**change)
    assert name in caught.value.what and 1 <= len(caught.value.lines()) <= 3


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "mamba"}, {"model_type": ["llama"]}])
def test_unknown_families(config):
    with pytest.raises(SourceError, match=r"model.type"):
        families.find(config)


def test_null_means_absent_for_unknown_keys():
    assert spec(some_future_key=None, quantization_config=None) == spec()


def test_gguf_rules_permute_queries_and_keys_with_their_biases():
    made = spec(attention_bias=True)
    rules = {rule.tensor: rule for rule in gguf_paired_rules(made)}
    assert list(rules) == list(logical_shapes(made))
    assert rules["layers.1.q.weight"].takes[0].view == (4, 4, 2, 32)
    assert rules["layers.1.k.bias"].takes[0].view == (2, 4, 2)
    assert rules["layers.1.v.weight"].takes[0].order == (0, 1)
    assert rules["layers.1.q.bias"].takes[0].source == "blk.1.attn_q.bias"


def test_names_of_what_is_computed_anyway():
    unused = llama.FAMILY.unused
    assert unused("model.layers.11.self_attn.rotary_emb.inv_freq", spec(), ())
    assert unused("rope_freqs.weight", spec(), ())
    assert not unused("model.layers.11.self_attn.q_proj.bias", spec(), ())
