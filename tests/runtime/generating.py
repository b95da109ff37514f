"""What a decoder says of two ragged sequences. A program too: ranks are forked, and a test's process has threads."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from itertools import accumulate, chain

from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.decoder import Decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.snapshot import open_snapshot

KV_MEMORY = 8 << 20
MAX_LENGTH = 64
STEPS = 14


def generated(decoder: Decoder) -> tuple[list[float], list[list[int]]]:
    """Logits of every step and the greedy sequences.

    A step takes four tokens of each, so that one generates while the other's prompt is not yet through.
    """
    sequences, done, tables = [[5, 7, 90, 3, 11, 2, 8, 64, 33, 21, 17], [40, 2, 9]], [0, 0], [[3, 1, 0], [2, 5, 4]]
    found: list[float] = []
    for _ in range(STEPS):
        parts = [tokens[at : at + 4] for tokens, at in zip(sequences, done, strict=True)]
        ends = list(accumulate(map(len, parts)))
        positions = [at + i for part, at in zip(parts, done, strict=True) for i in range(len(part))]
        done = [at + len(part) for part, at in zip(parts, done, strict=True)]
        rows = [end - 1 for end in ends]
        logits = decoder.forward(Batch([*chain(*parts)], positions, [0, *ends], done, tables, rows))
        found += decoder.ops.floats(logits).tolist()
        for tokens, picked, at in zip(
            sequences, decoder.sample(logits, [Sampling()] * 2, done).tokens, done, strict=True
        ):
            if at == len(tokens):
                tokens.append(picked)
    return found, sequences


def main(backend: str, dtype: str, *jobs: tuple[str, int]) -> None:
    """Print a line of JSON a job, which is a snapshot and a degree: what ``generated`` gives, or where it failed."""
    if backend == "reference":
        import torch  # noqa: F401  before ranks are forked, unlike fgsnap: once for all jobs and ranks
    for path, tp in jobs:
        options = EngineOptions(
            backend=backend, device="cpu", dtype=dtype, tp=tp, threads=max(2, tp), kv_memory=KV_MEMORY,
            max_model_len=MAX_LENGTH,
        )  # fmt: skip
        try:
            print(json.dumps(generated(load_as_chosen(open_snapshot(path), options))), flush=True)
        except Exception:
            print(json.dumps(traceback.format_exc()), flush=True)
        gc.collect()  # a process belongs to one group of ranks at a time


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
