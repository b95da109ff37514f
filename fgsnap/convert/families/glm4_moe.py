"""GLM-4.5 and 4.6: grouped queries, half of each head rotating, DeepSeek-V3's router and a shared expert."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, activation, check_keys, count, flag, integer, rope
from fgsnap.convert.families.deepseek import SHARED, biased_router
from fgsnap.convert.families.family import Family, computed_or_beyond
from fgsnap.convert.families.naming import ATTENTION, EXPERTS, FUSED, HALVES, MLP, NORMS, OUTER, by_name
from fgsnap.convert.families.parts import BASE, MOE, checked_experts, decoder, depth, gated_mlp, heads, rms
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Experts, Layer, Mlp, QkNorm, SharedExpert

KNOWN = (
    BASE
    | MOE
    | frozenset(
        """
    first_k_dense_replace n_group topk_group n_routed_experts n_shared_experts routed_scaling_factor use_qk_norm
    num_nextn_predict_layers num_mtp_layers
    """.split()
    )
)
ROTATED = 0.5  # of a head's dims, where the config does not say
INNER = NORMS | ATTENTION | MLP | EXPERTS | SHARED


def spec(config: Config) -> DecoderSpec:
    """What the config.json of a GLM-4.5 says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 131072)
    own, norm = heads(config, keys=8), rms(config, 1e-5)
    attention = Attention(
        *own,
        scale=own.dim**-0.5,
        rope=0,
        qkv_bias=flag(config, "attention_bias"),
        qk_norm=QkNorm(norm) if flag(config, "use_qk_norm") else None,
    )
    dense = Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)
    sparse = Layer(attention=attention, experts=_experts(config), attn_in=norm, mlp_in=norm)
    first = count(config, "first_k_dense_replace", 1)
    layers = [dense if index < first else sparse for index in range(depth(config))]
    rotation = rope({"partial_rotary_factor": ROTATED, **config}, own.dim, max_length, partial=True)
    return decoder(config, layers, norm, [rotation], max_length=max_length)


def _experts(config: Config) -> Experts:
    inner, act = integer(config, "moe_intermediate_size", 1408), activation(config, "hidden_act", "silu")
    return checked_experts(
        integer(config, "n_routed_experts", 128),
        Mlp(inner=inner, activation=act),
        biased_router(config),
        SharedExpert(Mlp(inner=inner * integer(config, "n_shared_experts", 1), activation=act)),
    )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's, with a tensor an expert."""
    return by_name(spec, OUTER, INNER)


def fused_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where all experts are one tensor."""
    return by_name(spec, OUTER, INNER | FUSED, HALVES)


FAMILY = Family(
    "GLM-4.5, GLM-4.5-Air, GLM-4.6",
    spec,
    (rules, fused_rules),
    refused="The layer that predicts further ahead is left out.",
    unused=computed_or_beyond,
)
