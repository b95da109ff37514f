"""Every op of every backend against plain float64 arithmetic.

Inputs are exact in bfloat16 and reach a backend through its own ops, so one test serves backends of any tensor type and
activation dtype, and what differs from float64 is the op alone.
"""

from __future__ import annotations

import mmap
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels import native
from fgsnap.kernels.ops import AttentionArgs, Batch, NormArgs, Ops, Sampling
from fgsnap.kernels.reference import Reference

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPSILON = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}
NATIVE_PRESENT, _ = native.available()


class Backend(NamedTuple):
    """A backend and how exact it is: of activations, and of what passes the KV cache."""

    ops: Ops
    activation: float
    cached: float


def _backends():
    for dtype in ("float32", "bfloat16", "float16"):
        yield pytest.param(("reference", dtype), id=f"reference-{dtype}")
    if NATIVE_PRESENT:
        for dtype in ("float32", "bfloat16"):
            yield pytest.param(("native", dtype), id=f"native-{dtype}")


@pytest.fixture(scope="module", params=_backends())
def backend(request):
    kind, dtype = request.param
    if kind == "reference":
        return Backend(Reference("cpu", dtype), EPSILON[dtype], EPSILON[dtype])
    return Backend(native.Native(dtype=dtype), EPSILON["float32"], EPSILON[dtype])


