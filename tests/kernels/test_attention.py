"""Rotation, cache and attention of every backend against plain float64 arithmetic, and latent attention likewise."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels import native
from fgsnap.kernels.ops import (
    AlibiArgs,
    AttentionArgs,
    Batch,
    LatentArgs,
    QkNormArgs,
    TemperatureArgs,
)
from fgsnap.kernels.ranks import Ranks, rank_memory
from fgsnap.kernels.reference import Reference
from tests.kernels.backends import (
    EPSILON,
    FREQUENCIES,
    KINDS_OF_BACKEND,
    LENGTHS,
    SOFTMAX,
    STEPS,
    Norm,
    Paged,
    assert_close,
    exact,
    exact_one,
    float64_rotate,
    optional,
    poisoned_cache,
    run_steps,
    tensor,
    values_of,
    weight,
    whole,
)


class Case(NamedTuple):
    """One attention's numbers: its arguments for a backend, and what it should give."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    bias_scale: float = 1.0
    bias_bfloat16: bool = False
    sinks: torch.Tensor | None = None
    norms: tuple[Norm, Norm] | None = None
    after_rope: bool = False
    temperature: TemperatureArgs | None = None
    frequencies: list[float] = FREQUENCIES

    @property
    def width(self):
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def args(self, ops):
        alibi = norms = None
        if self.slopes is not None:
            alibi = AlibiArgs(weight(ops, self.slopes), self.bias_scale, self.bias_bfloat16)
        if self.norms is not None:
            norms = QkNormArgs(self.norms[0].args(ops), self.norms[1].args(ops), self.after_rope)
        return AttentionArgs(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.scale,
            self.window,
            self.chunk,
            self.softcap,
            alibi,
            optional(ops, self.sinks, "bfloat16"),
            norms,
            self.temperature,
        )

    def rope(self, ops):
        return ops.rope(self.frequencies, 1.0) if self.frequencies else None

    def seen(self, position):
        """The keys of a query at ``position``."""
        return [
            key
            for key in range(position + 1)
            if (self.window is None or key > position - self.window)
            and (self.chunk is None or key // self.chunk == position // self.chunk)
        ]

    def prepared(self, own):
        """Queries, keys and values [L, heads, D] of one sequence from its rows of qkv."""
        parts = own.view(len(own), -1, self.head_dim)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 1)
        positions = torch.arange(len(own))
        if self.norms and not self.after_rope:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k = float64_rotate(q, positions, self.frequencies), float64_rotate(k, positions, self.frequencies)
        if self.norms and self.after_rope:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.temperature is not None:
            q = q * torch.tensor([factor(self.temperature, p) for p in range(len(own))]).double()[:, None, None]
        return q, k, v

    def attended(self, q, k, v, position):
        """One query [N, D] over all keys and values [L, K, D]: [N D]."""
        seen = self.seen(position)
        repeat = self.heads // self.kv_heads
        k, v = k[seen].repeat_interleave(repeat, 1), v[seen].repeat_interleave(repeat, 1)
        scores = torch.einsum("nd,lnd->nl", q, k) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores = scores + self.biases(torch.tensor(seen))
        sinks = torch.full((self.heads,), -torch.inf).double() if self.sinks is None else self.sinks
        most = torch.maximum(scores.amax(1), sinks)
        shares = (scores - most[:, None]).exp()
        total = shares.sum(1) + (sinks - most).exp()
        return torch.einsum("nl,lnd->nd", shares / total[:, None], v).flatten()

    def biases(self, keys):
        """ALiBi's addends [N, L]."""
        if not self.bias_bfloat16:
            return self.slopes[:, None] * keys * self.bias_scale
        return (self.slopes[:, None] * keys.bfloat16().double()).bfloat16().double() * self.bias_scale

    def expected(self, qkv, lengths):
        out = []
        for own in qkv.split(list(lengths)):
            q, k, v = self.prepared(own)
            out += [self.attended(q[p], k, v, p) for p in range(len(own))]
        return torch.stack(out)

    def found(self, ops, qkv, paged, steps, block_size):
        args, rope, table = self.args(ops), self.rope(ops), weight(ops, qkv)
        cache = poisoned_cache(ops, paged, block_size, self.kv_heads, self.head_dim)

        def step(plan):
            q = ops.append(ops.embed(plan, table, 1.0), cache, plan, args, rope)
            return ops.attend(q, cache, plan, args)

        return run_steps(ops, paged, steps, block_size, self.heads * self.head_dim, step)


