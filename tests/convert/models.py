"""Tiny Llama-shaped checkpoints in a folder, with random weights of any dtypes, and what a snapshot holds of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fgsnap.convert.families import llama
from fgsnap.convert.rules import sources
from fgsnap.snapshot import TensorBytes, open_snapshot, opened_at
from fgsnap.spec import DTYPE_BYTES

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(config: Mapping[str, Any], dtype: str = "bfloat16", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for every name that the config implies."""
    generator = torch.Generator().manual_seed(seed)
    shapes = sources(llama.rules(llama.spec(config)))
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1 and name.endswith("norm.weight"))).to(
            DTYPES[dtype]
        )
        for name, shape in shapes.items()
    }


def folder(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, shards: int = 1, **files: Any
) -> Path:
    """A checkpoint folder; keyword names spell ``.`` as ``__`` and hold JSON values."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(value))
    if shards == 1:
        safetensors.torch.save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    places = {name: f"model-{at % shards + 1:05d}-of-{shards:05d}.safetensors" for at, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        safetensors.torch.save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, value in one.items()
    )


def at_tp1(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a server at TP 1 would see: dtype, shape and bytes, row after row, by stored name."""
    with open_snapshot(path) as snapshot:
        opened = opened_at(snapshot, 1, 0)
        return {name: (found.dtype, found.shape, row_major(found)) for name, found in opened.items()}


def row_major(found: TensorBytes) -> bytes:
    """The values of a matrix, or of each of a stack, as docs/format.md defines words32, row after row."""
    if found.layout == "row":
        return bytes(found.data)
    *stack, height, width = found.shape
    words = width * DTYPE_BYTES[found.dtype] // 4
    panels = np.frombuffer(found.data, np.uint32).reshape(math.prod(stack), -1, words, 32)
    return panels.swapaxes(2, 3).reshape(math.prod(stack), -1, words)[:, :height].tobytes()
