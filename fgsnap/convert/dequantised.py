"""Quantised checkpoints as plain ones: a source around another, which decodes the rows that are asked for.

    fp8, compressed-tensors    a byte an element (e4m3), times a scale of the tensor, of the row or of a block
    mxfp4                      half a byte an element (e2m1), times a power of two for every 32 of a row

What is quantised, the tensors themselves say: their dtype, and the scales beside them. Scales of activations are left
out, for activations are not quantised here. Values are those of transformers' own dequantisation: FP8 is multiplied in
float32 and rounded once, MXFP4 is exact in bfloat16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from fgsnap.convert.cast import cast
from fgsnap.convert.quantisation import Block, quantisation
from fgsnap.convert.rules import Array, Shape
from fgsnap.convert.source import AGAIN, NUMPY_DTYPES, OtherTensor, Source, SourceTensor, stated_dtype
from fgsnap.errors import SourceError
from fgsnap.spec import DType

SCALES = ("_scale_inv", "_scale")
"""Endings of an FP8 tensor's scales; whatever their name, they are multiplied by."""
ACTIVATIONS = ("input_scale", "activation_scale")
EXPONENTS = ("F8_E8M0", "U8")
"""Scales that are powers of two, a biased exponent each: as safetensors names them, and as plain bytes."""
GROUP = 32
"""Elements that share an MXFP4 scale."""
LARGEST = 252
"""The largest MXFP4 scale with which the largest code, 6, is a finite bfloat16."""
_CHUNK = 1 << 18  # elements that are decoded at a time


class _Decoded(NamedTuple):
    """A tensor as it is offered, the tensors that it is made of, and what decodes rows of it."""

    tensor: SourceTensor
    parts: tuple[str, ...]
    rows: Callable[[int, int], Array]


def dequantised(source: Source) -> Source:
    """``source``, or where its config.json says that it is quantised, its plain numbers.

    Raises:
        UnsupportedModel: it is quantised in a way that fgsnap does not read.
        SourceError: scales do not fit their tensor.
    """
    found = quantisation(source.config)
    if found is None:
        return source
    decoded = _mxfp4(source) if found.method == "mxfp4" else _fp8(source, found.block)
    return Dequantised(source, found.method, decoded)


class Dequantised:
    """``source`` with the tensors of ``decoded`` in place of their parts."""

    def __init__(self, source: Source, method: str, decoded: Iterator[_Decoded]) -> None:
        self._source = source
        self._decoded = {each.tensor.name: each for each in decoded}
        parts = {part for each in self._decoded.values() for part in each.parts}
        plain = {name: tensor for name, tensor in source.tensors.items() if name not in parts}
        self.label, self.revision, self.config = source.label, source.revision, source.config
        self.kind: Literal["hf", "gguf"] = source.kind
        self.default_dtype: DType | None = source.default_dtype
        self.traffic = source.traffic
        self.dequantised: tuple[str, ...] = (method,)
        self.tensors: dict[str, SourceTensor] = plain | {name: each.tensor for name, each in self._decoded.items()}
        self.others: dict[str, OtherTensor] = {n: other for n, other in source.others.items() if n not in parts}

    def rows(self, name: str, start: int, stop: int) -> Array:
        found = self._decoded.get(name)
        return found.rows(start, stop) if found else self._source.rows(name, start, stop)

    def text_files(self) -> dict[str, bytes]:
        return self._source.text_files()

    def file_digests(self, go_on: Callable[[], None]) -> dict[str, str]:
        return self._source.file_digests(go_on)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()


# FP8.


def _fp8(source: Source, block: Block | None) -> Iterator[_Decoded]:
    """Every FP8 tensor with scales beside it."""
    dtype = stated_dtype(source.config) or "bfloat16"
    for name, other in source.others.items():
        scale = next((name + ending for ending in SCALES if _is_scale(source, name + ending)), None)
        if other.dtype != "F8_E4M3" or scale is None:
            continue
        size = _block(source, name, scale, block)
        activations = tuple(name.removesuffix("weight") + ending for ending in ACTIVATIONS)
        tensor = SourceTensor(name, dtype, other.shape)
        yield _Decoded(tensor, (name, scale, *activations), partial(_fp8_rows, source, tensor, scale, size))


def _is_scale(source: Source, name: str) -> bool:
    return name in source.tensors or (name in source.others and source.others[name].dtype in EXPONENTS)


