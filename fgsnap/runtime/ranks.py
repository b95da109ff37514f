"""The tensor parallel ranks of one host, a process each over shared memory.

Rank 0 is the engine's own process: it schedules, samples, and tells the others of every batch before it computes it.
They compute the same forward on their parts of the weights and of the KV cache, and meet it in the sums of
``kernels/csrc/ranks``. A rank that ends makes the others fail at once, and the engine's process with them; the service
then starts it anew, as after any crash.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from fgsnap.errors import UsageError
from fgsnap.kernels.library import available, default_threads
from fgsnap.kernels.ops import Batch
from fgsnap.kernels.ranks import Ranks, rank_memory
from fgsnap.runtime import wire
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.process import child, ended
from fgsnap.runtime.startup import collect_garbage
from fgsnap.runtime.worker import die_with
from fgsnap.snapshot import Snapshot


class Setup(msgspec.Struct, frozen=True):
    """What rank 0 has settled, and the others must have alike."""

    blocks: int
    block_size: int
    max_length: int


class _Step(msgspec.Struct, frozen=True, array_like=True):
    """ops.Batch as it travels."""

    tokens: list[int]
    positions: list[int]
    starts: list[int]
    lengths: list[int]
    block_tables: list[list[int]]
    rows: list[int]


class Follower(NamedTuple):
    """Another rank as rank 0 holds it."""

    rank: int
    pid: int
    pipe: socket.socket


_encoder = msgspec.msgpack.Encoder(enc_hook=list)  # a batch's sequences may be of any kind, such as ranges
_decode_setup = msgspec.msgpack.Decoder(Setup).decode
_decode_step = msgspec.msgpack.Decoder(_Step).decode


def settled_degree(snapshot: Snapshot, options: EngineOptions) -> int:
    """The degree to serve at: the one asked for, else the snapshot's own where there is a processor for each rank.

    Raises:
        UsageError: the snapshot cannot be opened at the degree that was asked for.
    """
    own = snapshot.manifest.tp
    if options.tp is None:
        able = options.backend != "reference" and options.device in ("auto", "cpu") and available()[0]
        return own if able and own <= (options.threads or default_threads()) else 1
    if options.tp not in (1, own):
        raise UsageError(
            f"This snapshot cannot be served at tensor parallel degree {options.tp}.",
            f"It was converted at degree {own}.",
            f"Use --tp {own}{' or --tp 1' * (own > 1)}, or convert the checkpoint at another degree.",
        )
    return options.tp


def load_as_chosen(snapshot: Snapshot, options: EngineOptions) -> Decoder:
    """The decoder that a user has chosen; at a degree above 1 the other ranks' processes with it.

    These are forked, so this process must have no threads yet.
    """
    tp = settled_degree(snapshot, options)
    return _load(snapshot, options, options.threads) if tp == 1 else _load_leading(snapshot, options, tp)


def _load_leading(snapshot: Snapshot, options: EngineOptions, tp: int) -> Decoder:
    memory = rank_memory(tp, snapshot.manifest.spec.width)
    threads = max(1, (options.threads or default_threads()) // tp)
    followers = [_fork(Ranks(rank, tp, memory), snapshot, options, threads) for rank in range(1, tp)]

    def announce(batch: Batch) -> None:
        data = _frame(batch)
        for follower in followers:
            # One that has ended is found out by who waits for it; the forward then fails in the sum.
            with contextlib.suppress(OSError):
                follower.pipe.sendall(data)

    ranks = Ranks(0, tp, memory)
    _watch(followers, ranks)
    decoder = _load(snapshot, options, threads, ranks, announce)
    setup = _frame(Setup(decoder.blocks, decoder.block_size, decoder.max_length))
    for follower in followers:
        with contextlib.suppress(OSError):
            follower.pipe.sendall(setup)
    return decoder


def _load(
    snapshot: Snapshot,
    options: EngineOptions,
    threads: int | None,
    ranks: Ranks | None = None,
    announce: Callable[[Batch], None] | None = None,
) -> Decoder:
    return load_decoder(
        snapshot,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        kv_memory=options.kv_memory,
        max_length=options.max_model_len,
        threads=threads,
        ranks=ranks,
        announce=announce,
    )


def _watch(followers: list[Follower], ranks: Ranks) -> None:
    """Have a thread of this process wait for each follower, tell how it ended, and make the others fail."""

    def wait(follower: Follower) -> None:
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(follower.pid, 0)
            how = ended(os.waitstatus_to_exitcode(status))
            print(f"fgsnap: tensor parallel rank {follower.rank} {how}.", file=sys.stderr, flush=True)
        ranks.give_up()

    for follower in followers:
        threading.Thread(target=wait, args=(follower,), name="watch-rank", daemon=True).start()


def _fork(ranks: Ranks, snapshot: Snapshot, options: EngineOptions, threads: int) -> Follower:
    ours, theirs = socket.socketpair()
    leader = os.getpid()

    def be() -> int:
        ours.close()
        try:
            if die_with(leader):
                _follow(theirs, ranks, snapshot, options, threads)
        finally:
            ranks.give_up()
        return 0

    pid = child(be, f"tensor parallel rank {ranks.rank}")
    theirs.close()
    return Follower(ranks.rank, pid, ours)


def _follow(pipe: socket.socket, ranks: Ranks, snapshot: Snapshot, options: EngineOptions, threads: int) -> None:
    """Compute every batch that comes, until the leader is gone."""
    buffer, decoder = wire.FrameBuffer(), None
    while data := pipe.recv(1 << 20):
        for body in buffer.feed(data):
            if decoder is None:
                setup = _decode_setup(body)
                decoder = load_decoder(
                    snapshot,
                    backend=options.backend,
                    device=options.device,
                    dtype=options.dtype,
                    blocks=setup.blocks,
                    block_size=setup.block_size,
                    max_length=setup.max_length,
                    threads=threads,
                    ranks=ranks,
                )
                collect_garbage()
            else:
                step = _decode_step(body)
                decoder.forward(Batch(*(getattr(step, name) for name in Batch._fields)))


def _frame(message: object) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body
