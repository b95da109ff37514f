"""What to do with one checkpoint: its spec, its rules, and a dtype for every tensor, settled before a byte is written.

Every tensor of the source is accounted for here: taken by a rule, dropped for a known reason, or refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fgsnap.convert import families
from fgsnap.convert.families.family import Family
from fgsnap.convert.rules import Array, Rule, digest, sources
from fgsnap.convert.source import Source
from fgsnap.errors import SourceError, UnsupportedModel
from fgsnap.spec import DecoderSpec, DType

_ROWS_BYTES = 8 << 20


class Recipe(NamedTuple):
    """A settled conversion.

    Attributes:
        spec: what the model computes.
        rules: how each logical tensor is made.
        read: the dtype each logical tensor has in the source.
        stored: the dtype it gets in the snapshot.
        dropped: source tensors that are not needed.
        digest: the name of the rules.
    """

    spec: DecoderSpec
    rules: dict[str, Rule]
    read: dict[str, DType]
    stored: dict[str, DType]
    dropped: tuple[str, ...]
    digest: str


def settle(source: Source, dtype: DType | None) -> Recipe:
    """Match the source against its family's rules.

    Args:
        source: the checkpoint.
        dtype: store every tensor in this dtype; None keeps each one's own.
    """
    family = families.find(source.config)
    spec = family.spec(source.config)
    rules = _rules(source, family, spec)
    _check_present(source, rules)
    read = {rule.tensor: _read_dtype(source, rule) for rule in rules}
    return Recipe(
        spec=spec,
        rules={rule.tensor: rule for rule in rules},
        read=read,
        stored=dict.fromkeys(read, dtype) if dtype is not None else read,
        dropped=_dropped(source, family, spec, rules),
        digest=digest(rules),
    )


def _rules(source: Source, family: Family, spec: DecoderSpec) -> tuple[Rule, ...]:
    if source.kind == "hf":
        variants = [rules(spec) for rules in (*family.rules, *family.quantised_rules)]
        whole = (rules for rules in variants if sources(rules).keys() <= source.tensors.keys())
        return next(whole, variants[0])
    if family.gguf_rules is None:
        raise UnsupportedModel(
            f"GGUF files of type {source.config['model_type']} are not supported.",
            "",
            "Convert from the original Hugging Face checkpoint.",
        )
    return family.gguf_rules(spec)


def _check_present(source: Source, rules: Iterable[Rule]) -> None:
    """Every tensor that a rule takes must be there, in a usable dtype and the shape that the config implies."""
    wanted = sources(rules)
    absent = [name for name in wanted if name not in source.tensors]
    if absent:
        name = absent[0]
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        if name in source.others:
            raise UnsupportedModel(
                f"The tensor {name!r} is stored as {source.others[name].dtype}{more}.",
                "fgsnap reads weights in float32, bfloat16 and float16.",
                "Convert the unquantised checkpoint.",
            )
        raise SourceError(
            f"The tensor {name!r} is missing{more}.",
            f"config.json implies {len(wanted)} tensors; the checkpoint has {len(source.tensors)}.",
            "Download the checkpoint again; if it stays so, config.json belongs to another model.",
        )
    for name, shape in wanted.items():
        found = source.tensors[name].shape
        if found != shape:
            raise SourceError(
                f"The tensor {name!r} has the wrong shape.",
                f"The checkpoint has {list(found)}; config.json implies {list(shape)}.",
                "Check that config.json and the weights belong together.",
            )


def _read_dtype(source: Source, rule: Rule) -> DType:
    found = {piece.source: source.tensors[piece.source].dtype for piece in rule.takes}
    if len(set(found.values())) > 1:
        raise SourceError(
            f"The parts of {rule.tensor} have different dtypes.",
            "The checkpoint stores " + ", ".join(f"{name} as {dtype}" for name, dtype in found.items()) + ".",
        )
    return next(iter(found.values()))


def _dropped(
    source: Source, family: Family, spec: DecoderSpec, rules: tuple[Rule, ...]
) -> tuple[str, ...]:  # fmt: skip
    """The source's tensors that no rule takes, each for a known reason; any other is refused."""
    held = {*source.tensors} | {*source.others}
    left = sorted(held - {*sources(rules)})
    output, _ = family.tied_head
    embedding = next(rule.takes[0].source for rule in rules if rule.tensor == "embed.weight")
    unknown = [name for name in left if not family.unused(name, spec, held) and not (name == output and spec.head.tied)]
    if unknown:
        shown = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise SourceError(
            f"The checkpoint holds tensors that its config.json does not imply: {shown}.",
            "Leaving them out would change what the model computes.",
            "Check config.json (biases, layer count, tied embeddings): it may lack a key or belong to another model.",
        )
    if output in left and not _equal(source, output, embedding):
        raise SourceError(
            f"{output!r} differs from {embedding!r}, but config.json ties them.",
            "Readers disagree about which one such a checkpoint means.",
            f"Set tie_word_embeddings to false in config.json, or remove {output!r} from the checkpoint.",
        )
    return tuple(left)


def _equal(source: Source, one: str, other: str) -> bool:
    """Whether two source tensors are equal bit for bit, compared by slabs."""
    a, b = source.tensors.get(one), source.tensors[other]
    if a is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    rows = max(1, _ROWS_BYTES // max(1, 4 * int(np.prod(a.shape[1:]))))
    return all(
        _bits(source, one, start, min(start + rows, a.shape[0]))
        == _bits(source, other, start, min(start + rows, a.shape[0]))
        for start in range(0, a.shape[0], rows)
    )


def _bits(source: Source, name: str, start: int, stop: int) -> memoryview:
    flat: Array = source.rows(name, start, stop).view(np.uint8).reshape(-1)
    return flat.data
