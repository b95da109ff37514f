"""The C++ backend: how its library is found and called, and the tape that spares a call for every op.

It imports neither torch nor numpy. Activations are float32 whatever the weights are; weights stay where they are
mapped. An op checks its sizes, writes a record to the tape (``csrc/tape.h``) and returns at once; the tape runs in one
call when somebody needs results: at ``logits``, ``sample``, ``top_two`` and ``floats``. Records run in the order in
which they were written, so a tensor that Python has let go of may lend its memory to the next one at once.

An instance belongs to one thread, and to one process: load it after a fork, never before.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import struct
import sys
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgsnap.errors import HostError
from fgsnap.kernels.ops import AttentionArgs, Batch, NormArgs, Sampled, Sampling

ABI = 1
DTYPES = ("bfloat16", "float16", "float32")  # what --dtype may ask for: the KV cache's
STEP = 32  # cached rows are padded to whole vectors, as csrc/vector.h reads them
TILE = 4  # tokens of one sequence that attend together
POOL_BYTES = 512 << 20  # memory for activations kept for reuse

_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_ITEM = (4, 2, 2)
_NORMS = {"rms": 0, "ln": 1, "l2": 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_EMBED, _NORM, _ADD, _LINEAR, _ROPE, _APPEND, _ATTEND, _ACTIVATE = range(8)

SUPPORTS = frozenset(
    """
    attention.rope attention.window attention.qkv_bias attention.out_bias
    layer.attn_in layer.attn_out layer.mlp_in layer.mlp_out layer.sequential layer.parallel layer.post
    layer.residual_multiplier
    mlp.silu mlp.gelu mlp.gelu_tanh mlp.relu mlp.bias mlp.down_bias mlp.gated
    norm.rms norm.ln norm.l2 norm.weight norm.bias norm.unit_offset norm.float32_weight
    embedding.scale embedding.round_scale head.tied head.bias head.multiplier head.softcap
    rope.linear rope.dynamic rope.llama3 rope.yarn rope.longrope rope.proportional_head_dim
    linear.factor yarn.beta_fast yarn.beta_slow yarn.truncate
    """.split()
)


# --- the library ------------------------------------------------------------------------------------------------------


def available() -> tuple[bool, str]:
    """Whether the backend can be used here, and the instruction set it would use or the reason why not."""
    library, reason = _load()
    return (library is not None), reason


def instruction_sets() -> list[str]:
    """The kernels that this machine can run, the best first."""
    library, _ = _load()
    return [] if library is None else _instruction_sets(library)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    path = _find()
    if path is None:
        return None, "not built: no C++ compiler was found when fgsnap was installed"
    try:
        library = ctypes.CDLL(str(path))
        built_for = library.fgsnap_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    if built_for != ABI:
        return None, f"{path.name} was built for interface {built_for}, this fgsnap has {ABI}: install fgsnap again"
    _declare(library)
    return library, f"{_instruction_sets(library)[0]} instructions"


def _find() -> Path | None:
    """The library beside this file or, in an editable install, in the other folder of the package."""
    folders = [Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)]
    return next((folder / "_native.so" for folder in folders if (folder / "_native.so").is_file()), None)


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.fgsnap_instructions.argtypes = [integer]
    library.fgsnap_instructions.restype = ctypes.c_char_p
    library.fgsnap_open.argtypes = [integer, ctypes.c_char_p]
    library.fgsnap_open.restype = pointer
    library.fgsnap_close.argtypes = [pointer]
    library.fgsnap_close.restype = None
    library.fgsnap_run.argtypes = [pointer, pointer, integer]
    library.fgsnap_sample.argtypes = [pointer, pointer, integer, integer, pointer, pointer, integer, pointer, pointer]
    library.fgsnap_top_two.argtypes = [pointer, pointer, integer, integer, pointer]


def _instruction_sets(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.fgsnap_instructions(len(names))) is not None:
        names.append(name.decode())
    return names


def default_threads() -> int:
    """As many threads as there are processors to run on: the affinity mask, the cgroup's quota and OMP_NUM_THREADS."""
    limits = [len(os.sched_getaffinity(0)), *_quotas()]
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        limits.append(int(asked))
    return max(1, min(limits))


