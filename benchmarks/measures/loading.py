"""Mapping 2.4 GB of weights and touching every page, warm and cold.

Warm, beside safetensors' own mapping of the same tensors. Cold, beside ``dd`` of the same file: before each run its
pages are dropped from the page cache, and mincore must find none; after it, all of them but the few that a host which
takes idle memory back may have dropped already.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgsnap.bench.record import summary
from measures.models import Model
from measures.setting import tell

MOST = 0.9

TOUCH = """
import sys, time
import numpy as np
def touch(raw):
    return int(raw[::4096].sum(dtype=np.uint64))
"""
OURS = (
    TOUCH
    + """
from fgsnap.snapshot import open_snapshot
begin = time.monotonic()
snapshot = open_snapshot(sys.argv[1])
for entry in snapshot.manifest.tensors:
    touch(np.frombuffer(snapshot.tensor(entry), np.uint8))
print(time.monotonic() - begin)
"""
)
SAFETENSORS = (
    TOUCH
    + """
import torch
from safetensors import safe_open
begin = time.monotonic()
with safe_open(sys.argv[1], framework="pt") as file:
    for name in file.keys():
        touch(file.get_tensor(name).reshape(-1).view(torch.uint8).numpy())
print(time.monotonic() - begin)
"""
)


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """Seconds of each, in paired rounds."""
    ranks = sorted(model.snapshot.glob("rank-*.safetensors"))
    assert len(ranks) == 1, "the model is of one rank"
    rank, plain = ranks[0], model.checkpoint / "model.safetensors"
    os.sync()
    times: dict[str, list[float]] = {name: [] for name in ("fgsnap", "safetensors", "fgsnap cold", "dd cold")}
    for number in range(-1, rounds):
        found = {
            "fgsnap": _program(OURS, model.snapshot),
            "safetensors": _program(SAFETENSORS, plain),
            "fgsnap cold": _cold(rank, lambda: _program(OURS, model.snapshot)),
            "dd cold": _cold(rank, lambda: _dd(rank)),
        }
        tell(", ".join(f"{name} {seconds:.3f} s" for name, seconds in found.items()))
        if number >= 0:
            for name, seconds in found.items():
                times[name].append(seconds)
    warm = [ours / theirs for ours, theirs in zip(times["fgsnap"], times["safetensors"], strict=True)]
    cold = [theirs / ours for ours, theirs in zip(times["fgsnap cold"], times["dd cold"], strict=True)]
    return {
        "bytes": rank.stat().st_size,
        "seconds": {name: summary(values) for name, values in times.items()},
        "warm_ratio": summary(warm, 3),
        "cold_share_of_dd": summary(cold, 3),
    }


def _program(program: str, path: Path) -> float:
    """The seconds that a program tells, which do not hold its imports."""
    command = [sys.executable, "-P", "-c", program, str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _dd(path: Path) -> float:
    begin = time.monotonic()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)
    return time.monotonic() - begin


def _cold(path: Path, run: Callable[[], float]) -> float:
    """The seconds of ``run``, which finds no page of the file in memory and leaves all of them there."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident(path)
    assert before == 0, f"{before} of the pages of {path.name} could not be dropped"
    seconds = run()
    assert resident(path) > MOST, f"{path.name} was not read whole, or is dropped faster than it is read"
    return seconds


def resident(path: Path) -> float:
    """The share of a file's pages that are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private, so that ctypes may take its address
    try:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        code = libc.mincore(address, ctypes.c_size_t(len(mapped)), found)
        del anchor
        assert code == 0, os.strerror(ctypes.get_errno())
        return sum(byte & 1 for byte in found) / pages
    finally:
        mapped.close()
