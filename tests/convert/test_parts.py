"""Ranks that are converted by themselves, here or elsewhere: together they are the snapshot that one process writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fgsnap.atomic import write_file
from fgsnap.convert.pipeline import Result, convert
from fgsnap.convert.plan import plan_source
from fgsnap.errors import FgsnapError, NotFound, SnapshotRefused, SourceError, UsageError
from fgsnap.snapshot import SnapshotWriter, open_snapshot, verify
from tests.convert.models import CONFIG, folder, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("source") / "tiny", CONFIG, weights(CONFIG), shards=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    target = tmp_path_factory.mktemp("whole") / "snap"
    convert(str(model), target, tp=4, canary=False)
    return target


def part(source: Path, directory: Path, *ranks: int, **settings: Any) -> Result:
    return convert(str(source), directory, **{"tp": 4, "ranks": ranks, "canary": False, **settings})


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_parts_make_the_snapshot_that_one_process_makes(tmp_path: Path, model: Path, whole: Path) -> None:
    target = tmp_path / "deep" / "snap"
    first = part(model, target, 2, 0)
    assert (first.id, first.path, first.missing) == ("", tmp_path / "deep" / "snap.parts", (1, 3))
    assert names(first.path) == {"rank-00000-of-00004", "rank-00002-of-00004"}
    assert names(first.path / "rank-00002-of-00004") == {
        "part.json", "rank-00002-of-00004.chunks", "rank-00002-of-00004.safetensors",
    }  # fmt: skip
    assert not target.exists()
    assert part(model, target, 3).missing == (1,)
    last = part(model, target, 1, canary=True)
    assert (last.path, last.missing) == (target, ())
    assert last.id == verify(target).id and names(tmp_path / "deep") == {"snap"}
    made, wanted = digests(target), digests(whole)
    with open_snapshot(target) as snapshot:
        assert snapshot.canary is not None
    for only in ("canary.json", "snapshot.json"):
        made.pop(only)
    wanted.pop("snapshot.json")
    assert made == wanted


def test_parts_may_come_from_other_hosts(tmp_path: Path, model: Path, whole: Path) -> None:
    """Each host has its own copy of the source and a directory of its own; one of them gets all parts."""
    for host, ranks in (("a", (0, 1)), ("b", (2, 3))):
        copy = shutil.copytree(model, tmp_path / host / "checkpoint")
        assert part(copy, tmp_path / host / "snap", *ranks).missing
    shutil.copytree(tmp_path / "b" / "snap.parts", tmp_path / "a" / "snap.parts", dirs_exist_ok=True)
    with pytest.raises(SnapshotRefused, match="not a finished snapshot") as caught:
        open_snapshot(tmp_path / "a" / "snap")
    assert "nobody has published" in caught.value.why and "again" in caught.value.next_step
    result = part(model, tmp_path / "a" / "snap", 0)
    assert digests(tmp_path / "a" / "snap") == digests(whole) and result.bytes == 0
    assert "rank 0" in result.notes[0] and names(tmp_path / "a") == {"checkpoint", "snap"}


def test_all_ranks_may_be_named(tmp_path: Path, model: Path, whole: Path) -> None:
    assert part(model, tmp_path / "snap", 3, 2, 1, 0).id == verify(whole).id
    assert digests(tmp_path / "snap") == digests(whole)


@pytest.mark.parametrize("missing", [(1,), (1, 3)])
def test_an_unfinished_snapshot_says_which_ranks_are_missing(
    tmp_path: Path, model: Path, missing: tuple[int, ...]
) -> None:
    part(model, tmp_path / "snap", *({0, 1, 2, 3} - {*missing}))
    listed = ", ".join(map(str, missing))
    for path in ("snap", "snap.parts"):
        with pytest.raises(SnapshotRefused, match=f"{listed} .*missing") as caught:
            open_snapshot(tmp_path / path)
        assert f"--ranks {','.join(map(str, missing))}" in caught.value.next_step
    for command in ("inspect", "serve", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "fgsnap", command, str(tmp_path / "snap")],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 3 and listed in done.stderr.splitlines()[0], done.stderr
    with pytest.raises(NotFound):
        open_snapshot(tmp_path / "other")


def test_a_rank_that_is_there_is_kept(tmp_path: Path, model: Path) -> None:
    part(model, tmp_path / "snap", 0)
    kept = tmp_path / "snap.parts" / "rank-00000-of-00004" / "rank-00000-of-00004.safetensors"
    before = kept.stat()
    again = part(model, tmp_path / "snap", 0, 1)
    assert "rank 0" in again.notes[0] and "rank 1" not in again.notes[0]
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.missing == (2, 3)


def test_a_finished_snapshot_lacks_no_rank(tmp_path: Path, model: Path) -> None:
    part(model, tmp_path / "snap", 0, 1, 2, 3)
    before = digests(tmp_path / "snap")
    with pytest.raises(UsageError, match="finished"):
        part(model, tmp_path / "snap", 1)
    assert digests(tmp_path / "snap") == before and names(tmp_path) == {"snap"}


def test_parts_that_were_left_beside_a_finished_snapshot_go(tmp_path: Path, model: Path) -> None:
    """Whoever published was killed while it removed them, or before."""
    part(model, tmp_path / "snap", 0, 1)
    for left in ("left", "snap.parts.done"):
        shutil.copytree(tmp_path / "snap.parts", tmp_path / left)
    part(model, tmp_path / "snap", 2, 3)
    assert names(tmp_path) == {"left", "snap"}
    (tmp_path / "left").rename(tmp_path / "snap.parts")
    with pytest.raises(UsageError, match="finished snapshot"):
        part(model, tmp_path / "snap", 0)
    assert names(tmp_path) == {"snap"}


def test_parts_of_which_none_is_finished(tmp_path: Path) -> None:
    (tmp_path / "snap.parts" / "rank-00001-of-00004.partial").mkdir(parents=True)
    with pytest.raises(SnapshotRefused, match="not a finished snapshot") as caught:
        open_snapshot(tmp_path / "snap")
    assert caught.value.why.startswith("No rank in snap.parts is finished") and caught.value.next_step


def changed_weights(path: Path) -> Path:
    tensors = weights(CONFIG)
    tensors["model.norm.weight"] = torch.ones(48).bfloat16() * 3
    return folder(path, CONFIG, tensors, shards=2)


@pytest.mark.parametrize(
    ("change", "settings", "word"),
    [
        (changed_weights, {}, "model-0000"),
        (lambda path: folder(path, {**CONFIG, "bos_token_id": 3}, weights(CONFIG), shards=2), {}, "config.json"),
        (lambda path: folder(path, CONFIG, weights(CONFIG), shards=3), {}, "model-0000"),
        (None, {"dtype": "float32"}, "dtype"),
        (None, {"target": "cpu"}, "--target"),
    ],
    ids=["weights", "config", "shards", "dtype", "target"],
)
def test_parts_of_different_sources_are_refused_by_name(
    tmp_path: Path, model: Path, change: Any, settings: dict[str, Any], word: str
) -> None:
    other = change(tmp_path / "other") if change else model
    part(model, tmp_path / "snap", 0, 1)
    with pytest.raises(UsageError, match="was not made from this source in this way") as caught:
        part(other, tmp_path / "snap", 2, 3, **settings)
    assert word in caught.value.why and "rank-0000" in caught.value.what
    assert not (tmp_path / "snap").exists() and not list(tmp_path.rglob("*.partial"))
    shutil.rmtree(tmp_path / "snap.parts" / "rank-00002-of-00004", ignore_errors=True)
    shutil.rmtree(tmp_path / "snap.parts" / "rank-00003-of-00004", ignore_errors=True)
    assert part(model, tmp_path / "snap", 2, 3).missing == ()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights": lambda part: flip(part / "rank-00001-of-00004.safetensors"),
    "cut": lambda part: os.truncate(part / "rank-00001-of-00004.safetensors", 5000),
    "chunks": lambda part: flip(part / "rank-00001-of-00004.chunks"),
    "absent": lambda part: (part / "rank-00001-of-00004.safetensors").unlink(),
    "record": lambda part: (part / "part.json").write_text("{"),
    "no record": lambda part: (part / "part.json").unlink(),
    "another rank's": lambda part: shutil.copy(
        part.with_name("rank-00000-of-00004") / "part.json", part / "part.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_found_before_it_is_published(tmp_path: Path, model: Path, whole: Path, damage: str) -> None:
    part(model, tmp_path / "snap", 0, 1)
    damaged = tmp_path / "snap.parts" / "rank-00001-of-00004"
    DAMAGE[damage](damaged)
    with pytest.raises(SnapshotRefused) as caught:
        part(model, tmp_path / "snap", 2, 3)
    assert str(damaged) in caught.value.what and "--ranks 1" in caught.value.next_step
    assert names(tmp_path) == {"snap.parts"}
    shutil.rmtree(damaged)
    assert part(model, tmp_path / "snap", 1, 2, 3).missing == ()
    assert digests(tmp_path / "snap") == digests(whole)


def test_what_fails_to_be_published_keeps_its_parts(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(writer: SnapshotWriter, manifest: Any) -> str:
        raise FgsnapError("no")

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotWriter, "write_manifest", fail)
        with pytest.raises(FgsnapError, match=r"^no$"):
            part(model, tmp_path / "snap", 0, 1, 2, 3)
    assert names(tmp_path) == {"snap.parts"} and len(names(tmp_path / "snap.parts")) == 4
    assert part(model, tmp_path / "snap", 3).bytes == 0
    assert digests(tmp_path / "snap") == digests(whole)


def test_where_there_are_no_links_parts_are_copied(
    tmp_path: Path, model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    part(model, tmp_path / "snap", 0, 1, 2, 3)
    assert digests(tmp_path / "snap") == digests(whole)


PROGRAM = """
import json, sys, time
from fgsnap.convert.pipeline import convert
from fgsnap.errors import FgsnapError
def wait(done, total):
    while time.time() < float(sys.argv[4]):
        time.sleep(0.001)
