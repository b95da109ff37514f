"""Layouts: the bytes are as the document defines them, every range of rows comes back, and the file stays openable."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fgsnap.convert.pack import packed
from fgsnap.layout import stored_tensors
from fgsnap.snapshot import open_snapshot, plan_rank, rank_file, read_logical, verify
from fgsnap.snapshot.packing import PANEL_ROWS, file_shape, fits, packed_bytes, panel_bytes, unpacked
from fgsnap.spec import DTYPE_BYTES
from tests.snapshots import make_snapshot, random_weights, stored_array, tiny_spec, words32

KINDS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """Any bits: NaNs with payloads are values like others."""
    dtype = draw(st.sampled_from(tuple(DTYPE_BYTES)))
    rows, words = draw(st.integers(1, 100)), draw(st.integers(1, 20))
    bits = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(rows * words * 4)
    return dtype, np.frombuffer(bits, KINDS[dtype]).reshape(rows, -1)


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_packing_gives_the_bytes_of_the_definition(made: tuple[str, np.ndarray]) -> None:
    dtype, matrix = made
    data = packed(matrix).tobytes()
    assert data == words32(matrix)
    assert len(data) == packed_bytes("words32", matrix.shape, dtype)
    assert len(data) == math.ceil(len(matrix) / 32) * 32 * matrix.shape[1] * DTYPE_BYTES[dtype]


@settings(max_examples=100, deadline=None)
@given(matrices(), st.data())
def test_unpacking_undoes_packing(made: tuple[str, np.ndarray], data: st.DataObject) -> None:
    dtype, matrix = made
    view, size = memoryview(packed(matrix)).cast("B"), panel_bytes("words32", matrix.shape, dtype)
    panels = [view[at : at + size] for at in range(0, len(view), size)]
    assert b"".join(unpacked(panel, 0, 32) for panel in panels)[: matrix.nbytes] == matrix.tobytes()
    panel = data.draw(st.integers(0, len(panels) - 1))
    stop = data.draw(st.integers(1, min(32, len(matrix) - 32 * panel)))
    start = data.draw(st.integers(0, stop - 1))
    assert unpacked(panels[panel], start, stop) == matrix[32 * panel + start : 32 * panel + stop].tobytes()


def test_a_matrix_of_any_alignment_is_packed() -> None:
    """A source may hold its tensors at any offset."""
    values = np.arange(1, 34 * 6 + 1, dtype=np.uint16)
    shifted = np.frombuffer(b"x" + values.tobytes(), np.uint16, values.size, 1).reshape(34, 6)
    assert not shifted.flags.aligned
    assert packed(shifted).tobytes() == words32(values.reshape(34, 6))


def test_what_fits() -> None:
    assert fits("words32", (1, 1), "float32") and fits("words32", (1, 2), "bfloat16")
    assert not fits("words32", (2, 1), "bfloat16") and not fits("words32", (2, 7), "float16")
    assert not fits("words32", (64,), "float32") and not fits("words32", (2, 32, 8), "float32")
    assert fits("words32", (3, 64, 1), "float32") and not fits("words32", (3, 64, 1), "bfloat16")
    assert fits("row", (3,), "bfloat16")


def test_the_plan_packs_matrices_and_nothing_else() -> None:
    spec = tiny_spec(qkv_bias=True, inner=3)
    row, plan = (plan_rank([(t, "bfloat16") for t in stored_tensors(spec, 1, 0)], to) for to in ("row", "words32"))
    assert {t.layout for t in row.tensors} == {"row"}
    layouts = {t.name: t.layout for t in plan.tensors}
    assert layouts["layers.0.down.weight"] == "row", "its rows are 3 values of 2 bytes"
    assert {name for name, layout in layouts.items() if layout == "row"} == {
        *(t.name for t in plan.tensors if len(t.shape) == 1), "layers.0.down.weight", "layers.1.down.weight",
    }  # fmt: skip
    embed = plan.tensors[0]
    assert (embed.name, embed.shape, embed.bytes) == ("embed.weight", (61, 32), 64 * 32 * 2)
    assert all(t.offset % (4096 if t.starts_layer else 256) == 0 for t in plan.tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_safetensors_library_shows_the_panels(tmp_path: Path, dtype: str) -> None:
    spec = tiny_spec()
    weights = random_weights(spec, dtype)
    make_snapshot(tmp_path / "s", spec, 2, dtype, weights=weights, layout="words32")
    for rank in range(2):
        with safe_open(tmp_path / "s" / rank_file(rank, 2), "numpy") as opened:
            for tensor in stored_tensors(spec, 2, rank):
                found, wanted = opened.get_tensor(tensor.name), stored_array(tensor, weights, dtype)
                assert found.dtype == wanted.dtype
                if len(tensor.shape) == 2:
                    rows, columns = tensor.shape
                    assert found.shape == (-(-rows // 32), columns * wanted.itemsize // 4, 32, 4 // wanted.itemsize)
                    assert found.shape == file_shape("words32", tensor.shape, dtype)
                    filled = found.transpose(0, 2, 1, 3).reshape(-1, columns)
                    assert not filled[rows:].any()
                    found = filled[:rows]
                np.testing.assert_array_equal(found, wanted)


def test_both_layouts_hold_the_same_weights_under_different_ids(tmp_path: Path) -> None:
    spec, ids = tiny_spec(), {}
    weights = random_weights(spec)
    for layout in PANEL_ROWS:
        ids[layout] = make_snapshot(tmp_path / layout, spec, 2, weights=weights, layout=layout)
        assert verify(tmp_path / layout).id == ids[layout]
        with open_snapshot(tmp_path / layout) as snapshot:
            assert snapshot.manifest.requires == (() if layout == "row" else ("layout.words32",))
            for name, wanted in weights.items():
                got = np.zeros_like(wanted)
                read_logical(snapshot, name, (0,) * wanted.ndim, wanted.shape, memoryview(got))
                np.testing.assert_array_equal(got, wanted)
    assert ids["row"] != ids["words32"]
    assert make_snapshot(tmp_path / "again", spec, 2, weights=weights, layout="words32") == ids["words32"]
