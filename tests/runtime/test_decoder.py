"""The decoder over every backend against a dense float64 decoder written out here, and the binding of weights."""

from __future__ import annotations

import math
import os
import random

import msgspec
import numpy as np
import pytest
import torch

from fgsnap.errors import HostError, SnapshotRefused, UsageError
from fgsnap.kernels import native
from fgsnap.kernels.choose import choose
from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.kernels.reference import Reference
from fgsnap.runtime import memory
from fgsnap.runtime import weights as weights_module
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.runtime.weights import load, load_by_layer
from fgsnap.snapshot import open_snapshot
from fgsnap.spec import Attention, Embedding, Head, Norm, QueryTemperature, features, rope_frequencies
from tests.snapshots import make_snapshot, random_weights, tiny_spec

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]


def changed_layers(spec, **changes):
    return msgspec.structs.replace(
        spec, layer_kinds=tuple(msgspec.structs.replace(kind, **changes) for kind in spec.layer_kinds)
    )


def with_attention(spec, **changes):
    attention = msgspec.structs.replace(spec.layer_kinds[0].attention, **changes)
    return changed_layers(spec, attention=attention)


def with_mlp(spec, **changes):
    return changed_layers(spec, mlp=msgspec.structs.replace(spec.layer_kinds[0].mlp, **changes))


RMS, LN = Norm("rms", 1e-5), Norm("ln", 1e-5, bias=True)
SPECS = {
    "llama": tiny_spec(),
    "tied, one kv head": tiny_spec(tied=True, kv_heads=1),
    "biases": tiny_spec(qkv_bias=True, mlp_bias=True),
    "window": tiny_spec(window=5),
    "window and chunk": with_attention(tiny_spec(window=5), chunk=7),
    "softcap": with_attention(tiny_spec(), softcap=0.4),
    "query temperature, step": with_attention(
        tiny_spec(), rope=None, query_temperature=QueryTemperature("step", base=3, scale=0.5)
    ),
    "query temperature, logn": with_attention(tiny_spec(), query_temperature=QueryTemperature("logn", base=5)),
    "wide heads": tiny_spec(head_dim=24),
    "partial rotation": msgspec.structs.replace(
        tiny_spec(), ropes=(msgspec.structs.replace(tiny_spec().ropes[0], dims=4),)
    ),
    "no rotation": with_attention(tiny_spec(), rope=None),
    "plain mlp": with_mlp(tiny_spec(mlp_bias=True), gated=False, activation="gelu_tanh"),
    "clamped mlp": with_mlp(tiny_spec(mlp_bias=True), activation="clamped_swiglu", clamp=0.5),
    "parallel, shared norm": changed_layers(tiny_spec(), residual="parallel", attn_in=LN, mlp_in=None),
    "parallel, two norms": changed_layers(tiny_spec(), residual="parallel", mlp_in=LN),
    "post": changed_layers(tiny_spec(), residual="post", attn_in=None, mlp_in=None, attn_out=RMS, mlp_out=LN),
    "four norms": changed_layers(
        tiny_spec(), attn_out=Norm("rms", 1e-6, unit_offset=True, float32_weight=True), mlp_out=RMS
    ),
    "multipliers": msgspec.structs.replace(
        changed_layers(tiny_spec(), residual_multiplier=0.3),
        embedding=Embedding(width=32, scale=5.7),
        head=Head(bias=True, multiplier=0.7, softcap=2.0),
    ),
    "two kinds of layer": msgspec.structs.replace(
        tiny_spec(),
        layer_kinds=(tiny_spec().layer_kinds[0], tiny_spec(window=3, kv_heads=4, inner=20).layer_kinds[0]),
        layers=(0, 1, 0),
    ),
}


