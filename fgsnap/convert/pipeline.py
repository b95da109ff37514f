"""Conversion: from a checkpoint to a published snapshot.

All rank files are written in one pass over the source (``weights``), or some of them now and the others by other
processes, on this host or elsewhere, of which the last one publishes. Nothing gets the target's name before a fresh
process has opened it and bound every tensor.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import msgspec

import fgsnap
from fgsnap.atomic import Busy, refuse_taken
from fgsnap.convert import families
from fgsnap.convert.cut_tokenizer import cut_tokenizer
from fgsnap.convert.opening import open_source
from fgsnap.convert.pack import checked_target
from fgsnap.convert.plan import checked_dtype, checked_ranks, default_workers, rank_layouts
from fgsnap.convert.recipe import Recipe, settle
from fgsnap.convert.source import Source
from fgsnap.convert.text_section import text_section
from fgsnap.convert.weights import source_bytes, write_ranks
from fgsnap.errors import FgsnapError, HostError, SnapshotRefused, UsageError, missing_extra
from fgsnap.progress import Progress, counted
from fgsnap.snapshot import (
    COMMIT,
    Canary,
    Manifest,
    Provenance,
    RankLayout,
    RankWriter,
    SnapshotWriter,
    TextSection,
    canonical,
    open_snapshot,
    rank_file,
)
from fgsnap.snapshot.backlog import Backlog
from fgsnap.snapshot.files import part_directory, parts_directory, show_ranks
from fgsnap.snapshot.format import tensor_entries
from fgsnap.snapshot.parts import Part, PartWriter, read_parts, refuse_other, remove_parts, verify_parts
from fgsnap.spec import DType

Stage = Callable[[str], None]

BUSY_WAIT = 0.2
"""Seconds between looks at whether another process has published what this one would."""


class Result(msgspec.Struct, frozen=True):
    """What a conversion has made.

    Attributes:
        id: the snapshot's; empty while ranks are missing.
        path: the snapshot, or the directory of its parts while ranks are missing.
        bytes: those of the rank files that it holds.
        seconds: how long it took.
        notes: for the user to know.
        missing: ranks that nobody has converted yet.
        fetched: bytes of weights that came over a network; None when nothing did.
        needed: bytes of the source that the converted ranks are made of, each counted once, where that is known.
    """

    id: str
    path: Path
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    fetched: int | None = None
    needed: int | None = None


class _Job(NamedTuple):
    """A conversion of which everything is settled before a byte is written."""

    source: Source
    recipe: Recipe
    layouts: list[RankLayout]
    files: dict[str, bytes]
    text: TextSection
    asked: DType | None
    workers: int
    progress: Progress | None

    @property
    def plan(self) -> str:
        """The digest of what all parts of one snapshot have in common."""
        tp = len(self.layouts)
        tables = [tensor_entries(rank_file(rank, tp), layout) for rank, layout in enumerate(self.layouts)]
        texts = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return hashlib.sha256(canonical((self.recipe.spec, tables, self.text, texts))).hexdigest()


def convert(
    source_name: str,
    output: Path | str,
    *,
    tp: int = 1,
    ranks: Sequence[int] | None = None,
    dtype: str | None = None,
    target: str = "generic",
    revision: str | None = None,
    download: bool = False,
    workers: int | None = None,
    canary: bool = True,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Result:
    """Turn a checkpoint into a snapshot at ``output``; on any error or interrupt nothing half-written is left behind.

    Args:
        source_name: a folder, a ``.gguf`` file, ``org/name`` or ``hf://org/name@revision``.
        output: the new directory.
        tp: tensor parallel degree, one rank file each.
        ranks: convert only these, beside ``output``; who converts the last one that is missing publishes.
        dtype: cast every weight to this; None keeps what the checkpoint has (bfloat16 for a quantised GGUF file).
        target: whose layout the matrices get: "generic", or "cpu" for panels that its kernels read front to back.
        revision: branch, tag or commit of a Hub repository.
        download: bring a Hub repository's weights into the Hub's cache first, instead of reading them by ranges.
        workers: threads that read ahead.
        canary: record a float32 forward of a fixed prompt, which every start is checked against.
        progress: told (bytes of tensors so far, bytes in all) after each slab.
        stage: told what begins: "weights", then "canary" if one is recorded.
    """
    begin = time.monotonic()
    asked, layout = checked_dtype(dtype), checked_target(target)
    chosen = None if ranks is None else checked_ranks(ranks, tp)
    if canary:
        _require_torch()
    enter = stage or (lambda _: None)
    with closing(open_source(source_name, revision, download=download, check=_check_model)) as source:
        recipe = settle(source, asked or source.default_dtype)
        texts = source.text_files()
        job = _Job(
            source=source,
            recipe=recipe,
            layouts=rank_layouts(recipe.spec, tp, recipe.stored, layout),
            files=texts | cut_tokenizer(texts),
            text=text_section(texts, source.config, recipe.spec.vocab_size),
            asked=asked,
            workers=workers or default_workers(network=source.traffic is not None),
            progress=progress,
        )
        if chosen is None:
            made = _whole(job, Path(output), canary, enter)
        else:
            made = _in_parts(job, Path(output), chosen, canary, enter)
        traffic = source.traffic
        return msgspec.structs.replace(
            made,
            seconds=time.monotonic() - begin,
            notes=(*made.notes, *_notes(texts, source, asked)),
            fetched=traffic.fetched if traffic else None,
        )


def _check_model(config: Mapping[str, Any]) -> None:
    """Refuse, before weights are fetched, a model that no weights could make convertible."""
    families.find(config).spec(config)


def _whole(job: _Job, target: Path, canary: bool, enter: Stage) -> Result:
    """Convert all ranks and publish."""
    layouts = dict(enumerate(job.layouts))
    size = sum(layout.size for layout in job.layouts)
    with SnapshotWriter(target, job.recipe.spec, len(layouts)) as writer, ExitStack() as stack:
        writer.check_space(size + sum(map(len, job.files.values())))
        enter("weights")
        files = {rank: writer.rank(rank, layout) for rank, layout in layouts.items()}
        for file in files.values():
            stack.callback(file.abandon)
        provenance = _provenance(job, _write(job, files))
        identity, path = _publish(job, writer, provenance, canary, enter)
    return Result(identity, path, size, 0, needed=_needed(job, layouts))


def _needed(job: _Job, layouts: dict[int, RankLayout]) -> int | None:
    """Known only of weights that are stored as they are read."""
    return None if job.source.dequantised else source_bytes(layouts, job.recipe)


def _write(job: _Job, files: dict[int, RankWriter]) -> dict[str, str]:
    """Write rank files, and close them; returns the digests of the source's files, which have not changed meanwhile."""
    layouts = {rank: job.layouts[rank] for rank in files}
    total = sum(tensor.bytes for layout in layouts.values() for tensor in layout.tensors)
    with _digesting(job.source) as hashing:
        wrote = counted(job.progress, total)
        write_ranks(files, layouts, len(job.layouts), job.source, job.recipe, job.workers, wrote)
        for file in files.values():
            file.close()
        digests = hashing.result()
    job.source.check_unchanged()
    return digests


