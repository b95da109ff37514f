"""What ``fgsnap diff`` asks of conversion: how far numbers differ, and a checkpoint as one of the two sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np

from fgsnap.convert.cast import cast
from fgsnap.convert.cut_tokenizer import cut_tokenizer
from fgsnap.convert.opening import open_source
from fgsnap.convert.recipe import settle
from fgsnap.convert.rules import Array
from fgsnap.convert.source import NUMPY_DTYPES
from fgsnap.convert.text_section import text_section
from fgsnap.convert.weights import read_piece
from fgsnap.layout import Piece, Shape, logical_shapes
from fgsnap.snapshot import FileEntry
from fgsnap.snapshot.comparing import Form, Side, Values
from fgsnap.spec import DType


def measure(one: bytearray, one_dtype: DType, two: bytearray, two_dtype: DType) -> Values:
    """Count the numbers that differ: by their bits, or as float32, which holds all of both, where dtypes differ."""
    a: Array = np.frombuffer(one, NUMPY_DTYPES[one_dtype])
    b: Array = np.frombuffer(two, NUMPY_DTYPES[two_dtype])
    numbers = a.size
    if one_dtype == two_dtype:
        a, b = _different(a, b)
        a, b = _wide(a, one_dtype), _wide(b, two_dtype)
    else:
        a, b = _different(_wide(a, one_dtype), _wide(b, two_dtype))
    with np.errstate(invalid="ignore"):  # infinity less infinity
        gaps = np.abs(a.astype(np.float64) - b)
    return Values(numbers, a.size, float(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf).max(initial=0.0)))


def _different(a: Array, b: Array) -> tuple[Array, Array]:
    """Of two arrays of one dtype, the numbers whose bits differ."""
    bits = f"u{a.itemsize}"
    where = a.view(bits) != b.view(bits)
    return a[where], b[where]


def _wide(data: Array, dtype: DType) -> Array:
    wide: Array = np.empty(data.shape, np.float32)
    with np.errstate(invalid="ignore"):  # some processors say so of a NaN that signals
        cast(data, dtype, wide, "float32", "a weight")
    return wide


@contextmanager
def checkpoint(name: str, dtype: DType | None) -> Iterator[Side]:
    """A checkpoint as the model that converting it gives; read by its family's rules, without anything being written.

    Args:
        name: as ``open_source`` takes it.
        dtype: the cast that it would be converted with; None: that of ``convert`` without ``--dtype``.
    """
    with closing(open_source(name)) as source:
        recipe = settle(source, dtype or source.default_dtype)
        texts = source.text_files()
        files = texts | cut_tokenizer(texts)

        def read(tensor: str, start: Shape, extent: Shape, target: memoryview) -> None:
            stored = recipe.stored[tensor]
            box: Array = np.frombuffer(target, NUMPY_DTYPES[stored]).reshape(extent)
            read_piece(tensor, Piece(tensor, start, start, extent), box, stored, source.rows, recipe)

        yield Side(
            name=name,
            spec=recipe.spec,
            tensors={each: Form(recipe.stored[each], shape) for each, shape in logical_shapes(recipe.spec).items()},
            text=text_section(texts, source.config, recipe.spec.vocab_size),
            files={each: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for each, data in files.items()},
            read=read,
            read_file=files.__getitem__,
        )
        source.check_unchanged()
