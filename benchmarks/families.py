"""Every family beside transformers: tiny random checkpoints, both dtypes, both backends, one rank and several.

    python benchmarks/families.py [--only falcon ...] [--backend native] [--ranks 1 2] [--output benchmarks/results]

Three sequences run side by side, in chunks and over KV blocks that do not divide them. float32: the largest logit
difference as a share of the largest logit (promise: 1e-4), and how many of 3 x 64 greedy tokens agree (promise: all).
bfloat16: the root mean square error of a token's logits against transformers in float32 on the same weights, the median
of all tokens, over that of transformers' own bfloat16 (promise: 1.5). Ranks are processes of their own, which are
started from a fresh one that has no threads. What a backend refuses is told in the row. Over 4 and 8 ranks the
reference computes the first case of each family alone; the others have no rows of it there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import qwen1
import torch
import transformers
from common import finish
from compare import Fgsnap, Transformers, random_sequences, relative_error, tiny_checkpoint, typical_error
from family_cases import CASES, VOCABULARY, Case

from fgsnap.convert.pipeline import convert
from fgsnap.errors import FgsnapError
from fgsnap.kernels import native
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.snapshot import open_snapshot

SEQUENCES = random_sequences((50, 1, 23), VOCABULARY)
ANSWER, CHUNK, BLOCK_SIZE = 64, 9, 7  # none of which divides another
PROMISED_LOGITS, PROMISED_RATIO = 1e-4, 1.5
PATIENCE = 120  # seconds for what takes two


class Theirs(NamedTuple):
    """What transformers says of one checkpoint."""

    exact: torch.Tensor
    rounded: torch.Tensor
    answers: list[list[int]]


class Job(NamedTuple):
    """One row to compute."""

    snapshot: Path
    backend: str
    dtype: str
    tp: int
    max_length: int


class Ours(NamedTuple):
    """What fgsnap says, or why it does not."""

    logits: list[list[float]]
    answers: list[list[int]]
    refused: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of cases that begin with one of these")
    parser.add_argument("--backend", action="append", help="may be given several times; default: all that work here")
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2, 4, 8), help="default: 1 2 4 8")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    backends = options.backend or ["reference", *(["native"] if native.available()[0] else [])]
    names = [name for name in CASES if not options.only or name.startswith(tuple(options.only))]
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # more only wait for one another in matrices as small as these
    os.environ["PYTHONSAFEPATH"] = "1"  # the fork server would find the sources here, not the package that is installed
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "transformers", "fgsnap.runtime.ranks"])
    with processes.Pool(1, maxtasksperchild=1) as fresh:
        rows = [row for name in names for row in compared(name, backends, options.ranks, fresh)]
    kept = all(row["kept"] for row in rows)
    finish("families", {"results": rows, "promises_kept": kept}, options.output)
    return 0 if kept else 1


def compared(name: str, backends: Sequence[str], ranks: Sequence[int], fresh: Pool) -> list[dict[str, Any]]:
    """One row a degree, backend and dtype."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        maker = qwen1.tiny_checkpoint if case.family == "qwen" else tiny_checkpoint
        checkpoint = maker(Path(scratch) / "checkpoint", case.family, "bfloat16", **case.config)
        their = theirs(case, checkpoint)
        rows = []
        for tp in ranks:
            snapshot = Path(scratch) / f"snapshot-{tp}"
            convert(str(checkpoint), snapshot, tp=tp, canary=False)
            able = [backend for backend in backends if computed(name, backend, tp)]
            jobs = [Job(snapshot, backend, dtype, tp, case.max_length)
                    for backend in able for dtype in ("float32", "bfloat16")]  # fmt: skip
            rows += [row(name, job, answer(job, fresh), their) for job in jobs]
        return rows


def computed(name: str, backend: str, tp: int) -> bool:
    """torch's ranks take seconds to meet 64 times, so more than two compute only the first case of each family."""
    first = next(case for case in CASES if CASES[case].family == CASES[name].family)
    return backend == "native" or tp <= 2 or name == first


def theirs(case: Case, checkpoint: Path) -> Theirs:
    exact, rounded = (
        qwen1.Qwen1(checkpoint, dtype, case.max_length) if case.family == "qwen" else Transformers(checkpoint, dtype)
        for dtype in ("float32", "bfloat16")
    )
    answers = [exact.greedy(tokens, ANSWER) for tokens in SEQUENCES]
    return Theirs(exact.logits(SEQUENCES), rounded.logits(SEQUENCES), answers)


def answer(job: Job, fresh: Pool) -> Ours:
    try:
        return asked(one_rank(job)) if job.tp == 1 else fresh.apply_async(ranked, (job,)).get(PATIENCE)
    except FgsnapError as error:
        return Ours([], [], error.what)


def one_rank(job: Job) -> Decoder:
    longest = sum(-(-(len(tokens) + ANSWER) // BLOCK_SIZE) for tokens in SEQUENCES)
    return load_decoder(
        open_snapshot(job.snapshot),
        backend=job.backend,
        device="cpu",
        dtype=job.dtype,
        blocks=longest,
        block_size=BLOCK_SIZE,
        max_length=job.max_length,
        threads=1,
    )


def ranked(job: Job) -> Ours:
    """Computed by ranks that are forked from this process, which ends after it."""
    options = EngineOptions(
        backend=job.backend, device="cpu", dtype=job.dtype, tp=job.tp, max_model_len=job.max_length, kv_memory=64 << 20
    )
    return asked(load_as_chosen(open_snapshot(job.snapshot), options))


def asked(decoder: Decoder) -> Ours:
    ours = Fgsnap(decoder)
    return Ours(ours.logits(SEQUENCES, CHUNK).tolist(), ours.greedy_together(SEQUENCES, ANSWER, CHUNK))


def row(name: str, job: Job, ours: Ours, their: Theirs) -> dict[str, Any]:
    about = {"case": name, "family": CASES[name].family, "tp": job.tp, "backend": job.backend, "dtype": job.dtype}
    if ours.refused:
        print(f"{name:24} TP {job.tp} {job.backend:9} {job.dtype:8}  {ours.refused}", flush=True)
        return {**about, "refused": ours.refused, "kept": False}
    logits = torch.tensor(ours.logits, dtype=torch.float64)
    error, rounding = relative_error(logits, their.exact), typical_error(their.rounded, their.exact)
    ratio = typical_error(logits, their.exact) / rounding
    pairs = [pair for both in zip(ours.answers, their.answers, strict=True) for pair in zip(*both, strict=True)]
    equal = sum(a == b for a, b in pairs)
    exactly = error <= PROMISED_LOGITS and equal == len(pairs)
    kept = exactly if job.dtype == "float32" else ratio <= PROMISED_RATIO
    print(
        f"{name:24} TP {job.tp} {job.backend:9} {job.dtype:8}  error {error:8.2g}  greedy {equal}/{len(pairs)}"
        f"  bf16 ratio {ratio:8.2g}  {'kept' if kept else 'BROKEN'}",
        flush=True,
    )
    return {
        **about,
        "max_relative_logit_error": float(f"{error:.3g}"),
        "transformers_bfloat16_max_relative_logit_error": float(f"{relative_error(their.rounded, their.exact):.3g}"),
        "median_error_ratio_to_transformers_bfloat16": float(f"{ratio:.3g}"),
        "greedy_tokens": len(pairs),
        "greedy_tokens_equal": equal,
        "kept": kept,
    }


if __name__ == "__main__":
    sys.exit(main())
