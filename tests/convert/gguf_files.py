"""Checkpoints written as GGUF files, as llama.cpp's converter would: its names by the format's own library, its row
orders, its folded norms and its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.convert.models import loaded

Tensors = dict[str, np.ndarray]
PAIRED = {"llama", "granite", "smollm3"}
"""Architectures whose rotation llama.cpp does on adjacent pairs."""
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def as_gguf(
    checkpoint: Path,
    path: Path,
    architecture: str,
    also: Callable[[gguf.GGUFWriter, Mapping[str, Any]], None] = lambda writer, config: None,
    vectors: Mapping[str, list[float]] | None = None,
) -> Path:
    """Write the checkpoint's tensors in float32; ``also`` writes what this architecture says besides."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    _common_keys(writer, config)
    also(writer, config)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors = {name: value.to(torch.float32).numpy() for name, value in loaded(checkpoint).items()}
    for name, values in _stacked(architecture, tensors).items():
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(_as_stored(architecture, name, values, config)))
    for name, numbers in (vectors or {}).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _common_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(3, config["vocab_size"]))])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)


def _stacked(architecture: str, tensors: Tensors) -> Tensors:
    """The experts of a layer as three stacks."""
    found: Tensors = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        one = re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name)
        if one:
            stack = f"{one[1]}.mlp.experts.{PARTS.get(one[3], one[3])}.weight"
            experts.setdefault(stack, {})[int(one[2])] = values
        elif ".mlp.experts." in name:
            found |= _in_turn(name, values) if architecture == "gpt-oss" else _in_halves(name, values)
        else:
            found[f"{name}.weight" if name.endswith("sinks") else name] = values
    return found | {name: np.stack([stack[at] for at in range(len(stack))]) for name, stack in experts.items()}


def _in_halves(name: str, values: np.ndarray) -> Tensors:
    """Gates above ups in one stack, or downs."""
    if "gate_up" not in name:
        return {f"{name}.weight": values}
    gate, up = np.split(values, 2, axis=1)
    return {name.replace("gate_up", "gate") + ".weight": gate, name.replace("gate_up", "up") + ".weight": up}


def _in_turn(name: str, values: np.ndarray) -> Tensors:
    """Gates and ups in turn in one stack, or downs, each matrix the other way round."""
    stem, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
    rows = values if kind == "bias" else values.swapaxes(1, 2)
    if "gate_up" not in name:
        return {f"{stem}.{kind}": rows}
    return {f"{stem.replace('gate_up', part)}.{kind}": rows[:, at::2] for at, part in enumerate(("gate", "up"))}


def _as_stored(architecture: str, name: str, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for part, count in heads.items():
        if architecture in PAIRED and f"{part}." in name:
            return values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values
