"""GPT-OSS: sinks in the softmax, windows on every other layer, experts with a clamped activation, biases everywhere.

Published weights hold the experts in MXFP4, which the source gives as numbers, all rows of all experts in one matrix;
others hold them as plain stacks, each matrix the other way round.
"""

from __future__ import annotations

import math
from functools import partial

from fgsnap.convert.families.config import ASK, Config, check_keys, integer, number, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, NORMS, OUTER, Make, by_name, gguf_rules
from fgsnap.convert.families.parts import (
    BASE,
    MOE,
    Kind,
    checked_experts,
    decoder,
    depth,
    heads,
    layer_types,
    window_of,
)
from fgsnap.convert.rules import Rule, Shape, rule, take
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Layer, Mlp, Norm, Rope, Router

KNOWN = (
    BASE
    | MOE
    | frozenset(
        """
    sliding_window layer_types num_local_experts experts_per_token swiglu_alpha swiglu_limit initial_context_length
    """.split()
    )
)
ALPHA = 1.702  # of the activation; its kernel has no other
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
PLAIN = {
    "router": "mlp.router",
    "sinks.weight": "self_attn.sinks",
    **dict.fromkeys(("experts.gate.weight", "experts.up.weight"), "mlp.experts.gate_up_proj"),
    **dict.fromkeys(("experts.gate.bias", "experts.up.bias"), "mlp.experts.gate_up_proj_bias"),
    "experts.down.weight": "mlp.experts.down_proj",
    "experts.down.bias": "mlp.experts.down_proj_bias",
}
MXFP4 = PLAIN | {
    **dict.fromkeys(("experts.gate.weight", "experts.up.weight"), "mlp.experts.gate_up_proj_blocks"),
    "experts.down.weight": "mlp.experts.down_proj_blocks",
}
GGUF = {"mlp_in": "post_attention_norm", "sinks.weight": "attn_sinks.weight"}


def spec(config: Config) -> DecoderSpec:
    """What a GPT-OSS config.json says is computed."""
    check_keys(config, KNOWN)
    if number(config, "swiglu_alpha", ALPHA) != ALPHA:
        raise UnsupportedModel(
            f"The config key 'swiglu_alpha' is {config['swiglu_alpha']}.", f"Supported is {ALPHA}.", ASK
        )
    max_length = integer(config, "max_position_embeddings", 131072)
    own = heads(config, keys=8, dim=64)
    norm = Norm(kind="rms", eps=number(config, "rms_norm_eps", 1e-5), float32_weight=True)
    mlp = Mlp(
        inner=integer(config, "intermediate_size", 2880),
        activation="clamped_swiglu",
        bias=True,
        down_bias=True,
        clamp=number(config, "swiglu_limit", 7.0),
    )
    router = Router("softmax", integer(config, "num_experts_per_tok", 4), select_first=True, bias=True)
    experts = checked_experts(integer(config, "num_local_experts", 128), mlp, router)

    def layer(kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=own.dim**-0.5,
            rope=0,
            window=window_of(kind, config, 128),
            sinks=True,
            qkv_bias=True,
            out_bias=True,
        )
        return Layer(attention=attention, experts=experts, attn_in=norm, mlp_in=norm)

    kinds: list[Kind] = ["full_attention" if index % 2 else "sliding_attention" for index in range(depth(config))]
    layers = map(layer, layer_types(config, kinds))
    return decoder(config, layers, norm, [_rotation(config, own.dim, max_length)], max_length=max_length)


def _rotation(config: Config, dim: int, max_length: int) -> Rope:
    """Stretched by YaRN, where the config says nothing of how."""
    silent = not config.get("rope_scaling") and config.get("rope_parameters") is None
    return rope({**config, "rope_parameters": YARN} if silent else config, dim, max_length, theta=150_000.0)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of plain stacks: [experts, in, out], gates and ups in turn."""
    how: dict[str, Make] = {"experts.gate": _every_other(0), "experts.up": _every_other(1), "experts.down": _down}
    return by_name(spec, OUTER, NORMS | ATTENTION | PLAIN, how)


def mxfp4_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How they are made of the published weights: [experts * out, in], gates and ups in turn."""
    how: dict[str, Make] = {
        "experts.gate": _every_other_row(0), "experts.up": _every_other_row(1), "experts.down": _one_matrix,
    }  # fmt: skip
    return by_name(spec, OUTER, NORMS | ATTENTION | MXFP4, how)


def _every_other(index: int) -> Make:
    def make(name: str, source: str, shape: Shape) -> Rule:
        count, inner, *width = shape
        if not width:
            return _every_other_row(index)(name, source, shape)
        view = (count, *width, inner, 2)
        piece = take(source, (count, *width, 2 * inner), view, {3: (index, index + 1)}, (0, 2, 3, 1))
        return rule(name, shape, (piece,))

    return make


def _every_other_row(index: int) -> Make:
    def make(name: str, source: str, shape: Shape) -> Rule:
        count, inner, *width = shape
        whole = (count * 2 * inner, *width) if width else (count, 2 * inner)
        return rule(name, shape, (take(source, whole, (count, inner, 2, *width), {2: (index, index + 1)}),))

    return make


def _down(name: str, source: str, shape: Shape) -> Rule:
    if len(shape) == 2:
        return rule(name, shape, (take(source, shape),))
    count, out, inner = shape
    return rule(name, shape, (take(source, (count, inner, out), order=(0, 2, 1)),))


def _one_matrix(name: str, source: str, shape: Shape) -> Rule:
    *rows, width = shape
    return rule(name, shape, (take(source, shape if len(rows) == 1 else (math.prod(rows), width), shape),))


FAMILY = Family(
    "gpt-oss-20b, gpt-oss-120b",
    spec,
    (rules,),
    refused="A swiglu_alpha other than 1.702.",
    quantised_rules=(mxfp4_rules,),
    gguf_rules=partial(gguf_rules, names=GGUF),
)
