"""``fgsnap diff``: opens the two sides, has them compared, and lays what differs side by side."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from fgsnap.progress import Progress
from fgsnap.snapshot import COMMIT, MANIFEST, FileEntry, open_snapshot
from fgsnap.snapshot.comparing import (
    Described,
    Difference,
    FileRow,
    Form,
    Measure,
    Row,
    Side,
    TensorRow,
    Values,
    compare,
    of_snapshot,
    ranges,
)
from fgsnap.spec import DType

WIDTH = 100
MOST = 20
"""Rows of a section that are shown unless all are asked for."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)
Cells = tuple[str, str, str]


def diff(one: str, other: str, *, values: bool = False, progress: Progress | None = None) -> Difference:
    """Compare two models.

    Args:
        one, other: each a snapshot directory, a checkpoint folder, a ``.gguf`` file or ``hf://org/name@revision``. A
            checkpoint stands for what it would be converted to, with the dtype that the snapshot beside it was.
        values: count the numbers that differ, which needs numpy.
        progress: told (bytes read so far, bytes in all).

    Raises:
        NotFound, SnapshotRefused, SourceError: a side cannot be read, or was written to meanwhile.
    """
    with contextlib.ExitStack() as opened:
        names = (one, other)
        snapshots = [None if _is_checkpoint(name) else opened.enter_context(open_snapshot(name)) for name in names]
        dtype = next((snapshot.manifest.provenance.dtype for snapshot in snapshots if snapshot is not None), None)
        a, b = (
            of_snapshot(snapshot) if snapshot is not None else opened.enter_context(_checkpoint(name, dtype))
            for name, snapshot in zip(names, snapshots, strict=True)
        )
        found = compare(a, b, _measure() if values else None, progress)
        for snapshot in filter(None, snapshots):
            snapshot.check_unchanged()
        return found


def _checkpoint(name: str, dtype: DType | None) -> contextlib.AbstractContextManager[Side]:
    from fgsnap.convert.diff import checkpoint

    return checkpoint(name, dtype)


def _measure() -> Measure:
    from fgsnap.convert.diff import measure

    return measure


def _is_checkpoint(name: str) -> bool:
    """Whether this is a source of ``convert``. What is neither is opened as a snapshot, to its own errors."""
    path = Path(name)
    if name.startswith("hf://") or path.suffix == ".gguf":
        return True
    try:
        return (path / "config.json").is_file() and not any((path / own).exists() for own in (COMMIT, MANIFEST))
    except OSError:
        return False


def lines(found: Difference, *, everything: bool = False, width: int = WIDTH) -> Iterator[str]:
    """The difference for people: which two, whether they are equal, and a table of each section that differs.

    Args:
        found: the difference.
        everything: all rows, and each tensor in one of its own; else at most MOST a section, with equal layers as one.
        width: characters that a line of a table has at most; 40 if it is less.
    """
    yield f"A  {_side(found.a)}"
    yield f"B  {_side(found.b)}"
    yield _verdict(found)
    tensors = found.tensors.different if everything else _joined(found.tensors.different)
    sections = {
        "spec": _cells(found.spec),
        "tensors": list(map(_tensor, tensors)),
        "text": _cells(found.text),
        "files": [cells for row in found.files for cells in _file(row)],
        "record": _cells(found.record),
    }
    for name, rows in sections.items():
        shown = rows if everything else rows[:MOST]
        if rows:
            yield ""
            yield from _table((name, "A", "B"), shown, max(40, width))
        if len(rows) > len(shown):
            yield f"  ... and {len(rows) - len(shown)} more (--all)"


def _side(side: Described) -> str:
    dtypes = ", ".join(side.dtypes)
    if side.id is None:
        return f"{side.name}  checkpoint, as converted: {dtypes}"
    return f"{side.name}  id {side.id[:12]}, TP {side.tp}, {dtypes}, layout {', '.join(side.layouts)}"


