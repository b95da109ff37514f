"""A Hugging Face checkpoint folder: safetensors files, their index, and the text files beside them.

Follows the format's own rules and refuses what the safetensors library would refuse or overlook: holes, overlaps, names
that occur twice, sizes that disagree, shard names that point elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fgsnap.convert.files import Files, LocalFiles
from fgsnap.convert.source import (
    AGAIN,
    NUMPY_DTYPES,
    PICKLED,
    SourceTensor,
    brief,
    digest,
    parse_json,
    pickled,
    read_json,
    read_text,
    refuse_changed,
    show,
    stamps,
)
from fgsnap.errors import SourceError
from fgsnap.spec import DTYPE_BYTES, DType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")

# Real headers stay far below these; the caps keep a hostile one from filling memory before it is refused.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 8

HEADERS_AT_ONCE = 8  # each of a shard on the Hub is two round trips

# The dtypes fgsnap computes with, and the bits an element takes for every dtype of the format.
USABLE: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)


class Folder:
    """A Hugging Face folder: config.json, safetensors shards, tokenizer files.

    Symbolic links are followed, for a Hub cache is made of them. The shards may lie elsewhere: ``files`` reads them.
    """

    kind: Literal["hf", "gguf"] = "hf"
    default_dtype: DType | None = None
    dequantised: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        *,
        label: str,
        revision: str | None = None,
        config_only: bool = False,
        files: Files | None = None,
    ) -> None:
        self.path = path
        self.label = label
        self.revision = revision
        self.files: Files = files or LocalFiles(path)
        self.traffic = self.files.traffic
        self._stamps = stamps(path / name for name in (*TEXT_FILES, INDEX))
        self.config = read_config(path)
        self.tensors: dict[str, SourceTensor] = {}
        self.others: dict[str, str] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._shards: list[str] = []
        if not config_only:
            self._read_headers(self._weight_map())

    def _weight_map(self) -> dict[str, str]:
        """Find the shards, which must all be there; returns the index's map, empty for a checkpoint of one file."""
        if self.files.has(SINGLE):
            self._shards = [SINGLE]
            return {}
        if not (self.path / INDEX).is_file():
            raise no_weights(self.path.name, [entry.name for entry in self.path.iterdir()])
        weight_map = weight_map_of(read_json(self.path / INDEX), INDEX)
        self._shards = sorted({*weight_map.values()})
        for shard in self._shards:
            if not self.files.has(shard):
                raise SourceError(
                    f"The shard {shard} is missing.",
                    f"{INDEX} lists {len(self._shards)} shards and the folder {self.path.name} lacks this one.",
                    "Download the checkpoint again, or finish the download.",
                )
        return weight_map

    def _read_headers(self, weight_map: Mapping[str, str]) -> None:
        """Merge the shards' tables; the shards are the truth, the index must agree with them."""
        place: dict[str, str] = {}
        with ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="header") as pool:
            tables = list(pool.map(lambda file: read_header(self.files, file), self._shards))
        for file, table in zip(self._shards, tables, strict=True):
            for entry in table:
                if entry.name in place:
                    raise SourceError(
                        f"The tensor {show(entry.name)} is in two shards.",
                        f"Both {place[entry.name]} and {file} hold it.",
                        "Keep one of them: nothing says which is meant.",
                    )
                place[entry.name] = file
                self._add(file, entry)
        for name, file in weight_map.items():
            if place.get(name) != file:
                where = f"it is in {place[name]}" if name in place else "no shard holds it"
                raise SourceError(
                    f"{INDEX} is wrong about the tensor {show(name)}.",
                    f"The index says {file}; {where}.",
                    "Download the checkpoint again, index and shards together.",
                )

    def _add(self, file: str, entry: HeaderEntry) -> None:
        dtype = USABLE.get(entry.dtype)
        if dtype is None:
            self.others[entry.name] = entry.dtype
            return
        self.tensors[entry.name] = SourceTensor(entry.name, dtype, entry.shape)
        self._places[entry.name] = (file, entry.offset)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        tensor = self.tensors[name]
        assert 0 <= start <= stop <= tensor.shape[0]
        file, offset = self._places[name]
        width = math.prod(tensor.shape[1:]) * DTYPE_BYTES[tensor.dtype]
        data = self.files.read(file, offset + start * width, offset + stop * width)
        flat: np.ndarray[Any, Any] = np.frombuffer(data, NUMPY_DTYPES[tensor.dtype])
        return flat.reshape(stop - start, *tensor.shape[1:])

    def text_files(self) -> dict[str, bytes]:
        found = {name: read_text(self.path / name) for name in TEXT_FILES if (self.path / name).is_file()}
        legacy = found.pop("chat_template.json", None)
        if "chat_template.jinja" not in found:
            template = _embedded_template(legacy, "chat_template.json") or _embedded_template(
                found.get("tokenizer_config.json"), "tokenizer_config.json"
            )
            if template is not None:
                found["chat_template.jinja"] = template
        return found

    def file_digests(self, go_on: Callable[[], None]) -> dict[str, str]:
        index = [] if self._shards in ([], [SINGLE]) else [INDEX]
        texts = [name for name in (*TEXT_FILES, *index) if (self.path / name).is_file()]
        found = {name: digest(self.path / name, go_on) for name in texts}
        found |= {name: self.files.digest(name, go_on) for name in self._shards}
        return dict(sorted(found.items()))

    def check_unchanged(self) -> None:
        refuse_changed(self._stamps)
        self.files.check_unchanged()

    def close(self) -> None:
        self.files.close()


