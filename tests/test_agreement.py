"""Ranks that hold one slice otherwise, or values in padding, are found whatever the digests say."""

from __future__ import annotations

import functools

import msgspec
import pytest

from fgsnap.cli import run_cli
from fgsnap.diff import diff
from fgsnap.errors import SnapshotRefused
from fgsnap.snapshot import agreement, open_snapshot, verify
from fgsnap.spec import Embedding
from tests.snapshots import make_snapshot, tiny_spec

# At degree 4 two ranks share a KV head, and the last rank has padding of the vocabulary and of the MLP. The embedding
# is narrower than the decoder, so that every rank has whole matrices between the two.
SPEC = msgspec.structs.replace(tiny_spec(inner=47, qkv_bias=True), embedding=Embedding(width=16))
TP = 4
DIFFER = "{} is not the same in rank-00000-of-00004 and rank-00001-of-00004, which both hold it."
FILLED = "The padding of {} is not all zeros in rank-00003-of-00004."
FAULTS = {
    "norm": ("layers.1.attn_in.weight", 1, -1, DIFFER.format("layers.1.attn_in.weight")),
    "value head": ("layers.1.qkv.weight", 1, (-1, -1), DIFFER.format("layers.1.v.weight")),
    "key bias": ("layers.0.qkv.bias", 1, 8, DIFFER.format("layers.0.k.bias")),
    "matrix": ("project_out.weight", 1, (15, 31), DIFFER.format("project_out.weight")),
    "inner columns": ("layers.1.down.weight", 3, (31, -1), FILLED.format("layers.1.down.weight")),
    "inner rows": ("layers.0.gate_up.weight", 3, (11, 0), FILLED.format("layers.0.gate_up.weight")),
    "vocabulary": ("embed.weight", 3, (13, 0), FILLED.format("embed.weight")),
}
LAYOUTS = ["row", "words32"]


def spoiled(fault):
    name, rank, at, _ = FAULTS[fault]

    def spoil(number, tensor, values):
        if (number, tensor) == (rank, name):
            values[at] += 1

    return spoil


@pytest.fixture(params=LAYOUTS)
def make(request, tmp_path):
    def make(name, tp=TP, **settings):
        make_snapshot(tmp_path / name, SPEC, tp, **{"layout": request.param, **settings})
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize("slab", [1, 600, 4 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_that_agree(make, monkeypatch, tp, dtype, slab):
    monkeypatch.setattr(agreement, "SLAB", slab)
    snap = make("snap", tp, dtype=dtype)
    verify(snap)
    assert diff(snap, make("other", 1, dtype=dtype, layout="row")).equal


@pytest.mark.parametrize("slab", [1, 600, 4 << 20])
@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_tensor_and_the_ranks(make, monkeypatch, capsys, fault, slab):
    monkeypatch.setattr(agreement, "SLAB", slab)
    snap = make("snap", spoil=spoiled(fault))
    assert run_cli(["verify", snap]) == 3
    assert FAULTS[fault][3] in capsys.readouterr().err


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_ranks_hold_otherwise_is_not_equal(make, capsys, fault, tp, values):
    snap, sound = make("snap", spoil=spoiled(fault)), make("sound", tp)
    for pair in ((snap, sound), (sound, snap)):
        assert run_cli(["diff", *pair, *(["--values"] if values else [])]) == 3
        assert FAULTS[fault][3] in capsys.readouterr().err


def test_what_digests_tell_to_be_equal_is_not_read(make):
    snap, copy = (make(name, spoil=spoiled("norm")) for name in ("snap", "copy"))
    assert diff(snap, copy).same


def test_only_the_tensors_that_are_asked_for_are_read(make):
    with open_snapshot(make("snap", spoil=spoiled("norm"))) as snapshot:
        agreement.refuse_disagreement(snapshot, {"layers.0.attn_in.weight"})
        with pytest.raises(SnapshotRefused):
            agreement.refuse_disagreement(snapshot, {"layers.1.attn_in.weight"})


def test_a_slab_is_read_at_a_time(make, monkeypatch):
    read = []

    @functools.wraps(agreement.read_stored)
    def told(*arguments):
        read.append(found := read_stored(*arguments))
        return found

    read_stored = agreement.read_stored
    monkeypatch.setattr(agreement, "read_stored", told)
    monkeypatch.setattr(agreement, "SLAB", 512)
    verify(make("snap"))
    assert max(map(len, read)) <= 4096, "a panel of 32 rows of the widest tensor"
