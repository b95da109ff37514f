"""What the server process and the engine worker say to each other: msgpack frames on one socket pair.

A frame is a 4-byte little-endian length and a msgpack-encoded message. Both ends are fgsnap's own processes; the
length is capped all the same, so that a broken peer cannot ask for unbounded memory.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

from collections.abc import Iterator

import msgspec

from fgsnap.runtime.options import BudgetSource, EngineOptions
from fgsnap.runtime.request import EngineStats, Request, Step

MAX_FRAME = 64 << 20


class Begin(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message: what to serve. ``id`` is the snapshot's; a worker that starts later must find the same one."""

    snapshot: str
    id: str
    engine: EngineOptions = EngineOptions()
    verify: str = "manifest"


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop now; the parent has drained or given up."""


class Phase(msgspec.Struct, frozen=True, tag=True):
    """One part of start-up: its name and its CLOCK_MONOTONIC begin and end in seconds, comparable across processes."""

    name: str
    begin: float
    end: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The canary matched (or was switched off, as ``canary`` says); requests are served from now on.

    ``setting`` is what the backend computes with, and ``reason`` why it was chosen; ``budget_source`` is where
    ``token_budget`` comes from.
    """

    backend: str
    device: str
    setting: str
    reason: str
    canary: str
    max_length: int
    kv_blocks: int
    block_size: int
    token_budget: int
    budget_source: BudgetSource = "default"


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step produced, and the engine's state after it."""

    step: Step
    stats: EngineStats


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A submitted request that this engine does not take; fields as errors.RequestError."""

    request: str
    what: str
    why: str
    next_step: str
    status: int
    param: str
    code: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot start or go on; fields as errors.FgsnapError."""

    what: str
    why: str
    next_step: str
    exit_code: int


ToWorker = Begin | Submit | Abort | Stop
FromWorker = Phase | Ready | Outputs | Refused | Failed

_encoder = msgspec.msgpack.Encoder()
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def frame(message: ToWorker | FromWorker) -> bytes:
    """The message with its length in front."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


class FrameBuffer:
    """Bytes as they arrive from a socket, given back as whole frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add ``data`` and yield the body of every frame that is now complete. ValueError on an absurd length."""
        self._bytes += data
        while len(self._bytes) >= 4:
            length = int.from_bytes(self._bytes[:4], "little")
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
            if len(self._bytes) < 4 + length:
                return
            body = bytes(self._bytes[4 : 4 + length])
            del self._bytes[: 4 + length]
            yield body
