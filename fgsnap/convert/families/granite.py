"""Granite and GraniteMoE: Llama's shape, with multipliers on embeddings, branches, scores and logits."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, activation, check_keys, flag, integer, number, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, HALVES, MLP, NORMS, OUTER, by_name, gguf_paired_rules
from fgsnap.convert.families.parts import BASE, MOE, checked_experts, decoder, depth, gated_mlp, heads, rms
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Router

MULTIPLIERS = frozenset("embedding_multiplier logits_scaling residual_multiplier attention_multiplier".split())
EXPERTS = {
    "router": "block_sparse_moe.router.layer",
    "experts.gate": "block_sparse_moe.input_linear",
    "experts.up": "block_sparse_moe.input_linear",
    "experts.down": "block_sparse_moe.output_linear",
}


def spec(config: Config) -> DecoderSpec:
    """What a Granite config.json says is computed."""
    check_keys(config, BASE | MULTIPLIERS | {"mlp_bias"})
    return _decoder(config, Layer(attention=_attention(config), mlp=gated_mlp(config, bias=flag(config, "mlp_bias"))))


def moe_spec(config: Config) -> DecoderSpec:
    """What a GraniteMoE config.json says is computed."""
    check_keys(config, BASE | MOE | MULTIPLIERS | {"num_local_experts"})
    experts = checked_experts(
        integer(config, "num_local_experts", 8),
        Mlp(inner=integer(config, "intermediate_size"), activation=activation(config, "hidden_act", "silu")),
        Router("softmax", integer(config, "num_experts_per_tok", 2), select_first=True),
    )
    return _decoder(config, Layer(attention=_attention(config), experts=experts))


def _attention(config: Config) -> Attention:
    bias = flag(config, "attention_bias")
    scale = number(config, "attention_multiplier", 1.0)
    return Attention(*heads(config), scale=scale, rope=0, qkv_bias=bias, out_bias=bias)


def _decoder(config: Config, branches: Layer) -> DecoderSpec:
    """All layers with these branches."""
    max_length, norm = integer(config, "max_position_embeddings", 2048), rms(config)
    layer = Layer(
        attention=branches.attention,
        mlp=branches.mlp,
        experts=branches.experts,
        attn_in=norm,
        mlp_in=norm,
        residual_multiplier=number(config, "residual_multiplier", 1.0),
    )
    embedding = Embedding(width=integer(config, "hidden_size"), scale=number(config, "embedding_multiplier", 1.0))
    head = Head(tied=flag(config, "tie_word_embeddings"), multiplier=1.0 / number(config, "logits_scaling", 1.0))
    rotation = rope(config, branches.attention.head_dim, max_length)
    return decoder(
        config, [layer] * depth(config), norm, [rotation], max_length=max_length, embedding=embedding, head=head
    )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


def moe_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same of a GraniteMoE."""
    return by_name(spec, OUTER, NORMS | ATTENTION | EXPERTS, HALVES)


FAMILY = Family("Granite 3.x 2B and 8B, Granite code", spec, (rules,), gguf_rules=gguf_paired_rules)
WITH_EXPERTS = Family(
    "Granite 3.x 1B-A400M and 3B-A800M", moe_spec, (moe_rules,), refused="Shared experts and Mamba layers (Granite 4)."
)
