"""The tensor parallel ranks of one host, a process each.

Rank 0 is the engine's own process: it schedules, samples, and tells the others of every batch before it computes it.
They compute the same forward on their parts of the weights and of the KV cache, and meet it in the backend's sums.
Rank 0 forks them, or torchrun has started all of them. A rank that ends makes the others fail at once, and the engine's
process with them; the service then starts it anew, as after any crash.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from fgsnap.errors import FgsnapError, HostError, UsageError
from fgsnap.kernels.choose import cuda_devices, settled_device
from fgsnap.kernels.library import default_threads
from fgsnap.kernels.ops import Batch
from fgsnap.kernels.ranks import RankLost, Ranks, rank_memory
from fgsnap.layout import check_tp, possible_tp
from fgsnap.runtime import torchrun, wire
from fgsnap.runtime.decoder import Decoder, Sizes, load_decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.process import child, ended
from fgsnap.runtime.startup import collect_garbage
from fgsnap.runtime.worker import die_with
from fgsnap.snapshot import Snapshot

LEADER_SECONDS = 1.0  # what fails in one rank has most likely failed in rank 0 too, which then ends within this time


class _Step(msgspec.Struct, frozen=True, array_like=True):
    """ops.Batch as it travels."""

    tokens: list[int]
    positions: list[int]
    starts: list[int]
    lengths: list[int]
    block_tables: list[list[int]]
    rows: list[int]


class Follower(NamedTuple):
    """Another rank as rank 0 holds it.

    Attributes:
        rank: which one.
        pipe: tells it of sizes and batches.
        wait: blocks until it has ended, and says how; None: because rank 0 let go of it.
    """

    rank: int
    pipe: socket.socket
    wait: Callable[[], str | None]


_encoder = msgspec.msgpack.Encoder(enc_hook=list)  # a batch's sequences may be of any kind, such as ranges
_decode_sizes = msgspec.msgpack.Decoder(Sizes).decode
_decode_step = msgspec.msgpack.Decoder(_Step).decode


def settled_degree(snapshot: Snapshot, options: EngineOptions) -> int:
    """The degree to serve at: the one asked for or that torchrun has started, else the snapshot's own.

    Where the host has fewer CUDA devices, or on the CPU fewer processors, than the snapshot has ranks, it is the
    largest degree that the model divides into and that the host has room for.

    Raises:
        UsageError: the model does not divide so, or torchrun has started something else.
        HostError: there are not as many CUDA devices as ranks.
    """
    spec, own, launched = snapshot.manifest.spec, snapshot.manifest.tp, torchrun.place()
    asked = options.tp if launched is None else _launched_degree(launched.size, options.tp)
    on_cuda = settled_device(options.backend, options.device).startswith("cuda")
    if asked is None:
        room = max(1, cuda_devices() if on_cuda else options.threads or default_threads())
        return own if own <= room else max(possible_tp(spec, room))
    check_tp(spec, asked)
    if on_cuda and asked > 1 and asked > cuda_devices():
        raise HostError(
            f"Tensor parallel degree {asked} needs {asked} CUDA devices.",
            f"torch finds {cuda_devices()} on this host.",
            "Lower --tp, or use --device cpu.",
        )
    return asked


def _launched_degree(size: int, asked: int | None) -> int:
    if asked not in (None, size):
        raise UsageError(
            f"torchrun has started {size} ranks, not {asked}.",
            "Each of its processes is a tensor parallel rank.",
            f"Leave --tp out, or use torchrun --nproc-per-node {asked}.",
        )
    if not torchrun.on_one_host():
        raise UsageError(
            "torchrun has started ranks on several hosts.",
            "All tensor parallel ranks of fgsnap are on one.",
            f"Use torchrun --nnodes 1 --nproc-per-node {size}.",
        )
    return size


def load_as_chosen(snapshot: Snapshot, options: EngineOptions, lost: Callable[[], None] = lambda: None) -> Decoder:
    """The decoder that a user has chosen; at a degree above 1 the other ranks' processes with it.

    These are forked, so this process must have no threads yet. Where torchrun has started this process as another rank
    than 0, it does here what rank 0 tells it, and then ends.

    Args:
        lost: called once when another rank has ended, from a thread of its own.

    Raises:
        UsageError, HostError: see settled_degree.
        FgsnapError: whatever load_decoder raises.
        SystemExit: this was another rank than 0, and rank 0 has ended.
    """
    launched = torchrun.place()
    if launched is not None and launched.rank > 0:
        pipe = torchrun.pipe_to_leader(launched.rank)
        _follow(pipe, Ranks(*launched), snapshot, options)
        raise SystemExit(0)
    tp = settled_degree(snapshot, options)
    return _load(snapshot, options) if tp == 1 else _load_leading(snapshot, options, tp, lost)


def _load_leading(snapshot: Snapshot, options: EngineOptions, tp: int, lost: Callable[[], None]) -> Decoder:
    ranks, followers = _joined(tp) if torchrun.place() else _forked(snapshot, options, tp)

    def announce(message: Sizes | Batch) -> None:
        data = _frame(message)
        for follower in followers:
            # One that has ended is found out by who waits for it; the forward then fails in the sum.
            with contextlib.suppress(OSError):
                follower.pipe.sendall(data)

    ranks = ranks._replace(lost=_watch(followers, ranks, lost))
    return _load(snapshot, options, ranks, announce=announce)


def _joined(tp: int) -> tuple[Ranks, list[Follower]]:
    """The ranks that torchrun has started, once they have come."""
    followers = [Follower(rank, pipe, functools.partial(_closed, pipe)) for rank, pipe in torchrun.pipes_to_others(tp)]
    return Ranks(0, tp), followers


def _closed(pipe: socket.socket) -> str:
    with contextlib.suppress(OSError):
        pipe.recv(1)  # a follower says nothing; this returns when it has ended
    return "has ended"


def _forked(snapshot: Snapshot, options: EngineOptions, tp: int) -> tuple[Ranks, list[Follower]]:
    # The file stays open as long as this process lives: torch may look into it at any time, and does when it ends.
    ranks = Ranks(0, tp, rank_memory(tp, snapshot.manifest.spec.width), os.memfd_create("fgsnap-ranks"))
    return ranks, [_fork(ranks._replace(rank=rank), snapshot, options) for rank in range(1, tp)]


def _fork(ranks: Ranks, snapshot: Snapshot, options: EngineOptions) -> Follower:
    ours, theirs = socket.socketpair()
    leader = os.getpid()

    def be() -> int:
        ours.close()
        if die_with(leader):
            _follow(theirs, ranks, snapshot, options)
        return 0

    pid = child(be, f"tensor parallel rank {ranks.rank}")
    theirs.close()
    return Follower(ranks.rank, ours, functools.partial(_reaped, pid))


def _reaped(pid: int) -> str | None:
    with contextlib.suppress(ChildProcessError):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return ended(code) if code else None
    return None


def _watch(followers: list[Follower], ranks: Ranks, lost: Callable[[], None]) -> Callable[[], bool]:
    """Have a thread of this process wait for each follower. The first one that is lost takes the others with it.

    What this returns tells whether one is.
    """
    first = threading.Lock()

    def watch(rank: int, wait: Callable[[], str | None]) -> None:
        how = wait()
        if how is not None and first.acquire(blocking=False):
            print(f"fgsnap: tensor parallel rank {rank} {how}.", file=sys.stderr, flush=True)
            ranks.give_up()
            lost()

    for rank, _, wait in followers:
        threading.Thread(target=watch, args=(rank, wait), name="watch-rank", daemon=True).start()
    return first.locked


def _follow(pipe: socket.socket, ranks: Ranks, snapshot: Snapshot, options: EngineOptions) -> None:
    """Compute every batch that comes, until rank 0 is gone.

    Raises:
        FgsnapError: what befell this rank, if rank 0 does not end of it too.
    """
    messages, ranks = _messages(pipe), ranks._replace(lost=functools.partial(_is_closed, pipe))
    try:
        decoder = _load(snapshot, options, ranks, sizes=lambda: _sizes(messages))
        collect_garbage()
        for body in messages:
            step = _decode_step(body)
            decoder.forward(Batch(*(getattr(step, name) for name in Batch._fields)))
    except FgsnapError:
        if not _ends(pipe):
            raise


def _messages(pipe: socket.socket) -> Iterator[bytes]:
    """What the other end says, until it is closed."""
    buffer = wire.FrameBuffer()
    while data := pipe.recv(1 << 20):
        yield from buffer.feed(data)


def _sizes(messages: Iterator[bytes]) -> Sizes:
    for body in messages:
        return _decode_sizes(body)
    raise RankLost


def _is_closed(pipe: socket.socket) -> bool:
    """Whether the other end is closed; what it has said before stays to be read."""
    try:
        return not pipe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _ends(pipe: socket.socket) -> bool:
    """Whether the other end is closed now or soon."""
    pipe.settimeout(LEADER_SECONDS)
    with contextlib.suppress(TimeoutError):
        while pipe.recv(1 << 20):
            pass
        return True
    return False


def _load(
    snapshot: Snapshot,
    options: EngineOptions,
    ranks: Ranks | None = None,
    *,
    sizes: Callable[[], Sizes] | None = None,
    announce: Callable[[Sizes | Batch], None] | None = None,
) -> Decoder:
    threads = options.threads
    if ranks is not None:
        threads = max(1, (threads or default_threads()) // ranks.size)
    return load_decoder(
        snapshot,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        kv_memory=options.kv_memory,
        max_length=options.max_model_len,
        threads=threads,
        ranks=ranks,
        sizes=sizes,
        announce=announce,
    )


def _frame(message: object) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body
