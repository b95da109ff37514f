"""StableLM: Llama's shape with layer norms; a quarter of each head rotates."""

from __future__ import annotations

from fgsnap.convert.families.config import ASK, Config, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, by_name
from fgsnap.convert.families.parts import BASE, decoder, depth, gated_mlp, heads, layer_norm
from fgsnap.convert.rules import Rule
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Layer

KNOWN = BASE | frozenset("layer_norm_eps use_qkv_bias qk_layernorm use_parallel_residual".split())
ROTATED = 0.25  # of a head's dims, where the config does not say


def spec(config: Config) -> DecoderSpec:
    """What a StableLM config.json says is computed."""
    check_keys(config, KNOWN)
    if flag(config, "qk_layernorm"):
        raise UnsupportedModel(
            "The config key 'qk_layernorm' is true.", "StableLM then has a norm of its own for each head.", ASK
        )
    max_length = integer(config, "max_position_embeddings", 4096)
    own, norm = heads(config, keys=32), layer_norm(config, "layer_norm_eps")
    parallel = flag(config, "use_parallel_residual")
    layer = Layer(
        attention=Attention(*own, scale=own.dim**-0.5, rope=0, qkv_bias=flag(config, "use_qkv_bias")),
        mlp=gated_mlp(config),
        residual="parallel" if parallel else "sequential",
        attn_in=norm,
        mlp_in=None if parallel else norm,
    )
    rotation = rope({"partial_rotary_factor": ROTATED, **config}, own.dim, max_length, partial=True)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length)


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP)


FAMILY = Family("StableLM 3B, StableLM 2 1.6B", spec, (rules,), refused="Norms of each head (StableLM 2 12B).")
