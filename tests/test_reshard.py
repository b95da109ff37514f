"""Another degree: a snapshot opens at any as conversion would have stored it, copies each needed byte once, and ends
with an error when a file changes meanwhile."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fgsnap.errors import SnapshotRefused, UsageError
from fgsnap.layout import StoredTensor, possible_tp, stored_tensors
from fgsnap.snapshot import (
    Snapshot,
    TensorBytes,
    gathered,
    gathering,
    open_snapshot,
    opened_at,
    packed_bytes,
    rank_file,
)
from fgsnap.spec import (
    DTYPE_BYTES,
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
from tests.snapshots import make_snapshot, random_weights, stored_array, tiny_spec, words32

NORM = Norm(kind="rms", eps=1e-5)
TARGETS = [(8, 4), (8, 2), (8, 1), (1, 2), (1, 4), (2, 4), (4, 2)]
EVEN = tiny_spec(width=64, heads=8, kv_heads=2, head_dim=32, inner=512, vocab_size=256, qkv_bias=True, mlp_bias=True)
"""Divides by 8 into whole panels; at 8 and 4, ranks share key heads."""


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """Heads that are grouped, shared or padded, of one number or a whole panel each; or latents."""
    flag, few = st.booleans(), st.integers(1, 5)
    if draw(flag):
        latent = Latent(draw(few), 2, NORM, draw(st.none() | few))
        heads, head_dim, value = draw(st.integers(1, 9)), 2 + draw(few), draw(few)
        return Attention(heads, heads, head_dim, 1.0, value_dim=value, latent=latent, out_bias=draw(flag))
    kv_heads = draw(st.integers(1, 4))
    return Attention(
        heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 2, 32))),
        scale=1.0,
        sinks=draw(flag),
        qkv_bias=draw(flag),
        out_bias=draw(flag),
        qk_norm=draw(st.sampled_from((None, QkNorm(NORM), QkNorm(NORM, "projection")))),
    )


@st.composite
def mlps(draw: st.DrawFn) -> Mlp:
    inner = draw(st.integers(1, 20) | st.sampled_from((64, 256)))
    return Mlp(inner, "silu", *(draw(st.booleans()) for _ in range(3)))


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    """Everything that is divided, padded, replicated or stacked, in odd sizes and in whole panels."""
    experts = None
    if draw(st.booleans()):
        shared = draw(st.none() | st.builds(SharedExpert, mlps(), st.booleans()))
        router = Router("softmax", 1, bias=draw(st.booleans()), selection_bias=draw(st.booleans()))
        experts = Experts(draw(st.integers(1, 3)), draw(mlps()), router, shared)
    mlp = draw(mlps()) if experts is None or draw(st.booleans()) else None
    layer = Layer(draw(attentions()), mlp, experts, attn_in=NORM, mlp_in=NORM)
    width, own = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return DecoderSpec(
        vocab_size=draw(st.integers(1, 40) | st.sampled_from((64, 256))),
        width=width,
        max_length=16,
        embedding=Embedding(draw(st.sampled_from((width, own))), learned_positions=draw(st.sampled_from((0, 5)))),
        layer_kinds=(layer,),
        layers=(0,),
        head=Head(tied=draw(st.booleans()), bias=draw(st.booleans())),
        final_norm=NORM,
    )


def check(found: TensorBytes, tensor: StoredTensor, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Byte for byte what conversion stores, in one of the two layouts."""
    array = stored_array(tensor, weights, dtype)
    assert (found.dtype, found.shape, found.data.readonly) == (dtype, tensor.shape, True)
    assert found.data == (words32(array) if found.layout == "words32" else array.tobytes()), tensor.name


def needed(tensor: StoredTensor, dtype: str) -> int:
    """Bytes of a row-major tensor without its padding."""
    parts = [segment for segment in tensor.segments if segment.tensor is not None]
    values = [(part.stop - part.start) * math.prod(tensor.shape) // tensor.shape[part.axis] for part in parts]
    return sum(values) * DTYPE_BYTES[dtype]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs(), st.data())
