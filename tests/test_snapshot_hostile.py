"""Snapshots that are damaged, swapped, unfinished, too new or made to harm: each is refused, by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgsnap.errors import SnapshotRefused
from fgsnap.snapshot import CANARY, COMMIT, MANIFEST, Canary, canonical, open_snapshot, rank_file, verify
from tests.snapshots import make_snapshot, tiny_spec

TEXT = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}'}
SMALL = tiny_spec(width=4, heads=2, kv_heads=1, head_dim=2, inner=2, layers=1, vocab_size=7)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The smallest snapshot that has everything: two ranks, text, a canary, a padded vocabulary."""
    make_snapshot(tmp_path / "s", SMALL, 2, text_files=TEXT, canary=Canary("", [1, 2], [3, 4], [0.5, 1.5]))
    return tmp_path / "s"


def refused(action: Callable[[], object], match: str | None = None) -> None:
    with pytest.raises(SnapshotRefused, match=match) as error:
        action()
    assert len(error.value.lines()) == 3
    assert error.value.exit_code == 3


# One flipped byte


def test_every_flipped_byte_of_every_covered_file_is_refused(tmp_path: Path) -> None:
    """``verify`` sees any; opening already sees those of everything that opening reads."""
    small = tmp_path / "s"
    make_snapshot(small, SMALL, text_files=TEXT, canary=Canary("", [1, 2], [3, 4], [0.5, 1.5]))
    covered = [f for f in sorted(small.iterdir()) if f.name not in ("README.md", ".gitattributes")]
    assert len(covered) == 3 + len(TEXT) + 2
    for file in covered:
        data = file.read_bytes()
        seen_by_opening = 4096 if file.suffix == ".safetensors" else len(data) if file.name in (
            COMMIT, MANIFEST, CANARY,
        ) else 0  # fmt: skip
        with file.open("r+b", buffering=0) as out:
            for at in range(len(data)):
                os.pwrite(out.fileno(), bytes((data[at] ^ (1 << at % 8),)), at)
                with pytest.raises(SnapshotRefused):
                    (open_snapshot if at < seen_by_opening else verify)(small)
                os.pwrite(out.fileno(), data[at : at + 1], at)
    assert verify(small).canary


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_the_commit_matters(small: Path, bit: int) -> None:
    """Also those that only change the case of a letter or one kind of white space into another."""
    data = (small / COMMIT).read_bytes()
    for at in range(len(data)):
        (small / COMMIT).write_bytes(data[:at] + bytes((data[at] ^ 1 << bit,)) + data[at + 1 :])
        refused(lambda: open_snapshot(small))


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"x"])
def test_bytes_at_the_end_are_refused(small: Path, extra: bytes) -> None:
    for file in sorted(small.iterdir()):
        if file.name in ("README.md", ".gitattributes"):
            continue
        data = file.read_bytes()
        file.write_bytes(data + extra)
        refused(lambda: open_snapshot(small))
        file.write_bytes(data)


def test_uncovered_files_may_change(small: Path) -> None:
    (small / "README.md").write_text("my own words")
    (small / ".gitattributes").unlink()
    (small / "notes.txt").write_text("more")
    assert verify(small).id


# Files missing, cut, swapped or not files at all


def test_a_missing_file_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    for name in sorted(f.name for f in small.iterdir() if f.name not in ("README.md", ".gitattributes")):
        shutil.copytree(small, tmp_path / "t")
        (tmp_path / "t" / name).unlink()
        refused(lambda: open_snapshot(tmp_path / "t"), re.escape(name))
        shutil.rmtree(tmp_path / "t")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 4095, 4096, 4097, 8191, -1])
def test_a_truncated_rank_file_is_refused(small: Path, keep: int) -> None:
    file = small / rank_file(1, 2)
    os.truncate(file, keep if keep >= 0 else file.stat().st_size - 1)
    refused(lambda: open_snapshot(small), rank_file(1, 2))


def test_every_truncated_json_is_refused(small: Path) -> None:
    for name in (COMMIT, MANIFEST, CANARY):
        data = (small / name).read_bytes()
        for keep in range(0, len(data), 7):
            (small / name).write_bytes(data[:keep])
            refused(lambda: open_snapshot(small))
        (small / name).write_bytes(data)


