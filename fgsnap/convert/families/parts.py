"""Parts of a decoder spec that most families' config.json give under the same keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from fgsnap.convert.families.config import (
    ASK,
    CHECK,
    ROPE,
    Config,
    activation,
    count,
    flag,
    integer,
    number,
    rope,
    show,
)
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import DecoderSpec, Embedding, Experts, Head, Layer, Mlp, Norm, Rope, Router, SharedExpert

BASE = ROPE | frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias
    """.split()
)
"""Keys that the functions here read."""

WINDOWS = frozenset("use_sliding_window sliding_window max_window_layers layer_types".split())

MOE = frozenset(
    """
    num_experts_per_tok moe_intermediate_size norm_topk_prob output_router_logits router_aux_loss_coef
    router_jitter_noise aux_loss_alpha seq_aux ep_size
    """.split()
)

# Rules are made head by head and expert by expert, so their numbers bound what a config can make conversion do.
MOST_LAYERS = 4096
MOST_HEADS_AND_EXPERTS = 1 << 17  # of all layers; DeepSeek-V3 has 23,000
MOST_ROTATED_DIMS = 1 << 14  # of a head; each has an angle


class Heads(NamedTuple):
    """Query heads, key heads, and the width of each."""

    queries: int
    keys: int
    dim: int


def depth(config: Config, key: str = "num_hidden_layers") -> int:
    """The number of layers."""
    found = integer(config, key)
    if found > MOST_LAYERS:
        raise SourceError(f"config.json asks for {found} layers.", f"No model has more than {MOST_LAYERS}.", CHECK)
    return found


def heads(config: Config, keys: int | None = None, dim: int | None = None) -> Heads:
    """The heads; ``keys`` and ``dim`` are what an absent key means, None: as many as queries, the width divided."""
    width, queries = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    absent = queries if keys is None or "num_key_value_heads" in config else keys
    given = dim if config.get("head_dim") is None else integer(config, "head_dim")
    return checked_heads(width, queries, integer(config, "num_key_value_heads", absent), given)


