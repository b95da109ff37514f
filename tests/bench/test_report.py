"""The pages that are written from the families and the figures are those that would be written now."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def checked(root):
    command = [sys.executable, str(root / "benchmarks" / "report.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_written_pages_are_what_is_written_now():
    done = checked(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_list_of_families_that_is_old_is_told(tmp_path):
    for part in ("benchmarks", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    with (tmp_path / "docs" / "families.md").open("a") as page:
        page.write("One more.\n")
    done = checked(tmp_path)
    assert done.returncode == 1 and "docs/families.md is not" in done.stderr
