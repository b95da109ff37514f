"""Export: a snapshot back as a Hugging Face safetensors checkpoint, by the same two maps, backwards.

Segments gather each logical tensor from the ranks; the family's rules put its values where conversion would read them.
A snapshot made from plain weights at their own dtypes gives every tensor back bit for bit; of quantised ones it gives
the numbers that they stood for, and notes that. Its digests are checked first: a checkpoint has none that could tell of
damage later. Files are written in a directory beside the target, which gets its name when everything is on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fgsnap.atomic import PartialDirectory, create_file, host_errors, write_file
from fgsnap.convert import families
from fgsnap.convert.folder import INDEX, SINGLE
from fgsnap.convert.plan import SLAB
from fgsnap.convert.rules import Array, Rule, Shape, digest, sources, write_box
from fgsnap.convert.source import NUMPY_DTYPES, parse_json
from fgsnap.layout import logical_shapes, slabs
from fgsnap.progress import Progress, counted, part
from fgsnap.snapshot import Manifest, Snapshot, open_snapshot, read_logical, verify
from fgsnap.spec import DTYPE_BYTES, DType
from fgsnap.tokenizer import CUT

SHARD = 5_000_000_000
"""Most bytes of tensors in one file; a single larger tensor has a file of its own."""

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Exported(msgspec.Struct, frozen=True):
    """An exported checkpoint; ``notes`` say in what it differs from the one that was converted."""

    path: Path
    tensors: int
    bytes: int
    notes: tuple[str, ...]


class _Tensor(NamedTuple):
    name: str
    dtype: DType
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def export(
    snapshot_path: Path | str, target: Path | str, progress: Progress | None = None, *, shard_bytes: int = SHARD
) -> Exported:
    """Write the snapshot's checkpoint to ``target``; on any error or interrupt nothing is left behind.

    Args:
        snapshot_path: the snapshot directory.
        target: the new directory.
        progress: told (bytes so far, bytes in all), those that are verified and those that are written.
        shard_bytes: most bytes of tensors in one file.
    """
    with open_snapshot(snapshot_path) as snapshot:
        manifest = snapshot.manifest
        rules = _rules(manifest)
        shards = _shards(_tensors(manifest, rules), shard_bytes)
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        with PartialDirectory(Path(target)) as new:
            new.check_space(total)
            covered = sum(entry.bytes for entry in manifest.files.values())
            verify(snapshot.path, part(progress, 0, covered + total))
            wrote = counted(part(progress, covered, covered + total), total)
            _write_tensors(snapshot, rules, shards, new.path, wrote)
            for name, data in _texts(snapshot):
                write_file(new.path / name, data)
            path = new.publish()
        return Exported(path, sum(map(len, shards)), total, _notes(manifest, rules, _quantised_by(snapshot)))


def _rules(manifest: Manifest) -> tuple[Rule, ...]:
    """Those that the checkpoint was read by, where plain weights have such; else the family's first."""
    family = families.find({"model_type": manifest.provenance.family})
    variants = [rules(manifest.spec) for rules in family.rules]
    return next((rules for rules in variants if digest(rules) == manifest.provenance.rules), variants[0])


def _tensors(manifest: Manifest, rules: tuple[Rule, ...]) -> list[_Tensor]:
    """The checkpoint's tensors, each in the dtype that its logical tensors are stored in."""
    stored = {segment.tensor: entry.dtype for entry in manifest.tensors for segment in entry.segments}
    dtypes = {piece.source: stored[rule.tensor] for rule in rules for piece in rule.takes}
    return [_Tensor(name, dtypes[name], shape) for name, shape in sources(rules).items()]


def _shards(tensors: list[_Tensor], most: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    room = most
    for tensor in tensors:
        if tensor.bytes > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


def _write_tensors(
    snapshot: Snapshot,
    rules: tuple[Rule, ...],
    shards: list[list[_Tensor]],
    directory: Path,
    wrote: Callable[[int], None],
) -> None:
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)
    ]  # fmt: skip
    with contextlib.ExitStack() as files:
        targets: dict[str, Array] = {}
        for name, shard in zip(names, shards, strict=True):
            targets |= files.enter_context(_mapped(directory / name, shard))
        _put_all(snapshot, rules, targets, wrote)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_file(directory / INDEX, _json(index))


