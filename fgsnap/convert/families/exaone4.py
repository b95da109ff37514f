"""EXAONE 4: OLMo 2's norms of branches, norms of each query and key head; the large one has windows on three layers of
four, and does not rotate on the fourth.
"""

from __future__ import annotations

from collections.abc import Sequence

from fgsnap.convert.families.config import Config, check_keys, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, OUTER, by_name
from fgsnap.convert.families.parts import BASE, Kind, decoder, depth, gated_mlp, heads, layer_types, rms, window_of
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, QkNorm

INNER = ATTENTION | MLP | {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def spec(config: Config) -> DecoderSpec:
    """What an EXAONE 4 config.json says is computed."""
    check_keys(config, BASE | frozenset("sliding_window sliding_window_pattern layer_types".split()))
    max_length = integer(config, "max_position_embeddings", 2048)
    own, norm = heads(config, keys=32), rms(config, 1e-5)
    windowed = config.get("sliding_window", 4096) is not None

    def layer(kind: Kind) -> Layer:
        rotates = kind == "sliding_attention" or not windowed
        attention = Attention(
            *own,
            scale=own.dim**-0.5,
            rope=0 if rotates else None,
            window=window_of(kind, config, 4096),
            qk_norm=QkNorm(norm),
        )
        return Layer(attention=attention, mlp=gated_mlp(config), attn_out=norm, mlp_out=norm)

    layers = map(layer, layer_types(config, _kinds(config, windowed)))
    return decoder(config, layers, norm, [rope(config, own.dim, max_length)], max_length=max_length)


def _kinds(config: Config, windowed: bool) -> Sequence[Kind]:
    """``sliding_window_pattern`` is a number of layers, or a word such as LLLG: local and global ones in turn."""
    pattern = config.get("sliding_window_pattern", 4)
    count = depth(config)
    if not windowed:
        return ["full_attention"] * count
    if isinstance(pattern, str) and pattern:
        return [_local(pattern[index % len(pattern)] == "L") for index in range(count)]
    step = integer({"sliding_window_pattern": pattern}, "sliding_window_pattern")
    return [_local((index + 1) % step != 0) for index in range(count)]


def _local(local: bool) -> Kind:
    return "sliding_attention" if local else "full_attention"


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, INNER)


FAMILY = Family("EXAONE 4.0 1.2B and 32B", spec, (rules,))
