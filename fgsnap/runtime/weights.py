"""A snapshot's tensors as a backend's tensors, ordered as the decoder uses them. Binding is validation.

What a spec needs and what a snapshot holds must agree tensor by tensor, in name, dtype, shape and bytes, before an op
runs on it. At the snapshot's own degree 1 nothing is copied: the tensors are views of the mapped file.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

from fgsnap import layout
from fgsnap.errors import SnapshotRefused
from fgsnap.kernels.ops import NormArgs, Ops, Tensor
from fgsnap.layout import StoredTensor
from fgsnap.snapshot import Snapshot, TensorBytes, opened_at, packed_bytes, read_logical
from fgsnap.spec import DTYPE_BYTES, DecoderSpec, Norm


class LayerWeights(NamedTuple):
    """One layer's tensors; None where the layer has no such part."""

    attn_in: NormArgs | None
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    attn_out: NormArgs | None
    mlp_in: NormArgs | None
    gate_up: Tensor | None
    gate_up_bias: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    mlp_out: NormArgs | None


class Weights(NamedTuple):
    """All of a decoder's tensors. ``head`` of a tied model is ``embed``."""

    embed: Tensor
    embed_dtype: str
    layers: Sequence[LayerWeights]
    final_norm: NormArgs | None
    head: Tensor
    head_bias: Tensor | None


Find = Callable[[StoredTensor], TensorBytes]


def load(snapshot: Snapshot, ops: Ops, tp: int = 1, rank: int = 0) -> Weights:
    """Bind every tensor of ``rank`` of ``tp`` to ``ops``. The degree is 1 or the snapshot's own.

    What is added to a sum over ranks is bound on rank 0 alone.

    Raises:
        SnapshotRefused: a tensor is missing, superfluous, or not what the spec says.
    """
    binder = _Binder(snapshot.manifest.spec, ops, _mapped(snapshot, tp, rank), tp, rank)
    return binder.weights([binder.layer(index) for index in range(snapshot.manifest.spec.depth)])


def load_by_layer(snapshot: Snapshot, ops: Ops) -> Weights:
    """As load, but a layer is bound anew each time it is asked for, so that one layer at a time takes memory.

    For a single pass over a model of any size and degree, such as the canary's.
    """
    find = _mapped(snapshot, 1, 0) if snapshot.manifest.tp == 1 else _assembled(snapshot)
    binder = _Binder(snapshot.manifest.spec, ops, find)
    return binder.weights(_LayersOnDemand(binder.layer, snapshot.manifest.spec.depth))


class _LayersOnDemand(Sequence[LayerWeights]):
    def __init__(self, bind: Callable[[int], LayerWeights], count: int) -> None:
        self._bind = bind
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self._bind(i) for i in range(*index.indices(self._count))]
        return self._bind(range(self._count)[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        return map(self._bind, range(self._count))


class _Binder:
    """Turns the names of one spec's tensors into tensors."""

    def __init__(self, spec: DecoderSpec, ops: Ops, find: Find, tp: int = 1, rank: int = 0) -> None:
        self._spec = spec
        self._ops = ops
        self._find = find
        self._rank = rank
        self._expected = {stored.name: stored for stored in layout.stored_tensors(spec, tp, rank)}

    def weights(self, layers: Sequence[LayerWeights]) -> Weights:
        embed = self.tensor("embed.weight")
        return Weights(
            embed=embed,
            embed_dtype=self._find(self._expected["embed.weight"]).dtype,
            layers=layers,
            final_norm=self.norm("final_norm", self._spec.final_norm),
            head=embed if self._spec.head.tied else self.tensor("head.weight"),
            head_bias=self.optional("head.bias"),
        )

    def layer(self, index: int) -> LayerWeights:
        layer, at = self._spec.layer(index), f"layers.{index}."
        return LayerWeights(
            attn_in=self.norm(at + "attn_in", layer.attn_in),
            qkv=self.tensor(at + "qkv.weight"),
            qkv_bias=self.optional(at + "qkv.bias"),
            out=self.tensor(at + "out.weight"),
            out_bias=self.once(at + "out.bias"),
            attn_out=self.norm(at + "attn_out", layer.attn_out),
            mlp_in=self.norm(at + "mlp_in", layer.mlp_in),
            gate_up=self.optional(at + "gate_up.weight"),
            gate_up_bias=self.optional(at + "gate_up.bias"),
            down=self.optional(at + "down.weight"),
            down_bias=self.once(at + "down.bias"),
            mlp_out=self.norm(at + "mlp_out", layer.mlp_out),
        )

    def norm(self, name: str, norm: Norm | None) -> NormArgs | None:
        if norm is None:
            return None
        weight, bias = self.optional(name + ".weight"), self.optional(name + ".bias")
        return NormArgs(norm.kind, norm.eps, weight, bias, norm.unit_offset, norm.float32_weight)

    def once(self, name: str) -> Tensor | None:
        return self.optional(name) if self._rank == 0 else None

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._expected else None

    def tensor(self, name: str) -> Tensor:
        expected = self._expected[name]
        found = self._find(expected)
        _check(expected, found)
        return self._ops.weight(found.data, found.dtype, found.shape, found.layout)


def _check(expected: StoredTensor, found: TensorBytes) -> None:
    name = expected.name
    if found.dtype not in DTYPE_BYTES:
        raise _refused(name, f"its dtype is {found.dtype}", f"one of {', '.join(DTYPE_BYTES)}")
    if tuple(found.shape) != expected.shape:
        raise _refused(name, f"its shape is {list(found.shape)}", str(list(expected.shape)))
    if found.data.nbytes != (size := packed_bytes(found.layout, expected.shape, found.dtype)):
        raise _refused(name, f"it has {found.data.nbytes} bytes", str(size))


def _refused(name: str, found: str, wanted: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"The snapshot's tensor {name} is not what its spec needs.",
        f"In the snapshot {found}; the spec needs {wanted}.",
        "Convert the checkpoint again with this version of fgsnap.",
    )


def _mapped(snapshot: Snapshot, tp: int, rank: int) -> Find:
    table = opened_at(snapshot, tp, rank)
    expected_names = {stored.name for stored in layout.stored_tensors(snapshot.manifest.spec, tp, rank)}
    superfluous = sorted(table.keys() - expected_names)
    if superfluous:
        raise _refused(superfluous[0], "it exists", "no tensor of that name")

    def find(expected: StoredTensor) -> TensorBytes:
        if expected.name not in table:
            raise _refused(expected.name, "it does not exist", f"one of shape {list(expected.shape)}")
        return table[expected.name]

    return find


def _assembled(snapshot: Snapshot) -> Find:
    """Each tensor put together from the ranks' parts when it is asked for; its memory lives as long as it does."""
    dtypes = {part.tensor: entry.dtype for entry in snapshot.manifest.tensors for part in entry.segments}

    def find(expected: StoredTensor) -> TensorBytes:
        dtype = dtypes[expected.segments[0].tensor]
        row_bytes = math.prod(expected.shape[1:]) * DTYPE_BYTES[dtype]
        data = memoryview(mmap.mmap(-1, expected.shape[0] * row_bytes))
        for segment in expected.segments:
            assert segment.tensor is not None, "degree 1 has no padding"
            rows = segment.stop - segment.start if segment.axis == 0 else expected.shape[0]
            target = (
                data[segment.offset * row_bytes : (segment.offset + rows) * row_bytes] if segment.axis == 0 else data
            )
            read_logical(snapshot, segment.tensor, 0, rows, target)
        return TensorBytes(dtype, expected.shape, data)

    return find
