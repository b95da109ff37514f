"""A Hugging Face checkpoint folder: its weights, their index, and the text files beside them.

The weights are safetensors files, or PyTorch's where there are none. Follows safetensors' own rules and refuses what
its library would refuse or overlook: holes, overlaps, names that occur twice, sizes that disagree, shard names that
point elsewhere. ``state_dict`` reads PyTorch's files.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fgsnap.convert.files import Files, LocalFiles
from fgsnap.convert.source import (
    AGAIN,
    MAX_RANK,
    NUMPY_DTYPES,
    FileTensor,
    OtherTensor,
    SourceTensor,
    brief,
    digest,
    parse_json,
    read_json,
    read_text,
    refuse_changed,
    show,
    stamps,
)
from fgsnap.convert.state_dict import read_state_dict
from fgsnap.errors import SourceError
from fgsnap.spec import DType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""The file that holds a whole model and the index that lists its shards; the first pair that is there counts."""
INDICES = tuple(index for _, index in WEIGHTS)
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
PYTORCH = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")

# Real headers stay far below these; the caps keep a hostile one from filling memory before it is refused.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000

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


class _Place(NamedTuple):
    """Where a tensor lies: an array of numpy's ``dtype`` in ``file``, whose first byte is at ``offset``."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Folder:
    """A Hugging Face folder: config.json, weights, tokenizer files.

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
        self._stamps = stamps(path / name for name in (*TEXT_FILES, *INDICES))
        self.config = read_config(path)
        self.tensors: dict[str, SourceTensor] = {}
        self.others: dict[str, OtherTensor] = {}
        self._places: dict[str, _Place] = {}
        self._index: str | None = None
        self._shards: list[str] = []
        if not config_only:
            self._find_weights()
            self._read_headers()

    def _find_weights(self) -> None:
        """Find the files that hold the weights, which must all be there."""
        found = weights_file(self.files.has)
        if found is None:
            raise no_weights(self.path.name, [entry.name for entry in self.path.iterdir()])
        if found not in INDICES:
            self._shards = [found]
            return
        self._index, self._shards = found, shard_names(read_json(self.path / found), found)
        for shard in self._shards:
            if not self.files.has(shard):
                raise SourceError(
                    f"The shard {shard} is missing.",
                    f"{found} lists {len(self._shards)} shards and the folder {self.path.name} lacks this one.",
                    "Download the checkpoint again, or finish the download.",
                )

    def _read_headers(self) -> None:
        """Merge the shards' tables; the shards are the truth, the index must agree with them."""
        place: dict[str, str] = {}
        for file, table in zip(self._shards, self._tables(), strict=True):
            for entry in table:
                if entry.name in place:
                    raise SourceError(
                        f"The tensor {show(entry.name)} is in two shards.",
                        f"Both {place[entry.name]} and {file} hold it.",
                        "Keep one of them: nothing says which is meant.",
                    )
                place[entry.name] = file
                self._add(file, entry)
        if self._index is not None:
            self._compare(self._index, place)

    def _tables(self) -> list[list[FileTensor]]:
        """The tensors of every shard.

        PyTorch's are followed one after the other: a hostile description takes what the caps allow, and no multiple.
        """
        if self._shards[0].endswith(".bin"):
            return [read_state_dict(self.files, file) for file in self._shards]
        with ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="header") as pool:
            return list(pool.map(partial(read_header, self.files), self._shards))

    def _compare(self, index: str, place: Mapping[str, str]) -> None:
        for name, file in weight_map_of(read_json(self.path / index), index).items():
            if place.get(name) != file:
                where = f"it is in {place[name]}" if name in place else "no shard holds it"
                raise SourceError(
                    f"{index} is wrong about the tensor {show(name)}.",
                    f"The index says {file}; {where}.",
                    "Download the checkpoint again, index and shards together.",
                )

    def _add(self, file: str, entry: FileTensor) -> None:
        dtype = USABLE.get(entry.dtype)
        if dtype is not None:
            self.tensors[entry.name] = SourceTensor(entry.name, dtype, entry.shape)
        else:
            self.others[entry.name] = OtherTensor(entry.dtype, entry.shape)
        if dtype is not None or BITS[entry.dtype] == 8:
            held = NUMPY_DTYPES[dtype] if dtype is not None else "u1"
            shape = entry.shape or (1,)
            self._places[entry.name] = _Place(file, entry.offset, held, shape, entry.strides or _in_order(shape, held))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        place = self._places[name]
        assert 0 <= start <= stop <= place.shape[0]
        shape = (stop - start, *place.shape[1:])
        begin = place.offset + start * place.strides[0]
        last = sum((size - 1) * stride for size, stride in zip(shape, place.strides, strict=True))
        span = 0 if 0 in shape else last + np.dtype(place.dtype).itemsize
        data = self.files.read(place.file, begin, begin + span)
        found: np.ndarray[Any, Any] = np.ndarray(shape, place.dtype, data, 0, place.strides)
        in_order: np.ndarray[Any, Any] = np.ascontiguousarray(found)  # a copy only where the file has another order
        return in_order

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
        texts = [name for name in TEXT_FILES if (self.path / name).is_file()]
        texts += [] if self._index is None else [self._index]
        found = {name: digest(self.path / name, go_on) for name in texts}
        found |= {name: self.files.digest(name, go_on) for name in self._shards}
        return dict(sorted(found.items()))

    def check_unchanged(self) -> None:
        refuse_changed(self._stamps)
        self.files.check_unchanged()

    def close(self) -> None:
        self.files.close()


