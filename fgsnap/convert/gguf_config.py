"""A GGUF file's metadata as a Hugging Face style config.json, so that the families need not know GGUF.

A file names its architecture and, under keys that begin with that name, says most of what a config.json says. What
llama.cpp knows by the architecture alone is written down here, each in its function. A key that is not known is refused
by name, and so is a file that lacks what its model cannot be computed without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fgsnap.convert.source import AGAIN, SourceTensor, show
from fgsnap.errors import SourceError, UnsupportedModel

FROM_ORIGINAL = "Convert from the original Hugging Face checkpoint."
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


class File(NamedTuple):
    """What the functions here read.

    Attributes:
        architecture: its name.
        keys: its metadata, by key without that name.
        tensors: all of the file's, by name.
        vector: gives the values of a small tensor; None where the file has none of that name.
    """

    architecture: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    vector: Callable[[str], list[float] | None]

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.keys.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._wrong(key, value, "A positive whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float as it was written before GGUF rounded it to 32 bits: 9.999999747378752e-06 is 1e-05."""
        value = self.keys.get(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self._wrong(key, value, "A non-negative number")
        return float(str(np.float32(value)))

    def optional(self, key: str) -> float | None:
        """A number, or None where the file does not say."""
        return None if key not in self.keys else self.real(key)

    def head_dim(self) -> int:
        shared = self.positive("embedding_length") // self.positive("attention.head_count")
        return self.positive("attention.key_length", shared)

    def window(self) -> int | None:
        """The window of those layers that have one; absent and 0 mean that none has."""
        given = self.keys.get(WINDOW, 0) != 0
        return self.positive(WINDOW) if given else None

    def refused(self, key: str, why: str = "") -> UnsupportedModel:
        """The error for a value that cannot be expressed."""
        return UnsupportedModel(
            f"The GGUF key {self.architecture}.{key} is {show(self.keys.get(key))}.", why, FROM_ORIGINAL
        )

    def _wrong(self, key: str, value: Any, needed: str) -> SourceError:
        return SourceError(f"The GGUF key {self.architecture}.{key} is {show(value)}.", f"{needed} is needed.", AGAIN)


class Architecture(NamedTuple):
    """How a GGUF architecture is read.

    Attributes:
        express: the entries of config.json beside those that every architecture has, or instead of them.
        keys: the metadata keys that only ``express`` reads.
        norms_plus_one: whether norm weights are stored as 1 + w.
        partly_rotated: whether heads may be rotated in part.
    """

    express: Callable[[File], dict[str, Any]]
    keys: frozenset[str] = frozenset()
    norms_plus_one: bool = False
    partly_rotated: bool = False


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, SourceTensor], vector: Callable[[str], list[float] | None]
) -> dict[str, Any]:
    """config.json of a file whose architecture is one of ARCHITECTURES; for the arguments see File."""
    name = metadata["general.architecture"]
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    file, architecture = File(name, own, tensors, vector), ARCHITECTURES[name]
    unknown = sorted(own.keys() - COMMON - architecture.keys - HARMLESS)
    if unknown:
        raise UnsupportedModel(
            f"The GGUF key {name}.{unknown[0]} is not known.",
            "It may change what the model computes, and fgsnap cannot express it.",
            FROM_ORIGINAL,
        )
    result = _common(file, metadata, architecture) | architecture.express(file)
    return {key: value for key, value in result.items() if value is not None}


COMMON = frozenset(
    """
    embedding_length feed_forward_length block_count context_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor
    rope.scaling.yarn_log_multiplier rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    """.split()
)
HARMLESS = frozenset("rope.scaling.finetuned tensor_data_layout".split())


