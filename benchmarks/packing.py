"""What the packed layout is worth: a snapshot for CPUs beside a generic one, on the native backend.

Both hold SmolLM2-135M-Instruct in bfloat16 and run in this process, each with its own KV cache, in turn within every
round. From the generic one the panels that the kernels read are made anew in every forward.

    python benchmarks/packing.py [--rounds 5] [--output benchmarks/results]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import arguments, finish, smollm2_gguf
from engines.contest import PROMPT, prompts

from fgsnap.bench import local
from fgsnap.bench.record import summary
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.snapshot import open_snapshot

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))
TARGETS = ("generic", "cpu")
DECODE = ((1, 64), (8, 64), (32, 32))
PREFILL = (512, 2048)
OPTIONS = EngineOptions(backend="native", tp=1, max_model_len=2304, kv_memory=1 << 30)


def main() -> None:
    options = arguments(__doc__, 5).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        engines = {target: engine_of(Path(scratch) / target, target) for target in TARGETS}
        rates: dict[str, dict[str, list[float]]] = {target: {} for target in TARGETS}
        for number in range(-1, options.rounds):
            for target in TARGETS if number % 2 else reversed(TARGETS):
                for job, rate in measured(engines[target], number).items():
                    if number >= 0:  # the round before warms up
                        rates[target].setdefault(job, []).append(rate)
    result = {
        "tokens_per_second": {
            target: {job: summary(values, 1) for job, values in of_target.items()}
            for target, of_target in rates.items()
        },
        "cpu_over_generic": {
            job: summary([a / b for a, b in zip(values, rates["generic"][job], strict=True)], 3)
            for job, values in rates["cpu"].items()
        },
    }
    finish("packing", result, options.output)


def engine_of(folder: Path, target: str) -> Engine:
    command = [FGSNAP, "convert", str(smollm2_gguf()), "-o", str(folder), "--target", target]
    subprocess.run(command, check=True, capture_output=True)
    return Engine(load_as_chosen(open_snapshot(folder), OPTIONS))


def measured(engine: Engine, seed: int) -> Mapping[str, float]:
    """Tokens a second of every job."""
    found: dict[str, float] = {}
    for batch, answer in DECODE:
        rate = local.decode_rate(run(engine, batch, PROMPT, answer, seed), batch)
        assert rate is not None
        found[f"decode_{batch}"] = rate
    for length in PREFILL:
        found[f"prefill_{length}"] = local.prefill_rate(run(engine, 1, length, 1, seed))
    return found


def run(engine: Engine, count: int, length: int, answer: int, seed: int) -> Sequence[local.Step]:
    return local.run(engine, [tuple(prompt) for prompt in prompts(count, length, seed)], answer).steps


if __name__ == "__main__":
    main()