def _in_order(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Bytes from one index to the next, an axis each, where the rows lie one after the other."""
    inner = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return tuple(count * np.dtype(dtype).itemsize for count in inner)


def weights_file(has: Callable[[str], bool]) -> str | None:
    """The file that holds the whole model, or the index of those that do; None where there is neither."""
    return next((name for names in WEIGHTS for name in names if has(name)), None)


def no_weights(label: str, names: Iterable[str]) -> SourceError:
    """The error for a folder or repository without weights to read, with the way out for what it has instead."""
    present = sorted(names)
    pytorch = [name for name in present if PYTORCH.fullmatch(name)]
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
    if pytorch:
        return SourceError(
            f"{label} has PyTorch files ({pytorch[0]}), but neither {' nor '.join(WEIGHTS[1])}.",
            "Nothing says which of them make one whole model.",
            f"Add the index file, rename a single complete one to {WEIGHTS[1][0]}, or save the model as safetensors.",
        )
    return SourceError(
        f"{label} holds no weights.",
        f"There is neither {SINGLE} nor {WEIGHTS[1][0]}, nor the index of shards of either.",
        "Check that the download is complete and that this is a model's own folder.",
    )


def shard_names(index: Any, label: str) -> list[str]:
    """The shard file names of a parsed index, each a plain file name."""
    return sorted(set(weight_map_of(index, label).values()))


def weight_map_of(index: Any, label: str) -> dict[str, str]:
    """An index's map from tensor to shard, refused when a name could leave the folder."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    ending = Path(label.removesuffix(".index.json")).suffix
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{label} has no weight_map.", "It should map each tensor to its shard.", AGAIN)
    for tensor, file in found.items():
        if not isinstance(file, str) or not SAFE_NAME.fullmatch(file) or not file.endswith(ending):
            raise SourceError(
                f"{label} names an unsafe shard for {show(tensor)}.",
                f"{show(file)} is not the plain name of a {ending} file beside the index.",
                "Do not use this checkpoint before you know who made it.",
            )
    return found


def read_header(files: Files, file: str) -> list[FileTensor]:
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


def _header_entry(file: str, name: str, value: Any, data: int) -> FileTensor:
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
    return FileTensor(name, dtype, tuple(shape), data + begin, end - begin)


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
