"""Work on bytes that goes on beside the thread that hands them out, and how much of it may wait."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

BEHIND = 32 << 20
"""Bytes that digests and disk may lag behind, over all files that are written at a time."""


class Backlog:
    """Bytes that are held until all work on them is done, bounded over all files; used by one thread.

    The digests of a file take as long as the disk, and one of them longer than the other, so neither waits for the
    others at the end of each slab, and those of several files go on side by side.
    """

    def __init__(self, most: int = BEHIND) -> None:
        self._most = most
        self._bytes = 0
        self._waiting: deque[tuple[int, list[Future[None]]]] = deque()

    def add(self, size: int, jobs: list[Future[None]]) -> None:
        """Take note of work on ``size`` bytes. Waits for the oldest while too much waits, and raises what it raised."""
        self._waiting.append((size, jobs))
        self._bytes += size
        while self._bytes > self._most:
            self._finish_oldest()

    def drain(self) -> None:
        """Wait until nothing is left to do."""
        while self._waiting:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        size, jobs = self._waiting.popleft()
        self._bytes -= size
        for job in jobs:
            job.result()
