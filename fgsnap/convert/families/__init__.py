"""The model families: one module each, all alike, all pure.

Adding a family means adding a module and its line here; nothing in the runtime changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fgsnap.convert.families import llama
from fgsnap.convert.rules import Rule
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import DecoderSpec


class Family(NamedTuple):
    """What a family module offers.

    Attributes:
        spec: config.json -> what the model computes.
        rules: spec -> how its tensors are made of a Hugging Face checkpoint's.
        gguf_rules: the same for a GGUF file; None where fgsnap does not read the family from GGUF.
        unused: whether a source tensor, by name, says nothing that the config does not.
        tied_head: names of the output matrix and of the embedding that it equals in a tied checkpoint.
    """

    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    rules: Callable[[DecoderSpec], tuple[Rule, ...]]
    gguf_rules: Callable[[DecoderSpec], tuple[Rule, ...]] | None
    unused: Callable[[str], bool]
    tied_head: tuple[str, str]


_LLAMA = Family(llama.spec, llama.rules, llama.gguf_rules, llama.unused, llama.TIED_HEAD)

FAMILIES: dict[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA}


def find(config: Mapping[str, Any]) -> Family:
    """The family of the config's ``model_type``; UnsupportedModel names those there are."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise SourceError("config.json has no 'model_type'.", f"It is {name!r}; it says which kind of model this is.")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"The model type {name!r} is not supported.",
            f"Supported are {', '.join(sorted(FAMILIES))}.",
            "Ask for the family with its config.json, or upgrade fgsnap.",
        )
    return FAMILIES[name]
