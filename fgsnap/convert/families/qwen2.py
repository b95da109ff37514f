"""Qwen2 and Qwen2.5: Llama's shape with biases on queries, keys and values; windows on upper layers if asked for."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, check_keys, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, by_name, gguf_rules
from fgsnap.convert.families.parts import BASE, WINDOWS, decoder, gated_mlp, heads, rms, window_of, windows_above
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer


def spec(config: Config) -> DecoderSpec:
    """What a Qwen2 config.json says is computed."""
    check_keys(config, BASE | WINDOWS)
    max_length = integer(config, "max_position_embeddings", 32768)
    own, norm = heads(config, keys=32), rms(config)

    def layer(window: int | None) -> Layer:
        attention = Attention(*own, scale=own.dim**-0.5, rope=0, window=window, qkv_bias=True)
        return Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)

    layers = [layer(window_of(kind, config, 4096)) for kind in windows_above(config)]
    return decoder(config, layers, norm, [rope(config, own.dim, max_length)], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


FAMILY = Family("Qwen2, Qwen2.5", spec, (rules,), gguf_rules=gguf_rules)
