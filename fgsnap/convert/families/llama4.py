"""Llama 4, its text decoder: adjacent pairs rotate within chunks of the context, every fourth layer sees everything and
does not rotate; one expert a token, whose weight multiplies its input, beside a shared one.
"""

from __future__ import annotations

from functools import partial

from fgsnap.convert.families.config import Config, activation, check_keys, count, flag, integer, number, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.gemma3 import seen
from fgsnap.convert.families.naming import ATTENTION, NORMS, Make, by_name
from fgsnap.convert.families.parts import (
    BASE,
    MOE,
    Kind,
    checked_experts,
    decoder,
    depth,
    gated_mlp,
    heads,
    inner_config,
    layer_types,
    listed,
    rms,
    rotating_layers,
)
from fgsnap.convert.rules import Rule, Shape, pair_to_half, rule, take
from fgsnap.spec import (
    Attention,
    DecoderSpec,
    Experts,
    Layer,
    Mlp,
    Norm,
    QkNorm,
    QueryTemperature,
    Router,
    SharedExpert,
)

KNOWN = (
    BASE
    | MOE
    | frozenset(
        """
    intermediate_size_mlp num_local_experts moe_layers interleave_moe_layer_step use_qk_norm no_rope_layers
    no_rope_layer_interval attention_chunk_size layer_types attn_temperature_tuning floor_scale attn_scale
    for_llm_compressor
    """.split()
    )
)
INNER = {
    **NORMS,
    **ATTENTION,
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
    "router": "feed_forward.router",
    **dict.fromkeys(("experts.gate.weight", "experts.up.weight"), "feed_forward.experts.gate_up_proj"),
    "experts.down.weight": "feed_forward.experts.down_proj",
    "shared.gate": "feed_forward.shared_expert.gate_proj",
    "shared.up": "feed_forward.shared_expert.up_proj",
    "shared.down": "feed_forward.shared_expert.down_proj",
}


def spec(config: Config) -> DecoderSpec:
    """What the config.json of Llama 4's decoder says is computed."""
    check_keys(config, KNOWN)
    max_length, layers = integer(config, "max_position_embeddings", 131072), depth(config)
    own, norm, bias = heads(config, keys=8, dim=128), rms(config, 1e-5), flag(config, "attention_bias")
    chunk = None if config.get("attention_chunk_size", 8192) is None else integer(config, "attention_chunk_size", 8192)
    rotating = rotating_layers(config)
    kinds: list[Kind] = ["chunked_attention" if rotates else "full_attention" for rotates in rotating]
    step, given = integer(config, "interleave_moe_layer_step", 1), listed(config, "moe_layers")
    sparse = frozenset(range(step - 1, layers, step) if config.get("moe_layers") is None else given)

    def layer(index: int, rotates: bool, kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=own.dim**-0.5,
            rope=0 if rotates else None,
            chunk=chunk if kind == "chunked_attention" else None,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=_qk_norm(config) if rotates else None,
            query_temperature=None if rotates else _temperature(config),
        )
        if index in sparse:
            return Layer(attention=attention, experts=_experts(config), attn_in=norm, mlp_in=norm)
        mlp = gated_mlp(config, "intermediate_size_mlp")
        return Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)

    every = map(layer, range(layers), rotating, layer_types(config, kinds, ("full_attention", "chunked_attention")))
    return decoder(config, every, norm, [rope(config, own.dim, max_length, theta=500_000.0)], max_length=max_length)


def _qk_norm(config: Config) -> QkNorm | None:
    if not flag(config, "use_qk_norm", default=True):
        return None
    return QkNorm(Norm(kind="l2", eps=number(config, "rms_norm_eps", 1e-5), weight=False), after_rope=True)


def _temperature(config: Config) -> QueryTemperature | None:
    tuned = config.get("attn_temperature_tuning", True)
    if not (tuned if type(tuned) is bool else count(config, "attn_temperature_tuning", 0)):
        return None
    return QueryTemperature("step", integer(config, "floor_scale", 8192), number(config, "attn_scale", 0.1))


def _experts(config: Config) -> Experts:
    mlp = Mlp(inner=integer(config, "intermediate_size", 8192), activation=activation(config, "hidden_act", "silu"))
    router = Router("sigmoid", integer(config, "num_experts_per_tok", 1), select_first=True, weigh_input=True)
    return checked_experts(integer(config, "num_local_experts", 16), mlp, router, SharedExpert(mlp))


def rules(spec: DecoderSpec, prefix: str = "model.", head: str = "lm_head") -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    attention = spec.layer_kinds[0].attention
    outer = {"embed": prefix + "embed_tokens", "final_norm": prefix + "norm", "head": head}
    how: dict[str, Make] = {
        "q": partial(pair_to_half, heads=attention.heads),
        "k": partial(pair_to_half, heads=attention.kv_heads),
        "experts.gate": _columns(0),
        "experts.up": _columns(1),
        "experts.down": _turned,
    }
    return by_name(spec, outer, INNER, how, prefix + "layers.{layer}.")


def _columns(half: int) -> Make:
    """The first or second half of the columns of every expert's matrix, turned into rows."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        count, inner, width = shape
        view = (count, width, 2, inner)
        piece = take(source, (count, width, 2 * inner), view, {2: (half, half + 1)}, (0, 2, 3, 1))
        return rule(name, shape, (piece,))

    return make


def _turned(name: str, source: str, shape: Shape) -> Rule:
    count, out, inner = shape
    return rule(name, shape, (take(source, (count, inner, out), order=(0, 2, 1)),))


def text_spec(config: Config) -> DecoderSpec:
    """The decoder of a checkpoint that sees."""
    return spec(inner_config(config, "text_config", "llama4_text"))


FAMILY = Family("Llama 4 Scout and Maverick, text only checkpoints", spec, (rules,))
WITH_VISION = Family(
    "Llama 4 Scout and Maverick, text only",
    text_spec,
    (partial(rules, prefix="language_model.model.", head="language_model.lm_head"),),
    refused="Images: the vision tower is left out.",
    unused=lambda name, spec, held: name.startswith("vision_model.") or seen(name, spec, held),
    tied_head=("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
)
