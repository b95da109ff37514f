"""Which logical tensors a spec has, and how each tensor parallel rank stores them.

A *logical* tensor is one plain matrix of the neutral decoder (``layers.3.q.weight``). A *stored* tensor is what lies
in a rank file (``layers.3.qkv.weight``): a list of *segments*, each a slice of one logical tensor along one axis. The
map is invertible, so conversion, opening at another tensor parallel degree, and export are one question asked in
different directions: which boxes of which tensors make these rows?

Stored tensors are listed in the order in which the decoder touches them.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import math
from collections.abc import Iterable, Iterator

import msgspec

from fgsnap.errors import UnsupportedModel, UsageError
from fgsnap.spec import DecoderSpec, Layer, Norm, features

Shape = tuple[int, ...]

# What this version can lay out. A spec feature outside this set is refused by name.
LAID_OUT = frozenset(
    """
    attention.rope attention.window attention.qkv_bias attention.out_bias attention.softcap attention.chunk
    attention.query_temperature query_temperature.logn query_temperature.step query_temperature.scale
    layer.attn_in layer.attn_out layer.mlp_in layer.mlp_out layer.sequential layer.parallel layer.post
    layer.residual_multiplier
    mlp.silu mlp.gelu mlp.gelu_tanh mlp.relu mlp.clamped_swiglu mlp.clamp mlp.bias mlp.down_bias mlp.gated
    norm.rms norm.ln norm.l2 norm.weight norm.bias norm.unit_offset norm.float32_weight
    embedding.scale embedding.round_scale head.tied head.bias head.multiplier head.softcap
    rope.linear rope.dynamic rope.llama3 rope.yarn rope.longrope rope.proportional_head_dim
    yarn.beta_fast yarn.beta_slow yarn.truncate
    """.split()
)


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``stored[offset : offset + stop - start]`` along ``axis`` is ``logical[start:stop]`` along the same axis.

    ``tensor`` None means padding: zeros, which the runtime masks. ``replicated`` marks that several ranks hold the
    slice.
    """

    tensor: str | None
    axis: int
    start: int
    stop: int
    offset: int
    replicated: bool = False


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor of a rank file. ``starts_layer`` asks for page alignment."""

    name: str
    shape: Shape
    segments: tuple[Segment, ...]
    starts_layer: bool = False


class Piece(msgspec.Struct, frozen=True):
    """One box copied between a logical tensor and a stored one; starts and extents per axis. None: zeros."""

    tensor: str | None
    logical_start: Shape
    stored_start: Shape
    extent: Shape


def refuse_unlaid(spec: DecoderSpec) -> None:
    """Raise UnsupportedModel for spec features that this version cannot lay out."""
    unknown = sorted(features(spec) - LAID_OUT)
    if unknown:
        raise UnsupportedModel(
            f"This model needs {', '.join(unknown)}.",
            "This version of fgsnap cannot store tensors for it.",
            "Upgrade fgsnap, or run 'fgsnap --help' for what is supported.",
        )


def possible_tp(spec: DecoderSpec, most: int = 64) -> list[int]:
    """All tensor parallel degrees up to ``most`` at which every layer divides."""
    return [tp for tp in range(1, most + 1) if all(_divides(kind, tp) for kind in spec.layer_kinds)]


def check_tp(spec: DecoderSpec, tp: int) -> None:
    """Raise UsageError, naming the degrees that work, unless the model divides into ``tp`` ranks."""
    if tp in possible_tp(spec, max(tp, 64)):
        return
    attention = spec.layer_kinds[0].attention
    mlp = spec.layer_kinds[0].mlp
    sizes = f"{attention.heads} attention heads, {attention.kv_heads} KV heads"
    if mlp is not None:
        sizes += f", MLP width {mlp.inner}"
    raise UsageError(
        f"Tensor parallel degree {tp} does not divide this model.",
        f"It has {sizes}.",
        f"Degrees that work: {', '.join(map(str, possible_tp(spec)))}.",
    )


def _divides(layer: Layer, tp: int) -> bool:
    attention = layer.attention
    heads = attention.heads % tp == 0
    kv = attention.kv_heads % tp == 0 or tp % attention.kv_heads == 0
    return heads and kv and (layer.mlp is None or layer.mlp.inner % tp == 0)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Vocabulary rows over all ranks: ``vocab_size`` rounded up to a multiple of ``tp``."""
    return math.ceil(vocab_size / tp) * tp


