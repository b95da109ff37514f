"""Phi-1, Phi-1.5 and Phi-2: one layer norm for both branches, side by side; the first dims of each head rotate."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, activation, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import by_name
from fgsnap.convert.families.parts import BASE, decoder, depth, heads, layer_norm
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Head, Layer, Mlp, QkNorm

KNOWN = BASE | frozenset("layer_norm_eps qk_layernorm".split())
ROTATED = 0.5  # of a head's dims, where the config does not say

OUTER = {"embed": "model.embed_tokens", "final_norm": "model.final_layernorm", "head": "lm_head"}
INNER = {
    "attn_in": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "out": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def spec(config: Config) -> DecoderSpec:
    """What a Phi config.json says is computed."""
    check_keys(config, KNOWN)
    max_length = integer(config, "max_position_embeddings", 2048)
    own, norm = heads(config), layer_norm(config, "layer_norm_eps")
    attention = Attention(
        *own,
        scale=own.dim**-0.5,
        rope=0,
        qkv_bias=True,
        out_bias=True,
        qk_norm=QkNorm(norm) if flag(config, "qk_layernorm") else None,
    )
    mlp = Mlp(
        inner=integer(config, "intermediate_size", 8192),
        activation=activation(config, "hidden_act", "gelu_new"),
        gated=False,
        bias=True,
        down_bias=True,
    )
    rotation = rope({"partial_rotary_factor": ROTATED, **config}, own.dim, max_length, partial=True)
    layer = Layer(attention=attention, mlp=mlp, attn_in=norm, residual="parallel")
    head = Head(tied=flag(config, "tie_word_embeddings"), bias=True)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length, head=head)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, INNER)


FAMILY = Family(
    "Phi-1, Phi-1.5, Phi-2", spec, (rules,), refused="Checkpoints before 2024, with remote code and Wqkv tensors."
)
