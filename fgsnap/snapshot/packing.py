"""How the values of a stored tensor lie in its bytes: row after row, or packed as a backend likes to read them.

"row" is row-major. "words32" is for matrices whose rows are whole words of 4 bytes: one float32, or two bfloat16 or
float16. The rows are cut into panels of 32, the last one filled up with zero rows, and a panel holds word after word,
each of all its rows side by side. So a kernel that keeps one sum a row reads a matrix front to back, and never adds up
a register's lanes. ``docs/format.md`` defines both for a second implementer.
"""

from __future__ import annotations

import math
from array import array
from typing import Literal

from fgsnap.layout import Shape
from fgsnap.spec import DTYPE_BYTES, DType

Layout = Literal["row", "words32"]

WORD = 4
PANEL_ROWS: dict[Layout, int] = {"row": 1, "words32": 32}
"""Rows that lie together; a tensor's rows are filled up to a multiple of them."""


def fits(layout: Layout, shape: Shape, dtype: DType) -> bool:
    """Whether a tensor, a matrix or a stack of them, can lie in ``layout``.

    Every matrix of a packed stack fills its panels, and so do both halves of its rows: gates and ups of an expert.
    """
    if layout == "row":
        return True
    if len(shape) < 2 or shape[-1] * DTYPE_BYTES[dtype] % WORD:
        return False
    return len(shape) == 2 or shape[-2] % (2 * PANEL_ROWS[layout]) == 0


def packed_bytes(layout: Layout, shape: Shape, dtype: DType) -> int:
    """The bytes that a tensor takes, rows that fill up the last panel of each matrix included."""
    if layout == "row":
        return math.prod(shape) * DTYPE_BYTES[dtype]
    return math.prod(shape[:-2]) * _panels(shape[-2]) * panel_bytes(layout, shape, dtype)


def panel_bytes(layout: Layout, shape: Shape, dtype: DType) -> int:
    """The bytes of one panel of a matrix; of one row where the layout has no panels."""
    return PANEL_ROWS[layout] * math.prod(shape[max(1, len(shape) - 1) :]) * DTYPE_BYTES[dtype]


def file_shape(layout: Layout, shape: Shape, dtype: DType) -> Shape:
    """The row-major shape of the bytes as they lie: for words32 [..., panels, words, 32 rows, values a word]."""
    if layout == "row":
        return shape
    *stack, height, width = shape
    item = DTYPE_BYTES[dtype]
    return (*stack, _panels(height), width * item // WORD, PANEL_ROWS[layout], WORD // item)


def units(layout: Layout, shape: Shape, dtype: DType) -> Shape:
    """How many entries of each axis lie together: of words32 the rows of a panel, and in them the values of a word."""
    if layout == "row":
        return (1,) * len(shape)
    return (*(1 for _ in shape[:-2]), PANEL_ROWS[layout], WORD // DTYPE_BYTES[dtype])


def unpacked(panel: memoryview, start: int, stop: int) -> bytes:
    """Rows ``start:stop`` of one words32 panel, row-major. An array's stride is the quickest way without numpy."""
    words = array("I")
    words.frombytes(panel)
    step = PANEL_ROWS["words32"]
    return b"".join([words[row::step] for row in range(start, stop)])


def _panels(rows: int) -> int:
    return -(-rows // PANEL_ROWS["words32"])
