"""Llama and Mistral: pre-norm RMS, grouped-query attention with a half rotation, a gated MLP.

``model_type`` llama and mistral are one family; they differ in defaults. The context is the config's
``max_position_embeddings``: with dynamic scaling a deployment that wants more asks for it and gets the stretched table.
"""

from __future__ import annotations

import re

from fgsnap.convert.families.config import ROPE, Config, activation, check_keys, flag, integer, number, rope
from fgsnap.convert.rules import Rule, Shape, pair_to_half, rotated_first, whole
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.layout import logical_shapes
from fgsnap.spec import Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm

KNOWN = ROPE | frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias mlp_bias
    sliding_window layer_types
    """.split()
)

# What transformers assumes where a config says nothing.
DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}

MOST_LAYERS = 4096


def spec(config: Config) -> DecoderSpec:
    """What a Llama or Mistral config.json says is computed; refused by key where the spec cannot express it."""
    check_keys(config, KNOWN)
    defaults = DEFAULTS[config["model_type"]]
    width = integer(config, "hidden_size")
    max_length = integer(config, "max_position_embeddings", defaults["max_position_embeddings"])
    depth = integer(config, "num_hidden_layers")
    if depth > MOST_LAYERS:
        raise SourceError(f"config.json asks for {depth} layers.", f"No model has more than {MOST_LAYERS}.")
    attention = _attention(config, width, defaults)
    rotation = rope(config, attention.head_dim, max_length)
    if rotation.dims != attention.head_dim and rotation.proportional_head_dim is None:
        raise UnsupportedModel(
            f"The config key 'partial_rotary_factor' rotates {rotation.dims} of {attention.head_dim} head dims.",
            "Llama and Mistral rotate whole heads; readers of such a checkpoint disagree about the rest.",
            "Remove the key from config.json if it is a leftover.",
        )
    norm = Norm(kind="rms", eps=number(config, "rms_norm_eps", 1e-6))
    return DecoderSpec(
        vocab_size=integer(config, "vocab_size"),
        width=width,
        max_length=max_length,
        embedding=Embedding(width=width),
        layer_kinds=(Layer(attention=attention, mlp=_mlp(config), attn_in=norm, mlp_in=norm),),
        layers=(0,) * depth,
        head=Head(tied=flag(config, "tie_word_embeddings")),
        final_norm=norm,
        ropes=(rotation,),
    )


def _attention(config: Config, width: int, defaults: dict[str, int | None]) -> Attention:
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", _kv_default(config, defaults, heads))
    if config.get("head_dim") is None and width % heads:
        raise SourceError(
            f"hidden_size {width} does not divide into {heads} heads.", "config.json gives no head_dim either."
        )
    if heads % kv_heads:
        raise SourceError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads.",
            "num_attention_heads must be a multiple of num_key_value_heads.",
        )
    head_dim = integer(config, "head_dim", width // heads)
    bias = flag(config, "attention_bias")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=0,
        window=_window(config, defaults),
        qkv_bias=bias,
        out_bias=bias,
    )


def _kv_default(config: Config, defaults: dict[str, int | None], heads: int) -> int:
    """An absent key means the family's default, a null one as many as attention heads."""
    default = defaults["num_key_value_heads"]
    return heads if default is None or "num_key_value_heads" in config else default


def _window(config: Config, defaults: dict[str, int | None]) -> int | None:
    given = config["sliding_window"] if "sliding_window" in config else defaults["sliding_window"]
    window = None if given is None else integer({"sliding_window": given}, "sliding_window")
    if window is not None and config["model_type"] == "llama":
        raise UnsupportedModel(
            f"The config key 'sliding_window' is {window} in a checkpoint of type llama.",
            "Some readers apply it and some do not, so what the author meant is unknown.",
            "Set it to null, or model_type to 'mistral' if the window is meant.",
        )
    expected = "full_attention" if window is None else "sliding_attention"
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != expected for kind in kinds)):
        raise UnsupportedModel(
            "The config key 'layer_types' mixes kinds of attention.",
            f"Llama and Mistral have one kind; by 'sliding_window' it is {expected}.",
            "Models that alternate windows have a model_type of their own.",
        )
    return window


def _mlp(config: Config) -> Mlp:
    bias = flag(config, "mlp_bias")
    return Mlp(
        inner=integer(config, "intermediate_size"),
        activation=activation(config, "hidden_act", "silu"),
        bias=bias,
        down_bias=bias,
    )


# Logical part -> name in a Hugging Face checkpoint, name in a GGUF file.
OUTER = {
    "embed": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}
INNER = {
    "attn_in": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "out": ("self_attn.o_proj", "attn_output"),
    "mlp_in": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a Hugging Face checkpoint's."""
    _check_kind(spec)
    return tuple(_hf_rule(spec, name, shape) for name, shape in logical_shapes(spec).items())


def gguf_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How they are made of a GGUF file's, where query and key rows are in the order that rotates adjacent pairs."""
    _check_kind(spec)
    return tuple(_gguf_rule(spec, name, shape) for name, shape in logical_shapes(spec).items())


def _check_kind(spec: DecoderSpec) -> None:
    """Refuse a spec that no config of this family gives; one read from a manifest may hold anything."""
    parts = {_split(name)[1] for name in logical_shapes(spec)}
    if len(spec.layer_kinds) != 1 or len(spec.ropes) != 1 or parts - {*OUTER, *INNER}:
        raise UnsupportedModel("This decoder is none of the Llama family.", "Its manifest says it is, and is wrong.")


def _hf_rule(spec: DecoderSpec, name: str, shape: Shape) -> Rule:
    layer, part, kind = _split(name)
    source = f"{OUTER[part][0]}.{kind}" if layer is None else f"model.layers.{layer}.{INNER[part][0]}.{kind}"
    if part in ("q", "k"):
        return rotated_first(name, source, shape, _heads(spec, part), spec.ropes[0].dims)
    return whole(name, source, shape)


def _gguf_rule(spec: DecoderSpec, name: str, shape: Shape) -> Rule:
    layer, part, kind = _split(name)
    source = f"{OUTER[part][1]}.{kind}" if layer is None else f"blk.{layer}.{INNER[part][1]}.{kind}"
    if part in ("q", "k"):
        return pair_to_half(name, source, shape, _heads(spec, part))
    return whole(name, source, shape)


def _split(name: str) -> tuple[str | None, str, str]:
    """``layers.3.q.weight`` -> ("3", "q", "weight"); ``embed.weight`` -> (None, "embed", "weight")."""
    *layer, part, kind = name.split(".")
    return (layer[1] if layer else None), part, kind


def _heads(spec: DecoderSpec, part: str) -> int:
    attention = spec.layer_kinds[0].attention
    return attention.heads if part == "q" else attention.kv_heads


# A tied checkpoint may hold the output matrix a second time, under the first name beside the second.
TIED_HEAD = ("lm_head.weight", "model.embed_tokens.weight")

_COMPUTED = re.compile(r"(model\.(layers\.\d+\.self_attn\.)?)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def unused(name: str) -> bool:
    """Whether a source tensor holds only what the config says too (a GGUF source puts rope_freqs into its config)."""
    return _COMPUTED.fullmatch(name) is not None or name == "rope_freqs.weight"