def logical_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Every logical tensor with its shape, in the order in which the decoder touches them."""
    shapes: dict[str, Shape] = {"embed.weight": (spec.vocab_size, spec.embedding.width)}
    for index in range(spec.depth):
        for name, shape in _layer_shapes(spec.layer(index), spec.width):
            shapes[f"layers.{index}.{name}"] = shape
    shapes.update(_norm_shapes("final_norm", spec.final_norm, spec.width))
    if not spec.head.tied:
        shapes["head.weight"] = (spec.vocab_size, spec.width)
    if spec.head.bias:
        shapes["head.bias"] = (spec.vocab_size,)
    return shapes


def _norm_shapes(name: str, norm: Norm | None, width: int) -> Iterator[tuple[str, Shape]]:
    if norm is not None and norm.weight:
        yield f"{name}.weight", (width,)
    if norm is not None and norm.bias:
        yield f"{name}.bias", (width,)


def _linear_shapes(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _layer_shapes(layer: Layer, width: int) -> Iterator[tuple[str, Shape]]:
    attention, mlp = layer.attention, layer.mlp
    yield from _norm_shapes("attn_in", layer.attn_in, width)
    yield from _linear_shapes("q", attention.query_width, width, attention.qkv_bias)
    yield from _linear_shapes("k", attention.kv_width, width, attention.qkv_bias)
    yield from _linear_shapes("v", attention.kv_width, width, attention.qkv_bias)
    yield from _linear_shapes("out", width, attention.query_width, attention.out_bias)
    yield from _norm_shapes("attn_out", layer.attn_out, width)
    yield from _norm_shapes("mlp_in", layer.mlp_in, width)
    if mlp is not None:
        if mlp.gated:
            yield from _linear_shapes("gate", mlp.inner, width, mlp.bias)
        yield from _linear_shapes("up", mlp.inner, width, mlp.bias)
        yield from _linear_shapes("down", width, mlp.inner, mlp.down_bias)
    yield from _norm_shapes("mlp_out", layer.mlp_out, width)


def stored_tensors(spec: DecoderSpec, tp: int, rank: int) -> tuple[StoredTensor, ...]:
    """What ``rank`` of ``tp`` stores, in the order in which the decoder touches it."""
    refuse_unlaid(spec)
    check_tp(spec, tp)
    shapes = logical_shapes(spec)
    stored = [_vocabulary_rows("embed.weight", shapes, tp, rank)]
    for index in range(spec.depth):
        stored += _stored_layer(spec.layer(index), f"layers.{index}.", shapes, tp, rank)
    stored += [_whole(name, shapes, tp) for name in ("final_norm.weight", "final_norm.bias") if name in shapes]
    stored += [_vocabulary_rows(name, shapes, tp, rank) for name in ("head.weight", "head.bias") if name in shapes]
    return tuple(stored)


def _stored_layer(layer: Layer, prefix: str, shapes: dict[str, Shape], tp: int, rank: int) -> list[StoredTensor]:
    attention = layer.attention
    kv_parts = min(tp, attention.kv_heads)
    kv_rank = rank * kv_parts // tp
    qkv = (("q", tp, rank), ("k", kv_parts, kv_rank), ("v", kv_parts, kv_rank))
    gate_up = tuple((part, tp, rank) for part in ("gate", "up"))

    def fused(name: str, parts: tuple[tuple[str, int, int], ...], kind: str) -> list[StoredTensor]:
        present = [(f"{prefix}{part}.{kind}", of, at) for part, of, at in parts if f"{prefix}{part}.{kind}" in shapes]
        return [_fused_rows(f"{prefix}{name}.{kind}", present, shapes, tp)] if present else []

    def whole(*names: str) -> list[StoredTensor]:
        return [_whole(prefix + name, shapes, tp) for name in names if prefix + name in shapes]

    stored = whole("attn_in.weight", "attn_in.bias")
    stored += fused("qkv", qkv, "weight") + fused("qkv", qkv, "bias")
    stored += [_columns(f"{prefix}out.weight", shapes, tp, rank)] + whole("out.bias")
    stored += whole("attn_out.weight", "attn_out.bias", "mlp_in.weight", "mlp_in.bias")
    if layer.mlp is not None:
        stored += fused("gate_up", gate_up, "weight") + fused("gate_up", gate_up, "bias")
        stored += [_columns(f"{prefix}down.weight", shapes, tp, rank)] + whole("down.bias")
    stored += whole("mlp_out.weight", "mlp_out.bias")
    first = stored[0]
    return [StoredTensor(first.name, first.shape, first.segments, starts_layer=True), *stored[1:]]


def _whole(name: str, shapes: dict[str, Shape], tp: int) -> StoredTensor:
    shape = shapes[name]
    return StoredTensor(name, shape, (Segment(name, 0, 0, shape[0], 0, replicated=tp > 1),))


def _columns(name: str, shapes: dict[str, Shape], tp: int, rank: int) -> StoredTensor:
    rows, columns = shapes[name]
    share = columns // tp
    return StoredTensor(name, (rows, share), (Segment(name, 1, rank * share, (rank + 1) * share, 0),))


def _fused_rows(name: str, parts: list[tuple[str, int, int]], shapes: dict[str, Shape], tp: int) -> StoredTensor:
    segments, offset = [], 0
    for tensor, of, at in parts:
        share = shapes[tensor][0] // of
        segments.append(Segment(tensor, 0, at * share, (at + 1) * share, offset, replicated=of < tp))
        offset += share
    return StoredTensor(name, (offset, *shapes[parts[0][0]][1:]), tuple(segments))


def _vocabulary_rows(name: str, shapes: dict[str, Shape], tp: int, rank: int) -> StoredTensor:
    rows, *rest = shapes[name]
    share = padded_vocabulary(rows, tp) // tp
    start, stop = min(rank * share, rows), min((rank + 1) * share, rows)
    segments = [Segment(name, 0, start, stop, 0)] if stop > start else []
    if stop - start < share:
        segments.append(Segment(None, 0, 0, share - (stop - start), stop - start))
    return StoredTensor(name, (share, *rest), tuple(segments))


def pieces(shape: Shape, segments: Iterable[Segment], start: int, stop: int) -> Iterator[Piece]:
    """The boxes that fill rows ``start:stop`` (axis 0) of a stored tensor of ``shape``."""
    zero = (0,) * len(shape)
    for segment in segments:
        length = segment.stop - segment.start
        if segment.axis == 0:
            low, high = max(start, segment.offset), min(stop, segment.offset + length)
            if low < high:
                logical = (segment.start + low - segment.offset, *zero[1:])
                yield Piece(segment.tensor, logical, (low, *zero[1:]), (high - low, *shape[1:]))
        else:
            logical = _with(_with(zero, 0, start), segment.axis, segment.start)
            stored = _with(_with(zero, 0, start), segment.axis, segment.offset)
            extent = _with(_with(shape, 0, stop - start), segment.axis, length)
            yield Piece(segment.tensor, logical, stored, extent)


def _with(shape: Shape, axis: int, value: int) -> Shape:
    return (*shape[:axis], value, *shape[axis + 1 :])


def copy_box(
    source: memoryview,
    source_shape: Shape,
    source_start: Shape,
    target: memoryview,
    target_shape: Shape,
    target_start: Shape,
    extent: Shape,
    item: int,
) -> int:
    """Copy one box between two row-major byte buffers and return the bytes copied.

    Args:
        source, target: flat byte views of the two whole tensors.
        source_shape, target_shape: their shapes in elements.
        source_start, target_start: where the box begins in each.
        extent: the box's size per axis.
        item: bytes an element.

    A box that spans whole rows in both is one copy; otherwise one copy a run of the last axes that both share.
    """
    axes = len(extent)
    inner = axes - 1
    while inner > 0 and extent[inner] == source_shape[inner] == target_shape[inner]:
        inner -= 1
    run = math.prod(extent[inner:]) * item
    source_strides, target_strides = _strides(source_shape, item), _strides(target_shape, item)
    source_at = sum(s * d for s, d in zip(source_start, source_strides, strict=True))
    target_at = sum(s * d for s, d in zip(target_start, target_strides, strict=True))
    for step in _steps(extent[:inner], source_strides, target_strides):
        a, b = source_at + step[0], target_at + step[1]
        target[b : b + run] = source[a : a + run]
    return math.prod(extent) * item


def _strides(shape: Shape, item: int) -> list[int]:
    strides = [item] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _steps(extent: Shape, a: list[int], b: list[int]) -> Iterator[tuple[int, int]]:
    if not extent:
        yield 0, 0
        return
    for index in range(extent[0]):
        for inner in _steps(extent[1:], a[1:], b[1:]):
            yield index * a[0] + inner[0], index * b[0] + inner[1]
