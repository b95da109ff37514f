"""What an idle service costs, and how soon it wakes up.

- CPU seconds of all processes of ``fgsnap serve`` on SmolLM2 while nobody asks, from the kernel's own counts;
- wake-up: microseconds from a request into the pipe of an idle engine's process until its first token is here, with a
  pause before each. The model costs nothing, so this is the way there and back, with a whole step in between.

    python benchmarks/idle.py [--rounds 200] [--seconds 10] [--output benchmarks/results]

The last line is JSON. Goals: no CPU; under 1 ms.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import arguments, finish, smollm2_gguf
from scheduler import EOS, Nothing

from fgsnap.bench.record import quantile, summary
from fgsnap.bench.server import serving
from fgsnap.runtime import wire
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.process import child
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.worker import Pipe, run

PAUSE = 0.02
READY = wire.Ready("native", "cpu", "", "", "", 1 << 20, 1 << 18, 16, 512)


def main() -> None:
    parser = arguments(__doc__, 200)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    processes = idle_cpu(options.seconds)
    taken = wake_ups(options.rounds)
    result = {
        "seconds": options.seconds,
        "cpu_seconds": processes,
        "wake_up_us": summary([1e6 * seconds for seconds in taken], 1),
        "wake_up_p95_us": round(1e6 * quantile(taken, 0.95), 1),
        "goals": {"wake_up_us": 1000},
    }
    finish("idle", result, options.output)


def idle_cpu(seconds: float) -> list[float]:
    """CPU seconds of each process of a service in so many seconds without a request; the least granule is 0.01."""
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = Path(scratch) / "snap"
        fgsnap = str(Path(sys.executable).with_name("fgsnap"))
        command = [fgsnap, "convert", str(smollm2_gguf()), "-o", str(snapshot), "--target", "cpu", "--no-canary"]
        subprocess.run(command, check=True, capture_output=True)
        with serving(snapshot, EngineOptions()) as server:
            server.wait_until_ready()
            time.sleep(1.0)
            (http,) = children(os.getpid())
            pids = [http, *children(http)]
            before = [cpu_seconds(pid) for pid in pids]
            time.sleep(seconds)
            return [round(cpu_seconds(pid) - was, 2) for pid, was in zip(pids, before, strict=True)]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wake_ups(count: int) -> list[float]:
    """Seconds until an idle engine's process has taken in a request and told its first token."""
    ours, theirs = socket.socketpair()
    pid = child(lambda: run(Pipe(theirs), lambda _: (engine(), READY), time.monotonic()), "engine")
    theirs.close()
    inbox, taken = messages(ours), []
    assert isinstance(next(inbox), wire.Ready)
    for number in range(count):
        time.sleep(PAUSE)
        request = Request(str(number), (1, 2, 3), SamplingParams(1, temperature=0.0))
        sent = time.perf_counter()
        ours.sendall(wire.frame(wire.Submit(request)))
        told = next(inbox)
        assert isinstance(told, wire.Outputs) and told.step.requests == [str(number)]
        taken.append(time.perf_counter() - sent)
    ours.sendall(wire.frame(wire.Stop()))
    os.waitpid(pid, 0)
    return taken


def engine() -> Engine:
    return Engine(Nothing(), eos_token_ids=(EOS,))


def messages(pipe: socket.socket) -> Iterator[wire.FromWorker]:
    buffer = wire.FrameBuffer()
    while data := pipe.recv(1 << 16):
        yield from map(wire.decode_from_worker, buffer.feed(data))


if __name__ == "__main__":
    main()
