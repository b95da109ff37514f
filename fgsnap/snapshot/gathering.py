"""Reading a snapshot at another tensor parallel degree, or by logical tensor: each needed byte is copied once.

Bytes that are packed are copied twice: their panels are unpacked one at a time, and what is put together is row-major.
"""

from __future__ import annotations

import math
import mmap
from typing import NamedTuple

from fgsnap.layout import Segment, Shape, copy_box, logical_shapes, stored_tensors
from fgsnap.snapshot.format import plan_rank, rank_file
from fgsnap.snapshot.packing import PANEL_ROWS, Layout, unpacked
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
    """Every stored tensor of one rank by name, at the snapshot's own degree or at 1.

    The own degree gives views of the mapped file. Any other snapshot is put together in one anonymous mapping.
    """
    manifest = snapshot.manifest
    assert tp in (1, manifest.tp), "the caller refuses other degrees"
    if manifest.tp == tp:
        own = rank_file(rank, tp)
        return {
            entry.name: TensorBytes(entry.dtype, entry.shape, snapshot.tensor(entry), entry.layout)
            for entry in manifest.tensors
            if entry.file == own
        }
    dtypes: dict[str, DType] = {entry.name: entry.dtype for entry in manifest.tensors}
    layout = plan_rank([(tensor, dtypes[tensor.name]) for tensor in stored_tensors(manifest.spec, 1, 0)])
    shapes = logical_shapes(manifest.spec)
    memory = memoryview(mmap.mmap(-1, layout.size))
    joined: dict[str, TensorBytes] = {}
    for tensor in layout.tensors:
        target = memory[tensor.offset : tensor.offset + tensor.bytes]
        for segment in tensor.segments:
            assert segment.tensor is not None, "a single rank has no padding"
            box = _held(segment, _whole(shapes[segment.tensor]))
            _gather(snapshot, segment.tensor, box, target, tensor.shape, _place(segment, [low for low, _ in box]))
        joined[tensor.name] = TensorBytes(tensor.dtype, tensor.shape, target.toreadonly())
    return joined


def read_logical(snapshot: Snapshot, name: str, start_row: int, stop_row: int, target: memoryview) -> None:
    """Fill ``target`` with rows ``start_row:stop_row`` of a logical tensor, from whatever ranks hold them."""
    _, *rest = _whole(logical_shapes(snapshot.manifest.spec)[name])
    box = ((start_row, stop_row), *rest)
    shape = tuple(stop - start for start, stop in box)
    _gather(snapshot, name, box, target.cast("B"), shape, (0,) * len(shape))


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
    """As copy_box, from a matrix that lies in words32 panels to a row-major one."""
    step = PANEL_ROWS["words32"]
    size = step * source_shape[1] * item
    begin, end = source_start[0], source_start[0] + extent[0]
    copied = 0
    for top in range(begin // step * step, end, step):
        low, high = max(begin, top), min(end, top + step)
        rows = unpacked(source[top // step * size :][:size], low - top, high - top)
        held, place = (high - low, source_shape[1]), (target_start[0] + low - begin, target_start[1])
        part = (high - low, extent[1])
        copied += copy_box(memoryview(rows), held, (0, source_start[1]), target, target_shape, place, part, item)
    return copied


def _whole(shape: Shape) -> Box:
    return tuple((0, extent) for extent in shape)


def _held(segment: Segment, box: Box) -> Box:
    """The part of ``box`` that a segment holds; empty or negative on the segment's axis where they do not meet."""
    low, high = box[segment.axis]
    return (*box[: segment.axis], (max(low, segment.start), min(high, segment.stop)), *box[segment.axis + 1 :])


def _place(segment: Segment, starts: list[int]) -> Shape:
    """Where in the segment's stored tensor a box of the logical tensor that begins at ``starts`` begins."""
    return tuple(
        start - segment.start + segment.offset if axis == segment.axis else start for axis, start in enumerate(starts)
    )
