"""The snapshot format: what is written is what opens, at any degree, the same every time, whole or not at all."""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fgsnap.atomic import MARK
from fgsnap.errors import HostError, NotFound, SnapshotRefused, UsageError
from fgsnap.layout import possible_tp, stored_tensors
from fgsnap.snapshot import (
    CHUNK,
    Canary,
    Manifest,
    SnapshotWriter,
    TextSection,
    open_snapshot,
    opened_at,
    plan_rank,
    rank_file,
    read_logical,
    verify,
)
from fgsnap.spec import DecoderSpec
from tests.snapshots import make_snapshot, random_weights, stored_array, tiny_spec, words32

ROOT = Path(__file__).parent.parent
CANARY = Canary("", [1, 2, 3], [4, 5, 6], [0.5, 1.25, 2.0])
TEXT = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}", "chat_template.jinja": "{{ 'é' }}".encode()}


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# What is written opens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip(tmp_path: Path, tp: int, dtype: str) -> None:
    spec = tiny_spec(qkv_bias=True)
    weights = random_weights(spec, dtype)
    identity = make_snapshot(
        tmp_path / "s",
        spec,
        tp,
        dtype,
        text_files=TEXT,
        weights=weights,
        canary=CANARY,
        text=TextSection((7, 9), 1, True),
    )
    with open_snapshot(tmp_path / "s") as snapshot:
        assert snapshot.id == identity == hashlib.sha256((tmp_path / "s/manifest.json").read_bytes()).hexdigest()
        assert snapshot.manifest.spec == spec
        assert snapshot.manifest.text == TextSection((7, 9), 1, True)
        assert snapshot.canary == Canary(identity, CANARY.tokens, CANARY.next, CANARY.margins)
        assert {name: snapshot.read_text(name) for name in TEXT} == TEXT
        entries = iter(snapshot.manifest.tensors)
        for rank in range(tp):
            for tensor in stored_tensors(spec, tp, rank):
                view = snapshot.tensor(next(entries))
                assert view.readonly
                assert view == stored_array(tensor, weights, dtype).tobytes(), tensor.name
                view.release()
    report = verify(tmp_path / "s")
    assert (report.id, report.files, report.canary) == (identity, tp + len(TEXT), True)


def test_what_lies_in_the_directory(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(), 2, text_files=TEXT, canary=CANARY)
    ranks = {f"rank-0000{rank}-of-00002.{kind}" for rank in (0, 1) for kind in ("safetensors", "chunks")}
    assert names(tmp_path) == {"s"}
    assert names(tmp_path / "s") == {
        *TEXT, *ranks, "snapshot.json", "manifest.json", "canary.json", "README.md", ".gitattributes",
    }  # fmt: skip


def test_without_a_canary_there_is_no_canary_file(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec())
    assert "canary.json" not in names(tmp_path / "s")
    assert open_snapshot(tmp_path / "s").canary is None
    assert verify(tmp_path / "s").canary is False


def test_rank_files_open_in_the_safetensors_library(tmp_path: Path) -> None:
    spec = tiny_spec(vocab_size=59)
    weights = random_weights(spec)
    make_snapshot(tmp_path / "s", spec, 4, weights=weights)
    for rank in range(4):
        file = tmp_path / "s" / rank_file(rank, 4)
        with safe_open(file, "numpy") as opened:
            assert opened.metadata()["format"] == "fgsnap"
            stored = stored_tensors(spec, 4, rank)
            assert {t.name for t in stored} == {n for n in opened.keys() if not n.startswith("__pad.")}  # noqa: SIM118
            for tensor in stored:
                np.testing.assert_array_equal(
                    opened.get_tensor(tensor.name), stored_array(tensor, weights, "float32"), tensor.name
                )
            for name in opened.keys():  # noqa: SIM118
                if name.startswith("__pad."):
                    assert opened.get_tensor(name).dtype == np.uint8
                    assert not opened.get_tensor(name).any()