def _verdict(found: Difference) -> str:
    tensors = found.tensors
    if found.same:
        return "The same snapshot, by what it records; 'fgsnap verify' compares that with the bytes."
    if found.equal:
        told = f" ({tensors.by_digest} by their digests)" if tensors.by_digest else ""
        return f"Equal in everything that serving computes: spec, {tensors.count} tensors{told}, text."
    parts = ["the spec"] * bool(found.spec)
    parts += [f"{len(tensors.different)} of {tensors.count} tensors"] * bool(tensors.different)
    parts += ["the text section"] * bool(found.text)
    return f"Different: {', '.join(parts + found.served_files)}."


def _cells(rows: Sequence[Row]) -> list[Cells]:
    return [(row.path, *_pair(row.a, row.b)) for row in rows]


def _pair(a: Any, b: Any) -> tuple[str, str]:
    """Two values; of texts that begin alike, from shortly before they part."""
    one, two = _shown(a), _shown(b)
    part = next((at for at, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    return (one, two) if part < 30 else (f"...{one[part - 10 :]}", f"...{two[part - 10 :]}")


def _shown(value: Any) -> str:
    """A value as JSON, but text as it is; a dash where there is none."""
    if value is UNSET:
        return "-"
    if value is None:
        return "none"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _tensor(row: TensorRow) -> Cells:
    """Dtype and shape on either side; of equal ones, that the numbers differ."""
    form = "other numbers" if row.a == row.b else _form(row.b)
    return row.name, _form(row.a), form if row.values is UNSET else f"{form}: {_measured(row.values)}"


def _form(form: Form | UnsetType) -> str:
    return "-" if form is UNSET else f"{form.dtype} {'x'.join(map(str, form.shape))}"


def _measured(values: Values) -> str:
    if not values.differing:
        return "the same numbers"
    share = f"{100 * values.differing / values.numbers:.3g} %"
    count = f"{values.differing} of {values.numbers}" if values.differing < 1000 else share
    return f"{count}, by up to {values.largest:.3g}"


def _joined(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """Tensors that differ in the same way in several layers, as one row."""
    alike: dict[tuple[Any, ...], list[TensorRow]] = {}
    for row in rows:
        differing = row.values is not UNSET and bool(row.values.differing)
        alike.setdefault((_LAYER.sub(r"layers.*.\2", row.name), row.a, row.b, differing), []).append(row)
    return [group[0] if len(group) == 1 else _as_one(group) for group in alike.values()]


def _as_one(rows: list[TensorRow]) -> TensorRow:
    layers = [match for row in rows if (match := _LAYER.fullmatch(row.name))]
    values = [row.values for row in rows if row.values is not UNSET]
    name = f"layers.{ranges(int(match[1]) for match in layers)}.{layers[0][2]}"
    return TensorRow(name, rows[0].a, rows[0].b, functools.reduce(Values.plus, values) if values else UNSET)


def _file(row: FileRow) -> Iterator[Cells]:
    """What differs inside, where that can be told; else the digests."""
    if row.inside is UNSET or not row.inside:
        yield row.name if row.inside is UNSET else f"{row.name} (same values)", _digest(row.a), _digest(row.b)
    else:
        for path, a, b in _cells(row.inside):
            yield f"{row.name}: {path}" if path else row.name, a, b


def _digest(file: FileEntry | UnsetType) -> str:
    return "-" if file is UNSET else f"{file.bytes} bytes, {file.sha256[:12]}"


def _table(head: Cells, rows: Sequence[Cells], width: int) -> Iterator[str]:
    """Columns two blanks apart, the widest ones cut until a line has ``width`` characters."""
    indented: list[Cells] = [head, *((f"  {_plain(first)}", _plain(a), _plain(b)) for first, a, b in rows)]
    widths = [min(width, max(map(len, column))) for column in zip(*indented, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    for row in indented:
        yield "  ".join(_cut(cell, most).ljust(most) for cell, most in zip(row, widths, strict=True)).rstrip()


def _plain(cell: str) -> str:
    """A cell on one line, whatever a stranger's file put into it."""
    return cell if cell.isprintable() else ascii(cell)


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else f"{cell[: width - 3]}..."