def exact(*shape, seed=0, scale=1.0):
    """Random normal numbers that bfloat16 and float16 both hold exactly, as float64."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return drawn.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).double()


def raw(values, dtype):
    return memoryview(bytes(values.to(TORCH[dtype]).flatten().contiguous().view(torch.uint8).numpy()))


def weight(ops, values, dtype="float32"):
    return ops.weight(raw(values, dtype), dtype, tuple(values.shape))


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


# weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_reads_every_dtype_from_read_only_memory(backend, dtype):
    values = exact(7, 5)
    memory = mmap.mmap(-1, 4096)
    data = raw(values, dtype)
    memory[256 : 256 + len(data)] = data
    mapped = memoryview(memory).toreadonly()[256 : 256 + len(data)]
    table = backend.ops.weight(mapped, dtype, (7, 5))
    plan = backend.ops.plan(whole(7), 7)
    assert torch.equal(values_of(backend.ops, backend.ops.embed(plan, table, 1.0), 7, 5), values)


def test_weight_is_a_view_of_the_mapped_bytes(backend):
    memory = mmap.mmap(-1, 4096)
    table = backend.ops.weight(memoryview(memory).toreadonly()[:8], "float32", (1, 2))
    memory[:8] = raw(torch.tensor([3.0, -2.0]), "float32")
    seen = backend.ops.embed(backend.ops.plan(whole(1), 1), table, 1.0)
    assert values_of(backend.ops, seen, 2).tolist() == [3.0, -2.0]


@pytest.mark.parametrize("shape", [(3, 2), (5,), (2, 4)])
def test_weight_refuses_bytes_that_are_not_the_shape(backend, shape):
    with pytest.raises((AssertionError, ValueError)):
        backend.ops.weight(memoryview(bytes(28)), "float32", shape)


# embed, norm, add, linear, activate


@pytest.mark.parametrize("scale", [1.0, 23.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embed(backend, dtype, scale):
    ops, table = backend.ops, exact(11, 33)
    tokens = [10, 0, 3, 3, 7]
    plan = ops.plan(Batch(tokens, range(5), (0, 5), (5,), ((0,),), ()), 8)
    found = values_of(ops, ops.embed(plan, weight(ops, table, dtype), scale), 5, 33)
    assert_close(found, table[tokens] * scale, backend.activation, 1)


def float64_norm(x, kind, eps, unit_offset):
    if kind == "ln":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("float32_weight", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("kind, has_bias", [("rms", False), ("ln", False), ("ln", True), ("l2", None)])
@pytest.mark.parametrize("rows, width", [(1, 576), (3, 8), (37, 100)])
def test_norm(backend, kind, has_bias, unit_offset, float32_weight, rows, width):
    ops, x, eps = backend.ops, exact(rows, width, scale=3.0) + 1.0, 1e-5
    x = x.to(torch.bfloat16).double()
    w = exact(width, seed=1) if has_bias is not None else None
    b = exact(width, seed=2) if has_bias else None
    expected = float64_norm(x, kind, eps, unit_offset)
    if w is not None:
        expected = expected * (1 + w if unit_offset else w)
    if b is not None:
        expected = expected + b
    args = NormArgs(
        kind,
        eps,
        None if w is None else weight(ops, w, "bfloat16"),
        None if b is None else weight(ops, b, "bfloat16"),
        unit_offset,
        float32_weight,
    )
    found = values_of(ops, ops.norm(tensor(ops, x), args), rows, width)
    assert_close(found, expected, backend.activation)


def test_norm_of_large_and_tiny_numbers(backend):
    x = torch.stack([torch.full((64,), 3.0e4), torch.full((64,), 2.0**-14)]).double()
    args = NormArgs("rms", 1e-6, None, None)
    found = values_of(backend.ops, backend.ops.norm(tensor(backend.ops, x), args), 2, 64)
    assert_close(found, float64_norm(x.to(torch.bfloat16).double(), "rms", 1e-6, False), 2**-8)


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
def test_add(backend, multiplier):
    x, y = exact(9, 70), exact(9, 70, seed=1)
    found = backend.ops.add(tensor(backend.ops, x), tensor(backend.ops, y), multiplier)
    assert_close(values_of(backend.ops, found, 9, 70), x + multiplier * y, backend.activation)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows, into, out", [(1, 576, 960), (2, 7, 3), (5, 64, 1), (33, 100, 65), (130, 192, 577)])
def test_linear(backend, rows, into, out, dtype, has_bias):
    ops, x, w = backend.ops, exact(rows, into), exact(out, into, seed=1)
    b = exact(out, seed=2) if has_bias else None
    bias = None if b is None else weight(ops, b, dtype)
    found = values_of(ops, ops.linear(tensor(ops, x), weight(ops, w, dtype), bias), rows, out)
    assert_close(found, x @ w.T + (0.0 if b is None else b), backend.activation)


def test_linear_upcasts_in_several_chunks():
    ops = Reference("cpu", "float32")
    x, w = exact(3, 512), exact(3000, 512, seed=1)
    found = values_of(ops, ops.linear(tensor(ops, x), weight(ops, w, "bfloat16")), 3, 3000)
    assert_close(found, x @ w.T, EPSILON["float32"])
    assert ops._scratch.numel() * 4 <= 2 << 20, "a float32 pass over bfloat16 weights must stay small"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activate(backend, kind, gated):
    x = exact(7, 2 * 45, scale=3.0)
    functions = {
        "silu": lambda v: v / (1 + (-v).exp()),
        "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "relu": lambda v: v.clamp(min=0),
    }
    expected = functions[kind](x[:, :45]) * x[:, 45:] if gated else functions[kind](x)
    found = backend.ops.activate(tensor(backend.ops, x), kind, gated)
    assert_close(values_of(backend.ops, found, *expected.shape), expected, backend.activation)


# rotation, cache, attention


def float64_rotate(x, positions, frequencies, factor):
    """x [T, heads, D]: pairs (i, i + half) of the first dims."""
    half = len(frequencies)
    angles = positions.double()[:, None, None] * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def float64_attention(q, k, v, first_position, args):
    """q [n, N, D] at first_position..., over k, v [L, K, D]: [n, N D]."""
    repeat = args.heads // args.kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * args.scale
    age = first_position + torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (age >= 0) & (age < (args.window or 1 << 30))
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1)


FREQUENCIES = [1.0, 0.3, 0.01, 0.0004]


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("head_dim", [8, 20])
def test_append_rotates_queries(backend, head_dim, factor):
    ops, args = backend.ops, AttentionArgs(3, 1, head_dim, 1.0)
    qkv = exact(6, 5 * head_dim)
    positions = [0, 1, 2, 900, 901, 902]
    batch = Batch([0] * 6, positions, (0, 3, 6), (3, 903), ([0], range(1, 101)), ())
    cache = ops.kv_cache(1, 101, 10, 1, head_dim)[0]
    plan = ops.plan(batch, 10)
    q = ops.append(tensor(ops, qkv), cache, plan, args, ops.rope(FREQUENCIES, factor))
    expected = float64_rotate(qkv.view(6, 5, head_dim), torch.tensor(positions), FREQUENCIES, factor)[:, :3]
    # Angles are float32 numbers, so at position 900 a sine is off by up to 900 * 2^-24.
    assert_close(values_of(ops, q, 6, 3 * head_dim), expected.flatten(1), max(backend.activation, 3e-5))


def test_append_without_rope_leaves_queries_alone(backend):
    ops, qkv, args = backend.ops, exact(4, 32), AttentionArgs(2, 1, 8, 1.0)
    cache = ops.kv_cache(1, 1, 4, 1, 8)[0]
    q = ops.append(tensor(ops, qkv), cache, ops.plan(whole(4), 4), args, None)
    assert torch.equal(values_of(ops, q, 4, 16), qkv[:, :16])


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


def run_steps(ops, qkv, paged, steps, block_size, args, rope):
    """Feed qkv [all tokens, ...] through append and attend in ``steps``; the outputs in the order of qkv's rows."""
    table = weight(ops, qkv)
    cache = ops.kv_cache(1, paged.blocks, block_size, args.kv_heads, args.head_dim)[0]
    out = torch.empty(len(qkv), args.heads * args.head_dim, dtype=torch.float64)
    done = [0] * len(paged.lengths)
    for now in steps:
        batch = paged.batch(done, now)
        plan = ops.plan(batch, block_size)
        q = ops.append(ops.embed(plan, table, 1.0), cache, plan, args, rope)
        out[list(batch.tokens)] = values_of(ops, ops.attend(q, cache, plan, args), len(batch.tokens), -1)
        done = [d + n for d, n in zip(done, now, strict=True)]
    assert done == list(paged.lengths)
    return out


