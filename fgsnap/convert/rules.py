"""The map between a checkpoint's tensors and the logical tensors of the neutral decoder, read in both directions.

A *rule* says of which strided pieces of source tensors one logical tensor is made. It is data: a fused QKV cut by
groups, interleaved gate and up rows, transposed experts, a stack of one tensor per expert and rope permutations are all
lists of takes. Conversion asks a rule which source values make a box of the logical tensor; export asks the same
question and writes where conversion read. Only the wanted source rows are touched, so memory is bounded by the box.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

Shape = tuple[int, ...]
Range = tuple[int, int]

Array = np.ndarray[Any, Any]

ReadRows = Callable[[str, int, int], Array]
"""(source name, first row, row after the last) -> those rows of axis 0, C-contiguous."""


class Take(msgspec.Struct, frozen=True):
    """A strided piece of one source tensor.

    The source of ``shape`` is seen as ``view`` (row-major, the same values), each axis of the view is cut to
    [start, stop), the axes are put into ``order``, and the result is read row-major as rows of the logical tensor.
    """

    source: str
    shape: Shape
    view: Shape
    cut: tuple[Range, ...]
    order: tuple[int, ...]


class Rule(msgspec.Struct, frozen=True):
    """``tensor``, of ``shape``, is its takes stacked along axis 0."""

    tensor: str
    shape: Shape
    takes: tuple[Take, ...]


class Box(NamedTuple):
    """A part of a logical box that lies at constant strides in one source tensor.

    Attributes:
        source, source_shape: the source tensor.
        at: where the part begins, per logical axis, counted from the asked box's own start.
        axes: per logical axis, the extents of the view axes that it is made of.
        offset: the first element's index in the flat source.
        strides: elements between neighbours, one per entry of the flattened ``axes``.
    """

    source: str
    source_shape: Shape
    at: Shape
    axes: tuple[Shape, ...]
    offset: int
    strides: Shape


def take(
    source: str,
    shape: Shape,
    view: Shape | None = None,
    cut: Mapping[int, Range] | None = None,
    order: Sequence[int] | None = None,
) -> Take:
    """A take whose absent arguments leave the source as it is; ``cut`` names only the axes that are cut."""
    view = shape if view is None else view
    assert math.prod(view) == math.prod(shape), f"{source}: {view} is no view of {shape}"
    cuts = tuple((cut or {}).get(axis, (0, size)) for axis, size in enumerate(view))
    assert all(0 <= low < high <= size for (low, high), size in zip(cuts, view, strict=True)), f"{source}: cut {cuts}"
    axes = tuple(range(len(view)) if order is None else order)
    assert sorted(axes) == list(range(len(view))), f"{source}: order {axes}"
    return Take(source, shape, view, cuts, axes)


def rule(tensor: str, shape: Shape, takes: Iterable[Take]) -> Rule:
    """The rule for ``tensor``; its takes must fill ``shape`` and fold into its axes."""
    made = Rule(tensor, shape, tuple(takes))
    rows = sum(_rows(shape, piece) for piece in made.takes)
    assert rows == shape[0], f"{tensor}: takes give {rows} rows of {shape[0]}"
    for piece in made.takes:
        _fold(_ordered(piece), (_rows(shape, piece), *shape[1:]))
    return made


def whole(tensor: str, source: str, shape: Shape) -> Rule:
    """The logical tensor is the source tensor."""
    return rule(tensor, shape, (take(source, shape),))


def is_whole(rule: Rule) -> bool:
    """Whether the rule moves nothing: the logical tensor's rows are the rows of one source tensor."""
    return rule == whole(rule.tensor, rule.takes[0].source, rule.shape)


