"""Tensor parallel ranks of one host, as the backends know them: which one this is, and where it meets the others."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import NamedTuple

from fgsnap.errors import HostError
from fgsnap.kernels.library import address, load

ROWS_AT_ONCE = 64  # rows of the residual stream that fit the shared memory; more are summed piece by piece


class RankLost(HostError):
    """Another rank has ended, and this one cannot go on."""

    def __init__(self) -> None:
        super().__init__("A tensor parallel rank has ended.", "The others cannot go on without it.")


class Ranks(NamedTuple):
    """One of ``size`` processes of this host that compute together.

    Attributes:
        rank: which one, from 0.
        size: how many there are.
        memory: what the native backend sums in, shared by all of them; None where they share none.
        meeting: descriptor of an empty file that all of them have open, in which torch's processes find one another;
            None where torchrun has a store for that.
        lost: whether another one is known to have ended.
    """

    rank: int
    size: int
    memory: mmap.mmap | None = None
    meeting: int | None = None
    lost: Callable[[], bool] = lambda: False

    def give_up(self) -> None:
        """Tell the others that a rank has ended: whoever waits for it fails at once.

        Those that share no memory see it by themselves: their connections to it break.
        """
        library, _ = load()
        if self.memory is not None and library is not None:
            library.fgsnap_give_up(address(memoryview(self.memory)), len(self.memory), self.size)


def rank_memory(count: int, width: int) -> mmap.mmap | None:
    """Memory for ``count`` ranks that are forked after this, to sum rows of ``width`` float32; None without native."""
    library, _ = load()
    if library is None:
        return None
    return anonymous_memory(library.fgsnap_ranks_memory(count, ROWS_AT_ONCE * width), mmap.MAP_SHARED)


def anonymous_memory(size: int, kind: int = mmap.MAP_PRIVATE) -> mmap.mmap:
    """Zeros that only this process has, or with ``mmap.MAP_SHARED`` those that it forks too."""
    try:
        return mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostError(
            f"{size} bytes for activations cannot be had.", str(error), "Lower --max-batch-tokens."
        ) from error
