"""The model families: one module each, all alike, all pure.

Adding a family means adding a module and its line here; nothing in the runtime changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgsnap.convert.families import (
    deepseek,
    exaone4,
    falcon,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    llama4,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from fgsnap.convert.families.config import CHECK, show
from fgsnap.convert.families.family import Family
from fgsnap.errors import SourceError, UnsupportedModel

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "exaone4": exaone4.FAMILY,
    "falcon": falcon.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.WITH_VISION,
    "gemma3_text": gemma3.FAMILY,
    "glm": glm4.BEFORE_0414,
    "glm4": glm4.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "gptj": gptj.FAMILY,
    "granite": granite.FAMILY,
    "granitemoe": granite.WITH_EXPERTS,
    "llama": llama.FAMILY,
    "llama4": llama4.WITH_VISION,
    "llama4_text": llama4.FAMILY,
    "mistral": llama.MISTRAL,
    "mixtral": mixtral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo2.WINDOWED,
    "opt": opt.FAMILY,
    "phi": phi.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen": qwen.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
    "stablelm": stablelm.FAMILY,
    "starcoder2": starcoder2.FAMILY,
}
"""By ``model_type``."""

OLDER: dict[str, Family] = {"RefinedWeb": falcon.REFINED_WEB, "RefinedWebModel": falcon.REFINED_WEB}
"""The same by names that only early checkpoints have, with configs of their own; nobody has to be told of them."""


def find(config: Mapping[str, Any]) -> Family:
    """The family of the config's ``model_type``; UnsupportedModel names those there are."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise SourceError(
            "config.json has no 'model_type'.", f"It is {show(name)}; it says which kind of model this is.", CHECK
        )
    if name in OLDER:
        return OLDER[name]
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"The model type {show(name)} is not supported.",
            f"Supported are {', '.join(sorted(FAMILIES))}.",
            "Ask for the family with its config.json, or upgrade fgsnap.",
        )
    return FAMILIES[name]
