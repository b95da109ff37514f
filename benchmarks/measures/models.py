"""The models in every format that an engine reads, all made from one snapshot's bfloat16 weights.

``small`` is SmolLM2-135M-Instruct. ``large`` has random weights in the shape of Llama-3.2-1B's layers (width 2048, 32
heads on 8 KV heads, inner width 8192) with SmolLM2's vocabulary and tokenizer.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from engines.ours import FGSNAP

from fgsnap.convert.families import llama
from fgsnap.convert.rules import sources

CHUNK = 8 << 20
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LARGE_LAYERS = 14
LOADED_LAYERS = 18
"""Layers of the model that is only loaded: 2.4 GB."""


class Model(NamedTuple):
    """One model's files below ``folder``.

    Attributes:
        context: the longest prompt and answer together that is asked of it.
    """

    name: str
    folder: Path
    context: int = 2304

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshot"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def gguf(self, kind: str = "BF16") -> Path:
        return self.folder / f"{kind}.gguf"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint's tensors, which one decoded token reads once: the embedding is also the head."""
        return sum(length for _, _, length in tensors(self.checkpoint / "model.safetensors").values())

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the snapshot's rank files."""
        return sum(file.stat().st_size for file in self.snapshot.glob("rank-*.safetensors"))

    def prefill_operations(self, length: int) -> int:
        """Floating-point operations of a prompt: every token through the layers, attention, one row of logits."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        shapes = [shape for shape, _, _ in tensors(self.checkpoint / "model.safetensors").values() if len(shape) == 2]
        head = config["vocab_size"] * config["hidden_size"]
        matrices = sum(map(math.prod, shapes)) - head
        attention = 2 * config["num_attention_heads"] * config["head_dim"] * length * (length + 1) // 2
        return int(2 * (length * matrices + head + config["num_hidden_layers"] * attention))


def small(folder: Path, source: Path) -> Model:
    """SmolLM2 from the GGUF file at ``source``, whose quantised blocks become bfloat16."""
    model = Model("SmolLM2-135M-Instruct", folder)
    folder.mkdir(parents=True, exist_ok=True)
    convert(source, model)
    if not model.gguf().exists():
        fgsnap("export", str(model.snapshot), "-o", str(model.checkpoint))
        write_gguf(model.checkpoint, source, model.gguf("F16"), np.dtype(np.float16))
        write_gguf(model.checkpoint, source, model.gguf(), None)
    return model


def large(folder: Path, source: Path, text: Path, layers: int = LARGE_LAYERS) -> Model:
    """Random weights of ``layers`` layers; ``text`` is a checkpoint with the tokenizer, ``source`` its GGUF file."""
    model = Model(f"random Llama, {layers} layers of width 2048", folder)
    if not model.gguf().exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        random_checkpoint(model.checkpoint, text, layers)
        write_gguf(model.checkpoint, source, model.gguf(), None)
    convert(model.checkpoint, model)
    return model


def loaded(folder: Path, text: Path, layers: int = LOADED_LAYERS) -> Model:
    """A larger one of which only the checkpoint and the snapshot are needed."""
    model = Model(f"random Llama, {layers} layers of width 2048", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random_checkpoint(model.checkpoint, text, layers)
    convert(model.checkpoint, model, "--no-canary")
    return model


def convert(source: Path, model: Model, *options: str) -> None:
    """The model's snapshot for CPUs, made anew by the fgsnap that is measured."""
    shutil.rmtree(model.snapshot, ignore_errors=True)
    fgsnap("convert", str(source), "-o", str(model.snapshot), "--target", "cpu", *options)


def random_checkpoint(path: Path, text: Path, layers: int) -> None:
    """A safetensors checkpoint of random bfloat16 weights in Llama's shape, with the text files of another one.

    Matrices are drawn from Normal(0, 0.02) as models are initialised; norms are 1.
    """
    path.mkdir()
    for name in TEXT_FILES:
        shutil.copy(text / name, path)
    known = json.loads((text / "config.json").read_text())
    config = known | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sources(llama.rules(llama.spec(config))).items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + length)}
        end += length
    raw = json.dumps(header).encode()
    noise = bfloat16(np.random.default_rng(1).normal(0, 0.02, CHUNK).astype(np.float32)).tobytes()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            for at in range(start, stop, CHUNK):
                count = min(CHUNK, stop - at)
                ones = bfloat16(np.ones(count // 2, np.float32)).tobytes()
                shift = 2 * (at // CHUNK % 4096)  # no two chunks alike
                file.write(ones if name.endswith("norm.weight") else noise[shift : shift + count])


def bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The upper halves of float32 numbers, cut, not rounded: enough for what is random."""
    upper: np.ndarray[Any, np.dtype[np.uint16]] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return upper


def write_gguf(checkpoint: Path, source: Path, target: Path, dtype: np.dtype[Any] | None) -> None:
    """A GGUF file of a bfloat16 checkpoint's weights; matrices in ``dtype``, or None: in bfloat16, bit for bit.

    GGUF holds rotary pairs side by side where Hugging Face holds them half a head apart, and norms in float32. The
    tokenizer's metadata are those of ``source``.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype else gguf.LlamaFileType.MOSTLY_BF16)
    _copy_tokenizer(source, writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, stored in arrays(checkpoint / "model.safetensors"):
        count = next((count for part, count in heads.items() if part in name), None)
        values = stored if count is None else _pairs_side_by_side(stored, count)
        called = names.get_name(name, (".weight",))
        if values.ndim == 1:
            writer.add_tensor(called, float32(values))
        elif dtype is not None:
            writer.add_tensor(called, float32(values).astype(dtype))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(called, np.ascontiguousarray(values), raw_shape=values.shape, raw_dtype=bf16)
    partial = target.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def float32(values: np.ndarray[Any, np.dtype[np.uint16]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    widened: np.ndarray[Any, np.dtype[np.float32]] = (values.astype(np.uint32) << 16).view(np.float32)
    return widened


def _pairs_side_by_side(
    values: np.ndarray[Any, np.dtype[np.uint16]], heads: int
) -> np.ndarray[Any, np.dtype[np.uint16]]:
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _copy_tokenizer(source: Path, writer: gguf.GGUFWriter) -> None:
    kinds = gguf.GGUFValueType
    add = {kinds.ARRAY: writer.add_array, kinds.STRING: writer.add_string, kinds.BOOL: writer.add_bool}
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("tokenizer."):
            add.get(field.types[0], writer.add_uint32)(field.name, field.contents())


def tensors(file: Path) -> Mapping[str, tuple[tuple[int, ...], int, int]]:
    """(shape, offset in the file, bytes) of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: (tuple(entry["shape"]), 8 + size + entry["data_offsets"][0], int(np.diff(entry["data_offsets"])[0]))
        for name, entry in header.items()
    }


def arrays(file: Path) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint16]]]]:
    """Each tensor's bfloat16 bits, mapped."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    for name, (shape, offset, length) in tensors(file).items():
        yield name, np.frombuffer(mapped, np.uint16, length // 2, offset).reshape(shape)


def fgsnap(*arguments: str) -> None:
    """Run a command of fgsnap."""
    print(f"fgsnap {' '.join(arguments)}", file=sys.stderr)
    subprocess.run(
        [FGSNAP, *arguments], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
