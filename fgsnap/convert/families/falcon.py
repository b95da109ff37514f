"""Falcon: both branches read the same residual stream; queries, keys and values lie in one tensor, in three orders.

7B              one key head for all queries; one norm for both branches
40B, 180B       groups of queries around a key head; a norm a branch. Falcon2-11B: one norm
RW 1B and 7B    one branch after the other, a key head a query head, ALiBi, biases everywhere
"""

from __future__ import annotations

from functools import partial

from fgsnap.convert.families.config import ASK, ROPE, Config, activation, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import Make, by_name, heads_of
from fgsnap.convert.families.parts import checked_heads, decoder, depth, layer_norm
from fgsnap.convert.rules import Rule
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Alibi, Attention, DecoderSpec, Layer, Mlp

KNOWN = ROPE | frozenset(
    """
    vocab_size hidden_size n_embed num_hidden_layers num_attention_heads num_kv_heads layer_norm_epsilon
    max_position_embeddings ffn_hidden_size activation tie_word_embeddings
    alibi new_decoder_architecture multi_query parallel_attn num_ln_in_parallel_attn bias ff_factor
    apply_residual_connection_post_layernorm
    """.split()
)
OLDER = frozenset(
    """
    vocab_size hidden_size n_embed n_layer n_head n_head_kv layer_norm_epsilon tie_word_embeddings
    alibi multi_query parallel_attn bias apply_residual_connection_post_layernorm
    """.split()
)
"""Keys of the code that the first checkpoints brought along."""


def older_spec(config: Config) -> DecoderSpec:
    """What a config.json says from before transformers knew Falcon: RefinedWeb is 40B, RefinedWebModel 7B and RW."""
    grouped = config["model_type"] == "RefinedWeb"
    check_keys(config, OLDER if grouped else OLDER - {"n_head_kv"})
    given = {key: value for key, value in config.items() if value is not None and not key.startswith("n_")}
    renamed = {
        "multi_query": False,
        "parallel_attn": grouped,
        **given,
        "n_embed": config.get("n_embed"),
        "num_hidden_layers": depth(config, "n_layer"),
        "num_attention_heads": integer(config, "n_head"),
        "new_decoder_architecture": grouped,
    }
    return spec({**renamed, "num_kv_heads": integer(config, "n_head_kv")} if grouped else renamed)


def spec(config: Config) -> DecoderSpec:
    """What a Falcon config.json says is computed."""
    check_keys(config, KNOWN)
    _refuse_unread(config)
    config = {**config, "hidden_size": integer(config, "hidden_size" if config.get("n_embed") is None else "n_embed")}
    max_length, width = integer(config, "max_position_embeddings", 2048), integer(config, "hidden_size")
    alibi, bias = flag(config, "alibi"), flag(config, "bias")
    own = checked_heads(width, integer(config, "num_attention_heads"), _key_heads(config))
    attention = Attention(
        *own,
        scale=own.dim**-0.5,
        rope=None if alibi else 0,
        alibi=Alibi(scaled=True, bfloat16=True) if alibi else None,
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = Mlp(
        inner=integer(config, "ffn_hidden_size", 4 * width),
        activation=activation(config, "activation", "gelu"),
        gated=False,
        bias=bias,
        down_bias=bias,
    )
    norm = layer_norm(config, "layer_norm_epsilon")
    parallel = flag(config, "parallel_attn", default=True)
    layer = Layer(
        attention=attention,
        mlp=mlp,
        residual="parallel" if parallel else "sequential",
        attn_in=norm,
        mlp_in=norm if _norms(config) == 2 else None,
    )
    ropes = [] if alibi else [rope(config, own.dim, max_length)]
    return decoder(config, [layer] * depth(config), norm, ropes, max_length=max_length, tied=True)


def _refuse_unread(config: Config) -> None:
    """Options that no published checkpoint uses, and that readers disagree about."""
    if flag(config, "apply_residual_connection_post_layernorm"):
        raise UnsupportedModel(
            "The config key 'apply_residual_connection_post_layernorm' is true.",
            "Readers ignore it, or do not know it.",
            ASK,
        )
    if flag(config, "new_decoder_architecture") and not flag(config, "parallel_attn", default=True):
        raise UnsupportedModel(
            "The config key 'parallel_attn' is false, but 'new_decoder_architecture' is true.",
            "The new architecture has its branches side by side.",
            ASK,
        )


def _key_heads(config: Config) -> int:
    queries = integer(config, "num_attention_heads")
    if flag(config, "new_decoder_architecture"):
        return integer(config, "num_kv_heads", queries)
    return 1 if flag(config, "multi_query", default=True) else queries


def _norms(config: Config) -> int:
    """Norms before the branches of a layer."""
    if flag(config, "new_decoder_architecture"):
        return integer(config, "num_ln_in_parallel_attn", 2)
    return 1 if flag(config, "parallel_attn", default=True) else 2


def rules(spec: DecoderSpec, prefix: str = "transformer.") -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    kind = spec.layer_kinds[0]
    attention = kind.attention
    group = attention.heads // attention.kv_heads
    heads = partial(heads_of, attention.kv_heads, group + 2, attention.head_dim)
    how: dict[str, Make] = {"q": heads(0, group), "k": heads(group, group + 1), "v": heads(group + 1, group + 2)}
    outer = {"embed": prefix + "word_embeddings", "final_norm": prefix + "ln_f", "head": "lm_head"}
    inner = {
        **dict.fromkeys(("q", "k", "v"), "self_attention.query_key_value"),
        **_norm_names(kind),
        "out": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    return by_name(spec, outer, inner, how, prefix + "h.{layer}.")


def _norm_names(layer: Layer) -> dict[str, str]:
    if layer.residual == "parallel" and layer.mlp_in is not None:
        return {"attn_in": "ln_attn", "mlp_in": "ln_mlp"}
    return {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}


FAMILY = Family(
    "Falcon-7B, Falcon-40B, Falcon-180B, Falcon2-11B, Falcon-RW-1B, Falcon-RW-7B (RefinedWeb, RefinedWebModel, too)",
    spec,
    (rules, partial(rules, prefix="")),
    refused="apply_residual_connection_post_layernorm, and sequential branches in the new architecture.",
    tied_head=("lm_head.weight", "transformer.word_embeddings.weight"),
)
REFINED_WEB = FAMILY._replace(spec=older_spec)
