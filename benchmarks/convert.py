"""Conversion's throughput beside a plain copy of the same bytes, and its peak anonymous memory at two sizes.

Makes Llama-shaped safetensors checkpoints of random weights (1 and 4 GB; --quick: 8 and 50 MB) under --dir and removes
them at the end. Every round runs both contestants twice, in the order A B B A, each in a fresh process: a plain read +
write + fsync of the weight file, and a conversion without canary, which also fsyncs. What counts is the ratio within a
round. A sampler reads RssAnon of the converting process every 10 ms; an idle process with the same imports is measured
likewise. A conversion that casts, whose slabs are not the source's own pages, is measured once a size; so is the
process that computes the canary, by itself, beside an idle one that has imported torch.

    python benchmarks/convert.py [--dir /path/on/disk] [--rounds 5] [--cache warm|cold] [--output benchmarks/results]

The last line is JSON. Goals: at least 0.8 of the plain copy's throughput; at most 256 MiB above the idle process, for
each of the three; peaks of both sizes within 10 % of each other, cast or not.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, finish

from fgsnap.bench.record import summary
from fgsnap.convert.families import llama
from fgsnap.convert.rules import sources

GOALS = {"share_of_plain": 0.8, "mebibytes_above_idle": 256, "growth": 1.1}
CHUNK = 8 << 20

IMPORTS = "import sys, time\nfrom fgsnap.convert import folder\nfrom fgsnap.convert.pipeline import convert\n"
CONVERT = IMPORTS + "print(convert(sys.argv[1], sys.argv[2], canary=False).seconds)\n"
CAST = IMPORTS + "print(convert(sys.argv[1], sys.argv[2], dtype='float16', canary=False).seconds)\n"
IDLE = IMPORTS + "time.sleep(0.3)\nprint(0.3)\n"
CANARY = """
import contextlib, os, sys, time
from fgsnap.runtime.canary import main
begin = time.monotonic()
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    code = main([sys.argv[1]])
print(time.monotonic() - begin)
sys.exit(code)
"""
IDLE_TORCH = "import time, torch\ntime.sleep(0.3)\nprint(0.3)\n"
PLAIN = """
import os, sys, time
begin = time.monotonic()
with open(os.path.join(sys.argv[1], "model.safetensors"), "rb") as source, open(sys.argv[2], "wb") as target:
    buffer = memoryview(bytearray(8 << 20))
    while count := source.readinto(buffer):
        target.write(buffer[:count])
    target.flush()
    os.fsync(target.fileno())
