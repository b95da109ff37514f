"""GPT-J: one layer norm for both branches, side by side; the first dims of each head rotate in adjacent pairs."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from fgsnap.convert.families.config import CHECK, Config, activation, check_keys, flag, integer
from fgsnap.convert.families.family import Family, computed
from fgsnap.convert.families.naming import Make, by_name
from fgsnap.convert.families.parts import checked_heads, decoder, depth, layer_norm
from fgsnap.convert.rules import Rule, pair_to_half
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Head, Layer, Mlp, Rope

KNOWN = frozenset(
    """
    vocab_size n_positions n_embd n_layer n_head n_inner rotary_dim activation_function layer_norm_epsilon
    tie_word_embeddings
    n_ctx rotary scale_attn_weights
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """.split()  # the last two lines are never read by the model's code
)
THETA = 10000.0  # no config key changes it

OUTER = {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}
INNER = {
    "attn_in": "ln_1",
    "q": "attn.q_proj",
    "k": "attn.k_proj",
    "v": "attn.v_proj",
    "out": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}


def spec(config: Config) -> DecoderSpec:
    """What a GPT-J config.json says is computed."""
    check_keys(config, KNOWN)
    width, heads = integer(config, "n_embd", 4096), integer(config, "n_head", 16)
    max_length, norm = integer(config, "n_positions", 2048), layer_norm(config, "layer_norm_epsilon")
    own = checked_heads(width, heads, heads)
    mlp = Mlp(
        inner=integer(config, "n_inner", 4 * width),
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        bias=True,
        down_bias=True,
    )
    attention = Attention(*own, scale=own.dim**-0.5, rope=0)
    layer = Layer(attention=attention, mlp=mlp, attn_in=norm, residual="parallel")
    return decoder(
        {**config, "hidden_size": width},
        [layer] * depth(config, "n_layer"),
        norm,
        [Rope(theta=THETA, dims=_rotated(config, own.dim))],
        max_length=max_length,
        head=Head(tied=flag(config, "tie_word_embeddings"), bias=True),
    )


def _rotated(config: Config, head_dim: int) -> int:
    """The rotated dims of a head, which are paired."""
    if config.get("rotary_dim", 64) is None:
        raise UnsupportedModel(
            "The config key 'rotary_dim' is null.",
            "Angles would be made for the decoder's width, which no head has.",
            "Give the dims that rotate: 64 in GPT-J-6B.",
        )
    dims = integer(config, "rotary_dim", 64)
    if dims % 2 or dims > head_dim:
        raise SourceError(
            f"The config key 'rotary_dim' is {dims}.",
            f"It must be even, and at most the {head_dim} dims of a head.",
            CHECK,
        )
    return dims


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    heads, dims = spec.layer_kinds[0].attention.heads, spec.ropes[0].dims
    paired: Make = partial(pair_to_half, heads=heads, dims=dims)
    return by_name(spec, OUTER, INNER, {"q": paired, "k": paired}, "transformer.h.{layer}.")


_MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias|transformer\.h\.\d+\.attn\.embed_positions")


def unused(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """The causal mask and the angles, which old checkpoints hold."""
    return _MASKS.fullmatch(name) is not None or computed(name, spec, held)


FAMILY = Family("GPT-J-6B", spec, (rules,), unused=unused, tied_head=("lm_head.weight", "transformer.wte.weight"))
