"""Conversion: one visible loop over ranks and slabs, from a checkpoint to a published snapshot.

A slab is a few mebibytes of one stored tensor's rows. Threads read (and cast, and pack) slabs ahead while the main
thread writes them in order, so the result does not depend on how many threads there are, and memory is bounded by the
slabs in flight, not by a tensor. Nothing gets the target's name before a fresh process has opened it and bound every
tensor.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import NamedTuple

import msgspec
import numpy as np

import fgsnap
from fgsnap.convert.cast import cast
from fgsnap.convert.cut_tokenizer import cut_tokenizer
from fgsnap.convert.opening import open_source
from fgsnap.convert.pack import checked_target, packed
from fgsnap.convert.plan import SLAB, checked_dtype, default_workers, rank_layouts
from fgsnap.convert.recipe import Recipe, settle
from fgsnap.convert.rules import Array, is_whole, read_box
from fgsnap.convert.source import NUMPY_DTYPES, Source
from fgsnap.convert.text_section import text_section
from fgsnap.errors import FgsnapError, HostError, SnapshotRefused, missing_extra
from fgsnap.layout import Piece, Shape, pieces, slabs
from fgsnap.progress import Progress, counted
from fgsnap.snapshot import (
    PANEL_ROWS,
    Canary,
    Manifest,
    PlannedTensor,
    Provenance,
    RankLayout,
    SnapshotWriter,
    packed_bytes,
)
from fgsnap.spec import DTYPE_BYTES, DType


class Result(msgspec.Struct, frozen=True):
    """A published snapshot; ``bytes`` are those of its rank files, ``notes`` are for the user to know."""

    id: str
    path: Path
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def convert(
    source_name: str,
    output: Path | str,
    *,
    tp: int = 1,
    dtype: str | None = None,
    target: str = "generic",
    revision: str | None = None,
    workers: int | None = None,
    canary: bool = True,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> Result:
    """Turn a checkpoint into a snapshot at ``output``; on any error or interrupt nothing is left behind.

    Args:
        source_name: a folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``.
        output: the new directory.
        tp: tensor parallel degree, one rank file each.
        dtype: cast every weight to this; None keeps what the checkpoint has (bfloat16 for a quantised GGUF file).
        target: whose layout the matrices get: "generic", or "cpu" for panels that its kernels read front to back.
        revision: branch, tag or commit of a Hub repository.
        workers: threads that read ahead.
        canary: record a float32 forward of a fixed prompt, which every start is checked against.
        progress: told (bytes of tensors so far, bytes in all) after each slab.
        stage: told what begins: "weights", then "canary" if one is recorded.
    """
    begin = time.monotonic()
    asked, layout = checked_dtype(dtype), checked_target(target)
    if canary:
        _require_torch()
    enter = stage or (lambda _: None)
    with closing(open_source(source_name, revision)) as source:
        recipe = settle(source, asked or source.default_dtype)
        layouts = rank_layouts(recipe.spec, tp, recipe.stored, layout)
        texts = source.text_files()
        text = text_section(texts, source.config, recipe.spec.vocab_size)
        files = texts | cut_tokenizer(texts)
        size = sum(layout.size for layout in layouts)
        with SnapshotWriter(Path(output), recipe.spec, tp) as writer:
            writer.check_space(size + sum(map(len, files.values())))
            enter("weights")
            with _digesting(source) as hashing:
                wrote = counted(progress, sum(tensor.bytes for layout in layouts for tensor in layout.tensors))
                _write_ranks(writer, layouts, source, recipe, workers or default_workers(), wrote)
                digests = hashing.result()
            source.check_unchanged()
            for name in sorted(files):
                writer.add_file(name, files[name])
            identity = writer.write_manifest(
                Manifest(
                    requires=writer.requires,
                    spec=recipe.spec,
                    tp=tp,
                    tensors=writer.tensors,
                    files=writer.files,
                    text=text,
                    provenance=_provenance(source, recipe, asked, digests),
                )
            )
            if canary:
                enter("canary")
                path = writer.publish(_canary(writer.directory, identity))
            else:
                _fresh_process(writer.directory, "--bind-only")
                path = writer.publish(None)
    return Result(identity, path, size, time.monotonic() - begin, _notes(texts, source, asked))


def _require_torch() -> None:
    """Say at once, and not after the weights are written, that the canary cannot be computed here."""
    if find_spec("torch") is None:
        error = missing_extra("torch", "convert", "Recording a canary")
        raise HostError(error.what, error.why, f"{error.next_step}, or convert with --no-canary.")


def _notes(texts: dict[str, bytes], source: Source, asked: DType | None) -> tuple[str, ...]:
    notes = []
    if source.dequantised:
        kinds, dtype = ", ".join(source.dequantised), asked or source.default_dtype
        notes.append(f"Quantised weights ({kinds}) were dequantised: the snapshot holds them in {dtype}.")
    if "tokenizer.json" not in texts:
        notes.append(
            "The checkpoint has no tokenizer.json, without which serve and run refuse the snapshot: add the file "
            "(transformers: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE)) and convert again."
        )
    return tuple(notes)


def _provenance(source: Source, recipe: Recipe, asked: DType | None, files: dict[str, str]) -> Provenance:
    return Provenance(
        source=source.label,
        revision=source.revision,
        files=files,
        rules=recipe.digest,
        family=source.config["model_type"],
        converter=fgsnap.__version__,
        dropped=recipe.dropped,
        dtype=asked or source.default_dtype,
    )


def _write_ranks(
    writer: SnapshotWriter,
    layouts: list[RankLayout],
    source: Source,
    recipe: Recipe,
    workers: int,
    wrote: Callable[[int], None],
) -> None:
    """Write every rank file, slab after slab, while ``workers`` threads read ahead."""
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for rank, layout in enumerate(layouts):
            with writer.rank(rank, layout) as file:
                for slab, data in _read_ahead(pool, workers, layout, source, recipe):
                    file.write(slab.offset, data)
                    wrote(len(data))


class Slab(NamedTuple):
    """A box of a stored tensor, whole panels of a packed one, which goes to ``offset`` of the rank file."""

    tensor: PlannedTensor
    start: Shape
    extent: Shape
    offset: int


def _slabs(layout: RankLayout) -> Iterator[Slab]:
    for tensor in layout.tensors:
        offset = tensor.offset
        for start, extent in slabs(tensor.shape, SLAB // DTYPE_BYTES[tensor.dtype], PANEL_ROWS[tensor.layout]):
            yield Slab(tensor, start, extent, offset)
            offset += packed_bytes(tensor.layout, extent, tensor.dtype)


def _read_ahead(
    pool: ThreadPoolExecutor, workers: int, layout: RankLayout, source: Source, recipe: Recipe
) -> Iterator[tuple[Slab, memoryview]]:
    """All slabs of a rank file in order, each with its bytes."""
    pending: deque[tuple[Slab, Future[memoryview]]] = deque()
    for slab in _slabs(layout):
        pending.append((slab, pool.submit(_fill, slab, source, recipe)))
        if len(pending) > workers:
            yield _oldest(pending)
    while pending:
        yield _oldest(pending)


def _oldest(pending: deque[tuple[Slab, Future[memoryview]]]) -> tuple[Slab, memoryview]:
    slab, filled = pending.popleft()
    return slab, filled.result()


def _fill(slab: Slab, source: Source, recipe: Recipe) -> memoryview:
    """Read, cast, place and pack everything that makes one slab."""
    rows = _unchanged(slab, source, recipe)
    if rows is None:
        rows = _assembled(slab, source, recipe)
    if slab.tensor.layout == "words32":
        rows = packed(rows)
    flat: Array = rows.reshape(-1).view(np.uint8)
    return flat.data


def _assembled(slab: Slab, source: Source, recipe: Recipe) -> Array:
    """The slab's values, put together from everything that makes them."""
    tensor = slab.tensor
    out: Array = np.empty(slab.extent, NUMPY_DTYPES[tensor.dtype])
    for piece in pieces(tensor.segments, slab.start, slab.extent):
        at = [low - start for low, start in zip(piece.stored_start, slab.start, strict=True)]
        part = out[tuple(slice(low, low + size) for low, size in zip(at, piece.extent, strict=True))]
        if piece.tensor is None:
            part[...] = 0
        else:
            read_piece(piece.tensor, piece, part, tensor.dtype, source, recipe)
    return out


