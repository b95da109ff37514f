"""A snapshot served at another degree than its own: verified alike, and as wrong where a byte is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgsnap.errors import SnapshotRefused
from fgsnap.runtime import wire
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.ranks import settled_degree
from fgsnap.runtime.worker import begin_engine
from fgsnap.snapshot import open_snapshot, rank_file
from tests.serving import ask, real_service, servable_snapshot

AT_ONE = ("--tp", "1", "--kv-memory", "16MiB", "--threads", "1")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return servable_snapshot(tmp_path / "snap", tp=4)


def begin(path: Path, verify: str):
    with open_snapshot(path) as opened:
        engine = EngineOptions(kv_memory=1 << 20, threads=1, tp=1)
        told = wire.Begin(snapshot=str(path), id=opened.id, engine=engine, verify=verify)
    return begin_engine(lambda: told, lambda name: None)


def flip_the_last_byte(rank: Path) -> None:
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)


@pytest.mark.parametrize("verify", ["manifest", "full"])
def test_the_canary_of_its_own_degree_agrees(snapshot, verify):
    _, ready = begin(snapshot, verify)
    assert ready.canary.startswith("canary ")


@pytest.mark.parametrize(("cpus", "expected"), [(8, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_by_default_every_rank_has_a_processor(snapshot, cpus, expected):
    with open_snapshot(snapshot) as opened:
        assert settled_degree(opened, EngineOptions(backend="native", threads=cpus)) == expected


def test_every_degree_serves_the_same_tokens(snapshot):
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    texts = set()
    for tp in ("1", "2", "4"):
        with real_service(snapshot, "--tp", tp, "--backend", "native", "--kv-memory", "16MiB") as service:
            reply = ask(service.url, "POST", "/v1/completions", body)
            assert reply.status == 200, reply.body
            texts.add(reply.json()["choices"][0]["text"])
    assert len(texts) == 1


def test_full_verification_looks_at_every_rank(snapshot):
    flip_the_last_byte(snapshot / rank_file(3, 4))
    with pytest.raises(SnapshotRefused, match=r"refused") as refused:
        begin(snapshot, "full")
    assert "rank-00003-of-00004" in refused.value.why


def test_verify_touch_serves_first_and_ends_when_a_byte_is_wrong(snapshot):
    flip_the_last_byte(snapshot / rank_file(3, 4))
    with real_service(snapshot, *AT_ONE, "--verify", "touch") as service:
        assert service.ended() == 3
        assert any("rank-00003-of-00004" in line for line in service.lines)


def test_a_rank_file_that_is_cut_ends_the_service(snapshot):
    """Also when none of its pages is mapped any more: a snapshot does not change."""
    with real_service(snapshot, *AT_ONE) as service:
        assert ask(service.url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200
        with (snapshot / rank_file(2, 4)).open("r+b") as file:
            file.truncate(5000)
        assert service.ended() == 3
        assert any("rank-00002-of-00004" in line for line in service.lines)
