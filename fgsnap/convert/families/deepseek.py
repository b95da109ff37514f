"""DeepSeek V2, V3 and R1: keys and values of all heads in one latent, experts in groups beside shared ones.

V2 scores experts by a softmax and ranks groups by their best one; V3 by sigmoids, with a bias that picks but does not
weigh, and ranks groups by their two best. V3's layer after the last one, which predicts two tokens ahead, is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fgsnap.convert.families.config import (
    ASK,
    CHECK,
    Config,
    activation,
    check_keys,
    count,
    flag,
    integer,
    number,
    only,
    rope,
)
from fgsnap.convert.families.family import Family, computed_or_beyond
from fgsnap.convert.families.naming import EXPERTS, FUSED, HALVES, MLP, NORMS, OUTER, RECONVERT, Make, by_name
from fgsnap.convert.families.parts import BASE, MOE, checked_experts, decoder, depth, gated_mlp, rms
from fgsnap.convert.rules import Rule, Shape, rule, take
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Experts, Latent, Layer, Mlp, Norm, Router, SharedExpert

KNOWN = (
    BASE
    | MOE
    | frozenset(
        """
    first_k_dense_replace moe_layer_freq kv_lora_rank q_lora_rank n_group topk_group topk_method scoring_func
    n_routed_experts n_shared_experts qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim routed_scaling_factor
    rope_interleave mlp_bias num_nextn_predict_layers num_mtp_layers
    """.split()
    )
)
LATENT_NORM = Norm(kind="rms", eps=1e-6)  # whatever rms_norm_eps says
ATTENTION = {
    "q": "self_attn.q_proj",
    "q_down": "self_attn.q_a_proj",
    "q_norm": "self_attn.q_a_layernorm",
    "q_up": "self_attn.q_b_proj",
    "latent": "self_attn.kv_a_proj_with_mqa",
    "latent_norm": "self_attn.kv_a_layernorm",
    "up_keys": "self_attn.kv_b_proj",
    "up_values": "self_attn.kv_b_proj",
    "out": "self_attn.o_proj",
}
SHARED = {
    "router.selection_bias": "mlp.gate.e_score_correction_bias",
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
}
INNER = NORMS | ATTENTION | MLP | EXPERTS | SHARED


class Defaults(NamedTuple):
    """What transformers assumes where a config says nothing."""

    max_length: int
    first_sparse: int
    experts: int
    inner: int
    shared: int


V2_DEFAULTS = Defaults(max_length=2048, first_sparse=0, experts=64, inner=1407, shared=2)
V3_DEFAULTS = Defaults(max_length=4096, first_sparse=3, experts=256, inner=2048, shared=1)


def v2_spec(config: Config) -> DecoderSpec:
    """What a DeepSeek-V2 config.json says is computed."""
    only(config, "scoring_func", "softmax")
    if flag(config, "norm_topk_prob"):
        raise UnsupportedModel(
            "The config key 'norm_topk_prob' is true.",
            "DeepSeek's own code weighs experts by shares of those picked, transformers by shares of all.",
            "Set it to false in config.json if the model was trained that way; no published DeepSeek-V2 has it true.",
        )
    limited = only(config, "topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups = integer(config, "n_group", 1) if limited else 1
    router = Router(
        "softmax",
        integer(config, "num_experts_per_tok", 1),
        groups=groups,
        kept_groups=1 if groups == 1 else integer(config, "topk_group"),
        scale=number(config, "routed_scaling_factor", 1.0),
    )
    return _spec(config, router, V2_DEFAULTS)


def v3_spec(config: Config) -> DecoderSpec:
    """What a DeepSeek-V3 config.json says is computed."""
    only(config, "topk_method", "noaux_tc")
    only(config, "scoring_func", "sigmoid")
    return _spec(config, biased_router(config, groups=8, kept_groups=4, scale=2.5), V3_DEFAULTS)


def biased_router(config: Config, groups: int = 1, kept_groups: int = 1, scale: float = 1.0) -> Router:
    """V3's router, which others took over with other defaults."""
    return Router(
        "sigmoid",
        integer(config, "num_experts_per_tok", 8),
        selection_bias=True,
        groups=integer(config, "n_group", groups),
        kept_groups=integer(config, "topk_group", kept_groups),
        group_rank="top2_sum",
        renormalize=flag(config, "norm_topk_prob", default=True),
        scale=number(config, "routed_scaling_factor", scale),
    )


def _spec(config: Config, router: Router, defaults: Defaults) -> DecoderSpec:
    check_keys(config, KNOWN)
    _refuse_unpublished(config)
    max_length, norm = integer(config, "max_position_embeddings", defaults.max_length), rms(config)
    attention = _attention(config)
    dense = Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)
    sparse = Layer(attention=attention, experts=_experts(config, router, defaults), attn_in=norm, mlp_in=norm)
    first = count(config, "first_k_dense_replace", defaults.first_sparse)
    layers = [dense if index < first else sparse for index in range(depth(config))]
    rotation = rope(config, integer(config, "qk_rope_head_dim", 64), max_length)
    return decoder(config, layers, norm, [rotation], max_length=max_length)