def factor(how, position):
    if how.kind == "step":
        return 1 + how.scale * math.log(1 + (position + 1) // how.base)
    return math.log(position + 1, how.base) if position + 1 > how.base else 1.0


# append


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("head_dim", [8, 20])
def test_append_rotates_queries(backend, head_dim, factor):
    ops, args = backend.ops, AttentionArgs(3, 1, head_dim, 1.0)
    qkv = exact(6, 5 * head_dim)
    positions = [0, 1, 2, 900, 901, 902]
    batch = Batch([0] * 6, positions, (0, 3, 6), (3, 903), ([0], range(1, 101)), ())
    cache = ops.kv_cache(101, 10, 1, head_dim)
    plan = ops.plan(batch, 10)
    q = ops.append(tensor(ops, qkv), cache, plan, args, ops.rope(FREQUENCIES, factor))
    expected = float64_rotate(qkv.view(6, 5, head_dim), torch.tensor(positions), FREQUENCIES, factor)[:, :3]
    # Angles are float32 numbers, so at position 900 a sine is off by up to 900 * 2^-24.
    assert_close(values_of(ops, q, 6, 3 * head_dim), expected.flatten(1), max(backend.activation, 3e-5))


def test_append_without_rope_leaves_queries_alone(backend):
    ops, qkv, args = backend.ops, exact(4, 32), AttentionArgs(2, 1, 8, 1.0)
    cache = ops.kv_cache(1, 4, 1, 8)
    q = ops.append(tensor(ops, qkv), cache, ops.plan(whole(4), 4), args, None)
    assert torch.equal(values_of(ops, q, 4, 16), qkv[:, :16])


@pytest.mark.parametrize("how", [TemperatureArgs("step", 8192, 0.1), TemperatureArgs("logn", 2048)], ids=str)
def test_append_tempers_queries_by_their_position(backend, how):
    """The positions at which the factor begins to differ from one, and far beyond."""
    ops, args = backend.ops, AttentionArgs(2, 1, 6, 1.0, temperature=how)
    positions = [0, how.base - 2, how.base - 1, how.base, 2 * how.base - 2, 2 * how.base - 1, 5 * how.base + 17]
    blocks = -(-(positions[-1] + 1) // 512)
    starts, lengths = range(len(positions) + 1), [p + 1 for p in positions]
    tables = [[s * blocks + i for i in range(blocks)] for s in range(len(positions))]
    plan = ops.plan(Batch(range(7), positions, starts, lengths, tables, ()), 512)
    qkv = exact(7, 24)
    cache = ops.kv_cache(7 * blocks, 512, 1, 6)
    found = values_of(ops, ops.append(tensor(ops, qkv), cache, plan, args, None), 7, 12)
    factors = torch.tensor([factor(how, p) for p in positions]).double()
    assert (factors == 1).tolist() == [True, True, how.kind == "logn", False, False, False, False]
    assert_close(found, qkv[:, :12] * factors[:, None], backend.activation)


# attend

SHAPES = [(4, 4, 8), (9, 3, 64), (8, 1, 20)]
VARIANTS = {
    "plain": {},
    "no rotation": {"frequencies": []},
    "window 1": {"window": 1},
    "window 6": {"window": 6},
    "window 100": {"window": 100},
    "chunk 1": {"chunk": 1},
    "chunk 5": {"chunk": 5},
    "chunk 16": {"chunk": 16},
    "window and chunk": {"window": 6, "chunk": 9},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": exact(12, seed=5)},
    "alibi": {"slopes": exact(12, seed=6).abs(), "frequencies": []},
    "alibi, scaled": {"slopes": exact(12, seed=6).abs(), "bias_scale": 0.35},
    "step": {"temperature": TemperatureArgs("step", 5, 0.3)},
    "logn": {"temperature": TemperatureArgs("logn", 7)},
    "all at once": {
        "window": 11,
        "chunk": 16,
        "softcap": 2.0,
        "sinks": exact(12, seed=5),
        "slopes": exact(12, seed=6) / 8,
        "temperature": TemperatureArgs("step", 4, 0.2),
    },
}


def case(shape, **changes):
    heads, kv_heads, head_dim = shape
    cut = {name: changes[name][:heads] for name in ("slopes", "sinks") if name in changes}
    return Case(heads, kv_heads, head_dim, head_dim**-0.5, **{**changes, **cut})


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_over_ragged_paged_batches(backend, shape, changes, steps):
    attention, paged = case(shape, **changes), Paged.make(LENGTHS, 7)
    qkv = exact(sum(LENGTHS), attention.width)
    found = attention.found(backend.ops, qkv, paged, steps, 7)
    assert_close(found, attention.expected(qkv, LENGTHS), backend.attention, 3)


def head_norms(kind, dim, **changes):
    middle = 0.0 if changes.get("unit_offset") else 1.0
    query, key = ((middle + exact(dim, seed=seed) / 4).bfloat16().double() for seed in (7, 8))
    if kind == "l2":
        query = key = None
    return Norm(kind, 1e-3, query, **changes), Norm(kind, 1e-2, key, **changes)


@pytest.mark.parametrize("steps", [STEPS["whole"], STEPS["chunks"]], ids=["whole", "chunks"])
@pytest.mark.parametrize("after_rope", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rms", {}),
        ("rms", {"unit_offset": True, "float32_weight": True}),
        ("ln", {"bias": exact(20, seed=9)}),
        ("l2", {}),
    ],
    ids=["rms", "rms, unit offset", "ln with bias", "l2"],
)
def test_norms_of_heads_before_and_after_the_rotation(backend, kind, changes, after_rope, steps):
    norms = head_norms(kind, 20, **changes)
    attention = Case(6, 2, 20, 20**-0.5, norms=norms, after_rope=after_rope)
    qkv = exact(sum(LENGTHS), attention.width, scale=2.0)
    found = attention.found(backend.ops, qkv, Paged.make(LENGTHS, 7), steps, 7)
    expected = attention.expected(qkv, LENGTHS)
    assert_close(found, expected, backend.attention, 4)
    if kind != "l2":
        other = attention._replace(after_rope=not after_rope).expected(qkv, LENGTHS)
        assert (other - expected).abs().max() > 0.1, "the order matters to this test"


@pytest.mark.parametrize("steps", [[(290,)], [(100,), (189,), (1,)]], ids=["whole", "chunks"])
@pytest.mark.parametrize("rounded", [False, True])
def test_alibi_at_positions_that_are_rounded(backend, rounded, steps):
    """Positions above 256 are not all bfloat16 numbers, nor are most products: both are rounded if it is asked for."""
    slopes = torch.tensor([0.375, -0.4375, 0.0625, 1.03125]).double()
    attention = Case(4, 2, 8, 8**-0.5, slopes=slopes, bias_scale=0.5, bias_bfloat16=rounded, frequencies=[])
    qkv = exact(290, attention.width)
    found = attention.found(backend.ops, qkv, Paged.make((290,), 16), steps, 16)
    expected = attention.expected(qkv, (290,))
    # A bias is as large as 150, of which float32 keeps 2^-17.
    assert_close(found, expected, max(backend.attention, 2e-5), 3)
    other = attention._replace(bias_bfloat16=not rounded).expected(qkv, (290,))
    assert (other - expected).abs().max() > 0.1, "the rounding matters to this test"


def test_attend_to_long_prompts_in_several_runs(backend):
    attention, paged = Case(2, 1, 16, 0.25, window=300, frequencies=[]), Paged.make((700, 530), 16)
    qkv = exact(1230, 64)
    found = attention.found(backend.ops, qkv, paged, [(700, 0), (0, 529), (0, 1)], 16)
    assert_close(found, attention.expected(qkv, paged.lengths), backend.attention, 3)


def test_attend_within_chunks_of_long_prompts(backend):
    attention = Case(2, 1, 16, 0.25, chunk=270, softcap=3.0, sinks=exact(2, seed=5), frequencies=[])
    paged, qkv = Paged.make((700, 41), 16), exact(741, 64)
    found = attention.found(backend.ops, qkv, paged, [(500, 40), (200, 1)], 16)
    assert_close(found, attention.expected(qkv, paged.lengths), backend.attention, 3)


@st.composite
def schedules(draw):
    """Sequences, and a way to cut them into steps in which not every sequence takes part."""
    lengths = draw(st.lists(st.integers(1, 19), min_size=1, max_size=4))
    parts = []
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        waits = [0] * draw(st.integers(0, 3))
        parts.append(waits + [stop - start for start, stop in itertools.pairwise([0, *cuts, length])])
    steps = itertools.zip_longest(*parts, fillvalue=0)
    return tuple(lengths), [now for now in steps if any(now)]


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=40, deadline=None)
@given(
    schedule=schedules(),
    block_size=st.integers(1, 9),
    shape=st.sampled_from([(1, 1, 8), (2, 1, 9), (6, 3, 10), (5, 5, 33)]),
    window=st.none() | st.integers(1, 12),
    chunk=st.none() | st.integers(1, 12),
    softcap=st.sampled_from([None, 1.0]),
    sink=st.booleans(),
)
def test_attend_as_any_schedule_cuts_it(kind, schedule, block_size, shape, window, chunk, softcap, sink):
    lengths, steps = schedule
    sinks = exact(shape[0], seed=5) if sink else None
    attention = case(shape, window=window, chunk=chunk, softcap=softcap, frequencies=[0.5, 0.02])._replace(sinks=sinks)
    qkv = exact(sum(lengths), attention.width)
    found = attention.found(exact_one(kind), qkv, Paged.make(lengths, block_size), steps, block_size)
    assert_close(found, attention.expected(qkv, lengths), SOFTMAX, 3)


