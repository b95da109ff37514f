"""What the tests of ops share: numbers that reach any backend exactly, paged sequences, and what is close enough.

Inputs are exact in bfloat16 and reach a backend through its own ops, so one test serves backends of any tensor type and
activation dtype, and what differs from float64 is the op alone. What an op should give is written out in the tests.
"""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

import torch

from fgsnap.kernels import native
from fgsnap.kernels.native import Native
from fgsnap.kernels.ops import AttentionArgs, Batch, NormArgs, Ops
from fgsnap.kernels.reference import Reference

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPSILON = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}
# Softmax is computed in float32, whatever the activations.
SOFTMAX = 4e-6
NATIVE_PRESENT = native.available()[0]


class Backend(NamedTuple):
    """A backend and how exact it is: of activations, and of what passes the KV cache."""

    ops: Ops
    activation: float
    cached: float

    @property
    def attention(self) -> float:
        return max(self.activation, self.cached, SOFTMAX)


BACKENDS = [("reference", "float32"), ("reference", "bfloat16"), ("reference", "float16")]
if NATIVE_PRESENT:
    BACKENDS += [("native", "float32"), ("native", "bfloat16")]


def made(kind, dtype):
    # Torch's threads cost more than they bring at these sizes, most of all where other work runs beside the tests.
    ops = Reference("cpu", dtype, threads=1) if kind == "reference" else Native(dtype=dtype)
    return Backend(ops, EPSILON[dtype], EPSILON[dtype])


KINDS_OF_BACKEND = sorted({kind for kind, _ in BACKENDS})


@functools.cache
def exact_one(kind):
    """The backend that computes in float32, made once: for tests that bring many cases."""
    return made(kind, "float32").ops


def exact(*shape, seed=0, scale=1.0):
    """Random normal numbers that bfloat16 and float16 both hold exactly, as float64."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return drawn.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).double()


def raw(values, dtype):
    return memoryview(bytes(values.to(TORCH[dtype]).flatten().contiguous().view(torch.uint8).numpy()))


def weight(ops, values, dtype="float32"):
    return ops.weight(raw(values, dtype), dtype, tuple(values.shape))


def optional(ops, values, dtype="float32"):
    return None if values is None else weight(ops, values, dtype)


def whole(rows, *, wanted=None):
    """One sequence of ``rows`` tokens 0, 1, ..., in one block."""
    return Batch(range(rows), range(rows), (0, rows), (rows,), ((0,),), range(rows) if wanted is None else wanted)


def tensor(ops, values):
    """``values`` as the backend's activations: rows of an embedding table."""
    return ops.embed(ops.plan(whole(len(values)), len(values)), weight(ops, values), 1.0)


def values_of(ops, result, *shape):
    return torch.tensor(ops.floats(result).tolist(), dtype=torch.float64).view(*shape)


def assert_close(actual, expected, epsilon, roundings=2):
    """Every element within ``roundings`` of its own size plus a little of the whole; the mean within half of that."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs()
    size = expected.abs()
    spread = size.max().item() if size.numel() else 0.0
    allowed = roundings * epsilon * (size + 0.25 * spread) + 1e-30
    worst, mean = (difference / allowed).max().item(), difference.mean().item()
    report = f"max {difference.max().item():.3g}, mean {mean:.3g}, {worst:.2f} of what is allowed"
    assert not actual.isnan().any(), report
    assert worst <= 1.0, report
    assert mean <= 0.5 * roundings * epsilon * (size.mean().item() + 0.25 * spread), report


class Norm(NamedTuple):
    """A norm's numbers: what it should give, and its arguments for a backend."""

    kind: str = "rms"
    eps: float = 1e-5
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    unit_offset: bool = False
    float32_weight: bool = False

    def __call__(self, x):
        if self.kind == "ln":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.weight is not None:
            x = x * (1 + self.weight if self.unit_offset else self.weight)
        return x if self.bias is None else x + self.bias

    def args(self, ops):
        weight, bias = optional(ops, self.weight, "bfloat16"), optional(ops, self.bias, "bfloat16")
        return NormArgs(self.kind, self.eps, weight, bias, self.unit_offset, self.float32_weight)


FREQUENCIES = [1.0, 0.3, 0.01, 0.0004]


def float64_rotate(x, positions, frequencies, factor=1.0):
    """x [T, heads, D]: pairs (i, i + half) of the first dims."""
    half = len(frequencies)
    angles = positions.double()[:, None, None] * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class Paged(NamedTuple):
    """Sequences in a paged cache: blocks handed out in a random order, with a step as (tokens before, tokens now)."""

    lengths: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    blocks: int

    @staticmethod
    def make(lengths, block_size, seed=0):
        need = [-(-length // block_size) for length in lengths]
        order = list(range(sum(need) + 2))
        random.Random(seed).shuffle(order)
        tables = tuple(tuple(order[sum(need[:s]) : sum(need[: s + 1])]) for s in range(len(need)))
        return Paged(tuple(lengths), tables, len(order))

    def batch(self, done, now):
        """The next ``now[s]`` tokens of each sequence that has any; token ids index the concatenated sequences."""
        bases = [sum(self.lengths[:s]) for s in range(len(self.lengths))]
        at = [s for s, count in enumerate(now) if count]
        spans = [range(done[s], done[s] + now[s]) for s in at]
        tokens = [bases[s] + p for s, span in zip(at, spans, strict=True) for p in span]
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + len(span))
        positions = [p for span in spans for p in span]
        return Batch(tokens, positions, starts, [s.stop for s in spans], [self.tables[s] for s in at], ())

    def everything(self, block_size):
        """One sequence that fills every slot of every block."""
        count = self.blocks * block_size
        return Batch([0] * count, range(count), (0, count), (count,), (range(self.blocks),), ())


def poisoned_cache(ops, paged, block_size, kv_heads, head_dim):
    """A cache in which every slot holds NaN: what a sequence did not write itself must not reach its results."""
    cache = ops.kv_cache(paged.blocks, block_size, kv_heads, head_dim)
    plan = ops.plan(paged.everything(block_size), block_size)
    nan = ops.embed(plan, weight(ops, torch.full((1, 3 * kv_heads * head_dim), torch.nan)), 1.0)
    ops.append(nan, cache, plan, AttentionArgs(kv_heads, kv_heads, head_dim, 1.0), None)
    return cache


def run_steps(ops, paged, steps, block_size, width, step):
    """Feed the sequences to ``step`` (plan -> [T, width]) as ``steps`` cut them; the outputs sequence by sequence."""
    out = torch.empty(sum(paged.lengths), width, dtype=torch.float64)
    done = [0] * len(paged.lengths)
    for now in steps:
        batch = paged.batch(done, now)
        out[list(batch.tokens)] = values_of(ops, step(ops.plan(batch, block_size)), len(batch.tokens), width)
        done = [d + n for d, n in zip(done, now, strict=True)]
    assert done == list(paged.lengths)
    return out


# Three sequences of 37, 5 and 1 tokens; no length is a multiple of a block.
LENGTHS = (37, 5, 1)
STEPS = {
    "whole": [LENGTHS],
    "decodes": [(30, 3, 0), *[(1, 1, 0), (1, 1, 1)], *[(1, 0, 0)] * 5],
    "chunks": [(16, 0, 1), (7, 5, 0), (14, 0, 0)],
}
