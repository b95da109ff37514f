"""GPT-NeoX and Pythia: a norm a branch, side by side; a quarter of each head rotates."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from fgsnap.convert.families.config import Config, activation, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family, computed
from fgsnap.convert.families.naming import by_name, heads_of
from fgsnap.convert.families.parts import BASE, decoder, depth, heads, layer_norm
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Layer, Mlp

KNOWN = BASE | frozenset("layer_norm_eps use_parallel_residual rotary_pct rotary_emb_base".split())
OUTER = {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
INNER = {
    "attn_in": "input_layernorm",
    **dict.fromkeys(("q", "k", "v"), "attention.query_key_value"),
    "out": "attention.dense",
    "mlp_in": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def spec(config: Config) -> DecoderSpec:
    """What a GPT-NeoX config.json says is computed."""
    check_keys(config, KNOWN)
    max_length, own = integer(config, "max_position_embeddings", 2048), heads(config)
    norm, bias = layer_norm(config, "layer_norm_eps"), flag(config, "attention_bias", default=True)
    mlp = Mlp(
        inner=integer(config, "intermediate_size"),
        activation=activation(config, "hidden_act", "gelu"),
        gated=False,
        bias=True,
        down_bias=True,
    )
    layer = Layer(
        attention=Attention(*own, scale=own.dim**-0.5, rope=0, qkv_bias=bias, out_bias=bias),
        mlp=mlp,
        attn_in=norm,
        mlp_in=norm,
        residual="parallel" if flag(config, "use_parallel_residual", default=True) else "sequential",
    )
    rotating = {
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
        "rope_theta": config.get("rotary_emb_base", 10000.0),
        **config,
    }
    rotation = rope(rotating, own.dim, max_length, partial=True)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    attention = spec.layer_kinds[0].attention
    heads = partial(heads_of, attention.heads, 3, attention.head_dim)
    how = {part: heads(at, at + 1) for at, part in enumerate(("q", "k", "v"))}
    return by_name(spec, OUTER, INNER, how, "gpt_neox.layers.{layer}.")


_MASKS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias")


def unused(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """The causal mask and the frequencies, which old checkpoints hold."""
    return _MASKS.fullmatch(name) is not None or computed(name, spec, held)


FAMILY = Family(
    "Pythia, GPT-NeoX-20B, Dolly v2",
    spec,
    (rules,),
    unused=unused,
    tied_head=("embed_out.weight", "gpt_neox.embed_in.weight"),
)
