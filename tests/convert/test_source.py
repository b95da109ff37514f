"""Local checkpoints: what a folder offers, and every way in which its files can lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgsnap.convert.files import LocalFiles
from fgsnap.convert.folder import MAX_HEADER_BYTES, read_header
from fgsnap.convert.opening import open_source
from fgsnap.errors import NotFound, SourceError, UsageError
from tests.convert.checkpoints import CONFIG, entry, float_file, folder, sharded
from tests.convert.checkpoints import safetensors as file_of

INDEX = "model.safetensors.index.json"
PAIR = entry("F32", [2], 0, 8)


def refused(path: Path, words: str) -> SourceError:
    """Opening the folder fails with one clear error that says the words; returned for more checks."""
    with pytest.raises(SourceError) as caught:
        open_source(str(path))
    error = caught.value
    assert words in str(error)
    assert 1 <= len(error.lines()) <= 3
    assert all(len(line) < 300 for line in error.lines())
    return error


# What a sound checkpoint offers.


def test_rows_are_the_bytes_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((6, 5), np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "deep": rng.standard_normal((4, 3, 2), np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    source = open_source(str(folder(tmp_path / "m", safetensors.numpy.save(tensors))))
    assert (source.kind, source.label, source.revision, source.default_dtype) == ("hf", "local", None, None)
    assert source.config == CONFIG
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    for name, expected in tensors.items():
        assert source.tensors[name].dtype == str(expected.dtype)
        for start in range(len(expected) + 1):
            for stop in range(start, len(expected) + 1):
                np.testing.assert_array_equal(source.rows(name, start, stop), expected[start:stop])


def test_rows_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    source = open_source(str(folder(tmp_path, float_file(a=[1.0, 2.0, 3.0]))))
    whole, part = source.rows("a", 0, 3), source.rows("a", 1, 3)
    assert np.shares_memory(whole, part)
    assert not whole.flags.writeable
    assert whole.flags.c_contiguous
    source.close()
    assert whole.tolist() == [1.0, 2.0, 3.0]


def test_bfloat16_comes_as_bits_and_misaligned_data_is_fine(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("BF16", [2, 1], 0, 4)}).encode()
    header += b" " * (1 - len(header) % 2)
    source = open_source(str(folder(tmp_path, file_of(header, struct.pack("<HH", 0x3F80, 0xC000)))))
    assert (8 + len(header)) % 2 == 1
    assert source.tensors["a"].dtype == "bfloat16"
    assert source.rows("a", 0, 2).tolist() == [[0x3F80], [0xC000]]


def test_tensors_of_other_dtypes_are_listed_apart(tmp_path: Path) -> None:
    header = {"mask": entry("BOOL", [4], 0, 4), "ids": entry("I64", [1], 4, 12), "a": entry("F32", [1], 12, 16)}
    source = open_source(str(folder(tmp_path, file_of(header, bytes(16)))))
    assert source.others == {"mask": ("BOOL", (4,)), "ids": ("I64", (1,))}
    assert list(source.tensors) == ["a"]


def test_shards_make_one_checkpoint(tmp_path: Path) -> None:
    shards = {"m-1.safetensors": float_file(a=[1.0]), "m-2.safetensors": float_file(b=[2.0], c=[3.0])}
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    source = open_source(str(sharded(tmp_path, shards, weight_map)))
    assert {name: source.rows(name, 0, 1).tolist() for name in source.tensors} == {"a": [1.0], "b": [2.0], "c": [3.0]}
    expected = {"config.json", INDEX, *shards}
    digests = source.file_digests(lambda: None)
    assert digests == {name: blake3((tmp_path / name).read_bytes()).hexdigest() for name in sorted(expected)}


def test_what_a_hub_cache_calls_a_file_is_not_taken_for_its_digest(tmp_path: Path) -> None:
    data, snapshot = float_file(a=[1.0]), tmp_path / "snapshots" / "abc"
    claimed = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / claimed).write_bytes(data)
    folder(snapshot)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / claimed)
    source = open_source(str(snapshot))
    assert source.rows("a", 0, 1).tolist() == [1.0]
    assert source.file_digests(lambda: None)["model.safetensors"] == blake3(data).hexdigest()


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    source = open_source(str(folder(tmp_path)), config_only=True)
    assert source.config == CONFIG
    assert source.tensors == {}
    assert list(source.file_digests(lambda: None)) == ["config.json"]


def test_text_files_are_passed_on_unchanged(tmp_path: Path) -> None:
    texts = {"tokenizer.json": b'{"a": 1}\n', "generation_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    source = open_source(str(folder(tmp_path, float_file(a=[1.0]), tokenizer__py=b"x", notes__txt=b"x")))
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    assert source.text_files() == {"config.json": json.dumps(CONFIG).encode(), **texts}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "one"}}, b"one"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
                }
            },
            b"yes",
        ),
        ({"chat_template.json": {"chat_template": "json"}, "tokenizer_config.json": {"chat_template": "old"}}, b"json"),
        ({"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": "old"}}, b'"file"'),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tools", "template": "no"}]}}, None),
    ],
)
def test_the_chat_template_is_found_wherever_it_is(
    tmp_path: Path, files: dict[str, Any], expected: bytes | None
) -> None:
    folder(tmp_path, float_file(a=[1.0]))
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    found = open_source(str(tmp_path)).text_files()
    assert found.get("chat_template.jinja") == expected
    assert "chat_template.json" not in found


def test_reading_a_large_checkpoint_takes_no_anonymous_memory(tmp_path: Path) -> None:
    rows, width = 1 << 14, 1 << 12
    header = json.dumps({"a": entry("F32", [rows, width], 0, rows * width * 4)}).encode()
    with (folder(tmp_path) / "model.safetensors").open("wb") as file:
        file.write(file_of(header))
        file.truncate(8 + len(header) + rows * width * 4)
    source = open_source(str(tmp_path))
    before = anonymous_bytes()
    total = sum(int(source.rows("a", start, start + 1024).any()) for start in range(0, rows, 1024))
    assert total == 0
    assert anonymous_bytes() - before < 32 << 20


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


# Names on the command line.


@pytest.mark.parametrize(
    "name", ["", "none", "./none", "/none/such", "a/b/c", "none.gguf", "a/b.gguf", "x\0y", "n" * 5000]
)
def test_what_is_not_there_is_not_found(name: str) -> None:
    gguf = name.endswith(".gguf")
    with pytest.raises(NotFound, match=f"{name}' does not exist" if gguf else "There is no checkpoint"):
        open_source(name)


def test_a_config_that_is_not_json_is_named_with_its_folder(tmp_path: Path) -> None:
    (folder(tmp_path / "model") / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"model/config\.json is not JSON"):
        open_source(str(tmp_path / "model"))


def test_a_revision_needs_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--revision"):
        open_source(str(folder(tmp_path, float_file(a=[1.0]))), "main")


def test_a_single_weight_file_is_no_checkpoint(tmp_path: Path) -> None:
    folder(tmp_path, float_file(a=[1.0]))
    with pytest.raises(UsageError, match="is not a checkpoint") as caught:
        open_source(str(tmp_path / "model.safetensors"))
    assert "folder" in caught.value.next_step


# Folders that lack something.


def test_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(float_file(a=[1.0]))
    refused(tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("\ud800", "not JSON"),
        ('{"a":' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_config_that_is_not_an_object(tmp_path: Path, text: str, words: str) -> None:
    folder(tmp_path, float_file(a=[1.0]))
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refused(tmp_path, words).what


def test_pytorch_files_of_other_names_are_not_guessed_at(tmp_path: Path) -> None:
    folder(tmp_path, consolidated__00__pth=b"x")
    error = refused(tmp_path, "consolidated.00.pth")
    assert "pytorch_model.bin" in error.next_step and "safetensors" in error.next_step


def test_no_weights_at_all_and_weights_of_another_name(tmp_path: Path) -> None:
    refused(folder(tmp_path / "a"), "holds no weights")
    refused(folder(tmp_path / "b", adapter__safetensors=float_file(a=[1.0])), "adapter.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "c", ".gguf file itself")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = {"m-1.safetensors": float_file(a=[1.0])}
    refused(
        sharded(tmp_path, shards, {"a": "m-1.safetensors", "b": "m-2.safetensors"}),
        "The shard m-2.safetensors is missing",
    )


def test_a_pipe_or_a_folder_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(folder(tmp_path / "pipe") / "model.safetensors")
    refused(tmp_path / "pipe", "neither model.safetensors")
    (folder(tmp_path / "dir") / "model.safetensors").mkdir()
    refused(tmp_path / "dir", "neither model.safetensors")


ONE, TWO = "m-1.safetensors", "m-2.safetensors"


@pytest.mark.parametrize(
    ("tensor", "weight_map", "words"),
    [
        ("b", {"a": TWO, "b": ONE}, "it is in"),
        ("b", {"a": ONE, "b": TWO, "c": ONE}, "no shard holds it"),
        ("a", {"a": ONE, "b": TWO}, "is in two shards"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, tensor: str, weight_map: dict[str, str], words: str) -> None:
    shards = {ONE: float_file(a=[1.0]), TWO: float_file(**{tensor: [2.0]})}
    refused(sharded(tmp_path, shards, weight_map), words)


HOSTILE_NAMES = [
    *("../model.safetensors", "/etc/model.safetensors", "a/../b.safetensors", "sub/m.safetensors", "..\\m.safetensors"),
    *(
        "C:\\m.safetensors",
        "m.safetensors\0",
        "m\0.safetensors",
        "",
        ".",
        "..",
        ".hidden.safetensors",
        "-rf.safetensors",
    ),
    *("~/m.safetensors", "m.safetensors/", "m .safetensors", "m\n.safetensors", "x" * 300 + ".safetensors", "m.bin"),
    *("ｍ.safetensors", "m\u202e.safetensors", "$(id).safetensors", "m.safetensors.py", 7, None, ["m.safetensors"], {}),
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:24])
def test_hostile_shard_names_are_refused_before_any_file_is_touched(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(float_file(a=[1.0]))
    error = refused(sharded(tmp_path / "in", {}, {"a": name}), "unsafe shard")
    assert "\0" not in str(error)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    refused(sharded(tmp_path, {}, weight_map), "no weight_map")


# Headers that lie. Each row: the file, and words that the error must have.

HOSTILE_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "seven bytes": (bytes(7), "truncated"),
    "header beyond the file": (file_of({"a": PAIR}, bytes(8), length=1 << 20), "truncated"),
    "header of 2**63 bytes": (file_of({}, length=(1 << 64) - 1), "truncated"),
    "header of 17 MiB": (file_of(b" " * (MAX_HEADER_BYTES + 1)), "above the limit"),
    "not JSON": (file_of(b"{a}"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not JSON"),
    "nested": (file_of(b'{"a":' + b"[" * 100_000), "not JSON"),
    "a list": (file_of(b"[]"), "not a JSON object"),
    "long number": (file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'), "not JSON"),
    "twice": (file_of(b'{"a":%s,"a":%s}' % ((json.dumps(PAIR).encode(),) * 2), bytes(8)), "'a' twice"),
    "twice inside": (
        file_of(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "twice",
    ),
    "overlap": (file_of({"a": PAIR, "b": entry("F32", [2], 4, 12)}, bytes(12)), "overlaps"),
    "same bytes": (file_of({"a": PAIR, "b": PAIR}, bytes(8)), "overlaps"),
    "hole": (file_of({"a": PAIR, "b": entry("F32", [2], 16, 24)}, bytes(24)), "hole"),
    "hole at the start": (file_of({"a": entry("F32", [2], 8, 16)}, bytes(16)), "hole"),
    "truncated data": (file_of({"a": PAIR}, bytes(7)), "truncated"),
    "bytes after the end": (file_of({"a": PAIR}, bytes(9)), "longer than its tensors"),
    "dtype of another size": (file_of({"a": entry("F16", [2], 0, 8)}, bytes(8)), "cannot take"),
    "shape of another size": (file_of({"a": entry("F32", [3], 0, 8)}, bytes(8)), "cannot take"),
    "shape that wraps around": (file_of({"a": entry("F32", [1 << 62, 4], 0, 0)}), "cannot take"),
    "unknown dtype": (file_of({"a": entry("F31", [2], 0, 8)}, bytes(8)), "unknown dtype"),
    "dtype of another type": (file_of({"a": {**PAIR, "dtype": 7}}, bytes(8)), "unknown dtype"),
    "negative size": (file_of({"a": entry("F32", [-2], 0, 8)}, bytes(8)), "shape"),
    "size as float": (file_of({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "shape"),
    "size as bool": (file_of({"a": entry("F32", [True], 0, 4)}, bytes(4)), "shape"),
    "too many dimensions": (file_of({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)), "shape"),
    "backwards": (file_of({"a": entry("F32", [2], 8, 0)}, bytes(8)), "data_offsets"),
    "negative offset": (file_of({"a": entry("F32", [2], -8, 0)}, bytes(8)), "data_offsets"),
    "three offsets": (file_of({"a": {**PAIR, "data_offsets": [0, 8, 8]}}, bytes(8)), "data_offsets"),
    "offset beyond 2**63": (file_of({"a": entry("F32", [2], 1 << 63, (1 << 63) + 8)}, bytes(8)), "data_offsets"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "lacks dtype"),
    "no description": (file_of({"a": 5}, bytes(8)), "lacks dtype"),
    "NUL in a name": (file_of({"a\0b": PAIR}, bytes(8)), "name"),
    "line end in a name": (file_of({"a\nb": PAIR}, bytes(8)), "name"),
    "half a character in a name": (file_of(b'{"\\ud800":%s}' % json.dumps(PAIR).encode(), bytes(8)), "name"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    data, words = HOSTILE_HEADERS[case]
    error = refused(folder(tmp_path, data), words)
    assert "model.safetensors" in error.what


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path) -> None:
    many = file_of({f"t{index}": entry("F32", [0], 0, 0) for index in range(100_001)})
    refused(folder(tmp_path, many), "the limit")


VALID = float_file(first=[1.0, 2.0], second=[3.0], third=[4.0, 5.0, 6.0])


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        with pytest.raises(SourceError):
            read_header(LocalFiles(path.parent), path.name)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 25), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_is_refused_or_still_sound(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for at, value in changes:
        data[at] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    try:
        entries = read_header(LocalFiles(path.parent), path.name)
    except SourceError:
        return
    assert sum(item.bytes for item in entries) == 24
    assert all(item.offset + item.bytes <= len(data) for item in entries)


def test_a_template_with_half_a_character_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, float_file(a=[1.0]), tokenizer_config__json=b'{"chat_template": "\\ud800"}')
    with pytest.raises(SourceError, match="chat template"):
        open_source(str(tmp_path)).text_files()


def test_a_snapshot_is_not_converted_again(tmp_path: Path) -> None:
    (tmp_path / "snapshot.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    for config_only in (False, True):
        with pytest.raises(UsageError, match="is a snapshot already"):
            open_source(str(tmp_path), config_only=config_only)
