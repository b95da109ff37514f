"""Reading a snapshot at another tensor parallel degree, or by logical tensor: each needed byte is copied once.

Bytes that are packed are copied twice: their panels are unpacked one at a time, and what is put together is row-major.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from fgsnap.layout import Segment, Shape, copy_box, stored_tensors
from fgsnap.snapshot.format import plan_rank, rank_file
from fgsnap.snapshot.packing import PANEL_ROWS, Layout, packed_bytes, unpacked
from fgsnap.snapshot.reading import Snapshot
from fgsnap.spec import DTYPE_BYTES, DType

Box = tuple[tuple[int, int], ...]
"""Start and stop on each axis of a logical tensor."""


class TensorBytes(NamedTuple):
    """One stored tensor of a single rank; the values lie in ``data`` as ``layout`` says."""

    dtype: DType
    shape: Shape
    data: memoryview
    layout: Layout = "row"


def opened_at(snapshot: Snapshot, tp: int, rank: int) -> dict[str, TensorBytes]:
    """Every stored tensor of ``rank`` of ``tp`` by name.

    At the snapshot's own degree these are views of the mapped file; at any other they are put together in one anonymous
    mapping.
    """
    manifest = snapshot.manifest
    if manifest.tp == tp:
        own = rank_file(rank, tp)
        return {
            entry.name: TensorBytes(entry.dtype, entry.shape, snapshot.tensor(entry), entry.layout)
            for entry in manifest.tensors
            if entry.file == own
        }
    dtypes: dict[str, DType] = {entry.name: entry.dtype for entry in manifest.tensors}
    layout = plan_rank([(tensor, dtypes[tensor.name]) for tensor in stored_tensors(manifest.spec, tp, rank)])
    memory = memoryview(mmap.mmap(-1, layout.size))
    joined: dict[str, TensorBytes] = {}
    for tensor in layout.tensors:
        target = memory[tensor.offset : tensor.offset + tensor.bytes]
        gather(snapshot, tensor.segments, tensor.shape, target)
        joined[tensor.name] = TensorBytes(tensor.dtype, tensor.shape, target.toreadonly())
    return joined


def gather(snapshot: Snapshot, segments: Iterable[Segment], shape: Shape, target: memoryview) -> None:
    """Put a stored tensor of ``shape`` together in ``target``, which holds zeros: those of padding stay."""
    for segment in segments:
        if segment.tensor is None:
            continue
        box = tuple((0, size) for size in shape)
        held = _with(box, segment.axis, (segment.start, segment.stop))
        place = _with((0,) * len(shape), segment.axis, segment.offset)
        _gather(snapshot, segment.tensor, held, target, shape, place)


def read_logical(snapshot: Snapshot, name: str, start: Shape, extent: Shape, target: memoryview) -> None:
    """Fill ``target`` with the box of ``extent`` at ``start`` of a logical tensor, from whatever ranks hold it."""
    box = tuple((low, low + size) for low, size in zip(start, extent, strict=True))
    _gather(snapshot, name, box, target.cast("B"), extent, (0,) * len(extent))


def _gather(snapshot: Snapshot, name: str, box: Box, target: memoryview, target_shape: Shape, place: Shape) -> None:
    """Copy ``box`` of a logical tensor to ``place`` in ``target``, piece by piece from the slices that hold it."""
    copied = 0
    for entry, segment in snapshot.slices(name):
        part = _held(segment, box)
        extent = tuple(stop - start for start, stop in part)
        if min(extent) <= 0:
            continue
        starts = [start for start, _ in part]
        target_start = tuple(p + start - low for p, start, (low, _) in zip(place, starts, box, strict=True))
        copy = copy_box if entry.layout == "row" else _copy_packed
        item = DTYPE_BYTES[entry.dtype]
        source, source_start = snapshot.tensor(entry), _place(segment, starts)
        copied += copy(source, entry.shape, source_start, target, target_shape, target_start, extent, item) // item
    assert copied == math.prod(stop - start for start, stop in box), f"{name}: {copied} values in {box}"


def _copy_packed(
    source: memoryview,
    source_shape: Shape,
    source_start: Shape,
    target: memoryview,
    target_shape: Shape,
    target_start: Shape,
    extent: Shape,
    item: int,
) -> int:
    """As copy_box, from matrices that lie in words32 panels to row-major ones."""
    *stack, height, width = source_shape
    matrix = packed_bytes("words32", (height, width), "float32" if item == 4 else "bfloat16")
    copied = 0
    for index in itertools.product(*map(range, extent[:-2])):
        own = _flat([start + at for start, at in zip(source_start, index, strict=False)], stack)
        panels = source[own * matrix : (own + 1) * matrix]
        place = (*(start + at for start, at in zip(target_start, index, strict=False)), *target_start[-2:])
        copied += _copy_matrix(
            panels, (height, width), source_start[-2:], target, target_shape, place, extent[-2:], item
        )
    return copied


def _flat(index: list[int], shape: list[int]) -> int:
    flat = 0
    for at, size in zip(index, shape, strict=True):
        flat = flat * size + at
    return flat


def _copy_matrix(
    source: memoryview,
    source_shape: Shape,
    source_start: Shape,
    target: memoryview,
    target_shape: Shape,
    place: Shape,
    extent: Shape,
    item: int,
) -> int:
    """One matrix of _copy_packed, to ``place`` of a target that may be a stack."""
    step = PANEL_ROWS["words32"]
    size = step * source_shape[1] * item
    begin, end = source_start[0], source_start[0] + extent[0]
    copied = 0
    for top in range(begin // step * step, end, step):
        low, high = max(begin, top), min(end, top + step)
        rows = unpacked(source[top // step * size :][:size], low - top, high - top)
        at = (*place[:-2], place[-2] + low - begin, place[-1])
        ones = (1,) * (len(target_shape) - 2)
        held, part = (*ones, high - low, source_shape[1]), (*ones, high - low, extent[1])
        start = (*(0 for _ in ones), 0, source_start[1])
        copied += copy_box(memoryview(rows), held, start, target, target_shape, at, part, item)
    return copied


def _held(segment: Segment, box: Box) -> Box:
    """The part of ``box`` that a segment holds; empty or negative on the segment's axis where they do not meet."""
    low, high = box[segment.axis]
    return (*box[: segment.axis], (max(low, segment.start), min(high, segment.stop)), *box[segment.axis + 1 :])


def _place(segment: Segment, starts: list[int]) -> Shape:
    """Where in the segment's stored tensor a box of the logical tensor that begins at ``starts`` begins."""
    return tuple(
        start - segment.start + segment.offset if axis == segment.axis else start for axis, start in enumerate(starts)
    )


Entry = TypeVar("Entry")


def _with(values: tuple[Entry, ...], axis: int, value: Entry) -> tuple[Entry, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