def _common(file: File, metadata: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    width, heads, head_dim = file.positive("embedding_length"), file.positive("attention.head_count"), file.head_dim()
    rotated = file.positive("rope.dimension_count", head_dim)
    if file.positive("attention.value_length", head_dim) != head_dim:
        raise file.refused("attention.value_length", f"Heads have {head_dim} dimensions, and keys and values the same.")
    if rotated != head_dim and not architecture.partly_rotated:
        raise file.refused(
            "rope.dimension_count", f"Heads have {head_dim} dimensions, and those of this architecture rotate whole."
        )
    embedding = file.tensors.get("token_embd.weight")
    return {
        "hidden_size": width,
        "intermediate_size": file.positive("feed_forward_length"),
        "num_hidden_layers": file.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0] if embedding else file.positive("vocab_size"),
        "max_position_embeddings": file.positive("context_length"),
        "rms_norm_eps": file.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file),
        "partial_rotary_factor": None if rotated == head_dim else rotated / head_dim,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope_scaling(file: File) -> dict[str, Any] | None:
    """The rope scaling in Hugging Face terms, its defaults being those of llama.cpp: linear, and factor 0 for none.

    Stored divisors (how Llama-3.1 files carry their scaling) are expressed exactly as a LongRoPE table that is the same
    for short and long contexts.
    """
    kind = file.keys.get("rope.scaling.type", "linear")
    factor = file.real("rope.scaling.factor", file.real("rope.scale_linear", 1.0)) or 1.0
    if kind == "linear" and factor == 1.0:
        kind = "none"
    divisors, long = file.vector("rope_freqs.weight"), file.vector("rope_factors_long.weight")
    if long is not None and kind in ("none", "longrope"):
        original = file.positive("rope.scaling.original_context_length")
        multiplier = file.optional("rope.scaling.attn_factor")
        return _divided(file.vector("rope_factors_short.weight"), long, original, multiplier)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if file.keys.get(f"rope.scaling.{key}") not in (None, 0.0, 1.0):
            raise file.refused(f"rope.scaling.{key}")
    if divisors is not None or long is not None:
        if kind != "none":
            raise file.refused("rope.scaling.type", "The file has divisors of the rotation too; one can be expressed.")
        return _divided(divisors, divisors, file.positive("context_length"), 1.0)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": file.positive(
                "rope.scaling.original_context_length", file.positive("context_length")
            ),
            "beta_fast": file.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": file.real("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise file.refused("rope.scaling.type")


def _divided(
    short: list[float] | None, long: list[float] | None, original: int, multiplier: float | None
) -> dict[str, Any]:
    """LongRoPE with these divisors; ``multiplier``, of cos and sin, follows from the lengths where it is None."""
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        **({} if multiplier is None else {"attention_factor": multiplier}),
    }


# One function an architecture.


def _llama(file: File) -> dict[str, Any]:
    """Llama; Mistral, if there is a window; Mixtral, if there are experts."""
    window = file.window()
    if file.keys.get("expert_count"):
        return {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": file.positive("expert_count"),
            "num_experts_per_tok": file.positive("expert_used_count"),
            "sliding_window": window,
        }
    return {
        "model_type": "mistral" if window else "llama",
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "sliding_window": window,
        "mlp_bias": _mlp_bias(file),
    }


def _gemma2(file: File) -> dict[str, Any]:
    """Gemma 2: every other layer has a window, of 4096 where the file does not say; so have the soft caps defaults."""
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.window(),
        "layer_types": _layer_types(file, 2),
        "attn_logit_softcapping": file.optional("attn_logit_softcapping"),
        "final_logit_softcapping": file.optional("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scale(file, largest=46),
    }


def _gemma3(file: File) -> dict[str, Any]:
    """Gemma 3: five layers of six have a window, and a rotation of their own, of theta 10,000 unless the file says."""
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.positive(WINDOW),
        "layer_types": _layer_types(file, 6),
        "rope_theta": file.real("rope.freq_base"),
        "rope_local_base_freq": file.real("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": file.optional("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scale(file, largest=62),
    }


def _gemma_scale(file: File, largest: int) -> int:
    """What scores are divided by the root of: the size of a head, but in the largest model the width over the heads.

    No key says it; llama.cpp tells the largest model, of 27 billion weights, by its number of layers.
    """
    if file.positive("block_count") == largest:
        return file.positive("embedding_length") // file.positive("attention.head_count")
    return file.head_dim()


def _gpt_oss(file: File) -> dict[str, Any]:
    """GPT-OSS: every other layer has the window; the bounds of its YaRN are not rounded to whole dimensions."""
    scaling = _rope_scaling(file)
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": file.positive("expert_feed_forward_length"),
        "num_local_experts": file.positive("expert_count"),
        "num_experts_per_tok": file.positive("expert_used_count"),
        "sliding_window": file.positive(WINDOW),
        "layer_types": _layer_types(file, 2),
        "rope_scaling": scaling,
    }


