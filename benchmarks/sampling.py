"""Microseconds to pick the tokens of a step, for every option, beside plain torch code that sorts.

Logits are normal numbers times 2.5, new ones in every row, at a temperature of 0.8 but for greedy. The plain code is
what one writes first: softmax, sort, cumulative sum, multinomial, over all rows at once. No code can be faster than
memory gives the logits: that time is counted from the bandwidth of a sum over a large tensor in the same run.

    python benchmarks/sampling.py [--rounds 15] [--batch 1,32,256] [--vocabulary 32000,151936,262144]
        [--output benchmarks/results]
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from common import arguments, finish

from fgsnap.bench.record import summary
from fgsnap.kernels.native import Native
from fgsnap.kernels.ops import Batch, Edits, Sampling, Tensor
from fgsnap.kernels.reference import Reference

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.05
HOT, NEARLY_ALL = 200.0, 0.999  # a temperature at which all tokens are nearly as likely, and a top-p that keeps most
ANSWER, PROMPT, BIASED = 200, 500, 20  # tokens that penalties and biases are about
LONG_ANSWER = 4000  # different ones
ALLOWED = 0.01  # of the vocabulary by a mask
FEWEST = 3  # rounds of a case that are measured
PATIENCE = 1.0  # seconds for the rounds of a case beyond these
BANDWIDTH_BYTES = 256 << 20


class Case(NamedTuple):
    """One option: how a row is sampled, and whether the plain code has it too."""

    name: str
    how: Callable[[int, int], Sampling]
    plain: bool


def main() -> None:
    parser = arguments(__doc__, 15)
    parser.add_argument("--batch", default="1,32,256", help="rows")
    parser.add_argument("--vocabulary", default="32000,151936,262144", help="tokens")
    options = parser.parse_args()
    native = Native(dtype="float32")
    backends = {"native": native, "reference": Reference("cpu", "float32")}
    bandwidth = measured_bandwidth()
    rows = []
    for vocabulary in map(int, options.vocabulary.split(",")):
        for batch in map(int, options.batch.split(",")):
            logits = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0)) * 2.5
            for case in CASES:
                times = measured(case, logits, backends, options.rounds)
                row = row_of(case.name, logits, times, bandwidth)
                rows.append(row)
                tell(row)
    result = {
        "bandwidth_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "threads": {"native": native.threads, "torch": torch.get_num_threads()},
        "rows": rows,
        **headline(rows),
    }
    finish("sampling", result, options.output)


# --- what is measured -------------------------------------------------------------------------------------------------


def measured(case: Case, logits: torch.Tensor, backends: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn within every round. The first round warms up, and counts where it is a long one."""
    batch, vocabulary = logits.shape
    hows = [case.how(row, vocabulary) for row in range(batch)]
    runs = {name: timed(ops, logits, hows) for name, ops in backends.items()}
    if case.plain:
        runs["plain"] = lambda _: plainly(logits, hows[0])
    found: list[dict[str, float]] = []
    began = time.perf_counter()
    for number in range(rounds + 1):
        found.append({name: seconds(run, number) for name, run in runs.items()})
        impatient = time.perf_counter() - began > PATIENCE
        if number == 0 and not impatient:
            found.clear()
        if len(found) >= FEWEST and impatient:
            break
    return {name: [times[name] for times in found] for name in runs}


