"""Mixtral: Mistral's attention; of eight experts a token passes two, whose softmax weights are renormalised."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, activation, check_keys, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, FUSED, HALVES, NORMS, OUTER, by_name, gguf_paired_rules
from fgsnap.convert.families.parts import BASE, MOE, checked_experts, decoder, depth, heads, optional_window, rms
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, Mlp, Router

KNOWN = BASE | MOE | frozenset("sliding_window num_local_experts".split())
EXPERTS = {
    "router": "block_sparse_moe.gate",
    "experts.gate": "block_sparse_moe.experts.{expert}.w1",
    "experts.up": "block_sparse_moe.experts.{expert}.w3",
    "experts.down": "block_sparse_moe.experts.{expert}.w2",
}


def spec(config: Config) -> DecoderSpec:
    """What a Mixtral config.json says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 131072)
    own, norm = heads(config, keys=8), rms(config, 1e-5)
    experts = checked_experts(
        integer(config, "num_local_experts", 8),
        Mlp(inner=integer(config, "intermediate_size", 14336), activation=activation(config, "hidden_act", "silu")),
        Router("softmax", integer(config, "num_experts_per_tok", 2), renormalize=True),
    )
    attention = Attention(*own, scale=own.dim**-0.5, rope=0, window=optional_window(config))
    layers = [Layer(attention=attention, experts=experts, attn_in=norm, mlp_in=norm)] * depth(config)
    return decoder(config, layers, norm, [rope(config, own.dim, max_length, theta=1_000_000.0)], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of the Hub's checkpoints."""
    return by_name(spec, OUTER, NORMS | ATTENTION | EXPERTS)


def fused_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where transformers 5 wrote all experts as one tensor."""
    return by_name(spec, OUTER, NORMS | ATTENTION | FUSED | {"router": "mlp.gate"}, HALVES)


FAMILY = Family("Mixtral-8x7B, Mixtral-8x22B", spec, (rules, fused_rules), gguf_rules=gguf_paired_rules)
