"""What runs a model knows what it computes, never whose it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fgsnap
from fgsnap.convert.families import FAMILIES

PACKAGE = Path(fgsnap.__file__).parent
NEUTRAL = sorted([*PACKAGE.glob("runtime/*.py"), PACKAGE / "layout.py"])
BRANDS = sorted({re.split(r"[\d_]", name.replace("gpt_", "gpt"))[0] for name in FAMILIES})


def test_families_have_brands():
    assert {"falcon", "gptoss", "gptneox", "mixtral", "qwen", "phi", "llama"} <= {*BRANDS}


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: path.name)
def test_what_runs_a_model_names_no_family(path: Path):
    words = re.findall(r"[a-z]+", path.read_text().lower().replace("gpt-", "gpt").replace("gpt_", "gpt"))
    assert not {*words} & {*BRANDS}