def _put_all(
    snapshot: Snapshot, rules: tuple[Rule, ...], targets: dict[str, Array], wrote: Callable[[int], None]
) -> None:
    """The loop: every logical tensor, slab by slab, to where its rule read it."""
    shapes = logical_shapes(snapshot.manifest.spec)
    for rule in rules:
        kind = targets[rule.takes[0].source].dtype
        for start, extent in slabs(shapes[rule.tensor], SLAB // kind.itemsize):
            part: Array = np.empty(extent, kind)
            flat: Array = part.reshape(-1).view(np.uint8)
            read_logical(snapshot, rule.tensor, start, extent, flat.data)
            write_box(rule, targets.__getitem__, start, part)
            wrote(part.nbytes)


@contextlib.contextmanager
def _mapped(path: Path, shard: list[_Tensor]) -> Iterator[dict[str, Array]]:
    """A new safetensors file with its header, mapped for writing: one array a tensor. On disk when this ends."""
    header = _header(shard)
    size = len(header) + sum(tensor.bytes for tensor in shard)
    with contextlib.ExitStack() as stack:
        with host_errors(path, size):
            descriptor = create_file(path)
            stack.callback(os.close, descriptor)
            os.posix_fallocate(descriptor, 0, size)  # a full disk under a map would kill the process
            memory = mmap.mmap(descriptor, size)
        memory[: len(header)] = header
        yield _arrays(memory, len(header), shard)
        with host_errors(path, size):
            memory.flush()
            os.fsync(descriptor)


def _header(shard: list[_Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (end, end + tensor.bytes)
        }  # fmt: skip
        end += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 8) * 8 - 8)
    return len(text).to_bytes(8, "little") + text


def _arrays(memory: mmap.mmap, at: int, shard: list[_Tensor]) -> dict[str, Array]:
    """Each tensor's array over the file's bytes, the first at ``at``."""
    arrays = {}
    for tensor in shard:
        flat: Array = np.frombuffer(memory, NUMPY_DTYPES[tensor.dtype], math.prod(tensor.shape), at)
        arrays[tensor.name] = flat.reshape(tensor.shape)
        at += tensor.bytes
    return arrays


def _texts(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    manifest = snapshot.manifest
    for name in manifest.files:
        if not name.startswith("rank-") and name != CUT:
            data = snapshot.read_text(name)
            yield name, _plain(data, manifest.provenance.dtype) if name == "config.json" else data


def _plain(config: bytes, dtype: DType | None) -> bytes:
    """config.json with the dtype that the weights were cast to, whatever it stated before, and of plain weights."""
    parsed = parse_json(config, "config.json")
    keys = [key for key in ("dtype", "torch_dtype") if key in parsed] or ["torch_dtype"]
    changed = {**parsed, **(dict.fromkeys(keys, dtype) if dtype is not None else {})}
    changed.pop("quantization_config", None)
    return config if changed == parsed else _json(changed)


def _quantised_by(snapshot: Snapshot) -> str | None:
    """The method by which the checkpoint's weights were quantised, as its config.json names it."""
    if "config.json" not in snapshot.manifest.files:
        return None
    config = parse_json(snapshot.read_text("config.json"), "config.json")
    stated = config.get("quantization_config") or {}
    return str(stated.get("quant_method")) if stated else None


def _notes(manifest: Manifest, rules: tuple[Rule, ...], quantised: str | None) -> tuple[str, ...]:
    origin, notes = manifest.provenance, []
    if quantised is not None:
        notes.append(f"Quantised weights ({quantised}) were dequantised when they were converted; these are plain.")
    elif origin.rules != digest(rules):
        notes.append("The source was no Hugging Face checkpoint; names and row order are those of one.")
    if origin.dtype is not None:
        notes.append(f"The weights were stored in {origin.dtype} when they were converted, whatever the source had.")
    if origin.dropped:
        notes.append(f"Tensors of the source without use were dropped: {', '.join(origin.dropped)}.")
    return tuple(notes)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
