"""Which logical tensors a spec has, and how each tensor parallel rank stores them.

A *logical* tensor is one plain matrix of the neutral decoder (``layers.3.q.weight``). A *stored* tensor is what lies
in a rank file (``layers.3.qkv.weight``): a list of *segments*, each a slice of one logical tensor along one axis. The
map is invertible, so conversion, opening at another tensor parallel degree, and export are one question asked in
different directions: which boxes of which tensors make these rows?

Stored tensors are listed in the order in which the decoder touches them.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from fgsnap.errors import UsageError
from fgsnap.spec import Attention, DecoderSpec, Experts, Layer, Mlp, Norm

Shape = tuple[int, ...]


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


class Cut(NamedTuple):
    """The part of an axis that one rank holds: ``start:stop`` of it, then ``padding`` zeros."""

    start: int
    stop: int
    padding: int = 0
    replicated: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start + self.padding

    def times(self, width: int) -> "Cut":
        """The same part of an axis on which every entry is ``width`` numbers."""
        return Cut(self.start * width, self.stop * width, self.padding * width, self.replicated)


def even_cut(size: int, tp: int, rank: int) -> Cut:
    """Equal parts, the last ones filled up with zeros."""
    share = -(-size // tp)
    start, stop = min(rank * share, size), min((rank + 1) * share, size)
    return Cut(start, stop, share - (stop - start))


def kv_head_cut(attention: Attention, tp: int, rank: int) -> Cut:
    """The key heads of a rank; with more ranks than key heads, neighbours hold the same one."""
    parts = min(tp, attention.kv_heads)
    share = attention.kv_heads // parts
    part = rank * parts // tp
    return Cut(part * share, (part + 1) * share, replicated=parts < tp)


def head_cut(attention: Attention, tp: int, rank: int) -> Cut:
    """The query heads of a rank: those that read its key heads, shared out evenly among the ranks that hold these.

    A head of zeros adds nothing: its row of the output projection is zero too.
    """
    if attention.latent is not None:
        return even_cut(attention.heads, tp, rank)
    parts = min(tp, attention.kv_heads)
    group, among = attention.heads // parts, tp // parts
    own = even_cut(group, among, rank % among)
    begin = rank // among * group
    return Cut(begin + own.start, begin + own.stop, own.padding)


def possible_tp(spec: DecoderSpec, most: int = 64) -> list[int]:
    """All tensor parallel degrees up to ``most`` at which the vocabulary and every layer divide."""
    return [tp for tp in range(1, most + 1) if _divides(spec, tp)]


def check_tp(spec: DecoderSpec, tp: int) -> None:
    """Raise UsageError, naming the degrees that work, unless the model divides into ``tp`` ranks."""
    if tp > 0 and _divides(spec, tp):
        return
    kind = next((kind for kind in spec.layer_kinds if tp > 0 and not _layer_divides(kind, tp)), spec.layer_kinds[0])
    raise UsageError(
        f"Tensor parallel degree {tp} does not divide this model.",
        f"It has {kind.attention.heads} attention heads on {kind.attention.kv_heads} KV heads.",
        f"Degrees that work: {', '.join(map(str, possible_tp(spec)))}.",
    )


def _divides(spec: DecoderSpec, tp: int) -> bool:
    return _reaches_all(spec.vocab_size, tp) and all(_layer_divides(kind, tp) for kind in spec.layer_kinds)


def _layer_divides(layer: Layer, tp: int) -> bool:
    """Key heads are divided or repeated whole; all else is filled up, as long as no rank is left with nothing."""
    attention = layer.attention
    if attention.latent is None and attention.kv_heads % tp and tp % attention.kv_heads:
        return False
    experts = layer.experts
    shared = experts and experts.shared and experts.shared.mlp
    inner = [mlp.inner for mlp in (layer.mlp, experts and experts.mlp, shared) if mlp]
    last = head_cut(attention, tp, tp - 1)
    return last.stop > last.start and all(_reaches_all(size, tp) for size in inner)


def _reaches_all(size: int, tp: int) -> bool:
    """Whether equal parts of an axis leave something for the last rank."""
    last = even_cut(size, tp, tp - 1)
    return last.stop > last.start


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Vocabulary rows over all ranks: ``vocab_size`` rounded up to a multiple of ``tp``."""
    return math.ceil(vocab_size / tp) * tp