def pair_to_half(tensor: str, source: str, shape: Shape, heads: int, dims: int | None = None) -> Rule:
    """Query or key rows of a checkpoint that rotates adjacent pairs, in the order that rotates half against half.

    Args:
        tensor, source, shape: as in ``whole``; axis 0 holds ``heads`` heads, one after the other.
        heads: how many.
        dims: the rotated dims at the start of each head; None: all.
    """
    head_dim = shape[0] // heads
    dims = head_dim if dims is None else dims
    view = (heads, head_dim // 2, 2, *shape[1:])
    swap = (0, 2, 1, *range(3, len(view)))
    if dims == head_dim:
        return rule(tensor, shape, (take(source, shape, view, order=swap),))
    return rule(
        tensor,
        shape,
        itertools.chain.from_iterable(
            (
                take(source, shape, view, {0: (head, head + 1), 1: (0, dims // 2)}, swap),
                take(source, shape, view, {0: (head, head + 1), 1: (dims // 2, head_dim // 2)}),
            )
            for head in range(heads)
        ),
    )


def rotated_first(tensor: str, source: str, shape: Shape, heads: int, dims: int) -> Rule:
    """Rows of heads that rotate dimension i < dims / 2 against i + head_dim / 2, with the rotated ones put first."""
    half = shape[0] // heads // 2
    if dims == 2 * half:
        return whole(tensor, source, shape)
    view = (heads, 2, half, *shape[1:])
    return rule(
        tensor,
        shape,
        (
            take(source, shape, view, {0: (head, head + 1), 2: part})
            for head in range(heads)
            for part in ((0, dims // 2), (dims // 2, half))
        ),
    )


def sources(rules: Iterable[Rule]) -> dict[str, Shape]:
    """Every source tensor that the rules take from, with its whole shape, in the order of the rules."""
    return {piece.source: piece.shape for each in rules for piece in each.takes}


def digest(rules: Iterable[Rule]) -> str:
    """The sha256 of the rules' canonical form: what was done to the checkpoint, as one name."""
    return hashlib.sha256(msgspec.json.encode(tuple(rules), order="sorted")).hexdigest()


def read_box(rule: Rule, rows: ReadRows, start: Shape, out: Array) -> None:
    """Fill ``out`` with the logical tensor's box of ``out``'s shape that begins at ``start``.

    Args:
        rule: how the logical tensor is made.
        rows: reads source rows; they must have ``out``'s item size.
        start: the box's first index per axis.
        out: a writable array, contiguous or a strided part of one.
    """
    for box in boxes(rule, start, out.shape):
        first, last = source_rows(box)
        data = rows(box.source, first, last)
        row = math.prod(box.source_shape[1:])
        np.copyto(_part(out, box), _strided(data, box, first * row).view(out.dtype))


def write_box(rule: Rule, target: Callable[[str], Array], start: Shape, data: Array) -> None:
    """The inverse of ``read_box``: put ``data``, the logical box at ``start``, where conversion read it.

    Args:
        rule: how the logical tensor was made.
        target: gives the whole source tensor as a writable, C-contiguous array.
        start: the box's first index per axis.
        data: the box's values.
    """
    for box in boxes(rule, start, data.shape):
        np.copyto(_strided(target(box.source), box, 0), _part(data, box))


def boxes(rule: Rule, start: Shape, extent: Shape) -> Iterator[Box]:
    """The strided parts that make the logical box ``start`` ... ``start + extent``, in row order."""
    taken = 0
    for piece in rule.takes:
        rows = _rows(rule.shape, piece)
        low, high = max(start[0] - taken, 0), min(start[0] + extent[0] - taken, rows)
        if low < high:
            shape = (rows, *rule.shape[1:])
            spans = ((low, high), *((s, s + e) for s, e in zip(start[1:], extent[1:], strict=True)))
            yield from _take_boxes(piece, shape, spans, (start[0] - taken, *start[1:]))
        taken += rows


def _take_boxes(piece: Take, shape: Shape, spans: tuple[Range, ...], origin: Shape) -> Iterator[Box]:
    sizes = _ordered(piece)
    view_strides = _strides(piece.view)
    strides = tuple(view_strides[axis] for axis in piece.order)
    base = sum(low * stride for (low, _), stride in zip(piece.cut, view_strides, strict=True))
    groups = _fold(sizes, shape)
    choices = [list(_digit_ranges(group, *span)) for group, span in zip(groups, spans, strict=True)]
    for ranges in itertools.product(*choices):
        flat = tuple(itertools.chain.from_iterable(ranges))
        at = tuple(
            sum(low * stride for (low, _), stride in zip(part, _strides(group), strict=True)) - first
            for part, group, first in zip(ranges, groups, origin, strict=True)
        )
        yield Box(
            source=piece.source,
            source_shape=piece.shape,
            at=at,
            axes=tuple(tuple(high - low for low, high in part) for part in ranges),
            offset=base + sum(low * stride for (low, _), stride in zip(flat, strides, strict=True)),
            strides=strides,
        )


def _digit_ranges(sizes: Shape, low: int, high: int) -> Iterator[tuple[Range, ...]]:
    """Cover the numbers low ... high - 1, written with digits of ``sizes``, by boxes of digits in ascending order."""
    if not sizes:
        yield ()
        return
    inner = math.prod(sizes[1:])
    full = tuple((0, size) for size in sizes[1:])
    if low % inner:
        digit = low // inner
        stop = min(high, (digit + 1) * inner)
        for rest in _digit_ranges(sizes[1:], low - digit * inner, stop - digit * inner):
            yield ((digit, digit + 1), *rest)
        low = stop
    if low // inner < high // inner:
        yield ((low // inner, high // inner), *full)
        low = high // inner * inner
    if low < high:
        digit = low // inner
        for rest in _digit_ranges(sizes[1:], 0, high - low):
            yield ((digit, digit + 1), *rest)


def _fold(sizes: Shape, shape: Shape) -> tuple[Shape, ...]:
    """Group consecutive ``sizes`` so that each group's product is the next entry of ``shape``."""
    groups, axis = [], 0
    for wanted in shape:
        begin, product = axis, 1
        while product < wanted:
            product *= sizes[axis]
            axis += 1
        assert product == wanted, f"axes {sizes} do not fold into {shape}"
        groups.append(sizes[begin:axis])
    rest = sizes[axis:]
    assert all(size == 1 for size in rest), f"axes {sizes} do not fold into {shape}"
    groups[-1] += rest
    return tuple(groups)


def _ordered(piece: Take) -> Shape:
    return tuple(piece.cut[axis][1] - piece.cut[axis][0] for axis in piece.order)


def _rows(shape: Shape, piece: Take) -> int:
    return math.prod(_ordered(piece)) // math.prod(shape[1:])


def source_rows(box: Box) -> Range:
    """The rows of the source's axis 0 that hold the box."""
    row = math.prod(box.source_shape[1:])
    extents = itertools.chain.from_iterable(box.axes)
    last = box.offset + sum((extent - 1) * stride for extent, stride in zip(extents, box.strides, strict=True))
    return box.offset // row, last // row + 1


def _strided(data: Array, box: Box, skipped: int) -> Array:
    """The box's values inside ``data``, which is the flat source without its first ``skipped`` elements."""
    assert data.flags.c_contiguous, f"{box.source}: rows must be contiguous"
    item = data.itemsize
    return np.ndarray(
        shape=tuple(itertools.chain.from_iterable(box.axes)),
        dtype=data.dtype,
        buffer=data,  # numpy checks that shape and strides stay inside
        offset=(box.offset - skipped) * item,
        strides=tuple(stride * item for stride in box.strides),
    )


def _part(array: Array, box: Box) -> Array:
    """The box's part of ``array``, with each logical axis split into the view axes it is made of."""
    part = array[tuple(slice(at, at + math.prod(axes)) for at, axes in zip(box.at, box.axes, strict=True))]
    strides = tuple(
        inner * stride for axes, stride in zip(box.axes, part.strides, strict=True) for inner in _strides(axes)
    )
    split: Array = np.lib.stride_tricks.as_strided(part, tuple(itertools.chain.from_iterable(box.axes)), strides)
    return split


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
