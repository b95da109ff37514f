"""How the reference backend's tensor parallel ranks exchange numbers: torch.distributed, by gloo, or NCCL on CUDA.

One collective is enough: every rank gives its part and gets those of all, in rank order. Each then adds them up itself,
so that all ranks have the same bits.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from fgsnap.errors import UsageError
from fgsnap.kernels.ranks import RankLost, Ranks

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for one that says nothing, such as while it loads. One that has ended is noticed at once."""

COME = "come"  # the store's key for how many have come

ENDED_SECONDS = 0.1
"""A rank's connections break shortly before it has ended: so long, for rank 0 to say how, before that one ends too."""


class Group:
    """This process's place among the ranks.

    Args:
        ranks: which one it is.
        device: where the tensors are that it exchanges.

    Raises:
        UsageError: this process is in a group already, and torch has one a process.
        RankLost: one of the others has ended before all of them had come.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        if distributed.is_initialized():
            raise UsageError(
                "A second model cannot be loaded at a tensor parallel degree above 1.",
                "A process of torch belongs to one group of ranks, and this one does already.",
                "Let go of the first model, or load the second one in a process of its own.",
            )
        # The ranks are all on this host: nothing of theirs is to be reached from another.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        kind, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            store = _store(ranks)
            _await_all(ranks, store)
            distributed.init_process_group(
                kind,
                store=store,
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=TIMEOUT,
                device_id=device_id,
            )
        except RuntimeError as error:
            raise RankLost from error
        self.size = ranks.size
        leave = weakref.finalize(self, distributed.destroy_process_group)
        leave.atexit = False  # a process that ends takes its connections along; it waits for nobody

    def all(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, in rank order; these have one shape and dtype. RankLost when one does not answer."""
        parts = list(torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device))
        if x.numel():
            try:
                distributed.all_gather(parts, x.contiguous())
            except RuntimeError as error:
                time.sleep(ENDED_SECONDS)
                raise RankLost from error
        return parts

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in rank order and float32, rounded once to x's dtype."""
        first, *others = self.all(x)
        total = first.float()
        for other in others:
            total += other
        return total.to(x.dtype)


def _await_all(ranks: Ranks, store: Any) -> None:
    """Wait until all ranks have come. The store too would wait, but hold signals up, and for one that has ended too."""
    come = store.add(COME, 1)
    while come < ranks.size:
        if ranks.lost():
            raise RankLost
        time.sleep(0.01)
        come = store.add(COME, 0)


def _store(ranks: Ranks) -> Any:
    """Where the ranks tell one another how they are to be reached."""
    if ranks.meeting is None:
        return torchrun_store()
    # By its descriptor: the file has no name, so nobody else can open it, and it goes with the last process.
    return distributed.FileStore(f"/proc/self/fd/{ranks.meeting}", ranks.size)


@functools.cache  # it stays as long as this process does: in rank 0 it may be what serves the others
def torchrun_store() -> Any:
    """The store of those that torchrun has started together, at the address in their environment.

    When torchrun starts them anew, it may be the same one, so each start has keys of its own.
    """
    store, _, _ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    return distributed.PrefixStore(f"fgsnap/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