def expected_attention(qkv, lengths, args, frequencies):
    parts = qkv.view(len(qkv), args.heads + 2 * args.kv_heads, args.head_dim)
    out, base = [], 0
    for length in lengths:
        own = parts[base : base + length]
        turned = float64_rotate(own, torch.arange(length), frequencies, 1.0) if frequencies else own
        q, k = turned[:, : args.heads], turned[:, args.heads : args.heads + args.kv_heads]
        out.append(float64_attention(q, k, own[:, args.heads + args.kv_heads :], 0, args))
        base += length
    return torch.cat(out)


STEPS = {
    "whole": [(37, 5, 1)],
    "decodes": [(30, 3, 0), *[(1, 1, 0), (1, 1, 1)], *[(1, 0, 0)] * 5],
    "chunks": [(16, 0, 1), (7, 5, 0), (14, 0, 0)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 8), (9, 3, 64), (8, 1, 20)])
def test_attend_over_ragged_paged_batches(backend, heads, kv_heads, head_dim, window, steps):
    ops, block_size = backend.ops, 7
    args = AttentionArgs(heads, kv_heads, head_dim, head_dim**-0.5, window)
    paged = Paged.make((37, 5, 1), block_size)
    qkv = exact(43, (heads + 2 * kv_heads) * head_dim)
    found = run_steps(ops, qkv, paged, steps, block_size, args, ops.rope(FREQUENCIES, 1.0))
    expected = expected_attention(qkv, paged.lengths, args, FREQUENCIES)
    assert_close(found, expected, max(backend.activation, backend.cached, 4e-6), 3)


def test_attend_to_long_prompts_in_several_runs(backend):
    ops, args = backend.ops, AttentionArgs(2, 1, 16, 0.25, 300)
    paged = Paged.make((700, 530), 16)
    qkv = exact(1230, 64)
    found = run_steps(ops, qkv, paged, [(700, 0), (0, 529), (0, 1)], 16, args, None)
    expected = expected_attention(qkv, paged.lengths, args, [])
    assert_close(found, expected, max(backend.activation, backend.cached, 4e-6), 3)


def test_attend_ignores_what_other_blocks_hold(backend):
    """NaN and infinity everywhere in the cache but in the sequence's own slots change nothing."""
    ops, args = backend.ops, AttentionArgs(2, 2, 8, 1.0)
    qkv = exact(5, 48)
    poison = torch.full((12, 48), torch.nan).double()
    cache = ops.kv_cache(1, 3, 4, 2, 8)[0]
    everything = ops.plan(Batch(range(12), range(12), (0, 12), (12,), ((0, 1, 2),), ()), 4)
    ops.append(ops.embed(everything, weight(ops, poison), 1.0), cache, everything, args, None)
    plan = ops.plan(Batch(range(5), (0, 1, 2, 3, 0), (0, 4, 5), (4, 1), ((2,), (0,)), ()), 4)
    q = ops.append(ops.embed(plan, weight(ops, qkv), 1.0), cache, plan, args, None)
    found = values_of(ops, ops.attend(q, cache, plan, args), 5, 16)
    assert_close(found, expected_attention(qkv, (4, 1), args, []), max(backend.activation, backend.cached, 4e-6), 3)


def test_attend_groups_bounded_gathers(monkeypatch):
    """Splitting the gather into many small calls changes nothing."""
    args = AttentionArgs(2, 1, 8, 0.5)
    qkv, paged = exact(60, 32), Paged.make((20, 3, 9, 28), 4)
    steps = [(19, 2, 8, 27), (1, 1, 1, 1)]
    found = []
    for gather_bytes in (1 << 20, 1):
        monkeypatch.setattr("fgsnap.kernels.reference.GATHER_BYTES", gather_bytes)
        found.append(run_steps(Reference("cpu", "float32"), qkv, paged, steps, 4, args, None))
    assert_close(found[0], found[1], EPSILON["float32"])


