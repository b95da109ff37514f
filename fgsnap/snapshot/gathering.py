"""A snapshot's tensors at another tensor parallel degree, or by logical tensor: each needed byte is copied once.

A tensor that is one large range of one file stays where it is mapped. Any other is put together in memory of its own
from the boxes that the ranks hold of it. What lies together in a file is read straight to its places by one call
(preadv): no page of the file is mapped for it, none is read from disk that nobody needs, and a file that is cut short
meanwhile raises an error. Each thread fills a part of the memory, front to back.

Packed matrices stay packed where all boxes are whole panels. Otherwise the tensor is row-major and its panels are
unpacked one at a time, which is one copy more.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from fgsnap.errors import HostError
from fgsnap.layout import Runs, Shape, StoredTensor, box_runs, stored_tensors, with_axis
from fgsnap.snapshot.format import TENSOR_ALIGNMENT, TensorEntry, rank_file
from fgsnap.snapshot.packing import PANEL_ROWS, Layout, fits, packed_bytes, panel_bytes, units, unpacked
from fgsnap.snapshot.reading import Slices, Snapshot
from fgsnap.spec import DTYPE_BYTES, DType

MAPPED_FROM = 2 << 20
"""Bytes from which on a tensor is mapped rather than copied: a huge page, in which mapped files come from disk."""

AT_ONCE, PARTS_AT_ONCE = 4 << 20, 1024
"""Bytes that one step reads, and to how many places (IOV_MAX of Linux)."""

AHEAD = 32 << 20
"""Bytes that a thread has the disk read before it copies the first of them."""

MOST_THREADS, SHARE_FROM = 8, 32 << 20
"""Threads that copy at once, each no fewer bytes than these."""


class TensorBytes(NamedTuple):
    """One stored tensor of a single rank; the values lie in ``data`` as ``layout`` says."""

    dtype: DType
    shape: Shape
    data: memoryview
    layout: Layout = "row"


class _Box(NamedTuple):
    """Values that ``entry`` has from ``source`` on, and another tensor needs from ``target`` on."""

    entry: TensorEntry
    source: Shape
    target: Shape
    extent: Shape


class _Plan(NamedTuple):
    """A tensor to be: of which boxes, and how its values will lie."""

    name: str
    dtype: DType
    shape: Shape
    layout: Layout
    boxes: list[_Box]

    @property
    def bytes(self) -> int:
        return packed_bytes(self.layout, self.shape, self.dtype)


class _Job(NamedTuple):
    """A box to be copied to a tensor of ``shape``, whose bytes are ``data``."""

    box: _Box
    data: memoryview
    shape: Shape
    layout: Layout

    @property
    def bytes(self) -> int:
        return math.prod(self.box.extent) * DTYPE_BYTES[self.box.entry.dtype]


class _Step(NamedTuple):
    """``copy`` reads what is needed of a file's bytes ``start:stop``, and tells how many bytes it has copied."""

    file: str
    start: int
    stop: int
    copy: Callable[[], int]