def _publish(job: _Job, writer: SnapshotWriter, provenance: Provenance, canary: bool, enter: Stage) -> tuple[str, Path]:
    """Add to the ranks what makes them a snapshot, check it, and give it its name; returns its id and that."""
    for name in sorted(job.files):
        writer.add_file(name, job.files[name])
    manifest = Manifest(
        requires=writer.requires,
        spec=job.recipe.spec,
        tp=writer.tp,
        tensors=writer.tensors,
        files=writer.files,
        text=job.text,
        provenance=provenance,
    )
    identity = writer.write_manifest(manifest)
    if canary:
        enter("canary")
        return identity, writer.publish(_canary(writer.directory, identity))
    _fresh_process(writer.directory, "--bind-only")
    return identity, writer.publish(None)


def _in_parts(job: _Job, target: Path, ranks: tuple[int, ...], canary: bool, enter: Stage) -> Result:
    """Convert those of the ranks that nobody has converted; publish if then none is missing."""
    tp, plan = len(job.layouts), job.plan
    _refuse_finished(target, tp)
    refuse_taken(target)
    parts = read_parts(target, tp)
    for part in parts.values():
        refuse_other(target, part, plan, _provenance(job, {}))
    absent = {rank: job.layouts[rank] for rank in ranks if rank not in parts}
    if absent:
        enter("weights")
        _write_parts(job, target, absent, plan)
    kept = [rank for rank in ranks if rank not in absent]
    notes = (f"Converted before, and kept: {show_ranks(kept)}.",) if kept else ()
    parts = read_parts(target, tp)
    missing = tuple(sorted(set(range(tp)) - parts.keys()))
    size = sum(layout.size for layout in absent.values())
    made = Result("", parts_directory(target), size, 0, notes, missing, needed=_needed(job, absent))
    if missing and not _published(target):
        return made
    identity = _publish_parts(job, target, parts, absent, canary, enter)
    return msgspec.structs.replace(made, id=identity, path=target, missing=())