# logits and sampling


def test_logits_of_wanted_rows_without_padded_vocabulary(backend):
    ops, x, w, b = backend.ops, exact(6, 24), exact(50, 24, seed=1), exact(50, seed=2)
    plan = ops.plan(whole(6, wanted=(1, 2, 5)), 6)
    found = ops.logits(tensor(ops, x), plan, weight(ops, w, "bfloat16"), weight(ops, b, "bfloat16"), 47, 0.5, 3.0)
    plain = 0.5 * (x[[1, 2, 5]] @ w[:47].T + b[:47])
    assert_close(values_of(ops, found, 3, 47), 3.0 * torch.tanh(plain / 3.0), EPSILON["float32"], 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_float32_whatever_the_activations(backend, dtype):
    ops, x, w = backend.ops, exact(2, 576), exact(1030, 576, seed=1)
    found = ops.logits(tensor(ops, x), ops.plan(whole(2), 2), weight(ops, w, dtype), None, 1030, 1.0, None)
    assert_close(values_of(ops, found, 2, 1030), x @ w.T, EPSILON["float32"], 4)


def test_no_wanted_rows(backend):
    ops = backend.ops
    plan = ops.plan(whole(3, wanted=()), 3)
    found = ops.logits(tensor(ops, exact(3, 8)), plan, weight(ops, exact(5, 8)), None, 5, 1.0, None)
    assert ops.sample(found, []) == []
    assert ops.top_two(found) == []


def logits(ops, values):
    """``values`` [R, V] as the backend's logits, exactly: one-hot rows pick columns of a head."""
    rows = len(values)
    eye = tensor(ops, torch.eye(rows, dtype=torch.float64))
    head = weight(ops, values.T.contiguous())
    return ops.logits(eye, ops.plan(whole(rows), rows), head, None, values.shape[1], 1.0, None)


def one_row(ops, values):
    """One row of logits that may hold infinities and NaN: a bias on zeros."""
    zero = tensor(ops, torch.zeros(1, 4, dtype=torch.float64))
    head = weight(ops, torch.zeros(len(values), 4))
    return ops.logits(zero, ops.plan(whole(1), 1), head, weight(ops, torch.tensor(values)), len(values), 1.0, None)


def picked_by_definition(row, how):
    """ops.Sampling read word by word, over float64 lists."""
    if how.temperature == 0:
        return max(range(len(row)), key=lambda i: (row[i], -i))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if how.top_k:
        order = order[: how.top_k]
    top = row[order[0]]
    share = {i: torch.tensor((row[i] - top) / how.temperature, dtype=torch.float64).exp().item() for i in order}
    if how.top_p < 1:
        total, reached, kept = sum(share[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            reached += share[i]
            if reached >= how.top_p * total:
                break
        order = kept
    order = sorted(order)
    total, running = sum(share[i] for i in order), 0.0
    for i in order:
        running += share[i]
        if running > how.uniform * total:
            return i
    return order[-1]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, uniform=0.37),
    Sampling(temperature=0.3, uniform=0.91),
    Sampling(temperature=1.0, top_k=1, uniform=0.99),
    Sampling(temperature=2.0, top_k=40, uniform=0.5),
    Sampling(temperature=1.0, top_p=0.9, uniform=0.8),
    Sampling(temperature=5.0, top_p=0.95, uniform=0.6),
    Sampling(temperature=0.7, top_k=50, top_p=0.8, uniform=0.2),
    Sampling(temperature=1.0, top_p=0.0, uniform=0.999),
    Sampling(temperature=1.0, top_k=100000, uniform=0.0),
    Sampling(temperature=1e-6, uniform=0.5),
    Sampling(temperature=50.0, top_p=0.999, uniform=1 - 2**-53),
]


@pytest.mark.parametrize("vocabulary", [3, 97, 5000])
def test_sample_follows_its_definition(backend, vocabulary):
    values = exact(len(SAMPLINGS), vocabulary, scale=3.0)
    found = backend.ops.sample(logits(backend.ops, values), SAMPLINGS)
    expected = [picked_by_definition(row.tolist(), how) for row, how in zip(values, SAMPLINGS, strict=True)]
    assert [sampled.token for sampled in found] == expected


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.95, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_sample_with_many_ties(row, temperature, top_k, top_p, uniform):
    """All backends keep the same tokens among equals; halves make most logits tie."""
    values = torch.tensor([row], dtype=torch.float64) / 2
    how = Sampling(temperature, top_k, top_p, uniform)
    expected = picked_by_definition(values[0].tolist(), how)
    backends = [Reference("cpu", "float32"), *([native.Native(dtype="float32")] if NATIVE_PRESENT else [])]
    for ops in backends:
        assert ops.sample(logits(ops, values), [how])[0].token == expected, ops.name


def test_sample_draws_the_distribution(backend):
    """Evenly spaced uniforms give every token its share to within one draw."""
    values = exact(1, 10, scale=1.5)
    count = 500
    hows = [Sampling(temperature=1.0, uniform=(i + 0.5) / count) for i in range(count)]
    found = backend.ops.sample(logits(backend.ops, values.expand(count, 10).contiguous()), hows)
    counts = torch.bincount(torch.tensor([sampled.token for sampled in found]), minlength=10)
    assert (counts - count * values[0].softmax(-1)).abs().max() <= 1.0


def test_greedy_takes_the_lowest_of_equals(backend):
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-3.0, -5.0, -3.0, -9.0]]).double()
    found = backend.ops.sample(logits(backend.ops, values), [Sampling()] * 3)
    assert [sampled.token for sampled in found] == [1, 0, 0]
    assert backend.ops.top_two(logits(backend.ops, values)) == [(1, 0.0), (0, 0.0), (0, 0.0)]


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(1.0, 2, 0.9, 0.5), Sampling(logprobs=2), Sampling(1.0, logprobs=0)]
)
def test_a_broken_row_gives_no_token_and_spares_the_others(backend, how):
    ops = backend.ops
    for broken in ([1.0, float("nan"), 0.0], [float("-inf")] * 3, [float("nan")] * 3):
        assert ops.sample(one_row(ops, broken), [how])[0].token == -1
    values = torch.tensor([[0.0, 4.0, 1.0], [float("nan")] * 3]).double()
    rows = tensor(ops, values)
    head = weight(ops, torch.eye(3))
    mixed = ops.logits(rows, ops.plan(whole(2), 2), head, None, 3, 1.0, None)
    assert [sampled.token for sampled in ops.sample(mixed, [Sampling()] * 2)] == [1, -1]