print(time.monotonic() - begin)
"""


def main() -> None:
    parser = arguments(__doc__, 5)
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="on the disk to measure, with 13 GB of room; default: here"
    )
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm", help="page cache of the source")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    configs = [config(2, 2), config(2, 6)] if options.quick else [config(6, 2048), config(30, 2048)]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="fgsnap-bench-") as scratch:
        idle = [sampled(IDLE, "", "")[1] for _ in range(rounds)]
        idle_torch = [sampled(IDLE_TORCH, "", "")[1] for _ in range(2)]
        sizes = [measure(each, Path(scratch), rounds, options.cache, max(idle), max(idle_torch)) for each in configs]
    finish("convert", report(sizes, idle, idle_torch, options.cache, options.quick), options.output)


def config(layers: int, width: int) -> dict[str, Any]:
    """A Llama of ``layers`` x about 63 million parameters at width 2048; small widths are for --quick."""
    width = width if width == 2048 else width * 128
    return {
        "model_type": "llama", "vocab_size": 32768 if width == 2048 else 4096, "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip


def report(
    sizes: list[dict[str, Any]], idle: list[int], idle_torch: list[int], cache: str, quick: bool
) -> dict[str, Any]:
    small, large = (size["peak_anonymous_mebibytes"]["max"] for size in sizes)
    above = max(size["mebibytes_above_idle"] for size in sizes)
    canary_above = max(size["canary"]["mebibytes_above_idle"] for size in sizes)
    growth = round(large / small, 3)
    casts = [size["cast"]["peak_anonymous_mebibytes"] for size in sizes]
    cast_above = max(size["cast"]["mebibytes_above_idle"] for size in sizes)
    cast_growth = round(casts[1] / casts[0], 3)
    return {
        "quick": quick,
        "cache": cache,
        "libraries": {name: metadata.version(name) for name in ("numpy", "blake3", "msgspec")},
        "sizes": sizes,
        "idle_anonymous_mebibytes": summary([mebibytes(value) for value in idle], 2),
        "idle_torch_anonymous_mebibytes": summary([mebibytes(value) for value in idle_torch], 2),
        "growth": growth,
        "cast_growth": cast_growth,
        "goals": GOALS,
        "met": {
            "share_of_plain": all(size["share_of_plain"]["median"] >= GOALS["share_of_plain"] for size in sizes),
            "mebibytes_above_idle": above <= GOALS["mebibytes_above_idle"],
            "canary_mebibytes_above_idle": canary_above <= GOALS["mebibytes_above_idle"],
            "cast_mebibytes_above_idle": cast_above <= GOALS["mebibytes_above_idle"],
            "growth": growth <= GOALS["growth"],
            "cast_growth": cast_growth <= GOALS["growth"],
        },
    }


def measure(
    config: dict[str, Any], scratch: Path, rounds: int, cache: str, idle: int, idle_torch: int
) -> dict[str, Any]:
    """Alternate the two contestants over one checkpoint; the first of each pair takes turns. Then the canary, once."""
    source = scratch / "model"
    size = make_checkpoint(source, config)
    runs: dict[str, list[tuple[float, int]]] = {"plain": [], "convert": []}
    sampled(PLAIN, str(source), str(scratch / "plain"))  # both meet a page cache that is filled, or emptied below
    for _ in range(rounds):
        # Either is once first and once second: on many machines the second of two big writers meets a busier disk.
        for name in ("plain", "convert", "convert", "plain"):
            clear(scratch, source, cache)
            program = PLAIN if name == "plain" else CONVERT
            runs[name].append(sampled(program, str(source), str(scratch / name)))
            tell(name, size, *runs[name][-1])
    clear(scratch, source, "warm")
    cast_seconds, cast_peak = sampled(CAST, str(source), str(scratch / "convert"))
    tell("cast", size, cast_seconds, cast_peak)
    clear(scratch, source, "warm")
    sampled(CONVERT, str(source), str(scratch / "convert"))
    canary_seconds, canary_peak = sampled(CANARY, str(scratch / "convert"), "")
    tell("canary", size, canary_seconds, canary_peak)
    clear(scratch, source, "warm")
    shutil.rmtree(source)
    peaks = [mebibytes(peak) for _, peak in runs["convert"]]
    plain, ours = ([seconds for seconds, _ in runs[name]] for name in ("plain", "convert"))
    shares = [sum(plain[at : at + 2]) / sum(ours[at : at + 2]) for at in range(0, 2 * rounds, 2)]
    return {
        "bytes": size,
        "convert_seconds": summary(ours),
        "plain_seconds": summary(plain),
        "share_of_plain": summary(shares),
        "peak_anonymous_mebibytes": summary(peaks, 2),
        "mebibytes_above_idle": round(max(peaks) - mebibytes(idle), 2),
        "cast": {
            "seconds": round(cast_seconds, 2),
            "peak_anonymous_mebibytes": round(mebibytes(cast_peak), 2),
            "mebibytes_above_idle": round(mebibytes(cast_peak - idle), 2),
        },
        "canary": {
            "seconds": round(canary_seconds, 2),
            "peak_anonymous_mebibytes": round(mebibytes(canary_peak), 2),
            "mebibytes_above_idle": round(mebibytes(canary_peak - idle_torch), 2),
        },
    }


def tell(name: str, size: int, seconds: float, peak: int) -> None:
    rate = size / seconds / 1e6
    print(
        f"{size / 1e9:6.2f} GB {name:<8} {seconds:8.2f} s {rate:8.0f} MB/s {mebibytes(peak):7.1f} MiB", file=sys.stderr
    )


def make_checkpoint(path: Path, config: dict[str, Any]) -> int:
    """A safetensors checkpoint of the config's shapes; returns the bytes of its weight file."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in sources(llama.rules(llama.spec(config))).items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + length)}
        end += length
    text = json.dumps(header).encode()
    noise = memoryview(small_weights(CHUNK + 8192))
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, CHUNK):
            shift = 2 * (at // CHUNK % 4096)  # no two chunks alike, for disks that would notice
            file.write(noise[shift : shift + min(CHUNK, end - at)])
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


def small_weights(size: int) -> bytes:
    """bfloat16 numbers between 0.008 and 0.016 of either sign, so that a forward stays finite; ``size`` bytes."""
    bits = np.frombuffer(random.Random(1).randbytes(size), np.uint16)
    return bytes((bits & 0x807F | 0x3C00).astype("<u2"))


def clear(scratch: Path, source: Path, cache: str) -> None:
    """Remove what the last run wrote, let the disk come to rest, and empty the source's page cache if asked."""
    shutil.rmtree(scratch / "convert", ignore_errors=True)
    (scratch / "plain").unlink(missing_ok=True)
    os.sync()
    if cache == "cold":
        with (source / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sampled(program: str, source: str, target: str) -> tuple[float, int]:
    """Run a program in a fresh process: the seconds it tells, and the peak of its anonymous memory in bytes."""
    process = subprocess.Popen([sys.executable, "-P", "-c", program, source, target], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    assert process.stdout is not None
    told = process.stdout.read()
    process.stdout.close()
    assert process.returncode == 0, f"a contestant failed with code {process.returncode}"
    return float(told), peak


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def mebibytes(count: int) -> float:
    return count / (1 << 20)


if __name__ == "__main__":
    main()
