"""Casts agree with torch bit for bit, and never turn a number into an infinity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fgsnap.convert.cast import cast
from fgsnap.convert.source import NUMPY_DTYPES
from fgsnap.errors import SourceError

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bits(tensor):
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()


def values(dtype):
    """Random numbers, and those at which rounding goes wrong if it goes wrong: ties, subnormals, zeros, infinities."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator, dtype=torch.int32).view(torch.float32)
    ties = (torch.arange(0, 1 << 16, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 6e-8, 1e-40, 65504.0])
    fits = torch.cat([raw, ties, edges])
    return fits[~(torch.isfinite(fits) & (fits.abs() > 60000))].to(TORCH[dtype])


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TORCH, TORCH)))
def test_as_torch_does(source, target):
    given = values(source)
    wanted = given.to(TORCH[target])
    out = np.empty(given.shape, NUMPY_DTYPES[target])
    cast(bits(given).view(NUMPY_DTYPES[source]), source, out, target, "w")
    numbers = ~torch.isnan(given).numpy()
    got = out.view(np.int16 if out.itemsize == 2 else np.int32)
    np.testing.assert_array_equal(got[numbers], bits(wanted)[numbers])
    back = torch.from_numpy(got).view(TORCH[target])
    assert torch.isnan(back).numpy().tolist() == (~numbers).tolist()


def test_a_matrix_goes_into_a_part_of_a_larger_array():
    given = torch.randn(6, 5)
    slab = np.zeros((10, 5), np.uint16)
    cast(given.numpy(), "float32", slab[2:8], "bfloat16", "w")
    np.testing.assert_array_equal(slab[2:8].view(np.int16), bits(given.bfloat16()))
    assert not slab[:2].any() and not slab[8:].any()


@pytest.mark.parametrize(("target", "large"), [("float16", 70000.0), ("bfloat16", 3.4e38)])
def test_a_number_that_does_not_fit_is_refused(target, large):
    given = np.array([1.0, large, -np.inf], np.float32)
    out = np.empty(3, NUMPY_DTYPES[target])
    with pytest.raises(SourceError, match=f"w does not fit {target}") as caught:
        cast(given, "float32", out, target, "w")
    assert f"{large:g}" in caught.value.why
