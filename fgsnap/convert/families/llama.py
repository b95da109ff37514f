"""Llama and Mistral: pre-norm RMS, grouped-query attention with a half rotation, a gated MLP.

``model_type`` llama and mistral are one family; they differ in defaults. The context is the config's
``max_position_embeddings``: with dynamic scaling a deployment that wants more asks for it and gets the stretched table.
"""

from __future__ import annotations

from functools import partial

from fgsnap.convert.families.config import ROPE, Config, activation, check_keys, flag, integer, number, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, Make, by_name
from fgsnap.convert.rules import Rule, pair_to_half, rotated_first
from fgsnap.errors import SourceError, UnsupportedModel
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


# What a GGUF file calls them.
GGUF_OUTER = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
GGUF_INNER = {
    "attn_in": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
    "mlp_in": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a Hugging Face checkpoint's."""
    attention, dims = _only_kind(spec).attention, spec.ropes[0].dims
    how: dict[str, Make] = {
        "q": partial(rotated_first, heads=attention.heads, dims=dims),
        "k": partial(rotated_first, heads=attention.kv_heads, dims=dims),
    }
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP, how)


def gguf_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How they are made of a GGUF file's, where query and key rows are in the order that rotates adjacent pairs."""
    attention = _only_kind(spec).attention
    how: dict[str, Make] = {
        "q": partial(pair_to_half, heads=attention.heads),
        "k": partial(pair_to_half, heads=attention.kv_heads),
    }
    return by_name(spec, GGUF_OUTER, GGUF_INNER, how, "blk.{layer}.")


def _only_kind(spec: DecoderSpec) -> Layer:
    """Refuse a spec that no config of this family gives; one read from a manifest may hold anything."""
    if len(spec.layer_kinds) != 1 or len(spec.ropes) != 1:
        raise UnsupportedModel("This decoder is none of the Llama family.", "Its manifest says it is, and is wrong.")
    return spec.layer_kinds[0]


FAMILY = Family(
    "Llama 1, 2, 3, 3.1, 3.2, 3.3, CodeLlama, SmolLM, SmolLM2, TinyLlama; Mistral 7B, Nemo and Small",
    spec,
    (rules,),
    gguf_rules=gguf_rules,
)