def logical_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Every logical tensor with its shape, in the order in which the decoder touches them."""
    embedding = spec.embedding
    shapes: dict[str, Shape] = {"embed.weight": (spec.vocab_size, embedding.width)}
    if embedding.width != spec.width:
        shapes["project_in.weight"] = (spec.width, embedding.width)
    if embedding.learned_positions:
        shapes["positions.weight"] = (embedding.learned_positions, spec.width)
    for index in range(spec.depth):
        for name, shape in _layer_shapes(spec.layer(index), spec.width):
            shapes[f"layers.{index}.{name}"] = shape
    shapes.update(_norm_shapes("final_norm", spec.final_norm, spec.width))
    if embedding.width != spec.width:
        shapes["project_out.weight"] = (embedding.width, spec.width)
    if not spec.head.tied:
        shapes["head.weight"] = (spec.vocab_size, embedding.width)
    if spec.head.bias:
        shapes["head.bias"] = (spec.vocab_size,)
    return shapes


Shapes = Iterator[tuple[str, Shape]]


def _norm_shapes(name: str, norm: Norm | None, width: int) -> Shapes:
    if norm is not None and norm.weight:
        yield f"{name}.weight", (width,)
    if norm is not None and norm.bias:
        yield f"{name}.bias", (width,)


def _linear_shapes(name: str, out: int, into: int, bias: bool, stack: Shape = ()) -> Shapes:
    yield f"{name}.weight", (*stack, out, into)
    if bias:
        yield f"{name}.bias", (*stack, out)


def _layer_shapes(layer: Layer, width: int) -> Shapes:
    attention = layer.attention
    yield from _norm_shapes("attn_in", layer.attn_in, width)
    yield from _attention_shapes(attention, width) if attention.latent is None else _latent_shapes(attention, width)
    yield from _linear_shapes("out", width, attention.heads * attention.value_width, attention.out_bias)
    yield from _norm_shapes("attn_out", layer.attn_out, width)
    yield from _norm_shapes("mlp_in", layer.mlp_in, width)
    if layer.mlp is not None:
        yield from _mlp_shapes("", layer.mlp, width)
    if layer.experts is not None:
        yield from _experts_shapes(layer.experts, width)
    yield from _norm_shapes("mlp_out", layer.mlp_out, width)


def _attention_shapes(attention: Attention, width: int) -> Shapes:
    yield from _linear_shapes("q", attention.query_width, width, attention.qkv_bias)
    yield from _linear_shapes("k", attention.kv_width, width, attention.qkv_bias)
    yield from _linear_shapes("v", attention.kv_width, width, attention.qkv_bias)
    if attention.qk_norm is not None:
        norm, head = attention.qk_norm.norm, attention.qk_norm.scope == "head"
        yield from _norm_shapes("q_norm", norm, attention.head_dim if head else attention.query_width)
        yield from _norm_shapes("k_norm", norm, attention.head_dim if head else attention.kv_width)
    if attention.sinks:
        yield "sinks.weight", (attention.heads,)


def _latent_shapes(attention: Attention, width: int) -> Shapes:
    latent = attention.latent
    assert latent is not None
    if latent.query_rank is None:
        yield "q.weight", (attention.query_width, width)
    else:
        yield "q_down.weight", (latent.query_rank, width)
        yield from _norm_shapes("q_norm", latent.norm, latent.query_rank)
        yield "q_up.weight", (attention.query_width, latent.query_rank)
    yield "latent.weight", (latent.kv_rank + latent.rope_dim, width)
    yield from _norm_shapes("latent_norm", latent.norm, latent.kv_rank)
    yield "up_keys.weight", (attention.heads, latent.kv_rank, attention.head_dim - latent.rope_dim)
    yield "up_values.weight", (attention.heads, attention.value_width, latent.kv_rank)


def _mlp_shapes(prefix: str, mlp: Mlp, width: int, stack: Shape = ()) -> Shapes:
    if mlp.gated:
        yield from _linear_shapes(f"{prefix}gate", mlp.inner, width, mlp.bias, stack)
    yield from _linear_shapes(f"{prefix}up", mlp.inner, width, mlp.bias, stack)
    yield from _linear_shapes(f"{prefix}down", width, mlp.inner, mlp.down_bias, stack)


def _experts_shapes(experts: Experts, width: int) -> Shapes:
    yield from _linear_shapes("router", experts.count, width, experts.router.bias)
    if experts.router.selection_bias:
        yield "router.selection_bias", (experts.count,)
    yield from _mlp_shapes("experts.", experts.mlp, width, (experts.count,))
    if experts.shared is not None:
        yield from _mlp_shapes("shared.", experts.shared.mlp, width)
        if experts.shared.gated_by_input:
            yield "shared_gate.weight", (1, width)


def stored_tensors(spec: DecoderSpec, tp: int, rank: int) -> tuple[StoredTensor, ...]:
    """What ``rank`` of ``tp`` stores, in the order in which the decoder touches it."""
    check_tp(spec, tp)
    own = _Rank(logical_shapes(spec), tp, rank)
    vocabulary = even_cut(spec.vocab_size, tp, rank)
    stored = own.part("embed.weight", vocabulary) + own.whole("project_in.weight", "positions.weight")
    for index in range(spec.depth):
        stored += own.layer(spec.layer(index), f"layers.{index}.")
    stored += own.whole("final_norm.weight", "final_norm.bias", "project_out.weight")
    stored += own.part("head.weight", vocabulary) + own.part("head.bias", vocabulary)
    return tuple(stored)


class _Rank:
    """One rank's stored tensors, made of logical ones; what a model does not have is left out."""

    def __init__(self, shapes: dict[str, Shape], tp: int, rank: int) -> None:
        self._shapes = shapes
        self._tp = tp
        self._rank = rank

    def layer(self, layer: Layer, at: str) -> list[StoredTensor]:
        stored = self._norm(at + "attn_in")
        stored += self._attention(layer.attention, at) if layer.attention.latent is None else self._latent(layer, at)
        stored += self._norm(at + "attn_out") + self._norm(at + "mlp_in")
        if layer.mlp is not None:
            stored += self._mlp(layer.mlp, at)
        if layer.experts is not None:
            stored += self._experts(layer.experts, at)
        stored += self._norm(at + "mlp_out")
        first = stored[0]
        return [StoredTensor(first.name, first.shape, first.segments, starts_layer=True), *stored[1:]]

    def _attention(self, attention: Attention, at: str) -> list[StoredTensor]:
        heads = head_cut(attention, self._tp, self._rank)
        q, kv = heads.times(attention.head_dim), kv_head_cut(attention, self._tp, self._rank).times(attention.head_dim)
        stored = []
        for kind in ("weight", "bias"):
            stored += self._fused(f"{at}qkv.{kind}", {f"{at}q.{kind}": q, f"{at}k.{kind}": kv, f"{at}v.{kind}": kv})
        if attention.qk_norm is not None and attention.qk_norm.scope == "projection":
            stored += self.part(at + "q_norm.weight", q) + self.part(at + "k_norm.weight", kv)
        else:
            stored += self._norm(at + "q_norm") + self._norm(at + "k_norm")
        stored += self.part(at + "sinks.weight", heads)
        return stored + self.part(at + "out.weight", q, 1) + self.whole(at + "out.bias")

    def _latent(self, layer: Layer, at: str) -> list[StoredTensor]:
        attention = layer.attention
        heads = head_cut(attention, self._tp, self._rank)
        stored = self.whole(at + "q_down.weight") + self._norm(at + "q_norm")
        for name in ("q.weight", "q_up.weight"):
            stored += self.part(at + name, heads.times(attention.head_dim))
        stored += self.whole(at + "latent.weight") + self._norm(at + "latent_norm")
        stored += self.part(at + "up_keys.weight", heads) + self.part(at + "up_values.weight", heads)
        stored += self.part(at + "out.weight", heads.times(attention.value_width), 1)
        return stored + self.whole(at + "out.bias")

    def _mlp(self, mlp: Mlp, at: str, stack: int = 0) -> list[StoredTensor]:
        """``stack``: axes before those of a single matrix."""
        inner = even_cut(mlp.inner, self._tp, self._rank)
        stored = []
        for kind in ("weight", "bias"):
            parts = {f"{at}gate.{kind}": inner, f"{at}up.{kind}": inner}
            stored += self._fused(f"{at}gate_up.{kind}", parts, stack)
        return stored + self.part(at + "down.weight", inner, stack + 1) + self.whole(at + "down.bias")

    def _experts(self, experts: Experts, at: str) -> list[StoredTensor]:
        stored = self.whole(at + "router.weight", at + "router.bias", at + "router.selection_bias")
        stored += self._mlp(experts.mlp, at + "experts.", 1)
        if experts.shared is not None:
            stored += self._mlp(experts.shared.mlp, at + "shared.") + self.whole(at + "shared_gate.weight")
        return stored

    def _norm(self, name: str) -> list[StoredTensor]:
        return self.whole(f"{name}.weight", f"{name}.bias")

    def whole(self, *names: str) -> list[StoredTensor]:
        return [
            tensor
            for name in names
            if name in self._shapes
            for tensor in self.part(name, Cut(0, self._shapes[name][0], replicated=self._tp > 1))
        ]

    def part(self, name: str, cut: Cut, axis: int = 0) -> list[StoredTensor]:
        return self._fused(name, {name: cut}, axis)

    def _fused(self, name: str, parts: dict[str, Cut], axis: int = 0) -> list[StoredTensor]:
        """One tensor of the parts that exist, one after the other along ``axis``."""
        present = {part: cut for part, cut in parts.items() if part in self._shapes}
        if not present:
            return []
        segments, offset = [], 0
        for part, cut in present.items():
            if cut.stop > cut.start:
                segments.append(Segment(part, axis, cut.start, cut.stop, offset, cut.replicated))
            if cut.padding:
                segments.append(Segment(None, axis, 0, cut.padding, offset + cut.stop - cut.start))
            offset += cut.size
        shape = self._shapes[next(iter(present))]
        return [StoredTensor(name, with_axis(shape, axis, offset), tuple(segments))]


