"""The C++ backend: ops as records, executed a whole step at a time.

It imports neither torch nor numpy. Weights stay where they are mapped. An op checks its sizes, writes a record
(``csrc/program.h``) and returns at once. Records name activations by register and say nothing of how many tokens there
are: what ``taped`` has recorded once serves every batch with one call a step. Ops that are called one by one run
together when somebody needs results: at ``sample``, ``top_two``, ``score`` and ``floats``.

With the dtype bfloat16, on processors that multiply it themselves, what goes into a matrix product is rounded to
bfloat16; everything else, the residual stream included, is float32.

An instance belongs to one thread, and to one process: load it after a fork, never before.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
import sys
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from fgsnap.errors import HostError
from fgsnap.kernels.library import address, available, default_threads, instruction_sets, load, named_sets
from fgsnap.kernels.native_sampling import Packer, Way, Ways
from fgsnap.kernels.ops import (
    ActivationArgs,
    AttentionArgs,
    Batch,
    ExpertsArgs,
    HeadArgs,
    LatentArgs,
    NormArgs,
    RouterArgs,
    Sampled,
    Samples,
    Sampling,
)
from fgsnap.kernels.ranks import RankLost, Ranks, anonymous_memory
from fgsnap.kernels.tape import (
    BF16,
    F16,
    F32,
    NO_PLAN,
    NOTHING,
    ROWS,
    TOKENS,
    Activation,
    Arena,
    Cache,
    Plan,
    Pool,
    Rotation,
    Tape,
    Weight,
    address_of,
    misuse,
)

__all__ = ["DTYPES", "SUPPORTS", "Native", "available", "default_threads", "instruction_sets"]

DTYPES = ("bfloat16", "float16", "float32")  # what --dtype may ask for: the KV cache's
PANEL = 32  # rows of a packed matrix that lie together
GROUP = 16  # slots of a KV block whose keys lie together
SCORED = 32  # rows of logits that are held at once to score a prompt

_TYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
_ITEM = (4, 2, 2)
_NORMS = {"rms": 0, "ln": 1, "l2": 2}
_ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "clamped_swiglu": 5}
_TEMPERATURES = {"logn": 1, "step": 2}
(
    _EMBED, _NORM, _ADD, _LINEAR, _SELECT, _ROPE, _APPEND, _ATTEND, _ACTIVATE, _GATE, _LATENT, _ROTATE, _ROUTE, _ASSIGN,
    _EXPERT_UP, _EXPERT_DOWN, _REDUCE, _GATHER, _SQUARES,
) = range(19)  # fmt: skip
_BROKEN = Sampled(-1)
_ALONE = (-1, 0, 0, 0)  # a norm of a vector that no other rank has a part of

SUPPORTS = frozenset(
    """
    attention.rope attention.window attention.chunk attention.softcap attention.query_temperature attention.qkv_bias
    attention.out_bias query_temperature.logn query_temperature.step query_temperature.scale
    layer.attn_in layer.attn_out layer.mlp_in layer.mlp_out layer.sequential layer.parallel layer.post
    layer.residual_multiplier
    mlp.silu mlp.gelu mlp.gelu_tanh mlp.relu mlp.clamped_swiglu mlp.clamp mlp.bias mlp.down_bias mlp.gated
    norm.rms norm.ln norm.l2 norm.weight norm.bias norm.unit_offset norm.float32_weight
    embedding.scale embedding.round_scale head.tied head.bias head.multiplier head.softcap
    attention.alibi alibi.scaled alibi.bfloat16 attention.sinks attention.qk_norm attention.value_dim attention.latent
    qk_norm.norm qk_norm.head qk_norm.projection qk_norm.after_rope latent.norm latent.query_rank
    layer.experts experts.router experts.shared shared.gated_by_input router.softmax router.sigmoid router.select_first
    router.bias router.selection_bias router.groups router.kept_groups router.max router.top2_sum router.renormalize
    router.scale router.weigh_input dynamic.powers_of_two embedding.learned_positions embedding.position_offset
    rope.linear rope.dynamic rope.llama3 rope.yarn rope.longrope rope.proportional_head_dim
    linear.factor yarn.beta_fast yarn.beta_slow yarn.truncate
    """.split()
)


# --- the backend ------------------------------------------------------------------------------------------------------


class Native:
    """ops.Ops in C++ on this machine's processors.

    Args:
        dtype: of the KV cache, one of DTYPES, and what may be rounded to on the way.
        threads: how many; None: default_threads().
        instructions: one of instruction_sets(); None: the best.
        ranks: which tensor parallel rank this is; None: the only one.
    """

    name = "native"
    device = "cpu"
    supports = SUPPORTS

    def __init__(
        self,
        dtype: str = "bfloat16",
        threads: int | None = None,
        instructions: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        library, reason = load()
        if library is None:
            next_step = "Install a C++ compiler and then fgsnap again, or use --backend reference."
            raise HostError("The native backend cannot be used.", reason, next_step)
        if dtype not in DTYPES:
            raise misuse("native", f"KV cache of {dtype}; it has {', '.join(DTYPES)}")
        self.dtype = dtype
        self.threads = threads or default_threads()
        self.instructions = instructions or named_sets(library)[0]
        self.setting = f"{self.instructions} instructions, {self.threads} thread{'s' * (self.threads > 1)}"
        handle = library.fgsnap_open(self.threads, self.instructions.encode())
        if not handle:
            raise HostError(
                "The native backend cannot start.",
                f"It asked for {self.threads} threads and {self.instructions} instructions.",
                "Lower --threads or OMP_NUM_THREADS, or raise the limit on processes (ulimit -u).",
            )
        dots = library.fgsnap_dots(self.instructions.encode()) == 1
        self._factor = BF16 if dots and dtype == "bfloat16" else F32  # of what goes into matrix products
        self._library = library
        self._handle = handle
        self._ranks = ranks
        if ranks is not None:
            assert ranks.memory is not None, "choose sees to it"
            library.fgsnap_join(handle, address(memoryview(ranks.memory)), len(ranks.memory), ranks.rank, ranks.size)
        self._pool = Pool()
        self._tape = Tape(self._pool)
        self._packer = Packer()
        self._plan: Plan | None = None  # of the records on the tape
        self._arena = mmap.mmap(-1, mmap.PAGESIZE)
        self._close = weakref.finalize(self, library.fgsnap_close, handle)
        self._close.atexit = False  # the threads die with the process; nobody waits for them

    def close(self) -> None:
        """End the threads. Nothing may be asked of the backend afterwards."""
        self._close()

    # tensors

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int], layout: str = "row") -> Weight:
        if dtype not in _TYPES:
            raise misuse("weight", f"dtype {dtype}; native has {', '.join(_TYPES)}")
        if layout not in ("row", "words32"):
            raise misuse("weight", f"layout {layout}; native reads row and words32")
        item, packed = _ITEM[_TYPES[dtype]], layout == "words32"
        rows, columns = math.prod(shape[:-1]), shape[-1]
        ragged = len(shape) > 2 and shape[-2] % (2 * PANEL) != 0
        if packed and (len(shape) < 2 or ragged or columns * item % 4 != 0):
            raise misuse("weight", f"{dtype} {list(shape)} cannot be packed")
        expected = (_up(rows, PANEL) if packed else rows) * columns * item
        if data.nbytes != expected or not data.c_contiguous:
            found = f"{data.nbytes} {'' if data.c_contiguous else 'scattered '}bytes"
            raise misuse("weight", f"{found} for {layout} {dtype} {list(shape)}, which takes {expected}")
        return Weight(address(data), _TYPES[dtype], tuple(shape), packed, data)

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> Rotation:
        return Rotation(inverse_frequencies, factor)

    def kv_cache(self, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> Cache:
        return self._cache(blocks, block_size, kv_heads, head_dim, head_dim)

    def kv_block_bytes(self, block_size: int, kv_heads: int, head_dim: int) -> int:
        return sum(self._cache_bytes(block_size, kv_heads, head_dim, head_dim))

    def latent_cache(self, blocks: int, block_size: int, args: LatentArgs) -> Cache:
        return self._cache(blocks, block_size, 1, args.kv_rank + args.rope_dim, args.kv_rank)

    def latent_block_bytes(self, block_size: int, args: LatentArgs) -> int:
        return sum(self._cache_bytes(block_size, 1, args.kv_rank + args.rope_dim, args.kv_rank))

    def _cache_bytes(self, block_size: int, kv_heads: int, head_dim: int, value_dim: int) -> tuple[int, int]:
        """What a block's keys and its values take, in the layout that csrc/program.h gives."""
        word = 4 // _ITEM[_TYPES[self.dtype]]
        keys = kv_heads * _up(block_size, GROUP) * _up(head_dim, word) * 4 // word
        values = kv_heads * _up(block_size, word) // word * _up(value_dim, GROUP) * 4
        return keys, values

    def _cache(self, blocks: int, block_size: int, kv_heads: int, head_dim: int, value_dim: int) -> Cache:
        sizes = (blocks, block_size, kv_heads, head_dim, value_dim)
        if min(sizes) <= 0:
            raise misuse("kv_cache", f"sizes {sizes} must be positive")
        keys, values = self._cache_bytes(block_size, kv_heads, head_dim, value_dim)
        total = blocks * (keys + values)
        try:
            data = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise HostError(
                f"{total} bytes of KV cache for one layer cannot be had.", str(error), "Lower --kv-memory."
            ) from error
        at = address(memoryview(data))
        words = (at, at + blocks * keys, _TYPES[self.dtype], block_size, kv_heads, head_dim, value_dim)
        return Cache(*sizes, words, data)

    def plan(self, batch: Batch, block_size: int) -> Plan:
        return Plan.of(batch, block_size, self._library.fgsnap_plan)

    # ops

    def embed(self, plan: Plan, table: Weight, scale: float, first: int = 0) -> Activation:
        return self._embed("embed", plan, table, first, scale)

    def positions(self, plan: Plan, table: Weight, offset: int) -> Activation:
        tape = self._on(plan)
        tape.positions = min(tape.positions, table.shape[0] - offset)
        _check_reach("positions", tape, plan)
        return self._embed("positions", plan, table, -offset, by_position=True)

    def _embed(
        self, op: str, plan: Plan, table: Weight, first: int, scale: float = 1.0, *, by_position: bool = False
    ) -> Activation:
        if len(table.shape) != 2:
            raise misuse(op, f"a table of shape {list(table.shape)}")
        rows, width = table.shape
        y = self._new(plan, plan.tokens, width, F32)
        words = (_EMBED, y.register, *table.matrix, width, first, rows, _bits(scale), by_position)
        self._on(plan).record(table, words)
        return y

    def norm(self, x: Activation, args: NormArgs) -> Activation:
        y = self._new(x.plan, x.rows, x.columns, self._factor)
        self._norm("norm", x, y, 0, x.columns, args)
        return y

    def norm_heads(
        self, qkv: Activation, args: AttentionArgs, query: NormArgs, key: NormArgs, heads: int
    ) -> Activation:
        queries, keys = args.heads * args.head_dim, args.kv_heads * args.head_dim
        if qkv.columns != queries + 2 * keys:
            raise misuse("norm_heads", f"qkv {_show(qkv)}, expected {queries + 2 * keys} columns")
        parts = ((0, queries, query), (queries, keys, key))
        wholes = [_ALONE, _ALONE]
        if self._ranks is not None:
            sums = self.all_reduce(self._squares(qkv, parts))
            # A key head counts once for each rank that holds it.
            counts = (heads * args.head_dim, self._ranks.size * keys)
            wholes = [(sums.register, sums.columns, column, count) for column, count in enumerate(counts)]
        for (begin, width, norm), whole in zip(parts, wholes, strict=True):
            self._norm("norm_heads", qkv, qkv, begin, width, norm, whole)
        return qkv

    def _squares(self, x: Activation, parts: Sequence[tuple[int, int, NormArgs]]) -> Activation:
        """The sum of the squares of each part [begin, begin + width) of x: [T, parts]."""
        y = self._new(x.plan, x.rows, len(parts), F32)
        for column, (begin, width, norm) in enumerate(parts):
            if norm.kind == "ln":
                raise misuse("norm_heads", "kind ln, of which ranks do not know the mean")
            where = (x.register, x.kind, y.register, width, x.columns, begin)
            self._on(x.plan).record(None, (_SQUARES, *where, len(parts), column))
        return y

    def _norm(
        self,
        op: str,
        x: Activation,
        y: Activation,
        begin: int,
        width: int,
        args: NormArgs,
        whole: tuple[int, int, int, int] = _ALONE,
    ) -> None:
        """``whole``: where all ranks' sum of squares is, and of how many numbers, where the vector is one over all."""
        rule = _norm_words(op, args, width)
        held = (args.weight, args.bias)
        where = (x.register, x.kind, y.register, y.kind, width, x.columns, begin)
        self._on(x.plan).record(held, (_NORM, *where, *rule, *whole))

    def add(self, x: Activation, branch: Activation, multiplier: float = 1.0) -> Activation:
        if x.rows != branch.rows or x.columns != branch.columns:
            raise misuse("add", f"x {_show(x)}, branch {_show(branch)}")
        tape = self._on(x.plan)
        if x.kind == F32 and self._add_to_product(tape, x, branch, multiplier):
            return x
        y = x if x.kind == F32 else self._new(x.plan, x.rows, x.columns, F32)
        where = (x.register, x.kind, branch.register, branch.kind, y.register, x.columns)
        tape.record(None, (_ADD, *where, _bits(multiplier)))
        return y

    def linear(self, x: Activation, weight: Weight, bias: Weight | None = None) -> Activation:
        out = weight.shape[0]
        y = self._new(x.plan, x.rows, out, F32)
        self._linear("linear", x, y, weight, bias, out)
        return y

    def logits(self, x: Activation, plan: Plan, head: HeadArgs) -> Activation:
        if x.rows != plan.tokens:
            raise misuse("logits", f"x {_show(x)} for {plan.tokens} tokens")
        if not 0 < head.vocab_size <= head.weight.shape[0]:
            raise misuse("logits", f"{head.vocab_size} of {head.weight.shape[0]} rows")
        chosen = self._new(plan, plan.rows, x.columns, x.kind)
        self._on(plan).record(None, (_SELECT, x.register, x.kind, chosen.register, x.columns))
        y = self._new(plan, plan.rows, head.vocab_size, F32)
        scaling = (_bits(head.multiplier), _bits(head.softcap or 0.0))
        self._linear("logits", chosen, y, head.weight, head.bias, head.vocab_size, selected=True, scaling=scaling)
        return y

    def _linear(
        self,
        op: str,
        x: Activation,
        y: Activation,
        weight: Weight,
        bias: Weight | None,
        out: int,
        *,
        selected: bool = False,
        scaling: tuple[int, int] | None = None,
    ) -> None:
        shape = weight.shape
        if len(shape) != 2 or shape[1] != x.columns:
            raise misuse(op, f"x {_show(x)}, weight {list(shape)}")
        if bias is not None and bias.shape != shape[:1]:
            raise misuse(op, f"bias {list(bias.shape)}, weight {list(shape)}")
        words = _product(
            x, y, weight, bias or NOTHING, (x.columns, out, 1, x.columns, 0, y.columns, 0), selected, scaling
        )
        self._on(x.plan).record((weight, bias), words)

    def _heads(self, x: Activation, y: Activation, weight: Weight, x_step: int, y_step: int) -> None:
        """y's part of each head = the same of x times the head's own matrix; ``weight`` is [heads, out, in]."""
        heads, out, into = weight.shape
        if weight.packed and out % PANEL != 0:
            raise misuse("latent", f"packed {list(weight.shape)}, of which no head begins a panel")
        sizes = (into, out, heads, x.columns, x_step, y.columns, y_step)
        self._on(x.plan).record(weight, _product(x, y, weight, NOTHING, sizes, False, None))

    def append(
        self, qkv: Activation, cache: Cache, plan: Plan, args: AttentionArgs, rope: Rotation | None
    ) -> Activation:
        width = (args.heads + 2 * args.kv_heads) * args.head_dim
        if qkv.rows != plan.tokens or qkv.columns != width:
            raise misuse("append", f"qkv {_show(qkv)}, expected {[plan.tokens, width]}")
        _check_heads("append", cache, args.heads, args.kv_heads, args.head_dim)
        qkv = self._float32(qkv)
        tape = self._reaching("append", cache, plan)
        rotation = self._rotation("append", plan, rope, args.head_dim)
        q = self._new(plan, plan.tokens, args.heads * args.head_dim, self._factor)
        qk = args.qk_norm
        norms: tuple[int, ...] = (*_NO_NORM, *_NO_NORM)
        if qk is not None:
            norms = (*_norm_words("append", qk.query, args.head_dim), *_norm_words("append", qk.key, args.head_dim))
        flags = (qk is not None, qk is not None and qk.after_rope)
        hot = args.temperature
        temperature = (0, 0, 0) if hot is None else (_TEMPERATURES[hot.kind], hot.base, _bits(hot.scale))
        where = (qkv.register, q.register, q.kind, args.heads)
        tape.record((cache, qk), (_APPEND, *where, *rotation, *flags, *norms, *temperature, *cache.words))
        return q

    def attend(self, q: Activation, cache: Cache, plan: Plan, args: AttentionArgs) -> Activation:
        width = args.heads * args.head_dim
        if q.rows != plan.tokens or q.columns != width:
            raise misuse("attend", f"q {_show(q)}, expected {[plan.tokens, width]}")
        for name, size in (("window", args.window), ("chunk", args.chunk)):
            if size is not None and size <= 0:
                raise misuse("attend", f"{name} {size}")
        _check_heads("attend", cache, args.heads, args.kv_heads, args.head_dim)
        slopes, sinks = (None if args.alibi is None else args.alibi.slopes), args.sinks
        for vector in (slopes, sinks):
            if vector is not None and vector.shape != (args.heads,):
                raise misuse("attend", f"{list(vector.shape)} slopes or sinks for {args.heads} heads")
        if slopes is not None and slopes.kind != F32:
            raise misuse("attend", "slopes must be float32")
        y = self._new(plan, plan.tokens, width, self._factor)
        self._attend(q, cache, plan, y, args)
        return y

    def _attend(self, q: Activation, cache: Cache, plan: Plan, y: Activation, args: AttentionArgs) -> None:
        alibi, sinks = args.alibi, args.sinks or NOTHING
        bias = (0, 0, 0) if alibi is None else (alibi.slopes.at, _bits(alibi.scale), alibi.bfloat16)
        mask = (args.window or 0, args.chunk or 0, _bits(args.scale), _bits(args.softcap or 0.0))
        where = (q.register, q.kind, y.register, y.kind, args.heads)
        tape = self._reaching("attend", cache, plan)
        tape.record((cache, alibi, sinks), (_ATTEND, *where, *mask, *bias, *sinks.vector, *cache.words))

    def latent_append(
        self, q: Activation, latent: Activation, cache: Cache, plan: Plan, args: LatentArgs, rope: Rotation | None
    ) -> Activation:
        head, wide = args.nope_dim + args.rope_dim, args.kv_rank + args.rope_dim
        if q.rows != plan.tokens or q.columns != args.heads * head:
            raise misuse("latent_append", f"q {_show(q)}, expected {[plan.tokens, args.heads * head]}")
        if latent.rows != plan.tokens or latent.columns != wide:
            raise misuse("latent_append", f"latent {_show(latent)}, expected {[plan.tokens, wide]}")
        _check_latent("latent_append", cache, args)
        q, latent = self._float32(q), self._float32(latent)
        tape = self._reaching("latent_append", cache, plan)
        rotation = self._rotation("latent_append", plan, rope, args.rope_dim)
        rule = _norm_words("latent_append", args.norm, args.kv_rank)
        tape.record((cache, args), (_LATENT, latent.register, *rule, *rotation, *cache.words))
        y = self._new(plan, plan.tokens, args.heads * wide, self._factor)
        self._heads(q, y, args.up_keys, head, wide)
        places = (q.columns, head, args.nope_dim, y.columns, wide, args.kv_rank, args.rope_dim)
        self._on(plan).record(None, (_ROTATE, q.register, y.register, y.kind, args.heads, *places, *rotation))
        return y

    def latent_attend(self, q: Activation, cache: Cache, plan: Plan, args: LatentArgs) -> Activation:
        wide = args.kv_rank + args.rope_dim
        if q.rows != plan.tokens or q.columns != args.heads * wide:
            raise misuse("latent_attend", f"q {_show(q)}, expected {[plan.tokens, args.heads * wide]}")
        _check_latent("latent_attend", cache, args)
        mixed = self._new(plan, plan.tokens, args.heads * args.kv_rank, self._factor)
        self._attend(q, cache, plan, mixed, AttentionArgs(args.heads, 1, wide, args.scale))
        y = self._new(plan, plan.tokens, args.heads * args.value_dim, self._factor)
        self._heads(mixed, y, args.up_values, args.kv_rank, args.value_dim)
        return y

    def activate(self, x: Activation, args: ActivationArgs) -> Activation:
        how = _ACTIVATIONS.get(args.kind)
        if how is None or (args.kind == "clamped_swiglu" and not args.gated):
            raise misuse("activate", f"kind {args.kind}; native has {', '.join(_ACTIVATIONS)}, the last one gated")
        if args.gated and x.columns % 2 != 0:
            raise misuse("activate", f"gated x {_show(x)} has an odd width")
        x = self._float32(x)
        inner = x.columns // 2 if args.gated else x.columns
        y = self._new(x.plan, x.rows, inner, self._factor)
        tape = self._on(x.plan)
        if not self._activate_product(tape, x, y, how, args):
            words = (x.register, y.register, y.kind, inner, args.gated, _bits(_cut(args)))
            tape.record(None, (_ACTIVATE, how, *words))
        return y

    def gate(self, branch: Activation, x: Activation, weight: Weight) -> Activation:
        if weight.shape != (1, x.columns) or branch.rows != x.rows or branch.kind != F32:
            raise misuse("gate", f"branch {_show(branch)}, x {_show(x)}, weight {list(weight.shape)}")
        where = (branch.register, x.register, x.kind)
        self._on(x.plan).record(weight, (_GATE, *where, *weight.matrix, x.columns, branch.columns))
        return branch

    def experts(self, x: Activation, router: RouterArgs, args: ExpertsArgs) -> Activation:
        count, inner = _check_experts(x, router, args)
        logits = self.linear(x, router.weight, router.bias)
        tape, plan, bias = self._on(x.plan), x.plan, router.selection_bias or NOTHING
        picks = self._new(plan, x.rows, 2 * router.top_k, F32)
        rules = (router.score == "sigmoid", router.select_first, router.groups, router.kept_groups)
        ranking = (router.group_rank == "top2_sum", router.renormalize, _bits(router.scale))
        where = (logits.register, picks.register, count, router.top_k)
        tape.record((router, bias), (_ROUTE, *where, *rules, *ranking, *bias.vector))
        assigned = self._new(plan, x.rows, router.top_k, F32, extra=4 * (count + 1))
        tape.record(None, (_ASSIGN, picks.register, assigned.register, count, router.top_k))
        middle = self._new(plan, x.rows, router.top_k * _up(inner, 2), self._factor)
        into, how = (picks.register, assigned.register), args.activation
        up_bias, down_bias = args.gate_up_bias or NOTHING, args.down_bias or NOTHING
        up = (count, router.top_k, x.columns, inner, how.gated, _ACTIVATIONS[how.kind], _bits(_cut(how)))
        ends = (x.register, x.kind, middle.register, middle.kind)
        gate_up = (*args.gate_up.matrix, *up_bias.vector)
        tape.record((args, up_bias), (_EXPERT_UP, *ends, *into, *gate_up, *up, args.weigh_input))
        y = self._new(plan, x.rows, x.columns, F32)
        down = (*args.down.matrix, *down_bias.vector, count, router.top_k, inner, x.columns, args.weigh_input)
        tape.record((args, down_bias), (_EXPERT_DOWN, middle.register, middle.kind, y.register, *into, *down))
        return y

    def all_reduce(self, x: Activation) -> Activation:
        if self._ranks is None:
            return x
        x = self._float32(x)
        self._on(x.plan).record(None, (_REDUCE, x.register, x.columns))
        return x

    def gather(self, logits: Activation, vocab_size: int) -> Activation:
        ranks = 1 if self._ranks is None else self._ranks.size
        if not 0 < vocab_size <= ranks * logits.columns:
            raise misuse("gather", f"{vocab_size} tokens of {ranks} times logits {_show(logits)}")
        logits = self._float32(logits)
        if ranks == 1 and logits.columns == vocab_size:
            return logits
        y = self._new(logits.plan, logits.rows, vocab_size, F32)
        self._on(logits.plan).record(None, (_GATHER, logits.register, y.register, logits.columns, vocab_size))
        return y

    # neighbours that are merged

    def _add_to_product(self, tape: Tape, x: Activation, branch: Activation, multiplier: float) -> bool:
        """Let the product that ``branch`` is add itself to ``x``. Only when nothing was recorded since."""
        words, at = tape.words, tape.last
        if not words or words[at] != _LINEAR or words[at + _L_Y] != branch.register or branch.kind != F32:
            return False
        if words[at + _L_ACCUMULATE]:  # then the product is only a part of what ``branch`` is
            return False
        if words[at + _L_X] == x.register or words[at + _L_ACTIVATION] or words[at + _L_MULTIPLIER] != _ONE:
            return False
        words[at + _L_Y], words[at + _L_ACCUMULATE], words[at + _L_MULTIPLIER] = x.register, 1, _bits(multiplier)
        return True

    def _activate_product(self, tape: Tape, x: Activation, y: Activation, how: int, args: ActivationArgs) -> bool:
        """Let the product that ``x`` is end in its activation. Only when nothing was recorded since."""
        words, at = tape.words, tape.last
        if not words or words[at] != _LINEAR or words[at + _L_Y] != x.register or x.kind != F32:
            return False
        if words[at + _L_X] == y.register or words[at + _L_ACCUMULATE] or words[at + _L_ACTIVATION]:
            return False
        if args.gated and words[at + _L_PACKED] and y.columns % PANEL != 0:
            return False
        words[at + _L_Y], words[at + _L_Y + 1] = y.register, y.kind
        words[at + _L_OUT] = words[at + _L_PITCH] = y.columns
        words[at + _L_ACTIVATION], words[at + _L_GATED], words[at + _L_CLAMP] = how, args.gated, _bits(_cut(args))
        return True

    # results

    def score(
        self, x: Activation, plan: Plan, head: HeadArgs, vocab_size: int, targets: Sequence[int], top: int
    ) -> list[Sampled]:
        if len(targets) != plan.rows or not all(0 <= target < vocab_size for target in targets):
            raise misuse("score", f"{len(targets)} targets for {plan.rows} rows of {vocab_size} tokens")
        self._flush()
        found: list[Sampled] = []
        rows = plan.data[-1]
        for first in range(0, plan.rows, SCORED):
            logits = self.gather(self.logits(x, plan.with_rows(rows[first : first + SCORED]), head), vocab_size)
            wanted = array("q", targets[first : first + SCORED])
            ways = Ways([Way(Sampling(logprobs=top, target=target)) for target in wanted])
            scored = self._picked(logits, ways, wanted)  # the positions do not matter
            found += [scored.logprobs.get(row, _BROKEN) for row in range(len(wanted))]
        return found

    def sample(self, logits: Activation, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
        if not len(how) == len(positions) == logits.rows:
            raise misuse("sample", f"{len(how)} ways and {len(positions)} positions for logits {_show(logits)}")
        return self._picked(logits, self._packer.ways(how, logits.columns), array("q", positions))

    def _picked(self, logits: Activation, ways: Ways, positions: array[int]) -> Samples:
        targets = ways.targets
        if targets is not None and max(targets) >= logits.columns:
            raise misuse("sample", f"the target {max(targets)} of {logits.columns} tokens")
        logits = self._float32(logits)
        self._flush()
        rows, top = logits.rows, min(ways.top, logits.columns)
        tokens, logprobs = array("q", bytes(8 * rows)), array("d", bytes(8 * rows))
        top_tokens, top_logprobs = array("q", bytes(8 * rows * top)), array("d", bytes(8 * rows * top))
        code = self._library.fgsnap_sample(
            self._handle,
            self._address(logits),
            rows,
            logits.columns,
            address_of(ways.addresses),
            address_of(positions),
            None if targets is None else address_of(targets),
            address_of(tokens),
            address_of(logprobs),
            top,
            address_of(top_tokens),
            address_of(top_logprobs),
        )
        self._check(code, "sample")
        found: dict[int, Sampled] = {}
        for row in ways.asking:
            if tokens[row] >= 0:
                places = slice(row * top, row * top + min(ways.how[row].logprobs, top))
                best = tuple(zip(top_tokens[places], top_logprobs[places], strict=True))
                found[row] = Sampled(tokens[row], logprobs[row], best)
        return Samples(tokens.tolist(), found)

    def top_two(self, logits: Activation) -> list[tuple[int, float]]:
        logits = self._float32(logits)
        self._flush()
        tokens, margins = array("q", bytes(8 * logits.rows)), array("d", bytes(8 * logits.rows))
        where = (self._address(logits), logits.rows, logits.columns)
        code = self._library.fgsnap_top_two(self._handle, *where, address_of(tokens), address_of(margins))
        self._check(code, "top_two")
        return list(zip(tokens, margins, strict=True))

    def floats(self, x: Activation) -> memoryview[Any]:
        x = self._float32(x)
        self._flush()
        copy = bytes(self._pool.view(x.register, 4 * x.rows * x.columns))
        return memoryview(copy).cast("f")

    # records

    def _float32(self, x: Activation) -> Activation:
        """The same numbers in float32."""
        if x.kind == F32:
            return x
        wide = self._new(x.plan, x.rows, x.columns, F32)
        words = (x.register, x.kind, x.register, x.kind, wide.register, x.columns, _bits(0.0))
        self._on(x.plan).record(None, (_ADD, *words))
        return wide

    def _on(self, plan: Plan) -> Tape:
        """The tape, for records about ``plan``; those about another one are executed first."""
        if self._plan is not plan:
            self._flush()
            self._plan = plan
        return self._tape

    def _reaching(self, op: str, cache: Cache, plan: Plan) -> Tape:
        """The tape, after making sure that the plan's blocks are the cache's."""
        if cache.block_size != plan.block_size:
            raise misuse(op, f"blocks of {plan.block_size} tokens, cache of {cache.blocks} of {cache.block_size}")
        tape = self._on(plan)
        tape.blocks = min(tape.blocks, cache.blocks)
        _check_reach(op, tape, plan)
        return tape

    def _rotation(self, op: str, plan: Plan, rope: Rotation | None, width: int) -> tuple[int, int]:
        """Where the rotation's cos and sin at the plan's positions are, computed once a step, and half its dims."""
        if rope is None:
            return -1, 0
        half = len(rope.frequencies)
        if 2 * half > width:
            raise misuse(op, f"{2 * half} rotated dims in a head of {width}")
        found = plan.angles.get(rope)
        if found is None:
            # Of no plan: the plan holds it, and would never be let go if it held the plan.
            found = plan.angles[rope] = self._new(NO_PLAN, plan.tokens, 2 * half, F32)
            words = (_ROPE, found.register, address_of(rope.frequencies), half, _bits(rope.factor))
            self._on(plan).record(rope, words)
        return found.register, half

    def _new(self, plan: Plan, rows: int, columns: int, kind: int, extra: int = 0) -> Activation:
        row_bytes = 4 * columns if kind == F32 else 2 * _up(columns, 2)
        register, home = self._tape.registers.take(rows, row_bytes, extra)
        return Activation(plan, rows, columns, kind, register, home)

    def _address(self, x: Activation) -> int:
        return self._pool.addresses[x.register]

    def _flush(self) -> None:
        """Run what is on the tape."""
        tape, plan = self._tape, self._plan
        if not tape.words or plan is None:
            return
        step = array("q", (*plan.step, address_of(self._pool.addresses)))
        code = self._library.fgsnap_run(self._handle, address_of(tape.words), len(tape.words), address_of(step))
        tape.clear()
        self._plan = None
        self._pool.trim()
        self._check(code, "run")

    # tapes

    def taped(self, forward: Callable[[Plan], Activation], block_size: int) -> Callable[[Batch], Activation]:
        """Record ``forward`` when it is first needed, and replay it ever after."""
        recorded: list[tuple[Tape, Arena, Activation]] = []

        def run(batch: Batch) -> Activation:
            if not recorded:
                recorded.append(self._recorded(forward, block_size))
            return self._replay(*recorded[0], self.plan(batch, block_size))

        return run

    def _recorded(self, forward: Callable[[Plan], Activation], block_size: int) -> tuple[Tape, Arena, Activation]:
        self._flush()
        arena, outer = Arena(), self._tape
        tape = self._tape = Tape(arena)
        try:
            result = forward(Plan(TOKENS, ROWS, block_size))
        finally:
            self._tape, self._plan = outer, None
        return tape, arena, result

    def _replay(self, tape: Tape, arena: Arena, result: Activation, plan: Plan) -> Activation:
        _check_reach("forward", tape, plan)
        self._flush()
        *offsets, size = arena.offsets(plan)
        if size > len(self._arena):
            self._arena = anonymous_memory(2 * size)
        base = address(memoryview(self._arena))
        registers = array("q", [base + offset for offset in offsets])
        logits = self._new(plan, plan.rows, result.columns, F32)
        registers[result.register] = self._address(logits)
        step = array("q", (*plan.step, address_of(registers)))
        code = self._library.fgsnap_run(self._handle, address_of(tape.words), len(tape.words), address_of(step))
        self._pool.trim()
        self._check(code, "run")
        return logits

    def _check(self, code: int, op: str) -> None:
        assert code != 2, f"{op}: the records and the library disagree"
        if code == 3:
            raise RankLost
        if code != 0:
            raise HostError(
                "The native backend ran out of memory.", f"In {op}.", "Lower --kv-memory or --max-batch-tokens."
            )


# --- words of records -------------------------------------------------------------------------------------------------

# Where a record of a product has what _add_to_product and _activate_product change.
_L_X, _L_Y, _L_PACKED, _L_OUT, _L_PITCH = 1, 3, 7, 11, 15
_L_ACCUMULATE, _L_ACTIVATION, _L_GATED, _L_CLAMP, _L_MULTIPLIER = 18, 19, 20, 21, 22


def _product(
    x: Activation,
    y: Activation,
    weight: Weight,
    bias: Weight,
    sizes: tuple[int, ...],
    selected: bool,
    scaling: tuple[int, int] | None,
) -> tuple[int, ...]:
    """``sizes``: in, out, heads, and the pitch and step of x and of y, as csrc/program.h has them."""
    where = (x.register, x.kind, y.register, y.kind)
    plain = (selected, 0, 0, 0, 0)  # accumulate, activation, gated, clamp
    return (_LINEAR, *where, *weight.matrix, *bias.vector, *sizes, *plain, *(scaling or (_ONE, 0)))


def _norm_words(op: str, args: NormArgs, width: int) -> tuple[int, ...]:
    how = _NORMS.get(args.kind)
    weight, bias = args.weight or NOTHING, args.bias or NOTHING
    if how is None:
        raise misuse(op, f"kind {args.kind}; native has {', '.join(_NORMS)}")
    if weight.shape not in ((width,), ()) or bias.shape not in ((width,), ()):
        raise misuse(op, f"weight {list(weight.shape)}, bias {list(bias.shape)} for vectors of {width}")
    return (how, *weight.vector, *bias.vector, args.unit_offset, _bits(args.eps))


@functools.lru_cache(4096)
def _bits(number: float) -> int:
    """A double as the integer word that a record holds."""
    return int.from_bytes(struct.pack("=d", number), sys.byteorder, signed=True)


_ONE = _bits(1.0)
_NO_NORM = (0,) * 7


def _cut(args: ActivationArgs) -> float:
    return math.inf if args.clamp is None else args.clamp


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --- what is refused before C++ ---------------------------------------------------------------------------------------


def _show(x: Activation) -> str:
    return f"[{x.rows}, {x.columns}]"


def _check_heads(op: str, cache: Cache, heads: int, kv_heads: int, head_dim: int) -> None:
    same = (cache.kv_heads, cache.head_dim, cache.value_dim) == (kv_heads, head_dim, head_dim)
    if not same or heads % kv_heads != 0:
        found = f"cache of {cache.kv_heads} heads of {cache.head_dim}"
        raise misuse(op, f"{found}, {heads} query and {kv_heads} key heads of {head_dim}")


def _check_latent(op: str, cache: Cache, args: LatentArgs) -> None:
    wide, heads = args.kv_rank + args.rope_dim, args.heads
    if (cache.kv_heads, cache.head_dim, cache.value_dim) != (1, wide, args.kv_rank):
        raise misuse(op, f"cache of {cache.kv_heads} heads of {cache.head_dim}, expected one of {wide}")
    ups = (args.up_keys.shape, args.up_values.shape)
    if ups != ((heads, args.kv_rank, args.nope_dim), (heads, args.value_dim, args.kv_rank)):
        raise misuse(op, f"up_keys {list(ups[0])}, up_values {list(ups[1])} for {heads} heads")


def _check_reach(op: str, tape: Tape, plan: Plan) -> None:
    if plan.highest_block >= tape.blocks:
        raise misuse(op, f"block {plan.highest_block} of a cache of {tape.blocks} blocks")
    if plan.highest_position >= tape.positions:
        raise misuse(op, f"position {plan.highest_position} of {tape.positions} learned ones")


def _check_experts(x: Activation, router: RouterArgs, args: ExpertsArgs) -> tuple[int, int]:
    """How many experts there are and how wide they are inside."""
    count, rows, width = args.gate_up.shape
    inner, how = args.down.shape[-1], args.activation
    shapes = {"gate_up": (count, inner * (1 + how.gated), width), "down": (count, width, inner)}
    found = {"gate_up": args.gate_up.shape, "down": args.down.shape}
    biases = ((args.gate_up_bias, (count, rows)), (args.down_bias, (count, width)))
    if found != shapes or x.columns != width or router.weight.shape != (count, width):
        raise misuse("experts", f"x {_show(x)}, router {list(router.weight.shape)}, {found}")
    if any(bias is not None and bias.shape != shape for bias, shape in biases):
        raise misuse("experts", "a bias of another shape than its matrix")
    if router.selection_bias is not None and router.selection_bias.shape != (count,):
        raise misuse("experts", f"selection bias {list(router.selection_bias.shape)} for {count} experts")
    if how.kind not in _ACTIVATIONS or (how.kind == "clamped_swiglu" and not how.gated):
        raise misuse("experts", f"activation {how.kind}")
    if (args.gate_up.packed and (inner % PANEL or rows % PANEL)) or (args.down.packed and width % PANEL):
        raise misuse("experts", "packed matrices of which no expert begins a panel")
    eligible = count // router.groups * router.kept_groups
    if count % router.groups or not 0 < router.kept_groups <= router.groups or not 0 < router.top_k <= eligible:
        raise misuse("experts", f"top {router.top_k} of {router.kept_groups} of {router.groups} groups of {count}")
    return count, inner
