"""What a conversion would write, by arithmetic alone: files, bytes, memory. Needs no more than config.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import msgspec

from fgsnap.convert import families
from fgsnap.convert.files import KEPT
from fgsnap.convert.opening import open_source
from fgsnap.convert.pack import checked_target
from fgsnap.convert.source import Source, says_dtype, stated_dtype
from fgsnap.errors import SourceError, UsageError
from fgsnap.layout import check_tp, logical_shapes, possible_tp, stored_tensors
from fgsnap.snapshot import Layout, PlannedTensor, RankLayout, panel_bytes, plan_rank, rank_file
from fgsnap.snapshot.backlog import BEHIND
from fgsnap.spec import DTYPE_BYTES, DecoderSpec, DType

SLAB = 4 << 20
"""Bytes of output that are read, cast and written at a time; a single longer row or panel is one slab."""

# Measured: a process that has imported torch, one tokenizer entry, and the converting process while it only waits.
_TORCH = 150 << 20
_TOKENIZER_ENTRY = 1 << 10
_AT_REST = 24 << 20
_UPCAST = 4 << 20  # of weights, while they are multiplied in float32
_CANARY_TOKENS = 16


class PlannedRank(msgspec.Struct, frozen=True):
    """One rank file: its name, size in bytes, and the stored tensors' names in file order."""

    file: str
    bytes: int
    tensors: tuple[str, ...]


Origin = Literal["asked", "source", "assumed", "unknown"]


class Plan(msgspec.Struct, frozen=True):
    """A conversion before it happens.

    Attributes:
        ranks: the weight files.
        bytes: their sum; the small text files come on top.
        dtype: the dtype the sizes are for.
        dtype_from: whether that was asked for, read from the source, or assumed because the source does not say or
            names one that is not known.
        target: whose layout the matrices get.
        conversion_memory: about the most memory of its own, above an idle interpreter, that the converting process
            takes; pages of mapped files do not count.
        canary_memory: the same of the fresh process that computes the canary; None when none is recorded.
        peak_memory: the most of both at any time; while the canary is computed, the converting process only waits.
        kv_bytes_per_token: KV cache bytes one token takes over all layers and ranks, in ``dtype``.
        possible_tp: the tensor parallel degrees that divide the model.
    """

    ranks: tuple[PlannedRank, ...]
    bytes: int
    dtype: DType
    dtype_from: Origin
    target: str
    conversion_memory: int
    canary_memory: int | None
    peak_memory: int
    kv_bytes_per_token: int
    possible_tp: tuple[int, ...]


def plan_source(
    name: str,
    *,
    tp: int = 1,
    dtype: str | None = None,
    target: str = "generic",
    ranks: Sequence[int] | None = None,
    revision: str | None = None,
    workers: int | None = None,
    canary: bool = True,
) -> Plan:
    """The plan for a checkpoint by path or Hub name; of a Hub repository only config.json is fetched."""
    asked = checked_dtype(dtype)
    checked_target(target)  # before anything is fetched
    chosen = None if ranks is None else checked_ranks(ranks, tp)
    with closing(open_source(name, revision, config_only=True)) as source:
        stated = _stated_dtype(source)
        absent: Origin = "unknown" if says_dtype(source.config) else "assumed"
        origin: Origin = "asked" if asked else "source" if stated else absent
        spec = families.find(source.config).spec(source.config)
        network = source.revision is not None
        workers = workers or default_workers(network)
        held = stated or "float32"
        kept = kept_memory(spec, held) if network else 0
        return plan(spec, tp, asked or held, origin, workers, target, chosen, kept, canary)


def plan(
    spec: DecoderSpec,
    tp: int,
    dtype: DType,
    dtype_from: Origin = "asked",
    workers: int | None = None,
    target: str = "generic",
    chosen: tuple[int, ...] | None = None,
    kept: int = 0,
    canary: bool = True,
) -> Plan:
    """The plan for a decoder whose tensors are all stored in ``dtype``; of the ``chosen`` ranks, if there are any.

    ``kept``: bytes that are kept of what comes over a network. ``canary``: one is recorded.
    """
    layouts = rank_layouts(spec, tp, dict.fromkeys(logical_shapes(spec), dtype), checked_target(target))
    ranks = tuple(
        PlannedRank(rank_file(rank, tp), layout.size, tuple(tensor.name for tensor in layout.tensors))
        for rank, layout in enumerate(layouts)
        if chosen is None or rank in chosen
    )
    conversion = peak_memory(layouts, len(ranks), workers or default_workers(), kept)
    beside = canary_memory(spec, layouts) if canary else None
    return Plan(
        ranks=ranks,
        bytes=sum(rank.bytes for rank in ranks),
        dtype=dtype,
        dtype_from=dtype_from,
        target=target,
        conversion_memory=conversion,
        canary_memory=beside,
        peak_memory=max(conversion, _AT_REST + (beside or 0)),
        kv_bytes_per_token=spec.kv_values_per_token() * DTYPE_BYTES[dtype],
        possible_tp=tuple(possible_tp(spec)),
    )


def rank_layouts(spec: DecoderSpec, tp: int, dtypes: Mapping[str, DType], layout: Layout = "row") -> list[RankLayout]:
    """Where everything lies in each rank file.

    Args:
        spec: the decoder.
        tp: how many ranks; refused with the degrees that work when it does not divide the model.
        dtypes: the dtype to store each logical tensor in.
        layout: that of the matrices it fits.
    """
    check_tp(spec, tp)
    ranks = [stored_tensors(spec, tp, rank) for rank in range(tp)]
    own = {stored.name: _one_dtype(stored.name, _parts(stored.segments), dtypes) for stored in ranks[0]}
    return [plan_rank([(stored, own[stored.name]) for stored in rank], layout) for rank in ranks]


