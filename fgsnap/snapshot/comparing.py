"""What two models differ in, as far as manifests, digests and bytes can tell. No numpy, so any installation compares.

Tensors are compared as logical ones: tensor parallel degree and layout do not matter. They are read, slab by slab, only
where the recorded digests leave it open whether they are equal, and only up to the first difference, unless the caller
brings a ``measure`` that counts the numbers which differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import groupby
from pathlib import PurePath
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from fgsnap.layout import Shape, logical_shapes, slabs
from fgsnap.progress import Progress, counted
from fgsnap.snapshot.agreement import refuse_disagreement
from fgsnap.snapshot.format import CHUNK, DIGEST_BYTES, FileEntry, Manifest, TextSection
from fgsnap.snapshot.gathering import read_logical
from fgsnap.snapshot.packing import PANEL_ROWS
from fgsnap.snapshot.reading import Snapshot, chunk_digests
from fgsnap.spec import DTYPE_BYTES, DecoderSpec, DType

SLAB = 4 << 20
"""About the bytes of a tensor that are read from each side at a time."""

SERVED = frozenset(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
"""The small files that serving reads; what it needs of the others is in the spec and the text section."""

_READERS: dict[str, Callable[[bytes], Any]] = {".json": msgspec.json.decode, ".jinja": bytes.decode}
_LARGEST_SHOWN = 64 << 20
_LONGEST, _LARGEST = 64, 500  # entries of a list that are shown, and bytes of it as JSON


class Form(msgspec.Struct, frozen=True):
    """What a logical tensor is held as."""

    dtype: DType
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Side(NamedTuple):
    """One of two models: a snapshot, or what a checkpoint would be converted to, which has no ``snapshot``.

    ``tensors`` are the logical ones, ``files`` those beside them. ``read`` fills a buffer with a box of a tensor,
    given its name, start and extent; ``read_file`` gives the bytes of a file.
    """

    name: str
    spec: DecoderSpec
    tensors: dict[str, Form]
    text: TextSection
    files: dict[str, FileEntry]
    read: Callable[[str, Shape, Shape, memoryview], None]
    read_file: Callable[[str], bytes]
    snapshot: Snapshot | None = None


class Row(msgspec.Struct, frozen=True):
    """What lies at ``path`` on either side; UNSET, which is not stored, on a side that has nothing there."""

    path: str
    a: Any = UNSET
    b: Any = UNSET


class Values(msgspec.Struct, frozen=True):
    """How far the numbers of a tensor differ.

    Attributes:
        numbers: how many there are.
        differing: those whose bits differ; of two dtypes, those whose bits differ as float32.
        largest: the largest absolute difference; infinite where one is infinite or no number (null in JSON).
    """

    numbers: int
    differing: int
    largest: float

    def plus(self, other: Values) -> Values:
        """Both taken as one tensor."""
        return Values(self.numbers + other.numbers, self.differing + other.differing, max(self.largest, other.largest))


class TensorRow(msgspec.Struct, frozen=True):
    """A logical tensor that is not the same on both sides. Of equal forms the bits differ; ``values`` if measured."""

    name: str
    a: Form | UnsetType = UNSET
    b: Form | UnsetType = UNSET
    values: Values | UnsetType = UNSET


class Tensors(msgspec.Struct, frozen=True):
    """How many logical tensors there are, how many of them the recorded digests tell to be equal, and which differ."""

    count: int
    by_digest: int
    different: tuple[TensorRow, ...]


class FileRow(msgspec.Struct, frozen=True):
    """A file that is not the same on both sides. ``inside``: what differs in two JSON files or texts; maybe nothing."""

    name: str
    served: bool
    a: FileEntry | UnsetType = UNSET
    b: FileEntry | UnsetType = UNSET
    inside: tuple[Row, ...] | UnsetType = UNSET


class Described(msgspec.Struct, frozen=True):
    """Which model a side is. A checkpoint has no id, degree or layouts."""

    name: str
    dtypes: tuple[str, ...]
    id: str | None = None
    tp: int | None = None
    layouts: tuple[str, ...] = ()


class Difference(msgspec.Struct, frozen=True):
    """All that two models differ in.

    Attributes:
        a, b: the two.
        same: whether they are one snapshot, by id.
        equal: whether serving computes the same from both: spec, tensors, text section and the files that it reads.
        spec: rows of the decoder spec; layers that differ alike share one.
        tensors, text, files: what else a model is.
        record: what two snapshots record besides: degree, layouts, canary, provenance. Nothing of it is served.
    """

    a: Described
    b: Described
    same: bool
    equal: bool
    spec: tuple[Row, ...]
    tensors: Tensors
    text: tuple[Row, ...]
    files: tuple[FileRow, ...]
    record: tuple[Row, ...]

    @property
    def served_files(self) -> list[str]:
        """The names of the files of which serving reads something else."""
        return [file.name for file in self.files if file.served and file.inside != ()]


Measure = Callable[[bytearray, DType, bytearray, DType], Values]
"""Compares equally many numbers, given as their bytes and dtype on either side."""


def of_snapshot(snapshot: Snapshot) -> Side:
    """An opened snapshot as a side."""
    manifest = snapshot.manifest
    dtypes = {segment.tensor: entry.dtype for entry in manifest.tensors for segment in entry.segments}
    return Side(
        name=str(snapshot.path),
        spec=manifest.spec,
        tensors={name: Form(dtypes[name], shape) for name, shape in logical_shapes(manifest.spec).items()},
        text=manifest.text,
        files=manifest.files,
        read=functools.partial(read_logical, snapshot),
        read_file=snapshot.read_text,
        snapshot=snapshot,
    )


def compare(a: Side, b: Side, measure: Measure | None = None, progress: Progress | None = None) -> Difference:
    """Everything that the two differ in.

    Args:
        a, b: the two models. Recorded digests are believed; ``verify`` compares them with the bytes.
        measure: counts the numbers that differ; None: tensors are equal or not, bit for bit.
        progress: told (bytes read so far, bytes in all) of both sides' tensors.

    Raises:
        SnapshotRefused: a small file of a snapshot does not have its digest, or its ranks hold a tensor that is read
            not all alike.
    """
    one, two = a.snapshot, b.snapshot
    found = Difference(
        a=_described(a),
        b=_described(b),
        same=one is not None and two is not None and one.id == two.id,
        equal=False,
        spec=tuple(_spec(a.spec, b.spec)),
        tensors=_tensors(a, b, measure, progress),
        text=tuple(differences("", a.text, b.text)),
        files=tuple(_files(a, b)),
        record=() if one is None or two is None else tuple(differences("", _record(one), _record(two))),
    )
    equal = not (found.spec or found.tensors.different or found.text or found.served_files)
    return msgspec.structs.replace(found, equal=equal)


def differences(path: str, a: Any, b: Any) -> Iterator[Row]:
    """The rows in which two values differ, part by part down to plain ones.

    Args:
        path: where the values are; "" at the top.
        a, b: structs, dicts, lists and plain values, as a manifest and JSON files hold them.
    """
    if isinstance(a, msgspec.Struct) and type(a) is type(b):
        a, b = msgspec.structs.asdict(a), msgspec.structs.asdict(b)
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(f"{path}.{key}" if path else str(key), a.get(key, UNSET), b.get(key, UNSET))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and _has_parts(a):
        for index, (one, two) in enumerate(zip(a, b, strict=True)):
            yield from differences(f"{path}[{index}]", one, two)
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield Row(path, _bounded(a), _bounded(b))


def _has_parts(values: list[Any]) -> bool:
    """Whether entries are worth a row each: a few plain numbers read better side by side."""
    return len(values) > _LONGEST or any(isinstance(value, dict | list) for value in values)


def _bounded(value: Any) -> Any:
    """A value to show; of a long one, such as a vocabulary that only one side has, how long it is."""
    if not isinstance(value, dict | list) or (len(value) <= _LONGEST and len(msgspec.json.encode(value)) <= _LARGEST):
        return value
    return f"{len(value)} entries"


def _described(side: Side) -> Described:
    dtypes = tuple(sorted({form.dtype for form in side.tensors.values()}))
    if side.snapshot is None:
        return Described(side.name, dtypes)
    return Described(side.name, dtypes, side.snapshot.id, side.snapshot.manifest.tp, _layouts(side.snapshot.manifest))


def _layouts(manifest: Manifest) -> tuple[str, ...]:
    return tuple(sorted({entry.layout for entry in manifest.tensors if len(entry.shape) > 1}))


def _record(snapshot: Snapshot) -> dict[str, Any]:
    manifest, canary = snapshot.manifest, snapshot.canary
    told = None if canary is None else {"tokens": canary.tokens, "next": canary.next, "margins": canary.margins}
    return {
        "tp": manifest.tp,
        "layout": ", ".join(_layouts(manifest)),
        "canary": told,
        "provenance": manifest.provenance,
    }


# The spec


def _spec(a: DecoderSpec, b: DecoderSpec) -> Iterator[Row]:
    for name in a.__struct_fields__:
        if name not in ("layer_kinds", "layers", "ropes"):
            yield from differences(name, getattr(a, name), getattr(b, name))
    if a.depth != b.depth:
        yield Row("depth", a.depth, b.depth)
    found: dict[Row, list[int]] = {}
    for index in range(min(a.depth, b.depth)):
        for row in differences("", _layer(a, index), _layer(b, index)):
            found.setdefault(row, []).append(index)
    for row, layers in found.items():
        yield Row(f"layers[{ranges(layers)}].{row.path}", row.a, row.b)


def _layer(spec: DecoderSpec, index: int) -> dict[str, Any]:
    """A layer with its rope in place of the rope's number: two specs may count layer kinds and ropes differently."""
    layer = spec.layer(index)
    rope = layer.attention.rope
    attention = {**msgspec.structs.asdict(layer.attention), "rope": None if rope is None else spec.ropes[rope]}
    return {**msgspec.structs.asdict(layer), "attention": attention}


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ``0-3,5``."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ",".join(parts)


