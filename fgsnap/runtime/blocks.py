"""Who holds which blocks of the KV cache: integers only.

Progress is proven here. A sequence is admitted by reserving the most blocks it can ever need, and draws blocks from its
reservation as it grows; so a running sequence never waits for another one, and there is nothing to evict or recompute.
"""

from __future__ import annotations


class Reservation:
    """The blocks promised to one sequence, and those of them that it uses so far."""

    __slots__ = ("promised", "table")

    def __init__(self, promised: int) -> None:
        self.promised = promised
        self.table: list[int] = []


class BlockPool:
    """A fixed number of KV blocks of ``block_size`` tokens each."""

    def __init__(self, blocks: int, block_size: int) -> None:
        assert blocks > 0 and block_size > 0
        self.blocks = blocks
        self.block_size = block_size
        # A stack, lowest index on top: a lightly loaded engine keeps reusing the same, warm, memory.
        self._free = list(range(blocks - 1, -1, -1))
        self._promised = 0

    @property
    def available(self) -> int:
        """Blocks that no sequence has been promised."""
        return self.blocks - self._promised

    def needed(self, tokens: int) -> int:
        """How many blocks hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def reserve(self, tokens: int) -> Reservation | None:
        """Promise room for ``tokens`` tokens, or None if that much is not available now."""
        blocks = self.needed(tokens)
        if blocks > self.available:
            return None
        self._promised += blocks
        return Reservation(blocks)

    def grow(self, reservation: Reservation, tokens: int) -> None:
        """Make the reservation's table long enough for ``tokens`` tokens."""
        missing = self.needed(tokens) - len(reservation.table)
        for _ in range(missing):
            reservation.table.append(self._free.pop())
        assert len(reservation.table) <= reservation.promised, "a sequence outgrew its reservation"

    def release(self, reservation: Reservation) -> None:
        """Take back everything the reservation held or was promised."""
        self._free.extend(reversed(reservation.table))
        self._promised -= reservation.promised
        reservation.table = []
        reservation.promised = 0