def test_layers_lie_on_pages_and_tensors_on_256_bytes(tmp_path: Path) -> None:
    spec = tiny_spec(layers=3)
    layout = plan_rank([(tensor, "bfloat16") for tensor in stored_tensors(spec, 2, 1)])
    assert layout.data_start % 4096 == 0
    assert all(tensor.offset % (4096 if tensor.starts_layer else 256) == 0 for tensor in layout.tensors)
    assert sum(tensor.starts_layer for tensor in layout.tensors) == 3
    assert layout.size == layout.tensors[-1].offset + layout.tensors[-1].bytes
    make_snapshot(tmp_path / "s", spec, 2, "bfloat16")
    assert (tmp_path / "s" / rank_file(1, 2)).stat().st_size == layout.size


def test_tensors_may_differ_in_dtype(tmp_path: Path) -> None:
    spec = tiny_spec(layers=1)
    kinds = {t.name: "float32" if "norm" in t.name else "bfloat16" for t in stored_tensors(spec, 1, 0)}
    layout = plan_rank([(tensor, kinds[tensor.name]) for tensor in stored_tensors(spec, 1, 0)])
    assert {t.name: t.bytes // int(np.prod(t.shape)) for t in layout.tensors} == {
        name: 4 if kind == "float32" else 2 for name, kind in kinds.items()
    }


@pytest.mark.parametrize("slab", [1 << 20, CHUNK, CHUNK + 12345, 1 << 26])
def test_digests_whatever_the_slabs(tmp_path: Path, slab: int) -> None:
    """A file of several chunks: digests are those of the bytes, however the bytes arrive."""
    spec = tiny_spec(width=256, vocab_size=6000, layers=1)
    layout = plan_rank([(tensor, "float32") for tensor in stored_tensors(spec, 1, 0)])
    with SnapshotWriter(tmp_path / "s", spec, 1) as writer:
        with writer.rank(0, layout) as out:
            for tensor in layout.tensors:
                data = np.random.default_rng(tensor.offset).bytes(tensor.bytes)
                for start in range(0, tensor.bytes, slab):
                    out.write(tensor.offset + start, memoryview(data)[start : start + slab])
        entry = writer.files[rank_file(0, 1)]
        whole = (writer.directory / rank_file(0, 1)).read_bytes()
        chunks = (writer.directory / "rank-00000-of-00001.chunks").read_bytes()
    assert len(whole) == layout.size > 2 * CHUNK
    assert entry.sha256 == hashlib.sha256(whole).hexdigest()
    assert chunks == b"".join(blake3(whole[at : at + CHUNK]).digest() for at in range(0, len(whole), CHUNK))
    assert entry.chunks == hashlib.sha256(chunks).hexdigest()


