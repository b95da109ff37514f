"""What the native backend's ops work on, and the records that they leave: tensors, batches, registers, tapes.

An activation is a register: a place in memory that outlives its record only until the last one that names it. Ops that
run one by one take registers with memory of their own from a Pool; ops that are recorded once for all take theirs from
an Arena, which only knows how wide they are and lays them out anew for every batch.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from array import array
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from fgsnap.kernels.ops import Batch, BlockTable

F32, BF16, F16 = range(3)  # csrc/program.h's Type
TILE = 16  # csrc/program.h's
POOL_BYTES = 512 << 20  # memory for activations kept for reuse


def misuse(op: str, text: str) -> ValueError:
    """A caller's mistake that must not reach C++, where it would read or write out of bounds."""
    return ValueError(f"{op}: {text}")


def address_of(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


_place = attrgetter("at")


# --- tensors ----------------------------------------------------------------------------------------------------------


class Activation:
    """[rows, columns] of float32 or bfloat16 in a register. Let go of, the register joins ``home`` for the next one."""

    __slots__ = ("columns", "home", "kind", "plan", "register", "rows")

    def __init__(self, plan: Plan, rows: int, columns: int, kind: int, register: int, home: list[int]) -> None:
        self.plan = plan
        self.rows = rows
        self.columns = columns
        self.kind = kind
        self.register = register
        self.home = home

    def __del__(self) -> None:
        self.home.append(self.register)


class Weight(NamedTuple):
    """A mapped tensor. ``data`` keeps the mapping open."""

    at: int
    kind: int
    shape: tuple[int, ...]
    packed: bool
    data: memoryview

    @property
    def vector(self) -> tuple[int, int]:
        return self.at, self.kind

    @property
    def matrix(self) -> tuple[int, int, int]:
        return self.at, self.kind, self.packed


NOTHING = Weight(0, F32, (), False, memoryview(b""))


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
    value_dim: int
    words: tuple[int, ...]
    data: mmap.mmap


TOKENS, ROWS = -1, -2  # how many tokens and rows a plan has that stands for any batch


class Plan:
    """A batch as the kernels read it: ``step`` is program.h's Step without the registers.

    ``data`` is what its words point to, ``tables`` what is pointed to from there. ``angles`` holds one table for each
    rotation that the ops have met.
    """

    __slots__ = (
        "angles", "block_size", "data", "highest_block", "highest_position", "rows", "step", "tables", "tokens",
    )  # fmt: skip

    def __init__(self, tokens: int, rows: int, block_size: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.block_size = block_size
        self.highest_block = -1
        self.highest_position = -1
        self.step: array[int] = array("q")
        self.data: tuple[array[int], ...] = ()
        self.tables: list[BlockTable] = []
        self.angles: dict[Rotation, Activation] = {}

    @staticmethod
    def of(batch: Batch, block_size: int, lay_out: Callable[[int], int]) -> Plan:
        """``lay_out``: program.h's Ragged, filled in; gives the sequence that is wrong, or -1."""
        counts = len(batch.lengths), len(batch.tokens), len(batch.rows)
        sequences, tokens, rows = counts
        if not len(batch.starts) - 1 == sequences == len(batch.block_tables) or len(batch.positions) != tokens:
            raise _misplanned(batch, block_size, sequences)
        tables = [table if type(table) is BlockTable else BlockTable(table) for table in batch.block_tables]
        columns = batch.tokens, batch.positions, batch.rows, batch.starts, batch.lengths, [*map(len, tables)]
        ids, positions, selected, starts, lengths, sizes = (array("i", column) for column in columns)
        table_of, tiles = array("q", bytes(8 * tokens)), array("i", bytes(8 * (sequences + tokens // TILE)))
        given = (ids, positions, selected, starts, lengths, sizes, array("q", map(_place, tables)), table_of, tiles)
        ragged = array("q", (*counts, block_size, *map(address_of, given), 0, 0))
        if (wrong := lay_out(address_of(ragged))) >= 0:
            raise _misplanned(batch, block_size, wrong)
        plan = Plan(tokens, rows, block_size)
        plan.highest_block = ragged[-1]
        plan.highest_position = max(batch.lengths) - 1
        plan.tables = tables
        plan.data = (ids, positions, table_of, tiles, selected)
        plan.step = array("q", (tokens, rows, ragged[-2], *map(address_of, plan.data)))
        return plan

    def with_rows(self, rows: Sequence[int]) -> Plan:
        """The same tokens with other rows wanted."""
        plan = Plan(self.tokens, len(rows), self.block_size)
        plan.highest_block, plan.highest_position = self.highest_block, self.highest_position
        plan.tables = self.tables
        plan.data = (*self.data[:-1], array("i", rows))
        plan.step = array("q", (*self.step[:1], len(rows), self.step[2], *map(address_of, plan.data)))
        return plan


NO_PLAN = Plan(0, 0, 1)


# --- registers --------------------------------------------------------------------------------------------------------


class Registers(Protocol):
    """Where the results of ops go. ``take`` gives a register and the list that it returns to."""

    def take(self, rows: int, row_bytes: int, extra: int = 0) -> tuple[int, list[int]]: ...


class Pool:
    """Registers with memory of their own, for ops that are called one by one; memory that was let go is used again."""

    def __init__(self) -> None:
        self.addresses: array[int] = array("q")
        self.memories: list[bytearray] = []
        self.free: dict[int, list[int]] = {}
        self.allocated = 0

    def take(self, rows: int, row_bytes: int, extra: int = 0) -> tuple[int, list[int]]:
        size = size_class(rows * row_bytes + extra)
        home = self.free.setdefault(size, [])
        if home:
            return home.pop(), home
        memory = bytearray(size + 64)
        at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.addresses.append(at + -at % 64)
        self.memories.append(memory)
        self.allocated += size
        return len(self.memories) - 1, home

    def view(self, register: int, size: int) -> memoryview:
        memory = self.memories[register]
        start = self.addresses[register] - ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return memoryview(memory)[start : start + size]

    def trim(self) -> None:
        """Give memory back that nobody holds, when there is much of it."""
        if self.allocated <= POOL_BYTES:
            return
        for size, home in self.free.items():
            for register in home:
                self.memories[register] = bytearray()
                self.allocated -= size
            home.clear()


class Arena:
    """Registers of a tape: how wide they are. Where they lie follows from how many rows a step has."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, int, int]] = []
        self.free: dict[tuple[int, int, int], list[int]] = {}

    def take(self, rows: int, row_bytes: int, extra: int = 0) -> tuple[int, list[int]]:
        width = (rows, row_bytes, extra)
        home = self.free.setdefault(width, [])
        if home:
            return home.pop(), home
        self.widths.append(width)
        return len(self.widths) - 1, home

    def offsets(self, plan: Plan) -> list[int]:
        """Where each register begins, and how much there is in all, in bytes."""
        offsets, at = [], 0
        for rows, row_bytes, extra in self.widths:
            offsets.append(at)
            at += (row_bytes * (plan.tokens if rows == TOKENS else plan.rows) + extra + 63) & ~63
        offsets.append(at)
        return offsets


class Tape:
    """Records and what they refer to.

    Attributes:
        words: the records.
        last: where the last record begins.
        held: what keeps the records' addresses alive.
        blocks: the fewest KV blocks of any cache that is used.
        positions: the fewest positions that a learned table has; sys.maxsize: there is none, as for blocks.
    """

    def __init__(self, registers: Registers) -> None:
        self.registers = registers
        self.words: array[int] = array("q")
        self.last = 0
        self.held: list[object] = []
        self.blocks = sys.maxsize
        self.positions = sys.maxsize

    def record(self, held: object, words: tuple[int, ...]) -> None:
        self.held.append(held)
        self.last = len(self.words)
        self.words.extend(words)

    def clear(self) -> None:
        del self.words[:]
        self.held.clear()
        self.last = 0
        self.blocks = self.positions = sys.maxsize


def _misplanned(batch: Batch, block_size: int, wrong: int) -> ValueError:
    """What is wrong with a sequence of a batch, or with the whole where there is no such sequence."""
    count, sequences = len(batch.tokens), len(batch.lengths)
    if wrong < sequences:
        first, stop = batch.starts[wrong], batch.starts[wrong + 1]
        length, blocks = batch.lengths[wrong], list(batch.block_tables[wrong])
        where = f"at {list(batch.positions[first:stop])} of {length} keys in blocks {blocks} of {block_size}"
        return misuse("plan", f"sequence {wrong}: {stop - first} tokens {where}")
    tables = f"{len(batch.block_tables)} tables, starts {list(batch.starts)}"
    rows = f"{len(batch.positions)} positions, blocks of {block_size}, rows {list(batch.rows)}"
    return misuse("plan", f"{count} tokens of {sequences} sequences, {tables}, {rows}")


def size_class(size: int) -> int:
    """``size`` rounded up to one of four steps a power of two, so that batches of similar lengths share memory."""
    step = 1 << max(10, size.bit_length() - 3)
    return -(-max(size, 1) // step) * step
