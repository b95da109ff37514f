"""A GGUF file as a source: header parsed here with care, blocks dequantised by the ``gguf`` library, row by row.

The header is read with Python integers, each checked against what is left of the file, before anything of that size is
allocated or mapped. The metadata becomes a Hugging Face style config (``gguf_config``), so that the families need not
know GGUF. The tensors keep GGUF's names, and their rows GGUF's order (pairs side by side in some architectures), which
the family's rules undo. A stack of matrices is offered as one matrix of all their rows.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fgsnap.convert.gguf_config import ARCHITECTURES, FROM_ORIGINAL, config
from fgsnap.convert.source import (
    AGAIN,
    LOCAL,
    NUMPY_DTYPES,
    OtherTensor,
    SourceTensor,
    Traffic,
    digest,
    map_file,
    refuse_changed,
    show,
    stamps,
)
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import DType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 100_000
MAX_KEYS = 10_000
MAX_NAME_BYTES = 1024
MAX_LABEL = 200
MAX_ARRAY = 1 << 22
MAX_VECTOR = 1 << 16
PIECE = 1 << 20
ARRAY, STRING = 9, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = {"I8", "I16", "I32", "I64", "F64"}
UNQUANTISED: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Place(NamedTuple):
    """Where a tensor lies, and in which ggml type, whose blocks of ``block`` elements take ``block_bytes``."""

    offset: int
    type: str
    block: int
    block_bytes: int


class Gguf:
    """One GGUF file, open for reading.

    llama.cpp stores the norms of some architectures as 1 + w, in float32. The one is taken off again, which gives the w
    of the checkpoint, but for what 1 + w had no bits for.
    """

    kind: Literal["hf", "gguf"] = "gguf"
    revision: str | None = None
    traffic: Traffic | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamps = stamps([path])
        self._map = _map(path)
        header = _Header(self._map, path.name)
        self.metadata = header.metadata
        self.label = _model_name(header.metadata)
        self.tensors, self.others, self._places = header.tensors, header.others, header.places
        self.default_dtype: DType | None = _default_dtype(self._places)
        self.dequantised = tuple(sorted({place.type for place in self._places.values()} - {*UNQUANTISED}))
        _check_whole_model(path.name, self.metadata)
        _check_types(path.name, self._places)
        self._norms_plus_one = _norms_plus_one(path.name, self.metadata, self.tensors)
        self.config = config(self.metadata, self.tensors, self._vector)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        tensor, place = self.tensors[name], self._places[name]
        assert 0 <= start <= stop <= tensor.shape[0]
        inner = tensor.shape[1:]
        width = math.prod(inner)
        row_bytes = width // place.block * place.block_bytes
        begin, count = place.offset + start * row_bytes, (stop - start) * row_bytes
        raw: np.ndarray[Any, Any] = np.frombuffer(self._map, np.uint8, count, begin)
        rows: np.ndarray[Any, Any]
        if place.type in UNQUANTISED:
            rows = raw.view(NUMPY_DTYPES[tensor.dtype]).reshape(stop - start, *inner)
        else:
            rows = _dequantise(raw.reshape(stop - start, row_bytes), place).reshape(stop - start, *inner)
        if name in self._norms_plus_one:
            rows = rows - np.float32(1)
        return rows

    def text_files(self) -> dict[str, bytes]:
        from fgsnap.convert import gguf_tokenizer

        return {"config.json": _json(self.config), **gguf_tokenizer.text_files(self.metadata, self.path.name)}

    def file_digests(self, go_on: Callable[[], None]) -> dict[str, str]:
        return {"model.gguf": digest(self.path, go_on)}

    def check_unchanged(self) -> None:
        refuse_changed(self._stamps)

    def close(self) -> None:
        """Nothing to do: the file is closed already, and the map goes with the last array over it."""

    def _vector(self, name: str) -> list[float] | None:
        """The values of a small tensor that says what config.json would; None where the file has none of that name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if len(tensor.shape) != 1 or tensor.shape[0] > MAX_VECTOR or self._places[name].type != "F32":
            raise SourceError(
                f"The tensor {name} has the shape {show(list(tensor.shape))} and the type {self._places[name].type}.",
                f"A row of at most {MAX_VECTOR} numbers in F32 is needed.",
                AGAIN,
            )
        values: list[float] = self.rows(name, 0, tensor.shape[0]).tolist()
        return values


