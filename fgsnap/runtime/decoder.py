"""The one decoder: runs any spec over any backend, touching tensors only through kernels.ops.

Knows how a decoder's parts follow one another, and how many KV blocks fit into the memory given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fgsnap.errors import HostError, UsageError
from fgsnap.kernels.choose import Choice, choose, settled_device
from fgsnap.kernels.ops import (
    ActivationArgs,
    AttentionArgs,
    Batch,
    HeadArgs,
    NormArgs,
    Ops,
    Sampled,
    Sampling,
    TemperatureArgs,
    Tensor,
)
from fgsnap.layout import padded_vocabulary
from fgsnap.runtime import memory
from fgsnap.runtime.weights import LayerWeights, Weights, load
from fgsnap.snapshot import Snapshot
from fgsnap.spec import DTYPE_BYTES, DecoderSpec, Layer, QueryTemperature, features, rope_frequencies

if TYPE_CHECKING:
    from fgsnap.kernels.ranks import Ranks

DEFAULT_BLOCK_SIZE = 16
DEFAULT_KV_MEMORY = 2 << 30  # or half of what is left beside the weights where that is less


class Decoder:
    """A model ready to run: weights bound, KV cache reserved.

    Args:
        spec: what to compute.
        weights: the tensors to compute with.
        ops: the backend, on which the weights live.
        blocks: KV blocks in the cache.
        block_size: tokens a KV block holds.
        max_length: the longest sequence in tokens; some rotations choose their table by it.
        dtype: of activations and KV cache, as ``ops`` was made for.
        choices: which backend computes which op, for display.
        tp: the tensor parallel degree.
        rank: which of the ``tp`` parts ``weights`` are.
        announce: told of every batch before it is computed, for the other ranks must compute it too.
        check: called after every forward; raises when what was computed with cannot be believed.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        ops: Ops,
        *,
        blocks: int,
        block_size: int,
        max_length: int,
        dtype: str,
        choices: Sequence[Choice] = (),
        tp: int = 1,
        rank: int = 0,
        announce: Callable[[Batch], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.blocks = blocks
        self.block_size = block_size
        self.max_length = max_length
        self.dtype = dtype
        self.vocab_size = spec.vocab_size
        self.choices = tuple(choices)
        self.tp = tp
        self._announce = announce
        self._check = check
        self._layers = [spec.layer(index) for index in range(spec.depth)]
        self._attention = [_attention_args(layer, tp) for layer in self._layers]
        self._ropes = [ops.rope(*rope_frequencies(rope, max_length)) for rope in spec.ropes]
        self._caches = [ops.kv_cache(blocks, block_size, args.kv_heads, args.head_dim) for args in self._attention]
        self._scale = _rounded(spec.embedding.scale, weights.embed_dtype if spec.embedding.round_scale else "float32")
        self._vocabulary = padded_vocabulary(spec.vocab_size, tp) // tp  # rows of this rank
        self._first_token = rank * self._vocabulary
        columns = spec.vocab_size if tp == 1 else self._vocabulary
        self._head = HeadArgs(weights.head, weights.head_bias, columns, spec.head.multiplier, spec.head.softcap)
        self._forward = ops.taped(self._compute, block_size)

    @property
    def setting(self) -> str:
        """What it computes with, for display."""
        ranks = f" in each of {self.tp} ranks" if self.tp > 1 else ""
        return f"{self.dtype}, {self.ops.setting}{ranks}"

    def forward(self, batch: Batch) -> Tensor:
        """Run one ragged batch, write its keys and values into the cache, and return the logits of ``batch.rows``."""
        if self._announce is not None:
            self._announce(batch)
        logits = self._forward(batch)
        self._check()
        return logits

    def sample(self, logits: Tensor, how: Sequence[Sampling]) -> list[Sampled]:
        """Pick one token a row of ``logits``."""
        return self.ops.sample(logits, how)

    def _compute(self, plan: Tensor) -> Tensor:
        """The ops of one forward: nothing here may depend on the batch but by ``plan``, see Ops.taped."""
        ops, weights = self.ops, self.weights
        x = ops.all_reduce(ops.embed(plan, weights.embed, self._scale, first=self._first_token))
        for index, layer_weights in enumerate(weights.layers):
            x = self._layer(x, index, layer_weights, plan)
        return ops.gather(ops.logits(self._norm(x, weights.final_norm), plan, self._head), self.vocab_size)

    def _layer(self, x: Tensor, index: int, weights: LayerWeights, plan: Tensor) -> Tensor:
        ops, layer = self.ops, self._layers[index]
        multiplier = layer.residual_multiplier
        if layer.residual == "parallel":
            normed = self._norm(x, weights.attn_in)
            attended = self._norm(self._attend(normed, index, weights, plan), weights.attn_out)
            into_mlp = normed if weights.mlp_in is None else self._norm(x, weights.mlp_in)
            passed = self._norm(self._mlp(into_mlp, layer, weights), weights.mlp_out)
            return ops.add(ops.add(x, attended, multiplier), passed, multiplier)
        if layer.residual == "post":
            x = self._norm(ops.add(x, self._attend(x, index, weights, plan), multiplier), weights.attn_out)
            return self._norm(ops.add(x, self._mlp(x, layer, weights), multiplier), weights.mlp_out)
        attended = self._attend(self._norm(x, weights.attn_in), index, weights, plan)
        x = ops.add(x, self._norm(attended, weights.attn_out), multiplier)
        passed = self._mlp(self._norm(x, weights.mlp_in), layer, weights)
        return ops.add(x, self._norm(passed, weights.mlp_out), multiplier)

    def _norm(self, x: Tensor, args: NormArgs | None) -> Tensor:
        return x if args is None else self.ops.norm(x, args)

    def _attend(self, x: Tensor, index: int, weights: LayerWeights, plan: Tensor) -> Tensor:
        ops, args, cache = self.ops, self._attention[index], self._caches[index]
        chosen = self._layers[index].attention.rope
        rope = None if chosen is None else self._ropes[chosen]
        qkv = ops.linear(x, weights.qkv, weights.qkv_bias)
        q = ops.append(qkv, cache, plan, args, rope)
        return ops.all_reduce(ops.linear(ops.attend(q, cache, plan, args), weights.out, weights.out_bias))

    def _mlp(self, x: Tensor, layer: Layer, weights: LayerWeights) -> Tensor:
        assert layer.mlp is not None, "layout refuses layers without an MLP"
        inner = self.ops.linear(x, weights.gate_up, weights.gate_up_bias)
        inner = self.ops.activate(inner, ActivationArgs(layer.mlp.activation, layer.mlp.gated, layer.mlp.clamp))
        return self.ops.all_reduce(self.ops.linear(inner, weights.down, weights.down_bias))


def _attention_args(layer: Layer, tp: int) -> AttentionArgs:
    """One rank's share of a layer's heads; with more ranks than key heads, several ranks hold the same one."""
    attention = layer.attention
    return AttentionArgs(
        attention.heads // tp,
        max(1, attention.kv_heads // tp),
        attention.head_dim,
        attention.scale,
        window=attention.window,
        chunk=attention.chunk,
        softcap=attention.softcap,
        temperature=_temperature_args(attention.query_temperature),
    )


def _temperature_args(temperature: QueryTemperature | None) -> TemperatureArgs | None:
    return None if temperature is None else TemperatureArgs(temperature.kind, temperature.base, temperature.scale)


def _rounded(value: float, dtype: str) -> float:
    """``value`` as the nearest number of ``dtype``, ties to even."""
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def load_decoder(
    snapshot: Snapshot,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    kv_memory: int | None = None,
    blocks: int | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    max_length: int | None = None,
    threads: int | None = None,
    ranks: Ranks | None = None,
    announce: Callable[[Batch], None] | None = None,
) -> Decoder:
    """A decoder over ``snapshot``, with as many KV blocks as fit into ``kv_memory`` bytes, or exactly ``blocks``.

    ``kv_memory`` None is DEFAULT_KV_MEMORY, or half of what a CPU's host has available when that is less.

    ``dtype`` "auto" computes in the dtype that the snapshot stores, float16 on a CPU in float32. ``max_length`` None is
    the model's own limit, or what the KV cache can hold when that is less. ``ranks`` is the part that this process has
    in a tensor parallel group, None: all of it; ``kv_memory`` and the defaults are for the whole group.

    Raises:
        HostError: the backend or the memory is not to be had.
        UsageError: a longer context than the model has, or an unknown choice.
        UnsupportedModel, SnapshotRefused: see choose and weights.load.
    """
    spec = snapshot.manifest.spec
    device = settled_device(backend, device)
    settled = _settled_dtype(snapshot, dtype, device)
    ops, choices = choose(backend, device, features(spec), settled, threads, ranks)
    rank, tp = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    block_bytes = tp * _block_bytes(spec, ops, block_size, tp)
    if blocks is None:
        blocks = _settled_memory(kv_memory, _weight_bytes(snapshot), ops.device) // block_bytes
    length = _settled_length(spec, max_length, blocks, block_size, block_bytes)
    weights = load(snapshot, ops, tp, rank)
    return Decoder(
        spec,
        weights,
        ops,
        blocks=blocks,
        block_size=block_size,
        max_length=length,
        dtype=settled,
        choices=choices,
        tp=tp,
        rank=rank,
        announce=announce,
        check=snapshot.check_unchanged,
    )


def _settled_dtype(snapshot: Snapshot, dtype: str, device: str) -> str:
    if dtype == "auto":
        stored = next(entry.dtype for entry in snapshot.manifest.tensors if entry.name == "embed.weight")
        # No CPU computes in float16 natively, and bfloat16 would drop bits that the checkpoint has.
        return "float32" if stored == "float16" and device == "cpu" else stored
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"There is no dtype {dtype!r}.", "", f"Choose one of auto, {', '.join(DTYPE_BYTES)}.")
    return dtype


def _block_bytes(spec: DecoderSpec, ops: Ops, block_size: int, tp: int) -> int:
    """What one KV block takes in one rank's caches of all layers."""
    layers = [_attention_args(spec.layer(index), tp) for index in range(spec.depth)]
    return sum(ops.kv_block_bytes(block_size, args.kv_heads, args.head_dim) for args in layers)


def _weight_bytes(snapshot: Snapshot) -> int:
    return sum(entry.bytes for entry in snapshot.manifest.files.values() if entry.chunks is not None)


def _settled_memory(asked: int | None, weights: int, device: str) -> int:
    """Bytes for the KV cache: what is asked for, or what is reasonable beside ``weights`` bytes of weights."""
    there = memory.available(weights) if device == "cpu" else None
    if there is None:
        return DEFAULT_KV_MEMORY if asked is None else asked
    if there == 0:
        raise HostError(
            "There is no memory for a KV cache.",
            f"The weights take {weights >> 20} MiB, and what this process may have leaves nothing beside them.",
            "Use a host with more memory, or raise the limit on this process (ulimit -v) or its control group.",
        )
    if asked is None:
        return min(DEFAULT_KV_MEMORY, there // 2)
    if asked > there:
        raise HostError(
            f"A KV cache of {asked >> 20} MiB does not fit into this host's memory.",
            f"Beside {weights >> 20} MiB of weights, {there >> 20} MiB are available to this process.",
            "Lower --kv-memory, or leave it out.",
        )
    return asked


def _settled_length(spec: DecoderSpec, asked: int | None, blocks: int, block_size: int, block_bytes: int) -> int:
    # Dynamic NTK is there to go beyond the trained length; no other rotation stretches with the deployment.
    stretches = any(rope.dynamic is not None for rope in spec.ropes)
    if asked is not None and asked > spec.max_length and not stretches:
        raise UsageError(
            f"A context of {asked} tokens is longer than this model has.",
            f"Its positions end at {spec.max_length}.",
            f"Use --max-model-len {spec.max_length} or less.",
        )
    wanted, cached = spec.max_length if asked is None else asked, blocks * block_size
    if cached < (1 if asked is None else wanted):
        needed = -(-wanted // block_size)
        raise HostError(
            f"The KV cache holds {cached} tokens, fewer than one sequence of {wanted} needs.",
            f"A block of {block_size} tokens takes {block_bytes} bytes; {needed} blocks take {needed * block_bytes}.",
            "Give more with --kv-memory, or ask for less with --max-model-len.",
        )
    return min(wanted, cached)
