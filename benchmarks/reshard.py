"""Opening a snapshot at another degree, beside opening one that was converted at that degree: the same bytes.

Makes a Llama-shaped model of random weights (1 GB; --quick: 80 MB) under --dir, its snapshots at TP 1, 2, 4 and 8, and
removes them at the end. A load is one fresh process a rank, all at once: each opens the snapshot and touches every page
of its tensors; imports come before. Every round runs three loads of the same bytes, in turns from the front and from
the back: ``resharded``; ``native``, of a snapshot of that degree, which is mapped; and ``read``, the native rank files
read into memory, which copies as much as resharding does. Once with the files in the page cache and once without.

    python benchmarks/reshard.py [--dir /path/on/disk] [--rounds 5] [--output benchmarks/results]

Device reads are what the disk's own counter says (/sys/dev/block/*/stat); whatever else reads from the disk adds to
them. They are compared with the bytes of the model in every cold load, and with the bytes of every tensor of every
rank, each opened by itself, which is printed.

The last line is JSON. Goals: no byte copied twice; of the snapshot at TP 8, at most 1.05 bytes read from the device for
each that is needed, of every tensor of 1 MiB or more too (a smaller one is a few pages, which begin and end in its
neighbours); cold loads that take at most 1.2 times as long as native ones, and warm loads that take at most 1.2 times
as long as ``read``. A warm native load copies nothing, and nothing that copies can be as quick.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, finish
from convert import config, make_checkpoint

from fgsnap.bench.record import summary
from fgsnap.convert.pipeline import convert
from fgsnap.layout import logical_shapes, stored_tensors
from fgsnap.snapshot import TensorBytes, gathered, open_snapshot
from fgsnap.spec import DTYPE_BYTES

GOALS = {"copied": 1.0, "device_reads": 1.05, "cold_ratio": 1.2, "warm_ratio_to_read": 1.2}
PAIRS = ((8, 4), (8, 2), (8, 1), (1, 2), (1, 4))
TARGETS = ("generic", "cpu")
CACHES = ("warm", "cold")
TRIES = 3
PAGE = 4096
LARGE = 1 << 20

COMMON = """
import json, mmap, os, sys, time
import numpy as np
path, tp, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def touch(data):
    return int(np.frombuffer(data, np.uint8)[::4096].sum(dtype=np.uint64))
def begin():
    print("ready", flush=True)
    sys.stdin.readline()
def end(**found):
    print(json.dumps({"end": time.monotonic(), **found}))
"""
OPEN = (
    COMMON
    + """
from fgsnap.snapshot import open_snapshot, opened_at
begin()
snapshot = open_snapshot(path)
opened = opened_at(snapshot, tp, rank)
touched = [touch(found.data) for found in opened.values()]
end(copied=snapshot.copied, bytes=sum(len(found.data) for found in opened.values()))
"""
)
READ = (
    COMMON
    + """
from fgsnap.snapshot import rank_file
begin()
descriptor = os.open(os.path.join(path, rank_file(rank, tp)), os.O_RDONLY)
size = os.fstat(descriptor).st_size
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
place, at = memoryview(memory), 0
while at < size:
    at += os.preadv(descriptor, [place[at : at + (4 << 20)]], at)
