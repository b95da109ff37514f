"""What is particular to the native backend: how it loads, what it refuses, its threads, and its bits.

Whether its numbers are right is test_ops' question, for the best instruction set; here the others are held against it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import NamedTuple

import pytest

from fgsnap.built import built_library
from fgsnap.errors import HostError, UsageError
from fgsnap.kernels import library, native, tape
from fgsnap.kernels.native import Native
from fgsnap.kernels.ops import ActivationArgs, AttentionArgs, Batch, HeadArgs, NormArgs, Sampling

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY, LAYERS = 83, 6, 2, 20, 45, 131, 2
ATTENTION = AttentionArgs(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)


@pytest.fixture
def ops():
    return Native("float32", 2)


def test_the_library_was_built():
    assert native.available()[0], native.available()[1]
    assert native.instruction_sets()[-1] == "base"


# --- a small decoder --------------------------------------------------------------------------------------------------


def packed(values, dtype):
    """Values as bytes; bfloat16 by cutting, which is exact for the values that ``draw`` gives."""
    if dtype == "bfloat16":
        singles = array("I", array("f", values).tobytes())
        return memoryview(array("H", [bits >> 16 for bits in singles])).cast("B")
    return memoryview(array("f", values)).cast("B")


def draw(count, seed, scale=1.0):
    """Numbers with seven bits of fraction."""
    chosen = random.Random(seed)
    return [chosen.randint(-127, 127) / 128 * scale for _ in range(count)]


class Model(NamedTuple):
    embed: object
    layers: list[dict[str, object]]
    rope: object


def model(ops, dtype):
    def weight(*shape, seed):
        return ops.weight(packed(draw(math.prod(shape), seed, 0.25), dtype), dtype, shape)

    layers = [
        {
            "norm": NormArgs("rms", 1e-5, weight(WIDTH, seed=1 + at), None),
            "qkv": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH, seed=2 + at),
            "bias": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=3 + at),
            "out": weight(WIDTH, HEADS * HEAD_DIM, seed=4 + at),
            "up": weight(2 * INNER, WIDTH, seed=5 + at),
            "down": weight(WIDTH, INNER, seed=6 + at),
        }
        for at in range(0, 10 * LAYERS, 10)
    ]
    return Model(weight(VOCABULARY, WIDTH, seed=0), layers, ops.rope([10000 ** (-i / 8) for i in range(8)], 1.0))


def forward(ops, built, caches, batch, block_size, window=None):
    """The logits of the batch's rows, each as bytes."""
    return rows_in(ops, ops_of(ops, built, caches, ops.plan(batch, block_size), window))


def rows_in(ops, logits):
    values, width = ops.floats(logits), logits.columns
    return [values[row * width : (row + 1) * width].tobytes() for row in range(logits.rows)]


def ops_of(ops, built, caches, plan, window=None):
    args = ATTENTION._replace(window=window)
    x = ops.embed(plan, built.embed, 2.0)
    for layer, cache in zip(built.layers, caches, strict=True):
        qkv = ops.linear(ops.norm(x, layer["norm"]), layer["qkv"], layer["bias"])
        q = ops.append(qkv, cache, plan, args, built.rope)
        x = ops.add(x, ops.linear(ops.attend(q, cache, plan, args), layer["out"]), 0.5)
        inner = ops.activate(ops.linear(ops.norm(x, layer["norm"]), layer["up"]), ActivationArgs("silu"))
        x = ops.add(x, ops.linear(inner, layer["down"]))
    return ops.logits(x, plan, HeadArgs(built.embed, None, VOCABULARY - 1))


def alone(tokens, start, table):
    count = len(tokens)
    places = range(start, start + count)
    return Batch(tokens, places, (0, count), (start + count,), (table,), range(count))


