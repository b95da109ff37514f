"""The one decoder: runs any spec over any backend, touching tensors only through kernels.ops.

Knows how a decoder's parts follow one another, and how many KV blocks fit into the memory given.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fgsnap.errors import HostError, UsageError
from fgsnap.kernels.choose import Choice, choose, settled_device
from fgsnap.kernels.ops import (
    ActivationArgs,
    AlibiArgs,
    AttentionArgs,
    Batch,
    ExpertsArgs,
    HeadArgs,
    LatentArgs,
    NormArgs,
    Ops,
    QkNormArgs,
    RouterArgs,
    Samples,
    Sampling,
    TemperatureArgs,
    Tensor,
)
from fgsnap.layout import Cut, head_cut, kv_head_cut, padded_vocabulary
from fgsnap.runtime import memory
from fgsnap.runtime.weights import (
    AttentionWeights,
    ExpertsWeights,
    LatentWeights,
    LayerWeights,
    MlpWeights,
    Weights,
    load,
)
from fgsnap.snapshot import Snapshot
from fgsnap.spec import (
    DTYPE_BYTES,
    Alibi,
    Attention,
    DecoderSpec,
    Experts,
    Latent,
    Layer,
    Mlp,
    QueryTemperature,
    Router,
    alibi_slopes,
    features,
    rope_frequencies,
)

if TYPE_CHECKING:
    from fgsnap.kernels.ranks import Ranks

DEFAULT_BLOCK_SIZE = 16
DEFAULT_KV_MEMORY = 2 << 30  # or half of what is left beside the weights where that is less


class Sizes(NamedTuple):
    """What all tensor parallel ranks must have alike, as rank 0 settles it: see Decoder."""

    blocks: int
    block_size: int
    max_length: int


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
        self._attention = [_attention_args(layer.attention, ops, tp, rank) for layer in self._layers]
        self._ropes = [ops.rope(*rope_frequencies(rope, max_length)) for rope in spec.ropes]
        self._caches = [_cache(ops, args, blocks, block_size) for args in self._attention]
        # transformers rounds it to the dtype that a model is loaded in, whatever its checkpoint stores: a model of
        # bfloat16 weights that is loaded in float32 has the exact scale there.
        self._scale = _rounded(spec.embedding.scale, dtype if spec.embedding.round_scale else "float32")
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

    def sample(self, logits: Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
        """Pick one token a row of ``logits``, for ``positions`` of their sequences."""
        return self.ops.sample(logits, how, positions)

    def _compute(self, plan: Tensor) -> Tensor:
        """The ops of one forward: nothing here may depend on the batch but by ``plan``, see Ops.taped."""
        ops, weights = self.ops, self.weights
        x = self._embed(plan)
        for index, layer_weights in enumerate(weights.layers):
            x = self._layer(x, index, layer_weights, plan)
        x = self._norm(x, weights.final_norm)
        if weights.project_out is not None:
            x = ops.linear(x, weights.project_out)
        return ops.gather(ops.logits(x, plan, self._head), self.vocab_size)

    def _embed(self, plan: Tensor) -> Tensor:
        ops, weights = self.ops, self.weights
        x = ops.all_reduce(ops.embed(plan, weights.embed, self._scale, self._first_token))
        if weights.project_in is not None:
            x = ops.linear(x, weights.project_in)
        if weights.positions is not None:
            x = ops.add(x, ops.positions(plan, weights.positions, self.spec.embedding.position_offset))
        return x

    def _layer(self, x: Tensor, index: int, weights: LayerWeights, plan: Tensor) -> Tensor:
        ops, layer = self.ops, self._layers[index]
        multiplier = layer.residual_multiplier
        if layer.residual == "parallel":
            normed = self._norm(x, weights.attn_in)
            attended = self._norm(self._attend(normed, index, weights, plan), weights.attn_out)
            into_mlp = normed if weights.mlp_in is None else self._norm(x, weights.mlp_in)
            passed = self._norm(self._feed_forward(into_mlp, layer, weights), weights.mlp_out)
            return ops.add(ops.add(x, attended, multiplier), passed, multiplier)
        if layer.residual == "post":
            x = self._norm(ops.add(x, self._attend(x, index, weights, plan), multiplier), weights.attn_out)
            return self._norm(ops.add(x, self._feed_forward(x, layer, weights), multiplier), weights.mlp_out)
        attended = self._attend(self._norm(x, weights.attn_in), index, weights, plan)
        x = ops.add(x, self._norm(attended, weights.attn_out), multiplier)
        passed = self._feed_forward(self._norm(x, weights.mlp_in), layer, weights)
        return ops.add(x, self._norm(passed, weights.mlp_out), multiplier)

    def _norm(self, x: Tensor, args: NormArgs | None) -> Tensor:
        return x if args is None else self.ops.norm(x, args)

    def _attend(self, x: Tensor, index: int, weights: LayerWeights, plan: Tensor) -> Tensor:
        args, own = self._attention[index], weights.attention
        chosen = self._layers[index].attention.rope
        rope = None if chosen is None else self._ropes[chosen]
        if isinstance(own, LatentWeights):
            assert isinstance(args, LatentArgs)
            heads = self._latent_heads(x, self._caches[index], own, args, rope, plan)
        else:
            assert isinstance(args, AttentionArgs)
            heads = self._heads(x, index, own, args, rope, plan)
        return self.ops.all_reduce(self.ops.linear(heads, own.out, own.out_bias))

    def _heads(
        self, x: Tensor, index: int, weights: AttentionWeights, args: AttentionArgs, rope: Tensor | None, plan: Tensor
    ) -> Tensor:
        ops, cache, norm = self.ops, self._caches[index], self._layers[index].attention.qk_norm
        qkv = ops.linear(x, weights.qkv, weights.qkv_bias)
        args = args._replace(sinks=weights.sinks)
        if norm is not None:
            assert weights.q_norm is not None and weights.k_norm is not None
            if norm.scope == "projection":
                heads = self._layers[index].attention.heads
                qkv = ops.norm_heads(qkv, args, weights.q_norm, weights.k_norm, heads)
            else:
                args = args._replace(qk_norm=QkNormArgs(weights.q_norm, weights.k_norm, norm.after_rope))
        return ops.attend(ops.append(qkv, cache, plan, args, rope), cache, plan, args)

    def _latent_heads(
        self, x: Tensor, cache: Tensor, weights: LatentWeights, args: LatentArgs, rope: Tensor | None, plan: Tensor
    ) -> Tensor:
        ops = self.ops
        assert weights.latent_norm is not None
        args = args._replace(norm=weights.latent_norm, up_keys=weights.up_keys, up_values=weights.up_values)
        latent = ops.linear(x, weights.latent)
        into = x if weights.q_down is None else self._norm(ops.linear(x, weights.q_down), weights.q_norm)
        q = ops.latent_append(ops.linear(into, weights.q), latent, cache, plan, args, rope)
        return ops.latent_attend(q, cache, plan, args)

    def _feed_forward(self, x: Tensor, layer: Layer, weights: LayerWeights) -> Tensor:
        if layer.experts is not None:
            assert weights.experts is not None
            return self.ops.all_reduce(self._experts(x, layer.experts, weights.experts))
        assert layer.mlp is not None and weights.mlp is not None
        return self.ops.all_reduce(self._mlp(x, layer.mlp, weights.mlp))

    def _mlp(self, x: Tensor, mlp: Mlp, weights: MlpWeights) -> Tensor:
        inner = self.ops.linear(x, weights.gate_up, weights.gate_up_bias)
        return self.ops.linear(self.ops.activate(inner, _activation(mlp)), weights.down, weights.down_bias)

    def _experts(self, x: Tensor, experts: Experts, weights: ExpertsWeights) -> Tensor:
        ops, stacks = self.ops, weights.stacks
        args = ExpertsArgs(*stacks, _activation(experts.mlp), experts.router.weigh_input)
        branch = ops.experts(x, _router_args(experts.router, weights), args)
        if experts.shared is None:
            return branch
        assert weights.shared is not None
        shared = self._mlp(x, experts.shared.mlp, weights.shared)
        if weights.shared_gate is not None:
            shared = ops.gate(shared, x, weights.shared_gate)
        return ops.add(branch, shared)


def _activation(mlp: Mlp) -> ActivationArgs:
    return ActivationArgs(mlp.activation, mlp.gated, mlp.clamp)


def _router_args(router: Router, weights: ExpertsWeights) -> RouterArgs:
    return RouterArgs(
        weights.router,
        weights.router_bias,
        weights.selection_bias,
        router.score,
        router.top_k,
        router.select_first,
        router.groups,
        router.kept_groups,
        router.group_rank,
        router.renormalize,
        router.scale,
    )


def _attention_args(attention: Attention, ops: Ops, tp: int, rank: int) -> AttentionArgs | LatentArgs:
    """One rank's share of a layer's heads; what is bound layer by layer comes with the layer."""
    heads = head_cut(attention, tp, rank)
    if attention.latent is not None:
        return _latent_args(attention, attention.latent, heads.size)
    return AttentionArgs(
        heads.size,
        kv_head_cut(attention, tp, rank).size,
        attention.head_dim,
        attention.scale,
        window=attention.window,
        chunk=attention.chunk,
        softcap=attention.softcap,
        alibi=None if attention.alibi is None else _alibi_args(attention, attention.alibi, heads, ops),
        temperature=_temperature_args(attention.query_temperature),
    )


def _latent_args(attention: Attention, latent: Latent, heads: int) -> LatentArgs:
    return LatentArgs(
        heads=heads,
        nope_dim=attention.head_dim - latent.rope_dim,
        rope_dim=latent.rope_dim,
        value_dim=attention.value_width,
        kv_rank=latent.kv_rank,
        scale=attention.scale,
        norm=NormArgs(latent.norm.kind, latent.norm.eps, None, None),
        up_keys=None,
        up_values=None,
    )


def _alibi_args(attention: Attention, alibi: Alibi, heads: Cut, ops: Ops) -> AlibiArgs:
    slopes = alibi_slopes(attention.heads)[heads.start : heads.stop] + [0.0] * heads.padding
    if alibi.bfloat16:
        slopes = [_rounded(slope, "bfloat16") for slope in slopes]
    data = memoryview(array("f", slopes)).cast("B").toreadonly()
    scale = attention.scale if alibi.scaled else 1.0
    return AlibiArgs(ops.weight(data, "float32", (len(slopes),)), scale, alibi.bfloat16)


def _cache(ops: Ops, args: AttentionArgs | LatentArgs, blocks: int, block_size: int) -> Tensor:
    if isinstance(args, LatentArgs):
        return ops.latent_cache(blocks, block_size, args)
    return ops.kv_cache(blocks, block_size, args.kv_heads, args.head_dim)


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
    sizes: Callable[[], Sizes] | None = None,
    announce: Callable[[Sizes | Batch], None] | None = None,
) -> Decoder:
    """A decoder over ``snapshot``, with as many KV blocks as fit into ``kv_memory`` bytes, or exactly ``blocks``.

    ``kv_memory`` None is DEFAULT_KV_MEMORY, or half of what a CPU's host has available when that is less.

    ``dtype`` "auto" computes in the dtype that the snapshot stores, float16 on a CPU in float32. ``max_length`` None is
    the model's own limit, or what the KV cache can hold when that is less. ``ranks`` is the part that this process has
    in a tensor parallel group, None: all of it; ``kv_memory`` and the defaults are for the whole group. ``announce`` is
    told of the sizes as soon as they are settled, and of every batch before it is computed; another rank than 0 has
    ``sizes`` instead, which waits until it is told them.

    Raises:
        HostError: the backend or the memory is not to be had.
        UsageError: a longer context than the model has, or an unknown choice.
        UnsupportedModel, SnapshotRefused: see choose and weights.load.
    """
    spec = snapshot.manifest.spec
    device = settled_device(backend, device)
    computed = _settled_dtype(snapshot, dtype, device)
    ops, choices = choose(backend, device, features(spec), computed, threads, ranks)
    rank, tp = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    if sizes is not None:
        settled = sizes()
    else:
        block_bytes = tp * _block_bytes(spec, ops, block_size, tp)
        if blocks is None:
            blocks = _settled_memory(kv_memory, _weight_bytes(snapshot), ops.device) // block_bytes
        settled = Sizes(blocks, block_size, _settled_length(spec, max_length, blocks, block_size, block_bytes))
    if announce is not None:
        announce(settled)
    weights = load(snapshot, ops, tp, rank)
    return Decoder(
        spec,
        weights,
        ops,
        blocks=settled.blocks,
        block_size=settled.block_size,
        max_length=settled.max_length,
        dtype=computed,
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
    layers = [_attention_args(spec.layer(index).attention, ops, tp, 0) for index in range(spec.depth)]
    return sum(
        ops.latent_block_bytes(block_size, args)
        if isinstance(args, LatentArgs)
        else ops.kv_block_bytes(block_size, args.kv_heads, args.head_dim)
        for args in layers
    )


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
