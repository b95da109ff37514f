"""Qwen3-MoE: Qwen3's attention and experts without a shared one."""

from __future__ import annotations

from fgsnap.convert.families.config import ASK, Config, activation, check_keys, count, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, EXPERTS, FUSED, HALVES, MLP, NORMS, OUTER, by_name, gguf_rules
from fgsnap.convert.families.parts import (
    BASE,
    MOE,
    WINDOWS,
    checked_experts,
    decoder,
    depth,
    gated_mlp,
    heads,
    rms,
    sparse_layers,
)
from fgsnap.convert.rules import Rule
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Experts, Layer, Mlp, QkNorm, Router

# The last three are leftovers in Qwen3-Coder's config.
KNOWN = (
    BASE
    | MOE
    | WINDOWS
    | frozenset(
        """
    num_experts num_local_experts decoder_sparse_step mlp_only_layers
    qkv_bias use_qk_norm shared_expert_intermediate_size
    """.split()
    )
)


def spec(config: Config) -> DecoderSpec:
    """What a Qwen3-MoE config.json says is computed; transformers gives every layer the same window, or none."""
    check_keys(config, KNOWN)
    _refuse_meant(config)
    max_length = integer(config, "max_position_embeddings", 32768)
    own, norm, bias = heads(config, keys=4), rms(config), flag(config, "attention_bias")
    window = integer(config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
    attention = Attention(
        *own, scale=own.dim**-0.5, rope=0, window=window, qkv_bias=bias, out_bias=bias, qk_norm=QkNorm(norm)
    )
    with_experts = sparse_layers(config, 128)
    dense = Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)
    sparse = Layer(attention=attention, experts=_experts(config), attn_in=norm, mlp_in=norm) if with_experts else dense
    layers = [sparse if index in with_experts else dense for index in range(depth(config))]
    return decoder(config, layers, norm, [rope(config, own.dim, max_length)], max_length=max_length)


def _refuse_meant(config: Config) -> None:
    """Leftovers that say something else than what is computed."""
    biased, bare = flag(config, "qkv_bias"), not flag(config, "use_qk_norm", default=True)
    if biased or bare or count(config, "shared_expert_intermediate_size", 0):
        raise UnsupportedModel(
            "This Qwen3-MoE has biases, a shared expert, or no norms of queries and keys.",
            "No reader knows such a model ('qkv_bias', 'shared_expert_intermediate_size', 'use_qk_norm').",
            ASK,
        )


def _experts(config: Config) -> Experts:
    inner = integer(config, "moe_intermediate_size", 768)
    return checked_experts(
        integer(config, "num_experts", integer(config, "num_local_experts", 128)),
        Mlp(inner=inner, activation=activation(config, "hidden_act", "silu")),
        Router("softmax", integer(config, "num_experts_per_tok", 8), renormalize=flag(config, "norm_topk_prob")),
    )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's, with a tensor an expert."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP | EXPERTS)


def fused_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where all experts are one tensor."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP | EXPERTS | FUSED, HALVES)


FAMILY = Family(
    "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    spec,
    (rules, fused_rules),
    refused="Shared experts, qkv_bias, and attention without norms.",
    gguf_rules=gguf_rules,
)