def _parts(segments: Any) -> list[str]:
    return [segment.tensor for segment in segments if segment.tensor is not None]


def _one_dtype(name: str, parts: list[str], dtypes: Mapping[str, DType]) -> DType:
    """The dtype of a stored tensor, whose parts lie in one matrix and must agree."""
    found = sorted({dtypes[part] for part in parts})
    if len(found) > 1:
        raise SourceError(
            f"{name} would mix {' and '.join(found)}.",
            "The checkpoint stores " + ", ".join(f"{part} as {dtypes[part]}" for part in parts) + ".",
            "Choose one dtype for all weights with --dtype.",
        )
    return found[0]


def checked_ranks(ranks: Sequence[int], tp: int) -> tuple[int, ...]:
    """The ranks in ascending order, or UsageError."""
    wrong = [rank for rank in ranks if not 0 <= rank < tp]
    doubled = [rank for rank, times in Counter(ranks).items() if times > 1]
    if ranks and not wrong and not doubled:
        return tuple(sorted(ranks))
    what = f"rank {wrong[0]}" if wrong else f"rank {doubled[0]} twice" if doubled else "no rank"
    if tp == 1:
        raise UsageError(
            f"--ranks names {what}.",
            "At tensor parallel degree 1 there is rank 0 alone.",
            "Name the degree that the ranks are of, as in --tp 4, or leave --ranks out.",
        )
    raise UsageError(
        f"--ranks names {what}.",
        f"At tensor parallel degree {tp} the ranks are 0 to {tp - 1}.",
        f"Name some of them, each once: --ranks 0,{tp - 1}",
    )


def checked_dtype(dtype: str | None) -> DType | None:
    """The dtype the user asked for, or UsageError."""
    for known in ("bfloat16", "float16", "float32"):
        if dtype == known:
            return known
    if dtype is None:
        return None
    raise UsageError(f"There is no weight dtype {dtype!r}.", "", f"Choose one of {', '.join(sorted(DTYPE_BYTES))}.")


def _stated_dtype(source: Source) -> DType | None:
    """The dtype the checkpoint says its weights are in, where it says so."""
    return source.default_dtype or stated_dtype(source.config) or ("bfloat16" if source.dequantised else None)


def default_workers(network: bool = False) -> int:
    """Threads that read ahead: as many as this process may use, but more than a few only wait for the disk.

    Over a network each is a connection, and mostly waits.
    """
    return 8 if network else min(len(os.sched_getaffinity(0)), 4)


def kept_memory(spec: DecoderSpec, dtype: DType) -> int:
    """The most bytes that are kept of weights of ``dtype`` that come over a network.

    Of a stack of experts a whole one is fetched. Only the weights tell whether a checkpoint stacks them, and with gates
    and ups in one tensor; a plan reads no weights, so it is for one that does.
    """
    experts = [kind.experts.mlp for kind in spec.layer_kinds if kind.experts is not None]
    longest = max(((1 + mlp.gated) * mlp.inner * spec.width * DTYPE_BYTES[dtype] for mlp in experts), default=0)
    return max(KEPT, 2 * longest)


def peak_memory(layouts: list[RankLayout], files: int, workers: int, kept: int = 0) -> int:
    """About the most anonymous bytes of a conversion that writes this many rank files at a time.

    Slabs that wait for the disk or a digest, one a file that ends within a huge page, the slabs being made with what a
    cast or packing needs beside each, the tables, and what is kept of a network's.
    """
    slab = max(SLAB, max(_panel(tensor) for layout in layouts for tensor in layout.tensors))
    tensors = sum(len(layout.tensors) for layout in layouts)
    held = -(-BEHIND // slab) + 2  # with the one that is being written and the one that is asked for next
    return (held + files + 5 * workers) * slab + tensors * 8192 + (16 << 20) + kept


def _panel(tensor: PlannedTensor) -> int:
    return panel_bytes(tensor.layout, tensor.shape, tensor.dtype)


def canary_memory(spec: DecoderSpec, layouts: list[RankLayout]) -> int:
    """About the most memory of the process that computes the canary: libraries, a slab of weights, and one prompt.

    Weights are used where they are mapped, but those that several ranks share are put together first, and packed ones
    are unpacked: the embedding and the head, and a layer while the one before it is still held.
    """
    tables = sum(len(layout.tensors) for layout in layouts) * 8192
    libraries = max(_TORCH, spec.vocab_size * _TOKENIZER_ENTRY)
    widest = max(tensor.bytes // tensor.shape[0] for layout in layouts for tensor in layout.tensors)
    inner = max(kind.mlp.inner if kind.mlp else 0 for kind in spec.layer_kinds)
    values = 2 * spec.vocab_size + 4 * inner + 8 * spec.width + spec.kv_values_per_token()
    return libraries + tables + max(_UPCAST, 2 * widest) + _CANARY_TOKENS * 4 * values + _assembled(layouts)


def _assembled(layouts: list[RankLayout]) -> int:
    copied = [tensor for layout in layouts for tensor in layout.tensors if len(layouts) > 1 or tensor.layout != "row"]
    parts: dict[str, int] = {}
    for tensor in copied:
        part = ".".join(tensor.name.split(".")[:2]) if tensor.name.startswith("layers.") else ""
        parts[part] = parts.get(part, 0) + tensor.bytes
    outside = parts.pop("", 0)
    return outside + 2 * max(parts.values(), default=0)