class Dense:
    """One sequence through a spec in float64, each formula as spec.py states it."""

    def __init__(self, spec, arrays):
        self.spec = spec
        self.w = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def logits(self, tokens):
        spec, w = self.spec, self.w
        x = w["embed.weight"][list(tokens)] * spec.embedding.scale
        for index in range(spec.depth):
            x = self.layer(x, spec.layer(index), f"layers.{index}.")
        x = self.norm(x, spec.final_norm, "final_norm")
        raw = x @ w["embed.weight" if spec.head.tied else "head.weight"].T
        raw = spec.head.multiplier * (raw + (w["head.bias"] if spec.head.bias else 0.0))
        return raw if spec.head.softcap is None else spec.head.softcap * torch.tanh(raw / spec.head.softcap)

    def layer(self, x, layer, at):
        m = layer.residual_multiplier
        if layer.residual == "post":
            x = self.norm(x + self.attention(x, layer.attention, at), layer.attn_out, at + "attn_out")
            return self.norm(x + self.mlp(x, layer.mlp, at), layer.mlp_out, at + "mlp_out")
        normed = self.norm(x, layer.attn_in, at + "attn_in")
        attended = self.norm(self.attention(normed, layer.attention, at), layer.attn_out, at + "attn_out")
        if layer.residual == "parallel":
            into = normed if layer.mlp_in is None else self.norm(x, layer.mlp_in, at + "mlp_in")
            return x + attended + self.mlp(into, layer.mlp, at)
        x = x + m * attended
        passed = self.mlp(self.norm(x, layer.mlp_in, at + "mlp_in"), layer.mlp, at)
        return x + m * self.norm(passed, layer.mlp_out, at + "mlp_out")

    def norm(self, x, norm, name):
        if norm is None:
            return x
        if norm.kind == "ln":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        x = x * (self.w[name + ".weight"] + (1.0 if norm.unit_offset else 0.0))
        return x + self.w[name + ".bias"] if norm.bias else x

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)

    def mlp(self, x, mlp, at):
        functions = {
            "silu": torch.nn.functional.silu,
            "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        }
        up = self.linear(x, at + "up")
        if mlp.activation == "clamped_swiglu":
            gate, up = self.linear(x, at + "gate").clamp(max=mlp.clamp), up.clamp(-mlp.clamp, mlp.clamp)
            return self.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), at + "down")
        act = functions[mlp.activation]
        return self.linear(act(self.linear(x, at + "gate")) * up if mlp.gated else act(up), at + "down")

    def attention(self, x, attention: Attention, at):
        def heads(name):
            return self.linear(x, at + name).view(len(x), -1, attention.head_dim).transpose(0, 1)

        q, k, v = self.rotate(heads("q"), attention), self.rotate(heads("k"), attention), heads("v")
        q = q * self.temperature(attention.query_temperature, len(x))[:, None]
        repeat = attention.heads // attention.kv_heads
        scores = q @ k.repeat_interleave(repeat, 0).transpose(1, 2) * attention.scale
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        at_key, chunk = torch.arange(len(x)), attention.chunk or len(x)
        age = at_key[:, None] - at_key
        hidden = (age < 0) | (age >= (attention.window or len(x)))
        hidden |= at_key[:, None] // chunk != at_key // chunk
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(repeat, 0)
        return self.linear(mixed.transpose(0, 1).flatten(1), at + "out")

    def temperature(self, how, length):
        count = torch.arange(1, length + 1).double()
        if how is None:
            return torch.ones_like(count)
        if how.kind == "logn":
            return torch.where(count > how.base, count.log() / math.log(how.base), 1.0)
        return 1 + how.scale * torch.log(1 + torch.floor(count / how.base))

    def rotate(self, x, attention):
        if attention.rope is None:
            return x
        frequencies, factor = rope_frequencies(self.spec.ropes[attention.rope], self.spec.max_length)
        half = len(frequencies)
        angles = torch.arange(x.shape[1])[:, None].double() * torch.tensor(frequencies).double()
        cos, sin = angles.cos() * factor, angles.sin() * factor
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def step(decoder, pieces):
    """One forward over (sequence tokens, done, now, table) pieces; logits of all rows as float64 [T, V]."""
    starts, tokens, positions, lengths, tables = [0], [], [], [], []
    for sequence, done, now, table in pieces:
        tokens += sequence[done : done + now]
        positions += range(done, done + now)
        starts.append(len(tokens))
        lengths.append(done + now)
        tables.append(table)
    logits = decoder.forward(Batch(tokens, positions, starts, lengths, tables, range(len(tokens))))
    return torch.tensor(decoder.ops.floats(logits).tolist()).double().view(len(tokens), -1)


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def sequences():
    draw = random.Random(5)
    return [[draw.randrange(61) for _ in range(length)] for length in (23, 6, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_decoder_computes_its_spec(tmp_path, name, backend, sequences):
    spec = SPECS[name]
    if backend == "native" and not features(spec) <= native.Native.supports:
        with pytest.raises(Exception, match="native"):
            choose("native", "cpu", features(spec), "float32")
        return
    arrays = random_weights(spec)
    make_snapshot(tmp_path / "snap", spec, weights=arrays)
    snapshot = open_snapshot(tmp_path / "snap")
    decoder = load_decoder(snapshot, backend=backend, device="cpu", dtype="float32", blocks=20, block_size=4, threads=1)
    found = step(decoder, [(s, 0, len(s), table) for s, table in zip(sequences, TABLES, strict=True)])
    expected = torch.cat([Dense(spec, arrays).logits(s) for s in sequences])
    assert relative(found, expected) < 2e-5


TABLES = [(7, 2, 19, 0, 11, 4), (9, 1), (3,)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 5])
def test_chunked_and_mixed_steps_equal_one_prefill(tmp_path, backend, dtype, window, sequences):
    long, short, _ = sequences
    make_snapshot(tmp_path / "snap", tiny_spec(window=window), dtype=dtype)
    decoder = load_decoder(
        open_snapshot(tmp_path / "snap"), backend=backend, device="cpu", dtype=dtype, blocks=20, block_size=5, threads=1
    )
    whole = step(decoder, [(long, 0, 23, (7, 2, 19, 0, 11)), (short, 0, 6, (9, 1))])
    first = step(decoder, [(long, 0, 8, (8, 3, 5, 10, 6))])
    both = step(decoder, [(short, 0, 5, (14, 13)), (long, 8, 14, (8, 3, 5, 10, 6))])
    last = step(decoder, [(long, 22, 1, (8, 3, 5, 10, 6)), (short, 5, 1, (14, 13))])
    pieces = torch.cat([first, both[5:], last[:1], both[:5], last[1:]])
    assert relative(pieces, whole) < (2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_without_wanted_rows(tmp_path, backend, sequences):
    make_snapshot(tmp_path / "snap", tiny_spec())
    decoder = load_decoder(open_snapshot(tmp_path / "snap"), backend=backend, device="cpu", blocks=4, threads=1)
    tokens = sequences[0][:7]
    logits = decoder.forward(Batch(tokens, range(7), (0, 7), (7,), ((3,),), ()))
    assert decoder.sample(logits, [], []).tokens == []
    after = step(decoder, [([*tokens, 5], 7, 1, (3,))])
    fresh = step(decoder, [([*tokens, 5], 0, 8, (2,))])
    assert relative(after, fresh[-1:]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_is_the_same_whatever_else_is_in_the_batch(tmp_path, backend, sequences):
    make_snapshot(tmp_path / "snap", tiny_spec())
    decoder = load_decoder(
        open_snapshot(tmp_path / "snap"), backend=backend, device="cpu", dtype="float32", blocks=20, threads=1
    )
    how = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=6)
    pieces = [(s, 0, len(s), table) for s, table in zip(sequences, ((0, 1), (2,), (3,)), strict=True)]
    together = step_tokens(decoder, pieces, how)
    alone = [step_tokens(decoder, [piece], how)[0] for piece in pieces]
    assert together == alone


def step_tokens(decoder, pieces, how):
    tokens = [t for s, _, _, _ in pieces for t in s]
    positions = [p for s, _, _, _ in pieces for p in range(len(s))]
    starts = [sum(len(piece[0]) for piece in pieces[:i]) for i in range(len(pieces) + 1)]
    batch = Batch(
        tokens, positions, starts, [len(p[0]) for p in pieces], [p[3] for p in pieces], [s - 1 for s in starts[1:]]
    )
    return decoder.sample(decoder.forward(batch), [how] * len(pieces), [len(p[0]) for p in pieces]).tokens


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_scale_is_rounded_to_the_dtype_that_is_computed_in(tmp_path, stored):
    """Rounded to bfloat16, 5.66 is 5.65625; a model that asks for the rounding is off by 0.07 % without it."""
    found = {}
    for rounded in (False, True):
        spec = msgspec.structs.replace(tiny_spec(), embedding=Embedding(width=32, scale=5.66, round_scale=rounded))
        make_snapshot(tmp_path / str(rounded), spec, dtype=stored)
        for dtype in ("float32", "bfloat16"):
            opened = open_snapshot(tmp_path / str(rounded))
            decoder = load_decoder(opened, backend="reference", device="cpu", dtype=dtype, blocks=4)
            found[rounded, dtype] = decoder._scale
    exact = pytest.approx(5.66, rel=1e-7)
    assert found.pop((True, "bfloat16")) == 5.65625
    assert found == {(False, "float32"): exact, (False, "bfloat16"): exact, (True, "float32"): exact}


# weights


@pytest.mark.parametrize("loader", [load, load_by_layer])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_degree_gives_the_same_tensors(tmp_path, tp, loader):
    spec = tiny_spec(qkv_bias=True, mlp_bias=True, vocab_size=61)
    arrays = random_weights(spec)
    make_snapshot(tmp_path / "snap", spec, tp, weights=arrays)
    bound = loader(open_snapshot(tmp_path / "snap"), Reference("cpu", "float32"))
    assert np.array_equal(bound.embed.numpy(), arrays["embed.weight"])
    assert np.array_equal(bound.head.numpy(), arrays["head.weight"])
    assert len(bound.layers) == spec.depth
    for index, layer in enumerate(bound.layers):
        logical = {name.removeprefix(f"layers.{index}."): a for name, a in arrays.items()}
        qkv = np.concatenate([logical[f"{part}.weight"] for part in "qkv"])
        gate_up = np.concatenate([logical["gate.bias"], logical["up.bias"]])
        assert np.array_equal(layer.attention.qkv.numpy(), qkv)
        assert np.array_equal(layer.mlp.gate_up_bias.numpy(), gate_up)
        assert np.array_equal(layer.attention.out.numpy(), logical["out.weight"])
        assert np.array_equal(layer.mlp.down.numpy(), logical["down.weight"])
        assert np.array_equal(layer.attn_in.weight.numpy(), logical["attn_in.weight"])
        assert layer.attn_out is None


def test_layers_on_demand_are_a_sequence(tmp_path):
    make_snapshot(tmp_path / "snap", tiny_spec(layers=3), 2)
    layers = load_by_layer(open_snapshot(tmp_path / "snap"), Reference("cpu", "float32")).layers
    assert len(layers) == 3 and len(layers[1:]) == 2
    assert torch.equal(layers[-1].attention.qkv, layers[2].attention.qkv)
    with pytest.raises(IndexError):
        layers[3]


WRONG = {
    "missing": (lambda table: table.pop("layers.1.down.weight"), "layers.1.down.weight"),
    "superfluous": (lambda table: table.update(extra=table["embed.weight"]), "extra"),
    "shape": (lambda table: reshape(table, "layers.0.out.weight", (16, 64)), r"\[16, 64\]"),
    "dtype": (lambda table: retype(table, "final_norm.weight", "float64"), "float64"),
    "bytes": (lambda table: retype(table, "head.weight", "bfloat16"), "bytes"),
}


def reshape(table, name, shape):
    table[name] = table[name]._replace(shape=shape)


def retype(table, name, dtype):
    table[name] = table[name]._replace(dtype=dtype)


@pytest.mark.parametrize("change, said", WRONG.values(), ids=WRONG.keys())
def test_a_tensor_that_is_not_what_the_spec_needs_is_refused(tmp_path, monkeypatch, change, said):
    make_snapshot(tmp_path / "snap", tiny_spec())
    snapshot = open_snapshot(tmp_path / "snap")
    table = dict(weights_module.opened_at(snapshot, 1, 0))
    change(table)
    monkeypatch.setattr(weights_module, "opened_at", lambda *_: table)
    with pytest.raises(SnapshotRefused, match=said):
        load(snapshot, Reference("cpu", "float32"))


# sizes


@pytest.fixture
def small(tmp_path):
    make_snapshot(tmp_path / "snap", tiny_spec(max_length=128), dtype="bfloat16")
    return open_snapshot(tmp_path / "snap")


def test_kv_memory_buys_blocks(small):
    # A token has 2 layers x (K and V) x 2 heads x 8 numbers: 64 numbers, 128 bytes in bfloat16.
    decoder = load_decoder(small, backend="reference", device="cpu", kv_memory=128 * 16 * 10 + 100)
    assert (decoder.blocks, decoder.block_size, decoder.max_length, decoder.vocab_size) == (10, 16, 128, 61)
    halved = load_decoder(small, backend="reference", device="cpu", dtype="float32", kv_memory=128 * 16 * 10)
    assert (halved.blocks, halved.max_length) == (5, 80)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_takes_no_more_memory_than_given(small, backend, dtype):
    """Whatever a backend pads: here heads of 8 numbers."""
    given = 1 << 18
    decoder = load_decoder(small, backend=backend, device="cpu", dtype=dtype, kv_memory=given, threads=1)
    taken = sum(len(cache.data) if backend == "native" else cache.nbytes for cache in decoder._caches)
    assert given - taken / decoder.blocks < taken <= given


def test_without_kv_memory_the_cache_leaves_half_of_what_is_available(small, monkeypatch):
    def blocks():
        return load_decoder(small, backend="reference", device="cpu").blocks

    monkeypatch.setattr(memory, "available", lambda weights: 128 * 16 * 10)
    assert blocks() == 5
    for plenty in (64 << 30, None):
        monkeypatch.setattr(memory, "available", lambda weights, plenty=plenty: plenty)
        assert blocks() * 128 * 16 == 2 << 30


def test_more_kv_memory_than_the_host_has_is_refused(small, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda weights: (4 << 20) - weights)
    weights = (small.path / "rank-00000-of-00001.safetensors").stat().st_size
    with pytest.raises(HostError, match=r"4 MiB[^$]*\nBeside 0 MiB of weights, 3 MiB"):
        load_decoder(small, backend="reference", device="cpu", kv_memory=4 << 20)
    left = (4 << 20) - weights
    assert load_decoder(small, backend="reference", device="cpu", kv_memory=left).blocks == left // (128 * 16)


def test_a_forward_over_weights_that_were_written_to_is_refused(small):
    rank = small.path / "rank-00000-of-00001.safetensors"
    os.utime(rank, (0, 0))  # the clock of file systems may be some milliseconds coarse
    decoder = load_decoder(open_snapshot(small.path), backend="reference", device="cpu", kv_memory=1 << 18)
    one = Batch([1], [0], [0, 1], [1], [[0]], [0])
    decoder.forward(one)
    rank.write_bytes(rank.read_bytes())
    with pytest.raises(SnapshotRefused, match="changed while it was in use"):
        decoder.forward(one)


def test_weights_that_fill_all_memory_are_refused(small, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda weights: 0)
    with pytest.raises(HostError, match=r"no memory for a KV cache"):
        load_decoder(small, backend="reference", device="cpu")


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


HOST = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"}
UNIFIED = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": "5000\n",
    "sys/fs/cgroup/a/memory.current": "4000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1000\nfile 3000\ninactive_file 2000\nactive_file 900\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "4000\n",
}
SEPARATE = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/c\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "7000\n",
    "sys/fs/cgroup/memory/c/memory.usage_in_bytes": "6500\n",
    "sys/fs/cgroup/memory/c/memory.stat": "inactive_file 9\ntotal_inactive_file 500\ntotal_active_file 100\n",
}


