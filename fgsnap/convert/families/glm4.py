"""GLM-4: half of each head rotates in adjacent pairs; GLM-4-0414 has norms after each branch, too."""

from __future__ import annotations

from fgsnap.convert.families.config import Config, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, OUTER, Make, by_name, rows_of
from fgsnap.convert.families.parts import BASE, decoder, depth, gated_mlp, heads, rms
from fgsnap.convert.rules import Rule, Shape, pair_to_half
from fgsnap.spec import Attention, DecoderSpec, Layer

ROTATED = 0.5  # of a head's dims, where the config does not say
INNER = ATTENTION | {
    "attn_in": "input_layernorm",
    "attn_out": "post_self_attn_layernorm",
    "mlp_in": "post_attention_layernorm",
    "mlp_out": "post_mlp_layernorm",
    "gate": "mlp.gate_up_proj",
    "up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


def spec(config: Config) -> DecoderSpec:
    """What the config.json of a GLM-4 says is computed."""
    check_keys(config, BASE)
    max_length = integer(config, "max_position_embeddings", 131072)
    own, norm = heads(config, keys=2, dim=128), rms(config, 1.5625e-07)
    after = norm if config["model_type"] == "glm4" else None
    attention = Attention(*own, scale=own.dim**-0.5, rope=0, qkv_bias=flag(config, "attention_bias", default=True))
    layer = Layer(attention=attention, mlp=gated_mlp(config), attn_in=norm, attn_out=after, mlp_in=norm, mlp_out=after)
    rotation = rope({"partial_rotary_factor": ROTATED, **config}, own.dim, max_length, partial=True)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    kind = spec.layer_kinds[0]
    dims, inner = spec.ropes[0].dims, 0 if kind.mlp is None else kind.mlp.inner

    def paired(heads: int) -> Make:
        def make(name: str, source: str, shape: Shape) -> Rule:
            return pair_to_half(name, source, shape, heads, dims)

        return make

    how: dict[str, Make] = {
        "q": paired(kind.attention.heads),
        "k": paired(kind.attention.kv_heads),
        "gate": rows_of(2 * inner, 0),
        "up": rows_of(2 * inner, inner),
    }
    return by_name(spec, OUTER, INNER, how)


FAMILY = Family("GLM-4-0414 9B and 32B, GLM-Z1", spec, (rules,))
BEFORE_0414 = FAMILY._replace(models="GLM-4-9B", refused="ChatGLM checkpoints, whose code is remote.")
