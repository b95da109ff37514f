"""A contestant's processes: started, stopped for a while, looked at and ended as one group."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

END_SECONDS = 20.0
ROLLUP = ("Rss", "Pss", "Pss_Anon", "Pss_File", "Anonymous", "Shared_Clean")


class Launch(NamedTuple):
    """A command, and what it wants added to the process environment."""

    command: list[str]
    settings: Mapping[str, str] = {}


class Ended(Exception):
    """A contestant has ended by itself; says what it wrote last."""


class Group:
    """A process and all that it starts, in a session of their own.

    Args:
        launch: what to start.
        log: gets what it writes to stderr, and to stdout unless ``talks``.
        talks: stdin and stdout are pipes to this process.
    """

    def __init__(self, launch: Launch, log: Path, *, talks: bool = False) -> None:
        self._log = log
        with log.open("wb") as file:
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **launch.settings},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise Ended if the process has ended."""
        if self.process.poll() is not None:
            words = " ".join(self._log.read_text(errors="replace").split())[-400:]
            raise Ended(f"ended with code {self.process.returncode}: {words}")

    def pause(self) -> None:
        """Let it take no CPU time, nor spin, until ``resume``: others are measured now."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def memory(self) -> dict[str, int]:
        """Bytes of all its processes together; where they share a page, Pss counts it once and Rss each time."""
        found = [rollup(pid) for pid in members(self.process.pid)]
        return {name: sum(each.get(name, 0) for each in found) for name in ROLLUP}

    def peak(self) -> int:
        """The most resident bytes that each of its processes has had, added up."""
        return sum(high_water(pid) for pid in members(self.process.pid))

    def close(self) -> None:
        """End it: with SIGTERM, and after a while with SIGKILL."""
        with suppress(ProcessLookupError):
            self.resume()
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
    return found


def rollup(pid: int) -> dict[str, int]:
    """/proc/PID/smaps_rollup in bytes; empty when the process has just ended."""
    return _table(Path(f"/proc/{pid}/smaps_rollup"))


def high_water(pid: int) -> int:
    """VmHWM in bytes; 0 when the process has just ended."""
    return _table(Path(f"/proc/{pid}/status")).get("VmHWM", 0)


def _table(path: Path) -> dict[str, int]:
    """The rows "Name:  123 kB" of a file in /proc, in bytes."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if len(row) == 3 and row[2] == "kB"}
