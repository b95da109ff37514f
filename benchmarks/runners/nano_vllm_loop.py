"""nano-vllm's schedule and postprocess without a model: CHECKOUT SEQUENCES ... One line of JSON."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

STEPS, WARM = 200, 20


def main(checkout: str, *counts: str) -> None:
    # The package's own __init__ loads the model runner, which needs a GPU; the scheduler needs none of it.
    for name in ("nanovllm", "nanovllm.engine"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(checkout).joinpath(*name.split(".")))]
        sys.modules[name] = package
    config = types.ModuleType("nanovllm.config")
    config.Config = object  # type: ignore[attr-defined]
    sys.modules["nanovllm.config"] = config
    found = {count: loop(int(count)) for count in counts}
    print(json.dumps({"version": "checkout", "us_per_sequence": found}))


def loop(count: int) -> float:
    """Microseconds a sequence and decoding step, the mean of the steps."""
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence
    from nanovllm.sampling_params import SamplingParams

    settings: Any = types.SimpleNamespace(
        max_num_seqs=4096, max_num_batched_tokens=1 << 20, eos=2, kvcache_block_size=256, num_kvcache_blocks=8 * 2048
    )
    scheduler = Scheduler(settings)
    for number in range(count):
        ids = [(number * 31 + at) % 32768 for at in range(16)]
        scheduler.add(Sequence(ids, SamplingParams(max_tokens=STEPS + WARM + 10)))
    times = []
    gc.collect()
    gc.freeze()
    for _ in range(STEPS + WARM):
        begin = time.perf_counter()
        sequences, prefill = scheduler.schedule()
        scheduled = time.perf_counter()
        tokens = [5] * len(sequences)
        sampled = time.perf_counter()
        scheduler.postprocess(sequences, tokens, prefill)
        times.append(time.perf_counter() - sampled + scheduled - begin)
    return 1e6 * statistics.fmean(times[WARM:]) / count


if __name__ == "__main__":
    main(*sys.argv[1:])