def test_a_block_is_reused_without_a_trace_of_its_last_owner(backend):
    """The second sequence is shorter than the first and takes its blocks over, in another order."""
    ops, attention = backend.ops, Case(2, 2, 8, 1.0, frequencies=[])
    args, qkv = attention.args(ops), exact(5, attention.width)
    paged = Paged((12,), ((0, 1, 2),), 3)
    cache = poisoned_cache(ops, paged, 4, 2, 8)
    plan = ops.plan(Batch(range(5), (0, 1, 2, 3, 0), (0, 4, 5), (4, 1), ((2,), (0,)), ()), 4)
    q = ops.append(ops.embed(plan, weight(ops, qkv), 1.0), cache, plan, args, None)
    found = values_of(ops, ops.attend(q, cache, plan, args), 5, 16)
    assert_close(found, attention.expected(qkv, (4, 1)), backend.attention, 3)


@pytest.mark.parametrize("changes", [{}, {"softcap": 1.5, "sinks": exact(2, seed=5)}], ids=["plain", "explicit"])
@pytest.mark.parametrize("limit", ["reference_plan.GATHER_BYTES", "reference_attention.SCORE_BYTES"])
def test_attend_in_bounded_pieces(monkeypatch, limit, changes):
    """Splitting gathers and scores into many small calls changes nothing."""
    attention, paged = Case(2, 1, 8, 0.5, frequencies=[], **changes), Paged.make((20, 3, 9, 28), 4)
    qkv, found = exact(60, attention.width), []
    for size in (1 << 20, 1):
        monkeypatch.setattr(f"fgsnap.kernels.{limit}", size)
        steps = [(19, 2, 8, 27), (1, 1, 1, 1)]
        found.append(attention.found(Reference("cpu", "float32"), qkv, paged, steps, 4))
    assert_close(found[0], found[1], EPSILON["float32"])


