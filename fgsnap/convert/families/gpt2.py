"""GPT-2: learned positions, layer norms before each branch, matrices stored the other way round."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from fgsnap.convert.families.config import Config, activation, check_keys, flag, integer
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import Make, by_name, transposed
from fgsnap.convert.families.parts import checked_heads, decoder, depth, layer_norm
from fgsnap.convert.rules import Rule, Shape, rule, take
from fgsnap.spec import Attention, DecoderSpec, Embedding, Layer, Mlp

KNOWN = frozenset(
    """
    vocab_size n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon
    scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn tie_word_embeddings
    n_special predict_special_tokens output_past _num_labels
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """.split()
)
INNER = {
    "attn_in": "ln_1",
    **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
    "out": "attn.c_proj",
    "mlp_in": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def spec(config: Config) -> DecoderSpec:
    """What a GPT-2 config.json says is computed."""
    check_keys(config, KNOWN)
    width, heads = integer(config, "n_embd", 768), integer(config, "n_head", 12)
    max_length, norm = integer(config, "n_positions", 1024), layer_norm(config, "layer_norm_epsilon")
    own = checked_heads(width, heads, heads)
    scale = own.dim**-0.5 if flag(config, "scale_attn_weights", default=True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx")
    mlp = Mlp(
        inner=integer(config, "n_inner", 4 * width),
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        bias=True,
        down_bias=True,
    )

    def layer(index: int) -> Layer:
        own_scale = scale / (index + 1) if by_layer else scale
        attention = Attention(*own, scale=own_scale, qkv_bias=True, out_bias=True)
        return Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)

    return decoder(
        {**config, "hidden_size": width},
        map(layer, range(depth(config, "n_layer"))),
        norm,
        max_length=max_length,
        embedding=Embedding(width=width, learned_positions=max_length),
        tied=True,
    )


def rules(spec: DecoderSpec, prefix: str = "transformer.") -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    outer = {"embed": prefix + "wte", "positions": prefix + "wpe", "final_norm": prefix + "ln_f", "head": "lm_head"}
    how: dict[str, Make] = {
        **{part: partial(_third, at=at) for at, part in enumerate(("q", "k", "v"))},
        **dict.fromkeys(("out", "up", "down"), transposed),
    }
    return by_name(spec, outer, INNER, how, prefix + "h.{layer}.")


def _third(name: str, source: str, shape: Shape, at: int) -> Rule:
    """Queries, keys or values of [in, 3 out], or of a bias of all three."""
    out, *into = shape
    rows = (at * out, (at + 1) * out)
    if not into:
        return rule(name, shape, (take(source, (3 * out,), cut={0: rows}),))
    return rule(name, shape, (take(source, (*into, 3 * out), cut={1: rows}, order=(1, 0)),))


_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


def unused(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """The causal mask, which old checkpoints hold."""
    return _MASKS.fullmatch(name) is not None


FAMILY = Family(
    "GPT-2, DistilGPT2",
    spec,
    (rules, partial(rules, prefix="")),
    unused=unused,
    tied_head=("lm_head.weight", "transformer.wte.weight"),
)