def _unchanged(slab: Slab, source: Source, recipe: Recipe) -> Array | None:
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
    rows: Array = source.rows(rule.takes[0].source, first, first + piece.extent[0])
    flat: Array = rows.reshape(-1).view(np.uint8)
    flat[:: mmap.PAGESIZE].max()
    return rows


def read_piece(
    name: str, piece: Piece, part: Array, dtype: DType, source: Source, recipe: Recipe
) -> None:  # fmt: skip
    """Read the piece's box of a logical tensor into ``part``, cast to ``dtype``."""
    rule, held = recipe.rules[name], recipe.read[name]
    if held == dtype:
        read_box(rule, source.rows, piece.logical_start, part)
        return
    raw: Array = np.empty(piece.extent, NUMPY_DTYPES[held])
    read_box(rule, source.rows, piece.logical_start, raw)
    if part.flags.c_contiguous:
        cast(raw, held, part, dtype, rule.takes[0].source)
    else:
        narrowed: Array = np.empty(piece.extent, part.dtype)
        cast(raw, held, narrowed, dtype, rule.takes[0].source)
        np.copyto(part, narrowed)


@contextmanager
def _digesting(source: Source) -> Iterator[Future[dict[str, str]]]:
    """The digests of the source's files, made on a thread beside the block, which gives up when the block fails."""
    ended = Event()

    def go_on() -> None:
        if ended.is_set():
            raise InterruptedError("the conversion ended")

    with ThreadPoolExecutor(1, thread_name_prefix="digest-source") as pool:
        try:
            yield pool.submit(source.file_digests, go_on)
        finally:
            ended.set()


class _Values(msgspec.Struct, frozen=True):
    tokens: list[int]
    next: list[int]
    margins: list[float]


def _canary(directory: Path, identity: str) -> Canary:
    """Take down what the directory's model says."""
    values = msgspec.json.decode(_fresh_process(directory), type=_Values)
    return Canary(identity, values.tokens, values.next, values.margins)


def _fresh_process(directory: Path, *flags: str) -> bytes:
    """Open the directory as a server would, in a fresh process that binds every tensor; returns what that prints."""
    package = str(Path(fgsnap.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fgsnap.runtime.canary", *flags, str(directory)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        way_out = " and convert again" if flags else ", or convert with --no-canary, which only opens and binds it"
        raise _failed_check(done.returncode, done.stderr.decode(errors="replace"), f"Mend the cause{way_out}.")
    return done.stdout


_CLASSES: dict[int, type[FgsnapError]] = {SnapshotRefused.exit_code: SnapshotRefused, HostError.exit_code: HostError}


def _failed_check(code: int, stderr: str, next_step: str) -> FgsnapError:
    lines = [line for line in stderr.splitlines() if line.strip()][-3:]
    if code < 0:
        lines = [f"The checking process was killed by {signal.Signals(-code).name}; the host may lack memory."]
    return _CLASSES.get(code, FgsnapError)(
        "The new snapshot could not be checked in a fresh process, so it was not kept.",
        " ".join(lines) or f"The checking process ended with code {code}.",
        next_step,
    )