# norms of whole projections


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (5, 1)])
def test_norm_heads(backend, heads, kv_heads):
    """All queries are one vector, all keys another, and the values stay."""
    ops, dim = backend.ops, 12
    n, k = heads * dim, kv_heads * dim
    query = Norm("rms", 1e-5, exact(n, seed=1))
    key = Norm("rms", 1e-2, exact(k, seed=2), float32_weight=True)
    qkv = exact(9, n + 2 * k, seed=3, scale=2.0)
    args = AttentionArgs(heads, kv_heads, dim, 1.0)
    found = values_of(ops, ops.norm_heads(tensor(ops, qkv), args, query.args(ops), key.args(ops), heads), 9, n + 2 * k)
    expected = torch.cat([query(qkv[:, :n]), key(qkv[:, n : n + k]), qkv[:, n + k :]], -1)
    assert_close(found, expected, backend.activation)
    assert torch.equal(found[:, n + k :], qkv[:, n + k :])


@pytest.mark.skipif(not native.available()[0], reason="ranks of one process share native's memory")
@pytest.mark.parametrize("heads, kv_heads", [(6, 3), (6, 1), (5, 1)], ids=["divided", "repeated", "filled up"])
def test_norm_heads_over_native_ranks(heads, kv_heads):
    """Each rank normalises its heads by the squares of all: a key head may be on every rank, and a query head zeros."""
    dim, size = 12, 3
    n, k = heads * dim, kv_heads * dim
    query, key = Norm("rms", 1e-5, exact(n, seed=1)), Norm("rms", 1e-2, exact(k, seed=2))
    qkv = exact(9, n + 2 * k, seed=3, scale=2.0)
    expected = torch.cat([query(qkv[:, :n]), key(qkv[:, n : n + k]), qkv[:, n + k :]], -1)
    memory = rank_memory(size, 2)
    own, own_kv = -(-heads // size), max(1, kv_heads // size)

    def queries(rank, whole):
        return torch.nn.functional.pad(whole, (0, own * size * dim - n)).split(own * dim, -1)[rank]

    def keys(rank, whole):
        first = rank * own_kv % kv_heads * dim
        return whole[..., first : first + own_kv * dim]

    def part(rank, whole):
        """Rank's columns of queries, keys and values."""
        q, k_and_v = whole.split([n, 2 * k], -1)
        return torch.cat([queries(rank, q), *(keys(rank, both) for both in k_and_v.split(k, -1))], -1)

    def compute(rank):
        ops = native.Native("float32", 1, ranks=Ranks(rank, size, memory))
        own_norms = (query._replace(weight=queries(rank, query.weight)), key._replace(weight=keys(rank, key.weight)))
        mine = part(rank, qkv)
        args = AttentionArgs(own, own_kv, dim, 1.0)
        found = ops.norm_heads(tensor(ops, mine), args, *(norm.args(ops) for norm in own_norms), heads)
        return values_of(ops, found, 9, mine.shape[1])

    with ThreadPoolExecutor(size) as pool:
        for rank, found in enumerate(pool.map(compute, range(size))):
            assert_close(found, part(rank, expected), EPSILON["float32"])


# sizes of caches


@pytest.mark.parametrize("block_size, kv_heads, head_dim", [(16, 2, 64), (7, 3, 20), (1, 1, 8)])
def test_a_block_takes_at_least_its_keys_and_values(backend, block_size, kv_heads, head_dim):
    item = 4 if backend.ops.dtype == "float32" else 2
    taken = backend.ops.kv_block_bytes(block_size, kv_heads, head_dim)
    assert taken >= 2 * block_size * kv_heads * head_dim * item
    assert backend.ops.kv_block_bytes(16 * block_size, kv_heads, head_dim) <= 16 * taken


# latent attention


class Latent(NamedTuple):
    """Latent attention's numbers. What it should give is computed with every key and value written out."""

    heads: int = 3
    nope_dim: int = 12
    rope_dim: int = 8
    value_dim: int = 10
    kv_rank: int = 24
    seed: int = 0

    @property
    def scale(self):
        return (self.nope_dim + self.rope_dim) ** -0.5

    @property
    def norm(self):
        return Norm("rms", 1e-4, (1 + exact(self.kv_rank, seed=self.seed + 1) / 4).bfloat16().double())

    @property
    def up_keys(self):
        return exact(self.heads, self.kv_rank, self.nope_dim, seed=self.seed + 2, scale=self.kv_rank**-0.5)

    @property
    def up_values(self):
        return exact(self.heads, self.value_dim, self.kv_rank, seed=self.seed + 3, scale=self.kv_rank**-0.5)

    @property
    def widths(self):
        """Of a query row and of a latent row."""
        return self.heads * (self.nope_dim + self.rope_dim), self.kv_rank + self.rope_dim

    def args(self, ops, dtype="float32"):
        return LatentArgs(
            self.heads,
            self.nope_dim,
            self.rope_dim,
            self.value_dim,
            self.kv_rank,
            self.scale,
            self.norm.args(ops),
            weight(ops, self.up_keys, dtype),
            weight(ops, self.up_values, dtype),
        )

    def expected(self, rows, lengths, frequencies):
        out = []
        for own in rows.split(list(lengths)):
            q, latent = own.split(self.widths, 1)
            positions = torch.arange(len(own))
            nope, turned = q.view(len(own), self.heads, -1).split([self.nope_dim, self.rope_dim], -1)
            turned = float64_rotate(turned, positions, frequencies)
            shared = float64_rotate(latent[:, None, self.kv_rank :], positions, frequencies)[:, 0]
            normed = self.norm(latent[:, : self.kv_rank])
            hidden = positions[:, None] < positions
            heads = []
            for n in range(self.heads):
                key, value = normed @ self.up_keys[n], normed @ self.up_values[n].T
                scores = (nope[:, n] @ key.T + turned[:, n] @ shared.T) * self.scale
                heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
            out.append(torch.cat(heads, 1))
        return torch.cat(out)

    def found(self, ops, rows, paged, steps, block_size, frequencies, dtype="float32"):
        args, rope = self.args(ops, dtype), ops.rope(frequencies, 1.0) if frequencies else None
        q_table, latent_table = (weight(ops, part.contiguous()) for part in rows.split(self.widths, 1))
        q_nan, latent_nan = (weight(ops, torch.full((1, width), torch.nan)) for width in self.widths)
        cache = ops.latent_cache(paged.blocks, block_size, args)

        def append(plan, q_rows, latent_rows):
            q, latent = ops.embed(plan, q_rows, 1.0), ops.embed(plan, latent_rows, 1.0)
            return ops.latent_append(q, latent, cache, plan, args, rope)

        def step(plan):
            return ops.latent_attend(append(plan, q_table, latent_table), cache, plan, args)

        append(ops.plan(paged.everything(block_size), block_size), q_nan, latent_nan)
        return run_steps(ops, paged, steps, block_size, self.heads * self.value_dim, step)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "latent",
    [Latent(), Latent(1, 8, 8, 8, 8), Latent(5, 33, 16, 7, 40), Latent(16, 32, 16, 32, 64)],
    ids=["small", "one head", "odd sizes", "many heads"],
)
def test_latent_attention_is_the_one_with_every_key_written_out(backend, latent, dtype, steps):
    rows = exact(sum(LENGTHS), sum(latent.widths))
    frequencies = FREQUENCIES[: latent.rope_dim // 2]
    found = latent.found(backend.ops, rows, Paged.make(LENGTHS, 7), steps, 7, frequencies, dtype)
    assert_close(found, latent.expected(rows, LENGTHS, frequencies), backend.attention, 4)


def test_latent_attention_without_rotation(backend):
    latent, rows = Latent(), exact(sum(LENGTHS), sum(Latent().widths))
    found = latent.found(backend.ops, rows, Paged.make(LENGTHS, 4), STEPS["chunks"], 4, [])
    assert_close(found, latent.expected(rows, LENGTHS, []), backend.attention, 4)


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=20, deadline=None)
@given(schedule=schedules(), block_size=st.integers(1, 9))
def test_latent_attention_as_any_schedule_cuts_it(kind, schedule, block_size):
    lengths, steps = schedule
    latent, rows = Latent(), exact(sum(lengths), sum(Latent().widths))
    paged = Paged.make(lengths, block_size)
    found = latent.found(exact_one(kind), rows, paged, steps, block_size, FREQUENCIES)
    assert_close(found, latent.expected(rows, lengths, FREQUENCIES), SOFTMAX, 4)


def test_a_latent_block_takes_at_least_its_latents_and_keys(backend):
    latent = Latent()
    item = 4 if backend.ops.dtype == "float32" else 2
    taken = backend.ops.latent_block_bytes(16, latent.args(backend.ops))
    assert taken >= 16 * (latent.kv_rank + latent.rope_dim) * item