def _granite(file: File) -> dict[str, Any]:
    """Granite: multipliers, where 0 means none."""
    if file.keys.get("rope.scaling.finetuned") is False:
        raise file.refused("rope.scaling.finetuned", "For this architecture it says that nothing is rotated.")
    return {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "mlp_bias": _mlp_bias(file),
        "logits_scaling": file.real("logit_scale"),
        "embedding_multiplier": file.real("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": file.real("residual_scale", 1.0) or 1.0,
        "attention_multiplier": file.real("attention.scale", 0.0) or file.head_dim() ** -0.5,
    }


def _olmo2(file: File) -> dict[str, Any]:
    """OLMo 2; OLMo 3, if there is a window: three layers of four have it unless the file says otherwise."""
    window = file.window()
    if window is None:
        return {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    return {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": window,
        "layer_types": _layer_types(file, 4),
    }


def _phi3(file: File) -> dict[str, Any]:
    """Phi-3 and Phi-4."""
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": file.window(),
        "original_max_position_embeddings": file.positive(
            "rope.scaling.original_context_length", file.positive("context_length")
        ),
    }


def _qwen2(file: File) -> dict[str, Any]:
    return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_bias": None}


def _qwen3(file: File) -> dict[str, Any]:
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def _qwen3_moe(file: File) -> dict[str, Any]:
    """Qwen3-MoE: every layer has experts, whose weights are renormalised."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": file.positive("expert_count"),
        "num_experts_per_tok": file.positive("expert_used_count"),
        "moe_intermediate_size": file.positive("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def _smollm3(file: File) -> dict[str, Any]:
    """SmolLM3: every fourth layer does not rotate."""
    return {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layer_interval": 4,
        "mlp_bias": _mlp_bias(file),
    }


def _mlp_bias(file: File) -> bool:
    return "blk.0.ffn_up.bias" in file.tensors


def _layer_types(file: File, every: int) -> list[str] | None:
    """Each layer's kind of attention, where the file lists those with the window; None: all but every so many-th."""
    flags = file.keys.get(PATTERN, every)
    if flags == every:
        return None
    if not isinstance(flags, list):
        raise file.refused(PATTERN, f"Of this architecture, fgsnap knows a layer without the window every {every}.")
    if len(flags) != file.positive("block_count") or any(flag not in (0, 1) for flag in flags):
        raise SourceError(
            f"The GGUF key {file.architecture}.{PATTERN} is {show(flags)}.", "A yes or no a layer is needed.", AGAIN
        )
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


EXPERTS = frozenset("expert_count expert_used_count".split())
ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": Architecture(
        _gemma2, frozenset({WINDOW, PATTERN, "attn_logit_softcapping", "final_logit_softcapping"}), norms_plus_one=True
    ),
    "gemma3": Architecture(
        _gemma3, frozenset({WINDOW, PATTERN, "rope.freq_base_swa", "final_logit_softcapping"}), norms_plus_one=True
    ),
    "gpt-oss": Architecture(_gpt_oss, EXPERTS | {"expert_feed_forward_length", WINDOW, PATTERN}),
    "granite": Architecture(
        _granite, frozenset({"logit_scale", "embedding_scale", "residual_scale", "attention.scale"})
    ),
    "llama": Architecture(_llama, EXPERTS | {WINDOW}),
    "olmo2": Architecture(_olmo2, frozenset({WINDOW, PATTERN})),
    "phi3": Architecture(_phi3, frozenset({WINDOW}), partly_rotated=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3_moe, EXPERTS | {"expert_feed_forward_length"}),
    "smollm3": Architecture(_smollm3),
}
"""By ``general.architecture``."""
