"""Whether the ranks of a snapshot hold one model: several hold the same slices, and what is padding is zeros.

Digests cannot tell: they are of whatever the ranks hold. What one rank has otherwise, it would compute with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fgsnap.errors import SnapshotRefused
from fgsnap.layout import Segment, Shape, slabs, with_axis
from fgsnap.snapshot.files import refused
from fgsnap.snapshot.format import TensorEntry
from fgsnap.snapshot.gathering import read_stored
from fgsnap.snapshot.packing import PANEL_ROWS
from fgsnap.snapshot.reading import Snapshot
from fgsnap.spec import DTYPE_BYTES

SLAB = 4 << 20
"""About the bytes of a slice that are read from a rank at a time."""

_Held = tuple[TensorEntry, Segment]


def refuse_disagreement(snapshot: Snapshot, names: Collection[str] | None = None) -> None:
    """Raise SnapshotRefused, naming tensor and ranks, where ranks hold a slice otherwise, or padding has other values.

    Args:
        snapshot: whose ranks to compare.
        names: the stored tensors to look at; None: all.
    """
    replicas: dict[tuple[str | None, int, int], list[_Held]] = {}
    for entry in snapshot.manifest.tensors:
        if names is None or entry.name in names:
            for segment in entry.segments:
                if segment.tensor is None:
                    _refuse_filled(snapshot, entry, segment)
                elif segment.replicated:
                    replicas.setdefault((segment.tensor, segment.start, segment.stop), []).append((entry, segment))
    for held in replicas.values():
        _refuse_different(snapshot, held)


def _refuse_filled(snapshot: Snapshot, entry: TensorEntry, padding: Segment) -> None:
    for start, extent in _boxes(entry, padding):
        if any(read_stored(snapshot, entry, start, extent)):
            raise refused(snapshot.path, f"The padding of {entry.name} is not all zeros in {_rank(entry)}.")


def _refuse_different(snapshot: Snapshot, held: list[_Held]) -> None:
    (first, segment), *others = held
    for start, extent in _boxes(first, segment):
        values = read_stored(snapshot, first, start, extent)
        for other, _ in others:  # which has the slice in the same place, for all ranks divide alike
            if read_stored(snapshot, other, start, extent) != values:
                raise _differ(snapshot, segment.tensor, first, other)


def _differ(snapshot: Snapshot, tensor: str | None, one: TensorEntry, other: TensorEntry) -> SnapshotRefused:
    return refused(snapshot.path, f"{tensor} is not the same in {_rank(one)} and {_rank(other)}, which both hold it.")


def _boxes(entry: TensorEntry, segment: Segment) -> Iterator[tuple[Shape, Shape]]:
    """Start and extent of the boxes that make up a segment of a stored tensor."""
    axis = segment.axis
    shape = with_axis(entry.shape, axis, segment.stop - segment.start)
    for start, extent in slabs(shape, SLAB // DTYPE_BYTES[entry.dtype], PANEL_ROWS[entry.layout]):
        yield with_axis(start, axis, start[axis] + segment.offset), extent


def _rank(entry: TensorEntry) -> str:
    return entry.file.removesuffix(".safetensors")
