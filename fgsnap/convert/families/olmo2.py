"""OLMo 2 and 3: norms of what a branch gives, not of what it reads; queries and keys normed as one vector each.

OLMo 3 has windows on three layers of four, and stretches the rotation only of those without.
"""

from __future__ import annotations

from collections.abc import Sequence

from fgsnap.convert.families.config import Config, check_keys, flag, integer
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, OUTER, by_name, gguf_rules
from fgsnap.convert.families.parts import (
    BASE,
    Kind,
    decoder,
    depth,
    gated_mlp,
    heads,
    layer_types,
    refuse_unkeyed,
    rms,
    rope_of,
    window_of,
)
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, QkNorm

INNER = ATTENTION | MLP | {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def spec(config: Config) -> DecoderSpec:
    """What an OLMo 2 config.json says is computed."""
    check_keys(config, BASE)
    return _decoder(config, ["full_attention"] * depth(config), theta=10_000.0)


def windowed_spec(config: Config) -> DecoderSpec:
    """What an OLMo 3 config.json says is computed."""
    check_keys(config, BASE | {"sliding_window", "layer_types"})
    refuse_unkeyed(config)
    kinds: list[Kind] = ["sliding_attention" if (index + 1) % 4 else "full_attention" for index in range(depth(config))]
    return _decoder(config, layer_types(config, kinds), theta=500_000.0)


def _decoder(config: Config, kinds: Sequence[Kind], theta: float) -> DecoderSpec:
    max_length = integer(config, "max_position_embeddings", 2048)
    own, norm, bias = heads(config), rms(config, 1e-5), flag(config, "attention_bias")
    present = sorted({*kinds})

    def layer(kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=own.dim**-0.5,
            rope=present.index(kind),
            window=window_of(kind, config, 4096),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QkNorm(norm, scope="projection"),
        )
        return Layer(attention=attention, mlp=gated_mlp(config), attn_out=norm, mlp_out=norm)

    def scaled(kind: Kind) -> Config:
        return {**config, "rope_scaling": config.get("rope_scaling") if kind == "full_attention" else None}

    ropes = [rope_of(scaled(kind), kind, own.dim, max_length, theta=theta) for kind in present]
    return decoder(config, map(layer, kinds), norm, ropes, max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, INNER)


FAMILY = Family("OLMo 2 1B, 7B, 13B and 32B", spec, (rules,), gguf_rules=gguf_rules)
WINDOWED = Family("OLMo 3 7B and 32B", windowed_spec, (rules,), gguf_rules=gguf_rules)
