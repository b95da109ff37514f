"""The loop over slabs: the rank files of a snapshot, all that are asked for in one pass over the source.

A slab is a few mebibytes of one stored tensor's rows in one rank file. Slabs that are made of the same source rows are
made together, in a *step*, and so are small ones; a step reads each source row once, neighbours in one go. Threads read
(and cast, and pack) steps ahead while the main thread hands their slabs to the rank files in order, so the result does
not depend on how many threads there are, and memory is bounded by the steps in flight, not by a tensor or by the ranks.
"""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from fgsnap.convert.cast import cast
from fgsnap.convert.pack import packed
from fgsnap.convert.plan import SLAB
from fgsnap.convert.recipe import Recipe
from fgsnap.convert.rules import Array, ReadRows, boxes, is_whole, read_box, source_rows
from fgsnap.convert.source import NUMPY_DTYPES, Source
from fgsnap.layout import Piece, Segment, Shape, pieces, slabs
from fgsnap.snapshot import PANEL_ROWS, PlannedTensor, RankLayout, RankWriter, packed_bytes
from fgsnap.spec import DTYPE_BYTES, DType

GAP = 64 << 10
"""Bytes between source rows that cost less to read than a second request for what follows them."""


class Slab(NamedTuple):
    """A box of a stored tensor, whole panels of a packed one, which goes to ``offset`` of a rank's file."""

    rank: int
    tensor: PlannedTensor
    start: Shape
    extent: Shape
    offset: int

    @property
    def bytes(self) -> int:
        return packed_bytes(self.tensor.layout, self.extent, self.tensor.dtype)


Step = list[Slab]
Layouts = Mapping[int, RankLayout]
"""What to write, by rank."""


def write_ranks(
    files: Mapping[int, RankWriter],
    layouts: Layouts,
    tp: int,
    source: Source,
    recipe: Recipe,
    workers: int,
    wrote: Callable[[int], None],
) -> None:
    """Write rank files, step after step, while ``workers`` threads read ahead.

    Args:
        files: the open rank files.
        layouts: where everything lies in them.
        tp: the degree they are of.
        source, recipe: what they are made from, and how.
        workers: threads.
        wrote: told the bytes of each slab.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        try:
            for step, made in _read_ahead(pool, workers, steps(layouts, tp), source, recipe):
                for slab, data in zip(step, made, strict=True):
                    files[slab.rank].write(slab.offset, data)
                    wrote(len(data))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            source.close()  # so that nobody goes on waiting for a network
            raise


def steps(layouts: Layouts, tp: int) -> Iterator[Step]:
    """All slabs, those of each rank in the order of its file, in steps of about SLAB bytes of source and of output."""
    step: Step = []
    size = 0
    for group, own in _groups(layouts, tp):
        if step and size + own > SLAB:
            yield step
            step, size = [], 0
        step += group
        size += own
    if step:
        yield step


def _groups(layouts: Layouts, tp: int) -> Iterator[tuple[Step, int]]:
    """The slabs in order, and about how many bytes each group of them takes, of source or of output.

    Those of all ranks are one group where every rank takes its part of the same source rows. These are read whole, for
    however few ranks.
    """
    for tensors in zip(*(layout.tensors for layout in layouts.values()), strict=True):
        shared = all(_spans_ranks(segment, tensor.shape) for tensor in tensors for segment in tensor.segments)
        most = SLAB // DTYPE_BYTES[tensors[0].dtype] // (tp if shared else 1)
        own = (_slabs(rank, tensor, most) for rank, tensor in zip(layouts, tensors, strict=True))
        for group in zip(*own, strict=True):
            if shared:
                yield list(group), tp * group[0].bytes
            else:
                yield from (([slab], slab.bytes) for slab in group)


def _spans_ranks(segment: Segment, shape: Shape) -> bool:
    """Whether a slab of these rows needs the source rows that other ranks need for theirs."""
    return segment.tensor is None or segment.replicated or segment.axis > max(0, len(shape) - 2)


def _slabs(rank: int, tensor: PlannedTensor, most: int) -> Iterator[Slab]:
    offset = tensor.offset
    for start, extent in slabs(tensor.shape, most, PANEL_ROWS[tensor.layout]):
        slab = Slab(rank, tensor, start, extent, offset)
        yield slab
        offset += slab.bytes


def _read_ahead(
    pool: ThreadPoolExecutor, workers: int, steps: Iterable[Step], source: Source, recipe: Recipe
) -> Iterator[tuple[Step, list[memoryview]]]:
    """All steps in order, each with the bytes of its slabs."""
    pending: deque[tuple[Step, Future[list[memoryview]]]] = deque()
    for step in steps:
        pending.append((step, pool.submit(_make, step, source, recipe)))
        if len(pending) > workers:
            yield _oldest(pending)
    while pending:
        yield _oldest(pending)


def _oldest(pending: deque[tuple[Step, Future[list[memoryview]]]]) -> tuple[Step, list[memoryview]]:
    step, made = pending.popleft()
    return step, made.result()


def _make(step: Step, source: Source, recipe: Recipe) -> list[memoryview]:
    """Read, cast, place and pack everything that makes the slabs of one step."""
    rows = _Rows(source, (wanted for slab in step for wanted in _wanted(slab, recipe)))
    return [_fill(slab, rows, recipe) for slab in step]


Wanted = tuple[str, int, int]
"""A source tensor, the first of its rows, and the row after the last."""


def _wanted(slab: Slab, recipe: Recipe) -> Iterator[Wanted]:
    for piece in pieces(slab.tensor.segments, slab.start, slab.extent):
        if piece.tensor is not None:
            for box in boxes(recipe.rules[piece.tensor], piece.logical_start, piece.extent):
                yield box.source, *source_rows(box)


class _Rows:
    """The source rows that a step is made of, each read once, and together with its neighbours."""

    def __init__(self, source: Source, wanted: Iterable[Wanted]) -> None:
        self._source = source
        self._spans = {
            name: _joined((span[1:] for span in spans), _gap(source, name))
            for name, spans in groupby(sorted(wanted), itemgetter(0))
        }
        self._read: dict[tuple[str, int], Array] = {}

    def __call__(self, name: str, start: int, stop: int) -> Array:
        first, last = next(span for span in self._spans[name] if span[0] <= start and stop <= span[1])
        if (name, first) not in self._read:
            self._read[name, first] = self._source.rows(name, first, last)
        return self._read[name, first][start - first : stop - first]


def _gap(source: Source, name: str) -> int:
    """Rows of a source tensor that are read through rather than left out."""
    tensor = source.tensors[name]
    return GAP // max(1, math.prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype])


def _joined(spans: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Ascending spans, those with at most ``gap`` between them as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def _fill(slab: Slab, rows: ReadRows, recipe: Recipe) -> memoryview:
    values = _unchanged(slab, rows, recipe)
    if values is None:
        values = _assembled(slab, rows, recipe)
    if slab.tensor.layout == "words32":
        values = packed(values)
    flat: Array = values.reshape(-1).view(np.uint8)
    return flat.data


def _assembled(slab: Slab, rows: ReadRows, recipe: Recipe) -> Array:
    """The slab's values, put together from everything that makes them."""
    tensor = slab.tensor
    out: Array = np.empty(slab.extent, NUMPY_DTYPES[tensor.dtype])
    for piece in pieces(tensor.segments, slab.start, slab.extent):
        at = [low - start for low, start in zip(piece.stored_start, slab.start, strict=True)]
        part = out[tuple(slice(low, low + size) for low, size in zip(at, piece.extent, strict=True))]
        if piece.tensor is None:
            part[...] = 0
        else:
            read_piece(piece.tensor, piece, part, tensor.dtype, rows, recipe)
    return out


