"""What differs between two snapshots is found and told, whatever their degree and layout; what is equal is not read."""

from __future__ import annotations

import json
import math
import os
import re
import shutil

import msgspec
import numpy as np
import pytest

from fgsnap.cli import run_cli
from fgsnap.diff import WIDTH, diff, lines
from fgsnap.errors import NotFound, SnapshotRefused
from fgsnap.layout import logical_shapes
from fgsnap.snapshot import Canary, TextSection, comparing
from fgsnap.snapshot.comparing import Form, Row, Values, ranges
from fgsnap.spec import Llama3, Norm, Rope
from tests.snapshots import make_snapshot, random_weights, tiny_spec

SPEC = tiny_spec(qkv_bias=True)
TEXT = {"config.json": b'{"a": 1}', "tokenizer.json": b'{"model": {"vocab": {"x": 0}}}', "chat_template.jinja": b"hi"}
TWO_LAYOUTS = [(1, "row", 2, "row"), (2, "row", 4, "row"), (1, "row", 1, "words32"), (4, "words32", 2, "words32")]
replace = msgspec.structs.replace


def make(path, spec=SPEC, tp=1, **settings):
    make_snapshot(path, spec, tp, **{"text_files": TEXT, **settings})
    return str(path)


def with_a_flipped_bit(weights, name, at, bit=0):
    changed = weights[name].copy()
    changed.view(f"u{changed.itemsize}")[at] ^= 1 << bit
    return {**weights, name: changed}


def shown(found, **settings):
    return "\n".join(lines(found, **settings))


# Equal


