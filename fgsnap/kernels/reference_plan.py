"""A batch on the device: where its tokens lie in the cache, and which keys its queries see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fgsnap.kernels.ops import Batch

# Queries of one prompt chunk that attend together: later ones see more keys, so shorter runs waste fewer of them.
QUERY_RUN = 256
# Keys and values that one attention call may gather.
GATHER_BYTES = 64 << 20


class RopeTable:
    """Inverse frequencies on the device and the factor on cos and sin."""

    def __init__(self, frequencies: torch.Tensor, factor: float) -> None:
        self.frequencies = frequencies
        self.factor = factor


class Reach(NamedTuple):
    """Which earlier keys a query sees: those of its window and of its chunk, as ops.AttentionArgs says."""

    window: int | None = None
    chunk: int | None = None

    def first_key(self, position: int) -> int:
        """The first position that a query at ``position`` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position - position % self.chunk)

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether the queries at these positions see the keys at those; both broadcast."""
        age = queries - keys
        seen = age >= 0
        if self.window is not None:
            seen = seen & (age < self.window)
        if self.chunk is not None:
            seen = seen & (queries // self.chunk == keys // self.chunk)
        return seen


class Run(NamedTuple):
    """Up to QUERY_RUN neighbouring queries of one sequence and the keys they can see, as host numbers."""

    sequence: int
    first_row: int
    first_position: int
    queries: int
    first_key: int
    last_key: int


class Gather(NamedTuple):
    """Runs of equal length that attend in one call: G runs, n queries each, L keys at most."""

    rows: torch.Tensor  # [G * n] indices into the step's tokens
    slots: torch.Tensor  # [G * L] cache slots; beyond a run's own keys its first key again, which the mask hides
    keys: torch.Tensor  # [G, L] positions of the keys
    mask: torch.Tensor  # [G, n, L]
    shape: tuple[int, int, int]


class Plan:
    """A batch on the device, with what several layers share: rotations, and key gathers for each reach."""

    def __init__(self, batch: Batch, block_size: int, device: torch.device) -> None:
        check_batch(batch, block_size)
        self.batch = batch
        self.block_size = block_size
        self.device = device
        widest = max((len(table) for table in batch.block_tables), default=1)
        tables = [[*table, *[0] * (widest - len(table))] for table in batch.block_tables]
        sequences = [s for s in range(len(tables)) for _ in range(batch.starts[s], batch.starts[s + 1])]
        packed = upload([batch.tokens, batch.positions, sequences, batch.rows, *tables], device)
        self.tokens, self.positions, self.sequences, self.rows = packed[:4]
        self.tables = torch.stack(packed[4:]) if tables else torch.zeros(0, widest, dtype=torch.int64, device=device)
        self.slots = self._slots(self.sequences, self.positions)
        self._rotations: dict[RopeTable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gathers: dict[tuple[Reach, int], list[Gather]] = {}

    def rotation(self, rope: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of the batch's positions: cos and sin [T, 1, dims / 2]."""
        if rope not in self._rotations:
            angles = self.positions.float()[:, None, None] * rope.frequencies
            self._rotations[rope] = (angles.cos() * rope.factor, angles.sin() * rope.factor)
        return self._rotations[rope]

    def gathers(self, reach: Reach, key_bytes: int) -> list[Gather]:
        """All attention of one layer as a few calls, none of which gathers more than GATHER_BYTES if it can help it."""
        wanted = (reach, max(1, GATHER_BYTES // key_bytes))
        if wanted not in self._gathers:
            groups = grouped(runs(self.batch, reach), wanted[1])
            self._gathers[wanted] = [self._gather(group, reach) for group in groups]
        return self._gathers[wanted]

    def _slots(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = self.tables[sequences, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def _gather(self, group: list[Run], reach: Reach) -> Gather:
        queries = group[0].queries
        count = max(run.last_key - run.first_key for run in group) + 1
        columns = upload([list(column) for column in zip(*group, strict=True)], self.device)
        sequences, first_row, first_position, _, first_key, last_key = (column[:, None] for column in columns)
        query = torch.arange(queries, device=self.device)
        keys = first_key + torch.arange(count, device=self.device)
        slots = self._slots(sequences.expand_as(keys), torch.where(keys <= last_key, keys, first_key))
        mask = reach.mask((first_position + query)[:, :, None], keys[:, None, :])
        return Gather((first_row + query).flatten(), slots.flatten(), keys, mask, (len(group), queries, count))


def check_batch(batch: Batch, block_size: int) -> None:
    """What every scheduler owes every backend; a violation would read or write another sequence's keys."""
    assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.tokens) == len(batch.positions)
    assert len(batch.starts) - 1 == len(batch.lengths) == len(batch.block_tables)
    for s, (length, table) in enumerate(zip(batch.lengths, batch.block_tables, strict=True)):
        start, stop = batch.starts[s], batch.starts[s + 1]
        assert start < stop and batch.positions[stop - 1] == length - 1 == batch.positions[start] + stop - start - 1
        assert length <= len(table) * block_size


def upload(columns: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Host integers as device tensors, in one transfer."""
    flat = torch.tensor([value for column in columns for value in column], dtype=torch.int64).to(device)
    return list(flat.split([len(column) for column in columns]))


def runs(batch: Batch, reach: Reach) -> list[Run]:
    """The batch's tokens as runs of queries, each with the range of keys that any of its queries sees."""
    found = []
    for s in range(len(batch.lengths)):
        for row in range(batch.starts[s], batch.starts[s + 1], QUERY_RUN):
            queries = min(QUERY_RUN, batch.starts[s + 1] - row)
            position = batch.positions[row]
            found.append(Run(s, row, position, queries, reach.first_key(position), position + queries - 1))
    return found


def grouped(all_runs: list[Run], most_keys: int) -> list[list[Run]]:
    """Runs of equal length together, similar key counts side by side, at most ``most_keys`` padded keys a group."""
    by_queries: dict[int, list[Run]] = defaultdict(list)
    for run in sorted(all_runs, key=lambda run: run.last_key - run.first_key, reverse=True):
        by_queries[run.queries].append(run)
    groups = []
    for equal in by_queries.values():
        while equal:
            size = max(1, most_keys // (equal[0].last_key - equal[0].first_key + 1))
            groups.append(equal[:size])
            equal = equal[size:]
    return groups
