"""Llama and Mistral: pre-norm RMS, grouped-query attention with a half rotation, a gated MLP.

``model_type`` llama and mistral are one family; they differ in defaults. The context is the config's
``max_position_embeddings``: with dynamic scaling a deployment that wants more asks for it and gets the stretched table.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from fgsnap.convert.families.config import Config, check_keys, flag, integer, rope
from fgsnap.convert.families.family import Family
from fgsnap.convert.families.naming import ATTENTION, MLP, NORMS, OUTER, RECONVERT, Make, by_name, gguf_paired_rules
from fgsnap.convert.families.parts import BASE, decoder, depth, gated_mlp, heads, rms
from fgsnap.convert.rules import Rule, rotated_first
from fgsnap.errors import UnsupportedModel
from fgsnap.spec import Attention, DecoderSpec, Layer

KNOWN = BASE | frozenset("mlp_bias sliding_window layer_types".split())


class Defaults(NamedTuple):
    """What transformers assumes where a config says nothing."""

    max_length: int
    keys: int | None
    window: int | None


DEFAULTS = {"llama": Defaults(2048, None, None), "mistral": Defaults(131072, 8, 4096)}


def spec(config: Config) -> DecoderSpec:
    """What a Llama or Mistral config.json says is computed; refused by key where the spec cannot express it."""
    check_keys(config, KNOWN)
    defaults = DEFAULTS[config["model_type"]]
    max_length = integer(config, "max_position_embeddings", defaults.max_length)
    own, norm, bias = heads(config, keys=defaults.keys), rms(config), flag(config, "attention_bias")
    rotation = rope(config, own.dim, max_length)
    attention = Attention(
        *own, scale=own.dim**-0.5, rope=0, window=_window(config, defaults), qkv_bias=bias, out_bias=bias
    )
    mlp = gated_mlp(config, bias=flag(config, "mlp_bias"))
    layer = Layer(attention=attention, mlp=mlp, attn_in=norm, mlp_in=norm)
    return decoder(config, [layer] * depth(config), norm, [rotation], max_length=max_length)


def _window(config: Config, defaults: Defaults) -> int | None:
    given = config.get("sliding_window", defaults.window)
    window = None if given is None else integer({"sliding_window": given}, "sliding_window")
    if window is not None and config["model_type"] == "llama":
        raise UnsupportedModel(
            f"The config key 'sliding_window' is {window} in a checkpoint of type llama.",
            "Some readers apply it and some do not, so what the author meant is unknown.",
            "Set it to null, or model_type to 'mistral' if the window is meant.",
        )
    expected = "full_attention" if window is None else "sliding_attention"
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != expected for kind in kinds)):
        raise UnsupportedModel(
            "The config key 'layer_types' mixes kinds of attention.",
            f"Llama and Mistral have one kind; by 'sliding_window' it is {expected}.",
            "Models that alternate windows have a model_type of their own.",
        )
    return window


def rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """How the logical tensors are made of a Hugging Face checkpoint's."""
    attention, dims = _only_kind(spec).attention, spec.ropes[0].dims
    how: dict[str, Make] = {
        "q": partial(rotated_first, heads=attention.heads, dims=dims),
        "k": partial(rotated_first, heads=attention.kv_heads, dims=dims),
    }
    return by_name(spec, OUTER, NORMS | ATTENTION | MLP, how)


def _only_kind(spec: DecoderSpec) -> Layer:
    """Refuse a spec that no config of this family gives; one read from a manifest may hold anything."""
    if len(spec.layer_kinds) != 1 or len(spec.ropes) != 1:
        raise UnsupportedModel(
            "This decoder is none of the Llama family.", "Its manifest says it is, and is wrong.", RECONVERT
        )
    return spec.layer_kinds[0]


FAMILY = Family(
    "Llama 1, 2, 3, 3.1, 3.2, 3.3, CodeLlama, SmolLM, SmolLM2, TinyLlama",
    spec,
    (rules,),
    refused="Windows (sliding_window).",
    gguf_rules=gguf_paired_rules,
)
MISTRAL = FAMILY._replace(
    models="Mistral 7B, Nemo, Small and Large", refused="Layers of different kinds of attention (layer_types)."
)
