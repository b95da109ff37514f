"""What a family module offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from fgsnap.convert.rules import Rule
from fgsnap.spec import DecoderSpec

Spec = Callable[[Mapping[str, Any]], DecoderSpec]
Rules = Callable[[DecoderSpec], tuple[Rule, ...]]
Unused = Callable[[str, DecoderSpec, Collection[str]], bool]

_COMPUTED = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope_(freqs|factors_long|factors_short)\.weight)"
)


def computed(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """Whether a source tensor holds only what the config says too (a GGUF source puts rope_* into its config)."""
    return _COMPUTED.fullmatch(name) is not None


def computed_or_beyond(name: str, spec: DecoderSpec, held: Collection[str]) -> bool:
    """The same for checkpoints with layers after the last one, which predict more than the next token.

    Those norm an embedding and a hidden state (enorm, hnorm). A layer without is one that the config denies.
    """
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    if layer is None or int(layer[1]) < spec.depth:
        return computed(name, spec, held)
    return all(f"{layer[0]}{norm}.weight" in held for norm in ("enorm", "hnorm"))


class Family(NamedTuple):
    """What a family module offers.

    Attributes:
        models: published models of the family, for people to find theirs.
        spec: config.json -> what the model computes.
        rules: spec -> how its tensors are made of a checkpoint's; one for each way that checkpoints name them. The
            first whose sources are all there is taken.
        refused: what of the family is not supported, and why.
        quantised_rules: the same for checkpoints whose tensors have other names, or lie in another order, where they
            are quantised; export never writes those.
        gguf_rules: the same for a GGUF file; None where fgsnap does not read the family from GGUF.
        unused: whether a source tensor, by name, says nothing that the config does not; told the names of all that the
            source holds.
        tied_head: names of the output matrix and of the embedding that it equals in a tied checkpoint.
    """

    models: str
    spec: Spec
    rules: tuple[Rules, ...]
    refused: str = ""
    quantised_rules: tuple[Rules, ...] = ()
    gguf_rules: Rules | None = None
    unused: Unused = computed
    tied_head: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
