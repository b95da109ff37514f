"""Whether a stranger's manifest is one that its own spec implies. Pure: no file is touched.

The spec decides every stored tensor, so the table holds no freedom but data types and gaps: whatever else it says is
refused. Each function returns what is wrong, or "".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fgsnap.errors import FgsnapError
from fgsnap.layout import StoredTensor, stored_tensors
from fgsnap.snapshot.format import (
    LAYER_ALIGNMENT,
    SAFE_NAME,
    TENSOR_ALIGNMENT,
    UNCOVERED,
    Canary,
    Manifest,
    TensorEntry,
    chunks_file,
    rank_file,
    rank_header,
    required_features,
)
from fgsnap.snapshot.packing import fits, packed_bytes
from fgsnap.spec import DecoderSpec, Part

_LARGEST_NUMBER = 1 << 48


def manifest_fault(manifest: Manifest) -> str:
    """What is wrong with the manifest as a whole."""
    return spec_fault(manifest.spec) or _files_fault(manifest) or _text_fault(manifest) or _tables_fault(manifest)


def rank_headers(manifest: Manifest) -> dict[str, bytes]:
    """What each rank file of a sound manifest must begin with."""
    tables: dict[str, list[TensorEntry]] = {}
    for entry in manifest.tensors:
        tables.setdefault(entry.file, []).append(entry)
    return {name: rank_header(name, table, table[0].offset) for name, table in tables.items()}


def canary_fault(canary: Canary, manifest: Manifest, identity: str) -> str:
    """What is wrong with a canary."""
    if canary.id != identity:
        return "it belongs to another snapshot."
    if not 0 < len(canary.tokens) == len(canary.next) == len(canary.margins):
        return "its lists are not equally long."
    if not all(0 <= token < manifest.spec.vocab_size for token in (*canary.tokens, *canary.next)):
        return "it has a token outside the vocabulary."
    return ""


def spec_fault(spec: DecoderSpec) -> str:
    """Why no decoder can have this spec: what would make later arithmetic divide by zero, wrap around or never end."""
    fault = _number_fault("spec", spec)
    if fault:
        return fault
    if not all(index < len(spec.layer_kinds) for index in spec.layers):
        return "spec.layers names a layer kind that does not exist."
    positive: dict[str, float] = {
        "vocab_size": spec.vocab_size,
        "width": spec.width,
        "max_length": spec.max_length,
        "layers": spec.depth,
        "embedding.width": spec.embedding.width,
    }
    for i, kind in enumerate(spec.layer_kinds):
        attention = kind.attention
        for name in ("heads", "kv_heads", "head_dim"):
            positive[f"layer_kinds[{i}].attention.{name}"] = getattr(attention, name)
        if kind.mlp is not None:
            positive[f"layer_kinds[{i}].mlp.inner"] = kind.mlp.inner
        if attention.rope is not None and attention.rope >= len(spec.ropes):
            return f"spec.layer_kinds[{i}] names a rope that does not exist."
        if attention.kv_heads > 0 and attention.heads % attention.kv_heads:
            return f"{attention.heads} heads cannot share {attention.kv_heads} KV heads."
    for i, rope in enumerate(spec.ropes):
        positive |= {f"ropes[{i}].dims": rope.dims, f"ropes[{i}].theta": rope.theta}
    return next((f"spec.{name} is {value}, not positive." for name, value in positive.items() if not value > 0), "")


def _number_fault(place: str, value: Any) -> str:
    if isinstance(value, Part):
        parts: Iterable[tuple[str, Any]] = [
            (f"{place}.{name}", getattr(value, name)) for name in value.__struct_fields__
        ]
    elif isinstance(value, tuple):
        parts = [(place, item) for item in value]
    elif isinstance(value, int | float) and not 0 <= value <= _LARGEST_NUMBER:
        return f"{place} is {value}, which is out of range."
    else:
        return ""
    return next(filter(None, (_number_fault(name, item) for name, item in parts)), "")


def _files_fault(manifest: Manifest) -> str:
    ranks = [name for name in manifest.files if name.startswith("rank-")]
    # Counted before any name is made, so that a huge degree costs nothing.
    if manifest.tp != len(ranks) or set(ranks) != {rank_file(rank, manifest.tp) for rank in range(len(ranks))}:
        return f"The manifest lists {len(ranks)} rank files for {manifest.tp} ranks."
    for name, entry in manifest.files.items():
        if not SAFE_NAME.fullmatch(name) or name in UNCOVERED:
            return f"{name!r} is not a name that a covered file can have."
        if not 0 <= entry.bytes <= _LARGEST_NUMBER:
            return f"{name} cannot have {entry.bytes} bytes."
        if (entry.chunks is not None) != name.startswith("rank-"):
            return f"{name}: rank files have chunk digests, other files have none."
        if name.startswith("rank-") and chunks_file(name) in manifest.files:
            return f"{chunks_file(name)} is covered by its rank file's entry alone."
    return ""


def _text_fault(manifest: Manifest) -> str:
    bos = manifest.text.bos_token_id
    if bos is not None and not 0 <= bos < manifest.spec.vocab_size:
        return f"text.bos_token_id is {bos}, outside the vocabulary."
    if manifest.text.add_bos and bos is None:
        return "text.add_bos is set, but there is no text.bos_token_id."
    return ""


def _tables_fault(manifest: Manifest) -> str:
    unnamed = sorted(set(required_features(manifest.tensors)) - set(manifest.requires))
    if unnamed:
        return f"The table needs a reader that knows {unnamed[0]!r}, but requires does not name it."
    at = 0
    forms: dict[str, tuple[str, str]] = {}
    for rank in range(manifest.tp):
        name = rank_file(rank, manifest.tp)
        try:
            stored = stored_tensors(manifest.spec, manifest.tp, rank)
        except FgsnapError as error:
            return f"{error.what} {error.why}"
        entries = manifest.tensors[at : at + len(stored)]
        at += len(stored)
        fault = _table_fault(name, entries, stored, manifest.files[name].bytes)
        if fault:
            return fault
        for entry in entries:
            form = (entry.dtype, entry.layout)
            if (first := forms.setdefault(entry.name, form)) != form:
                return f"{entry.name} is {' '.join(first)} in one rank and {' '.join(form)} in another."
    if at != len(manifest.tensors):
        return f"The table has {len(manifest.tensors)} tensors; its spec has {at}."
    return ""


def _table_fault(file: str, entries: Sequence[TensorEntry], stored: Sequence[StoredTensor], size: int) -> str:
    if len(entries) != len(stored):
        return f"{file} has {len(entries)} tensors in the table; its spec has {len(stored)}."
    end = entries[0].offset
    if end < LAYER_ALIGNMENT or end % LAYER_ALIGNMENT:
        return f"The data of {file} begins at {end}, which is not a page."
    for entry, tensor in zip(entries, stored, strict=True):
        if entry.name != tensor.name or entry.file != file:
            return f"The table has {entry.name!r} of {entry.file!r} where {tensor.name} of {file} belongs."
        if entry.shape != tensor.shape:
            return f"{entry.name} of {file} has shape {list(entry.shape)}; its spec says {list(tensor.shape)}."
        if entry.segments != tensor.segments:
            return f"{entry.name} of {file} has segments that its spec does not imply."
        if not fits(entry.layout, entry.shape, entry.dtype):
            return f"{entry.name} of {file} has layout {entry.layout}, which shape {list(entry.shape)} does not fit."
        if entry.bytes != packed_bytes(entry.layout, entry.shape, entry.dtype):
            return f"{entry.name} of {file} has {entry.bytes} bytes for shape {list(entry.shape)} of {entry.dtype}."
        alignment = LAYER_ALIGNMENT if tensor.starts_layer else TENSOR_ALIGNMENT
        if entry.offset < end or entry.offset - end >= LAYER_ALIGNMENT or entry.offset % alignment:
            return f"{entry.name} of {file} lies at {entry.offset}, where it cannot: the one before ends at {end}."
        end = entry.offset + entry.bytes
    return "" if end == size else f"The tensors of {file} end at {end}; the file has {size} bytes."
