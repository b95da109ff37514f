"""Reading a config.json against an allow-list: what every family shares.

A key that a family does not list, and that holds anything, is refused by name: nobody here can know that it does not
change what the model computes. Nothing in a config is executed and no class named in it is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from fgsnap.convert.quantisation import quantisation
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import Activation, DynamicNtk, Linear, Llama3, LongRope, Rope, Yarn

Config = Mapping[str, Any]

CHECK = "Check config.json; it may be damaged."
ASK = "Ask for it with the model's config.json, or upgrade fgsnap."
REWRITE = "If you are sure the key does not matter, remove it from config.json and convert again."

# Keys that say nothing about what a decoder computes: names, training, defaults of generation, how weights were stored.
HARMLESS = frozenset(
    """
    model_type architectures auto_map transformers_version transformers.js_config unsloth_version unsloth_fixed
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _experts_implementation_internal experts_implementation use_flash_attn
    _flash_attn_2_enabled torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss
    use_cache initializer_range pretraining_tp gradient_checkpointing neftune_noise_alpha
    classifier_dropout attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout residual_dropout dropout
    attention_probs_dropout_prob hidden_dropout_prob
    output_hidden_states output_attentions return_dict return_dict_in_generate output_scores output_logits
    activation_dropout embedding_dropout keys_to_ignore_at_inference
    chunk_size_feed_forward is_decoder tie_encoder_decoder tie_last_hidden_states
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id ignore_index
    model_max_length max_sequence_length is_llama_config
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens assistant_confidence_threshold
    num_assistant_tokens num_assistant_tokens_schedule target_lookbehind assistant_lookbehind cache_implementation
    """.split()
)

# Keys that would change the computation; only these values mean that they do not.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({}, []),
    "per_layer_config": ({},),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
}

ROPE = frozenset(
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor".split()
)

QUANTISED = ("quantization_config", "compression_config")

# What any size or number of a published config stays far within, and products of a few of them, too.
LARGEST = (1 << 31) - 1
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-30, 1e30

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}


def check_keys(config: Config, known: frozenset[str]) -> None:
    """Refuse, by name, every key that is neither ``known`` to the family nor harmless and that holds a value."""
    quantisation(config)  # refuses what cannot be read
    for key, value in config.items():
        if value is None or key in QUANTISED or key in known or key in HARMLESS:
            continue
        if key not in ONLY:
            raise UnsupportedModel(
                f"fgsnap does not know the config key {show(key)} (value {show(value)}).",
                "It may change what the model computes, so it is not ignored.",
                REWRITE,
            )
        if value not in ONLY[key]:
            raise UnsupportedModel(
                f"The config key {key!r} is {show(value)}.",
                "fgsnap cannot express what that computes.",
                REWRITE,
            )


def integer(config: Config, key: str, default: int | None = None) -> int:
    """A positive integer below 2**31; absent or null means ``default``, which None makes an error."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise SourceError(f"config.json lacks {key!r}.", "The model's size cannot be known without it.", CHECK)
        return default
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise _wrong(key, value, f"an integer from 1 to {LARGEST}")
    return value


def count(config: Config, key: str, default: int) -> int:
    """An integer that may be zero as well; absent or null means ``default``."""
    return 0 if config.get(key) == 0 and type(config[key]) is int else integer(config, key, default)