class HeaderEntry(NamedTuple):
    """One tensor of a safetensors file: dtype as the file spells it, offset from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def no_weights(label: str, names: Iterable[str]) -> SourceError:
    """The error for a folder or repository without safetensors weights, with the way out for what it has instead."""
    present = sorted(names)
    pickles = [name for name in present if PICKLED.fullmatch(name)]
    tensors = [name for name in present if name.endswith(".safetensors")]
    quantised = [name for name in present if name.endswith(".gguf")]
    if tensors:
        return SourceError(
            f"{label} has safetensors files, but neither {SINGLE} nor {INDEX}.",
            f"Found {', '.join(tensors[:3])}: nothing says which of them make one whole model.",
            f"Add the index file, or rename a single complete file to {SINGLE}.",
        )
    if quantised:
        return SourceError(
            f"{label} holds GGUF files.",
            f"Each is a model of its own: {', '.join(quantised[:3])}.",
            "Give the .gguf file itself as the source.",
        )
    if pickles:
        return pickled(f"{label} holds PyTorch pickle files only ({pickles[0]}).")
    return SourceError(
        f"{label} holds no weights.",
        f"There is neither {SINGLE} nor {INDEX}.",
        "Check that the download is complete and that this is a model's own folder.",
    )


def shard_names(index: Any, label: str) -> list[str]:
    """The shard file names of a parsed index, each a plain file name."""
    return sorted(set(weight_map_of(index, label).values()))


def weight_map_of(index: Any, label: str) -> dict[str, str]:
    """An index's map from tensor to shard, refused when a name could leave the folder."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{label} has no weight_map.", "It should map each tensor to its shard.", AGAIN)
    for tensor, file in found.items():
        if not isinstance(file, str) or not SAFE_NAME.fullmatch(file) or not file.endswith(".safetensors"):
            raise SourceError(
                f"{label} names an unsafe shard for {show(tensor)}.",
                f"{show(file)} is not the plain name of a .safetensors file beside the index.",
                "Do not use this checkpoint before you know who made it.",
            )
    return found


def read_header(files: Files, file: str) -> list[HeaderEntry]:
    """Read and check the header of one safetensors file: every tensor inside the file, no overlap, no hole."""
    size = files.size(file)
    length = int.from_bytes(files.header(file, 0, min(8, size)), "little")
    if size < 8 or length > size - 8:
        raise _bad(file, f"Its header claims {length} bytes in a file of {size}: truncated, or not safetensors.")
    if length > MAX_HEADER_BYTES:
        raise _bad(file, f"Its header of {length} bytes is above the limit of {MAX_HEADER_BYTES}.")
    table = _parse_header(file, bytes(files.header(file, 8, 8 + length)))
    if len(table) > MAX_TENSORS:
        raise _bad(file, f"It lists {len(table)} tensors, above the limit of {MAX_TENSORS}.")
    entries = [_header_entry(file, name, value, 8 + length) for name, value in table]
    end = 8 + length
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.bytes)):
        if entry.offset != end:
            relation = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise _bad(file, f"The tensor {show(entry.name)} {relation}: it starts at {entry.offset}, not at {end}.")
        end += entry.bytes
    if end != size:
        relation = "truncated" if end > size else "longer than its tensors"
        raise _bad(file, f"It is {relation}: the header needs {end} bytes, the file has {size}.")
    return entries


def _parse_header(file: str, raw: bytes) -> list[tuple[str, Any]]:
    """The header's tensors as (name, description); a name that occurs twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise _bad(file, f"Its header lists {show(twice)} twice.")
        return table

    try:
        table = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"Its header is not JSON: {brief(error)}.") from None
    if not isinstance(table, dict):
        raise _bad(file, "Its header is not a JSON object.")
    table.pop("__metadata__", None)
    return list(table.items())


def _header_entry(file: str, name: str, value: Any, data: int) -> HeaderEntry:
    """Check one tensor's description: known dtype, sane shape, and exactly the bytes that those need."""
    if not isinstance(value, dict) or {"dtype", "shape", "data_offsets"} - set(value):
        raise _bad(file, f"The tensor {show(name)} lacks dtype, shape or data_offsets.")
    if not name.isprintable():
        raise _bad(file, f"The tensor name {show(name)} has characters that no real name has.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(file, f"The tensor {show(name)} has the unknown dtype {show(dtype)}.")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise _bad(file, f"The tensor {show(name)} has the shape {show(shape)}.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(file, f"The tensor {show(name)} has the data_offsets {show(offsets)}.")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise _bad(file, f"The tensor {show(name)} is {dtype} {shape} and cannot take {show(end - begin)} bytes.")
    return HeaderEntry(name, dtype, tuple(shape), data + begin, end - begin)


def _is_sizes(value: Any) -> bool:
    """A list of non-negative integers below 2**63 (``True`` is no integer here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _bad(file: str, why: str) -> SourceError:
    return SourceError(f"{file} is not a valid safetensors file.", why, AGAIN)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not (path / "config.json").is_file():
        names = [entry.name for entry in path.iterdir()]
        if any(name.endswith(".gguf") for name in names):
            raise no_weights(path.name, (name for name in names if name.endswith(".gguf")))
        raise SourceError(
            f"The folder {path.name} has no config.json.",
            "It says what the weights compute.",
            "Give the folder of a Hugging Face checkpoint.",
        )
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise SourceError("config.json is not a JSON object.", f"It is {show(config)}.", AGAIN)
    return config


def _embedded_template(raw: bytes | None, label: str) -> bytes | None:
    """The chat template inside a JSON file: one text, or a list of named ones of which the default counts."""
    if raw is None:
        return None
    parsed = parse_json(raw, label)
    template = parsed.get("chat_template") if isinstance(parsed, dict) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    try:
        return template.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"The chat template in {label} is not text.", f"{brief(error)}.", AGAIN) from None