def test_a_snapshot_of_several_chunks_verifies_with_progress(tmp_path: Path) -> None:
    spec = tiny_spec(width=256, vocab_size=6000, layers=1)
    make_snapshot(tmp_path / "s", spec, text_files=TEXT)
    steps: list[tuple[int, int]] = []
    report = verify(tmp_path / "s", lambda done, total: steps.append((done, total)))
    assert steps[-1] == (report.bytes, report.bytes)
    assert report.bytes > 2 * CHUNK
    assert max(b[0] - a[0] for a, b in itertools.pairwise([(0, 0), *steps])) == CHUNK
    file = tmp_path / "s" / rank_file(0, 1)
    with file.open("r+b") as out:
        out.seek(CHUNK + 99)
        out.write(b"\xff\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(SnapshotRefused, match=r"damaged in chunk 1 .*bytes 4194304 to 8388608.*embed\.weight"):
        verify(tmp_path / "s")


def test_closing_leaves_views_alive(tmp_path: Path) -> None:
    spec = tiny_spec()
    weights = random_weights(spec)
    make_snapshot(tmp_path / "s", spec, weights=weights)
    snapshot = open_snapshot(tmp_path / "s")
    view = snapshot.tensor(snapshot.manifest.tensors[0])
    snapshot.close()
    snapshot.close()
    del snapshot
    gc.collect()
    assert view == weights["embed.weight"].tobytes()


def test_a_file_is_mapped_once_and_descriptors_do_not_leak(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(), 4)
    before = len(names(Path("/proc/self/fd")))
    with open_snapshot(tmp_path / "s") as snapshot:
        mapped = Path("/proc/self/maps").read_text().count("rank-0000")
        assert mapped == 4
        assert snapshot.id
    assert len(names(Path("/proc/self/fd"))) == before
    assert "rank-0000" not in Path("/proc/self/maps").read_text()


def append(rank: Path) -> None:
    with rank.open("ab") as file:
        file.write(b"x")


def write_the_same(rank: Path) -> None:
    rank.write_bytes(rank.read_bytes())


def cut(rank: Path) -> None:
    os.truncate(rank, 4096)


@pytest.mark.parametrize("change", [append, write_the_same, cut])
def test_a_rank_file_that_changes_under_its_mapping_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(), 2)
    with open_snapshot(tmp_path / "s") as snapshot:
        snapshot.check_unchanged()
        rank = tmp_path / "s" / "rank-00001-of-00002.safetensors"
        shutil.copy(rank, tmp_path / "copy")
        (tmp_path / "copy").replace(rank)  # another file by the same name: the mapped one is as it was
        snapshot.check_unchanged()
    os.utime(rank, (0, 0))  # the clock of file systems may be some milliseconds coarse
    with open_snapshot(tmp_path / "s") as snapshot:
        change(rank)
        with pytest.raises(SnapshotRefused, match=r"changed while it was in use") as refused:
            snapshot.check_unchanged()
        assert "rank-00001-of-00002" in refused.value.why


def test_text_files(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(), text_files=TEXT)
    with open_snapshot(tmp_path / "s") as snapshot:
        with pytest.raises(NotFound, match=r"has no generation_config\.json"):
            snapshot.read_text("generation_config.json")
        (tmp_path / "s/config.json").write_bytes(b'{"a": 2}')
        with pytest.raises(SnapshotRefused, match=r"config\.json does not have the digest"):
            snapshot.read_text("config.json")


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "long" * 100, "file", "file/in/it"])
def test_a_missing_directory_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound, match="There is no snapshot") as caught:
        open_snapshot(tmp_path / name)
    assert caught.value.why == (
        "This is a file; a snapshot is a directory." if name == "file" else "The directory does not exist."
    )


def test_opening_300_tensors_takes_milliseconds(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(layers=50))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        snapshot = open_snapshot(tmp_path / "s")
        times.append(time.perf_counter() - begin)
        assert len(snapshot.manifest.tensors) == 303
    assert min(times) < 0.015


def test_opening_imports_little() -> None:
    script = """
        import sys
        import fgsnap.snapshot
        third = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
        heavy = {"logging", "shutil", "subprocess", "json", "concurrent.futures", "asyncio"} & set(sys.modules)
        print(sorted(name for name in third if not name.startswith("_")), sorted(heavy))
    """
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "['blake3', 'fgsnap', 'msgspec', 'typing_extensions'] []"


# Any degree opens at TP 1