def _unchanged(slab: Slab, rows: ReadRows, recipe: Recipe) -> Array | None:
    """The slab's rows where they lie in the source, when they are the source's: that saves a copy of most models.

    Their pages are read here, by the thread that reads ahead, and not when they are written.
    """
    tensor = slab.tensor
    piece, *more = pieces(tensor.segments, slab.start, slab.extent)
    if more or piece.tensor is None or recipe.read[piece.tensor] != tensor.dtype:
        return None
    rule = recipe.rules[piece.tensor]
    if rule.shape[1:] != piece.extent[1:] or not is_whole(rule):
        return None
    first = piece.logical_start[0]
    found = rows(rule.takes[0].source, first, first + piece.extent[0])
    flat: Array = found.reshape(-1).view(np.uint8)
    flat[:: mmap.PAGESIZE].max()
    return found


def read_piece(name: str, piece: Piece, part: Array, dtype: DType, rows: ReadRows, recipe: Recipe) -> None:
    """Read the piece's box of a logical tensor into ``part``, cast to ``dtype``."""
    rule, held = recipe.rules[name], recipe.read[name]
    if held == dtype:
        read_box(rule, rows, piece.logical_start, part)
        return
    raw: Array = np.empty(piece.extent, NUMPY_DTYPES[held])
    read_box(rule, rows, piece.logical_start, raw)
    if part.flags.c_contiguous:
        cast(raw, held, part, dtype, rule.takes[0].source)
    else:
        narrowed: Array = np.empty(piece.extent, part.dtype)
        cast(raw, held, narrowed, dtype, rule.takes[0].source)
        np.copyto(part, narrowed)


def source_bytes(layouts: Layouts, recipe: Recipe) -> int:
    """Bytes of the source that these ranks are made of, each counted once."""
    taken: dict[str, list[tuple[int, int]]] = {}
    axes: dict[str, int] = {}
    for layout in layouts.values():
        for segment in (segment for tensor in layout.tensors for segment in tensor.segments):
            if segment.tensor is not None:
                taken.setdefault(segment.tensor, []).append((segment.start, segment.stop))
                axes[segment.tensor] = segment.axis
    total = 0
    for name, spans in taken.items():
        shape = recipe.rules[name].shape
        cut = sum(stop - start for start, stop in _joined(sorted(spans), 0))
        total += cut * math.prod(shape) // shape[axes[name]] * DTYPE_BYTES[recipe.read[name]]
    return total
