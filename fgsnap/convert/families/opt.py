"""OPT and Galactica: learned positions, layer norms before each branch; OPT-350M has them after, and projections
between a narrow embedding and the decoder.
"""

from __future__ import annotations

from functools import partial

from fgsnap.convert.families.config import REWRITE, Config, activation, check_keys, flag, integer
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import by_name
from fgsnap.convert.families.parts import checked_heads, decoder, depth
from fgsnap.convert.rules import Rule
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Embedding, Layer, Mlp, Norm

KNOWN = frozenset(
    """
    vocab_size hidden_size num_hidden_layers ffn_dim max_position_embeddings do_layer_norm_before
    _remove_final_layer_norm word_embed_proj_dim num_attention_heads activation_function enable_bias
    layer_norm_elementwise_affine tie_word_embeddings layerdrop init_std learned_embeddings scale_embeddings
    """.split()
)
BEFORE_FIRST = 2  # rows of the position table that no token has
INNER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}


def spec(config: Config) -> DecoderSpec:
    """What an OPT config.json says is computed."""
    check_keys(config, KNOWN)
    _refuse_unread(config)
    max_length, width = integer(config, "max_position_embeddings", 2048), integer(config, "hidden_size")
    bias = flag(config, "enable_bias", default=True)
    affine = flag(config, "layer_norm_elementwise_affine", default=True)
    own = checked_heads(width, integer(config, "num_attention_heads"), integer(config, "num_attention_heads"))
    attention = Attention(*own, scale=own.dim**-0.5, qkv_bias=bias, out_bias=bias)
    mlp = Mlp(
        inner=integer(config, "ffn_dim"),
        activation=activation(config, "activation_function", "relu"),
        gated=False,
        bias=bias,
        down_bias=bias,
    )
    norm = Norm(kind="ln", eps=1e-5, weight=affine, bias=affine)
    before = flag(config, "do_layer_norm_before", default=True)
    if before:
        layer = Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)
    else:
        layer = Layer(attention=attention, mlp=mlp, residual="post", attn_out=norm, mlp_out=norm)
    return decoder(
        config,
        [layer] * depth(config),
        norm if before and not flag(config, "_remove_final_layer_norm") else None,
        max_length=max_length,
        embedding=Embedding(
            width=integer(config, "word_embed_proj_dim", width),
            learned_positions=max_length + BEFORE_FIRST,
            position_offset=BEFORE_FIRST,
        ),
        tied=True,
    )


def _refuse_unread(config: Config) -> None:
    """Galactica's keys, which no reader reads, where they say something else than what is computed."""
    for key, computed in (("learned_embeddings", True), ("scale_embeddings", False)):
        if flag(config, key, computed) is not computed:
            raise UnsupportedModel(
                f"The config key {key!r} is {config[key]}.",
                "Positions of OPT are learned and its embeddings not scaled, whatever the key says.",
                REWRITE,
            )


def rules(spec: DecoderSpec, prefix: str = "model.decoder.") -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    outer = {
        "embed": prefix + "embed_tokens",
        "positions": prefix + "embed_positions",
        "project_in": prefix + "project_in",
        "project_out": prefix + "project_out",
        "final_norm": prefix + "final_layer_norm",
        "head": "lm_head",
    }
    post = spec.layer_kinds[0].residual == "post"
    norms = {
        "attn_out" if post else "attn_in": "self_attn_layer_norm",
        "mlp_out" if post else "mlp_in": "final_layer_norm",
    }
    return by_name(spec, outer, INNER | norms, layers=prefix + "layers.{layer}.")


FAMILY = Family(
    "OPT-125M to OPT-66B, Galactica",
    spec,
    (rules, partial(rules, prefix="decoder.")),
    tied_head=("lm_head.weight", "model.decoder.embed_tokens.weight"),
)
