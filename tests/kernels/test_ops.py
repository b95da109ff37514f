"""The ops of every backend against plain float64 arithmetic; attention, experts and sampling have their own files."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels.ops import (
    ActivationArgs,
    AttentionArgs,
    Batch,
    ExpertsArgs,
    HeadArgs,
    LatentArgs,
    NormArgs,
    QkNormArgs,
    RouterArgs,
)
from fgsnap.kernels.reference import Reference
from tests.kernels.backends import (
    EPSILON,
    FREQUENCIES,
    KINDS_OF_BACKEND,
    TORCH,
    Norm,
    assert_close,
    exact,
    exact_one,
    raw,
    tensor,
    values_of,
    weight,
    whole,
)

DTYPES = ["float32", "bfloat16", "float16"]


# weights


@pytest.mark.parametrize("dtype", DTYPES)
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


def words32(values, dtype):
    """The layout as ops.Ops.weight words it: panels of 32 rows, in them word after word of 4 bytes all rows' words."""
    rows = [bytes(raw(row, dtype)) for row in values]
    rows += [bytes(len(rows[0]))] * (-len(rows) % 32)
    words = range(0, len(rows[0]), 4)
    panels = [rows[top : top + 32] for top in range(0, len(rows), 32)]
    return memoryview(b"".join(row[at : at + 4] for panel in panels for at in words for row in panel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 2), (31, 6), (32, 64), (33, 10), (97, 576)])
def test_linear_with_a_packed_weight(backend, rows, columns, dtype):
    ops, x, w, b = backend.ops, exact(5, columns), exact(rows, columns, seed=1), exact(rows, seed=2)
    packed = ops.weight(words32(w, dtype), dtype, (rows, columns), "words32")
    found = values_of(ops, ops.linear(tensor(ops, x), packed, weight(ops, b)), 5, rows)
    assert_close(found, x @ w.T + b, backend.activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_table_embeds_and_makes_logits(backend, dtype):
    """As of a model whose head is tied to its embedding."""
    ops, table = backend.ops, exact(45, 18)
    packed = ops.weight(words32(table, dtype), dtype, (45, 18), "words32")
    tokens = [44, 0, 31, 32, 7, 33]
    plan = ops.plan(Batch(tokens, range(6), (0, 6), (6,), ((0,),), range(6)), 8)
    x = ops.embed(plan, packed, 1.0)
    assert torch.equal(values_of(ops, x, 6, 18), table[tokens])
    found = values_of(ops, ops.logits(x, plan, HeadArgs(packed, None, 43)), 6, 43)
    assert_close(found, table[tokens] @ table[:43].T, EPSILON["float32"], 4)


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 100), words=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_packed_weights_of_any_size(kind, rows, words, dtype):
    columns = words * 4 // TORCH[dtype].itemsize
    x, w = exact(2, columns), exact(rows, columns, seed=1)
    ops = exact_one(kind)
    packed = ops.weight(words32(w, dtype), dtype, (rows, columns), "words32")
    assert_close(values_of(ops, ops.linear(tensor(ops, x), packed), 2, rows), x @ w.T, 2e-6, 4)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("float32", (33, 2), 33 * 8),
        ("float32", (33, 2), 96 * 8),
        ("bfloat16", (32, 3), 32 * 6),
        ("bfloat16", (32,), 64),
        ("float32", (2, 32, 2), 512),
    ],
    ids=["only its own rows", "a panel too many", "half a word", "a vector", "a stack"],
)
def test_a_packed_weight_of_another_size_is_refused(backend, dtype, shape, size):
    with pytest.raises((AssertionError, ValueError)):
        backend.ops.weight(memoryview(bytes(size)), dtype, shape, "words32")


# embed, norm, add, linear, activate, gate