try:
    result = convert(sys.argv[1], sys.argv[2], tp=4, ranks=[int(sys.argv[3])], canary=False, progress=wait)
    print(json.dumps([result.id, list(result.missing)]))
except FgsnapError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(model: Path, target: Path, rank: int, at: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(target), str(rank), str(at)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_that_finish_at_once_publish_one_snapshot(tmp_path: Path, model: Path, whole: Path) -> None:
    """All wait with their last slab for the same moment."""
    import time

    at = time.time() + 3
    running = [start(model, tmp_path / "snap", rank, at) for rank in range(4)]
    told = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4, told
    ids = {json.loads(line)[0] for line in told}
    assert ids - {""} == {verify(whole).id}
    assert digests(tmp_path / "snap") == digests(whole)
    assert names(tmp_path) == {"snap"}


def test_a_rank_is_written_by_one_process_at_a_time(tmp_path: Path, model: Path) -> None:
    import time

    process = start(model, tmp_path / "snap", 1, time.time() + 3600)
    try:
        while not list(tmp_path.glob("snap.parts/*.partial/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(UsageError, match="Another process is writing rank-00001-of-00004"):
            part(model, tmp_path / "snap", 0, 1)
        assert names(tmp_path / "snap.parts") == {"rank-00001-of-00004.partial"}
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert part(model, tmp_path / "snap", 1).missing == (0, 2, 3)
        assert names(tmp_path / "snap.parts") == {"rank-00001-of-00004"}
    finally:
        process.kill()
        process.communicate()


def test_a_failure_leaves_only_finished_parts(tmp_path: Path, model: Path) -> None:
    part(model, tmp_path / "snap", 0)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part(model, tmp_path / "snap", 1, 2, progress=fail)
    assert names(tmp_path / "snap.parts") == {"rank-00000-of-00004"}
    with pytest.raises(KeyboardInterrupt):
        part(model, tmp_path / "new" / "snap", 1, 2, progress=fail)
    assert not (tmp_path / "new").exists()


def test_a_source_that_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", CONFIG, {"x": torch.zeros(2)})
    with pytest.raises(SourceError):
        part(source, tmp_path / "out" / "snap", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "ranks", ["4", "-1", "x", "", "0,,1", "0,0", "1.5", "0;1", "2-0", "1-", "0-4", "0-1,1", "0-99999"]
)
def test_bad_ranks_are_one_clear_usage_error(tmp_path: Path, model: Path, ranks: str) -> None:
    arguments = ["convert", str(model), "--tp", "4", "--ranks", ranks, "-o", str(tmp_path / "snap")]
    for more in ([], ["--dry-run"]):
        done = subprocess.run(
            [sys.executable, "-m", "fgsnap", *arguments, *more],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and "ranks" in lines[0] and len(lines) <= 3, done.stderr
    assert names(tmp_path) == set()


def test_a_plan_of_some_ranks_shows_those(model: Path) -> None:
    all_of_them = plan_source(str(model), tp=4)
    some = plan_source(str(model), tp=4, ranks=[3, 1])
    assert some.ranks == (all_of_them.ranks[1], all_of_them.ranks[3])
    assert some.bytes == sum(rank.bytes for rank in some.ranks)
    assert some.kv_bytes_per_token == all_of_them.kv_bytes_per_token


def test_files_of_somebody_else_among_the_parts_stay(tmp_path: Path, model: Path) -> None:
    part(model, tmp_path / "snap", 0, 1)
    write_file(tmp_path / "snap.parts" / "notes.txt", b"mine")
    part(model, tmp_path / "snap", 2, 3)
    assert [path.read_bytes() for path in tmp_path.rglob("notes.txt")] == [b"mine"]


def test_a_target_that_is_taken_is_refused_before_anything_is_written(tmp_path: Path, model: Path) -> None:
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "precious").write_text("x")
    with pytest.raises(UsageError, match="Cannot write"):
        part(model, tmp_path / "snap", 0)
    assert names(tmp_path) == {"snap"}
