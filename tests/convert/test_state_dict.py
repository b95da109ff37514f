"""PyTorch's .bin files: read as torch wrote them, and never run, whatever they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert.files import LocalFiles
from fgsnap.convert.opening import open_source
from fgsnap.convert.pipeline import convert
from fgsnap.convert.source import FileTensor, Source
from fgsnap.convert.state_dict import MAX_BYTES, MAX_STEPS, MAX_TENSORS, read_state_dict
from fgsnap.errors import SourceError, UsageError
from tests.convert.models import CONFIG, DTYPES, folder, weights

BIN = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
OPT = {"intermediate_size": ..., "num_key_value_heads": ..., "ffn_dim": 80}


def rank_bytes(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.glob("rank-*.safetensors"))]


def source_of(path: Path, state: Any, **how: Any) -> Source:
    """The state dict as torch saves it, opened."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state, path / BIN, **how)
    return open_source(str(path))


def tensors_of(path: Path) -> list[FileTensor]:
    return read_state_dict(LocalFiles(path.parent), path.name)


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy()


# What a sound file offers.


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_opt_converts_to_the_bytes_of_its_safetensors(tmp_path: Path, dtype: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "safe", "opt", dtype, **OPT)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype])
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    other = shutil.copytree(checkpoint, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(state, other / BIN)
    for name, tp in (("safe", 2), ("bin", 2)):
        convert(str(tmp_path / name), tmp_path / f"{name}-snap", tp=tp, canary=False)
    assert rank_bytes(tmp_path / "bin-snap") == rank_bytes(tmp_path / "safe-snap")


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    convert(str(folder(tmp_path / "safe", CONFIG, tensors)), tmp_path / "safe-snap", canary=False)
    path = tmp_path / "bin"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    places = {name: f"pytorch_model-{at % 2 + 1:05d}-of-00002.bin" for at, name in enumerate(tensors)}
    for file in set(places.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if places[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert(str(path), tmp_path / "bin-snap", canary=False)
    assert rank_bytes(tmp_path / "bin-snap") == rank_bytes(tmp_path / "safe-snap")
    digests = open_source(str(path)).file_digests(lambda: None)
    files = {"config.json", INDEX, *places.values()}
    assert digests == {file: blake3((path / file).read_bytes()).hexdigest() for file in files}


def test_safetensors_come_first(tmp_path: Path) -> None:
    path = folder(tmp_path, CONFIG, weights(CONFIG))
    (path / BIN).write_bytes(b"not read")
    assert BIN not in open_source(str(path)).file_digests(lambda: None)


def test_every_dtype_parameter_and_ordered_dict_with_metadata(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict(
        single=torch.randn(5, 3, generator=generator),
        half=torch.randn(4, 2, generator=generator).half(),
        brain=torch.randn(7, generator=generator).bfloat16(),
        parameter=torch.nn.Parameter(torch.randn(3, 3, generator=generator)),
        scalar=torch.tensor(-1e9),
        byte=torch.arange(9, dtype=torch.uint8).reshape(3, 3),
        long=torch.arange(3),
        double=torch.ones(2, dtype=torch.float64),
        mask=torch.ones(2, 2, dtype=torch.bool),
        empty=torch.empty(0, 3),
    )
    state._metadata = OrderedDict({"": {"version": 1}, "inner": {"version": 2}})
    for protocol in (2, 3, 4, 5):
        source = source_of(tmp_path / str(protocol), state, pickle_protocol=protocol)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        assert {name: tensor.shape for name, tensor in [*source.tensors.items(), *source.others.items()]} == shapes
        assert {name: other.dtype for name, other in source.others.items()} == {
            "byte": "U8", "long": "I64", "double": "F64", "mask": "BOOL",
        }  # fmt: skip
        for name in ("single", "half", "parameter", "byte"):
            np.testing.assert_array_equal(source.rows(name, 1, 3), state[name][1:3].detach().numpy())
        np.testing.assert_array_equal(source.rows("brain", 2, 7).view(np.int16), bits(state["brain"][2:7]))
        assert source.rows("scalar", 0, 1).tolist() == [state["scalar"].item()]


def test_views_of_one_storage(tmp_path: Path) -> None:
    """Tied, cut and turned tensors are read as torch reads them; only the turned ones are copied for it."""
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    state = {
        "whole": whole, "tied": whole, "rows": whole[3:7], "columns": whole[:, 2:5], "turned": whole.t(),
        "steps": whole[::2], "axes": whole.reshape(5, 2, 6).permute(2, 0, 1), "one": whole[:, :1],
    }  # fmt: skip
    source = source_of(tmp_path, state)
    assert sum("/data/" in name for name in zipfile.ZipFile(tmp_path / BIN).namelist()) == 1
    for name, tensor in state.items():
        assert source.tensors[name].shape == tuple(tensor.shape)
        for start in range(len(tensor) + 1):
            found = source.rows(name, start, len(tensor))
            np.testing.assert_array_equal(found, tensor[start:].numpy())
            assert found.flags.c_contiguous
    assert np.shares_memory(source.rows("whole", 0, 10), source.rows("tied", 0, 10))
    assert np.shares_memory(source.rows("whole", 0, 10), source.rows("rows", 0, 4))


def test_an_archive_beyond_four_gibibytes(tmp_path: Path) -> None:
    """PyTorch leaves the values out where it is told to, and the file without blocks for them."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        state = {"large": torch.empty(5, 1 << 30, dtype=torch.uint8), "behind": torch.empty(3)}
        source = source_of(tmp_path, state)
    file = tmp_path / BIN
    assert file.stat().st_size > 5 << 30 > file.stat().st_blocks * 512 << 10
    behind = next(tensor for tensor in tensors_of(file) if tensor.name == "behind")
    with file.open("r+b") as opened:
        opened.seek(behind.offset)
        opened.write(struct.pack("<3f", 1, 2, 3))
    assert behind.offset > 5 << 30
    assert source.rows("behind", 0, 3).tolist() == [1, 2, 3]
    assert source.rows("large", 4, 5)[0, -1] == 0
    assert torch.load(file, weights_only=True, mmap=True)["behind"].tolist() == [1, 2, 3]


def test_an_archive_that_was_packed_again(tmp_path: Path) -> None:
    """Another tool aligns nothing."""
    tensors = weights(CONFIG)
    convert(str(folder(tmp_path / "safe", CONFIG, tensors)), tmp_path / "safe-snap", canary=False)
    source_of(tmp_path / "bin", tensors)
    shutil.move(tmp_path / "bin" / BIN, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "bin" / BIN, "w") as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    assert any(tensor.offset % 2 for tensor in tensors_of(tmp_path / "bin" / BIN))
    convert(str(tmp_path / "bin"), tmp_path / "bin-snap", tp=1, canary=False)
    assert rank_bytes(tmp_path / "bin-snap") == rank_bytes(tmp_path / "safe-snap")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    source = source_of(tmp_path, weights(CONFIG))
    source.check_unchanged()
    os.utime(tmp_path / BIN, ns=(0, 0))
    with pytest.raises(SourceError, match="was changed"):
        source.check_unchanged()


# Files that torch can write and that are refused.


def refused(path: Path, words: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        tensors_of(path)
    error = caught.value
    assert words in str(error) and path.name in error.what, error
    assert 2 <= len(error.lines()) <= 3 and all(len(line) < 300 for line in error.lines())
    return error


def saved(path: Path, value: Any, **how: Any) -> Path:
    torch.save(value, path / BIN, **how)
    return path / BIN


NOT_TENSORS: dict[str, tuple[Any, str]] = {
    "a training checkpoint": ({"model": {"a": torch.ones(2)}, "epoch": 3}, "'model' is of type dict"),
    "a number": ({"a": torch.ones(2), "epoch": 3}, "'epoch' is of type int"),
    "a learning rate": ({"a": torch.ones(2), "lr": 0.5}, "'lr' is of type float"),
    "a list": ([torch.ones(2)], "content is of type list"),
    "a tensor": (torch.ones(2), "content is of type Tensor"),
    "numbers for names": ({0: torch.ones(2)}, "is no text"),
    "complex numbers": ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    "negated values": ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "unknown way"),
    "expanded values": ({"a": torch.ones(1).expand(4)}, "share their bytes"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
    "a module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "eight bits": ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "'torch."),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_more_than_plain_tensors(tmp_path: Path, case: str) -> None:
    value, words = NOT_TENSORS[case]
    refused(saved(tmp_path, value), words)


def test_the_format_before_torch_1_6_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "safetensors" in refused(path, "before 1.6").next_step


def test_a_single_file_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a checkpoint"):
        open_source(str(saved(tmp_path, {"a": torch.ones(2)})))


# Pickles that would run something.


def text(value: str) -> bytes:
    """A pickled text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def command(marker: Path) -> bytes:
    return f"touch {marker}".encode()


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    **{f"REDUCE in protocol {n}": (lambda marker, n=n: pickle.dumps({"a": Touch(marker)}, n)) for n in range(6)},
    "GLOBAL": lambda marker: b"\x80\x02cos\nsystem\n" + text(f"touch {marker}") + b"\x85R.",
    "INST": lambda marker: b"(V" + command(marker) + b"\nios\nsystem\n.",
    "OBJ": lambda marker: b"(cos\nsystem\nV" + command(marker) + b"\no.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_is_run(tmp_path: Path, case: str) -> None:
    marker = tmp_path / "ran"
    program = HOSTILE[case](marker)
    error = refused(archive(tmp_path / BIN, program), "")
    assert not marker.exists()
    assert "system" in error.what or "opcode" in error.what
    pickle.loads(program)
    assert marker.exists(), "the test's own pickle does nothing"


EMPTY_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FOREIGN: dict[str, tuple[bytes, str]] = {
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\0.", "opcode EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "opcode EXT4"),
    "PERSID": (b"Pstorage\n.", "opcode PERSID"),
    "LONG4": (b"\x80\x02\x8b\x04\0\0\0\1\2\3\4.", "opcode LONG4"),
    "BUILD of no dict": (b"\x80\x02]}b.", "state of its own"),
    "BUILD with slots": (b"\x80\x02}N}\x86b.", "state of its own"),
    "eval": (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
    "a name with dots": (
        b"\x80\x04" + text("torch") + text("_utils.importlib.os.system") + b"\x93.", "torch._utils.importlib.os.system",
    ),
    "another part of torch": (b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"),
    "a storage's class called": (b"\x80\x02ctorch\nFloatStorage\n)R.", "unknown way"),
    "a text called": (b"\x80\x02X\x01\0\0\0a)R.", "unknown way"),
    "a dict of arguments": (b"\x80\x02ccollections\nOrderedDict\n}R.", "unknown way"),
    "an OrderedDict of pairs": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "unknown way"),
    "a tensor of nothing": (b"\x80\x02" + EMPTY_TENSOR + b")R.", "unknown way"),
    "a strange storage": (b"\x80\x02X\x01\0\0\0aQ.", "unknown way"),
    "STACK_GLOBAL of numbers": (b"\x80\x04K\1K\2\x93.", "no text"),
    "no stack": (b"\x80\x020.", "opcode POP"),
    "an empty stack": (b"\x80\x02R.", "cannot be followed"),
    "more than one value": (b"\x80\x02}}.", "cannot be followed"),
    "nothing at all": (b"\x80\x02.", "cannot be followed"),
    "no mark": (b"\x80\x02t.", "cannot be followed"),
    "no memo": (b"\x80\x02h\x05.", "cannot be followed"),
    "no end": (b"\x80\x02}", "cannot be followed"),
    "an odd escape": (b"\x80\x02c\\os\nsystem\n.", "cannot be followed"),
    "an unknown opcode": (b"\x80\x02\xff.", "cannot be followed"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fab.", "cannot be followed"),
    "bytes longer than memory": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "cannot be followed"),
    "a number of many digits": (b"L" + b"9" * 100_000 + b"L\n.", "cannot be followed"),
    "a name twice": (b"\x80\x02}(X\1\0\0\0aNX\1\0\0\0aNu.", "twice"),
    "half a pair": (b"\x80\x02}(X\1\0\0\0au.", "cannot be followed"),
    "items of a list": (b"\x80\x02](X\1\0\0\0aNu.", "no dict"),
    "entries of a dict": (b"\x80\x02}Na.", "no list"),
    "a deep name": (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "no text"),
    "a deep value": (b"\x80\x02}X\1\0\0\0a)" + b"\x85" * 300_000 + b"s.", "type tuple"),
    "a value of 2**60 parts": (b"\x80\x02}X\1\0\0\0a(]" + b"".join(
        b"q%c](h%ch%ce" % (n, n, n) for n in range(60)) + b"ts.", "type tuple"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_pickle_that_is_no_state_dict(tmp_path: Path, case: str) -> None:
    program, words = FOREIGN[case]
    refused(archive(tmp_path / BIN, program), words)


def test_a_memo_of_billions_takes_no_memory(tmp_path: Path) -> None:
    assert tensors_of(archive(tmp_path / BIN, b"\x80\x02}r\xff\xff\xff\xff.")) == []


def test_a_description_without_end_is_not_read(tmp_path: Path) -> None:
    refused(archive(tmp_path / BIN, b"N" * (MAX_BYTES + 1)), "above the limit")


@pytest.mark.parametrize("program", [b"}", b"(N", b"]}a", b"N\x85"])
def test_a_description_of_too_many_steps_is_left_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes
) -> None:
    steps = 0

    def counted(pickle: bytes) -> Iterator[Any]:
        nonlocal steps
        for step in genops(pickle):
            steps += 1
            yield step

    genops = pickletools.genops
    monkeypatch.setattr(pickletools, "genops", counted)
    endless = program * (MAX_STEPS // len(program) + 1)
    refused(archive(tmp_path / BIN, b"\x80\x02" + endless + b"."), f"more than {MAX_STEPS} opcodes")
    assert steps == MAX_STEPS + 1


def test_the_first_hostile_shard_is_the_only_one_that_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = []

    def counted(pickle: bytes) -> Iterator[Any]:
        followed.append(pickle)
        return genops(pickle)

    genops = pickletools.genops
    monkeypatch.setattr(pickletools, "genops", counted)
    model = folder(tmp_path / "model", CONFIG, weights(CONFIG))
    (model / "model.safetensors").unlink()
    places = {str(number): f"{number}.bin" for number in range(16)}
    for file in places.values():
        archive(model / file, b"\x80\x02" + b"}" * MAX_STEPS + b".")
    (model / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(SourceError, match=r"data\.pkl of 0\.bin has more than"):
        open_source(str(model))
    assert len(followed) == 1


# Descriptions that lie about a storage of six float32.


def integer(value: int) -> bytes:
    """A pickled number."""
    return pickle.dumps(value, 2)[2:-1]


def described(
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    count: int = 6,
    key: str = "0",
    kind: str = "FloatStorage",
    name: str = "a",
) -> bytes:
    """A state dict of one tensor."""

    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    tensor = EMPTY_TENSOR + b"(" + storage + integer(offset) + sizes(shape) + sizes(strides) + b"\x89" + hooks + b"tR"
    return b"\x80\x02}" + text(name) + tensor + b"s."


def archive(path: Path, program: bytes, **entries: bytes) -> Path:
    """A .bin file of parts; keyword names spell ``/`` as ``__``."""
    parts = {"data.pkl": program, "version": b"3\n", "byteorder": b"little", "data/0": struct.pack("<6f", *range(6))}
    parts |= {name.replace("__", "/"): data for name, data in entries.items()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(f"archive/{name}", data)
    return path


def test_a_file_made_by_hand_is_read(tmp_path: Path) -> None:
    found = tensors_of(archive(tmp_path / BIN, described()))
    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.bytes) for tensor in found] == [("a", "F32", (2, 3), 24)]
    raw = (tmp_path / BIN).read_bytes()[found[0].offset :][:24]
    assert struct.unpack("<6f", raw) == (0, 1, 2, 3, 4, 5)
    assert torch.equal(torch.load(tmp_path / BIN, weights_only=True)["a"], torch.arange(6.0).reshape(2, 3))


def test_more_tensors_than_any_model_has_in_a_file(tmp_path: Path) -> None:
    names = b"".join(text(str(number)) + b"h\0" for number in range(MAX_TENSORS))
    program = described().removesuffix(b"s.") + b"q\0s(" + names + b"u."
    refused(archive(tmp_path / BIN, program), f"describes {MAX_TENSORS + 1} tensors")


def test_axes_of_one_index_or_none_may_state_any_stride(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for strides in ((1 << 62, 3, 1), (1 << 62, 1, 2)):
        archive(tmp_path / BIN, described(shape=(1, 2, 3), strides=strides))
        expected = torch.arange(6.0).as_strided((1, 2, 3), (0, *strides[1:]))
        np.testing.assert_array_equal(open_source(str(tmp_path)).rows("a", 0, 1), expected.numpy())
    archive(tmp_path / BIN, described(offset=9, shape=(2, 0, 3), strides=(1 << 62, 1, 5)))
    assert open_source(str(tmp_path)).rows("a", 0, 2).shape == (2, 0, 3)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "offset behind the end": ({"offset": 1}, "ends behind"),
    "rows too many": ({"shape": (3, 3)}, "ends behind"),
    "steps too wide": ({"strides": (4, 1)}, "ends behind"),
    "steps that wrap around": ({"strides": ((1 << 63) - 1, 1)}, "ends behind"),
    "sizes that wrap around": ({"shape": (1 << 62, 4), "strides": (4, 1)}, "ends behind"),
    "rows that overlap": ({"strides": (2, 1)}, "share their bytes"),
    "one element for all": ({"strides": (0, 0)}, "share their bytes"),
    "a size below 0": ({"shape": (-2, 3)}, "unknown way"),
    "a step below 0": ({"offset": 5, "strides": (-3, 1)}, "unknown way"),
    "an offset below 0": ({"offset": -1}, "unknown way"),
    "an offset of 2,000 bits": ({"offset": 1 << 2000}, "unknown way"),
    "a size of 2**63": ({"shape": (1 << 63, 0)}, "unknown way"),
    "fewer steps than sizes": ({"strides": (1,)}, "unknown way"),
    "too many axes": ({"shape": (1,) * 9, "strides": (1,) * 9}, "unknown way"),
    "a storage below 0": ({"count": -6}, "unknown way"),
    "a larger storage": ({"count": 7}, "has 24 bytes, too few for 7"),
    "a storage of wider numbers": ({"kind": "DoubleStorage"}, "has 24 bytes, too few for 6"),
    "no such storage": ({"key": "1"}, "has no 'data/1'"),
    "a path": ({"key": "../data.pkl"}, "has no 'data/../data.pkl'"),
    "an absolute path": ({"key": "/etc/passwd"}, "has no 'data//etc/passwd'"),
    "a name with a line end": ({"name": "a\nb"}, "no real name has"),
    "half a character": ({"name": "\ud800"}, "no real name has"),
    "an unknown storage": ({"kind": "QInt8Storage"}, "torch.QInt8Storage"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_description_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    changes, words = LIES[case]
    refused(archive(tmp_path / BIN, described(**changes)), words)


# Archives that lie.


def test_big_endian_weights_are_refused(tmp_path: Path) -> None:
    refused(archive(tmp_path / BIN, described(), byteorder=b"big"), "big-endian")


@pytest.mark.parametrize("entry", ["data.pkl", "data/0", "byteorder"])
def test_a_compressed_entry_is_refused(tmp_path: Path, entry: str) -> None:
    archive(tmp_path / "plain.bin", described())
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / BIN, "w") as file:
        for info in plain.infolist():
            kind = zipfile.ZIP_DEFLATED if info.filename.endswith(entry) else zipfile.ZIP_STORED
            file.writestr(info.filename, plain.read(info), kind)
    refused(tmp_path / BIN, "compressed")


def changed(path: Path, signature: bytes, name: str, at: int, value: bytes) -> Path:
    """The file with bytes of one entry's header changed, that in front of it or that in the table of contents."""
    data = bytearray(path.read_bytes())
    length = {b"PK\1\2": 46, b"PK\3\4": 30}[signature]
    begin = data.find(signature)
    while data[begin + length : begin + length + len(name)] != name.encode():
        begin = data.find(signature, begin + 1)
    data[begin + at : begin + at + len(value)] = value
    path.write_bytes(data)
    return path


CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"
BROKEN: dict[str, tuple[bytes, str, int, bytes, str]] = {
    "longer than its room": (CENTRAL, "archive/data/0", 20, struct.pack("<II", 25, 25), "not where"),
    "over the next entry": (CENTRAL, "archive/data.pkl", 20, struct.pack("<II", 400, 400), "not where"),
    "encrypted": (CENTRAL, "archive/data/0", 8, b"\1\0", "encrypted"),
    "another entry's place": (CENTRAL, "archive/data/0", 42, bytes(4), "not where"),
    "no entry's place": (CENTRAL, "archive/data/0", 42, b"\7\0\0\0", "not where"),
    "a place behind the end": (CENTRAL, "archive/data/0", 42, b"\xff\xff\xff\x7f", "not where"),
    "longer than the file": (CENTRAL, "archive/data/0", 20, struct.pack("<II", 1 << 30, 1 << 30), "not where"),
    "a name that differs": (LOCAL, "archive/data/0", 30, b"archive/data/1", "not where"),
    "extras behind the end": (LOCAL, "archive/data/0", 28, b"\xff\xff", "not where"),
    "a name outside": (CENTRAL, "archive/data/0", 46, b"/rchive/data/0", "outside"),
    "another folder": (CENTRAL, "archive/data/0", 46, b"brchive/data/0", "outside"),
    "twice": (CENTRAL, "archive/byteorder", 46, b"archive/data.pkl\0", "twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_archive_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    *where, words = BROKEN[case]
    refused(changed(archive(tmp_path / BIN, described()), *where), words)


NO_ARCHIVES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin"),
    "text": (b"<html>rate limited</html>", "does not begin"),
    "a pointer to large storage": (b"version https://git-lfs.github.com/spec/v1\n", "does not begin"),
    "a pickle": (pickle.dumps({}), "before 1.6"),
    "no table": (b"PK\3\4" + bytes(100), "table of contents"),
    "an empty archive": (b"PK\5\6" + bytes(18), "does not begin"),
    "a table of gigabytes": (
        b"PK\3\4" + bytes(MAX_BYTES + 200) + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, MAX_BYTES + 100, 50, 0),
        "larger than",
    ),
}


@pytest.mark.parametrize("case", NO_ARCHIVES)
def test_what_is_no_archive(tmp_path: Path, case: str) -> None:
    data, words = NO_ARCHIVES[case]
    (tmp_path / BIN).write_bytes(data)
    refused(tmp_path / BIN, words)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = archive(tmp_path / BIN, described()).read_bytes()
    for length in range(len(data)):
        (tmp_path / BIN).write_bytes(data[:length])
        with pytest.raises(SourceError):
            tensors_of(tmp_path / BIN)


def test_no_data_pkl(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / BIN, "w") as file:
        file.writestr("archive/version", b"3")
    refused(tmp_path / BIN, "has no 'data.pkl'")


def sound() -> bytes:
    buffer = io.BytesIO()
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    torch.save({"whole": whole, "part": whole[1:3], "turned": whole.t(), "half": whole.half()}, buffer)
    return buffer.getvalue()


SOUND = sound()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_file_is_refused_or_still_sound(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND)
    for at, value in changes:
        data[at] = value
    path = tmp_path / BIN
    path.write_bytes(data)
    try:
        found = tensors_of(path)
    except SourceError:
        return
    for tensor in found:
        strides = tensor.strides or ()
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=False))
        assert 0 <= tensor.offset <= tensor.offset + (reach if strides else tensor.bytes) <= len(data)


# Indices.


@pytest.mark.parametrize("name", ["model.safetensors", "../pytorch_model.bin", "/tmp/a.bin", "a.bin\0", "a.pkl", 7])
def test_hostile_shard_names_are_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="unsafe shard"):
        open_source(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}))
    with pytest.raises(SourceError, match=r"pytorch_model-00001-of-00001\.bin is missing"):
        open_source(str(tmp_path))
