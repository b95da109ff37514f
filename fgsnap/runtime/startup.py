"""Start-up accounted for: phases that tile the time from exec to the first token, in both processes.

Every process marks the end of a phase, and the next begins at that very moment, so nothing can fall between two. The
worker's first phase begins where the server's ``interpreter`` ends: at the fork.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fgsnap.runtime.wire import Phase

BEFORE_FORK = "interpreter"
WAIT = "wait for engine"
IDLE = "idle"


class Clock:
    """The phases of one process so far."""

    def __init__(self, begin: float) -> None:
        self.phases: list[Phase] = []
        self.last = begin

    def mark(self, name: str) -> Phase:
        """End the phase that runs since the last mark, and name it. Two idle phases in a row are one."""
        begin, now = self.last, time.monotonic()
        if name == IDLE and self.phases and self.phases[-1].name == IDLE:
            begin = self.phases.pop().begin
        phase = Phase(name, begin, now)
        self.phases.append(phase)
        self.last = now
        return phase


def collect_garbage() -> None:
    """Begin to, at the end of a start that did not: what it made stays, and is left out of every search."""
    gc.freeze()
    gc.enable()


def process_start() -> float:
    """When this process was started, on the monotonic clock.

    The kernel tells it in ticks of 10 ms. Until now the process has had one thread that computed nearly all the time,
    so its CPU time places the start within the tick.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    tick = 1 / os.sysconf("SC_CLK_TCK")
    now = time.monotonic()
    earliest = now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks * tick)
    return min(max(now - time.process_time(), earliest), earliest + tick, now)


def critical_path(server: Sequence[Phase], worker: Sequence[Phase]) -> list[tuple[str, Phase]]:
    """(process, phase) from exec on, each beginning where the one before ends.

    It runs through the worker when the server had to wait for it, else through the server alone.
    """
    path = [("server", phase) for phase in server]
    at = next((i for i, phase in enumerate(server) if phase.name == WAIT), None)
    if at is None or not worker or worker[-1].end <= server[at].begin:
        return path
    before = [step for step in path if step[1].name == BEFORE_FORK]
    handover = Phase("handover", worker[-1].end, server[at].end)
    return [*before, *(("worker", phase) for phase in worker), ("server", handover), *path[at + 1 :]]


def report(server: Sequence[Phase], worker: Sequence[Phase], facts: dict[str, Any]) -> dict[str, Any]:
    """The start-up of this service as JSON; all times in seconds since exec."""
    origin = server[0].begin

    def row(process: str, phase: Phase) -> dict[str, Any]:
        return {
            "process": process,
            "name": phase.name,
            "begin": round(phase.begin - origin, 6),
            "end": round(phase.end - origin, 6),
        }

    return {
        "schema_version": 1,
        **facts,
        "ready_seconds": _end_of(server, WAIT, origin),
        "first_token_seconds": _end_of(server, "first token", origin),
        "phases": [row("server", phase) for phase in server] + [row("worker", phase) for phase in worker],
        "critical_path": [row(process, phase) for process, phase in critical_path(server, worker)],
    }


def _end_of(phases: Sequence[Phase], name: str, origin: float) -> float | None:
    return next((round(phase.end - origin, 6) for phase in phases if phase.name == name), None)


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step, so that who watches it never reads half."""
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    beside.replace(path)