LIMITS = "Limit                     Soft Limit           Hard Limit           Units     \n"
OWN = {
    "proc/self/status": "Name:\tx\nVmSize:\t    3000 kB\nVmData:\t    1000 kB\n",
    "proc/self/limits": LIMITS
    + "Max data size             unlimited            unlimited            bytes     \n"
    + "Max address space         4096000              unlimited            bytes     \n",
}
DATA = LIMITS + "Max data size             2048000              2048000              bytes     \n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        (HOST, 8000 * 1024),
        ({**HOST, **UNIFIED}, 5000 - (4000 - 2900)),
        ({**HOST, **SEPARATE}, 7000 - (6500 - 600)),
        ({**HOST, "proc/self/cgroup": "0::/gone\n"}, 8000 * 1024),
        ({**HOST, **UNIFIED, "sys/fs/cgroup/a/memory.current": "9000\n"}, 0),
        ({**HOST, **OWN}, 1000 * 1024),
        ({**OWN, "proc/self/limits": DATA}, 1000 * 1024),
        ({**HOST, **OWN, "proc/self/limits": LIMITS}, 8000 * 1024),
    ],
    ids=[
        "nothing", "host", "cgroup 2", "cgroup 1", "no such group", "over its limit", "address space", "data",
        "no limits",
    ],
)  # fmt: skip
def test_available_memory_is_the_least_that_anyone_grants(tmp_path, files, found):
    write(tmp_path, files)
    assert memory.available(root=tmp_path) == found