def opened_at(snapshot: Snapshot, tp: int, rank: int) -> dict[str, TensorBytes]:
    """Every stored tensor of ``rank`` of ``tp`` by name: at the snapshot's own degree where it is mapped.

    Raises:
        UsageError: the model does not divide into ``tp`` ranks.
        SnapshotRefused, HostError: see gathered.
    """
    manifest = snapshot.manifest
    if manifest.tp != tp:
        return gathered(snapshot, stored_tensors(manifest.spec, tp, rank), rank * manifest.tp // tp, tp)
    own = rank_file(rank, tp)
    return {
        entry.name: TensorBytes(entry.dtype, entry.shape, snapshot.tensor(entry), entry.layout)
        for entry in manifest.tensors
        if entry.file == own
    }


def gathered(
    snapshot: Snapshot, tensors: Iterable[StoredTensor], near: int = 0, ranks: int = 1
) -> dict[str, TensorBytes]:
    """Stored tensors of any degree by name, in one piece of memory but for those that stay mapped.

    Args:
        snapshot: what has their values.
        tensors: which; their padding is zeros.
        near: of slices that several ranks hold, that of the first rank from this one on is taken.
        ranks: how many do this on this host at a time, and share its processors.

    Raises:
        SnapshotRefused: a rank file was cut short, or written to.
        HostError: there is no memory for the tensors, or a file cannot be read.
    """
    plans = [_planned(snapshot, tensor, near) for tensor in tensors]
    views = {plan.name: view for plan in plans if (view := _mapped(snapshot, plan)) is not None}
    missing = [plan for plan in plans if plan.name not in views]
    sizes = (-(-plan.bytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for plan in missing)
    *starts, size = itertools.accumulate(sizes, initial=0)
    memory = _memory(size)
    jobs = []
    for plan, start in zip(missing, starts, strict=True):
        data = memory[start : start + plan.bytes]
        jobs += [_Job(box, data, plan.shape, plan.layout) for box in plan.boxes]
        views[plan.name] = data.toreadonly()
    _copy(snapshot, jobs, ranks)
    return {plan.name: TensorBytes(plan.dtype, plan.shape, views[plan.name], plan.layout) for plan in plans}


def read_logical(snapshot: Snapshot, name: str, start: Shape, extent: Shape, target: memoryview) -> None:
    """Fill ``target`` with the box of ``extent`` at ``start`` of a logical tensor, row-major, from the ranks' parts."""
    boxes = _boxes(snapshot.slices(), name, start, (0,) * len(extent), extent)
    _copy(snapshot, [_Job(box, target.cast("B"), extent, "row") for box in boxes])


def read_stored(snapshot: Snapshot, entry: TensorEntry, start: Shape, extent: Shape) -> bytearray:
    """The box of ``extent`` at ``start`` of one rank's tensor: as it lies where it is whole panels, else row-major."""
    box = _Box(entry, start, (0,) * len(extent), extent)
    stays = fits(entry.layout, extent, entry.dtype) and _in_units(box, extent)
    layout = entry.layout if stays else "row"
    data = bytearray(packed_bytes(layout, extent, entry.dtype))
    _copy(snapshot, [_Job(box, memoryview(data), extent, layout)])
    return data


def _boxes(slices: Slices, name: str, start: Shape, place: Shape, extent: Shape) -> Iterator[_Box]:
    """Where the box of ``extent`` at ``start`` of a logical tensor lies, which another needs at ``place``."""
    found = 0
    for entry, held in slices[name]:
        axis = held.axis
        low, high = max(start[axis], held.start), min(start[axis] + extent[axis], held.stop)
        if low < high:
            source = with_axis(start, axis, held.offset + low - held.start)
            target = with_axis(place, axis, place[axis] + low - start[axis])
            part = with_axis(extent, axis, high - low)
            yield _Box(entry, source, target, part)
            found += math.prod(part)
    assert found == math.prod(extent), f"{name}: {found} values in {extent} from {start}"


def _planned(snapshot: Snapshot, tensor: StoredTensor, near: int) -> _Plan:
    origin, slices = (0,) * len(tensor.shape), snapshot.slices(near)
    boxes: list[_Box] = []
    for segment in tensor.segments:
        if segment.tensor is not None:
            start, place = (with_axis(origin, segment.axis, at) for at in (segment.start, segment.offset))
            extent = with_axis(tensor.shape, segment.axis, segment.stop - segment.start)
            boxes += _boxes(slices, segment.tensor, start, place, extent)
    held = boxes[0].entry  # a tensor has one dtype and one layout in all ranks, and no rank is all padding
    stays = fits(held.layout, tensor.shape, held.dtype) and all(_in_units(box, tensor.shape) for box in boxes)
    return _Plan(tensor.name, held.dtype, tensor.shape, held.layout if stays else "row", boxes)


def _in_units(box: _Box, shape: Shape) -> bool:
    """Whether a box is whole panels of its entry, and becomes such of ``shape``; in both the last may be filled up."""
    entry = box.entry
    unit = units(entry.layout, shape, entry.dtype)
    axes = zip(unit, box.source, box.target, box.extent, entry.shape, shape, strict=True)
    return all(
        source % step == target % step == 0
        and (size % step == 0 or (source + size, target + size) == (source_end, target_end))
        for step, source, target, size, source_end, target_end in axes
    )


def _mapped(snapshot: Snapshot, plan: _Plan) -> memoryview | None:
    """The tensor's bytes where they are one range of a mapped file that begins as tensors do and is worth it."""
    if plan.bytes < MAPPED_FROM or len(plan.boxes) != 1 or plan.boxes[0].entry.layout != plan.layout:
        return None
    entry, runs = plan.boxes[0].entry, next(_runs(plan.boxes[0], plan.shape, plan.layout))
    if runs.size != plan.bytes or (entry.offset + runs.source) % TENSOR_ALIGNMENT:
        return None
    return snapshot.tensor(entry)[runs.source : runs.source + runs.size]


def _memory(size: int) -> memoryview:
    """Zeros that only this process has, in huge pages where the kernel has them."""
    if size == 0:
        return memoryview(b"")
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostError(
            f"There is no memory for {size >> 20} MiB of weights.",
            f"{error.strerror}. At another degree than the snapshot's own they are copied, not mapped.",
            "Use a host with more memory, or convert the checkpoint at the degree to serve at.",
        ) from error
    with contextlib.suppress(OSError, AttributeError):  # not every kernel has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _copy(snapshot: Snapshot, jobs: Sequence[_Job], ranks: int = 1) -> None:
    """Do the jobs, and count what they copy."""
    shares = list(_shares(jobs, max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))))
    if len(shares) > 1:
        from concurrent.futures import ThreadPoolExecutor  # brings logging, which opening can do without

        with ThreadPoolExecutor(len(shares), "read") as pool:
            snapshot.copied += sum(pool.map(partial(_in_order, snapshot), shares))
    else:
        snapshot.copied += sum(_in_order(snapshot, share) for share in shares)
    snapshot.check_unchanged()