def _quotas() -> Iterator[int]:
    """Whole processors that each cgroup around this process grants, for those that limit it."""
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in own:
        root = Path("/sys/fs/cgroup") / ("cpu" if "cpu" in controllers.split(",") else "")
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (quota := _quota(folder)) is not None:
                yield quota


def _quota(folder: Path) -> int | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None


# --- tensors ----------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """A piece of memory that starts on a cache line: ``at`` is the address of ``data[offset]``."""

    at: int
    size: int
    offset: int
    data: bytearray


class Activation:
    """float32 [rows, columns]. Let go of, its memory joins ``home``, the list from which the next one is taken."""

    __slots__ = ("at", "columns", "home", "memory", "rows")

    def __init__(self, rows: int, columns: int, memory: Memory, home: list[Memory]) -> None:
        self.rows = rows
        self.columns = columns
        self.memory = memory
        self.home = home
        self.at = memory.at

    def __del__(self) -> None:
        self.home.append(self.memory)


class Weight(NamedTuple):
    """A mapped tensor. ``data`` keeps the mapping open."""

    at: int
    kind: int
    shape: tuple[int, ...]
    data: memoryview


NOTHING = Weight(0, 0, (), memoryview(b""))


class Rotation:
    """Inverse frequencies and the factor on cos and sin. Compared by identity: a plan keeps an angle table for each."""

    __slots__ = ("factor", "frequencies")

    def __init__(self, frequencies: Sequence[float], factor: float) -> None:
        self.frequencies = array("f", frequencies)
        self.factor = factor


class Cache(NamedTuple):
    """One layer's keys and values; ``words`` is how a record describes them."""

    blocks: int
    block_size: int
    kv_heads: int
    head_dim: int
    words: tuple[int, ...]
    data: mmap.mmap


class Plan(NamedTuple):
    """A batch as the kernels read it.

    ``data`` is tokens, positions, each token's offset into the blocks, blocks, tiles and rows; ``words`` is where the
    second to the fourth are. ``angles`` holds one table for each rotation that the step has met.
    """

    count_tokens: int
    block_size: int
    highest_token: int
    highest_block: int
    words: tuple[int, ...]
    data: tuple[array[int], ...]
    angles: dict[Rotation, Activation]


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address(data: memoryview) -> int:
    """Where contiguous bytes begin. ctypes itself gives the address of writable memory only."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    at = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return at


def _allocate(size: int) -> Memory:
    data = bytearray(size + 64)
    at = ctypes.addressof(ctypes.c_char.from_buffer(data))
    offset = -at % 64
    return Memory(at + offset, size, offset, data)


@functools.lru_cache(4096)
def _bits(number: float) -> int:
    """A double as the integer word that a record holds."""
    return int.from_bytes(struct.pack("=d", number), sys.byteorder, signed=True)


_ONE = _bits(1.0)


def _at(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


def _misuse(op: str, text: str) -> ValueError:
    """A caller's mistake that must not reach C++, where it would read or write out of bounds."""
    return ValueError(f"{op}: {text}")


