"""Gemma 3, its text decoder: Gemma 2 with norms of query and key heads instead of soft caps, and a rotation of its own
for the layers with a window. Checkpoints that see hold the decoder beside a vision tower, which is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

from fgsnap.convert.families.config import Config, check_keys, flag, integer, number
from fgsnap.convert.families.family import Family, computed
from fgsnap.convert.families.gemma2 import NORMS, gemma_mlp, gemma_norm, refuse_both_ways, softcap
from fgsnap.convert.families.naming import ATTENTION, MLP, by_name, gguf_rules
from fgsnap.convert.families.parts import (
    BASE,
    Kind,
    decoder,
    depth,
    heads,
    inner_config,
    layer_types,
    refuse_unkeyed,
    rope_of,
    window_of,
)
from fgsnap.convert.rules import Rule
from fgsnap.spec import Attention, DecoderSpec, Embedding, Head, Layer, QkNorm

KNOWN = BASE | frozenset(
    """
    hidden_activation query_pre_attn_scalar sliding_window sliding_window_pattern _sliding_window_pattern layer_types
    final_logit_softcapping attn_logit_softcapping use_bidirectional_attention rope_local_base_freq
    """.split()
)
ROPES: tuple[Kind, Kind] = ("full_attention", "sliding_attention")
THETA = {"full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0)}


def spec(config: Config) -> DecoderSpec:
    """What a Gemma 3 config.json says is computed."""
    check_keys(config, KNOWN)
    refuse_both_ways(config)
    refuse_unkeyed(config)
    max_length, width = integer(config, "max_position_embeddings", 131072), integer(config, "hidden_size")
    own, norm, bias = heads(config, keys=4, dim=256), gemma_norm(config), flag(config, "attention_bias")

    def layer(kind: Kind) -> Layer:
        attention = Attention(
            *own,
            scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
            rope=ROPES.index(kind),
            window=window_of(kind, config, 4096),
            softcap=softcap(config, "attn_logit_softcapping", None),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QkNorm(norm),
        )
        return Layer(attention=attention, mlp=gemma_mlp(config), attn_in=norm, attn_out=norm, mlp_in=norm, mlp_out=norm)

    return decoder(
        config,
        map(layer, layer_types(config, _kinds(config))),
        norm,
        [rope_of(_with_theta(config, kind), kind, own.dim, max_length) for kind in ROPES],
        max_length=max_length,
        embedding=Embedding(width=width, scale=math.sqrt(width), round_scale=True),
        head=Head(
            tied=flag(config, "tie_word_embeddings", default=True),
            softcap=softcap(config, "final_logit_softcapping", None),
        ),
    )


def _kinds(config: Config) -> list[Kind]:
    """Every sixth layer sees everything, or every so many-th as the pattern says."""
    pattern = integer(config, "_sliding_window_pattern", integer(config, "sliding_window_pattern", 6))
    return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(depth(config))]


def _with_theta(config: Config, kind: Kind) -> Config:
    """The config as the layers of one kind read it; ``rope_scaling`` is for those that see everything."""
    key, default = THETA[kind]
    scaling = config.get("rope_scaling") if kind == "full_attention" else None
    return {**config, "rope_theta": number(config, key, default), "rope_scaling": scaling}


def rules(spec: DecoderSpec, prefix: str = "model.", head: str = "lm_head") -> tuple[Rule, ...]:
    """How the logical tensors are made of a checkpoint's."""
    outer = {"embed": prefix + "embed_tokens", "final_norm": prefix + "norm", "head": head}
    return by_name(spec, outer, NORMS | ATTENTION | MLP, layers=prefix + "layers.{layer}.")


def text_spec(config: Config) -> DecoderSpec:
    """The decoder of a checkpoint that sees; what its config leaves out is as transformers has it."""
    return spec({"vocab_size": 262208, "num_attention_heads": 8, **inner_config(config, "text_config", "gemma3_text")})


def seen(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """Whether a tensor belongs to the vision tower, or says nothing new."""
    return "vision_tower." in name or "multi_modal_projector." in name or computed(name, spec, held)


FAMILY = Family(
    "Gemma 3 270M and 1B",
    spec,
    (rules,),
    refused="EmbeddingGemma: fgsnap serves decoders only.",
    gguf_rules=gguf_rules,
)
WITH_VISION = Family(
    "Gemma 3 4B, 12B and 27B, text only",
    text_spec,
    (
        partial(rules, prefix="language_model.model.", head="language_model.lm_head"),
        partial(rules, prefix="model.language_model."),
    ),
    refused="Images: the vision tower is left out.",
    unused=seen,
    tied_head=("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
)