def test_a_snapshot_and_itself(tmp_path, capsys):
    snap, told = make(tmp_path / "snap", canary=Canary("", [1], [2], [0.5])), []
    found = diff(snap, snap, progress=lambda *counts: told.append(counts))
    assert found.same and found.equal and found.tensors.by_digest == found.tensors.count == len(logical_shapes(SPEC))
    assert not told, "the digests tell"
    assert run_cli(["diff", snap, snap]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[2].startswith("The same snapshot")


@pytest.mark.parametrize(("tp", "layout", "other_tp", "other_layout"), TWO_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("values", [False, True])
def test_degree_and_layout_do_not_matter(tmp_path, tp, layout, other_tp, other_layout, dtype, values):
    one = make(tmp_path / "one", tp=tp, layout=layout, dtype=dtype)
    two = make(tmp_path / "two", tp=other_tp, layout=other_layout, dtype=dtype)
    found = diff(one, two, values=values)
    assert found.equal and not found.same
    assert not (found.spec or found.tensors.different or found.text)
    assert all(row.name.startswith("rank-") for row in found.files)
    told = {row.path: (row.a, row.b) for row in found.record}
    assert told.pop("tp", None) == ((tp, other_tp) if tp != other_tp else None)
    assert told.pop("layout", None) == ((layout, other_layout) if layout != other_layout else None)
    assert not told


def test_what_is_equal_by_its_digests_is_not_read(tmp_path):
    one = make(tmp_path / "one", tp=2)
    two = make(tmp_path / "two", tp=2, text=TextSection((0, 7)))
    told = []
    found = diff(one, two, progress=lambda *counts: told.append(counts))
    assert found.tensors.by_digest == found.tensors.count and not told
    assert found.text == (Row("eos_token_ids", (0,), (0, 7)),)
    assert not found.equal and not found.record


def test_what_lies_outside_of_changed_chunks_is_not_read(tmp_path):
    """Both snapshots are of one degree and layout, so that their chunks can be compared by their digests."""
    weights = random_weights(spec := tiny_spec(width=256, vocab_size=16 << 10, layers=1, tied=True))
    one = make(tmp_path / "one", spec, weights=weights)
    two = make(tmp_path / "two", spec, weights=with_a_flipped_bit(weights, "embed.weight", (4000, 3)))
    told = []
    found = diff(one, two, progress=lambda *counts: told.append(counts))
    assert [row.name for row in found.tensors.different] == ["embed.weight"]
    assert found.tensors.by_digest == found.tensors.count - 1
    assert told[-1] == (2 * weights["embed.weight"].nbytes,) * 2
    assert [row.name for row in found.files] == ["rank-00000-of-00001.safetensors"]


# Tensors


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("dtype", "bit"), [("float32", 0), ("bfloat16", 0), ("float16", 3)])
@pytest.mark.parametrize(
    ("name", "at"), [("layers.1.k.weight", (15, 31)), ("head.weight", (60, 0)), ("layers.0.q.bias", 5)]
)
def test_one_bit_of_one_weight(tmp_path, name, at, dtype, bit, values):
    weights = random_weights(SPEC, dtype)
    changed = with_a_flipped_bit(weights, name, at, bit)
    one = make(tmp_path / "one", dtype=dtype, weights=weights)
    two = make(tmp_path / "two", tp=4, dtype=dtype, weights=changed)
    found = diff(one, two, values=values)
    assert not found.equal and not found.spec
    (row,) = found.tensors.different
    assert row.name == name and row.a == row.b == Form(dtype, weights[name].shape)
    if values:
        a, b = (float(wide(each[name], dtype)[at]) for each in (weights, changed))
        assert row.values == Values(weights[name].size, 1, abs(a - b))
        assert f"1 of {weights[name].size}, by up to" in shown(found)
    else:
        assert row.values is msgspec.UNSET and "other numbers" in shown(found)


def wide(array, dtype):
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array.astype(np.float32)


@pytest.mark.parametrize("slab", [1, 700, 4 << 20])
def test_slabs_do_not_show(tmp_path, monkeypatch, slab):
    weights = random_weights(SPEC)
    changed = with_a_flipped_bit(with_a_flipped_bit(weights, "embed.weight", (0, 0)), "embed.weight", (60, 31))
    one, two = make(tmp_path / "one", weights=weights), make(tmp_path / "two", tp=2, weights=changed)
    monkeypatch.setattr(comparing, "SLAB", slab)
    for values in (False, True):
        told = []
        found = diff(one, two, values=values, progress=lambda *counts, told=told: told.append(counts))
        (row,) = found.tensors.different
        assert not values or (row.values.numbers, row.values.differing) == (61 * 32, 2)
        done, totals = zip(*told, strict=True)
        assert list(done) == sorted(done) and set(totals) == {done[-1]} == {2 * sum(w.nbytes for w in weights.values())}


def test_dtypes(tmp_path):
    """bfloat16 numbers are float32 numbers; with ``values`` it shows that they are the same."""
    narrow = random_weights(SPEC, "bfloat16")
    exact = {name: wide(value, "bfloat16") for name, value in narrow.items()}
    other = {**exact, "final_norm.weight": exact["final_norm.weight"] + np.float32(2**-20)}
    one = make(tmp_path / "one", dtype="bfloat16", weights=narrow)
    two = make(tmp_path / "two", tp=2, weights=other)
    found, measured = diff(one, two), diff(one, two, values=True)
    for each in (found, measured):
        assert not each.equal and len(each.tensors.different) == each.tensors.count
    assert all(row.values is msgspec.UNSET for row in found.tensors.different)
    values = {row.name: row.values for row in measured.tensors.different}
    assert values.pop("final_norm.weight") == Values(32, 32, 2**-20)
    assert not any(value.differing for value in values.values())
    assert "bfloat16 61x32  float32 61x32" in shown(found)
    assert "float32 61x32: the same numbers" in shown(measured)


def test_numbers_that_are_none(tmp_path):
    weights = random_weights(SPEC)
    odd = weights["embed.weight"].copy()
    odd[0, :4] = np.nan, np.inf, -np.inf, 0.0
    other = odd.copy()
    other[0, :4] = 1.0, -np.inf, -np.inf, -0.0
    other[1, 0] += 1.0
    one = make(tmp_path / "one", weights={**weights, "embed.weight": odd})
    two = make(tmp_path / "two", weights={**weights, "embed.weight": other})
    (row,) = diff(one, two, values=True).tensors.different
    assert row.values == Values(61 * 32, 4, math.inf)
    assert json.loads(msgspec.json.encode(row))["values"]["largest"] is None


def test_tensors_that_one_side_lacks_or_has_in_another_shape(tmp_path):
    one = make(tmp_path / "one", tiny_spec(tied=True))
    two = make(tmp_path / "two", tiny_spec(inner=64))
    for values in (False, True):
        found = diff(one, two, values=values)
        rows = {row.name: row for row in found.tensors.different}
        assert rows["head.weight"].a is msgspec.UNSET and rows["head.weight"].b == Form("float32", (61, 32))
        assert rows["layers.0.down.weight"].a.shape == (32, 48) and rows["layers.0.down.weight"].b.shape == (32, 64)
        assert rows["layers.0.down.weight"].values is msgspec.UNSET
        assert "embed.weight" not in rows
    text = shown(found)
    assert re.search(r"^  head\.weight +-  +float32 61x32$", text, re.M)
    assert re.search(r"^  layers\.0-1\.down\.weight +float32 32x48  +float32 32x64$", text, re.M)


def test_what_is_written_to_meanwhile_is_not_believed(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", tp=2)
    with pytest.raises(SnapshotRefused, match="changed while"):
        diff(one, two, progress=lambda *_: os.utime(tmp_path / "two" / "rank-00001-of-00002.safetensors", (1, 1)))


# The spec


def test_layers_are_told_by_number_however_a_spec_counts_its_kinds(tmp_path):
    plain, windowed = tiny_spec(layers=4).layer_kinds[0], tiny_spec(window=16).layer_kinds[0]
    base = tiny_spec(layers=4)
    one = replace(base, layer_kinds=(plain, windowed), layers=(0, 0, 1, 0))
    two = replace(base, layer_kinds=(windowed, plain), layers=(0, 0, 0, 1))
    found = diff(make(tmp_path / "one", one), make(tmp_path / "two", two))
    assert found.spec == (Row("layers[0-1].attention.window", None, 16),)
    assert not found.tensors.different
    assert "layers[0-1].attention.window  none  16" in shown(found)
    same = replace(one, layer_kinds=(windowed, plain), layers=(1, 1, 0, 1))
    assert diff(str(tmp_path / "one"), make(tmp_path / "same", same)).equal


def test_ropes_are_told_where_they_turn(tmp_path):
    base = tiny_spec()
    ropes = (Rope(theta=500000.0, dims=8), Rope(theta=10000.0, dims=8))
    kind = base.layer_kinds[0]
    moved = replace(kind, attention=replace(kind.attention, rope=1))
    equal = diff(make(tmp_path / "one", base), make(tmp_path / "two", replace(base, layer_kinds=(moved,), ropes=ropes)))
    assert equal.equal
    scaled = Rope(theta=500000.0, dims=8, llama3=Llama3(8.0, 1.0, 4.0, 64))
    found = diff(str(tmp_path / "one"), make(tmp_path / "three", replace(base, ropes=(scaled,))))
    assert found.spec == (
        Row("layers[0-1].attention.rope.theta", 10000.0, 500000.0),
        Row("layers[0-1].attention.rope.llama3", None, scaled.llama3),
    )


def test_depth_and_plain_fields(tmp_path):
    one, two = tiny_spec(max_length=64), replace(tiny_spec(layers=3), final_norm=Norm("rms", 1e-6))
    found = diff(make(tmp_path / "one", one), make(tmp_path / "two", two))
    assert found.spec == (
        Row("max_length", 64, 128), Row("final_norm.eps", 1e-5, 1e-6), Row("depth", 2, 3),
    )  # fmt: skip
    assert {row.name.split(".")[1] for row in found.tensors.different if row.a is msgspec.UNSET} == {"2"}


def test_ranges():
    assert [ranges(numbers) for numbers in ([0], [3, 4], [0, 1, 2, 5, 7, 8])] == ["0", "3-4", "0-2,5,7-8"]


# Files, text, and what is told of them


def test_json_files_are_told_by_key(tmp_path):
    config = {"eos": [1, 2], "rope": {"theta": 1e4, "gone": None}, "same": 1, "flag": 1}
    other = {"flag": True, "rope": {"theta": 5e5}, "same": 1.0, "eos": [1, 3], "new": "x"}
    one = make(tmp_path / "one", text_files={"config.json": json.dumps(config).encode()})
    two = make(tmp_path / "two", text_files={"config.json": json.dumps(other).encode()})
    found = diff(one, two)
    (row,) = found.files
    assert sorted(row.inside, key=lambda row: row.path) == [
        Row("eos", [1, 2], [1, 3]), Row("flag", 1, True), Row("new", b="x"), Row("rope.gone", None),
        Row("rope.theta", 1e4, 5e5),
    ]  # fmt: skip
    assert found.equal, "serving reads the spec, and never config.json"
    text = shown(found)
    assert "config.json: rope.theta  10000.0  500000.0" in text and "config.json: rope.gone   none     -" in text


@pytest.mark.parametrize(
    ("name", "data", "equal"),
    [
        ("tokenizer.json", b'{"model": {"vocab": {"x": 1}}}', False),
        ("tokenizer.json", b'{ "model": {"vocab": {"x": 0}} }', True),
        ("tokenizer.json", b"no JSON", False),
        ("tokenizer.json", b"[" * 5000 + b"]" * 5000, False),
        ("chat_template.jinja", b"ho", False),
        ("tokenizer.tables", b"x", True),
        ("tokenizer_config.json", b"{}", False),
    ],
    ids=range(7),
)
def test_files_that_serving_reads(tmp_path, name, data, equal):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", text_files={**TEXT, name: data})
    found = diff(one, two)
    assert [row.name for row in found.files] == [name] and found.equal == equal
    assert name in shown(found) and found.tensors.by_digest == found.tensors.count
    verdict = shown(found).splitlines()[2]
    assert verdict.startswith("Equal") if equal else verdict == f"Different: {name}."


def test_vocabularies_of_different_sizes_are_counted(tmp_path):
    words = [{"model": {"merges": [f"{i} x" for i in range(count)]}} for count in (100, 101)]
    one, two = (
        make(tmp_path / str(at), text_files={"tokenizer.json": json.dumps(word).encode()})
        for at, word in enumerate(words)
    )
    assert diff(one, two).files[0].inside == (Row("model.merges", "100 entries", "101 entries"),)


def test_a_canary_changes_nothing_that_is_computed(tmp_path):
    one = make(tmp_path / "one", canary=Canary("", [1, 2], [3, 4], [0.5, 1.0]))
    two = make(tmp_path / "two", tp=2, canary=Canary("", [1, 2], [3, 5], [0.5, 1.0]))
    found = diff(one, two)
    assert found.equal and found.record == (Row("tp", 1, 2), Row("canary.next", [3, 4], [3, 5]))
    without = diff(one, make(tmp_path / "three"))
    assert without.equal and without.same and [row.path for row in without.record] == ["canary"]


def test_whatever_is_in_a_file_stays_in_its_line(tmp_path):
    other = {"a": 1, "b\x1b[2Jc": "x\r\n" * 50, "d" * 300: "e" * 300}
    one = make(tmp_path / "one")
    two = make(tmp_path / "two", text_files={**TEXT, "config.json": json.dumps(other).encode()})
    found = diff(one, two)
    for width in (1, 40, 63, WIDTH, 300):
        for line in list(lines(found, everything=True, width=width))[3:]:
            assert len(line) <= max(40, width) and line.isprintable()


def test_templates_are_shown_from_where_they_part(tmp_path):
    long = "{% for message in messages %}{{ message.role }}" * 3
    one = make(tmp_path / "one", text_files={"chat_template.jinja": f"{long}[INST]".encode()})
    two = make(tmp_path / "two", text_files={"chat_template.jinja": f"{long}<s>".encode()})
    found = diff(one, two)
    assert found.files[0].inside == (Row("", f"{long}[INST]", f"{long}<s>"),) and not found.equal
    assert "  chat_template.jinja  ...ge.role }}[INST]  ...ge.role }}<s>" in shown(found)


def test_long_sections_are_cut_unless_all_are_asked_for(tmp_path, capsys):
    one = make(tmp_path / "one")
    two = make(tmp_path / "two", text_files={**TEXT, "config.json": json.dumps(dict.fromkeys(range(50), 0)).encode()})
    assert run_cli(["diff", one, two]) == 0
    out = capsys.readouterr().out
    assert out.count("config.json: ") == 20 and "  ... and 31 more (--all)" in out.splitlines()
    assert run_cli(["diff", one, two, "--all"]) == 0
    out = capsys.readouterr().out
    assert out.count("config.json: ") == 51 and "... and" not in out


def test_layers_that_differ_alike_share_a_line(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", seed=1)
    found = diff(one, two, values=True)
    assert len(found.tensors.different) == found.tensors.count
    (line,) = (line for line in lines(found) if ".down.weight" in line)
    assert line.startswith("  layers.0-1.down.weight ") and ": 100 %, by up to " in line
    assert sum(".down.weight" in line for line in lines(found, everything=True)) == 2


def test_json_output(tmp_path, capsys):
    weights = random_weights(SPEC)
    one = make(tmp_path / "one", weights=weights)
    two = make(tmp_path / "two", tp=2, weights=with_a_flipped_bit(weights, "embed.weight", (0, 0)))
    assert run_cli(["diff", one, two, "--values", "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert out["schema_version"] == 1 and (out["equal"], out["same"]) == (False, False)
    assert (out["a"]["name"], out["a"]["tp"], out["b"]["tp"]) == (one, 1, 2)
    (row,) = out["tensors"]["different"]
    assert row["name"] == "embed.weight" and row["a"] == {"dtype": "float32", "shape": [61, 32]}
    assert row["values"]["differing"] == 1
    assert out["record"] == [{"path": "tp", "a": 1, "b": 2}] and out["spec"] == []


# What cannot be compared


def test_not_a_snapshot(tmp_path, capsys):
    snap = make(tmp_path / "snap")
    (tmp_path / "empty").mkdir()
    shutil.copytree(snap, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "snapshot.json").unlink()
    for other, kind in (("nowhere", NotFound), ("empty", SnapshotRefused), ("unfinished", SnapshotRefused)):
        for pair in ((snap, str(tmp_path / other)), (str(tmp_path / other), snap)):
            with pytest.raises(kind, match=other):
                diff(*pair)
    with pytest.raises(NotFound, match="a snapshot is a directory"):
        diff(snap, snap + "/config.json")
    assert run_cli(["diff", snap, str(tmp_path / "unfinished")]) == 3
    assert "not a finished snapshot" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["rank-00000-of-00001.safetensors", "config.json"])
def test_a_file_that_was_cut_short(tmp_path, file):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", seed=1)
    os.truncate(tmp_path / "two" / file, (tmp_path / "two" / file).stat().st_size - 1)
    with pytest.raises(SnapshotRefused, match=file):
        diff(one, two)


@pytest.mark.parametrize("file", ["tokenizer.json", "rank-00000-of-00001.chunks"])
def test_a_file_without_its_digest_is_not_compared(tmp_path, file):
    one = make(tmp_path / "one")
    two = make(tmp_path / "two", seed=1, text_files={**TEXT, "tokenizer.json": b'{"model": 1}'})
    data = bytearray((tmp_path / "two" / file).read_bytes())
    data[5] ^= 1
    (tmp_path / "two" / file).write_bytes(data)
    with pytest.raises(SnapshotRefused, match=f"{file} does not have the digest"):
        diff(one, two)


def test_a_damaged_weight_shows_where_it_is_read(tmp_path):
    """Digests are believed, so a copy with the same id is the same; bytes that are read are what they are."""
    one = make(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    rank = tmp_path / "copy" / "rank-00000-of-00001.safetensors"
    data = bytearray(rank.read_bytes())
    data[-5] ^= 1
    rank.write_bytes(data)
    assert diff(one, str(tmp_path / "copy")).same
    found = diff(make(tmp_path / "two", tp=2), str(tmp_path / "copy"))
    assert [row.name for row in found.tensors.different] == ["head.weight"]
