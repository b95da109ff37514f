"""How long work over many bytes tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told (bytes done so far, bytes in all), from the thread that asked for the work."""


def part(progress: Progress | None, before: int, whole: int) -> Progress | None:
    """The Progress of one part of ``whole`` bytes of work, of which ``before`` are done when the part begins."""
    return None if progress is None else lambda done, _: progress(before + done, whole)


def counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function to be told the bytes of each part as it is done; it passes on the sum."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance
