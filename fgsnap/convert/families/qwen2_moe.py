"""Qwen2-MoE: Qwen2's attention, experts beside one shared expert that a sigmoid gates, dense layers between."""

from __future__ import annotations

from collections.abc import Sequence

from fgsnap.convert.families.config import Config, activation, check_keys, count, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, EXPERTS, FUSED, HALVES, MLP, NORMS, OUTER, by_name
from fgsnap.convert.families.parts import (
    BASE,
    MOE,
    WINDOWS,
    Kind,
    checked_experts,
    decoder,
    depth,
    gated_mlp,
    heads,
    layer_types,
    refuse_unused,
    rms,
    sparse_layers,
    window_of,
)
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Experts, Layer, Mlp, Router, SharedExpert

KNOWN = (
    BASE
    | MOE
    | WINDOWS
    | frozenset("num_experts shared_expert_intermediate_size decoder_sparse_step mlp_only_layers qkv_bias".split())
)
SHARED = {
    "shared.gate": "mlp.shared_expert.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj",
    "shared.down": "mlp.shared_expert.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}


def spec(config: Config) -> DecoderSpec:
    """What a Qwen2-MoE config.json says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 32768)
    own, norm, sparse = heads(config, keys=16), rms(config), sparse_layers(config, 60)

    def layer(index: int, window: int | None) -> Layer:
        attention = Attention(
            *own, scale=own.dim**-0.5, rope=0, window=window, qkv_bias=flag(config, "qkv_bias", default=True)
        )
        if index in sparse:
            return Layer(attention=attention, experts=_experts(config), attn_in=norm, mlp_in=norm)
        return Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)

    layers = [layer(index, window_of(kind, config, 4096)) for index, kind in enumerate(_kinds(config))]
    return decoder(config, layers, norm, [rope(config, own.dim, max_length)], max_length=max_length)


def _kinds(config: Config) -> Sequence[Kind]:
    used, below = flag(config, "use_sliding_window"), count(config, "max_window_layers", 28)
    kinds: list[Kind] = [
        "sliding_attention" if used and index % 2 == 0 and index < below else "full_attention"
        for index in range(depth(config))
    ]
    return refuse_unused(config, used, layer_types(config, kinds))


def _experts(config: Config) -> Experts:
    act = activation(config, "hidden_act", "silu")
    return checked_experts(
        integer(config, "num_experts", 60),
        Mlp(inner=integer(config, "moe_intermediate_size", 1408), activation=act),
        Router("softmax", integer(config, "num_experts_per_tok", 4), renormalize=flag(config, "norm_topk_prob")),
        SharedExpert(Mlp(inner=integer(config, "shared_expert_intermediate_size", 5632), activation=act), True),
    )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's, with a tensor an expert."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP | EXPERTS | SHARED)


def fused_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where all experts are one tensor."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP | EXPERTS | FUSED | SHARED, HALVES)


FAMILY = Family("Qwen1.5-MoE, Qwen2-57B-A14B", spec, (rules, fused_rules))