def _block(source: Source, name: str, scale: str, stated: Block | None) -> Block:
    """The rows and columns that share a scale, as the shape of the scales tells."""
    shape = source.others[name].shape
    grid = (source.tensors.get(scale) or source.others[scale]).shape
    if len(shape) == 2:
        rows, columns = shape
        if math.prod(grid) == 1:
            return rows, columns
        if grid in ((rows,), (rows, 1)):
            return 1, columns
        if stated is not None and grid == (-(-rows // stated[0]), -(-columns // stated[1])):
            return min(stated[0], rows), min(stated[1], columns)
    raise SourceError(
        f"The scales {scale!r} do not fit {name!r}.",
        f"The weights are {list(shape)}, the scales {list(grid)}, blocks are {list(stated or ())}.",
        "Check that config.json and the weights belong together.",
    )


def _fp8_rows(source: Source, tensor: SourceTensor, scale: str, block: Block, start: int, stop: int) -> Array:
    codes = source.rows(tensor.name, start, stop)
    out: Array = np.empty(codes.shape, NUMPY_DTYPES[tensor.dtype])
    columns = codes.shape[1]
    step = max(1, _CHUNK // max(1, columns))
    for low in range(start, stop, step):
        high = min(low + step, stop)
        first, last = low // block[0], (high - 1) // block[0] + 1
        grid = np.repeat(_scales(source, scale, first, last), block[1], axis=1)[:, :columns]
        values: Array = np.take(_e4m3(), codes[low - start : high - start])
        with np.errstate(over="ignore", invalid="ignore"):
            values *= grid[np.arange(low, high) // block[0] - first]
        cast(values, "float32", out[low - start : high - start], tensor.dtype, tensor.name)
    return out


def _scales(source: Source, name: str, start: int, stop: int) -> Array:
    """Rows of the scales in float32, always with columns."""
    raw = source.rows(name, start, stop)
    wide: Array = np.empty(raw.shape, np.float32)
    if name in source.others:
        np.take(_e8m0(), raw, out=wide)
    else:
        cast(raw, source.tensors[name].dtype, wide, "float32", name)
    return wide.reshape(stop - start, -1)


@functools.cache
def _e4m3() -> Array:
    """What each FP8 code stands for (OCP 8-bit floating point, E4M3: no infinities, two NaNs)."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, codes & 7
    sizes = np.where(exponents == 0, np.ldexp(fractions / 8, -6), np.ldexp(1 + fractions / 8, exponents - 7))
    sizes[codes & 127 == 127] = np.nan
    values: Array = np.where(codes < 128, sizes, -sizes).astype(np.float32)
    return values


@functools.cache
def _e8m0() -> Array:
    """What each exponent stands for (OCP microscaling, E8M0: one NaN)."""
    scales: Array = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
    return scales


# MXFP4.


def _mxfp4(source: Source) -> Iterator[_Decoded]:
    """Every stack of blocks with scales beside it: one matrix of all its rows, under the name of the blocks."""
    for name, other in source.others.items():
        scale = name.removesuffix("_blocks") + "_scales"
        if not name.endswith("_blocks") or scale not in source.others:
            continue
        *rows, groups, _ = other.shape if len(other.shape) > 2 else (0, 0, 0)
        expected = OtherTensor("U8", (*rows, groups)), OtherTensor("U8", (*rows, groups, GROUP // 2))
        if (source.others[scale], other) != expected:
            raise SourceError(
                f"{name!r} and {scale!r} are no MXFP4 tensor.",
                f"They are {list(other.shape)} and {list(source.others[scale].shape)}; "
                f"a block has {GROUP // 2} bytes and one scale.",
                "Check that config.json and the weights belong together.",
            )
        tensor = SourceTensor(name, "bfloat16", (math.prod(rows), groups * GROUP))
        yield _Decoded(tensor, (name, scale), partial(_mxfp4_rows, source, name, scale, other.shape))


def _mxfp4_rows(source: Source, name: str, scale: str, shape: Shape, start: int, stop: int) -> Array:
    *_, groups, packed = shape
    each = math.prod(shape[1:-2])  # rows in an entry of the first axis
    first, last = start // each, -(-stop // each)
    part = slice(start - first * each, stop - first * each)
    codes = source.rows(name, first, last).reshape(-1, groups, packed)[part]
    scales: Array = source.rows(scale, first, last).reshape(-1, groups, 1)[part].astype(np.uint16)
    if scales.max(initial=0) > LARGEST:
        raise SourceError(
            f"{scale!r} holds the scale 2**{scales.max() - 127}.",
            "Times the largest code, which is 6, that is no finite bfloat16.",
            AGAIN,
        )
    out: Array = np.empty(codes.shape, "<u4")
    step = max(1, _CHUNK // max(1, groups * packed))
    for low in range(0, len(codes), step):
        out[low : low + step] = np.take(_pairs(), scales[low : low + step] << 8 | codes[low : low + step])
    return out.reshape(len(codes), groups * packed).view("<u2")


@functools.cache
def _pairs() -> Array:
    """The two bfloat16 that each scale and byte of codes stand for (OCP microscaling, MXFP4): low half first.

    E2M1 has a sign, two bits of exponent and one of fraction. Each value is a bfloat16, so its float32 has none but
    zeros behind the upper half.
    """
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values: Array = _e8m0()[: LARGEST + 1, None] * np.concatenate([sizes, -sizes])
    halves = values.view(np.uint32) >> 16
    byte = np.arange(256)
    pairs: Array = (halves[:, byte & 15] | halves[:, byte >> 4] << 16).reshape(-1).astype("<u4")
    return pairs