def _padded(head_dim: int) -> int:
    """The numbers that a row of one head takes in the cache."""
    return -(-head_dim // STEP) * STEP


def _show(x: Activation) -> str:
    return f"[{x.rows}, {x.columns}]"


# --- the backend ------------------------------------------------------------------------------------------------------


class Native:
    """ops.Ops in C++ on this machine's processors.

    Args:
        dtype: of the KV cache, one of DTYPES; activations are float32 whatever it is.
        threads: how many; None: default_threads().
        instructions: one of instruction_sets(); None: the best.
    """

    name = "native"
    device = "cpu"
    supports = SUPPORTS

    def __init__(self, dtype: str = "bfloat16", threads: int | None = None, instructions: str | None = None) -> None:
        library, reason = _load()
        if library is None:
            next_step = "Install a C++ compiler and then fgsnap again, or use --backend reference."
            raise HostError("The native backend cannot be used.", reason, next_step)
        if dtype not in DTYPES:
            raise _misuse("native", f"KV cache of {dtype}; it has {', '.join(DTYPES)}")
        self.dtype = dtype
        self.threads = threads or default_threads()
        self.instructions = instructions or _instruction_sets(library)[0]
        handle = library.fgsnap_open(self.threads, self.instructions.encode())
        if not handle:
            raise HostError(
                "The native backend cannot start.",
                f"It asked for {self.threads} threads and {self.instructions} instructions.",
                "Lower --threads or OMP_NUM_THREADS, or raise the limit on processes (ulimit -u).",
            )
        self._library = library
        self._handle = handle
        self._tape: array[int] = array("q")
        self._free: dict[int, list[Memory]] = {}  # by size
        self._homes: dict[int, list[Memory]] = {}  # the same lists, by how many numbers are asked for
        self._lent: list[Memory] = []  # seen from outside: not reused, only kept until no record can mean it
        self._held: list[object] = []  # what the records on the tape refer to
        self._allocated = 0
        self._close = weakref.finalize(self, library.fgsnap_close, handle)
        self._close.atexit = False  # the threads die with the process; nobody waits for them

    def close(self) -> None:
        """End the threads. Nothing may be asked of the backend afterwards."""
        self._close()

    # tensors

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int]) -> Weight:
        if dtype not in _TYPES:
            raise _misuse("weight", f"dtype {dtype}; native has {', '.join(_TYPES)}")
        expected = math.prod(shape) * _ITEM[_TYPES[dtype]]
        if data.nbytes != expected or not data.c_contiguous:
            found = f"{data.nbytes} {'' if data.c_contiguous else 'scattered '}bytes"
            raise _misuse("weight", f"{found} for {dtype} {list(shape)}, which takes {expected}")
        return Weight(address(data), _TYPES[dtype], tuple(shape), data)

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> Rotation:
        return Rotation(inverse_frequencies, factor)

    def kv_cache(self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> list[Cache]:
        sizes = (layers, blocks, block_size, kv_heads, head_dim)
        if min(sizes) <= 0:
            raise _misuse("kv_cache", f"sizes {sizes} must be positive")
        return [self._cache(blocks, block_size, kv_heads, head_dim) for _ in range(layers)]

    def kv_token_bytes(self, kv_heads: int, head_dim: int) -> int:
        return 2 * kv_heads * _padded(head_dim) * _ITEM[_TYPES[self.dtype]]

    def _cache(self, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> Cache:
        kind = _TYPES[self.dtype]
        stride = _padded(head_dim)
        half = blocks * block_size * self.kv_token_bytes(kv_heads, head_dim) // 2
        try:
            data = mmap.mmap(-1, 2 * half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HostError(
                f"{2 * half} bytes of KV cache for one layer cannot be had.", str(error), "Lower --kv-memory."
            ) from error
        at = address(memoryview(data))
        words = (at, at + half, kind, block_size, kv_heads, head_dim, stride)
        return Cache(blocks, block_size, kv_heads, head_dim, words, data)

    def plan(self, batch: Batch, block_size: int) -> Plan:
        _check_batch(batch, block_size)
        tokens, rows = array("i", batch.tokens), array("i", batch.rows)
        positions, tables, blocks, tiles = array("i", batch.positions), array("i"), array("i"), array("i")
        for first, stop, table in zip(batch.starts, batch.starts[1:], batch.block_tables, strict=False):
            tables.extend([len(blocks)] * (stop - first))
            blocks.extend(table)
            for at in range(first, stop, TILE):
                tiles.extend((at, min(TILE, stop - at)))
        words = (_at(positions), _at(tables), _at(blocks))
        data = (tokens, positions, tables, blocks, tiles, rows)
        return Plan(len(tokens), block_size, max(tokens), max(blocks), words, data, {})

    # ops

    def embed(self, plan: Plan, table: Weight, scale: float) -> Activation:
        if len(table.shape) != 2 or plan.highest_token >= table.shape[0]:
            raise _misuse("embed", f"token {plan.highest_token} in a table of shape {list(table.shape)}")
        width = table.shape[1]
        y = self._new(plan.count_tokens, width)
        tokens = _at(plan.data[0])
        self._record(
            (plan, table), (_EMBED, tokens, table.at, y.at, plan.count_tokens, width, table.kind, _bits(scale))
        )
        return y

    def norm(self, x: Activation, args: NormArgs) -> Activation:
        how, columns = _NORMS.get(args.kind), x.columns
        weight = NOTHING if args.weight is None else args.weight
        bias = NOTHING if args.bias is None else args.bias
        if how is None:
            raise _misuse("norm", f"kind {args.kind}; native has {', '.join(_NORMS)}")
        if weight.shape not in ((columns,), ()) or bias.shape not in ((columns,), ()):
            raise _misuse("norm", f"weight {list(weight.shape)}, bias {list(bias.shape)} for x {_show(x)}")
        y = self._new(x.rows, columns)
        sizes = (x.rows, columns, weight.kind, bias.kind, args.unit_offset, _bits(args.eps))
        self._record((weight, bias), (_NORM, how, x.at, y.at, weight.at, bias.at, *sizes))
        return y

    def add(self, x: Activation, branch: Activation, multiplier: float = 1.0) -> Activation:
        if x.rows != branch.rows or x.columns != branch.columns:
            raise _misuse("add", f"x {_show(x)}, branch {_show(branch)}")
        self._record(None, (_ADD, x.at, branch.at, x.rows, x.columns, _bits(multiplier)))
        return x

    def linear(self, x: Activation, weight: Weight, bias: Weight | None = None) -> Activation:
        return self._linear("linear", x, (0, x.rows), weight, bias, weight.shape[0], (_ONE, 0))

    def logits(
        self,
        x: Activation,
        plan: Plan,
        weight: Weight,
        bias: Weight | None,
        vocab_size: int,
        multiplier: float,
        softcap: float | None,
    ) -> Activation:
        if x.rows != plan.count_tokens:
            raise _misuse("logits", f"x {_show(x)} for {plan.count_tokens} tokens")
        if not 0 < vocab_size <= weight.shape[0]:
            raise _misuse("logits", f"{vocab_size} of {weight.shape[0]} rows")
        rows = plan.data[5]
        self._held.append(plan)
        scaling = (_bits(multiplier), _bits(softcap or 0.0))
        y = self._linear("logits", x, (_at(rows), len(rows)), weight, bias, vocab_size, scaling)
        self._flush()
        return y

    def _linear(
        self,
        op: str,
        x: Activation,
        rows: tuple[int, int],
        weight: Weight,
        bias: Weight | None,
        out: int,
        scaling: tuple[int, int],
    ) -> Activation:
        shape = weight.shape
        if len(shape) != 2 or shape[1] != x.columns:
            raise _misuse(op, f"x {_show(x)}, weight {list(shape)}")
        if bias is None:
            bias = NOTHING
        elif bias.shape != shape[:1]:
            raise _misuse(op, f"bias {list(bias.shape)}, weight {list(shape)}")
        at, count = rows
        y = self._new(count, out)
        sizes = (count, x.columns, out, weight.kind, bias.kind)
        self._record((weight, bias), (_LINEAR, x.at, at, weight.at, bias.at, y.at, *sizes, *scaling))
        return y

    def append(
        self, qkv: Activation, cache: Cache, plan: Plan, args: AttentionArgs, rope: Rotation | None
    ) -> Activation:
        width = (args.heads + 2 * args.kv_heads) * args.head_dim
        if qkv.rows != plan.count_tokens or qkv.columns != width:
            raise _misuse("append", f"qkv {_show(qkv)}, expected [{plan.count_tokens}, {width}]")
        _check_cache("append", cache, plan, args)
        angles, half = (0, 0) if rope is None else (self._angles(plan, rope).at, len(rope.frequencies))
        if 2 * half > args.head_dim:
            raise _misuse("append", f"{2 * half} rotated dims in a head of {args.head_dim}")
        q = self._new(plan.count_tokens, args.heads * args.head_dim)
        sizes = (plan.count_tokens, args.heads)
        self._record((plan, cache), (_APPEND, qkv.at, q.at, angles, half, *plan.words, *sizes, *cache.words))
        return q

    def attend(self, q: Activation, cache: Cache, plan: Plan, args: AttentionArgs) -> Activation:
        width = args.heads * args.head_dim
        if q.rows != plan.count_tokens or q.columns != width:
            raise _misuse("attend", f"q {_show(q)}, expected [{plan.count_tokens}, {width}]")
        window = 0 if args.window is None else args.window
        if window < 0 or args.window == 0:
            raise _misuse("attend", f"window {args.window}")
        _check_cache("attend", cache, plan, args)
        y = self._new(plan.count_tokens, width)
        tiles = plan.data[4]
        sizes = (_at(tiles), len(tiles) // 2, args.heads, window, _bits(args.scale))
        self._record((plan, cache), (_ATTEND, q.at, y.at, *plan.words, *sizes, *cache.words))
        return y

    def activate(self, x: Activation, kind: str, gated: bool) -> Activation:
        how = _ACTIVATIONS.get(kind)
        if how is None:
            raise _misuse("activate", f"kind {kind}; native has {', '.join(_ACTIVATIONS)}")
        if gated and x.columns % 2 != 0:
            raise _misuse("activate", f"gated x {_show(x)} has an odd width")
        inner = x.columns // 2 if gated else x.columns
        y = self._new(x.rows, inner)
        self._record(None, (_ACTIVATE, how, x.at, y.at, x.rows, inner, gated))
        return y

    # results

    def sample(self, logits: Activation, how: Sequence[Sampling]) -> list[Sampled]:
        if len(how) != logits.rows:
            raise _misuse("sample", f"{len(how)} ways for logits {_show(logits)}")
        if not all(one.temperature >= 0 and one.top_k >= 0 for one in how):
            raise _misuse("sample", "a negative temperature or top_k")
        self._flush()
        top = max((one.logprobs for one in how), default=0)
        asked = b"".join(struct.pack("=dqddq", o.temperature, o.top_k, o.top_p, o.uniform, o.logprobs) for o in how)
        picked = ctypes.create_string_buffer(24 * len(how) or 24)
        tokens = (ctypes.c_int64 * max(1, len(how) * top))()
        logprobs = (ctypes.c_double * max(1, len(how) * top))()
        shape = (logits.at, logits.rows, logits.columns)
        self._check(
            self._library.fgsnap_sample(self._handle, *shape, asked, picked, max(0, top), tokens, logprobs), "sample"
        )
        results = []
        for r, one in enumerate(how):
            token, logprob, count = struct.unpack_from("=qdq", picked, 24 * r)
            places = range(r * top, r * top + count) if one.logprobs > 0 else ()
            results.append(Sampled(token, logprob, tuple((tokens[i], logprobs[i]) for i in places)))
        return results

    def top_two(self, logits: Activation) -> list[tuple[int, float]]:
        self._flush()
        picked = ctypes.create_string_buffer(24 * logits.rows or 24)
        shape = (logits.at, logits.rows, logits.columns)
        self._check(self._library.fgsnap_top_two(self._handle, *shape, picked), "top_two")
        return [struct.unpack_from("=qd", picked, 24 * r) for r in range(logits.rows)]

    def floats(self, x: Activation) -> memoryview[Any]:
        self._flush()
        x.home = self._lent
        memory = x.memory
        view = memoryview(memory.data)[memory.offset : memory.offset + 4 * x.rows * x.columns]
        return view.cast("f").toreadonly()

    # the tape

    def _angles(self, plan: Plan, rope: Rotation) -> Activation:
        """The rotation's cos and sin at the plan's positions, computed once a step."""
        found = plan.angles.get(rope)
        if found is None:
            half = len(rope.frequencies)
            found = plan.angles[rope] = self._new(plan.count_tokens, 2 * half)
            sizes = (plan.count_tokens, half, _bits(rope.factor))
            self._record((plan, rope), (_ROPE, plan.words[0], _at(rope.frequencies), found.at, *sizes))
        return found

    def _new(self, rows: int, columns: int) -> Activation:
        count = rows * columns
        home = self._homes.get(count)
        if home is None:
            home = self._homes[count] = self._free.setdefault(_size_class(count * 4), [])
        if home:
            return Activation(rows, columns, home.pop(), home)
        size = _size_class(count * 4)
        self._allocated += size
        return Activation(rows, columns, _allocate(size), home)

    def _record(self, held: object, words: tuple[int, ...]) -> None:
        self._held.append(held)
        self._tape.extend(words)

    def _flush(self) -> None:
        """Run what is on the tape."""
        if not self._tape:
            return
        code = self._library.fgsnap_run(self._handle, _at(self._tape), len(self._tape))
        del self._tape[:]
        self._held.clear()
        self._lent.clear()
        if self._allocated > POOL_BYTES:
            self._allocated = 0
            self._homes.clear()
            self._free.clear()
        self._check(code, "run")

    def _check(self, code: int, op: str) -> None:
        assert code != 2, f"{op}: the tape and the library disagree"
        if code != 0:
            raise HostError(
                "The native backend ran out of memory.", f"In {op}.", "Lower --kv-memory or --max-batch-tokens."
            )


def _check_batch(batch: Batch, block_size: int) -> None:
    """The kernels follow these indices without looking."""
    count, starts, lengths, rows = len(batch.tokens), batch.starts, batch.lengths, batch.rows
    if count == 0 or block_size <= 0 or len(batch.positions) != count or min(batch.tokens) < 0:
        raise _misuse("plan", f"{count} tokens, {len(batch.positions)} positions, blocks of {block_size}")
    if not len(starts) - 1 == len(lengths) == len(batch.block_tables) or starts[0] != 0 or starts[-1] != count:
        raise _misuse("plan", f"starts {list(starts)} do not divide {count} tokens into {len(lengths)} sequences")
    for s, (table, length) in enumerate(zip(batch.block_tables, lengths, strict=True)):
        first, stop = starts[s], starts[s + 1]
        if not 0 < stop - first <= length or len(table) * block_size < length or min(table) < 0:
            raise _misuse("plan", f"sequence {s}: {stop - first} tokens, {length} keys, {len(table)} blocks")
        if list(batch.positions[first:stop]) != list(range(length - stop + first, length)):
            raise _misuse("plan", f"sequence {s}: its positions are not the last ones of {length} keys")
    if rows and not 0 <= min(rows) <= max(rows) < count:
        raise _misuse("plan", f"rows {list(rows)} of {count} tokens")


def _check_cache(op: str, cache: Cache, plan: Plan, args: AttentionArgs) -> None:
    if cache.kv_heads != args.kv_heads or cache.head_dim != args.head_dim or args.heads % args.kv_heads != 0:
        raise _misuse(op, f"cache of {cache.kv_heads} heads of {cache.head_dim}, {args}")
    if cache.block_size != plan.block_size or plan.highest_block >= cache.blocks:
        text = f"block {plan.highest_block} of {plan.block_size} tokens"
        raise _misuse(op, f"{text}, cache of {cache.blocks} blocks of {cache.block_size}")


def _size_class(size: int) -> int:
    """``size`` rounded up to one of four steps a power of two, so that batches of similar lengths share memory."""
    step = 1 << max(10, size.bit_length() - 3)
    return -(-max(size, 1) // step) * step