def seconds(run: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    run(number)
    return time.perf_counter() - start


def timed(ops: Any, logits: torch.Tensor, hows: Sequence[Sampling]) -> Callable[[int], object]:
    """A step's sampling: each row's answer has grown by a token since the last."""
    held = of_backend(ops, logits)
    edited = [how.edits for how in hows if how.edits is not None]

    def run(number: int) -> object:
        for edits in edited:
            edits.count(number)
        return ops.sample(held, list(hows), [number] * len(hows))

    return run


def of_backend(ops: Any, logits: torch.Tensor) -> Tensor:
    """The logits as the backend's own: the native one's are rows of an embedding table."""
    if isinstance(ops, Reference):
        return logits
    count = len(logits)
    table = ops.weight(memoryview(logits.numpy()).cast("B"), "float32", tuple(logits.shape))
    return ops.embed(ops.plan(Batch(range(count), range(count), (0, count), (count,), ((0,),), ()), count), table, 1.0)


def plainly(logits: torch.Tensor, how: Sampling) -> list[int]:
    """Every row as ``how`` says, by sorting."""
    if how.temperature == 0:
        return list(logits.argmax(-1).tolist())
    values, ids = (logits / how.temperature).sort(-1, descending=True)
    if how.top_k:
        values[:, how.top_k :] = -torch.inf
    shares = values.softmax(-1)
    if how.top_p < 1:
        shares[shares.cumsum(-1) - shares > how.top_p] = 0.0
    if how.min_p > 0:
        shares[shares < how.min_p * shares[:, :1]] = 0.0
    return list(ids.gather(-1, shares.multinomial(1))[:, 0].tolist())


def measured_bandwidth() -> float:
    """Bytes a second that a sum over memory reads, at best."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return BANDWIDTH_BYTES / best


# --- options ----------------------------------------------------------------------------------------------------------


def drawing(**settings: Any) -> Callable[[int, int], Sampling]:
    return lambda row, _: Sampling(TEMPERATURE, seed=row, **settings)


def penalized(row: int, vocabulary: int, answer: int = ANSWER, **settings: Any) -> Edits:
    draw = random.Random(row)
    prompt = draw.sample(range(vocabulary), PROMPT)
    edits = Edits(repetition=1.1, presence=0.2, frequency=0.1, prompt=prompt, **settings)
    for token in draw.sample(range(vocabulary), answer):
        edits.count(token)
    return edits


def penalizing(answer: int) -> Callable[[int, int], Sampling]:
    return lambda row, size: Sampling(TEMPERATURE, seed=row, edits=penalized(row, size, answer))


def biases(row: int, vocabulary: int) -> dict[int, float]:
    draw = random.Random(row)
    return {token: draw.uniform(-5, 5) for token in draw.sample(range(vocabulary), BIASED)}


def mask(row: int, vocabulary: int) -> memoryview:
    words = bytearray(-(-vocabulary // 32) * 4)
    for token in random.Random(row).sample(range(vocabulary), int(ALLOWED * vocabulary)):
        words[token // 8] |= 1 << token % 8
    return memoryview(words)


def everything(row: int, vocabulary: int) -> Sampling:
    edits = penalized(row, vocabulary, bias=biases(row, vocabulary), allowed=mask(row, vocabulary))
    return Sampling(TEMPERATURE, TOP_K, TOP_P, MIN_P, row, 5, edits)


CASES = (
    Case("greedy", lambda row, _: Sampling(), True),
    Case("temperature", drawing(), True),
    Case("top-k 50", drawing(top_k=TOP_K), True),
    Case("top-k of half", lambda row, size: Sampling(TEMPERATURE, size // 2, seed=row), True),
    Case("top-p 0.9", drawing(top_p=TOP_P), True),
    Case("top-p 0.999, flat", lambda row, _: Sampling(HOT, top_p=NEARLY_ALL, seed=row), True),
    Case("min-p 0.05", drawing(min_p=MIN_P), True),
    Case("top-k, top-p", drawing(top_k=TOP_K, top_p=TOP_P), True),
    Case("penalties", penalizing(ANSWER), False),
    Case("penalties, 4,000 tokens", penalizing(LONG_ANSWER), False),
    Case("bias", lambda row, size: Sampling(TEMPERATURE, seed=row, edits=Edits(bias=biases(row, size))), False),
    Case("mask", lambda row, size: Sampling(TEMPERATURE, seed=row, edits=Edits(allowed=mask(row, size))), False),
    Case("logprobs 5", lambda row, _: Sampling(logprobs=5), False),
    Case("all together", everything, False),
)


# --- results ----------------------------------------------------------------------------------------------------------


def row_of(name: str, logits: torch.Tensor, times: Mapping[str, Sequence[float]], bandwidth: float) -> dict[str, Any]:
    limit = logits.numel() * 4 / bandwidth
    row: dict[str, Any] = {
        "option": name,
        "batch": len(logits),
        "vocabulary": logits.shape[1],
        "limit_microseconds": round(limit * 1e6, 1),
        "microseconds": {name: summary([second * 1e6 for second in found], 1) for name, found in times.items()},
        "native_over_limit": summary([second / limit for second in times["native"]], 2),
    }
    if "plain" in times:
        pairs = zip(times["plain"], times["native"], strict=True)
        row["plain_over_native"] = summary([plain / native for plain, native in pairs], 1)
    return row


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The least that native gains on the plain code where that sorts."""
    gains = [row["plain_over_native"]["median"] for row in rows if "plain_over_native" in row]
    return {"least_plain_over_native": min(gains)} if gains else {}


def tell(row: Mapping[str, Any]) -> None:
    times = ", ".join(f"{name} {each['median']:,.0f} us" for name, each in row["microseconds"].items())
    over = row["native_over_limit"]["median"]
    print(f"{row['vocabulary']:,} x {row['batch']}, {row['option']}: {times}; native {over:.1f} times memory's time")


if __name__ == "__main__":
    main()