def test_any_degree_opens_at_any_other_as_conversion_would_have_stored_it(
    tmp_path: Path, spec: DecoderSpec, data: st.DataObject
) -> None:
    """However little is read at once, and whatever is worth mapping."""
    degrees = possible_tp(spec, 8)
    own, to = (data.draw(st.sampled_from(degrees), name) for name in ("own", "to"))
    assume(own != to)
    dtype, layout = (data.draw(st.sampled_from(of)) for of in (("float32", "bfloat16"), ("row", "words32")))
    weights = random_weights(spec, dtype)
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    make_snapshot(tmp_path / "s", spec, own, dtype, weights=weights, layout=layout)
    with pytest.MonkeyPatch.context() as patch, open_snapshot(tmp_path / "s") as snapshot:
        patch.setattr(gathering, "MAPPED_FROM", data.draw(st.sampled_from((1, 1 << 21)), "mapped from"))
        patch.setattr(gathering, "AT_ONCE", data.draw(st.sampled_from((8, 100, 1 << 22)), "at once"))
        patch.setattr(gathering, "PARTS_AT_ONCE", data.draw(st.sampled_from((3, 1024)), "parts at once"))
        patch.setattr(gathering, "AHEAD", data.draw(st.sampled_from((0, 1000, 1 << 25)), "ahead"))
        patch.setattr(gathering, "SHARE_FROM", data.draw(st.sampled_from((1, 1000, 1 << 25)), "share from"))
        for rank in range(to):
            before, expected = snapshot.copied, stored_tensors(spec, to, rank)
            opened = opened_at(snapshot, to, rank)
            assert list(opened) == [tensor.name for tensor in expected]
            for tensor in expected:
                check(opened[tensor.name], tensor, weights, dtype)
            if layout == "row":
                copied = [tensor for tensor in expected if not is_mapped(snapshot, opened[tensor.name])]
                assert snapshot.copied - before == sum(needed(tensor, dtype) for tensor in copied)
        del opened


def is_mapped(snapshot: Snapshot, found: TensorBytes) -> bool:
    """Whether the bytes are those of a mapped file."""
    at = np.frombuffer(found.data, np.uint8).ctypes.data
    for entry in snapshot.manifest.tensors:
        begin = np.frombuffer(snapshot.tensor(entry), np.uint8).ctypes.data
        if begin <= at < begin + entry.bytes:
            return True
    return False


@pytest.mark.parametrize("layout", ["row", "words32"])
@pytest.mark.parametrize("own, to", TARGETS)
def test_each_needed_byte_is_copied_once(tmp_path: Path, own: int, to: int, layout: str) -> None:
    """Also where ranks share key heads; and panels that are whole stay so."""
    weights = random_weights(EVEN, "bfloat16")
    make_snapshot(tmp_path / "s", EVEN, own, "bfloat16", weights=weights, layout=layout)
    for rank in range(to):
        with open_snapshot(tmp_path / "s") as snapshot:
            opened = opened_at(snapshot, to, rank)
            for tensor in stored_tensors(EVEN, to, rank):
                assert opened[tensor.name].layout == (layout if len(tensor.shape) > 1 else "row")
                check(opened[tensor.name], tensor, weights, "bfloat16")
            assert snapshot.copied == sum(len(found.data) for found in opened.values())


def test_panels_that_are_cut_become_rows(tmp_path: Path) -> None:
    """40 rows of keys a rank are a panel and a quarter; the other matrices keep their panels."""
    spec = tiny_spec(width=64, heads=4, kv_heads=2, head_dim=40, inner=64, vocab_size=64, layers=1)
    weights = random_weights(spec)
    make_snapshot(tmp_path / "s", spec, 2, weights=weights, layout="words32")
    with open_snapshot(tmp_path / "s") as snapshot:
        opened = opened_at(snapshot, 1, 0)
        for tensor in stored_tensors(spec, 1, 0):
            check(opened[tensor.name], tensor, weights, "float32")
        assert {name: found.layout for name, found in opened.items() if len(found.shape) > 1} == {
            "embed.weight": "words32",
            "layers.0.qkv.weight": "row",
            "layers.0.out.weight": "words32",
            "layers.0.gate_up.weight": "words32",
            "layers.0.down.weight": "words32",
            "head.weight": "words32",
        }


@pytest.mark.parametrize("layout", ["row", "words32"])
def test_a_large_range_of_one_file_stays_mapped(tmp_path: Path, layout: str) -> None:
    """Half of a table of 6 MiB; what is gathered beside it is copied."""
    spec = tiny_spec(width=256, head_dim=32, inner=128, vocab_size=6016, layers=1)
    weights = random_weights(spec)
    make_snapshot(tmp_path / "s", spec, 1, weights=weights, layout=layout)
    for rank in range(2):
        with open_snapshot(tmp_path / "s") as snapshot:
            opened = opened_at(snapshot, 2, rank)
            for tensor in stored_tensors(spec, 2, rank):
                check(opened[tensor.name], tensor, weights, "float32")
            mapped = {name for name, found in opened.items() if is_mapped(snapshot, found)}
            assert mapped == {"embed.weight", "head.weight"}
            assert {opened[name].layout for name in mapped} == {layout}
            assert snapshot.copied == sum(len(found.data) for name, found in opened.items() if name not in mapped)