def test_swapped_ranks_are_refused_when_opening(small: Path) -> None:
    """Both have the same tensors, shapes and size."""
    first, second = small / rank_file(0, 2), small / rank_file(1, 2)
    assert first.stat().st_size == second.stat().st_size
    first.rename(small / "aside")
    second.rename(first)
    (small / "aside").rename(second)
    refused(lambda: open_snapshot(small), "header of rank-00000-of-00002")


def test_a_rank_file_of_another_snapshot_is_refused(small: Path, tmp_path: Path) -> None:
    make_snapshot(tmp_path / "other", SMALL, 2, seed=5)
    shutil.copy(tmp_path / "other" / rank_file(0, 2), small)
    refused(lambda: verify(small), "damaged in chunk 0")
    shutil.copy(tmp_path / "other" / "rank-00000-of-00002.chunks", small)
    refused(lambda: verify(small), r"chunks does not have the digest")


@pytest.mark.parametrize(
    "stray", ["rank-00002-of-00002.safetensors", "rank-00000-of-00003.chunks", "model.safetensors"]
)
def test_a_stray_weight_file_is_refused(small: Path, stray: str) -> None:
    (small / stray).write_bytes(b"x")
    refused(lambda: verify(small), re.escape(stray))


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "directory"])
def test_what_is_not_a_regular_file_is_refused_without_waiting(small: Path, tmp_path: Path, kind: str) -> None:
    for file in sorted(small.iterdir()):
        if file.name in ("README.md", ".gitattributes"):
            continue
        file.rename(tmp_path / "aside")
        if kind == "link":
            file.symlink_to(tmp_path / "aside")
        elif kind == "dangling":
            file.symlink_to(tmp_path / "nowhere")
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()
        refused(lambda: open_snapshot(small), "is not a regular file")
        file.rmdir() if kind == "directory" else file.unlink()
        (tmp_path / "aside").rename(file)


def test_an_ordinary_directory_is_no_snapshot(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: open_snapshot(tmp_path), "not a finished snapshot")