def _shares(jobs: Sequence[_Job], most: int) -> Iterator[Sequence[_Job]]:
    """The jobs in a row for each of at most ``most`` threads, of about as many bytes.

    Threads that fill the same huge page would each make it zeros first.
    """
    stops = list(itertools.accumulate(job.bytes for job in jobs))
    total = stops[-1] if jobs else 0
    threads = max(1, min(most, total // SHARE_FROM))
    ends = [bisect.bisect_left(stops, total * share // threads) + 1 for share in range(1, threads)]
    for begin, end in itertools.pairwise((0, *ends, len(jobs))):
        yield jobs[begin:end]


def _in_order(snapshot: Snapshot, jobs: Sequence[_Job]) -> int:
    """The jobs step by step; while one step copies, the disk reads what the next ones need."""
    waiting: deque[_Step] = deque()
    ahead = copied = 0
    for step in itertools.chain.from_iterable(_steps(snapshot, job) for job in jobs):
        snapshot.read_ahead(step.file, step.start, step.stop)
        waiting.append(step)
        ahead += step.stop - step.start
        while ahead > AHEAD:
            first = waiting.popleft()
            ahead -= first.stop - first.start
            copied += first.copy()
    return copied + sum(step.copy() for step in waiting)


def _steps(snapshot: Snapshot, job: _Job) -> Iterator[_Step]:
    entry = job.box.entry
    if entry.layout != job.layout:
        yield from _panels(snapshot, job)
        return
    for runs in _runs(job.box, job.shape, job.layout):
        for few in _cut(runs):
            start = entry.offset + few.source
            stop = start + (few.number - 1) * few.source_step + few.size
            yield _Step(entry.file, start, stop, partial(_read, snapshot, entry, few, job.data))


def _runs(box: _Box, shape: Shape, layout: Layout) -> Iterator[Runs]:
    """The bytes of a box that lie in its entry and in a tensor of ``shape`` as ``layout`` says."""
    entry = box.entry
    unit = units(layout, shape, entry.dtype)

    def in_units(values: Shape) -> Shape:
        return tuple(-(-value // step) for value, step in zip(values, unit, strict=True))

    held, start, wanted, place, extent = map(in_units, (entry.shape, box.source, shape, box.target, box.extent))
    return box_runs(held, start, wanted, place, extent, math.prod(unit) * DTYPE_BYTES[entry.dtype])


def _cut(runs: Runs) -> Iterator[Runs]:
    """The same runs, a step's at a time."""
    source, source_step, target, target_step, size, number = runs
    if size > AT_ONCE:
        for run in range(number):
            for at in range(0, size, AT_ONCE):
                few = min(AT_ONCE, size - at)
                yield Runs(source + run * source_step + at, few, target + run * target_step + at, few, few, 1)
    else:
        step = max(1, min(PARTS_AT_ONCE, AT_ONCE // source_step))
        for run in range(0, number, step):
            few = min(step, number - run)
            yield Runs(source + run * source_step, source_step, target + run * target_step, target_step, size, few)


def _read(snapshot: Snapshot, entry: TensorEntry, runs: Runs, data: memoryview) -> int:
    stop = runs.target + runs.number * runs.target_step
    parts = [data[at : at + runs.size] for at in range(runs.target, stop, runs.target_step)]
    at = entry.offset + runs.source
    if runs.source_step == runs.size:
        snapshot.read(entry.file, at, parts)
    else:
        for run, part in enumerate(parts):
            snapshot.read(entry.file, at + run * runs.source_step, [part])
    return runs.size * runs.number


def _panels(snapshot: Snapshot, job: _Job) -> Iterator[_Step]:
    """The steps from words32 to row-major: one a panel."""
    box, entry, high = job.box, job.box.entry, PANEL_ROWS["words32"]
    item = DTYPE_BYTES[entry.dtype]
    panel, pitch = panel_bytes("words32", entry.shape, entry.dtype), job.shape[-1] * item
    matrix = packed_bytes("words32", entry.shape[-2:], entry.dtype)
    columns = range(box.source[-1] * item, (box.source[-1] + box.extent[-1]) * item)
    begin, end = box.source[-2], box.source[-2] + box.extent[-2]
    for index in itertools.product(*map(range, box.extent[:-2])):
        start = entry.offset + _flat(box.source, index, entry.shape) * matrix
        above = _flat(box.target, index, job.shape) * job.shape[-2] + box.target[-2] - begin
        for top in range(begin // high * high, end, high):
            rows = range(max(begin, top), min(end, top + high))
            place = job.data[(above + rows.start) * pitch + box.target[-1] * item :]
            own = range(rows.start - top, rows.stop - top)
            at = start + top // high * panel
            unpack = partial(_unpack, snapshot, entry.file, at, panel, own, columns, place, pitch)
            yield _Step(entry.file, at, at + panel, unpack)


def _flat(start: Shape, index: Shape, shape: Shape) -> int:
    """The number of the matrix at ``index`` from ``start`` on in a stack of ``shape``."""
    number = 0
    for begin, at, size in zip(start, index, shape, strict=False):
        number = number * size + begin + at
    return number


def _unpack(
    snapshot: Snapshot, file: str, at: int, size: int, rows: range, columns: range, place: memoryview, pitch: int
) -> int:
    panel = memoryview(bytearray(size))
    snapshot.read(file, at, [panel])
    values = unpacked(panel, rows.start, rows.stop)
    width = len(values) // len(rows)
    for number in range(len(rows)):
        line = values[number * width + columns.start : number * width + columns.stop]
        place[number * pitch : number * pitch + len(line)] = line
    return size + len(rows) * len(columns)
