"""Logical and stored tensors: the map between them is invertible at every degree, and slabs are cut anywhere."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.errors import UsageError
from fgsnap.layout import (
    Runs,
    Segment,
    box_runs,
    check_tp,
    logical_shapes,
    padded_vocabulary,
    pieces,
    possible_tp,
    slabs,
    stored_tensors,
)
from fgsnap.spec import (
    Attention,
    DecoderSpec,
    Embedding,
    Experts,
    Head,
    Latent,
    Layer,
    Mlp,
    Norm,
    QkNorm,
    Router,
    SharedExpert,
)
from tests.snapshots import random_weights, stored_array, tiny_spec

NORM = Norm(kind="rms", eps=1e-5)
norms = st.sampled_from((None, NORM, Norm(kind="ln", eps=1e-5, bias=True), Norm(kind="l2", eps=1e-5, weight=False)))
widths = st.builds(lambda a, b: a * b, st.integers(1, 4), st.sampled_from((1, 2, 3, 4, 12)))
mlps = st.builds(
    Mlp, widths, st.just("silu"), gated=st.booleans(), bias=st.booleans(), down_bias=st.booleans()
)  # fmt: skip


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """Grouped and replicated KV heads, or latents; any group, biases, norms and sinks or none."""
    kv_heads, dim = draw(st.integers(1, 4)), draw(st.sampled_from((2, 4)))
    heads = kv_heads * draw(st.integers(1, 5))
    if draw(st.booleans()):
        latent = Latent(draw(st.integers(1, 5)), 2, NORM, draw(st.sampled_from((None, 3))))
        return Attention(heads, heads, dim + 2, 1.0, value_dim=draw(st.integers(1, 3)), latent=latent)
    scope = draw(st.sampled_from((None, "head", "projection")))
    return Attention(
        heads, kv_heads, dim, 1.0, sinks=draw(st.booleans()), qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()), qk_norm=None if scope is None else QkNorm(NORM, scope),
    )  # fmt: skip


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """An MLP, or experts beside a shared one."""
    parts = {name: draw(norms) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")}
    if draw(st.booleans()):
        return Layer(draw(attentions()), draw(mlps), **parts)
    router = Router("softmax", 1, bias=draw(st.booleans()), selection_bias=draw(st.booleans()))
    shared = SharedExpert(draw(mlps), draw(st.booleans())) if draw(st.booleans()) else None
    return Layer(draw(attentions()), experts=Experts(draw(st.integers(1, 3)), draw(mlps), router, shared), **parts)


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    """Decoders of every kind of layer and of odd sizes: any vocabulary, tied or not, with projections or not."""
    width, kinds = draw(st.integers(1, 9)), tuple(draw(st.lists(layers(), min_size=1, max_size=2)))
    return DecoderSpec(
        vocab_size=draw(st.integers(1, 40)),
        width=width,
        max_length=8,
        embedding=Embedding(draw(st.sampled_from((width, width + 2))), learned_positions=draw(st.sampled_from((0, 5)))),
        layer_kinds=kinds,
        layers=tuple(draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=2))),
        head=Head(tied=draw(st.booleans()), bias=draw(st.booleans())),
        final_norm=draw(norms),
    )


@st.composite
def divided(draw: st.DrawFn) -> tuple[DecoderSpec, int]:
    spec = draw(specs())
    return spec, draw(st.sampled_from(possible_tp(spec, 16)))


def smollm2() -> DecoderSpec:
    return tiny_spec(width=576, heads=9, kv_heads=3, head_dim=64, inner=1536, layers=30, vocab_size=49152, tied=True)


def test_degrees_that_divide() -> None:
    assert possible_tp(smollm2()) == [1, 3, 6, 9]
    assert possible_tp(tiny_spec(heads=4, kv_heads=1, inner=64)) == [1, 2, 4]
    assert possible_tp(tiny_spec(heads=32, kv_heads=8, inner=14336, vocab_size=320)) == [1, 2, 4, 8, 16, 32]
    assert possible_tp(tiny_spec(heads=4, kv_heads=4, inner=6)) == [1, 2]
    assert possible_tp(tiny_spec(heads=71, kv_heads=1, inner=18176), 8) == list(range(1, 9))


def test_heads_are_filled_up_where_they_do_not_divide() -> None:
    """Falcon-7B has 71 heads, which read one key head."""
    falcon = tiny_spec(heads=71, kv_heads=1, head_dim=2)
    *_, last = (stored_tensors(falcon, 8, rank) for rank in range(8))
    qkv, out = (next(t for t in last if t.name == f"layers.0.{name}.weight") for name in ("qkv", "out"))
    assert qkv.shape == (9 * 2 + 4, 32) and out.shape == (32, 9 * 2)
    assert qkv.segments[:2] == (
        Segment("layers.0.q.weight", 0, 126, 142, 0), Segment(None, 0, 0, 2, 16),
    )  # fmt: skip
    assert out.segments == (Segment("layers.0.out.weight", 1, 126, 142, 0), Segment(None, 1, 0, 2, 16))


def test_queries_lie_beside_the_keys_that_they_read() -> None:
    """9 query heads on 3 KV heads over 6 ranks: two ranks share a key head and its three queries."""
    own = [stored_tensors(smollm2(), 6, rank)[2].segments for rank in range(2, 4)]
    assert own[0][0] == Segment("layers.0.q.weight", 0, 3 * 64, 5 * 64, 0)
    assert own[1][:2] == (Segment("layers.0.q.weight", 0, 5 * 64, 6 * 64, 0), Segment(None, 0, 0, 64, 64))
    for rank in own:
        key = next(s for s in rank if s.tensor == "layers.0.k.weight")
        assert (key.start, key.stop, key.replicated) == (64, 128, True)


def test_a_degree_that_cannot_work_is_refused_with_those_that_can() -> None:
    with pytest.raises(UsageError) as error:
        check_tp(smollm2(), 2)
    assert error.value.lines() == [
        "Tensor parallel degree 2 does not divide this model.",
        "It has 9 attention heads on 3 KV heads.",
        "Degrees that work: 1, 3, 6, 9.",
    ]


def test_names_and_shapes_of_a_plain_llama() -> None:
    stored = stored_tensors(tiny_spec(layers=1), 1, 0)
    assert [(t.name, t.shape) for t in stored] == [
        ("embed.weight", (61, 32)),
        ("layers.0.attn_in.weight", (32,)),
        ("layers.0.qkv.weight", (64, 32)),
        ("layers.0.out.weight", (32, 32)),
        ("layers.0.mlp_in.weight", (32,)),
        ("layers.0.gate_up.weight", (96, 32)),
        ("layers.0.down.weight", (32, 48)),
        ("final_norm.weight", (32,)),
        ("head.weight", (61, 32)),
    ]
    assert [t.name for t in stored if t.starts_layer] == ["layers.0.attn_in.weight"]


def test_kv_heads_are_replicated_when_there_are_more_ranks() -> None:
    spec = tiny_spec(heads=4, kv_heads=2)
    keys = [
        next(s for t in stored_tensors(spec, 4, rank) for s in t.segments if s.tensor == "layers.0.k.weight")
        for rank in range(4)
    ]
    assert keys == [Segment("layers.0.k.weight", 0, start, start + 8, 8, replicated=True) for start in (0, 0, 8, 8)]


def test_the_vocabulary_is_padded_at_its_end() -> None:
    assert padded_vocabulary(61, 4) == 64
    last = stored_tensors(tiny_spec(), 4, 3)[0]
    assert last.shape == (16, 32)
    assert last.segments == (Segment("embed.weight", 0, 48, 61, 0), Segment(None, 0, 0, 3, 13))


def test_no_rank_holds_padding_alone() -> None:
    """9 rows of vocabulary are 3 for each of 4 ranks, of which the last would have none."""
    assert possible_tp(tiny_spec(heads=8, kv_heads=8, inner=64, vocab_size=9)) == [1, 2]


def test_a_tied_head_is_stored_once() -> None:
    assert "head.weight" in logical_shapes(tiny_spec())
    assert "head.weight" not in logical_shapes(tiny_spec(tied=True))
    biased = msgspec.structs.replace(tiny_spec(), head=Head(tied=True, bias=True))
    assert [t.name for t in stored_tensors(biased, 2, 0)][-1] == "head.bias"


@settings(max_examples=60, deadline=None)
@given(divided(), st.data())
def test_the_map_is_invertible(division: tuple[DecoderSpec, int], data: st.DataObject) -> None:
    """Stored tensors of all ranks, cut into slabs anywhere, give back each logical value and zeros elsewhere."""
    spec, tp = division
    weights = random_weights(spec)
    found = {name: np.full(array.shape, np.nan, np.float32) for name, array in weights.items()}
    for rank in range(tp):
        for tensor in stored_tensors(spec, tp, rank):
            stored = stored_array(tensor, weights, "float32")
            touched = np.zeros(tensor.shape, np.int8)
            for start, extent in slabs(tensor.shape, data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))):
                for piece in pieces(tensor.segments, start, extent):
                    here = tuple(slice(a, a + n) for a, n in zip(piece.stored_start, piece.extent, strict=True))
                    for part, low, size in zip(here, start, extent, strict=True):
                        assert low <= part.start < part.stop <= low + size
                    touched[here] += 1
                    if piece.tensor is None:
                        assert not stored[here].any()
                        continue
                    there = tuple(slice(a, a + n) for a, n in zip(piece.logical_start, piece.extent, strict=True))
                    found[piece.tensor][there] = stored[here]
            assert (touched == 1).all(), tensor.name
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


@given(divided())
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_work(division: tuple[DecoderSpec, int]) -> None:
    """All ranks store the same names and shapes, and together every logical value at least once."""
    spec, tp = division
    ranks = [stored_tensors(spec, tp, rank) for rank in range(tp)]
    assert {tuple((t.name, t.shape, t.starts_layer) for t in rank) for rank in ranks} == {
        tuple((t.name, t.shape, t.starts_layer) for t in ranks[0])
    }
    values = sum(math.prod(shape) for shape in logical_shapes(spec).values())
    assert sum(math.prod(t.shape) for rank in ranks for t in rank) >= values


@st.composite
def boxes(draw: st.DrawFn) -> tuple:
    axes = draw(st.integers(1, 3))
    extent = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    sides = []
    for _ in range(2):
        start = tuple(draw(st.integers(0, 3)) for _ in range(axes))
        shape = tuple(a + n + draw(st.integers(0, 2)) for a, n in zip(start, extent, strict=True))
        sides += [shape, start]
    return (*sides, extent, draw(st.sampled_from((2, 4))))


@given(boxes())
@settings(max_examples=200, deadline=None)
def test_the_runs_of_a_box_are_what_numpy_copies(box: tuple) -> None:
    source_shape, source_start, target_shape, target_start, extent, item = box
    kind = {2: np.uint16, 4: np.uint32}[item]
    source = np.arange(1, 1 + math.prod(source_shape), dtype=kind).reshape(source_shape)
    expected, target = np.zeros(target_shape, kind), np.zeros(target_shape, kind)
    here = tuple(slice(a, a + n) for a, n in zip(source_start, extent, strict=True))
    there = tuple(slice(a, a + n) for a, n in zip(target_start, extent, strict=True))
    expected[there] = source[here]
    views = memoryview(source).cast("B"), memoryview(target).cast("B")
    copied = 0
    for runs in box_runs(source_shape, source_start, target_shape, target_start, extent, item):
        for run in range(runs.number):
            a, b = runs.source + run * runs.source_step, runs.target + run * runs.target_step
            views[1][b : b + runs.size] = views[0][a : a + runs.size]
            copied += runs.size
    assert copied == math.prod(extent) * item
    np.testing.assert_array_equal(target, expected)


def test_a_box_of_whole_rows_is_one_run() -> None:
    assert list(box_runs((8, 4, 6), (2, 0, 0), (3, 4, 6), (0, 0, 0), (3, 4, 6), 2)) == [Runs(96, 144, 0, 144, 144, 1)]
    assert list(box_runs((8, 6), (0, 0), (8, 12), (0, 6), (8, 6), 2)) == [Runs(0, 12, 12, 24, 12, 8)]
