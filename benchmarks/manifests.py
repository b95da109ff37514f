"""Write manifests/*.json: the plans of the deployments that DeepSpeed-FastGen was published with, from their configs.

    python benchmarks/manifests.py            write them
    python benchmarks/manifests.py --check    fail when they are not what the code plans

A plan says what lies in a rank's file: every tensor of one layer of a kind, with the layers that are alike. The digests
cover what that leaves out: each tensor's offset, and which rows or columns of which logical tensors a rank holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fgsnap.convert.families.published import Published, parameter_count, published
from fgsnap.convert.plan import checked_dtype, rank_layouts
from fgsnap.layout import kv_head_cut, logical_shapes
from fgsnap.snapshot import PlannedTensor, rank_file
from fgsnap.spec import DTYPE_BYTES, DecoderSpec

MANIFESTS = Path(__file__).parent.parent / "manifests"


class Deployment(NamedTuple):
    """A checkpoint over so many ranks, in the dtype that its weights are published in."""

    repo: str
    tp: int
    dtype: str


DEPLOYMENTS = {
    "falcon-180b-tp8": Deployment("tiiuae/falcon-180B", 8, "bfloat16"),
    "falcon-40b-tp2": Deployment("tiiuae/falcon-40b", 2, "bfloat16"),
    "falcon-7b-tp1": Deployment("tiiuae/falcon-7b", 1, "bfloat16"),
    "llama-2-70b-tp4": Deployment("meta-llama/Llama-2-70b-hf", 4, "float16"),
    "mistral-7b-v0.1-tp1": Deployment("mistralai/Mistral-7B-v0.1", 1, "bfloat16"),
    "mixtral-8x7b-tp4": Deployment("mistralai/Mixtral-8x7B-v0.1", 4, "bfloat16"),
    "opt-30b-tp2": Deployment("facebook/opt-30b", 2, "float16"),
    "phi-2-tp1": Deployment("microsoft/phi-2", 1, "float16"),
    "qwen-14b-tp1": Deployment("Qwen/Qwen-14B", 1, "bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, text in manifests().items():
        path = MANIFESTS / f"{name}.json"
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"manifests/{path.name} is not what the code plans: run python benchmarks/manifests.py")


def manifests() -> dict[str, str]:
    """The text of each file, by its name without the suffix."""
    known = {checkpoint.repo: checkpoint for checkpoint in published()}
    return {name: as_lines(planned(known[own.repo], own)) for name, own in DEPLOYMENTS.items()}


def planned(checkpoint: Published, deployment: Deployment) -> dict[str, Any]:
    """The plan of one deployment."""
    spec, tp, dtype = checkpoint.spec(), deployment.tp, checked_dtype(deployment.dtype)
    assert dtype is not None
    layouts = rank_layouts(spec, tp, dict.fromkeys(logical_shapes(spec), dtype))
    first = [(each.name, each.dtype, each.shape, each.offset, each.bytes) for each in layouts[0].tensors]
    for layout in layouts:
        assert [(each.name, each.dtype, each.shape, each.offset, each.bytes) for each in layout.tensors] == first
    return {
        "schema_version": 1,
        "checkpoint": checkpoint.repo,
        "config": checkpoint.config,
        "tp": tp,
        "dtype": dtype,
        "parameters": parameter_count(spec),
        "bytes": sum(layout.size for layout in layouts),
        "kv_bytes_per_token": spec.kv_values_per_token() * DTYPE_BYTES[dtype],
        "kv_bytes_per_token_of_a_rank": kv_values_of_a_rank(spec, tp) * DTYPE_BYTES[dtype],
        "spec_sha256": digest(spec),
        "ranks": [
            {"file": rank_file(rank, tp), "bytes": layout.size, "table_sha256": digest(layout.tensors)}
            for rank, layout in enumerate(layouts)
        ],
        "tensors_of_a_rank": list(table(layouts[0].tensors)),
    }


def kv_values_of_a_rank(spec: DecoderSpec, tp: int) -> int:
    """Keys and values of a token that one rank caches; with fewer key heads than ranks, several cache the same."""
    every = [spec.layer(index).attention for index in range(spec.depth)]
    return sum(kv_head_cut(own, tp, 0).size * (own.head_dim + own.value_width) for own in every)


def digest(value: Any) -> str:
    """The sha256 of a value's canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def table(tensors: Iterable[PlannedTensor]) -> Iterator[dict[str, Any]]:
    """The tensors of a rank in file order; those that are alike in several layers are one entry."""
    layers: dict[tuple[Any, ...], list[int]] = {}
    for tensor in tensors:
        found = re.fullmatch(r"layers\.(\d+)\.(.*)", tensor.name)
        name = f"layers.{{layer}}.{found[2]}" if found else tensor.name
        alike = (name, tensor.dtype, tensor.shape, tensor.bytes, parts(tensor))
        layers.setdefault(alike, []).extend([int(found[1])] if found else [])
    for (name, dtype, shape, size, of), numbers in layers.items():
        where = {"layers": spans(numbers)} if numbers else {}
        yield {"name": name, **where, "dtype": dtype, "shape": shape, "bytes": size, "of": of}


def parts(tensor: PlannedTensor) -> str:
    """The last words of the logical tensors that a stored one is made of."""
    names = [segment.tensor.split(".")[-2] if segment.tensor else "padding" for segment in tensor.segments]
    return " ".join(dict.fromkeys(names))


def spans(numbers: list[int]) -> str:
    """Ascending numbers in short: 0-3 7."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def as_lines(value: dict[str, Any]) -> str:
    """JSON with a line for each entry of the object, of objects in it, and of lists of objects in it."""

    def shown(inner: Any) -> str:
        if isinstance(inner, dict):
            entries = (f"    {json.dumps(key)}: {json.dumps(each)}" for key, each in inner.items())
            return "{\n" + ",\n".join(entries) + "\n  }"
        if isinstance(inner, list):
            return "[\n" + ",\n".join(f"    {json.dumps(each)}" for each in inner) + "\n  ]"
        return json.dumps(inner)

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {shown(each)}" for key, each in value.items()) + "\n}\n"


if __name__ == "__main__":
    main()