@st.composite
def divided_specs(draw: st.DrawFn) -> tuple[DecoderSpec, int]:
    kv_heads = draw(st.integers(1, 4))
    spec = tiny_spec(
        width=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=2,
        inner=12 * draw(st.integers(1, 2)),
        layers=draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 50)),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )
    return spec, draw(st.sampled_from(possible_tp(spec, 8)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(divided_specs(), st.sampled_from(("float32", "bfloat16")), st.sampled_from(("row", "words32")), st.data())
def test_any_snapshot_opens_at_tp1(
    tmp_path: Path, division: tuple[DecoderSpec, int], dtype: str, layout: str, data: st.DataObject
) -> None:
    spec, tp = division
    weights = random_weights(spec, dtype)
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    make_snapshot(tmp_path / "s", spec, tp, dtype, weights=weights, layout=layout)
    with open_snapshot(tmp_path / "s") as snapshot:
        opened = opened_at(snapshot, 1, 0)
        expected = stored_tensors(spec, 1, 0)
        assert list(opened) == [tensor.name for tensor in expected]
        for tensor in expected:
            kind, shape, view, lies = opened[tensor.name]
            assert (kind, shape, view.readonly) == (dtype, tensor.shape, True)
            assert lies in ("row", layout)
            array = stored_array(tensor, weights, dtype)
            assert view == (words32(array) if lies == "words32" else array.tobytes()), tensor.name
        for name, array in weights.items():
            start = data.draw(st.integers(0, array.shape[0]))
            stop = data.draw(st.integers(start, array.shape[0]))
            rows = np.zeros_like(array[start:stop])
            if stop > start:
                read_logical(snapshot, name, (start, *(0,) * (array.ndim - 1)), rows.shape, memoryview(rows))
            np.testing.assert_array_equal(rows, array[start:stop], name)
        del opened, view


@pytest.mark.parametrize("layout", ["row", "words32"])
def test_tp1_of_tp1_copies_nothing(tmp_path: Path, layout: str) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(), layout=layout)
    with open_snapshot(tmp_path / "s") as snapshot:
        mapped = snapshot.tensor(snapshot.manifest.tensors[0])
        opened = opened_at(snapshot, 1, 0)["embed.weight"].data
        assert np.frombuffer(opened, np.uint8).ctypes.data == np.frombuffer(mapped, np.uint8).ctypes.data


# The same every time


BUILD = """
    import os, sys
    os.umask(int(sys.argv[2], 8))
    from pathlib import Path
    from tests.snapshots import make_snapshot, tiny_spec
    print(make_snapshot(Path(sys.argv[1]), tiny_spec(), 2, text_files={"b.json": b"{}", "a.json": b"[]"}))
"""


def test_the_id_depends_on_nothing_but_the_content(tmp_path: Path) -> None:
    built = []
    for index, (umask, seed, locale) in enumerate([("022", "0", "C"), ("077", "1", "C.UTF-8"), ("000", "77", "tr_TR")]):
        target = tmp_path / str(index)
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(BUILD), str(target), umask],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        built.append((result.stdout, {file.name: file.read_bytes() for file in target.iterdir()}))
    assert built[0] == built[1] == built[2]


def test_an_integer_in_a_float_field_does_not_change_the_id(tmp_path: Path) -> None:
    spec = tiny_spec()
    rope = msgspec.structs.replace(spec.ropes[0], theta=10000)
    same = msgspec.structs.replace(spec, ropes=(rope,))
    assert make_snapshot(tmp_path / "a", spec) == make_snapshot(tmp_path / "b", same)


def test_a_changed_weight_changes_the_id(tmp_path: Path) -> None:
    assert make_snapshot(tmp_path / "a", tiny_spec(), seed=0) != make_snapshot(tmp_path / "b", tiny_spec(), seed=1)


SCHEMA = ROOT / "manifests/manifest.schema.json"


def schema() -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:fgsnap:manifest:1"}
    return json.dumps(head | msgspec.json.schema(Manifest), indent=2) + "\n"


