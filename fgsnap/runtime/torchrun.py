"""Ranks that torchrun has started: which one this process is, and how rank 0 gets a pipe to each of the others.

torchrun tells each process its rank, how many there are, and where they find a store for short messages. Rank 0 says
there under which name it listens until the others have come. Each end makes sure that the other is of its own user.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from typing import NamedTuple

from fgsnap.runtime.worker import ENDING

MEETING = "leader"  # the store's key for that name
RANK_BYTES = 4


class Place(NamedTuple):
    """Which of how many processes this one is."""

    rank: int
    size: int


def place() -> Place | None:
    """This process's place among those that torchrun has started; None where it has not started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def follows() -> bool:
    """Whether torchrun has started this process as another rank than 0."""
    here = place()
    return here is not None and here.rank > 0


def on_one_host() -> bool:
    """Whether all the processes that torchrun has started are on this host."""
    return os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def pipes_to_others(size: int) -> list[tuple[int, socket.socket]]:
    """Each other rank and rank 0's pipe to it; waits until all of them have come."""
    from fgsnap.kernels.reference_ranks import torchrun_store

    pipes: list[tuple[int, socket.socket]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # to a name that the kernel chooses, which is in no directory
        listener.listen(size)
        torchrun_store().set(MEETING, listener.getsockname())
        while len(pipes) < size - 1:
            pipe, _ = listener.accept()
            if _of_own_user(pipe):
                pipes.append((int.from_bytes(pipe.recv(RANK_BYTES)), pipe))
            else:
                pipe.close()
    return pipes


def pipe_to_leader(rank: int) -> socket.socket:
    """The pipe from rank 0, once that is there. From then on this process leaves it to rank 0 when to end.

    Raises:
        RankLost: rank 0 has ended meanwhile.
    """
    from fgsnap.kernels.ranks import RankLost
    from fgsnap.kernels.reference_ranks import torchrun_store

    store = torchrun_store()
    while not store.check([MEETING]):  # waiting in the store itself would hold signals up
        time.sleep(0.01)
    pipe = socket.socket(socket.AF_UNIX)
    try:
        pipe.connect(store.get(MEETING))
        if not _of_own_user(pipe):
            raise RankLost
        pipe.sendall(rank.to_bytes(RANK_BYTES))
    except OSError as error:
        raise RankLost from error
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    return pipe


def _of_own_user(pipe: socket.socket) -> bool:
    """Whether the process at the other end is this one's user's."""
    credentials = struct.Struct("3i")
    _, user, _ = credentials.unpack(pipe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return bool(user == os.getuid())
