"""The engine in this process, without HTTP: how fast prompts are read and answers are written.

A run queues its requests all at once and steps the engine until each has its answer; every step is timed and known by
what it carried. Steps that carried prompt tokens give the prefill rate, with whatever decodes shared them; steps in
which every place of the batch decoded, and nothing else, give the decode rate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fgsnap.bench.record import quantile, summary
from fgsnap.errors import FgsnapError, HostError, UsageError
from fgsnap.runtime.budget import settled_budget
from fgsnap.runtime.decoder import Decoder
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.runtime.request import Request, SamplingParams
from fgsnap.runtime.worker import check_canary, end_when_unreadable
from fgsnap.snapshot import open_snapshot

SEED = 0  # the ids of a prompt do not change what it costs


class Shape(NamedTuple):
    """Every request of a run: tokens of the prompt and of the answer."""

    prompt: int
    answer: int


class Step(NamedTuple):
    """One forward: its seconds, and the tokens it read of prompts and wrote of answers."""

    seconds: float
    read: int
    written: int


class Run(NamedTuple):
    """What a run took.

    Attributes:
        first_tokens: seconds from the start to the first token, of each request.
        gaps: seconds between two tokens of one answer, of all answers.
        steps: in order.
    """

    first_tokens: list[float]
    gaps: list[float]
    steps: list[Step]


def latency(
    snapshot: Path, options: EngineOptions, shape: Shape, batch: int, rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """``batch`` requests at once, ``rounds`` times: seconds and tokens/s, each the median of rounds with its spread."""
    with loaded(snapshot, _running(options, batch), _room_for(shape, batch)) as (decoder, facts):
        runs = list(_rounds(decoder, facts["max_batch_tokens"], shape, batch, batch, rounds, tell))
    rows: dict[str, Sequence[float | None]] = {
        "first_token": [quantile(run.first_tokens, 0.5) for run in runs],
        "prefill_tokens_per_second": [prefill_rate(run.steps) for run in runs],
        "between_tokens_p50": [quantile(run.gaps, 0.5) for run in runs],
        "between_tokens_p95": [quantile(run.gaps, 0.95) for run in runs],
        "decode_tokens_per_second": [decode_rate(run.steps, batch) for run in runs],
    }
    return {**facts, **shape._asdict(), "batch": batch, **{name: _summary(values) for name, values in rows.items()}}


def throughput(
    snapshot: Path,
    options: EngineOptions,
    shape: Shape,
    batches: Sequence[int],
    requests: int | None,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """For each batch size, ``requests`` requests of which so many run at once; None: twice the batch size."""
    with loaded(snapshot, _running(options, max(batches)), _room_for(shape, max(batches))) as (decoder, facts):
        rows = []
        for batch in batches:
            count = requests or 2 * batch
            runs = list(_rounds(decoder, facts["max_batch_tokens"], shape, batch, count, rounds, tell))
            rates: dict[str, Sequence[float | None]] = {
                "prefill_tokens_per_second": [prefill_rate(run.steps) for run in runs],
                "decode_tokens_per_second": [decode_rate(run.steps, batch) for run in runs],
                "answer_tokens_per_second": [count * shape.answer / _seconds(run.steps) for run in runs],
                "requests_per_second": [count / _seconds(run.steps) for run in runs],
            }
            summaries = {name: _summary(values) for name, values in rates.items()}
            rows.append({"batch": batch, "requests": count, **summaries})
    return {**facts, **shape._asdict(), "batches": rows}


def run(engine: Engine, prompts: Sequence[tuple[int, ...]], answer: int) -> Run:
    """Answer every prompt with ``answer`` tokens. FgsnapError: the model fails on one."""
    params = SamplingParams(answer, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), prompt, params))
    begin = before = time.monotonic()
    read = engine.stats().prompt_tokens
    last: dict[str, float] = {}
    first_tokens: list[float] = []
    gaps: list[float] = []
    steps: list[Step] = []
    while engine.has_work():
        outputs = [*engine.step().outputs()]
        now, after = time.monotonic(), engine.stats().prompt_tokens
        steps.append(Step(now - before, after - read, len(outputs)))
        for output in outputs:
            if output.finish == "error":
                raise FgsnapError("The model failed on a random prompt.", output.error, "Try another --backend.")
            if output.request in last:
                gaps.append(now - last[output.request])
            else:
                first_tokens.append(now - begin)
            last[output.request] = now
        before, read = now, after
    return Run(first_tokens, gaps, steps)


def prefill_rate(steps: Sequence[Step]) -> float:
    """Prompt tokens a second, over the steps that read any."""
    reading = [step for step in steps if step.read]
    return sum(step.read for step in reading) / _seconds(reading)


def decode_rate(steps: Sequence[Step], batch: int) -> float | None:
    """Tokens a second, over the steps in which ``batch`` sequences decoded and nothing else ran; None without any."""
    full = [step for step in steps if not step.read and step.written == batch]
    return sum(step.written for step in full) / _seconds(full) if full else None


def _rounds(
    decoder: Decoder,
    budget: int,
    shape: Shape,
    batch: int,
    requests: int,
    rounds: int,
    tell: Callable[[str], None],
) -> Iterator[Run]:
    """The counted runs, after one that only warms up; every run has prompts of its own."""
    draw = random.Random(SEED)
    engine = Engine(decoder, token_budget=budget, max_sequences=batch)
    for number in range(rounds + 1):
        prompts = [tuple(draw.choices(range(decoder.vocab_size), k=shape.prompt)) for _ in range(requests)]
        done = run(engine, prompts, shape.answer)
        if number:
            tell(f"batch {batch}, round {number} of {rounds}: {_seconds(done.steps):.2f} s")
            yield done


@contextmanager
def loaded(
    snapshot: Path, options: EngineOptions, check: Callable[[Decoder, int], None] = lambda decoder, budget: None
) -> Iterator[tuple[Decoder, dict[str, Any]]]:
    """The model, proved by its canary, and what it is. ``check`` may refuse it, and its token budget, before that."""
    opened = open_snapshot(snapshot)
    try:
        decoder = load_as_chosen(opened, options)
        end_when_unreadable(opened)
        budget = settled_budget(options, opened.id, decoder).tokens
        check(decoder, budget)
        canary = check_canary(decoder, opened)
        ops = decoder.ops
        facts = {"snapshot": opened.id, "backend": ops.name, "device": ops.device, "setting": decoder.setting}
        more = {"dtype": decoder.dtype, "tp": decoder.tp, "max_batch_tokens": budget}
        yield decoder, {**facts, **more, "canary": canary}
    finally:
        opened.close()


def _running(options: EngineOptions, batch: int) -> EngineOptions:
    """The options with ``batch`` sequences asked for, which a token budget that was not asked for leaves room for."""
    return msgspec.structs.replace(options, max_num_seqs=batch)


def _room_for(shape: Shape, batch: int) -> Callable[[Decoder, int], None]:
    """Refuses a model in which ``batch`` such requests cannot run at once."""
    return lambda decoder, budget: _check_room(decoder, shape, batch, budget)


def _check_room(decoder: Decoder, shape: Shape, batch: int, budget: int) -> None:
    total = sum(shape)
    if total > decoder.max_length:
        raise UsageError(
            f"A request of {total} tokens is longer than the context of {decoder.max_length}.",
            f"It has {shape.prompt} prompt tokens and {shape.answer} generated ones.",
            "Lower --prompt-tokens or --max-tokens.",
        )
    if batch > budget:
        raise UsageError(
            f"A batch of {batch} is more than one forward takes.",
            f"It carries {budget} tokens, and every sequence needs one.",
            "Raise --max-batch-tokens, or lower --batch.",
        )
    needed = batch * -(-total // decoder.block_size)
    if needed > decoder.blocks:
        raise HostError(
            f"A batch of {batch} requests does not fit the KV cache.",
            f"They need {needed} blocks of {decoder.block_size} tokens, and it has {decoder.blocks}.",
            "Give more with --kv-memory, or lower --batch.",
        )


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)


def _summary(values: Sequence[float | None]) -> dict[str, float | int] | None:
    """Summary of the rounds that had such a value; None where none had."""
    known = [value for value in values if value is not None]
    return summary(known, 5) if known else None
