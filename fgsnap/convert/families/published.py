"""The families as a list for people, and the published checkpoints that stand behind it.

``published.jsonl`` holds facts of checkpoints on the Hub: the keys of config.json that say what is computed, and how
many parameters the authors or the Hub count. Tests plan each of them; what they use is what a family's features are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from fgsnap.convert.families import FAMILIES, find
from fgsnap.layout import logical_shapes
from fgsnap.spec import DecoderSpec, features

PLAIN = frozenset("attention.rope layer.attn_in layer.mlp_in layer.sequential mlp.silu norm.rms".split())
"""What the first Llama uses."""

WORDS = {
    "mlp.gated": "mlp without gate",
    "norm.weight": "norm without weight",
    "yarn.truncate": "yarn without truncate",
    "attention.unrotated": "layers without rotation",
    "rope.partial": "rotation of a part of each head",
}
"""Features whose name stands for a field that is switched off, or for how two fields relate."""


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One checkpoint: its repository, its parameters as they are published, and its config."""

    repo: str
    parameters: int
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        """As the config says."""
        return str(self.config["model_type"])

    def spec(self) -> DecoderSpec:
        """What the checkpoint computes."""
        return find(self.config).spec(self.config)


class Listed(msgspec.Struct, frozen=True):
    """What fgsnap says of one model type: the models it covers, what they need, what of them is refused and why."""

    model_type: str
    models: str
    checkpoints: tuple[str, ...]
    features: tuple[str, ...]
    refused: str

    @property
    def needs(self) -> str:
        """The features that a plain decoder does not have, in one line."""
        return ", ".join(WORDS.get(feature, feature) for feature in self.features if feature not in PLAIN)


def published() -> tuple[Published, ...]:
    """Every checkpoint of ``published.jsonl``."""
    lines = Path(__file__).with_name("published.jsonl").read_bytes()
    return tuple(msgspec.json.Decoder(Published).decode_lines(lines))


def listing() -> tuple[Listed, ...]:
    """Every model type that is supported, in the order of the alphabet."""
    known = published()
    return tuple(_listed(model_type, known) for model_type in sorted(FAMILIES))


def _listed(model_type: str, known: tuple[Published, ...]) -> Listed:
    family = FAMILIES[model_type]
    own = [checkpoint for checkpoint in known if checkpoint.model_type == model_type]
    specs = [checkpoint.spec() for checkpoint in own] or _inside(model_type, known)
    used = frozenset[str]().union(*map(used_by, specs))
    names = tuple(checkpoint.repo for checkpoint in own)
    return Listed(model_type, family.models, names, tuple(sorted(used)), family.refused)


def _inside(model_type: str, known: tuple[Published, ...]) -> list[DecoderSpec]:
    """The decoders of that type inside models with more parts, which is where some are published only."""
    parts = [checkpoint.config.get("text_config", {}) for checkpoint in known]
    return [FAMILIES[model_type].spec(part) for part in parts if part.get("model_type") == model_type]


def used_by(spec: DecoderSpec) -> frozenset[str]:
    """Its features, with what of the rotations no single field tells."""
    found, layers = features(spec), [kind.attention for kind in spec.layer_kinds]
    if spec.ropes and any(layer.rope is None for layer in layers):
        found |= {"attention.unrotated"}
    whole = {layer.latent.rope_dim if layer.latent else layer.head_dim for layer in layers}
    return found | {"rope.partial" for rope in spec.ropes if rope.dims not in whole and not rope.proportional_head_dim}


def parameter_count(spec: DecoderSpec) -> int:
    """Numbers in all logical tensors: a tied head counts once."""
    return sum(map(math.prod, logical_shapes(spec).values()))
