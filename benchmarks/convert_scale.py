"""Conversion of a model that is larger than this machine: Falcon-180B's shapes at TP 8, and throughput on real bytes.

Plans Falcon-180B at full depth. Converts it at full width and --layers layers from a sparse file of zeros, while a
sampler reads RssAnon of the converting process every 10 ms; the peak is held against the goal as it is, interpreter and
libraries included. Then converts a smaller Falcon of random weights (1.5 GB; --quick: 40 MB) at TP 8 beside a plain
read + write + fsync of the same bytes, each in a fresh process, in the order A B B A; what counts is the ratio within a
round. Everything lies under --dir, which needs 5 GB of room, and 2 GB and 5 GB a layer for the zeros; it is removed.

    python benchmarks/convert_scale.py [--dir /path/on/disk] [--rounds 3] [--layers 1] [--output benchmarks/results]

The last line is JSON. Goals: a plan in a second, 512 MiB, and at least 0.8 of the plain copy's throughput.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish
from convert import CHUNK, PLAIN, clear, mebibytes, sampled, small_weights, tell

from fgsnap.bench.record import summary
from fgsnap.convert.families import falcon
from fgsnap.convert.plan import Plan, plan
from fgsnap.convert.rules import sources

GOALS = {"plan_seconds": 1.0, "peak_anonymous_mebibytes": 512, "share_of_plain": 0.8}
TP = 8
FALCON_180B = {
    "model_type": "falcon", "vocab_size": 65024, "hidden_size": 14848, "num_hidden_layers": 80,
    "num_attention_heads": 232, "num_kv_heads": 8, "new_decoder_architecture": True, "bias": False, "alibi": False,
    "parallel_attn": True, "multi_query": True, "layer_norm_epsilon": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
CONVERT = (
    "import sys\nfrom fgsnap.convert import folder\nfrom fgsnap.convert.pipeline import convert\n"
    f"print(convert(sys.argv[1], sys.argv[2], tp={TP}, canary=False).seconds)\n"
)


def main() -> None:
    parser = arguments(__doc__, 3)
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument("--layers", type=int, default=1, help="depth of the sparse Falcon-180B; 0: leave it out")
    parser.add_argument("--quick", action="store_true", help="tiny real weights and one round, to see that it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="fgsnap-bench-") as scratch:
        result = {"quick": options.quick, "tp": TP, "plan": planned(), "goals": GOALS}
        if options.layers:
            result["sparse"] = sparse(Path(scratch), options.layers)
        result["real"] = real(Path(scratch), 1 if options.quick else options.rounds, options.quick)
    finish("convert_scale", {**result, "met": met(result)}, options.output)


def met(result: dict[str, Any]) -> dict[str, bool]:
    peaks = [result[part]["peak_anonymous_mebibytes"] for part in ("sparse", "real") if part in result]
    return {
        "plan_seconds": result["plan"]["seconds"]["max"] <= GOALS["plan_seconds"],
        "peak_anonymous_mebibytes": max(peaks) <= GOALS["peak_anonymous_mebibytes"],
        "share_of_plain": result["real"]["share_of_plain"]["median"] >= GOALS["share_of_plain"],
    }


def planned() -> dict[str, Any]:
    seconds = []
    for _ in range(5):
        begin = time.monotonic()
        made: Plan = plan(falcon.spec(FALCON_180B), TP, "bfloat16")
        seconds.append(time.monotonic() - begin)
    return {"seconds": summary(seconds), "bytes": made.bytes, "tensors": sum(len(rank.tensors) for rank in made.ranks)}


def sparse(scratch: Path, layers: int) -> dict[str, Any]:
    """Full width and few layers, all zeros: what memory depends on is the width."""
    source, target = scratch / "sparse", scratch / "convert"
    size = make_checkpoint(source, {**FALCON_180B, "num_hidden_layers": layers}, b"")
    seconds, peak = sampled(CONVERT, str(source), str(target))
    tell("sparse", size, seconds, peak)
    shutil.rmtree(source)
    shutil.rmtree(target)
    return {
        "layers": layers,
        "bytes": size,
        "seconds": round(seconds, 2),
        "peak_anonymous_mebibytes": round(mebibytes(peak), 2),
    }


def real(scratch: Path, rounds: int, quick: bool) -> dict[str, Any]:
    """A Falcon of random weights: conversion beside a plain copy, each once first and once second in a round."""
    source = scratch / "real"
    width, layers = (768, 2) if quick else (4096, 4)
    shape = {"hidden_size": width, "num_attention_heads": width // 64, "vocab_size": 16384, "num_hidden_layers": layers}
    config = {**FALCON_180B, **shape, "num_kv_heads": 4 if quick else 8}
    size = make_checkpoint(source, config, small_weights(2 * CHUNK))
    sampled(PLAIN, str(source), str(scratch / "plain"))
    runs: dict[str, list[tuple[float, int]]] = {"plain": [], "convert": []}
    for _ in range(rounds):
        for name in ("plain", "convert", "convert", "plain"):
            clear(scratch, source, "warm")
            runs[name].append(sampled(PLAIN if name == "plain" else CONVERT, str(source), str(scratch / name)))
            tell(name, size, *runs[name][-1])
    plain, ours = ([seconds for seconds, _ in runs[name]] for name in ("plain", "convert"))
    shares = [sum(plain[at : at + 2]) / sum(ours[at : at + 2]) for at in range(0, 2 * rounds, 2)]
    return {
        "bytes": size,
        "convert_seconds": summary(ours),
        "plain_seconds": summary(plain),
        "share_of_plain": summary(shares),
        "peak_anonymous_mebibytes": round(max(mebibytes(peak) for _, peak in runs["convert"]), 2),
    }


def make_checkpoint(path: Path, config: dict[str, Any], noise: bytes) -> int:
    """A safetensors checkpoint of the config's shapes, a hole without noise; returns its weight file's bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sources(falcon.rules(falcon.spec(config))).items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + length)}
        end += length
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end if noise else 0, CHUNK):
            shift = 2 * (at // CHUNK % 4096)  # no two chunks alike, for disks that would notice
            file.write(memoryview(noise)[shift : shift + min(CHUNK, end - at)])
        file.truncate(8 + len(text) + end)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


if __name__ == "__main__":
    main()
