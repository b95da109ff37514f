"""Rules are read lazily, by any boxes, and undone exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.convert.rules import (
    digest,
    is_whole,
    pair_to_half,
    read_box,
    rotated_first,
    rule,
    sources,
    take,
    whole,
    write_box,
)


class Tensors:
    """Source tensors of distinct numbers; remembers which rows were asked for."""

    def __init__(self, rules, dtype=np.uint32):
        self.arrays, first = {}, 0
        for name, shape in sources(rules).items():
            size = int(np.prod(shape))
            self.arrays[name] = np.arange(first, first + size).astype(dtype).reshape(shape)
            first += size
        self.asked = []

    def rows(self, name, start, stop):
        assert 0 <= start < stop <= self.arrays[name].shape[0]
        self.asked.append((name, start, stop))
        part = self.arrays[name][start:stop]
        part.flags.writeable = False
        return part


def read(made, tensors, start=None, extent=None):
    out = np.full(extent or made.shape, -1, np.int64).astype(np.uint32)
    read_box(made, tensors.rows, start or (0,) * len(made.shape), out)
    return out


def undo(rules, tensors):
    """The sources, written back from the logical tensors in two slabs each."""
    targets = {name: np.zeros_like(array) for name, array in tensors.arrays.items()}
    for made in rules:
        logical = read(made, tensors)
        cut = max(1, made.shape[0] // 2)
        for low, high in ((0, cut), (cut, made.shape[0])):
            if low < high:
                write_box(made, targets.__getitem__, (low,) + (0,) * (len(made.shape) - 1), logical[low:high])
    return targets


def assert_invertible(rules):
    tensors = Tensors(rules)
    for name, array in undo(rules, tensors).items():
        np.testing.assert_array_equal(array, tensors.arrays[name])


# What the families of later versions need, each as (rules, the same by plain numpy).


def grouped_qkv():
    """Falcon-40B: for each key-value group some query heads, one key head, one value head."""
    groups, queries, dim, width = 3, 2, 4, 5
    shape = (groups * (queries + 2) * dim, width)
    view = (groups, queries + 2, dim, width)
    parts = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}
    rules = [
        rule(name, ((high - low) * groups * dim, width), [take("qkv", shape, view, {1: (low, high)})])
        for name, (low, high) in parts.items()
    ]

    def expected(arrays):
        cube = arrays["qkv"].reshape(view)
        return [cube[:, low:high].reshape(-1, width) for low, high in parts.values()]

    return rules, expected


def interleaved_transposed_experts():
    """GPT-OSS: experts [E, H, 2I] with gate and up in turns along the last axis."""
    experts, width, inner = 3, 4, 5
    shape = (experts, width, 2 * inner)
    view = (experts, width, inner, 2)
    rules = [
        rule(name, (experts, inner, width), [take("gate_up", shape, view, {3: (at, at + 1)}, (0, 2, 1, 3))])
        for at, name in enumerate(("gate", "up"))
    ]

    def expected(arrays):
        cube = arrays["gate_up"].reshape(view)
        return [cube[..., at].transpose(0, 2, 1) for at in (0, 1)]

    return rules, expected


def stacked_experts():
    """Mixtral: one tensor an expert, stacked."""
    shape = (5, 4)
    rules = [rule("up", (3, 5, 4), [take(f"experts.{e}", (5, 4), (1, 5, 4)) for e in range(3)])]
    assert shape == rules[0].shape[1:]
    return rules, lambda arrays: [np.stack([arrays[f"experts.{e}"] for e in range(3)])]


def fused_rows():
    """Phi-3: q, k and v one under the other."""
    rules = [
        rule("q", (8, 3), [take("qkv", (16, 3), cut={0: (0, 8)})]),
        rule("k", (4, 3), [take("qkv", (16, 3), cut={0: (8, 12)})]),
        rule("v", (4, 3), [take("qkv", (16, 3), cut={0: (12, 16)})]),
    ]
    return rules, lambda arrays: [arrays["qkv"][:8], arrays["qkv"][8:12], arrays["qkv"][12:]]


def transposed():
    """GPT-2 style linears, stored [in, out]."""
    rules = [rule("up", (6, 4), [take("c_fc", (4, 6), order=(1, 0))]), whole("bias", "c_fc.bias", (6,))]
    return rules, lambda arrays: [arrays["c_fc"].T, arrays["c_fc.bias"]]


def pairs():
    heads, dim, width = 3, 6, 2
    rules = [
        pair_to_half("q", "q.weight", (heads * dim, width), heads),
        pair_to_half("qb", "q.bias", (heads * dim,), heads),
        pair_to_half("k", "k.weight", (heads * dim, width), heads, dims=4),
    ]
    order = [0, 2, 4, 1, 3, 5]
    partial = [0, 2, 1, 3, 4, 5]

    def expected(arrays):
        by_head = {name: array.reshape(heads, dim, *array.shape[1:]) for name, array in arrays.items()}
        return [
            by_head["q.weight"][:, order].reshape(-1, width),
            by_head["q.bias"][:, order].reshape(-1),
            by_head["k.weight"][:, partial].reshape(-1, width),
        ]

    return rules, expected


def proportional():
    """Heads of 8 that rotate 0 with 4 only: those two come first."""
    rules = [rotated_first("q", "q.weight", (16, 3), heads=2, dims=2)]
    order = [0, 4, 1, 2, 3, 5, 6, 7]
    return rules, lambda arrays: [arrays["q.weight"].reshape(2, 8, 3)[:, order].reshape(16, 3)]


CASES = [
    grouped_qkv, interleaved_transposed_experts, stacked_experts, fused_rows, transposed, pairs, proportional,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_families_need(case):
    rules, expected = case()
    tensors = Tensors(rules)
    for made, wanted in zip(rules, expected(tensors.arrays), strict=True):
        np.testing.assert_array_equal(read(made, tensors), wanted)
    assert_invertible(rules)


@pytest.mark.parametrize("case", CASES)
def test_every_small_box_equals_the_same_box_of_the_whole(case):
    rules, _ = case()
    tensors = Tensors(rules)
    for made in rules:
        logical = read(made, tensors)
        for low in range(made.shape[0]):
            for high in range(low + 1, made.shape[0] + 1):
                inner = tuple((size // 3, max(1, size - size // 3 - size // 4)) for size in made.shape[1:])
                start = (low, *(first for first, _ in inner))
                extent = (high - low, *(count for _, count in inner))
                box = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
                np.testing.assert_array_equal(read(made, tensors, start, extent), logical[box])


@st.composite
def views(draw):
    """A source cut along one axis of some view, each part in some axis order: a partition, so invertible."""
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    keep = draw(st.integers(0, len(view)))
    shape = (int(np.prod(view[:keep], initial=1)), *view[keep:])
    axis = draw(st.integers(0, len(view) - 1))
    cuts = sorted({0, view[axis], *draw(st.lists(st.integers(0, view[axis]), max_size=2))})
    rules = []
    for index, part in enumerate(itertools.pairwise(cuts)):
        order = tuple(draw(st.permutations(range(len(view)))))
        sizes = [part[1] - part[0] if a == axis else view[a] for a in order]
        split = draw(st.integers(1, len(view)))
        logical = (int(np.prod(sizes[:split])), *([int(np.prod(sizes[split:]))] if split < len(view) else []))
        rules.append(rule(f"t{index}", logical, [take("s", shape, view, {axis: part}, order)]))
    return rules


@given(views(), st.data())
@settings(max_examples=300, deadline=None)
def test_any_partition_is_undone_and_any_slab_is_the_slab_of_the_whole(rules, data):
    assert_invertible(rules)
    tensors = Tensors(rules)
    for made in rules:
        logical = read(made, tensors)
        low = data.draw(st.integers(0, made.shape[0] - 1))
        high = data.draw(st.integers(low + 1, made.shape[0]))
        columns = tuple(sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in made.shape[1:])
        if any(a == b for a, b in columns):
            continue
        start, extent = (low, *(a for a, _ in columns)), (high - low, *(b - a for a, b in columns))
        box = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
        np.testing.assert_array_equal(read(made, tensors, start, extent), logical[box])


def test_only_the_source_rows_of_a_slab_are_read():
    made = whole("embed", "embed", (1000, 4))
    tensors = Tensors([made])
    read(made, tensors, (100, 0), (10, 4))
    assert tensors.asked == [("embed", 100, 110)]

    stacked = rule("up", (3, 5, 4), [take(f"experts.{e}", (5, 4), (1, 5, 4)) for e in range(3)])
    tensors = Tensors([stacked])
    read(stacked, tensors, (1, 0, 0), (1, 5, 4))
    assert tensors.asked == [("experts.1", 0, 5)]

    heads = pair_to_half("q", "q", (40, 3), heads=10)
    tensors = Tensors([heads])
    read(heads, tensors, (8, 0), (4, 3))
    assert min(low for _, low, _ in tensors.asked) >= 8 and max(high for *_, high in tensors.asked) <= 12


def test_which_rules_move_nothing():
    assert is_whole(whole("a", "b", (4, 4)))
    assert not is_whole(pair_to_half("a", "b", (4, 4), heads=1))
    assert not is_whole(rule("a", (4, 4), [take("b", (8, 4), cut={0: (0, 4)})]))
    assert not is_whole(rule("a", (4, 4), [take("b", (4, 4), order=(1, 0))]))
    assert not is_whole(rule("a", (4, 4), [take("b", (2, 4)), take("c", (2, 4))]))


def test_reading_into_a_strided_part_of_a_slab():
    """Column-parallel pieces land beside one another in one slab."""
    made = whole("down", "down", (6, 8))
    tensors = Tensors([made])
    slab = np.zeros((6, 12), np.uint32)
    read_box(made, tensors.rows, (0, 4), slab[:, 3:7])
    np.testing.assert_array_equal(slab[:, 3:7], tensors.arrays["down"][:, 4:8])
    assert not slab[:, :3].any() and not slab[:, 7:].any()


def test_bits_of_any_two_byte_dtype_pass():
    made = pair_to_half("q", "q", (8, 3), heads=2)
    tensors = Tensors([made], np.float16)
    out = np.zeros((8, 3), np.uint16)
    read_box(made, tensors.rows, (0, 0), out)
    assert set(out.ravel()) == set(tensors.arrays["q"].view(np.uint16).ravel())


def test_the_digest_names_the_rules():
    one, two = whole("a", "b", (4, 4)), whole("a", "b", (4, 5))
    assert digest([one]) == digest([whole("a", "b", (4, 4))])
    assert len({digest([one]), digest([two]), digest([one, two]), digest([two, one]), digest([])}) == 5
    assert digest([one]) == "e99bc5627167c47e96228937c7097ab45f0938617616a1cd3327a587f778b00d"


def test_rules_that_do_not_add_up_are_our_own_mistakes():
    with pytest.raises(AssertionError, match="takes give 4 rows of 5"):
        rule("a", (5, 3), [take("b", (4, 3))])
    with pytest.raises(AssertionError, match="is no view"):
        take("b", (4, 3), (5, 3))
    with pytest.raises(AssertionError, match="do not fold"):
        rule("a", (4, 3), [take("b", (6, 2), order=(1, 0))])