# Tensors


def _tensors(a: Side, b: Side, measure: Measure | None, progress: Progress | None) -> Tensors:
    names = list({**a.tensors, **b.tensors})
    alike = set() if a.snapshot is None or b.snapshot is None else _alike(a.snapshot, b.snapshot)
    open_ones = [
        TensorRow(name, a.tensors.get(name, UNSET), b.tensors.get(name, UNSET)) for name in names if name not in alike
    ]
    for side in (a, b):
        _refuse_disagreement(side, {row.name for row in open_ones if _bytes_to_read(row, measure)})
    advance = counted(progress, sum(_bytes_to_read(row, measure) for row in open_ones))
    different = []
    for row in open_ones:
        if (found := _compared(a, b, row, measure)) is not None:
            different.append(found)
        advance(_bytes_to_read(row, measure))
    return Tensors(len(names), len(alike), tuple(different))


def _refuse_disagreement(side: Side, names: Set[str]) -> None:
    """Of what several ranks hold one copy is read below, and no padding: it must stand for what each rank serves."""
    if side.snapshot is not None:
        entries = side.snapshot.manifest.tensors
        stored = {entry.name for entry in entries if any(segment.tensor in names for segment in entry.segments)}
        refuse_disagreement(side.snapshot, stored)


def _bytes_to_read(row: TensorRow, measure: Measure | None) -> int:
    """Those of both sides where their numbers can be laid side by side, bits only where they are of one dtype; or 0."""
    if row.a is UNSET or row.b is UNSET or row.a.shape != row.b.shape:
        return 0
    return row.a.bytes + row.b.bytes if measure is not None or row.a.dtype == row.b.dtype else 0


