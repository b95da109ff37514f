"""Phi-3, Phi-3.5 and Phi-4: Llama's shape in fused tensors, with LongRoPE, and a window on some."""

from __future__ import annotations

from typing import Any

from fgsnap.convert.families.config import Config, check_keys, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import NORMS, OUTER, Make, Names, by_name, gguf_rules, rows_of
from fgsnap.convert.families.parts import BASE, decoder, depth, gated_mlp, heads, optional_window, rms
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer

# The last ones are leftovers in Phi-4-mini's config: its code reads none of them.
KNOWN = BASE | frozenset("sliding_window full_attn_mod interpolate_factor lm_head_bias mlp_bias".split())
INNER = NORMS | {
    "q": "self_attn.qkv_proj",
    "k": "self_attn.qkv_proj",
    "v": "self_attn.qkv_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_up_proj",
    "up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
GGUF: Names = {**dict.fromkeys(("q", "k", "v"), "attn_qkv"), "gate": "ffn_up", "up": "ffn_up"}


def spec(config: Config) -> DecoderSpec:
    """What a Phi-3 config.json says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 4096)
    own, norm = heads(config), rms(config, 1e-5)
    attention = Attention(*own, scale=own.dim**-0.5, rope=0, window=optional_window(config))
    layer = Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, mlp_in=norm)
    rotation = rope(_long(config), own.dim, max_length, partial=True)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length)


def _long(config: Config) -> Config:
    """LongRoPE by its earlier names, with the context before it was stretched where Phi-3 puts it."""
    renamed = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        parameters: Any = config.get(key)
        if isinstance(parameters, dict):
            kind = parameters.get("rope_type", parameters.get("type"))
            renamed[key] = {**parameters, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
            renamed[key].pop("type", None)
    return {"original_max_position_embeddings": 4096, **renamed}


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's: queries, keys and values lie in one, gates and ups in one."""
    return by_name(spec, OUTER, INNER, _cut(spec))


def fused_gguf_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same of a GGUF file."""
    return gguf_rules(spec, GGUF, _cut(spec))


def _cut(spec: DecoderSpec) -> dict[str, Make]:
    attention, mlp = spec.layer_kinds[0].attention, spec.layer_kinds[0].mlp
    inner = 0 if mlp is None else mlp.inner
    q, kv = attention.query_width, attention.kv_width
    return {
        "q": rows_of(q + 2 * kv, 0),
        "k": rows_of(q + 2 * kv, q),
        "v": rows_of(q + 2 * kv, q + kv),
        "gate": rows_of(2 * inner, 0),
        "up": rows_of(2 * inner, inner),
    }


FAMILY = Family(
    "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    spec,
    (rules,),
    refused="Phi-3-small and Phi-3-vision.",
    gguf_rules=fused_gguf_rules,
)
