"""Packing rows into the layout that a target's kernels read; ``fgsnap.snapshot.packing`` defines and undoes it."""

from __future__ import annotations

import numpy as np

from fgsnap.convert.rules import Array
from fgsnap.errors import UsageError
from fgsnap.snapshot import PANEL_ROWS, Layout

TARGETS: dict[str, Layout] = {"generic": "row", "cpu": "words32"}
"""How the matrices of a snapshot lie that is made for a target; every backend reads both."""


def checked_target(target: str) -> Layout:
    """The layout of the target's matrices, or UsageError."""
    if target not in TARGETS:
        raise UsageError(f"There is no target {target!r}.", "", f"Choose one of {', '.join(TARGETS)} with --target.")
    return TARGETS[target]


def packed(rows: Array) -> Array:
    """Contiguous ``rows`` [..., R, C] of 2 or 4 bytes a value as words32 panels.

    uint32 [..., ceil(R / 32), words a row, 32].
    """
    words: Array = rows.view(np.uint32)
    step = PANEL_ROWS["words32"]
    *stack, height, width = words.shape
    missing = -height % step
    if missing:
        words = np.concatenate([words, np.zeros((*stack, missing, width), words.dtype)], axis=-2)
    panels: Array = np.ascontiguousarray(words.reshape(*stack, -1, step, width).swapaxes(-1, -2))
    return panels