def _refuse_finished(target: Path, tp: int) -> None:
    """Refuse to add ranks to a whole snapshot, and remove parts that who published it was killed before removing."""
    if (target / COMMIT).exists():
        remove_parts(target, tp)
        raise UsageError(
            f"{target} is a finished snapshot.", "None of its ranks is missing.", "Choose another -o, or remove it."
        )


def _write_parts(job: _Job, target: Path, layouts: dict[int, RankLayout], plan: str) -> None:
    tp, backlog = len(job.layouts), Backlog()
    with ExitStack() as stack:
        writers = {
            rank: stack.enter_context(PartWriter(target, rank, tp, layout, backlog)) for rank, layout in layouts.items()
        }
        writers[min(writers)].check_space(sum(layout.size for layout in layouts.values()))
        provenance = _provenance(job, _write(job, {rank: writer.file for rank, writer in writers.items()}))
        for writer in writers.values():
            writer.publish(plan, provenance)


def _published(target: Path) -> str:
    """The id of the snapshot that another process has published meanwhile; empty when none has."""
    if not (target / COMMIT).exists():
        return ""
    with open_snapshot(target) as snapshot:
        return snapshot.id


def _publish_parts(
    job: _Job, target: Path, parts: dict[int, Part], own: dict[int, RankLayout], canary: bool, enter: Stage
) -> str:
    """Make the snapshot of all parts; returns its id. Of several processes that come here at a time one does it."""
    while not (identity := _published(target)):
        try:
            identity = _publish_once(job, target, parts, own, canary, enter)
        except Busy:
            time.sleep(BUSY_WAIT)  # for the other, or in its place should it fail
        except (FgsnapError, OSError):
            if not _published(target):
                raise
    remove_parts(target, len(job.layouts))
    return identity


def _publish_once(
    job: _Job, target: Path, parts: dict[int, Part], own: dict[int, RankLayout], canary: bool, enter: Stage
) -> str:
    tp = len(job.layouts)
    provenance = parts[min(own, default=0)].provenance
    with SnapshotWriter(target, job.recipe.spec, tp) as writer:
        for part in parts.values():
            refuse_other(target, part, job.plan, provenance)
        verify_parts(target, {rank: part for rank, part in parts.items() if rank not in own}, job.layouts)
        for rank, part in parts.items():
            writer.take(rank, job.layouts[rank], part_directory(target, rank, tp), part.entry)
        return _publish(job, writer, provenance, canary, enter)[0]


def _require_torch() -> None:
    """Say at once, and not after the weights are written, that the canary cannot be computed here."""
    if find_spec("torch") is None:
        error = missing_extra("torch", "convert", "Recording a canary")
        raise HostError(error.what, error.why, f"{error.next_step}, or convert with --no-canary.")


def _notes(texts: dict[str, bytes], source: Source, asked: DType | None) -> tuple[str, ...]:
    notes = []
    if source.dequantised:
        kinds, dtype = ", ".join(source.dequantised), asked or source.default_dtype
        held = f"in {dtype}" if dtype else "as plain numbers"
        notes.append(f"Quantised weights ({kinds}) were dequantised: the snapshot holds them {held}.")
    if "tokenizer.json" not in texts:
        notes.append(
            "The checkpoint has no tokenizer.json, without which serve and run refuse the snapshot: add the file "
            "(transformers: AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE)) and convert again."
        )
    return tuple(notes)


def _provenance(job: _Job, files: dict[str, str]) -> Provenance:
    source = job.source
    return Provenance(
        source=source.label,
        revision=source.revision,
        files=files,
        rules=job.recipe.digest,
        family=source.config["model_type"],
        converter=fgsnap.__version__,
        dropped=job.recipe.dropped,
        dtype=job.asked or source.default_dtype,
    )


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