def _refuse_unpublished(config: Config) -> None:
    """Options that no published checkpoint uses."""
    biased = flag(config, "attention_bias") or flag(config, "mlp_bias")
    halves = not flag(config, "rope_interleave", default=True)
    if biased or halves or integer(config, "moe_layer_freq", 1) != 1:
        raise UnsupportedModel(
            "This DeepSeek has biases, another rotation, or layers without experts between those that have them.",
            "No published one does ('attention_bias', 'mlp_bias', 'rope_interleave', 'moe_layer_freq').",
            ASK,
        )


def _attention(config: Config) -> Attention:
    heads, rotated = integer(config, "num_attention_heads"), integer(config, "qk_rope_head_dim", 64)
    dim = integer(config, "qk_nope_head_dim", 128) + rotated
    compressed, rank = config.get("q_lora_rank", 1536), integer(config, "kv_lora_rank", 512)
    if dim % 2 or rank % 2:
        raise SourceError(
            f"Of {dim} dims a head, or of a latent of {rank}, {rotated} cannot be rotated in pairs.",
            "The dims that are not rotated come first, and have to be pairs too.",
            CHECK,
        )
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        scale=dim**-0.5 * _stretch(config) ** 2,
        value_dim=integer(config, "v_head_dim", 128),
        rope=0,
        latent=Latent(
            kv_rank=rank,
            rope_dim=rotated,
            norm=LATENT_NORM,
            query_rank=None if compressed is None else integer(config, "q_lora_rank", 1536),
        ),
    )


def _stretch(config: Config) -> float:
    """YaRN's mscale over all dims, by which queries and keys are multiplied both."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(parameters, dict) or not parameters.get("mscale_all_dim"):
        return 1.0
    factor = number(parameters, "factor", 1.0)
    scaled = factor > 1 and parameters.get("rope_type", parameters.get("type", "default")) != "default"
    return 0.1 * number(parameters, "mscale_all_dim") * math.log(factor) + 1.0 if scaled else 1.0


def _experts(config: Config, router: Router, defaults: Defaults) -> Experts:
    inner, act = integer(config, "moe_intermediate_size", defaults.inner), activation(config, "hidden_act", "silu")
    none = config.get("n_shared_experts", defaults.shared) is None  # as DeepSeek's own code has it
    shared = 0 if none else count(config, "n_shared_experts", defaults.shared)
    return checked_experts(
        integer(config, "n_routed_experts", defaults.experts),
        Mlp(inner=inner, activation=act),
        router,
        shared=SharedExpert(Mlp(inner=inner * shared, activation=act)) if shared else None,
    )


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's, with a tensor an expert."""
    return by_name(spec, OUTER, INNER, _makers(spec))


def fused_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where all experts are one tensor."""
    return by_name(spec, OUTER, INNER | FUSED, {**_makers(spec), **HALVES})


def _makers(spec: DecoderSpec) -> dict[str, Make]:
    attention = spec.layer_kinds[0].attention
    latent = attention.latent
    if latent is None:
        raise UnsupportedModel(
            "This decoder is none of the DeepSeek family.", "Its manifest says it is, and is wrong.", RECONVERT
        )
    plain = attention.head_dim - latent.rope_dim
    queries = _paired_tail(attention.heads, plain, latent.rope_dim)
    return {
        "q": queries,
        "q_up": queries,
        "latent": _paired_tail(1, latent.kv_rank, latent.rope_dim),
        "up_keys": _up(attention, 0, plain),
        "up_values": _up(attention, plain, plain + attention.value_width),
    }


def _paired_tail(heads: int, plain: int, rotated: int) -> Make:
    """Heads whose last dims are rotated in adjacent pairs, in the order that rotates half against half."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        width, inner = plain + rotated, shape[1:]
        halves = (0, 2, 1, *range(3, 3 + len(inner)))
        pieces = []
        for head in range(heads):
            begin = head * width
            pieces.append(take(source, shape, cut={0: (begin, begin + plain)}))
            pairs = ((begin + plain) // 2, (begin + width) // 2)
            view = (1, shape[0] // 2, 2, *inner)
            pieces.append(take(source, shape, view, {1: pairs}, halves))
        return rule(name, shape, pieces)

    return make


def _up(attention: Attention, first: int, last: int) -> Make:
    """Of each head's rows that make keys and values of a latent, some; those that make keys the other way round."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        assert attention.latent is not None
        rank, width = attention.latent.kv_rank, attention.head_dim - attention.latent.rope_dim + attention.value_width
        view, order = (attention.heads, width, rank), (0, 2, 1) if first == 0 else (0, 1, 2)
        return rule(name, shape, (take(source, (attention.heads * width, rank), view, {1: (first, last)}, order),))

    return make


UNPUBLISHED = "Biases, rope_interleave false, moe_layer_freq other than 1"
V2 = Family(
    "DeepSeek-V2, V2-Lite, V2.5, Coder-V2", v2_spec, (rules, fused_rules), refused=f"{UNPUBLISHED}, norm_topk_prob."
)
V3 = Family(
    "DeepSeek-V3, V3.1, R1",
    v3_spec,
    (rules, fused_rules),
    refused=f"{UNPUBLISHED}. The layer that predicts further ahead is left out.",
    unused=computed_or_beyond,
)
