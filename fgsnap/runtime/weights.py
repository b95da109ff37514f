"""A snapshot's tensors as a backend's tensors, ordered as the decoder uses them. Binding is validation.

What a spec needs and what a snapshot holds must agree tensor by tensor, in name, dtype, shape and bytes, before an op
runs on it. At the snapshot's own degree nothing is copied: the tensors are views of the mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

from fgsnap import layout
from fgsnap.errors import SnapshotRefused
from fgsnap.kernels.ops import NormArgs, Ops, Tensor
from fgsnap.layout import StoredTensor
from fgsnap.snapshot import Snapshot, TensorBytes, gathered, opened_at, packed_bytes
from fgsnap.spec import DTYPE_BYTES, Attention, DecoderSpec, Experts, Norm


class AttentionWeights(NamedTuple):
    """Tensors of an attention with keys and values; None where it has no such part."""

    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: NormArgs | None
    k_norm: NormArgs | None
    sinks: Tensor | None
    out: Tensor
    out_bias: Tensor | None


class LatentWeights(NamedTuple):
    """Tensors of an attention with latents. ``q`` makes queries of the residual stream, or of what ``q_down`` makes."""

    q_down: Tensor | None
    q_norm: NormArgs | None
    q: Tensor
    latent: Tensor
    latent_norm: NormArgs | None
    up_keys: Tensor
    up_values: Tensor
    out: Tensor
    out_bias: Tensor | None


class MlpWeights(NamedTuple):
    """Tensors of an MLP, or of a stack of them."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class ExpertsWeights(NamedTuple):
    """Tensors of a router, its experts, and the expert that every token passes."""

    router: Tensor
    router_bias: Tensor | None
    selection_bias: Tensor | None
    stacks: MlpWeights
    shared: MlpWeights | None
    shared_gate: Tensor | None


class LayerWeights(NamedTuple):
    """One layer's tensors; None where the layer has no such part."""

    attn_in: NormArgs | None
    attention: AttentionWeights | LatentWeights
    attn_out: NormArgs | None
    mlp_in: NormArgs | None
    mlp: MlpWeights | None
    experts: ExpertsWeights | None
    mlp_out: NormArgs | None


class Weights(NamedTuple):
    """All of a decoder's tensors. ``head`` of a tied model is ``embed``."""

    embed: Tensor
    positions: Tensor | None
    project_in: Tensor | None
    layers: Sequence[LayerWeights]
    final_norm: NormArgs | None
    project_out: Tensor | None
    head: Tensor
    head_bias: Tensor | None


Find = Callable[[StoredTensor], TensorBytes]


def load(snapshot: Snapshot, ops: Ops, tp: int = 1, rank: int = 0) -> Weights:
    """Bind every tensor of ``rank`` of ``tp`` to ``ops``. The degree is any that divides the model.

    What is added to a sum over ranks is bound on rank 0 alone.

    Raises:
        SnapshotRefused: a tensor is missing, superfluous, or not what the spec says; or see snapshot.opened_at.
        UsageError, HostError: see snapshot.opened_at.
    """
    binder = _Binder(snapshot.manifest.spec, ops, _opened(snapshot, tp, rank), tp, rank)
    return binder.weights([binder.layer(index) for index in range(snapshot.manifest.spec.depth)])


def load_by_layer(snapshot: Snapshot, ops: Ops) -> Weights:
    """As load, but a layer is bound anew each time it is asked for, so that one layer at a time takes memory.

    For a single pass over a model of any size and degree, such as the canary's.
    """
    find = _opened(snapshot, 1, 0) if snapshot.manifest.tp == 1 else _assembled(snapshot)
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
            positions=self.optional("positions.weight"),
            project_in=self.optional("project_in.weight"),
            layers=layers,
            final_norm=self.norm("final_norm", self._spec.final_norm),
            project_out=self.optional("project_out.weight"),
            head=embed if self._spec.head.tied else self.tensor("head.weight"),
            head_bias=self.optional("head.bias"),
        )

    def layer(self, index: int) -> LayerWeights:
        layer, at = self._spec.layer(index), f"layers.{index}."
        attention = self.attention if layer.attention.latent is None else self.latent
        return LayerWeights(
            attn_in=self.norm(at + "attn_in", layer.attn_in),
            attention=attention(layer.attention, at),
            attn_out=self.norm(at + "attn_out", layer.attn_out),
            mlp_in=self.norm(at + "mlp_in", layer.mlp_in),
            mlp=None if layer.mlp is None else self.mlp(at),
            experts=None if layer.experts is None else self.experts(layer.experts, at),
            mlp_out=self.norm(at + "mlp_out", layer.mlp_out),
        )

    def attention(self, attention: Attention, at: str) -> AttentionWeights:
        norm = attention.qk_norm.norm if attention.qk_norm is not None else None
        return AttentionWeights(
            qkv=self.tensor(at + "qkv.weight"),
            qkv_bias=self.optional(at + "qkv.bias"),
            q_norm=self.norm(at + "q_norm", norm),
            k_norm=self.norm(at + "k_norm", norm),
            sinks=self.optional(at + "sinks.weight"),
            out=self.tensor(at + "out.weight"),
            out_bias=self.once(at + "out.bias"),
        )

    def latent(self, attention: Attention, at: str) -> LatentWeights:
        latent = attention.latent
        assert latent is not None
        direct = latent.query_rank is None
        return LatentWeights(
            q_down=self.optional(at + "q_down.weight"),
            q_norm=None if direct else self.norm(at + "q_norm", latent.norm),
            q=self.tensor(at + ("q.weight" if direct else "q_up.weight")),
            latent=self.tensor(at + "latent.weight"),
            latent_norm=self.norm(at + "latent_norm", latent.norm),
            up_keys=self.tensor(at + "up_keys.weight"),
            up_values=self.tensor(at + "up_values.weight"),
            out=self.tensor(at + "out.weight"),
            out_bias=self.once(at + "out.bias"),
        )

    def mlp(self, at: str) -> MlpWeights:
        return MlpWeights(
            gate_up=self.tensor(at + "gate_up.weight"),
            gate_up_bias=self.optional(at + "gate_up.bias"),
            down=self.tensor(at + "down.weight"),
            down_bias=self.once(at + "down.bias"),
        )

    def experts(self, experts: Experts, at: str) -> ExpertsWeights:
        return ExpertsWeights(
            router=self.tensor(at + "router.weight"),
            router_bias=self.optional(at + "router.bias"),
            selection_bias=self.optional(at + "router.selection_bias"),
            stacks=self.mlp(at + "experts."),
            shared=None if experts.shared is None else self.mlp(at + "shared."),
            shared_gate=self.optional(at + "shared_gate.weight"),
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


def _opened(snapshot: Snapshot, tp: int, rank: int) -> Find:
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
    return lambda expected: gathered(snapshot, [expected])[expected.name]