def checked_heads(width: int, queries: int, keys: int, dim: int | None = None) -> Heads:
    """Heads that divide as they must; ``dim`` None divides the width."""
    if dim is None and width % queries:
        raise SourceError(
            f"hidden_size {width} does not divide into {queries} heads.", "No head_dim is given either.", CHECK
        )
    if queries % keys:
        raise SourceError(
            f"{queries} attention heads cannot share {keys} key-value heads.",
            "num_attention_heads must be a multiple of num_key_value_heads.",
            CHECK,
        )
    return Heads(queries, keys, width // queries if dim is None else dim)


def rms(config: Config, default: float = 1e-6, key: str = "rms_norm_eps") -> Norm:
    """The RMS norm of most families."""
    return Norm(kind="rms", eps=number(config, key, default))


def layer_norm(config: Config, key: str, default: float = 1e-5) -> Norm:
    """A layer norm with weight and bias."""
    return Norm(kind="ln", eps=number(config, key, default), bias=True)


def gated_mlp(config: Config, inner: str = "intermediate_size", act: str = "hidden_act", *, bias: bool = False) -> Mlp:
    """down(act(gate(x)) * up(x))."""
    how = activation(config, act, "silu")
    return Mlp(inner=integer(config, inner), activation=how, bias=bias, down_bias=bias)


def checked_experts(total: int, mlp: Mlp, router: Router, shared: SharedExpert | None = None) -> Experts:
    """Experts whose numbers fit one another."""
    groups, kept = router.groups, router.kept_groups
    ranked = 2 if router.group_rank == "top2_sum" and groups > 1 else 1
    if total % groups or total // groups < ranked or kept > groups:
        raise SourceError(
            f"config.json has {total} experts in {groups} groups, of which {kept} are kept.",
            "Groups have to be equal, and large enough to be ranked.",
            CHECK,
        )
    if router.top_k > total // groups * kept:
        raise SourceError(
            f"config.json sends a token to {router.top_k} of {total // groups * kept} experts.",
            "There are not that many.",
            CHECK,
        )
    return Experts(count=total, mlp=mlp, router=router, shared=shared)


Kind = Literal["full_attention", "sliding_attention", "chunked_attention"]


def layer_types(
    config: Config, default: Sequence[Kind], known: Sequence[Kind] = ("full_attention", "sliding_attention")
) -> Sequence[Kind]:
    """Each layer's kind of attention: as ``layer_types`` says, or as the family's rule does where it is absent."""
    given = config.get("layer_types")
    if given is None:
        return default
    if not isinstance(given, list) or len(given) != len(default):
        raise SourceError(f"The config key 'layer_types' does not name {len(default)} layers.", "Each has one.", CHECK)
    for kind in given:
        if kind not in known:
            raise UnsupportedModel(
                f"The config key 'layer_types' names {str(kind)[:40]!r}.",
                f"Of this family, {' and '.join(known)} are supported.",
                ASK,
            )
    return given


def window_of(kind: Kind, config: Config, default: int | None = None) -> int | None:
    """The window of a layer of that kind."""
    if kind != "sliding_attention":
        return None
    return integer(config, "sliding_window", default)


def optional_window(config: Config) -> int | None:
    """The window of all layers; absent or null: none."""
    return None if config.get("sliding_window") is None else integer(config, "sliding_window")


def rope_of(config: Config, kind: Kind, head_dim: int, max_length: int, *, theta: float = 10000.0) -> Rope:
    """The rotation of layers of one kind, where ``rope_parameters`` is keyed by kind; else the one there is.

    A kind that is left out rotates plainly.
    """
    if _keyed(config.get("rope_parameters")):
        config = {**config, "rope_parameters": config["rope_parameters"].get(kind), "rope_scaling": None}
    return rope(config, head_dim, max_length, theta=theta)


def refuse_unkeyed(config: Config) -> None:
    """Refuse ``rope_parameters`` that do not say for which layers they are, in a family whose layers differ in it."""
    parameters = config.get("rope_parameters")
    if parameters and not _keyed(parameters):
        raise UnsupportedModel(
            "The config key 'rope_parameters' does not say for which layers it is.",
            "Those with a window rotate in a way of their own, and readers disagree about what is meant.",
            "Key it by 'full_attention' and 'sliding_attention', or put the values into 'rope_scaling'.",
        )


def _keyed(parameters: Any) -> bool:
    return isinstance(parameters, dict) and any(kind in parameters for kind in get_args(Kind))


def decoder(
    config: Config,
    layers: Iterable[Layer],
    norm: Norm | None,
    ropes: Sequence[Rope] = (),
    *,
    max_length: int,
    embedding: Embedding | None = None,
    head: Head | None = None,
    tied: bool = False,
) -> DecoderSpec:
    """The decoder of these layers; equal ones are one kind.

    Args:
        config: gives the vocabulary and the width.
        layers: from the first to the last.
        norm: the final one.
        ropes: rotations that layers name by index.
        max_length: the longest context.
        embedding: None: rows of the decoder's width, unscaled.
        head: None: as ``tie_word_embeddings`` says, and ``tied`` where it says nothing.
        tied: see ``head``.
    """
    every = tuple(layers)
    kinds = {layer: index for index, layer in enumerate(dict.fromkeys(every))}
    _refuse_too_many(every, ropes)
    width = integer(config, "hidden_size")
    return DecoderSpec(
        vocab_size=integer(config, "vocab_size"),
        width=width,
        max_length=max_length,
        embedding=embedding or Embedding(width=width),
        layer_kinds=tuple(kinds),
        layers=tuple(kinds[layer] for layer in every),
        head=head or Head(tied=flag(config, "tie_word_embeddings", tied)),
        final_norm=norm,
        ropes=tuple(ropes),
    )


def _refuse_too_many(layers: Iterable[Layer], ropes: Iterable[Rope]) -> None:
    rotated = max((rope.dims for rope in ropes), default=0)
    if rotated > MOST_ROTATED_DIMS:
        raise SourceError(
            f"config.json asks for heads with {rotated} rotated dims.",
            f"No model has more than {MOST_ROTATED_DIMS}.",
            CHECK,
        )
    found = sum(layer.attention.heads + (layer.experts.count if layer.experts else 0) for layer in layers)
    if found > MOST_HEADS_AND_EXPERTS:
        raise SourceError(
            f"config.json asks for {found} attention heads and experts over all layers.",
            f"No model has more than {MOST_HEADS_AND_EXPERTS}.",
            CHECK,
        )


def windows_above(config: Config) -> Sequence[Kind]:
    """Windows on the layers from ``max_window_layers`` on, if ``use_sliding_window``; as the Qwen families have it."""
    used = flag(config, "use_sliding_window") and config.get("sliding_window", True) is not None
    begin = count(config, "max_window_layers", 28)
    kinds: list[Kind] = [
        "sliding_attention" if used and index >= begin else "full_attention" for index in range(depth(config))
    ]
    return refuse_unused(config, used, layer_types(config, kinds))


def refuse_unused(config: Config, used: bool, kinds: Sequence[Kind]) -> Sequence[Kind]:
    """Refuse layers with a window where the config says that none is used."""
    if not used and "sliding_attention" in kinds:
        raise UnsupportedModel(
            "The config key 'layer_types' names sliding_attention, but 'use_sliding_window' is false.",
            "Readers disagree about which one such a checkpoint means.",
            "Remove the one that is not meant.",
        )
    return kinds


def listed(config: Config, key: str) -> Sequence[int]:
    """A list of integers; absent or null: none."""
    value: Any = [] if config.get(key) is None else config[key]
    if not isinstance(value, list) or any(type(entry) is not int for entry in value):
        raise SourceError(f"The config key {key!r} is no list of integers.", "It speaks of layers by number.", CHECK)
    return value


def sparse_layers(config: Config, experts: int) -> frozenset[int]:
    """The layers with experts: every ``decoder_sparse_step``-th one but those of ``mlp_only_layers``."""
    if count(config, "num_experts", experts) == 0:
        return frozenset()
    step, dense = integer(config, "decoder_sparse_step", 1), {*listed(config, "mlp_only_layers")}
    return frozenset(index for index in range(depth(config)) if (index + 1) % step == 0 and index not in dense)


def inner_config(config: Config, key: str, kind: str) -> Config:
    """The decoder's own config, of a model type, inside that of a model with more parts."""
    inner = config.get(key)
    if not isinstance(inner, dict):
        raise SourceError(f"config.json has no {key!r}.", "It describes the decoder.", "Check that it is whole.")
    if inner.get("model_type", kind) != kind:
        raise UnsupportedModel(
            f"The model type in {key!r} is {show(inner['model_type'])}.",
            f"A decoder inside a model of type {show(config.get('model_type'))} is of type {kind}.",
            "Check that config.json belongs to the checkpoint.",
        )
    return inner


def rotating_layers(config: Config) -> Sequence[bool]:
    """Whether each layer rotates: as ``no_rope_layers`` says (1: it does), or all but every so many-th."""
    layers, interval = depth(config), integer(config, "no_rope_layer_interval", 4)
    given = listed(config, "no_rope_layers")
    if given and len(given) != layers:
        raise SourceError(
            f"The config key 'no_rope_layers' does not have {layers} entries.", "Each layer has one.", CHECK
        )
    return [bool(entry) for entry in given] or [(index + 1) % interval != 0 for index in range(layers)]