def number(config: Config, key: str, default: float | None = None) -> float:
    """A number from SMALLEST_NUMBER to LARGEST_NUMBER; absent or null means ``default``, which None makes an error."""
    value: Any = default if config.get(key) is None else config[key]
    if type(value) not in (int, float) or not SMALLEST_NUMBER <= value <= LARGEST_NUMBER:
        raise _wrong(key, value, f"a number from {SMALLEST_NUMBER} to {LARGEST_NUMBER}")
    return float(value)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """True or false; absent or null means ``default``."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise _wrong(key, value, "true or false")
    return value


def only(config: Config, key: str, *known: str) -> str | None:
    """A choice by name that has to be one of ``known``; absent or null means None."""
    value = config.get(key)
    if value is not None and value not in known:
        raise UnsupportedModel(f"The config key {key!r} is {show(value)}.", f"Supported: {', '.join(known)}.", ASK)
    return value


def activation(config: Config, key: str, default: str) -> Activation:
    """An activation by the name transformers gives it."""
    value = config.get(key)
    name = default if value is None else value
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"The activation {show(name)} (config key {key!r}) is not supported.",
            f"Supported are {', '.join(ACTIVATIONS)}.",
            ASK,
        )
    return ACTIVATIONS[name]


def rope(config: Config, head_dim: int, max_length: int, *, theta: float = 10000.0, partial: bool = False) -> Rope:
    """The rotation, from either dialect: ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``.

    transformers reads the same values; where both dialects are present they must say the same.

    Args:
        config: the decoder's.
        head_dim: of the heads that rotate.
        max_length: the longest context.
        theta: the base where the config gives none.
        partial: whether the model's code rotates a part of each head where ``partial_rotary_factor`` says so.
    """
    config = {**config, "rope_theta": number(config, "rope_theta", theta)}
    told = []
    for dialect in ("rope_scaling", "rope_parameters"):
        parameters = config.get(dialect)
        if parameters is not None and not isinstance(parameters, dict):
            raise _wrong(dialect, parameters, "an object or null")
        if parameters:
            told.append(_rope(config, parameters, dialect, head_dim, max_length))
    if len(told) == 2 and told[0] != told[1]:
        raise SourceError(
            "config.json describes two different rotations.",
            "'rope_scaling' and 'rope_parameters' disagree, and readers differ in which one they use.",
            "Remove the one that is not meant.",
        )
    rotation = told[0] if told else _rope(config, {}, "rope_scaling", head_dim, max_length)
    if not partial and rotation.dims != head_dim and rotation.proportional_head_dim is None:
        raise UnsupportedModel(
            f"The config key 'partial_rotary_factor' rotates {rotation.dims} of {head_dim} head dims.",
            "This family rotates whole heads; readers of such a checkpoint disagree about the rest.",
            "Remove the key from config.json if it is a leftover.",
        )
    return rotation


_ROPE_KEYS = frozenset(
    """
    type rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor
    beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim truncate
    finetuned
    """.split()
)


def _rope(config: Config, parameters: Config, dialect: str, head_dim: int, max_length: int) -> Rope:
    for key, value in parameters.items():
        if key not in _ROPE_KEYS and value is not None:
            raise UnsupportedModel(
                f"fgsnap does not know the key {show(key)} of {dialect!r} (value {show(value)}).",
                "It may change the angles of the rotation, so it is not ignored.",
                REWRITE,
            )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = number(parameters, "rope_theta", number(config, "rope_theta"))
    share = number(parameters, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    if head_dim % 2 or share > 1:
        raise SourceError(
            "The rotation does not fit the heads.",
            f"They have {head_dim} dims, of which the share {share} is rotated in pairs.",
            "Check head_dim and partial_rotary_factor in config.json.",
        )
    if kind == "proportional":
        return _proportional(theta, int(share * head_dim // 2) * 2, head_dim, parameters)
    dims = int(head_dim * share)
    if dims % 2 or not dims:
        raise SourceError(f"{dims} rotated dims cannot be paired.", f"They are the share {share} of {head_dim}.", CHECK)
    original = _original_length(config, parameters, max_length)
    if kind == "default":
        return Rope(theta=theta, dims=dims)
    if kind == "linear":
        return Rope(theta=theta, dims=dims, linear=Linear(number(parameters, "factor")))
    if kind == "dynamic":
        return Rope(theta=theta, dims=dims, dynamic=_dynamic(parameters, dims, max_length))
    if kind == "llama3":
        return Rope(theta=theta, dims=dims, llama3=_llama3(parameters, original))
    if kind == "yarn":
        return Rope(theta=theta, dims=dims, yarn=_yarn(parameters, theta, original, max_length))
    if kind == "longrope":
        return Rope(theta=theta, dims=dims, longrope=_longrope(parameters, dims, original, max_length))
    raise UnsupportedModel(
        f"The rope type {show(kind)} (config key {dialect!r}) is not supported.",
        "Supported are default, linear, dynamic, llama3, yarn, longrope and proportional.",
        ASK,
    )


def _original_length(config: Config, parameters: Config, max_length: int) -> int:
    """The context before the rotation was stretched; beside the parameters it wins over inside them."""
    inside = integer(parameters, "original_max_position_embeddings", max_length)
    return integer(config, "original_max_position_embeddings", inside)


def _proportional(theta: float, dims: int, head_dim: int, parameters: Config) -> Rope:
    if not dims:
        raise SourceError("No dimension of the heads is rotated.", "partial_rotary_factor is too small.", CHECK)
    factor = number(parameters, "factor", 1.0)
    linear = None if factor == 1 else Linear(factor)
    return Rope(theta=theta, dims=dims, linear=linear, proportional_head_dim=head_dim)


def _dynamic(parameters: Config, dims: int, max_length: int) -> DynamicNtk:
    factor = number(parameters, "factor")
    if factor < 1 or dims <= 2:
        raise SourceError("Dynamic rope scaling needs a factor of at least 1 and more than 2 rotated dims.",
                          f"They are {factor} and {dims}.", CHECK)  # fmt: skip
    return DynamicNtk(factor=factor, original_length=max_length)


def _llama3(parameters: Config, original: int) -> Llama3:
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low > high:  # Llama 4 Scout has them equal
        raise SourceError(
            "llama3 rope scaling needs low_freq_factor <= high_freq_factor.", f"They are {low}, {high}.", CHECK
        )
    return Llama3(number(parameters, "factor"), low, high, original)


def _yarn(parameters: Config, theta: float, original: int, max_length: int) -> Yarn:
    if theta <= 1:
        raise SourceError("YaRN needs a rope_theta above 1.", f"It is {theta}.", CHECK)
    factor = number(parameters, "factor", max_length / original)
    return Yarn(
        factor=factor,
        original_length=original,
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=_or_default(parameters, "beta_fast", 32.0),
        beta_slow=_or_default(parameters, "beta_slow", 1.0),
        truncate=flag(parameters, "truncate", True),
    )


def _yarn_attention_factor(parameters: Config, factor: float) -> float:
    """The factor on cos and sin: as given, or from ``mscale`` over ``mscale_all_dim``, or 0.1 ln(factor) + 1."""
    if parameters.get("attention_factor") is not None:
        return number(parameters, "attention_factor")
    logarithm = math.log(factor) if factor > 1 else 0.0
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = number(parameters, "mscale"), number(parameters, "mscale_all_dim")
        return (0.1 * above * logarithm + 1) / (0.1 * below * logarithm + 1)
    return 0.1 * logarithm + 1


def _or_default(parameters: Config, key: str, default: float) -> float:
    """A number where absent, null and zero all mean the default, as published YaRN configs are read."""
    return number(parameters, key) if parameters.get(key) else default


def _longrope(parameters: Config, dims: int, original: int, max_length: int) -> LongRope:
    factor = number(parameters, "factor", max_length / original)
    natural = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return LongRope(
        short_factors=_divisors(parameters, "short_factor", dims // 2),
        long_factors=_divisors(parameters, "long_factor", dims // 2),
        original_length=original,
        attention_factor=number(parameters, "attention_factor", natural),
    )


def _divisors(parameters: Config, key: Literal["short_factor", "long_factor"], count: int) -> tuple[float, ...]:
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list) else show(values)
        raise SourceError(f"{key!r} of the rope scaling must list {count} numbers.", f"It has {found}.", CHECK)
    return tuple(number({key: value}, key) for value in values)


def _wrong(key: str, value: Any, wanted: str) -> SourceError:
    return SourceError(f"The config key {key!r} is {show(value)}.", f"It must be {wanted}.", CHECK)


def show(value: Any) -> str:
    """A value of a config as an error shows it, cut to a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
