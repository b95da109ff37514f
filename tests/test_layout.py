"""Logical and stored tensors: the map between them is invertible at every degree, and slabs are cut anywhere."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.errors import UnsupportedModel, UsageError
from fgsnap.layout import (
    Segment,
    check_tp,
    copy_box,
    logical_shapes,
    padded_vocabulary,
    pieces,
    possible_tp,
    stored_tensors,
)
from fgsnap.spec import DecoderSpec, Head
from tests.snapshots import random_weights, stored_array, tiny_spec


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    """Llama-shaped specs of odd sizes: grouped and replicated KV heads, any vocabulary, tied or not, biases or not."""
    kv_heads = draw(st.integers(1, 4))
    return tiny_spec(
        width=draw(st.integers(1, 9)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((2, 4))),
        inner=draw(st.integers(1, 4)) * draw(st.sampled_from((1, 2, 3, 4, 12))),
        layers=draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 40)),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def divided(draw: st.DrawFn) -> tuple[DecoderSpec, int]:
    spec = draw(specs())
    return spec, draw(st.sampled_from(possible_tp(spec, 16)))


def smollm2() -> DecoderSpec:
    return tiny_spec(width=576, heads=9, kv_heads=3, head_dim=64, inner=1536, layers=30, vocab_size=49152, tied=True)


def test_degrees_that_divide() -> None:
    assert possible_tp(smollm2()) == [1, 3]
    assert possible_tp(tiny_spec(heads=4, kv_heads=1, inner=64)) == [1, 2, 4]
    assert possible_tp(tiny_spec(heads=32, kv_heads=8, inner=14336)) == [1, 2, 4, 8, 16, 32]
    assert possible_tp(tiny_spec(heads=4, kv_heads=4, inner=6)) == [1, 2]


def test_a_degree_that_cannot_work_is_refused_with_those_that_can() -> None:
    with pytest.raises(UsageError) as error:
        check_tp(smollm2(), 2)
    assert error.value.lines() == [
        "Tensor parallel degree 2 does not divide this model.",
        "It has 9 attention heads, 3 KV heads, MLP width 1536.",
        "Degrees that work: 1, 3.",
    ]


def test_a_feature_that_cannot_be_laid_out_is_refused_by_name() -> None:
    spec = tiny_spec()
    attention = msgspec.structs.replace(spec.layer_kinds[0].attention, sinks=True)
    spec = msgspec.structs.replace(
        spec, layer_kinds=(msgspec.structs.replace(spec.layer_kinds[0], attention=attention),)
    )
    with pytest.raises(UnsupportedModel, match=r"attention\.sinks"):
        stored_tensors(spec, 1, 0)


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


def test_a_rank_may_hold_padding_alone() -> None:
    spec = tiny_spec(heads=8, kv_heads=8, vocab_size=9)
    assert stored_tensors(spec, 8, 7)[0].segments == (Segment(None, 0, 0, 2, 0),)


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
            cut = data.draw(st.integers(0, tensor.shape[0]))
            for start, stop in ((0, cut), (cut, tensor.shape[0])):
                for piece in pieces(tensor.shape, tensor.segments, start, stop):
                    here = tuple(slice(a, a + n) for a, n in zip(piece.stored_start, piece.extent, strict=True))
                    assert here[0].start >= start and here[0].stop <= stop
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
def test_copying_a_box_is_what_numpy_does(box: tuple) -> None:
    source_shape, source_start, target_shape, target_start, extent, item = box
    kind = {2: np.uint16, 4: np.uint32}[item]
    source = np.arange(1, 1 + math.prod(source_shape), dtype=kind).reshape(source_shape)
    expected, target = np.zeros(target_shape, kind), np.zeros(target_shape, kind)
    here = tuple(slice(a, a + n) for a, n in zip(source_start, extent, strict=True))
    there = tuple(slice(a, a + n) for a, n in zip(target_start, extent, strict=True))
    expected[there] = source[here]
    views = memoryview(source).cast("B"), memoryview(target).cast("B")
    copied = copy_box(views[0], source_shape, source_start, views[1], target_shape, target_start, extent, item)
    assert copied == math.prod(extent) * item
    np.testing.assert_array_equal(target, expected)
