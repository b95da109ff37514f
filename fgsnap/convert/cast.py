"""Casts between the dtypes of weights, in numpy, exact or rounded to nearest even. bfloat16 is its bits in uint16.

A finite weight that the narrower dtype cannot hold is an error, never an infinity.
"""

from __future__ import annotations

import numpy as np

from fgsnap.convert.rules import Array
from fgsnap.convert.source import NUMPY_DTYPES
from fgsnap.errors import SourceError
from fgsnap.spec import DType

_CHUNK = 1 << 18  # elements whose float32 form stays in the processor's cache


def cast(data: Array, source: DType, out: Array, target: DType, label: str) -> None:
    """Write ``data`` of dtype ``source`` into ``out`` as ``target``; both are contiguous and of one size.

    Args:
        data: the values.
        source: their dtype.
        out: where they go.
        target: the dtype to go to.
        label: names the tensor in an error.
    """
    flat, into = data.reshape(-1), out.reshape(-1)
    assert into.base is not None or into is out, "out must be contiguous"
    if source == target:
        np.copyto(into, flat)
        return
    for start in range(0, flat.size, _CHUNK):
        part = _to_float32(flat[start : start + _CHUNK], source)
        _from_float32(part, into[start : start + _CHUNK], target, label)


def _to_float32(data: Array, source: DType) -> Array:
    if source == "bfloat16":
        wide: Array = np.left_shift(data.astype(np.uint32), 16).view(np.float32)
    else:
        wide = data.astype(NUMPY_DTYPES["float32"], copy=False)
    return wide


def _from_float32(data: Array, out: Array, target: DType, label: str) -> None:
    if target == "float32":
        np.copyto(out, data)
        return
    if target == "float16":
        with np.errstate(over="ignore"):
            np.copyto(out, data, casting="same_kind")
        infinite = np.isinf(out)
    else:
        np.copyto(out, _bfloat16_bits(data))
        infinite = (out & 0x7FFF) == 0x7F80
    if infinite.any() and np.isfinite(data[infinite]).any():
        largest = float(np.abs(data[np.isfinite(data)]).max())
        raise SourceError(
            f"{label} does not fit {target}.",
            f"It holds {largest:g}, which would become infinite.",
            "Choose a wider dtype with --dtype.",
        )


def _bfloat16_bits(data: Array) -> Array:
    """The upper halves of the float32 bits, rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    narrow: Array = rounded.astype(np.uint16)
    nan = np.isnan(data)
    if nan.any():
        narrow[nan] = (bits[nan] >> 16) | 0x40
    return narrow
