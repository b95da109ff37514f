"""Small checkpoint files for tests, built byte by byte so that hostile ones can be built as well."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "llama", "hidden_size": 8, "vocab_size": 16}


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from its parts; ``header`` may be raw bytes and ``length`` may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def float_file(**tensors: list[float]) -> bytes:
    """A valid file of one-dimensional float32 tensors."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = entry("F32", [len(values)], len(data), len(data) + len(raw))
        data += raw
    return safetensors(header, data)


def folder(path: Path, weights: bytes | None = None, **files: bytes) -> Path:
    """A checkpoint folder with config.json; keyword names spell ``.`` as ``__``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def sharded(path: Path, shards: dict[str, bytes], weight_map: Any) -> Path:
    """A checkpoint folder of several shards and the index that lists them."""
    folder(path)
    for name, data in shards.items():
        (path / name).write_bytes(data)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