def test_mapped_files_need_memory_but_are_in_the_address_space_already(tmp_path):
    write(tmp_path, HOST)
    assert memory.available(1000, tmp_path) == 8000 * 1024 - 1000
    assert memory.available(1 << 40, tmp_path) == 0
    write(tmp_path, OWN)
    assert memory.available(1000, tmp_path) == 1000 * 1024


def test_this_host_tells_its_memory():
    assert 1 << 20 < memory.available() < 1 << 50


def test_a_context_that_does_not_fit_is_refused(small):
    with pytest.raises(HostError, match="holds 32 tokens"):
        load_decoder(small, backend="reference", device="cpu", blocks=2, max_length=33)
    with pytest.raises(HostError, match="holds 0 tokens"):
        load_decoder(small, backend="reference", device="cpu", kv_memory=100)
    with pytest.raises(UsageError, match="129"):
        load_decoder(small, backend="reference", device="cpu", max_length=129)
    with pytest.raises(UsageError, match="float8"):
        load_decoder(small, backend="reference", device="cpu", dtype="float8")


def test_choices_cover_every_op(small):
    decoder = load_decoder(small, backend="reference", device="cpu", blocks=8)
    assert isinstance(decoder, Decoder)
    assert {"linear", "attend", "sample"} <= {choice.op for choice in decoder.choices}
    assert {choice.backend for choice in decoder.choices} == {"reference"}