touched = touch(place)
end(copied=size, bytes=size)
"""
)


class Load(NamedTuple):
    """What one load of all ranks took; ``device`` are the bytes that the disk gave meanwhile."""

    seconds: float
    copied: int
    bytes: int
    device: int


def main() -> None:
    parser = arguments(__doc__, 5)
    parser.add_argument("--dir", type=Path, default=Path(), help="on the disk to measure, with 6 GB of room; here")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds, to see that it runs")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    shape = config(2, 8) if options.quick else config(6, 2048)
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="fgsnap-bench-") as scratch:
        checkpoint = Path(scratch) / "model"
        make_checkpoint(checkpoint, shape)
        results = []
        for target in TARGETS:
            snapshots = {tp: Path(scratch) / f"{target}-{tp}" for tp in (1, 2, 4, 8)}
            for tp, snapshot in snapshots.items():
                convert(str(checkpoint), snapshot, tp=tp, target=target, canary=False)
            results += [measure(snapshots, target, own, to, rounds) for own, to in PAIRS]
            for snapshot in snapshots.values():
                shutil.rmtree(snapshot)
    finish("reshard", {"quick": options.quick, "pairs": results, "goals": GOALS, "met": met(results)}, options.output)


def measure(snapshots: dict[int, Path], target: str, own: int, to: int, rounds: int) -> dict[str, Any]:
    """All loads of one pair of degrees, and the device reads of its tensors."""
    needed, label = model_bytes(snapshots[own]), f"{target} {own} -> {to}"
    contestants = {"resharded": (OPEN, own), "native": (OPEN, to), "read": (READ, to)}
    loads: dict[tuple[str, str], list[Load]] = {(name, cache): [] for name in contestants for cache in CACHES}
    for number in range(-1, rounds):
        for cache in CACHES:
            for name in list(contestants)[:: 1 if number % 2 else -1]:
                program, degree = contestants[name]
                if cache == "cold":
                    drop(snapshots[degree])
                found = load(program, snapshots[degree], to)
                if number >= 0:  # the first round fills the page cache
                    loads[name, cache].append(found)
                    tell(f"{label} {name:<9} {cache} {found.seconds:7.3f} s, device {found.device / 1e6:7.1f} MB")
    tensors = sorted(device_reads(snapshots[own], to, label), reverse=True)
    large = [tensor for tensor in tensors if tensor[-1] >= LARGE]
    cold = [each.device / needed for each in loads["resharded", "cold"]]
    assert min(cold) > 0.9, "the page cache could not be emptied, or this file system's disk is another one"
    return {
        "target": target,
        "from": own,
        "to": to,
        "bytes": needed,
        "copied": max(each.copied / each.bytes for each in loads["resharded", "warm"]),
        "seconds": {" ".join(which): summary([each.seconds for each in done]) for which, done in loads.items()},
        "cold_ratio": ratio(loads["resharded", "cold"], loads["native", "cold"]),
        "cold_ratio_to_read": ratio(loads["resharded", "cold"], loads["read", "cold"]),
        "warm_ratio": ratio(loads["resharded", "warm"], loads["native", "warm"]),
        "warm_ratio_to_read": ratio(loads["resharded", "warm"], loads["read", "warm"]),
        "device_reads": summary(cold, 3),
        "device_reads_of_tensors": {"most": large[0][0], "worst": large[:3], "tensors": len(tensors)},
    }


def ratio(ours: list[Load], theirs: list[Load]) -> dict[str, float | int]:
    return summary([one.seconds / other.seconds for one, other in zip(ours, theirs, strict=True)], 3)


def met(results: list[dict[str, Any]]) -> dict[str, bool]:
    from_eight = [result for result in results if result["from"] == 8]
    return {
        "copied": all(result["copied"] <= GOALS["copied"] for result in results),
        "device_reads": all(
            result["device_reads"]["median"] <= GOALS["device_reads"]
            and result["device_reads_of_tensors"]["most"] <= GOALS["device_reads"]
            for result in from_eight
        ),
        **{
            name: all(result[name]["median"] <= GOALS[name] for result in from_eight)
            for name in ("cold_ratio", "warm_ratio_to_read")
        },
    }


def load(program: str, snapshot: Path, tp: int) -> Load:
    """Run a process a rank; what counts is from the word to begin until the last has ended."""
    with contextlib.ExitStack() as running:
        ranks = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", program, str(snapshot), str(tp), str(rank)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(tp)
        ]
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        before, begin = disk_bytes(snapshot), time.monotonic()
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
        found = [json.loads(rank.stdout.readline()) for rank in ranks if rank.stdout is not None]
    device = disk_bytes(snapshot) - before
    copied, size = (sum(each[key] for each in found) for key in ("copied", "bytes"))
    return Load(max(each["end"] for each in found) - begin, copied, size, device)


def device_reads(path: Path, to: int, label: str) -> Iterator[tuple[float, int, str, int]]:
    """(device bytes / needed bytes, rank, name, needed bytes) of each tensor that is gathered by itself."""
    with open_snapshot(path) as snapshot:
        spec, own = snapshot.manifest.spec, snapshot.manifest.tp
    for rank in range(to):
        for tensor in stored_tensors(spec, to, rank):
            least = math.inf
            for _ in range(TRIES):  # others may use the disk at times; nobody makes it read less
                with open_snapshot(path) as snapshot:
                    drop(path)
                    before = disk_bytes(path)
                    needed = touched(gathered(snapshot, [tensor], rank * own // to)[tensor.name])
                    least = min(least, (disk_bytes(path) - before) / needed)
                if least <= GOALS["device_reads"]:
                    break
            tell(f"{label} rank {rank} {tensor.name:<28} {needed / 1e6:8.3f} MB, device {least:.3f}")
            yield round(least, 4), rank, tensor.name, needed


def touched(found: TensorBytes) -> int:
    """Look at every page of a tensor; its bytes."""
    sum(found.data[::PAGE])
    return len(found.data)


def model_bytes(path: Path) -> int:
    """Bytes of all logical tensors, each once: what the ranks of one host need from the disk together."""
    with open_snapshot(path) as snapshot:
        stored = {segment.tensor: entry.dtype for entry in snapshot.manifest.tensors for segment in entry.segments}
        shapes = logical_shapes(snapshot.manifest.spec)
        return sum(math.prod(shape) * DTYPE_BYTES[stored[name]] for name, shape in shapes.items())


def drop(snapshot: Path) -> None:
    """Take the rank files out of the page cache."""
    for file in snapshot.glob("rank-*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes(path: Path) -> int:
    """Bytes that the disk under ``path`` has given since the system started."""
    device = path.stat().st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    assert counters.exists(), f"{path} is not on a disk of its own, which would count what it reads"
    return int(counters.read_text().split()[2]) * 512


def tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