def _norms_plus_one(label: str, metadata: dict[str, Any], tensors: dict[str, SourceTensor]) -> frozenset[str]:
    """The tensors that hold 1 + w."""
    if not ARCHITECTURES[metadata["general.architecture"]].norms_plus_one:
        return frozenset()
    norms = [tensor for tensor in tensors.values() if tensor.name.endswith("norm.weight")]
    rounded = [tensor.name for tensor in norms if tensor.dtype != "float32"]
    if rounded:
        raise UnsupportedModel(
            f"{label} holds the norm {show(rounded[0])} in {tensors[rounded[0]].dtype}.",
            "Its architecture stores norms as 1 + w, and in less than float32 the weight w is lost.",
            FROM_ORIGINAL,
        )
    return frozenset(tensor.name for tensor in norms)


def _model_name(metadata: dict[str, Any]) -> str:
    """The name that the file's metadata gives the model; LOCAL for none, or one that says where it was made."""
    name = metadata.get("general.name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_LABEL or not name.isprintable() or name != name.strip():
        return LOCAL
    return LOCAL if re.match(r"[/\\~.]|[A-Za-z]:|[a-z]+://", name) else name


class _Header:
    """A cursor over the header; every read is checked against the end of the file first."""

    def __init__(self, data: mmap.mmap, label: str) -> None:
        self.data = data
        self.label = label
        self.at = 0
        self.size = len(data)
        self._check_start()
        count, keys = self._number("Q"), self._number("Q")
        if count > MAX_TENSORS or keys > MAX_KEYS:
            raise self._bad(
                f"It claims {count} tensors and {keys} keys, above the limits {MAX_TENSORS} and {MAX_KEYS}."
            )
        self.metadata = self._read_metadata(keys)
        found = [self._tensor() for _ in range(count)]
        self.tensors: dict[str, SourceTensor] = {}
        self.places: dict[str, Place] = {}
        self.others: dict[str, OtherTensor] = {}
        self._place(found)

    def _check_start(self) -> None:
        if self._take(4) != MAGIC:
            raise self._bad("It does not start with the letters GGUF.")
        version = self._number("I")
        if version not in VERSIONS:
            why = "It is big-endian." if version & 0xFFFF == 0 else f"It has version {version}; known are 2 and 3."
            raise self._bad(why)

    def _read_metadata(self, keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in metadata:
                raise self._bad(f"The key {show(key)} occurs twice.")
            metadata[key] = self._value(self._number("I"), key)
        return metadata

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text(key)
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise self._bad(f"The key {show(key)} has the unknown type {kind}.")
        inner, count = self._number("I"), self._number("Q")
        least = 8 if inner == STRING else struct.calcsize(SCALARS.get(inner, "Q"))
        if count > MAX_ARRAY or count * least > self.size - self.at:
            raise self._bad(
                f"The key {show(key)} claims {count} values; the file or the limit {MAX_ARRAY} ends before."
            )
        if inner == STRING:
            return [self._text(key) for _ in range(count)]
        if inner not in SCALARS:
            raise self._bad(f"The key {show(key)} is an array of the unsupported type {inner}.")
        raw = self._take(count * least)
        return list(struct.unpack(f"<{count}{SCALARS[inner]}", raw))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """One entry of the tensor table: name, shape (rows first), ggml type, offset in the data section."""
        name = self._name()
        rank = self._number("I")
        if not 1 <= rank <= 4:
            raise self._bad(f"The tensor {show(name)} has {rank} dimensions.")
        shape = tuple(reversed([self._number("Q") for _ in range(rank)]))
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Settle where each tensor's bytes lie; all of them inside the file, none over another."""
        align = self.metadata.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
            raise self._bad(f"general.alignment is {show(align)}, not a power of two.")
        data = (self.at + align - 1) // align * align
        ends: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in found:
            if name in self.places:
                raise self._bad(f"The tensor {show(name)} occurs twice.")
            place = self._place_one(name, shape, kind, data + offset)
            length = math.prod(shape) // place.block * place.block_bytes
            if offset % align or place.offset + length > self.size:
                where = f"bytes {place.offset} to {place.offset + length}"
                raise self._bad(f"The tensor {show(name)} needs {where}; the file has {self.size}.")
            self.places[name] = place
            if place.type in NUMBERS:
                self.others[name] = OtherTensor(place.type, shape)
            else:
                rows = shape if len(shape) < 3 else (math.prod(shape[:-1]), shape[-1])
                self.tensors[name] = SourceTensor(name, UNQUANTISED.get(place.type, "float32"), rows)
            ends.append((place.offset, place.offset + length, name))
        ends.sort()
        for (_, end, before), (start, _, name) in pairwise(ends):
            if start < end:
                raise self._bad(f"The tensors {show(before)} and {show(name)} overlap.")

    def _place_one(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Place:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {member.value: member for member in GGMLQuantizationType}
        if kind not in known:
            raise self._bad(f"The tensor {show(name)} has the unknown type {kind}.")
        block, block_bytes = GGML_QUANT_SIZES[known[kind]]
        if not all(0 < size < 1 << 40 for size in shape) or shape[-1] % block or (block > 1 and len(shape) == 1):
            raise self._bad(f"The tensor {show(name)} of type {known[kind].name} has the shape {show(shape)}.")
        return Place(offset, known[kind].name, block, block_bytes)

    def _name(self) -> str:
        length = self._number("Q")
        if length > MAX_NAME_BYTES:
            raise self._bad(f"A name claims {length} bytes, above the limit of {MAX_NAME_BYTES}.")
        name = self._decode(self._take(length), "a name")
        if not name.isprintable():
            raise self._bad(f"The name {show(name)} has characters that no real name has.")
        return name

    def _text(self, key: str) -> str:
        return self._decode(self._take(self._number("Q")), key)

    def _decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._bad(f"The text of {show(what)} is not UTF-8.") from None

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self._bad(f"It ends inside its header: {count} bytes wanted at {self.at}, the file has {self.size}.")
        self.at += count
        return self.data[self.at - count : self.at]

    def _bad(self, why: str) -> SourceError:
        return SourceError(f"{self.label} is not a valid GGUF file.", why, AGAIN)


def _check_whole_model(label: str, metadata: dict[str, Any]) -> None:
    """Refuse, by name, what is no complete language model of an architecture that is read."""
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise SourceError(f"{label} is a GGUF file of type {show(kind)}, not a model.")
    if metadata.get("split.count", 0) not in (0, 1):
        raise SourceError(
            f"{label} is one part of a GGUF model split into {show(metadata['split.count'])}.",
            "fgsnap reads whole files.",
            "Merge the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{label} has the GGUF architecture {show(architecture)}.",
            f"From GGUF, fgsnap reads {', '.join(ARCHITECTURES)}.",
            FROM_ORIGINAL,
        )


def _check_types(label: str, places: dict[str, Place]) -> None:
    """Refuse a block type that the library cannot dequantise, before any work is done."""
    for place in {place.type: place for place in places.values() if place.type not in NUMBERS}.values():
        try:
            _dequantise(np.zeros((1, place.block_bytes), np.uint8), place)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{label} has tensors of the GGUF type {place.type}.",
                "The installed gguf library cannot dequantise it.",
                "Use a file of another quantisation, or a newer gguf library.",
            ) from None


def _default_dtype(places: dict[str, Place]) -> DType:
    """bfloat16 for anything quantised; otherwise what the matrices are stored in (norms are float32 in most files)."""
    types = {place.type for place in places.values()}
    if types <= {"F32"}:
        return "float32"
    return "float16" if types <= {"F32", "F16"} else "bfloat16"


def _dequantise(blocks: np.ndarray[Any, Any], place: Place) -> np.ndarray[Any, Any]:
    """Rows of blocks as float32, by the format's own library, in pieces: it needs as much again as it returns."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[place.type]
    width = blocks.shape[1] // place.block_bytes * place.block
    values: np.ndarray[Any, Any] = np.empty((len(blocks), width), np.float32)
    step = max(1, PIECE // width)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            values[start : start + step] = dequantize(blocks[start : start + step], kind)
    return values


def _map(path: Path) -> mmap.mmap:
    if path.stat().st_size < 24:
        raise SourceError(f"{path.name} is not a valid GGUF file.", "It is shorter than a GGUF header.", AGAIN)
    return map_file(path)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