def test_the_published_schema_is_the_manifest(tmp_path: Path) -> None:
    assert SCHEMA.read_text() == schema(), "write it anew with: python -m tests.test_snapshot"
    published = json.loads(SCHEMA.read_text())
    make_snapshot(tmp_path / "s", tiny_spec(), 2, text_files=TEXT, layout="words32")
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    jsonschema.Draft202012Validator(published).validate(manifest)
    del manifest["spec"]["width"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(published).validate(manifest)


# Whole or not at all


@pytest.fixture
def spec() -> DecoderSpec:
    return tiny_spec(layers=1)


def test_a_taken_target_is_refused(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = names(tmp_path)
    for name, reason in (("full", "not empty"), ("file", "not a directory"), ("link", "not a directory")):
        with pytest.raises(UsageError, match="Cannot write to") as error:
            SnapshotWriter(tmp_path / name, spec, 1)
        assert reason in error.value.why
    assert names(tmp_path) == before
    assert (tmp_path / "full/mine").read_text() == "keep"


def test_an_empty_target_is_fine(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    make_snapshot(tmp_path / "s", spec)
    assert verify(tmp_path / "s").id


def test_a_second_writer_is_refused(tmp_path: Path, spec: DecoderSpec) -> None:
    with SnapshotWriter(tmp_path / "s", spec, 1) as first:
        first.add_file("config.json", b"{}")
        with pytest.raises(UsageError, match="Another process is writing s"):
            SnapshotWriter(tmp_path / "s", spec, 1)
        assert names(first.directory) == {MARK, "config.json"}
    assert names(tmp_path) == set()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, spec: DecoderSpec, failure: type[BaseException]) -> None:
    layout = plan_rank([(tensor, "float32") for tensor in stored_tensors(spec, 1, 0)])
    writer = SnapshotWriter(tmp_path / "deep/er/s", spec, 1)
    with pytest.raises(failure), writer, writer.rank(0, layout) as out:
        out.write(layout.tensors[0].offset, memoryview(bytes(layout.tensors[0].bytes)))
        raise failure
    assert names(tmp_path) == set()


def test_leaving_without_publishing_leaves_nothing_behind(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "mine").mkdir()
    with SnapshotWriter(tmp_path / "mine/s", spec, 1) as writer:
        writer.add_file("config.json", b"{}")
    assert names(tmp_path) == {"mine"}
    assert names(tmp_path / "mine") == set()


HALF = """
    import sys, time
    from pathlib import Path
    from fgsnap.layout import stored_tensors
    from fgsnap.snapshot import SnapshotWriter, plan_rank
    from tests.snapshots import tiny_spec
    spec = tiny_spec(layers=1)
    writer = SnapshotWriter(Path(sys.argv[1]), spec, 1)
    layout = plan_rank([(tensor, "float32") for tensor in stored_tensors(spec, 1, 0)])
    out = writer.rank(0, layout)
    writer.add_file("config.json", b"{}")
    (writer.directory / "left").mkdir()
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def half_written(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HALF), str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_kill_leaves_a_partial_directory_that_the_next_writer_takes_over(
    tmp_path: Path, half_written: subprocess.Popen[str]
) -> None:
    with pytest.raises(UsageError, match="Another process is writing s"):
        make_snapshot(tmp_path / "s", tiny_spec())
    half_written.send_signal(signal.SIGKILL)
    half_written.wait()
    assert names(tmp_path) == {"s.partial"}
    with pytest.raises(SnapshotRefused, match="not a finished snapshot"):
        open_snapshot(tmp_path / "s.partial")
    make_snapshot(tmp_path / "s", tiny_spec())
    assert names(tmp_path) == {"s"}
    assert verify(tmp_path / "s").id


def test_what_is_in_the_way_of_the_partial_directory_is_not_touched(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("keep")
    for partial in (lambda p: p.write_text("keep"), lambda p: p.symlink_to(tmp_path / "precious")):
        partial(tmp_path / "s.partial")
        with pytest.raises(UsageError, match="in the way"):
            SnapshotWriter(tmp_path / "s", spec, 1)
        (tmp_path / "s.partial").unlink()
    assert (tmp_path / "precious/file").read_text() == "keep"


def test_a_target_that_appears_meanwhile_is_kept(
    tmp_path: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def appear(descriptor: int) -> None:
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s/mine").write_text("keep")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises(UsageError, match="Cannot write to"):
        make_snapshot(tmp_path / "s", spec)
    assert names(tmp_path) == {"s"}
    assert names(tmp_path / "s") == {"mine"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_bytes_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    spec = tiny_spec(width=256, vocab_size=6000, layers=1)
    size = plan_rank([(tensor, "float32") for tensor in stored_tensors(spec, 1, 0)]).size
    written = [0]
    write = os.writev

    def fill(descriptor: int, parts: list[memoryview]) -> int:
        written[0] += sum(map(len, parts))
        if written[0] > 5_000_000:
            raise OSError(code, os.strerror(code))
        return write(descriptor, parts)

    monkeypatch.setattr(os, "writev", fill)
    with pytest.raises(HostError, match=f"needs {size} bytes") as error:
        make_snapshot(tmp_path / "s", spec)
    assert os.strerror(code) in error.value.why
    assert error.value.exit_code == 6
    assert names(tmp_path) == set()


def test_a_rank_file_is_written_in_whole_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in no more pieces at once than the system takes."""
    write, sizes = os.writev, []

    def spied(descriptor: int, parts: list[memoryview]) -> int:
        sizes.append((len(parts), sum(map(len, parts))))
        return write(descriptor, parts)

    monkeypatch.setattr(os, "writev", spied)
    make_snapshot(tmp_path / "large", tiny_spec(width=256, vocab_size=6000, layers=1))
    assert len(sizes) > 2 and all(size % (2 << 20) == 0 for _, size in sizes[:-1])
    sizes.clear()
    monkeypatch.setattr("fgsnap.snapshot.writing.HUGE_PAGE", 1 << 40)
    make_snapshot(tmp_path / "many", tiny_spec(layers=200))
    assert max(count for count, _ in sizes) == 1024 and len(sizes) > 1


def test_writes_that_take_less_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(layers=2)
    whole = make_snapshot(tmp_path / "whole", spec)
    write = os.writev
    monkeypatch.setattr("fgsnap.snapshot.writing.HUGE_PAGE", 4096)
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: write(descriptor, [parts[0][:1000]]))
    assert make_snapshot(tmp_path / "short", spec) == whole
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert all((tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


@pytest.mark.parametrize("refused", range(12))
def test_no_write_that_fails_leaves_a_descriptor_or_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """Header, slabs, the gap at the end, chunk digests, texts, manifest: each is refused once."""
    calls = [0]

    def fills(write):
        def fill(descriptor: int, data) -> int:
            calls[0] += 1
            if calls[0] == refused + 1:
                raise OSError(errno.ENOSPC, "full")
            return write(descriptor, data)

        return fill

    threads, descriptors = threading.active_count(), names(Path("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fills(os.write))
        patched.setattr(os, "writev", fills(os.writev))
        patched.setattr("fgsnap.snapshot.writing.HUGE_PAGE", 4096)  # so that a tiny file takes several writes
        with pytest.raises(HostError, match="No room to write"):
            make_snapshot(tmp_path / "s", tiny_spec(layers=1), text_files={"config.json": b"{}"})
    gc.collect()
    assert threading.active_count() == threads and names(Path("/proc/self/fd")) == descriptors
    assert names(tmp_path) == set()


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = list(real)[:11]
    fields[4] = 2  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(HostError, match="No room to write"):
        make_snapshot(tmp_path / "s", spec)
    assert names(tmp_path) == set()


def test_a_file_size_limit_of_the_process_counts_as_a_full_disk(tmp_path: Path) -> None:
    script = BUILD.replace(
        "print(", f"resource.setrlimit(resource.RLIMIT_FSIZE, (9000, {resource.RLIM_INFINITY}))\n    print("
    )
    result = subprocess.run(
        [sys.executable, "-c", "import resource\n" + textwrap.dedent(script), str(tmp_path / "s"), "022"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = next(line for line in result.stderr.splitlines() if "HostError" in line)
    assert f"HostError: No room to write {tmp_path}" in said
    assert "rank-00000-of-00002.safetensors: it needs 44672 bytes" in said
    assert names(tmp_path) == set()


def test_an_unpublished_directory_opens_for_its_own_writer_only(tmp_path: Path, spec: DecoderSpec) -> None:
    opened: list[str] = []

    class Watching(SnapshotWriter):
        def publish(self, canary: Canary | None) -> Path:
            with open_snapshot(self.directory, committed=False) as snapshot:
                opened.append(snapshot.id)
            with pytest.raises(SnapshotRefused, match="not a finished snapshot"):
                open_snapshot(self.directory)
            return super().publish(canary)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.snapshots.SnapshotWriter", Watching)
        identity = make_snapshot(tmp_path / "s", spec)
    assert opened == [identity]


def test_the_directory_can_be_copied_and_renamed(tmp_path: Path) -> None:
    identity = make_snapshot(tmp_path / "s", tiny_spec(), 2)
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    (tmp_path / "u").symlink_to(tmp_path / "t")
    assert verify(tmp_path / "u").id == identity


# A reader made from docs/format.md alone, without fgsnap's code


def read_logical_tensors(path: Path) -> dict[str, np.ndarray]:
    """All logical tensors of a snapshot of one dtype, for what the document promises."""

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    commit = json.loads((path / "snapshot.json").read_bytes())
    assert commit["format"] == 1 and set(commit["requires"]) <= {"layout.words32"}
    raw = (path / "manifest.json").read_bytes()
    assert digest(raw) == commit["manifest"] == commit["id"]
    manifest = json.loads(raw)
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert (len(data), digest(data)) == (entry["bytes"], entry["sha256"])
        if entry["chunks"]:
            chunks = (path / name.replace(".safetensors", ".chunks")).read_bytes()
            assert digest(chunks) == entry["chunks"]
            assert chunks == b"".join(blake3(data[at : at + 4194304]).digest() for at in range(0, len(data), 4194304))
    extents: dict[str, list[int]] = {}
    slices = []
    for entry in manifest["tensors"]:
        data = (path / entry["file"]).read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
        stored = as_stored(data, **entry)
        for segment in entry["segments"]:
            axis, start, stop, offset = (segment[key] for key in ("axis", "start", "stop", "offset"))
            part = stored.take(range(offset, offset + stop - start), axis)
            if segment["tensor"] is None:
                assert not part.any()
                continue
            extent = extents.setdefault(segment["tensor"], list(part.shape))
            extent[axis] = max(extent[axis], stop)
            slices.append((segment["tensor"], axis, start, stop, part))
    logical = {name: np.zeros(extent, slices[0][-1].dtype) for name, extent in extents.items()}
    for name, axis, start, stop, part in slices:
        logical[name][(slice(None),) * axis + (slice(start, stop),)] = part
    return logical


def as_stored(data: bytes, dtype: str, shape: list[int], layout: str, **_: object) -> np.ndarray:
    kind = {"float32": "<f4", "bfloat16": "<u2"}[dtype]
    if layout == "row":
        return np.frombuffer(data, kind).reshape(shape)
    rows, words = shape[0], shape[1] * np.dtype(kind).itemsize // 4
    panels = -(-rows // 32)
    packed = np.frombuffer(data, "<u4").reshape(panels, words, 32).swapaxes(1, 2)
    return np.ascontiguousarray(packed).reshape(panels * 32, words)[:rows].view(kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["row", "words32"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_document_is_enough_to_write_a_reader(tmp_path: Path, tp: int, layout: str, dtype: str) -> None:
    spec = tiny_spec(qkv_bias=True, mlp_bias=True)
    weights = random_weights(spec, dtype)
    make_snapshot(tmp_path / "s", spec, tp, dtype, weights=weights, text_files=TEXT, layout=layout)
    read = read_logical_tensors(tmp_path / "s")
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array, name)


if __name__ == "__main__":
    SCHEMA.write_text(schema())