def test_a_canary_nobody_knows_of_is_refused(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", SMALL)
    (tmp_path / "s" / CANARY).write_text("{}")
    refused(lambda: open_snapshot(tmp_path / "s"), "knows of none")


# Manifests whose digests are right, as a malicious writer makes them


def commit(path: Path, manifest: bytes, **changes: Any) -> None:
    """Replace the manifest and renew the digests, without a canary."""
    digest = hashlib.sha256(manifest).hexdigest()
    (path / MANIFEST).write_bytes(manifest)
    (path / CANARY).unlink(missing_ok=True)
    values = {"format": 1, "requires": [], "id": digest, "manifest": digest, "canary": None}
    (path / COMMIT).write_bytes(canonical(values | changes))


def load(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def put(manifest: Any, place: tuple, value: Any) -> None:
    for key in place[:-1]:
        manifest = manifest[key]
    manifest[place[-1]] = value


RANK = rank_file(0, 2)
LIES: dict[str, tuple[tuple, Any, str]] = {
    "tp-zero": (("tp",), 0, "2 rank files for 0 ranks"),
    "tp-negative": (("tp",), -2, "2 rank files for -2 ranks"),
    "tp-huge": (("tp",), 10**12, "2 rank files for 1000000000000 ranks"),
    "tp-other": (("tp",), 1, "2 rank files for 1 ranks"),
    "offset-overlaps": (("tensors", 1, "offset"), 4096, "lies at 4096, where it cannot"),
    "offset-negative": (("tensors", 0, "offset"), -4096, "begins at -4096"),
    "offset-in-header": (("tensors", 0, "offset"), 0, "begins at 0"),
    "offset-unaligned": (("tensors", 2, "offset"), 8449, "lies at 8449"),
    "offset-beyond": (("tensors", 9, "offset"), 1 << 40, "where it"),
    "bytes": (("tensors", 0, "bytes"), 63, "has 63 bytes for shape"),
    "dtype": (("tensors", 0, "dtype"), "bfloat16", "has 64 bytes for shape"),
    "dtype-unknown": (("tensors", 0, "dtype"), "int8", "cannot be read"),
    "shape": (("tensors", 0, "shape"), [8, 2], r"its spec says \[4, 4\]"),
    "shape-negative": (("tensors", 0, "shape"), [-4, -4], "its spec says"),
    "name": (("tensors", 0, "name"), "layers.0.out.weight", "where embed.weight"),
    "tensor-file": (("tensors", 0, "file"), "../../etc/passwd", "where embed.weight"),
    "layout": (("tensors", 0, "layout"), "tile16", "cannot be read.*layout"),
    "layout-unnamed": (("tensors", 0, "layout"), "words32", "'layout.words32', but requires does not name it"),
    "segments-none": (("tensors", 0, "segments"), [], "segments that its spec does not imply"),
    "segment-range": (("tensors", 0, "segments", 0, "stop"), 1 << 60, "segments that"),
    "segment-tensor": (("tensors", 0, "segments", 0, "tensor"), "head.weight", "segments that"),
    "segment-field": (("tensors", 0, "segments", 0, "stride"), 2, "unknown field `stride`"),
    "file-absolute": (("files", "/etc/passwd"), {"bytes": 1, "sha256": "", "chunks": None}, "'/etc/passwd' is not a"),
    "file-parent": (("files", "../up"), {"bytes": 1, "sha256": "", "chunks": None}, "'../up' is not a"),
    "file-dots": (("files", ".."), {"bytes": 1, "sha256": "", "chunks": None}, "'..' is not a"),
    "file-empty": (("files", ""), {"bytes": 1, "sha256": "", "chunks": None}, "'' is not a"),
    "file-nul": (("files", "a\0b"), {"bytes": 1, "sha256": "", "chunks": None}, "is not a name"),
    "file-newline": (("files", "a\n"), {"bytes": 1, "sha256": "", "chunks": None}, "is not a name"),
    "file-hidden": (("files", ".bashrc"), {"bytes": 1, "sha256": "", "chunks": None}, "is not a name"),
    "file-long": (("files", "a" * 300), {"bytes": 1, "sha256": "", "chunks": None}, "is not a name"),
    "file-itself": (("files", MANIFEST), {"bytes": 1, "sha256": "", "chunks": None}, "is not a name"),
    "file-chunks": (
        ("files", "rank-00000-of-00002.chunks"), {"bytes": 1, "sha256": "", "chunks": None}, "3 rank files",
    ),
    "file-third-rank": (("files", rank_file(2, 2)), {"bytes": 1, "sha256": "", "chunks": ""}, "3 rank files"),
    "file-absent": (("files", "vocab.txt"), {"bytes": 1, "sha256": "", "chunks": None}, r"vocab\.txt is missing"),
    "file-size": (("files", RANK, "bytes"), 1 << 20, "the file has 1048576 bytes"),
    "file-negative": (("files", RANK, "bytes"), -1, "cannot have -1 bytes"),
    "text-size": (("files", "config.json", "bytes"), 1 << 40, r"config\.json has 2 bytes, not"),
    "rank-without-chunks": (("files", RANK, "chunks"), None, "rank files have chunk digests"),
    "text-with-chunks": (("files", "config.json", "chunks"), "00", "rank files have chunk digests"),
    "heads-zero": (("spec", "layer_kinds", 0, "attention", "heads"), 0, "heads is 0, not positive"),
    "kv-heads-zero": (("spec", "layer_kinds", 0, "attention", "kv_heads"), 0, "kv_heads is 0, not positive"),
    "heads-other": (("spec", "layer_kinds", 0, "attention", "heads"), 7, "its spec says"),
    "inner-too-small": (("spec", "layer_kinds", 0, "mlp", "inner"), 1, "does not divide"),
    "heads-uneven": (("spec", "layer_kinds", 0, "attention", "kv_heads"), 3, "2 heads cannot share 3"),
    "head-dim-negative": (("spec", "layer_kinds", 0, "attention", "head_dim"), -2, "out of range"),
    "width-huge": (("spec", "width"), 10**30, "out of range|cannot be read"),
    "width-other": (("spec", "width"), 5, r"project_in\.weight .* belongs"),
    "vocabulary-huge": (("spec", "vocab_size"), 1 << 47, "its spec says"),
    "no-layers": (("spec", "layers"), [], "layers is 0"),
    "layer-index": (("spec", "layers"), [1], "layer kind that does not exist"),
    "layer-index-negative": (("spec", "layers"), [-1], "out of range"),
    "rope-index": (("spec", "layer_kinds", 0, "attention", "rope"), 9, "rope that does not exist"),
    "rope-theta": (("spec", "ropes", 0, "theta"), 0.0, r"ropes\[0\]\.theta is 0\.0, not positive"),
    "spec-field": (("spec", "layer_kinds", 0, "attention", "hyena"), 1, r"unknown field `hyena`.*s\[0\]\.attention"),
    "spec-feature": (("spec", "layer_kinds", 0, "attention", "sinks"), True, r"sinks\.weight .* belongs"),
    "bos": (("text", "bos_token_id"), 7, "outside the vocabulary"),
    "bos-missing": (("text", "add_bos"), True, "add_bos is set"),
    "format": (("format",), 2, "snapshot format 2"),
    "format-type": (("format",), "1", "cannot be read"),
    "requires": (("requires",), ["packed.tiles"], "requires 'packed.tiles'"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_manifest_is_refused(small: Path, lie: str) -> None:
    place, value, message = LIES[lie]
    manifest = load(small)
    put(manifest, place, value)
    commit(small, canonical(manifest))
    refused(lambda: open_snapshot(small), message)
    refused(lambda: open_snapshot(small, committed=False), message)


PACKED_LIES: dict[str, tuple[tuple, Any, str]] = {
    "row": (("tensors", 0, "layout"), "row", r"has 512 bytes for shape \[4, 4\]"),
    "bytes-of-rows": (("tensors", 0, "bytes"), 64, r"has 64 bytes for shape \[4, 4\]"),
    "bytes-of-more-panels": (("tensors", 0, "bytes"), 1024, "has 1024 bytes for shape"),
    "vector": (("tensors", 1, "layout"), "words32", r"has layout words32, which shape \[4\] does not fit"),
    "half-words": (("tensors", 6, "dtype"), "bfloat16", r"has layout words32, which shape \[4, 1\] does not fit"),
    "padded-shape": (("tensors", 0, "shape"), [32, 4], r"its spec says \[4, 4\]"),
    "unnamed": (("requires",), [], "'layout.words32', but requires does not name it"),
}  # fmt: skip


@pytest.mark.parametrize("lie", PACKED_LIES)
def test_a_manifest_that_lies_about_packed_tensors_is_refused(tmp_path: Path, lie: str) -> None:
    make_snapshot(tmp_path / "s", SMALL, 2, layout="words32")
    manifest = load(tmp_path / "s")
    commit(tmp_path / "s", canonical(manifest), requires=manifest["requires"])
    open_snapshot(tmp_path / "s").close()
    place, value, message = PACKED_LIES[lie]
    put(manifest, place, value)
    commit(tmp_path / "s", canonical(manifest), requires=manifest["requires"])
    refused(lambda: open_snapshot(tmp_path / "s"), message)


def test_a_layout_that_takes_as_many_bytes_is_refused_by_the_header(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(vocab_size=64))
    manifest = load(tmp_path / "s")
    put(manifest, ("tensors", 0, "layout"), "words32")
    manifest["requires"] = ["layout.words32"]
    commit(tmp_path / "s", canonical(manifest), requires=manifest["requires"])
    refused(lambda: open_snapshot(tmp_path / "s"), "header of rank-00000-of-00001")


def test_ranks_of_different_layouts_are_refused(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "s", tiny_spec(vocab_size=64), 2, layout="words32")
    manifest = load(tmp_path / "s")
    manifest["tensors"][0]["layout"] = "row"
    commit(tmp_path / "s", canonical(manifest), requires=manifest["requires"])
    refused(lambda: open_snapshot(tmp_path / "s"), "is float32 row in one rank and float32 words32 in another")


def test_an_older_reader_refuses_packed_tensors_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_snapshot(tmp_path / "s", SMALL, layout="words32")
    monkeypatch.setattr("fgsnap.snapshot.reading.KNOWN_FEATURES", frozenset())
    refused(lambda: open_snapshot(tmp_path / "s"), "requires 'layout.words32'")


def test_duplicate_missing_and_further_tensors_are_refused(small: Path) -> None:
    manifest = load(small)
    tensors = manifest["tensors"]
    for wrong in (tensors[:1] + tensors, tensors[1:], tensors[:-1], tensors + tensors[-1:], [], tensors[::-1]):
        commit(small, canonical(manifest | {"tensors": wrong}))
        refused(lambda: open_snapshot(small))


def test_ranks_of_different_dtypes_are_refused(small: Path) -> None:
    manifest = load(small)
    rank = [t for t in manifest["tensors"] if t["file"] == rank_file(1, 2)]
    rank[-1].update(dtype="bfloat16", bytes=rank[-1]["bytes"] // 2)
    manifest["files"][rank_file(1, 2)]["bytes"] -= rank[-1]["bytes"]
    commit(small, canonical(manifest))
    refused(lambda: open_snapshot(small), "is float32 row in one rank and bfloat16 row in another")


def test_a_header_that_disagrees_with_the_table_is_refused(small: Path) -> None:
    file = small / RANK
    data = file.read_bytes()
    for old, new in ((b'"F32"', b'"U32"'), (b"qkv", b"kvq"), (b"__pad.0", b"__pad.9"), (b"  ", b"\t ")):
        assert old in data[:4096]
        file.write_bytes(data.replace(old, new, 1))
        refused(lambda: open_snapshot(small), "header of rank-00000")
    file.write_bytes(b"\xff" * 8 + data[8:])
    refused(lambda: open_snapshot(small), "header of rank-00000")


def test_optional_keys_of_a_later_writer_are_ignored(small: Path) -> None:
    manifest = load(small)
    manifest["notes"] = {"any": [1, 2]}
    manifest["text"]["think_token"] = 5
    manifest["provenance"]["signature"] = "x"
    commit(small, canonical(manifest), signed=True)
    assert open_snapshot(small).manifest.tp == 2


def test_a_newer_format_is_refused_before_anything_else_is_looked_at(small: Path) -> None:
    (small / COMMIT).write_bytes(canonical({"format": 2, "layers": "elsewhere"}))
    refused(lambda: open_snapshot(small), "snapshot format 2")
    (small / COMMIT).write_bytes(canonical({"format": 1, "requires": ["a", "b"], "id": 3}))
    refused(lambda: open_snapshot(small), "requires 'a', 'b'")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"{}"]
)
def test_what_is_no_manifest_is_refused(small: Path, text: bytes) -> None:
    commit(small, text)
    refused(lambda: open_snapshot(small), r"manifest\.json cannot be read")
    (small / COMMIT).write_bytes(text)
    refused(lambda: open_snapshot(small), r"snapshot\.json cannot be read")


@pytest.mark.parametrize("name", [COMMIT, MANIFEST])
def test_a_huge_json_is_refused_unread(small: Path, name: str) -> None:
    with (small / name).open("r+b") as file:
        file.truncate(1 << 40)
    refused(lambda: open_snapshot(small), f"{re.escape(name)} has 1099511627776 bytes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "0" * 64}, "another snapshot"),
        ({"tokens": [1]}, "not equally long"),
        ({"tokens": [], "next": [], "margins": []}, "not equally long"),
        ({"tokens": [1, 7]}, "outside the vocabulary"),
        ({"next": [1, -1]}, "outside the vocabulary"),
        ({"margins": ["a", "b"]}, "cannot be read"),
    ],
)
def test_a_lying_canary_is_refused(small: Path, change: dict, message: str) -> None:
    canary = canonical(json.loads((small / CANARY).read_text()) | change)
    (small / CANARY).write_bytes(canary)
    manifest = json.loads((small / COMMIT).read_text())
    (small / COMMIT).write_bytes(canonical(manifest | {"canary": hashlib.sha256(canary).hexdigest()}))
    refused(lambda: open_snapshot(small), message)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 20),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(-3, 20), max_size=3),
    st.just({}),
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [at, *(p for key, item in value.items() for p in places(item, (*at, key)))]
    if isinstance(value, list):
        return [at, *(p for index, item in enumerate(value) for p in places(item, (*at, index)))]
    return [at]


@pytest.mark.parametrize("layout", ["row", "words32"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_manifest_does_anything_but_open_or_be_refused(
    tmp_path: Path, layout: str, data: st.DataObject
) -> None:
    path = tmp_path / "s"
    if not path.exists():
        make_snapshot(path, SMALL, 2, text_files=TEXT, layout=layout)
        shutil.copy(path / MANIFEST, tmp_path / MANIFEST)
    manifest = load(tmp_path)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(manifest)[1:]))
        put(manifest, place, data.draw(VALUES))
    commit(path, canonical(manifest), requires=manifest.get("requires", []))
    try:
        open_snapshot(path).close()
    except SnapshotRefused:
        return
    kept = load(tmp_path)
    for harmless in ("provenance", "text"):
        manifest.pop(harmless, None), kept.pop(harmless)
    assert manifest["tensors"] == kept["tensors"]
