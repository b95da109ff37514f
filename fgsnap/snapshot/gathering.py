"""Reading a snapshot at another tensor parallel degree, or by logical tensor: each needed byte is copied once."""

from __future__ import annotations

import math
import mmap

from fgsnap.layout import Segment, Shape, copy_box, logical_shapes, stored_tensors
from fgsnap.snapshot.format import plan_rank
from fgsnap.snapshot.reading import Snapshot
from fgsnap.spec import DTYPE_BYTES, DType

Box = tuple[tuple[int, int], ...]
"""Start and stop on each axis of a logical tensor."""


def opened_at_tp1(snapshot: Snapshot) -> dict[str, tuple[DType, Shape, memoryview]]:
    """Every stored tensor of a single rank: dtype, shape and read-only bytes by name.

    A TP 1 snapshot gives views of its mapped file. Any other degree is put together in one anonymous mapping.
    """
    manifest = snapshot.manifest
    if manifest.tp == 1:
        return {entry.name: (entry.dtype, entry.shape, snapshot.tensor(entry)) for entry in manifest.tensors}
    dtypes: dict[str, DType] = {entry.name: entry.dtype for entry in manifest.tensors}
    layout = plan_rank([(tensor, dtypes[tensor.name]) for tensor in stored_tensors(manifest.spec, 1, 0)])
    shapes = logical_shapes(manifest.spec)
    memory = memoryview(mmap.mmap(-1, layout.size))
    joined: dict[str, tuple[DType, Shape, memoryview]] = {}
    for tensor in layout.tensors:
        target = memory[tensor.offset : tensor.offset + tensor.bytes]
        for segment in tensor.segments:
            assert segment.tensor is not None, "a single rank has no padding"
            box = _held(segment, _whole(shapes[segment.tensor]))
            _gather(snapshot, segment.tensor, box, target, tensor.shape, _place(segment, [low for low, _ in box]))
        joined[tensor.name] = (tensor.dtype, tensor.shape, target.toreadonly())
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
        item = DTYPE_BYTES[entry.dtype]
        source_start = _place(segment, starts)
        source = snapshot.tensor(entry)
        copied += copy_box(source, entry.shape, source_start, target, target_shape, target_start, extent, item) // item
    assert copied == math.prod(stop - start for start, stop in box), f"{name}: {copied} values in {box}"


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