def _compared(a: Side, b: Side, row: TensorRow, measure: Measure | None) -> TensorRow | None:
    """The row with what could be measured; None if the tensor is the same on both sides."""
    if not _bytes_to_read(row, measure):
        return row
    if measure is None:
        return row if any(one != two for one, two in _slabs(a, b, row.name)) else None
    forms = a.tensors[row.name], b.tensors[row.name]
    parts = (measure(one, forms[0].dtype, two, forms[1].dtype) for one, two in _slabs(a, b, row.name))
    values = functools.reduce(Values.plus, parts)
    return msgspec.structs.replace(row, values=values) if values.differing or row.a != row.b else None


def _slabs(a: Side, b: Side, name: str) -> Iterator[tuple[bytearray, bytearray]]:
    """The bytes of a logical tensor on both sides, slab by slab."""
    for start, extent in slabs(a.tensors[name].shape, SLAB // 4, PANEL_ROWS["words32"]):
        yield _box(a, name, start, extent), _box(b, name, start, extent)


def _box(side: Side, name: str, start: Shape, extent: Shape) -> bytearray:
    box = bytearray(math.prod(extent) * DTYPE_BYTES[side.tensors[name].dtype])
    side.read(name, start, extent, memoryview(box))
    return box


def _alike(a: Snapshot, b: Snapshot) -> set[str]:
    """The logical tensors that lie alike in both, within chunks of equal digests."""
    one, two = _held(a), _held(b)
    return {name for name, places in one.items() if places == two.get(name)}


def _held(snapshot: Snapshot) -> dict[str, list[tuple[Any, ...]]]:
    """Where each logical tensor lies, in all ranks, and the digests of the chunks that it lies in."""
    files = snapshot.manifest.files
    digests = {
        name: chunk_digests(snapshot.path, name, entry) for name, entry in files.items() if entry.chunks is not None
    }
    held: dict[str, list[tuple[Any, ...]]] = {}
    for entry in snapshot.manifest.tensors:
        first, last = entry.offset // CHUNK, -(-(entry.offset + entry.bytes) // CHUNK)
        chunks = digests[entry.file][first * DIGEST_BYTES : last * DIGEST_BYTES]
        for segment in entry.segments:
            if segment.tensor is not None:
                place = (entry.file, entry.offset, entry.shape, entry.dtype, entry.layout, segment, chunks)
                held.setdefault(segment.tensor, []).append(place)
    return held


# Files


def _files(a: Side, b: Side) -> Iterator[FileRow]:
    """The covered files that differ; rank files where both have one of that name: the tensors tell the rest."""
    for name in sorted({**a.files, **b.files}):
        one, two = a.files.get(name, UNSET), b.files.get(name, UNSET)
        if one is UNSET or two is UNSET:
            if not name.startswith("rank-"):
                yield FileRow(name, name in SERVED, one, two)
        elif one.sha256 != two.sha256:
            yield FileRow(name, name in SERVED, one, two, _inside(a, b, name))


def _inside(a: Side, b: Side, name: str) -> tuple[Row, ...] | UnsetType:
    """What differs in two files that can be shown: the keys of JSON, or a template as it is."""
    read = _READERS.get(PurePath(name).suffix)
    if read is None or max(side.files[name].bytes for side in (a, b)) > _LARGEST_SHOWN:
        return UNSET
    try:
        return tuple(differences("", *(read(side.read_file(name)) for side in (a, b))))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return UNSET