def test_masked_tokens_are_never_drawn(backend):
    hidden = float("-inf")
    row = one_row(backend.ops, [hidden, 0.5, hidden, 0.25, hidden])
    for how in (Sampling(), Sampling(1.0, uniform=0.0), Sampling(9.0, 4, 1.0, 0.99), Sampling(9.0, 0, 0.99, 0.999999)):
        assert backend.ops.sample(row, [how])[0].token in (1, 3), how


def test_logprobs_are_of_the_unfiltered_logits(backend):
    values = exact(4, 300, scale=2.0)
    hows = [
        Sampling(logprobs=0),
        Sampling(0.5, 1, 1.0, 0.3, logprobs=3),
        Sampling(2.0, 0, 0.5, 0.7, logprobs=5),
        Sampling(1.0, uniform=0.2),
    ]
    found = backend.ops.sample(logits(backend.ops, values), hows)
    expected = values.log_softmax(-1)
    for row, (sampled, how) in enumerate(zip(found[:3], hows, strict=False)):
        assert sampled.logprob == pytest.approx(expected[row, sampled.token].item(), abs=1e-9)
        best = expected[row].sort(descending=True, stable=True)
        assert [i for i, _ in sampled.top] == best.indices[: how.logprobs].tolist()
        assert [p for _, p in sampled.top] == pytest.approx(best.values[: how.logprobs].tolist(), abs=1e-9)
        assert all(p == sampled.logprob for i, p in sampled.top if i == sampled.token)
    assert found[3].top == () and found[3].logprob == 0.0


def test_top_logprobs_among_equals_are_the_lowest_ids(backend):
    values = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]]).double()
    found = backend.ops.sample(logits(backend.ops, values), [Sampling(logprobs=3)])[0]
    assert [i for i, _ in found.top] == [1, 2, 3]
    everything = backend.ops.sample(logits(backend.ops, values), [Sampling(logprobs=50)])[0]
    assert [i for i, _ in everything.top] == [1, 2, 3, 5, 0, 4]


def test_top_two(backend):
    values = exact(5, 1000)
    best = values.topk(2).values
    found = backend.ops.top_two(logits(backend.ops, values))
    assert [token for token, _ in found] == values.argmax(-1).tolist()
    assert [margin for _, margin in found] == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-6)