def caches_of(ops, blocks, block_size):
    return [ops.kv_cache(blocks, block_size, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]


def whole_prompt(ops, built, tokens, block_size=64, window=None):
    blocks = -(-len(tokens) // block_size)
    return forward(ops, built, caches_of(ops, blocks, block_size), alone(tokens, 0, range(blocks)), block_size, window)


PROMPT = [random.Random(7).randrange(VOCABULARY) for _ in range(53)]


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [None, 9])
def test_chunks_have_the_bits_of_the_whole(instructions, dtype, window):
    ops = Native(dtype, 2, instructions)
    built = model(ops, dtype)
    expected = whole_prompt(ops, built, PROMPT, window=window)
    for sizes in ([1] * 53, [2, 3, 5, 7, 11, 25], [52, 1], [6] * 8 + [5]):
        block_size, at, found = 16 * min(sizes[0], 3), 0, []  # a sum's order depends on how blocks are filled up to 16
        blocks = list(range(-(-len(PROMPT) // block_size)))[::-1]
        caches = caches_of(ops, len(blocks), block_size)
        for size in sizes:
            found += forward(ops, built, caches, alone(PROMPT[at : at + size], at, blocks), block_size, window)
            at += size
        assert found == expected


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_a_batch_has_the_bits_of_its_members_alone(instructions):
    ops = Native("bfloat16", 2, instructions)
    built = model(ops, "bfloat16")
    members = [PROMPT[:1], PROMPT[3:20], PROMPT[20:25], PROMPT[25:], PROMPT[5:6]]
    expected = [row for member in members for row in whole_prompt(ops, built, member)]
    starts = [0]
    for member in members:
        starts.append(starts[-1] + len(member))
    tables = [[4 * s + i for i in range(4)][:: (-1) ** s] for s in range(len(members))]
    tokens = [token for member in members for token in member]
    places = [place for member in members for place in range(len(member))]
    batch = Batch(tokens, places, starts, [len(member) for member in members], tables, range(len(tokens)))
    assert forward(ops, built, caches_of(ops, 20, 16), batch, 16) == expected


def in_panels(data, shape, item):
    """Row-major bytes in the layout words32: panels of 32 rows, in them word after word the rows side by side."""
    rows, words = shape[0], shape[1] * item // 4
    data = bytes(data) + bytes(-rows % 32 * words * 4)
    panels = range(0, len(data), 32 * words * 4)
    at = (panel + (row * words + word) * 4 for panel in panels for word in range(words) for row in range(32))
    return memoryview(b"".join(data[i : i + 4] for i in at))


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("weights, item", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("rows, into, out", [(1, 96, 64), (7, 30, 33), (23, 1100, 95), (64, 2050, 31)])
def test_packed_matrices_give_the_bits_of_row_major_ones(instructions, weights, item, rows, into, out):
    for dtype in ("float32", "bfloat16"):
        ops = Native(dtype, 2, instructions)
        data = packed(draw(into * out, 5), weights)
        by_row = ops.weight(data, weights, (out, into))
        by_panel = ops.weight(in_panels(data, (out, into), item), weights, (out, into), "words32")
        x = ops.norm(rows_of(ops, draw(rows * into, 6), rows), NormArgs("l2", 1e-5, None, None))
        found = [ops.floats(ops.linear(x, weight)).tobytes() for weight in (by_row, by_panel)]
        assert found[0] == found[1]


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("weights, item", [("float32", 4), ("bfloat16", 2)])
def test_many_rows_by_many_panels_have_the_bits_of_each_alone(instructions, weights, item):
    """Packed panels are worked off in groups, and rows that begin 4096 bytes apart are gathered first."""
    rows, into, inner = 23, 2048, 96
    for dtype in ("float32", "bfloat16"):
        ops = Native(dtype, 1, instructions)
        data = packed(draw(2 * inner * into, 5), weights)
        shape = (2 * inner, into)
        layouts = [
            ops.weight(data, weights, shape),
            ops.weight(in_panels(data, shape, item), weights, shape, "words32"),
        ]
        numbers = draw(rows * into, 6)

        def mlp(weight, first, count, ops=ops, numbers=numbers):
            x = rows_of(ops, numbers[first * into : (first + count) * into], count)
            x = ops.norm(x, NormArgs("l2", 1e-5, None, None))
            return ops.floats(ops.activate(ops.linear(x, weight), ActivationArgs("silu"))).tobytes()

        alone = b"".join(mlp(layouts[0], row, 1) for row in range(rows))
        for weight in layouts:
            assert mlp(weight, 0, rows) == alone


def batch_of(spans, wanted):
    """Sequence s, in blocks 3 s to 3 s + 2 of 16 tokens, computes tokens spans[s]."""
    tokens = [PROMPT[place] for span in spans for place in span]
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + len(span))
    tables = [[3 * s, 3 * s + 1, 3 * s + 2] for s in range(len(spans))]
    return Batch(tokens, [place for span in spans for place in span], starts, [s.stop for s in spans], tables, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tape_gives_the_bits_of_the_ops_it_was_made_from(dtype):
    ops = Native(dtype, 2)
    built = model(ops, dtype)
    batches = [
        batch_of([range(5)], [4]),
        batch_of([range(5, 6), range(40)], [0, 3, 40]),
        batch_of([range(6, 7), range(40, 41), range(48)], range(50)),
        batch_of([range(7, 8)], []),
        batch_of([range(8, 9)], [0]),
    ]
    caches = caches_of(ops, 9, 16)
    expected = [forward(ops, built, caches, batch, 16) for batch in batches]
    caches = caches_of(ops, 9, 16)
    compute = ops.taped(lambda plan: ops_of(ops, built, caches, plan), 16)
    found = [rows_in(ops, compute(batch)) for batch in batches]
    assert found == expected
    again = [rows_in(ops, compute(batch)) for batch in batches]
    assert again == expected, "what was in the arena before changes nothing"


def test_a_tape_records_once(ops):
    built, calls = model(ops, "float32"), []
    caches = caches_of(ops, 9, 16)

    def compute(plan):
        calls.append(plan)
        return ops_of(ops, built, caches, plan)

    run = ops.taped(compute, 16)
    kept = run(batch_of([range(3)], [0, 2]))
    before = ops.floats(kept).tolist()
    run(batch_of([range(3, 4), range(9)], [0]))
    assert len(calls) == 1
    assert ops.floats(kept).tolist() == before, "logits that are held stay as they are"


def test_a_tape_refuses_a_batch_that_does_not_fit_its_caches(ops):
    built = model(ops, "float32")
    caches = caches_of(ops, 3, 16)
    run = ops.taped(lambda plan: ops_of(ops, built, caches, plan), 16)
    run(batch_of([range(3)], [0]))
    with pytest.raises(ValueError, match="block 3 of a cache of 3 blocks"):
        run(batch_of([range(3), range(3)], [0]))
    assert len(rows_in(ops, run(batch_of([range(3)], [0])))) == 1


def test_merged_neighbours_compute_what_they_would_alone(ops):
    gate_up = ops.weight(packed(draw(2 * 64 * 83, 1), "float32"), "float32", (128, 83))
    down = ops.weight(packed(draw(83 * 64, 2), "float32"), "float32", (83, 64))

    def mlp(looked_at):
        x = rows_of(ops, draw(5 * 83, 3), 5)
        inner = ops.linear(ops.norm(x, NormArgs("rms", 1e-5, None, None)), gate_up)
        if looked_at:
            ops.floats(inner)
        branch = ops.linear(ops.activate(inner, ActivationArgs("silu")), down)
        if looked_at:
            ops.floats(branch)
        return ops.floats(ops.add(x, branch, 0.5)).tolist()

    assert mlp(looked_at=False) == pytest.approx(mlp(looked_at=True), rel=1e-5, abs=1e-6)


def test_every_number_of_threads_gives_the_same_bits():
    found = []
    for threads in (1, 2, 3, 7):
        ops = Native("float32", threads)
        found.append(whole_prompt(ops, model(ops, "float32"), PROMPT))
        ops.close()
    assert found[1:] == found[:-1]


def test_wider_registers_give_the_same_numbers():
    results = []
    for instructions in native.instruction_sets():
        ops = Native("float32", 1, instructions)
        results.append(
            [value for row in whole_prompt(ops, model(ops, "bfloat16"), PROMPT) for value in array("f", row)]
        )
    size = max(map(abs, results[0]))
    for other in results[1:]:
        assert max(abs(a - b) for a, b in zip(results[0], other, strict=True)) < 1e-5 * size


@pytest.mark.parametrize("instructions", native.instruction_sets())
@pytest.mark.parametrize("into", [1, 31, 32, 33, 96, 131])
def test_dot_products_of_every_width_and_batch(instructions, into):
    ops = Native("float32", 1, instructions)
    out = 11
    numbers = draw(out * into, 3)
    weight = ops.weight(packed(numbers, "bfloat16"), "bfloat16", (out, into))
    for rows in range(1, 14):
        inputs = draw(rows * into, rows)
        found = ops.floats(ops.linear(rows_of(ops, inputs, rows), weight)).tolist()
        for t in range(rows):
            for o in range(out):
                exact = math.fsum(inputs[t * into + i] * numbers[o * into + i] for i in range(into))
                assert abs(found[t * out + o] - exact) < 1e-5 * into


def rows_of(ops, values, rows):
    """Any numbers as activations."""
    table = ops.weight(packed(values, "float32"), "float32", (rows, len(values) // rows))
    return ops.embed(ops.plan(alone(range(rows), 0, (0,)), rows), table, 1.0)


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_silu_is_exact_over_the_whole_range(instructions):
    ops = Native("float32", 1, instructions)
    values = [math.copysign(2.0**power, sign) * 1.37 for power in range(-40, 7) for sign in (1, -1)]
    values += [0.0, -0.0, -87.0, -88.5, -103.0, 3e38]
    found = ops.floats(ops.activate(rows_of(ops, values, 1), ActivationArgs("silu", False))).tolist()
    for x, y in zip(values, found, strict=True):
        exact = x / (1 + math.exp(-x)) if x > -700 else 0.0
        assert abs(y - exact) <= 4e-7 * abs(exact) + 1e-36


# --- special numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(ops, bad):
    values = draw(5 * 40, 1)
    values[2 * 40 + 35] = bad
    weight = ops.weight(packed([1.0] * 80, "float32"), "float32", (2, 40))
    x = rows_of(ops, values, 5)
    normed = ops.norm(x, NormArgs("rms", 1e-5, None, None))
    for result in (ops.linear(x, weight), ops.activate(x, ActivationArgs("silu")), ops.add(normed, x)):
        rows = ops.floats(result).tolist()
        width = len(rows) // 5
        finite = [all(map(math.isfinite, rows[t * width : (t + 1) * width])) for t in range(5)]
        assert finite == [True, True, False, True, True]


def test_float16_weights_of_every_kind(ops):
    bits = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C01, 0xC000, 0x7BFF, 0x7C00, 0xFC00] + list(range(0, 65536, 997))
    bits = [b for b in bits if not math.isnan(half(b))]
    data = memoryview(array("H", bits)).cast("B")
    table = ops.weight(data, "float16", (1, len(bits)))
    one = ops.embed(ops.plan(alone([0], 0, (0,)), 1), table, 1.0)
    assert ops.floats(one).tolist() == [half(b) for b in bits]
    column = ops.weight(data, "float16", (len(bits), 1))
    assert ops.floats(ops.linear(rows_of(ops, [1.0], 1), column)).tolist() == [half(b) for b in bits]


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_float16_dot_products(instructions):
    ops = Native("float32", 1, instructions)
    bits = [random.Random(i).randrange(0x3000, 0x4800) | (i % 3 == 0) << 15 for i in range(70 * 5)]
    weight = ops.weight(memoryview(array("H", bits)).cast("B"), "float16", (5, 70))
    inputs = draw(3 * 70, 9)
    found = ops.floats(ops.linear(rows_of(ops, inputs, 3), weight)).tolist()
    for t in range(3):
        for o in range(5):
            exact = math.fsum(inputs[t * 70 + i] * half(bits[o * 70 + i]) for i in range(70))
            assert abs(found[t * 5 + o] - exact) < 1e-4


# --- the cache --------------------------------------------------------------------------------------------------------


def remembered(ops, values):
    """``values``, written to the cache as one token's v and read back: with one key its weight is one."""
    width = len(values)
    args = AttentionArgs(1, 1, width, 1.0)
    cache = ops.kv_cache(1, 1, 1, width)
    plan = ops.plan(alone([0], 0, (0,)), 1)
    q = ops.append(rows_of(ops, [0.0] * (2 * width) + values, 1), cache, plan, args, None)
    return ops.floats(ops.attend(q, cache, plan, args)).tolist()


VALUES = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, 3.14159274, 65519.0, 65520.0, 2.0**-24, 3 * 2.0**-26, -(2.0**-15)]


def nearest_bfloat16(x):
    [bits] = struct.unpack("<I", struct.pack("<f", x))
    return struct.unpack("<f", struct.pack("<I", bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000))[0]


def nearest_float16(x):
    return struct.unpack("<e", struct.pack("<e", x))[0] if abs(x) < 65520 else math.copysign(math.inf, x)


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [("float32", float), ("bfloat16", nearest_bfloat16), ("float16", nearest_float16)],
)
def test_the_cache_rounds_to_the_nearest_of_its_dtype(dtype, rounded):
    ops = Native(dtype, 1)
    singles = array("f", VALUES).tolist()
    assert remembered(ops, singles) == [rounded(value) for value in singles]


def test_the_cache_takes_the_memory_that_its_dtype_says():
    sizes = {dtype: len(Native(dtype, 1).kv_cache(3, 16, 2, 64).data) for dtype in native.DTYPES}
    assert sizes == {
        "bfloat16": 2 * 3 * 16 * 2 * 64 * 2,
        "float16": 2 * 3 * 16 * 2 * 64 * 2,
        "float32": 2 * 3 * 16 * 2 * 64 * 4,
    }


def test_a_cache_too_large_for_this_host_is_refused(ops):
    with pytest.raises(HostError, match="bytes of KV cache"):
        ops.kv_cache(1 << 40, 16, 8, 128)


# --- what is refused before C++ ---------------------------------------------------------------------------------------


def setting(ops):
    """Some of everything: x [4, 40], a plan of its four tokens, a cache, weights."""
    x = rows_of(ops, draw(160, 1), 4)
    plan = ops.plan(alone(range(4), 0, (1, 0)), 2)
    cache = ops.kv_cache(2, 2, 1, 10)
    return x, plan, cache, lambda *shape: ops.weight(packed([0.0] * math.prod(shape), "float32"), "float32", shape)


ARGS = AttentionArgs(2, 1, 10, 1.0)

MISUSE = {
    "weight: 8 bytes": lambda ops, x, plan, cache, w: ops.weight(memoryview(bytes(8)), "float32", (3,)),
    "weight: dtype int8": lambda ops, x, plan, cache, w: ops.weight(memoryview(bytes(8)), "int8", (8,)),
    "scattered": lambda ops, x, plan, cache, w: ops.weight(memoryview(bytes(16))[::2], "float32", (2,)),
    "positions: position 3 of 3": lambda ops, x, plan, cache, w: ops.positions(plan, w(4, 40), 1),
    "positions: .*shape \\[40\\]": lambda ops, x, plan, cache, w: ops.positions(plan, w(40), 1),
    "embed: .*shape \\[40\\]": lambda ops, x, plan, cache, w: ops.embed(plan, w(40), 1.0),
    "norm: weight \\[39\\]": lambda ops, x, plan, cache, w: ops.norm(x, NormArgs("rms", 0.0, w(39), None)),
    "bias \\[41\\]": lambda ops, x, plan, cache, w: ops.norm(x, NormArgs("ln", 0.0, w(40), w(41))),
    "norm: kind l3": lambda ops, x, plan, cache, w: ops.norm(x, NormArgs("l3", 0.0, None, None)),
    "add: x \\[4, 40\\], branch \\[4, 7\\]": lambda ops, x, plan, cache, w: ops.add(x, ops.linear(x, w(7, 40))),
    "linear: x \\[4, 40\\], weight \\[7, 41\\]": lambda ops, x, plan, cache, w: ops.linear(x, w(7, 41)),
    "linear: x \\[4, 40\\], weight \\[40\\]": lambda ops, x, plan, cache, w: ops.linear(x, w(40)),
    "linear: bias \\[8\\]": lambda ops, x, plan, cache, w: ops.linear(x, w(7, 40), w(8)),
    "logits: 8 of 7 rows": lambda ops, x, plan, cache, w: ops.logits(x, plan, HeadArgs(w(7, 40), None, 8)),
    "logits: x \\[4, 40\\] for 1 tokens": lambda ops, x, plan, cache, w: ops.logits(
        x, ops.plan(alone([0], 0, (0,)), 2), HeadArgs(w(7, 40), None, 7)
    ),
    "activate: kind swish": lambda ops, x, plan, cache, w: ops.activate(x, ActivationArgs("swish")),
    "activate: kind clamped": lambda ops, x, plan, cache, w: ops.activate(x, ActivationArgs("clamped_swiglu", False)),
    "activate: .*odd": lambda ops, x, plan, cache, w: ops.activate(ops.linear(x, w(7, 40)), ActivationArgs("silu")),
    "append: qkv \\[4, 40\\], expected \\[4, 50\\]": lambda ops, x, plan, cache, w: ops.append(
        x, cache, plan, ARGS._replace(heads=3), None
    ),
    "append: cache of 1 heads of 10": lambda ops, x, plan, cache, w: ops.append(
        x, cache, plan, AttentionArgs(4, 2, 5, 1.0), None
    ),
    "append: 12 rotated": lambda ops, x, plan, cache, w: ops.append(x, cache, plan, ARGS, ops.rope([1.0] * 6, 1.0)),
    "append: block 1 of a cache of 1 blocks": lambda ops, x, plan, cache, w: ops.append(
        x, ops.kv_cache(1, 2, 1, 10), plan, ARGS, None
    ),
    "append: blocks of 2 tokens, cache of 2 of 3": lambda ops, x, plan, cache, w: ops.append(
        x, ops.kv_cache(2, 3, 1, 10), plan, ARGS, None
    ),
    "attend: q \\[4, 40\\], expected \\[4, 20\\]": lambda ops, x, plan, cache, w: ops.attend(x, cache, plan, ARGS),
    "attend: window 0": lambda ops, x, plan, cache, w: ops.attend(
        ops.append(x, cache, plan, ARGS, None), cache, plan, ARGS._replace(window=0)
    ),
    "kv_cache: sizes": lambda ops, x, plan, cache, w: ops.kv_cache(0, 2, 1, 10),
    "plan: 0 tokens": lambda ops, x, plan, cache, w: ops.plan(Batch([], [], [0], [], [], []), 2),
    "plan: 1 tokens .* 2 positions": lambda ops, x, plan, cache, w: ops.plan(
        Batch([1], [0, 1], [0, 1], [1], [[0]], []), 2
    ),
    "plan: 2 tokens .* starts \\[0, 1\\]": lambda ops, x, plan, cache, w: ops.plan(
        Batch([1, 1], [0, 1], [0, 1], [2], [[0]], []), 2
    ),
    "sequence 0: 1 tokens at \\[2\\] of 3 keys in blocks \\[0\\] of 2": lambda ops, x, plan, cache, w: ops.plan(
        Batch([1], [2], [0, 1], [3], [[0]], []), 2
    ),
    "sequence 0: 1 tokens at \\[1\\] of 1 keys": lambda ops, x, plan, cache, w: ops.plan(
        Batch([1], [1], [0, 1], [1], [[0]], []), 2
    ),
    "plan: 1 tokens .* rows \\[1\\]": lambda ops, x, plan, cache, w: ops.plan(
        Batch([1], [0], [0, 1], [1], [[0]], [1]), 2
    ),
    "sample: 3 ways": lambda ops, x, plan, cache, w: ops.sample(x, [Sampling()] * 3, [0] * 3),
    "negative temperature": lambda ops, x, plan, cache, w: ops.sample(x, [Sampling(temperature=-1.0)] * 4, [0] * 4),
}


@pytest.mark.parametrize("message", MISUSE)
def test_wrong_sizes_are_refused_by_name(ops, message):
    with pytest.raises(ValueError, match=message):
        MISUSE[message](ops, *setting(ops))


def test_negative_indices_are_refused(ops):
    with pytest.raises(ValueError, match="plan"):
        ops.plan(Batch([-1], [0], [0, 1], [1], [[0]], []), 2)
    with pytest.raises(ValueError, match="sequence 0"):
        ops.plan(Batch([1], [0], [0, 1], [1], [[-1]], []), 2)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_are_read_where_they_are_mapped(ops, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4096) + packed([1.5, -2.0, 0.25], "float32").tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    weight = ops.weight(memoryview(mapped)[4096:], "float32", (3, 1))
    assert weight.at % mmap.PAGESIZE == 0
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(struct.pack("<f", 8.0))
    assert ops.floats(ops.linear(rows_of(ops, [1.0], 1), weight)).tolist() == [8.0, -2.0, 0.25]
    with pytest.raises(BufferError):
        mapped.close()
    del weight
    gc.collect()
    mapped.close()


def test_values_seen_from_outside_outlive_their_tensor(ops):
    expected = draw(1000, 3)
    seen = ops.floats(rows_of(ops, expected, 10))
    for seed in range(20):
        ops.floats(rows_of(ops, draw(1000, seed + 50), 10))
    assert seen.tolist() == expected


def test_memory_that_was_let_go_is_used_again_without_mixing_values(ops):
    one = ops.weight(packed([1.0 if i % 41 == 0 else 0.0 for i in range(1600)], "float32"), "float32", (40, 40))
    first = rows_of(ops, draw(160, 1), 4)
    kept, x = ops.linear(first, one), first
    for _ in range(100):
        x = ops.linear(x, one)
    assert ops.floats(x).tolist() == ops.floats(kept).tolist() == draw(160, 1)
    assert len(ops._pool.free[tape.size_class(640)]) <= 3


def test_what_a_record_means_lives_until_it_ran(ops):
    x = rows_of(ops, draw(40, 1), 1)
    for _ in range(50):
        weight = ops.weight(packed([0.5] * 1600, "float32"), "float32", (40, 40))
        y = ops.linear(x, weight)
        del weight
    gc.collect()
    assert ops.floats(y).tolist() == pytest.approx([math.fsum(draw(40, 1)) / 2] * 40, abs=1e-5)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_sleep_when_there_is_nothing_to_do(ops):
    whole_prompt(ops, model(ops, "float32"), PROMPT)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1


def running_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def test_closing_ends_the_threads():
    gc.collect()
    before = running_threads()
    ops = Native("float32", 5)
    assert running_threads() == before + 4
    ops.close()
    deadline = time.monotonic() + 5
    while running_threads() > before and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that has been joined may still be listed for a moment
    assert running_threads() == before


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


UNREADABLE = """
import mmap, os, sys
from fgsnap.kernels.library import end_on_bus_error
end_on_bus_error("last words", 3)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(file, 8192)
data = mmap.mmap(file, 8192)
os.truncate(file, 0)
data[5000]
"""


def test_a_page_that_cannot_be_read_ends_the_process_with_the_words_that_were_left(tmp_path):
    command = [sys.executable, "-c", UNREADABLE, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "last words")


THREADS = "from fgsnap.kernels.library import default_threads as d; print(d())"


def test_default_threads_follow_the_affinity_mask_and_the_environment():
    assert run_python("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + THREADS) == ["1"]
    assert run_python(THREADS, OMP_NUM_THREADS="1") == run_python(THREADS, OMP_NUM_THREADS=" 1 ,4") == ["1"]
    assert run_python(THREADS, OMP_NUM_THREADS="") == run_python(THREADS, OMP_NUM_THREADS="100000")


@pytest.mark.parametrize("setting", ["0", "-1", "no number", ",2", "1.5", " ", "\N{SUPERSCRIPT TWO}"])
def test_an_omp_num_threads_that_is_no_number_of_threads_is_refused_by_name(monkeypatch, setting):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    with pytest.raises(UsageError, match="OMP_NUM_THREADS"):
        library.default_threads()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "rubbish\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_control_group(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert library._quota(tmp_path) == expected


# --- the library ------------------------------------------------------------------------------------------------------


def test_neither_torch_nor_numpy_is_imported():
    code = """if True:
        import sys
        from fgsnap.kernels.native import Native
        from fgsnap.kernels.ops import Batch, HeadArgs, Sampling
        ops = Native("bfloat16", 1)
        table = ops.weight(memoryview(bytes(2 * 6)), "bfloat16", (3, 2))
        plan = ops.plan(Batch([1], [0], [0, 1], [1], [[0]], [0]), 16)
        logits = ops.logits(ops.embed(plan, table, 1.0), plan, HeadArgs(table, None, 3))
        print(ops.sample(logits, [Sampling()], [0]).tokens[0], *({"torch", "numpy"} & set(sys.modules)))
        """
    assert run_python(code) == ["0"]


@pytest.fixture
def reloaded(monkeypatch):
    """The library is looked for anew in the test, and again afterwards."""
    library.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.load.cache_clear()


def test_without_the_library_the_reason_is_told(reloaded):
    reloaded.setattr(library, "built_library", lambda *names: None)
    present, reason = native.available()
    assert not present
    assert "no C++ compiler" in reason
    assert native.instruction_sets() == []
    with pytest.raises(HostError) as raised:
        Native()
    assert raised.value.lines()[1] == reason
    assert "--backend reference" in raised.value.next_step


def test_a_library_that_does_not_load_is_no_library(reloaded, tmp_path):
    (tmp_path / "_native.so").write_bytes(b"no library")
    reloaded.setattr(library, "built_library", lambda *names: tmp_path / "_native.so")
    present, reason = native.available()
    assert not present
    assert "_native.so does not load" in reason


def test_a_library_of_another_version_is_no_library(reloaded):
    reloaded.setattr(library, "ABI", library.ABI + 1)
    present, reason = native.available()
    assert not present
    assert "install fgsnap again" in reason


def test_the_library_is_found_in_the_other_folder_of_an_editable_install(monkeypatch, tmp_path):
    (tmp_path / "_native.so").write_bytes(b"")
    monkeypatch.setattr(sys.modules["fgsnap.kernels"], "__path__", [str(tmp_path / "elsewhere"), str(tmp_path)])
    monkeypatch.delenv("FGSNAP_NATIVE_LIBRARY", raising=False)

    def found():
        return built_library("_native.so", "fgsnap.kernels", "FGSNAP_NATIVE_LIBRARY")

    assert found() == tmp_path / "_native.so"
    monkeypatch.setenv("FGSNAP_NATIVE_LIBRARY", "another.so")
    assert found() == Path("another.so")


def test_an_unknown_dtype_or_instruction_set_is_refused():
    with pytest.raises(ValueError, match="KV cache of int8"):
        Native("int8")
    with pytest.raises(HostError, match="cannot start"):
        Native("float32", 1, "sse9")


def test_records_that_make_no_sense_are_refused(ops):
    step = array("q", [0] * 10)
    for words in ([99, 0, 0], [3, 0]):
        records = array("q", words)
        at, step_at = (ctypes.c_void_p(numbers.buffer_info()[0]) for numbers in (records, step))
        assert ops._library.fgsnap_run(ops._handle, at, len(words), step_at) == 2
