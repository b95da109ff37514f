"""Qwen3: Llama's shape with norms of each query and key head, before the rotation."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, by_name, gguf_rules
from fgsnap.convert.families.parts import BASE, WINDOWS, decoder, gated_mlp, heads, rms, window_of, windows_above
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, QkNorm


def spec(config: Config) -> DecoderSpec:
    """What a Qwen3 config.json says is computed."""
    check_keys(config, BASE | WINDOWS)
    max_length = integer(config, "max_position_embeddings", 32768)
    own, norm, bias = heads(config, keys=32, dim=128), rms(config), flag(config, "attention_bias")

    def layer(window: int | None) -> Layer:
        attention = Attention(
            *own, scale=own.dim**-0.5, rope=0, window=window, qkv_bias=bias, out_bias=bias, qk_norm=QkNorm(norm)
        )
        return Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)

    layers = [layer(window_of(kind, config, 4096)) for kind in windows_above(config)]
    return decoder(config, layers, norm, [rope(config, own.dim, max_length)], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


FAMILY = Family("Qwen3", spec, (rules,), gguf_rules=gguf_rules)