def test_a_range_that_does_not_begin_as_tensors_do_is_copied(tmp_path: Path) -> None:
    """Rows of 260 bytes: the second half begins on a byte that no alignment holds for."""
    spec = tiny_spec(width=65, vocab_size=2 * 9001, heads=2, layers=1)
    weights = random_weights(spec)
    make_snapshot(tmp_path / "s", spec, 1, weights=weights)
    with open_snapshot(tmp_path / "s") as snapshot:
        found = [opened_at(snapshot, 2, rank)["embed.weight"] for rank in range(2)]
        assert [is_mapped(snapshot, each) for each in found] == [True, False]
        assert b"".join(each.data for each in found) == weights["embed.weight"].tobytes()


def test_a_rank_reads_the_files_that_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks hold alike comes from a file that is read anyway."""
    make_snapshot(tmp_path / "s", EVEN, 8)
    read: set[str] = set()
    original = Snapshot.read
    monkeypatch.setattr(Snapshot, "read", lambda own, file, *rest: (read.add(file), original(own, file, *rest)))
    for rank in range(4):
        read.clear()
        with open_snapshot(tmp_path / "s") as snapshot:
            opened_at(snapshot, 4, rank)
        assert read == {rank_file(2 * rank, 8), rank_file(2 * rank + 1, 8)}


def test_single_tensors(tmp_path: Path) -> None:
    """As the canary's pass asks for them, layer by layer."""
    weights = random_weights(EVEN)
    make_snapshot(tmp_path / "s", EVEN, 8, weights=weights)
    with open_snapshot(tmp_path / "s") as snapshot:
        for tensor in stored_tensors(EVEN, 1, 0):
            before = snapshot.copied
            [(name, found)] = gathered(snapshot, [tensor]).items()
            assert name == tensor.name
            check(found, tensor, weights, "float32")
            assert snapshot.copied - before == packed_bytes("row", tensor.shape, "float32")
        assert gathered(snapshot, []) == {}


def test_what_was_copied_outlives_the_snapshot(tmp_path: Path) -> None:
    weights = random_weights(EVEN)
    make_snapshot(tmp_path / "s", EVEN, 2, weights=weights)
    with open_snapshot(tmp_path / "s") as snapshot:
        opened = opened_at(snapshot, 1, 0)
    os.truncate(tmp_path / "s" / rank_file(0, 2), 0)
    for tensor in stored_tensors(EVEN, 1, 0):
        check(opened[tensor.name], tensor, weights, "float32")


def test_a_degree_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", EVEN, 2)
    with open_snapshot(tmp_path / "s") as snapshot, pytest.raises(UsageError, match="degree 3 does not divide"):
        opened_at(snapshot, 3, 0)


# A file that changes while it is read


def cut_to_nothing(rank: Path) -> None:
    os.truncate(rank, 0)


def cut_in_a_tensor(rank: Path) -> None:
    os.truncate(rank, rank.stat().st_size * 3 // 5)


def cut_at_the_end(rank: Path) -> None:
    os.truncate(rank, rank.stat().st_size - 1)


def append(rank: Path) -> None:
    with rank.open("ab") as file:
        file.write(b"x")


def write_over(rank: Path) -> None:
    os.utime(rank, (0, 0))


@pytest.mark.parametrize("layout", ["row", "words32"])
@pytest.mark.parametrize("spec", [EVEN, tiny_spec(layers=8)], ids=["whole panels", "odd"])
@pytest.mark.parametrize("change", [cut_to_nothing, cut_in_a_tensor, cut_at_the_end, append, write_over])
def test_a_file_that_changes_is_refused(
    tmp_path: Path, change: Callable[[Path], None], spec: DecoderSpec, layout: str
) -> None:
    """Its mapped bytes are not touched, which would kill the process (SIGBUS)."""
    make_snapshot(tmp_path / "s", spec, 2, layout=layout)
    for rank in range(2):
        with open_snapshot(tmp_path / "s") as snapshot:
            file = tmp_path / "s" / rank_file(rank, 2)
            kept = file.read_bytes()
            change(file)
            with pytest.raises(SnapshotRefused) as refused:
                opened_at(snapshot, 1, 0)
            what, why, next_step = refused.value.lines()
            assert "was changed while it was in use" in what and rank_file(rank, 2) in why
            assert "fgsnap verify" in next_step
            file.write_bytes(kept)


FEW = """
import resource, sys
from fgsnap.errors import HostError
from fgsnap.snapshot import open_snapshot, opened_at
with open_snapshot(sys.argv[1]) as snapshot:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
    try:
        opened_at(snapshot, 1, 0)
    except HostError as error:
        print(error.exit_code, *error.lines(), sep="|")
"""


def test_too_little_memory_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(width=256, vocab_size=6000, layers=1), 2)
    done = subprocess.run([sys.executable, "-c", FEW, str(tmp_path / "s")], capture_output=True, text=True, check=True)
    code, what, why, next_step = done.stdout.strip().split("|")
    assert (code, what) == ("6", "There is no memory for 11 MiB of weights.")
    assert why.startswith("Cannot allocate memory") and "degree" in next_step