def pieces(segments: Iterable[Segment], start: Shape, extent: Shape) -> Iterator[Piece]:
    """The boxes that fill the box of ``extent`` at ``start`` of a stored tensor."""
    for segment in segments:
        axis = segment.axis
        low = max(start[axis], segment.offset)
        high = min(start[axis] + extent[axis], segment.offset + segment.stop - segment.start)
        if low < high:
            stored = with_axis(start, axis, low)
            logical = with_axis(start, axis, segment.start + low - segment.offset)
            yield Piece(segment.tensor, logical, stored, with_axis(extent, axis, high - low))


def slabs(shape: Shape, most: int, rows: int = 1) -> Iterator[tuple[Shape, Shape]]:
    """Start and extent of the boxes, of about ``most`` numbers each, that follow one another in a row-major tensor.

    A box is of one matrix of a stack and has a multiple of ``rows`` rows, or all that are left.
    """
    axis = max(0, len(shape) - 2)
    stack, height, inner = shape[:axis], shape[axis], shape[axis + 1 :]
    step = max(1, most // (rows * math.prod(inner))) * rows
    for index in itertools.product(*map(range, stack)):
        for top in range(0, height, step):
            yield (*index, top, *(0 for _ in inner)), (*(1 for _ in stack), min(step, height - top), *inner)


def with_axis(shape: Shape, axis: int, value: int) -> Shape:
    """The shape, or place, with another value on one axis."""
    return (*shape[:axis], value, *shape[axis + 1 :])


class Runs(NamedTuple):
    """``number`` runs of ``size`` bytes at equal distances, from ``source`` on in one buffer, ``target`` in another."""

    source: int
    source_step: int
    target: int
    target_step: int
    size: int
    number: int


def box_runs(
    source_shape: Shape, source_start: Shape, target_shape: Shape, target_start: Shape, extent: Shape, item: int
) -> Iterator[Runs]:
    """The bytes of a box that two row-major tensors share, in runs that are as long as both allow.

    Args:
        source_shape, target_shape: the shapes of the two, in elements.
        source_start, target_start: where the box begins in each.
        extent: the box's size per axis.
        item: bytes an element.

    A box that spans whole rows in both is one run; otherwise there is one a row, and one Runs a matrix of a stack.
    """
    inner = len(extent) - 1
    while inner > 0 and extent[inner] == source_shape[inner] == target_shape[inner]:
        inner -= 1
    size = math.prod(extent[inner:]) * item
    sources, targets = _strides(source_shape, item), _strides(target_shape, item)
    source, target = _offset(source_start, sources), _offset(target_start, targets)
    number, *steps = (extent[inner - 1], sources[inner - 1], targets[inner - 1]) if inner else (1, size, size)
    for index in itertools.product(*map(range, extent[: max(0, inner - 1)])):
        begin = source + _offset(index, sources), target + _offset(index, targets)
        yield Runs(begin[0], steps[0], begin[1], steps[1], size, number)


def _strides(shape: Shape, item: int) -> list[int]:
    strides = [item] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _offset(index: Shape, strides: list[int]) -> int:
    return sum(at * stride for at, stride in zip(index, strides, strict=False))
