"""Rules by name: a logical tensor is a checkpoint's tensor under another name, unless its family says how it is made.

A *maker* takes a logical name, a source name and the logical shape, and gives the rule. Source names have "{layer}"
where the layer's number stands, and "{expert}" where an expert's does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from fgsnap.convert.rules import Rule, Shape, pair_to_half, rule, take, whole
from fgsnap.errors import UnsupportedModel
from fgsnap.layout import logical_shapes
from fgsnap.spec import DecoderSpec

Make = Callable[[str, str, Shape], Rule]
Names = Mapping[str, str]

# What most families call their tensors.
OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
EXPERTS = {
    "router": "mlp.gate",
    "experts.gate": "mlp.experts.{expert}.gate_proj",
    "experts.up": "mlp.experts.{expert}.up_proj",
    "experts.down": "mlp.experts.{expert}.down_proj",
}
FUSED = {
    "experts.gate.weight": "mlp.experts.gate_up_proj",
    "experts.up.weight": "mlp.experts.gate_up_proj",
    "experts.down.weight": "mlp.experts.down_proj",
}
"""Experts as transformers 5 holds them: one stack of gates above ups, one of downs."""
RECONVERT = "Convert the checkpoint again."
LAYERS = "model.layers.{layer}."


def by_name(
    spec: DecoderSpec, outer: Names, inner: Names, how: Mapping[str, Make] | None = None, layers: str = LAYERS
) -> tuple[Rule, ...]:
    """A rule for every logical tensor of ``spec``.

    Args:
        spec: the decoder.
        outer: logical part outside the layers ("embed") to source name; one that does not end in the kind of tensor
            (".weight", ".bias") stands for the part and its kind ("sinks.weight") and is taken as it is.
        inner: the same for parts of a layer.
        how: makers of the parts that are not taken whole.
        layers: what precedes the names of ``inner``.

    Raises:
        UnsupportedModel: the spec has a part that has no name: a manifest may hold anything.
    """
    makers = how or {}
    rules = []
    for name, shape in logical_shapes(spec).items():
        layer, part, kind = split(name)
        names, prefix = (outer, "") if layer is None else (inner, layers.replace("{layer}", layer))
        if f"{part}.{kind}" in names:
            source = names[f"{part}.{kind}"]
        elif part in names:
            source = f"{names[part]}.{kind}"
        else:
            raise UnsupportedModel(
                f"This family has no tensor for {name}.",
                "The manifest names a family that its decoder is none of.",
                RECONVERT,
            )
        rules.append(makers.get(part, each_expert if "{expert}" in source else whole)(name, prefix + source, shape))
    return tuple(rules)


def split(name: str) -> tuple[str | None, str, str]:
    """``layers.3.experts.up.weight`` -> ("3", "experts.up", "weight"); None where there is no layer."""
    *path, kind = name.split(".")
    layer = path[1] if path[0] == "layers" else None
    return layer, ".".join(path[2:] if layer else path), kind


def rows_of(total: int, first: int) -> Make:
    """Rows from ``first`` on of a source tensor of ``total`` rows."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        return rule(name, shape, (take(source, (total, *shape[1:]), cut={0: (first, first + shape[0])}),))

    return make


def heads_of(groups: int, per_group: int, head_dim: int, first: int, last: int) -> Make:
    """Of heads in ``groups`` of ``per_group``, heads ``first:last`` of every group."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        view = (groups, per_group, head_dim, *shape[1:])
        whole_shape = (groups * per_group * head_dim, *shape[1:])
        return rule(name, shape, (take(source, whole_shape, view, {1: (first, last)}),))

    return make


def each_expert(name: str, source: str, shape: Shape) -> Rule:
    """A stack of one tensor an expert."""
    return rule(name, shape, (take(source.replace("{expert}", str(index)), shape[1:]) for index in range(shape[0])))


def half_of_each(index: int) -> Make:
    """The first (0) or second (1) half of the rows of every expert's tensor in a stack."""

    def make(name: str, source: str, shape: Shape) -> Rule:
        count, rows, *inner = shape
        view = (count, 2, rows, *inner)
        return rule(name, shape, (take(source, (count, 2 * rows, *inner), view, {1: (index, index + 1)}),))

    return make


HALVES: Mapping[str, Make] = {"experts.gate": half_of_each(0), "experts.up": half_of_each(1)}
"""Makers for FUSED."""


def transposed(name: str, source: str, shape: Shape) -> Rule:
    """A matrix, or a stack of them, that the checkpoint holds as [in, out]; vectors as they are."""
    if name.endswith(".bias"):
        return whole(name, source, shape)
    *stack, out, into = shape
    axes = len(stack)
    return rule(name, shape, (take(source, (*stack, into, out), order=(*range(axes), axes + 1, axes)),))


# What GGUF files call them, whatever the family. Experts are stacks.
GGUF_OUTER = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
GGUF_INNER = {
    "attn_in": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "out": "attn_output",
    "attn_out": "post_attention_norm",
    "mlp_in": "ffn_norm",
    "mlp_out": "post_ffw_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "experts.gate": "ffn_gate_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
}


def gguf_rules(
    spec: DecoderSpec, names: Names | None = None, how: Mapping[str, Make] | None = None
) -> tuple[Rule, ...]:
    """Rules for a GGUF file whose rows are in the checkpoint's order; ``names`` and ``how`` say what is special."""
    stacks: dict[str, Make] = dict.fromkeys(("experts.gate", "experts.up", "experts.down"), _rows_of_a_stack)
    return by_name(spec, GGUF_OUTER, GGUF_INNER | dict(names or {}), stacks | dict(how or {}), "blk.{layer}.")


def gguf_paired_rules(spec: DecoderSpec) -> tuple[Rule, ...]:
    """The same where query and key rows are in the order that rotates adjacent pairs."""
    attention = spec.layer_kinds[0].attention
    how: dict[str, Make] = {
        "q": partial(pair_to_half, heads=attention.heads),
        "k": partial(pair_to_half, heads=attention.kv_heads),
    }
    return gguf_rules(spec, how=how)


def _rows_of_a_stack(name: str, source: str, shape: Shape) -> Rule:
    """A stack of matrices that the source offers as one matrix of all their rows; biases are one already."""
    count, rows, *width = shape
    return rule(name, shape, (take(source, (count * rows, *width) if width else shape, shape),))
