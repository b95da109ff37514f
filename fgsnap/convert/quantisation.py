"""How a checkpoint's weights are quantised: ``quantization_config``, read against an allow-list.

The methods whose weights can be read as plain numbers pass. Any other one, and any setting that could change what the
stored numbers mean, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fgsnap.convert.source import show
from fgsnap.errors import SourceError, UnsupportedModel

Config = Mapping[str, Any]
Block = tuple[int, int]
Allowed = Mapping[str, tuple[Any, ...]]

# Which modules are quantised, what becomes of activations, who wrote it: the tensors themselves say how each is stored.
HARMLESS = frozenset(
    """
    quant_method version quantization_status global_compression_ratio ignore ignored_layers modules_to_not_convert
    modules_to_convert activation_scheme scale_fmt dequantize weight_block_size config_groups
    """.split()
)
# Of the other settings, the values that leave the numbers as they are; none at all always does.
ONLY: dict[str, Allowed] = {
    "fp8": {"fmt": ("e4m3",), "expert_dtype": ("fp8",)},
    "mxfp4": {},
    "compressed-tensors": {"format": ("float-quantized",), "transform_config": ({},), "sparsity_config": ({},)},
}
# What compressed-tensors must say of each group of weights.
FP8_GROUP: Allowed = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("tensor", "channel", "block"),
    "symmetric": (True,),
}
OTHERWISE = "Convert the unquantised checkpoint, or a GGUF file of the model."


class Quantisation(NamedTuple):
    """A method that fgsnap reads, and the rows and columns that share a scale, where config.json names such blocks."""

    method: str
    block: Block | None


def quantisation(config: Config) -> Quantisation | None:
    """What config.json says about quantised weights; None: they are plain.

    Raises:
        UnsupportedModel: the method, or its form, is not read.
        SourceError: the description is damaged.
    """
    if config.get("compression_config"):
        raise _other("compression_config", None)
    stated = config.get("quantization_config")
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if not isinstance(method, str) or method not in ONLY:
        raise _other("quantization_config", method)
    _check(stated, ONLY[method])
    if method == "compressed-tensors":
        return Quantisation(method, _block_of_groups(stated.get("config_groups")))
    return Quantisation(method, _block("weight_block_size", stated.get("weight_block_size")))


def _check(stated: Config, only: Allowed) -> None:
    for key, value in stated.items():
        dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
        if value is not None and key not in HARMLESS and value not in only.get(key, ()) and not dense:
            raise _unknown(key, value)


def _block_of_groups(groups: Any) -> Block | None:
    """The blocks that compressed-tensors names for all groups, each of which must be FP8."""
    if not isinstance(groups, dict) or not groups:
        raise _unknown("config_groups", groups)
    blocks = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _unknown("config_groups", groups)
        for key, allowed in FP8_GROUP.items():
            if weights.get(key) not in allowed:
                raise _unknown(key, weights.get(key))
        blocks.add(_block("block_structure", weights.get("block_structure")))
    if len(blocks) > 1:
        raise _unknown("block_structure", sorted(map(str, blocks)))
    return blocks.pop()


def _block(key: str, value: Any) -> Block | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in value):
        raise SourceError(f"The quantisation setting {key!r} is {show(value)}.", "It must be two sizes or null.")
    return value[0], value[1]


def _other(key: str, method: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"This checkpoint is quantised (config key {key!r}, method {show(method)}).",
        f"The methods that fgsnap reads are {', '.join(ONLY)}.",
        OTHERWISE,
    )


def _unknown(key: str, value: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"The quantisation setting {key!r} is {show(value)}.",
        "fgsnap does not know which numbers the weights then stand for.",
        OTHERWISE,
    )
