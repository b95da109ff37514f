"""StarCoder2: Llama's shape with layer norms, an MLP without a gate, biases everywhere, and a window on some."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, activation, check_keys, flag, integer, only, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, NORMS, OUTER, by_name
from fgsnap.convert.families.parts import BASE, decoder, depth, heads, layer_norm, optional_window
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, Mlp

KNOWN = BASE | frozenset("norm_epsilon norm_type mlp_type use_bias sliding_window".split())
INNER = NORMS | ATTENTION | {"up": "mlp.c_fc", "down": "mlp.c_proj"}


def spec(config: Config) -> DecoderSpec:
    """What a StarCoder2 config.json says is computed."""
    check_keys(config, KNOWN)
    only(config, "norm_type", "layer_norm")
    only(config, "mlp_type", "default")
    max_length = integer(config, "max_position_embeddings", 4096)
    own, norm = heads(config, keys=2), layer_norm(config, "norm_epsilon")
    bias = flag(config, "use_bias", default=True)
    attention = Attention(
        *own, scale=own.dim**-0.5, rope=0, window=optional_window(config), qkv_bias=bias, out_bias=bias
    )
    mlp = Mlp(
        inner=integer(config, "intermediate_size", 12288),
        activation=activation(config, "hidden_act", "gelu_pytorch_tanh"),
        gated=False,
        bias=bias,
        down_bias=bias,
    )
    layer = Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)
    rotation = rope(config, own.dim, max_length)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length, tied=True)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, INNER)


FAMILY = Family("StarCoder2 3B, 7B and 15B", spec, (rules,), refused="Other norms and MLPs (norm_type, mlp_type).")
