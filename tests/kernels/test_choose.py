"""Which backend is chosen, why, and what is said when none can be had."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fgsnap.errors import HostError, UnsupportedModel, UsageError
from fgsnap.kernels import choose as choosing
from fgsnap.kernels import native
from fgsnap.kernels.choose import OPS, choose
from fgsnap.kernels.ranks import Ranks

LLAMA = frozenset({"attention.rope", "layer.sequential", "layer.attn_in", "layer.mlp_in", "norm.rms", "mlp.silu"})


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: (False, "no compiler was found at install"))


@pytest.fixture
def no_torch(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))


def test_the_table_has_every_op():
    ops, table = choose("reference", "cpu", LLAMA, "float32")
    assert ops.name == "reference" and [choice.op for choice in table] == list(OPS)
    assert {"embed", "norm", "linear", "append", "attend", "logits", "sample", "top_two"} <= set(OPS)
    assert {choice.reason for choice in table} == {"asked for"}
    assert all(callable(getattr(ops, op)) for op in OPS)


def test_auto_is_native_where_it_is_built_and_says_why_not_elsewhere():
    ops, table = choose("auto", "cpu", LLAMA, "bfloat16", threads=1)
    present, reason = native.available()
    assert ops.name == ("native" if present else "reference")
    assert "without torch" in table[0].reason if present else reason in table[0].reason


def test_auto_without_the_library_is_the_reference(no_library):
    ops, table = choose("auto", "cpu", LLAMA, "bfloat16")
    assert ops.name == "reference" and "no compiler was found at install" in table[0].reason


def test_native_without_the_library_is_refused_with_the_reason(no_library):
    with pytest.raises(HostError, match="no compiler was found at install"):
        choose("native", "cpu", LLAMA, "bfloat16")


def test_neither_library_nor_torch_names_the_extra(no_library, no_torch):
    with pytest.raises(HostError, match=r"fgsnap\[torch\]"):
        choose("auto", "cpu", LLAMA, "bfloat16")


def test_native_needs_no_torch(no_torch):
    if not native.available()[0]:
        with pytest.raises(HostError):
            choose("native", "auto", LLAMA, "float32")
        return
    assert choose("native", "auto", LLAMA, "float32", threads=1)[0].name == "native"


def test_a_dtype_that_native_lacks_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(native, "DTYPES", ("bfloat16", "float32"))
    assert choose("auto", "cpu", LLAMA, "float16")[0].name == "reference"
    with pytest.raises((UsageError, HostError)):
        choose("native", "cpu", LLAMA, "float16")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_feature_nobody_computes_is_named(backend):
    with pytest.raises(UnsupportedModel, match=r"attention\.hyena"):
        choose(backend, "cpu", LLAMA | {"attention.hyena"}, "float32")


def test_unknown_backends_are_refused_with_those_that_exist():
    with pytest.raises(UsageError, match="auto, native, reference"):
        choose("gpu", "cpu", LLAMA, "float32")


def test_native_on_a_gpu_is_refused():
    with pytest.raises(UsageError, match="CPU alone"):
        choose("native", "cuda", LLAMA, "float32")


@pytest.mark.skipif(not native.available()[0], reason="it says first that it is not built")
def test_native_in_ranks_that_share_no_memory_is_refused():
    with pytest.raises(UsageError, match="torchrun"):
        choose("native", "cpu", LLAMA, "float32", ranks=Ranks(0, 2))


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HostError, match="cuda"):
        choose("auto", "cuda", LLAMA, "float32")


def test_auto_device_is_the_cpu_without_a_driver(monkeypatch):
    monkeypatch.setattr(choosing.Path, "exists", lambda self: False)
    assert choosing.settled_device("auto", "auto") == "cpu"
    assert choosing.settled_device("auto", "cuda:1") == "cuda:1"
