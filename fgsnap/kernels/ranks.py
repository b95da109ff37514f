"""Tensor parallel ranks of one host, as the native backend knows them: processes over a piece of shared memory."""

from __future__ import annotations

import mmap
from typing import NamedTuple

from fgsnap.errors import HostError
from fgsnap.kernels.library import address, load

ROWS_AT_ONCE = 64  # rows of the residual stream that fit the shared memory; more are summed piece by piece


class Ranks(NamedTuple):
    """One of ``size`` processes of this host that compute together; ``memory`` is shared by all of them."""

    rank: int
    size: int
    memory: mmap.mmap

    def give_up(self) -> None:
        """Tell the others that a rank has ended: whoever waits for it fails at once."""
        library, _ = load()
        assert library is not None, "ranks are made by rank_memory, which needs the library"
        library.fgsnap_give_up(address(memoryview(self.memory)), len(self.memory), self.size)


def rank_memory(count: int, width: int) -> mmap.mmap:
    """Memory for ``count`` ranks that are forked after this, to lay together rows of ``width`` float32."""
    library, reason = load()
    if library is None:
        raise HostError("The native backend cannot be used.", reason, "Use --tp 1 --backend reference.")
    return anonymous_memory(library.fgsnap_ranks_memory(count, ROWS_AT_ONCE * width), mmap.MAP_SHARED)


def anonymous_memory(size: int, kind: int = mmap.MAP_PRIVATE) -> mmap.mmap:
    """Zeros that only this process has, or with ``mmap.MAP_SHARED`` those that it forks too."""
    try:
        return mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostError(
            f"{size} bytes for activations cannot be had.", str(error), "Lower --max-batch-tokens."
        ) from error
