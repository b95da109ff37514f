"""SmolLM3: Llama's shape; every fourth layer does not rotate."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, by_name, gguf_paired_rules
from fgsnap.convert.families.parts import (
    BASE,
    WINDOWS,
    Kind,
    decoder,
    gated_mlp,
    heads,
    layer_types,
    refuse_unused,
    rms,
    rotating_layers,
    window_of,
)
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer

KNOWN = BASE | WINDOWS | frozenset("no_rope_layers no_rope_layer_interval mlp_bias".split())


def spec(config: Config) -> DecoderSpec:
    """What a SmolLM3 config.json says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 32768)
    own, norm, bias = heads(config, keys=4), rms(config), flag(config, "attention_bias")
    used = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    rotating = rotating_layers(config)
    kinds: list[Kind] = ["sliding_attention" if used and not rotates else "full_attention" for rotates in rotating]

    def layer(rotates: bool, kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=own.dim**-0.5,
            rope=0 if rotates else None,
            window=window_of(kind, config),
            qkv_bias=bias,
            out_bias=bias,
        )
        mlp = gated_mlp(config, bias=flag(config, "mlp_bias"))
        return Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)

    layers = map(layer, rotating, refuse_unused(config, used, layer_types(config, kinds)))
    rotation = rope(config, own.dim, max_length, theta=2_000_000.0)
    return decoder(config, layers, norm, [rotation], max_length=max_length, tied=True)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


FAMILY = Family("SmolLM3-3B", spec, (rules,), gguf_rules=gguf_paired_rules)
