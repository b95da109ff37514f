"""Gemma 2: four norms a layer that multiply by 1 + w, scaled embeddings, soft caps, windows on every other layer."""

from __future__ import annotations

import math

from fgsnap.convert.families.config import ASK, Config, activation, check_keys, flag, integer, number, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, OUTER, by_name, gguf_rules
from fgsnap.convert.families.parts import BASE, Kind, decoder, depth, heads, layer_types, window_of
from fgsnap.convert.rules import Rule
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm

KNOWN = BASE | frozenset(
    """
    hidden_activation query_pre_attn_scalar sliding_window layer_types final_logit_softcapping
    attn_logit_softcapping use_bidirectional_attention sliding_window_size
    """.split()
)
NORMS = {
    "attn_in": "input_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}


def spec(config: Config) -> DecoderSpec:
    """What a Gemma 2 config.json says is computed."""
    check_keys(config, KNOWN)
    refuse_both_ways(config)
    max_length, width = integer(config, "max_position_embeddings", 8192), integer(config, "hidden_size")
    own, norm, bias = heads(config, keys=4, dim=256), gemma_norm(config), flag(config, "attention_bias")

    def layer(kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            rope=0,
            window=window_of(kind, config, 4096),
            softcap=softcap(config, "attn_logit_softcapping", 50.0),
            qkv_bias=bias,
            out_bias=bias,
        )
        return Layer(attention=attention, mlp=gemma_mlp(config), attn_in=norm, attn_out=norm, mlp_in=norm, mlp_out=norm)

    kinds: list[Kind] = ["full_attention" if index % 2 else "sliding_attention" for index in range(depth(config))]
    return decoder(
        config,
        map(layer, layer_types(config, kinds)),
        norm,
        [rope(config, own.dim, max_length)],
        max_length=max_length,
        embedding=Embedding(width=width, scale=math.sqrt(width), round_scale=True),
        head=Head(
            tied=flag(config, "tie_word_embeddings", default=True),
            softcap=softcap(config, "final_logit_softcapping", 30.0),
        ),
    )


def refuse_both_ways(config: Config) -> None:
    """Attention that sees what comes later."""
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedModel(
            "The config key 'use_bidirectional_attention' is true.", "fgsnap serves decoders only.", ASK
        )


def gemma_norm(config: Config) -> Norm:
    """RMS, times 1 + w, all in float32."""
    return Norm(kind="rms", eps=number(config, "rms_norm_eps", 1e-6), unit_offset=True, float32_weight=True)


def gemma_mlp(config: Config) -> Mlp:
    """A gated one; ``hidden_activation`` is what counts, ``hidden_act`` a leftover."""
    act = activation(config, "hidden_activation", "gelu_pytorch_tanh")
    return Mlp(inner=integer(config, "intermediate_size"), activation=act)


def softcap(config: Config, key: str, default: float | None) -> float | None:
    """A soft cap; null means that there is none, an absent key the family's."""
    if key in config and config[key] is None:
        return None
    return default if key not in config else number(config, key)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


FAMILY = Family(
    "Gemma 2", spec, (rules,), refused="Bidirectional attention (use_bidirectional_attention).", gguf_rules=gguf_rules
)