@pytest.mark.parametrize("scale", [1.0, 23.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(backend, dtype, scale):
    ops, table = backend.ops, exact(11, 33)
    tokens = [10, 0, 3, 3, 7]
    plan = ops.plan(Batch(tokens, range(5), (0, 5), (5,), ((0,),), ()), 8)
    found = values_of(ops, ops.embed(plan, weight(ops, table, dtype), scale), 5, 33)
    assert_close(found, table[tokens] * scale, backend.activation, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions(backend, dtype):
    """Prompt chunks and decodes; a position's row lies ``offset`` rows further down."""
    ops, table = backend.ops, exact(25, 33)
    positions = [7, 8, 9, 0, 22]
    batch = Batch([10, 0, 3, 3, 7], positions, (0, 3, 4, 5), (10, 1, 23), ((0, 1), (2,), (3, 4, 5)), ())
    found = values_of(ops, ops.positions(ops.plan(batch, 8), weight(ops, table, dtype), 2), 5, 33)
    assert_close(found, table[[p + 2 for p in positions]], backend.activation)


def test_embed_of_shards_sums_to_the_whole(backend):
    """Each token is in one shard; the others give zeros, so that a sum is the whole."""
    ops, table = backend.ops, exact(11, 16)
    tokens = [10, 0, 3, 4, 7, 8]
    plan = ops.plan(Batch(tokens, range(6), (0, 6), (6,), ((0,),), ()), 8)
    total = torch.zeros(6, 16, dtype=torch.float64)
    for first, stop in ((0, 4), (4, 8), (8, 11)):
        shard = weight(ops, table[first:stop].contiguous())
        part = values_of(ops, ops.embed(plan, shard, 3.0, first), 6, 16)
        outside = torch.tensor([not first <= token < stop for token in tokens])
        assert torch.equal(part[outside], torch.zeros(int(outside.sum()), 16).double())
        total += part
    assert_close(total, table[tokens] * 3.0, backend.activation, 1)


@pytest.mark.parametrize("float32_weight", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("kind, has_bias", [("rms", False), ("ln", False), ("ln", True), ("l2", None)])
@pytest.mark.parametrize("rows, width", [(1, 576), (3, 8), (37, 100), (2, 1)])
def test_norm(backend, kind, has_bias, unit_offset, float32_weight, rows, width):
    ops, x = backend.ops, exact(rows, width, scale=3.0) + 1.0
    x = x.to(torch.bfloat16).double()
    norm = Norm(
        kind,
        1e-5,
        exact(width, seed=1) if has_bias is not None else None,
        exact(width, seed=2) if has_bias else None,
        unit_offset,
        float32_weight,
    )
    found = values_of(ops, ops.norm(tensor(ops, x), norm.args(ops)), rows, width)
    assert_close(found, norm(x), backend.activation)


def test_norm_of_large_and_tiny_numbers(backend):
    x = torch.stack([torch.full((64,), 3.0e4), torch.full((64,), 2.0**-14)]).double()
    args = NormArgs("rms", 1e-6, None, None)
    found = values_of(backend.ops, backend.ops.norm(tensor(backend.ops, x), args), 2, 64)
    assert_close(found, Norm("rms", 1e-6)(x.to(torch.bfloat16).double()), 2**-8)


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
def test_add(backend, multiplier):
    x, y = exact(9, 70), exact(9, 70, seed=1)
    found = backend.ops.add(tensor(backend.ops, x), tensor(backend.ops, y), multiplier)
    assert_close(values_of(backend.ops, found, 9, 70), x + multiplier * y, backend.activation)


def test_add_of_a_sum_of_products(backend):
    """As a shared expert is added to the others, and both to the residual stream: no part of the sum may be lost."""
    ops, table, head = backend.ops, exact(20, 40), exact(11, 40, seed=1)
    held = [weight(ops, exact(40, 40, seed=seed), "float32") for seed in (2, 3)]
    shared = HeadArgs(weight(ops, head, "float32"), None, 11)
    rows = weight(ops, table, "float32")

    def forward(plan):
        stream, x = ops.embed(plan, rows, 2.0), ops.embed(plan, rows, 1.0)
        branch = ops.add(ops.linear(x, held[0]), ops.linear(x, held[1]))
        return ops.logits(ops.add(stream, branch), plan, shared)

    batch = Batch([3, 5, 7], [0, 1, 2], [0, 3], [3], [[0]], [0, 1, 2])
    found = values_of(ops, ops.taped(forward, 4)(batch), 3, 11)
    x, (first, second) = table[[3, 5, 7]], (exact(40, 40, seed=seed) for seed in (2, 3))
    assert_close(found, (2.0 * x + x @ first.T + x @ second.T) @ head.T, 4 * backend.activation)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
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


ACTIVATIONS = {
    "silu": lambda v: v / (1 + (-v).exp()),
    "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5)),
    "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    "relu": lambda v: v.clamp(min=0),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activate(backend, kind, gated):
    x = exact(7, 2 * 45, scale=3.0)
    act = ACTIVATIONS[kind]
    expected = act(x[:, :45]) * x[:, 45:] if gated else act(x)
    found = backend.ops.activate(tensor(backend.ops, x), ActivationArgs(kind, gated))
    assert_close(values_of(backend.ops, found, *expected.shape), expected, backend.activation)


@pytest.mark.parametrize("clamp", [None, 7.0, 1.5])
def test_activate_with_a_clamp(backend, clamp):
    """Gates are cut above alone, ups on both sides."""
    x = exact(9, 2 * 31, scale=5.0)
    gate, up = x[:, :31], x[:, 31:]
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    expected = (up + 1) * gate / (1 + (-1.702 * gate).exp())
    found = backend.ops.activate(tensor(backend.ops, x), ActivationArgs("clamped_swiglu", True, clamp))
    assert_close(values_of(backend.ops, found, 9, 31), expected, backend.activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(backend, dtype):
    ops, branch, x, w = backend.ops, exact(6, 40), exact(6, 40, seed=1), exact(1, 40, seed=2, scale=0.3)
    found = ops.gate(tensor(ops, branch), tensor(ops, x), weight(ops, w, dtype))
    assert_close(values_of(ops, found, 6, 40), branch / (1 + (-x @ w.T).exp()), backend.activation)


# one rank


def test_one_rank_has_nothing_to_sum(backend):
    x = exact(3, 8)
    assert torch.equal(values_of(backend.ops, backend.ops.all_reduce(tensor(backend.ops, x)), 3, 8), x)


def test_one_rank_gathers_its_own_logits_without_padding(backend):
    ops, x = backend.ops, exact(3, 8)
    head = HeadArgs(weight(ops, exact(11, 8, seed=1)), None, 11)
    found = ops.gather(ops.logits(tensor(ops, x), ops.plan(whole(3), 3), head), 9)
    assert_close(values_of(ops, found, 3, 9), x @ exact(11, 8, seed=1)[:9].T, EPSILON["float32"], 4)
    assert [token for token, _ in ops.top_two(found)] == (x @ exact(11, 8, seed=1)[:9].T).argmax(-1).tolist()


# logits


def test_logits_of_wanted_rows_without_padded_vocabulary(backend):
    ops, x, w, b = backend.ops, exact(6, 24), exact(50, 24, seed=1), exact(50, seed=2)
    plan = ops.plan(whole(6, wanted=(1, 2, 5)), 6)
    head = HeadArgs(weight(ops, w, "bfloat16"), weight(ops, b, "bfloat16"), 47, 0.5, 3.0)
    plain = 0.5 * (x[[1, 2, 5]] @ w[:47].T + b[:47])
    found = values_of(ops, ops.logits(tensor(ops, x), plan, head), 3, 47)
    assert_close(found, 3.0 * torch.tanh(plain / 3.0), EPSILON["float32"], 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_float32_whatever_the_activations(backend, dtype):
    ops, x, w = backend.ops, exact(2, 576), exact(1030, 576, seed=1)
    found = ops.logits(tensor(ops, x), ops.plan(whole(2), 2), HeadArgs(weight(ops, w, dtype), None, 1030))
    assert_close(values_of(ops, found, 2, 1030), x @ w.T, EPSILON["float32"], 4)


def test_no_wanted_rows(backend):
    ops = backend.ops
    plan = ops.plan(whole(3, wanted=()), 3)
    found = ops.logits(tensor(ops, exact(3, 8)), plan, HeadArgs(weight(ops, exact(5, 8)), None, 5))
    assert ops.sample(found, [], []).tokens == []
    assert ops.top_two(found) == []


# the tape


class Everything:
    """A forward that calls every op which a tape may hold, over two caches."""

    width, heads, dim, vocabulary = 24, 3, 8, 37

    def __init__(self, ops):
        def w(*shape, scale=None):
            self.drawn += 1
            return weight(ops, exact(*shape, seed=self.drawn, scale=scale or shape[-1] ** -0.5))

        self.ops, self.drawn = ops, 0
        self.embed, self.positions = w(self.vocabulary, self.width), w(64, self.width)
        self.norm = NormArgs("rms", 1e-5, w(self.width), None)
        self.head_norm = NormArgs("rms", 1e-5, w(self.dim), None)
        self.query_norm, self.key_norm = (NormArgs("rms", 1e-5, w(n * self.dim), None) for n in (3, 1))
        self.attention = AttentionArgs(
            self.heads, 1, self.dim, 0.3, window=9, sinks=w(3), qk_norm=QkNormArgs(self.head_norm, self.head_norm)
        )
        self.qkv, self.out = w(5 * self.dim, self.width), w(self.width, 3 * self.dim)
        self.rope = ops.rope(FREQUENCIES, 1.0)
        self.latent = LatentArgs(2, 8, 8, 6, 12, 0.25, NormArgs("rms", 1e-5, w(12), None), w(2, 12, 8), w(2, 6, 12))
        self.latent_q, self.latent_kv, self.latent_out = w(32, self.width), w(20, self.width), w(self.width, 12)
        self.router = RouterArgs(w(5, self.width), None, None, "softmax", 2)
        act = ActivationArgs("silu")
        self.experts = ExpertsArgs(w(5, 20, self.width), None, w(5, self.width, 10), None, act)
        self.gate, self.up, self.down = w(1, self.width), w(26, self.width), w(self.width, 13)
        self.act = act
        self.caches = ops.kv_cache(9, 5, 1, self.dim), ops.latent_cache(9, 5, self.latent)

    def __call__(self, plan):
        ops = self.ops
        x = ops.add(ops.embed(plan, self.embed, 1.5), ops.positions(plan, self.positions, 2))
        qkv = ops.linear(ops.norm(x, self.norm), self.qkv)
        qkv = ops.norm_heads(qkv, self.attention, self.query_norm, self.key_norm, self.heads)
        q = ops.append(qkv, self.caches[0], plan, self.attention, self.rope)
        x = ops.add(x, ops.all_reduce(ops.linear(ops.attend(q, self.caches[0], plan, self.attention), self.out)))
        normed = ops.norm(x, self.norm)
        q, latent = ops.linear(normed, self.latent_q), ops.linear(normed, self.latent_kv)
        q = ops.latent_append(q, latent, self.caches[1], plan, self.latent, self.rope)
        x = ops.add(x, ops.linear(ops.latent_attend(q, self.caches[1], plan, self.latent), self.latent_out), 0.5)
        normed = ops.norm(x, self.norm)
        shared = ops.linear(ops.activate(ops.linear(normed, self.up), self.act), self.down)
        x = ops.add(ops.add(x, ops.gate(shared, normed, self.gate)), ops.experts(normed, self.router, self.experts))
        logits = ops.logits(ops.norm(x, self.norm), plan, HeadArgs(self.embed, None, self.vocabulary, 0.5, 4.0))
        return ops.gather(logits, self.vocabulary)


BATCHES = [
    Batch([1, 2, 3], (0, 1, 2), (0, 3), (3,), ((4,),), (2,)),
    Batch(range(23), [*range(17), *range(3, 9)], (0, 17, 23), (17, 9), ((0, 1, 2, 3), (4, 5)), (0, 16, 22)),
    Batch([7, 8], (17, 9), (0, 1, 2), (18, 10), ((0, 1, 2, 3), (4, 5)), (0, 1)),
    Batch([5], (0,), (0, 1), (1,), ((8,),), ()),
    Batch([9, 10], (18, 10), (0, 1, 2), (19, 11), ((0, 1, 2, 3), (4, 5, 7)), (1,)),
]


def test_a_taped_forward_gives_what_its_ops_give(backend):
    """Batches of other sizes than the first, other tables, other rows, and none: the tape knows nothing of them."""
    ops = backend.ops
    plain, taped = Everything(ops), Everything(ops)
    run = ops.taped(taped, 5)
    for batch in BATCHES:
        expected = ops.floats(plain(ops.plan(batch, 5))).tolist()
        assert ops.floats(run(batch)).tolist() == expected
        assert len(expected) == len(batch.rows) * plain.vocabulary
        assert len(set(expected)) >= 30 * len(batch.rows), "else there is little to compare"
