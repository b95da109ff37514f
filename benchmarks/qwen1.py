"""Qwen, the first, in plain torch: what its authors publish as code beside the weights, written down from its facts.

transformers has no class for it, and code from a checkpoint is never run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = {
    "model_type": "qwen",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "kv_channels": 8,
    "max_position_embeddings": 256,
    "seq_length": 256,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def tiny_checkpoint(folder: Path, family: str, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """Save a random checkpoint, as compare.tiny_checkpoint does for the families that transformers has."""
    config = {**TINY, **{key: value for key, value in changes.items() if value is not ...}, "torch_dtype": dtype}
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: _random(name, shape, generator).to(TORCH[dtype]).contiguous() for name, shape in _shapes(config).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"] // 2
    attention = config["num_attention_heads"] * config["kv_channels"]
    layer = {
        "ln_1.weight": (width,),
        "attn.c_attn.weight": (3 * attention, width),
        "attn.c_attn.bias": (3 * attention,),
        "attn.c_proj.weight": (width, attention),
        "ln_2.weight": (width,),
        "mlp.w1.weight": (inner, width),
        "mlp.w2.weight": (inner, width),
        "mlp.c_proj.weight": (width, inner),
    }
    return {
        "transformer.wte.weight": (config["vocab_size"], width),
        **{
            f"transformer.h.{i}.{name}": shape
            for i in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "transformer.ln_f.weight": (width,),
        "lm_head.weight": (config["vocab_size"], width),
    }


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.3 * values
    return 1.5 * values * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.2 * values


class Qwen1:
    """A checkpoint, as its authors compute it.

    Args:
        folder: the checkpoint.
        dtype: of weights and activations.
        longest: the deployment's context, by which the rotation is stretched; the published code goes by the longest
            sequence so far, which changes the angles of keys that are cached already.
    """

    def __init__(self, folder: Path, dtype: str, longest: int) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        self._weights = {name: values.to(TORCH[dtype]) for name, values in stored.items()}
        self._angles = self._rotation(longest)

    def logits(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Float64 logits [all tokens, V]."""
        with torch.inference_mode():
            return torch.cat([self._forward(tokens).double() for tokens in sequences])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, one after the other."""
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                tokens.append(int(self._forward(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _rotation(self, longest: int) -> torch.Tensor:
        """Angles [longest, head dim]: the base grows in steps where the context is beyond the trained length."""
        dim, trained = self._config["kv_channels"], self._config["seq_length"]
        steps = math.ceil(math.log2(longest / trained) + 1)
        growth = max(2**steps - 1, 1) if self._config["use_dynamic_ntk"] else 1
        base = self._config["rotary_emb_base"] * growth ** (dim / (dim - 2))
        frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(longest).float(), frequencies)
        return torch.cat((angles, angles), -1)

    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        x = self._weights["transformer.wte.weight"][list(tokens)]
        for index in range(self._config["num_hidden_layers"]):
            at = f"transformer.h.{index}."
            x = x + self._attention(self._norm(x, at + "ln_1.weight"), at + "attn.")
            x = x + self._mlp(self._norm(x, at + "ln_2.weight"), at + "mlp.")
        return self._norm(x, "transformer.ln_f.weight") @ self._weights["lm_head.weight"].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config["layer_norm_epsilon"])
        return wide.to(x.dtype) * self._weights[name]

    def _attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        heads, dim, count = self._config["num_attention_heads"], self._config["kv_channels"], len(x)
        mixed = x @ self._weights[at + "c_attn.weight"].T + self._weights[at + "c_attn.bias"]
        q, k, v = (part.view(count, heads, dim).transpose(0, 1) for part in mixed.split(heads * dim, -1))
        q, k = self._rotated(q), self._rotated(k)
        q = q * self._growth(count).to(q.dtype)
        scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        mean = scores.float().softmax(-1).to(v.dtype) @ v
        return mean.transpose(0, 1).reshape(count, -1) @ self._weights[at + "c_proj.weight"].T

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        angles, wide = self._angles[: x.shape[1]], x.float()
        one, other = wide.chunk(2, -1)
        return (wide * angles.cos() + torch.cat((-other, one), -1) * angles.sin()).to(x.dtype)

    def _growth(self, count: int) -> torch.Tensor:
        """Factors of the queries [count, 1]: beyond the trained length the logarithm of the length to its base."""
        trained = self._config["seq_length"]
        lengths = torch.arange(1, count + 1).float()
        factors = (lengths.log() / math.log(trained)).clamp(min=1) if self._config["use_logn_attn"] else lengths**0
        return factors[:, None]

    def _mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        up, gate = x @ self._weights[at + "w1.weight"].T, x @ self._weights[at + "w2.weight"].T
        return (up * torch.nn.functional.silu(gate)) @ self._weights[at + "c_proj.weight"].T
