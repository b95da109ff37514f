"""Installing as a user does, in a fresh environment: with a compiler, and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASK = "from fgsnap.kernels import native; print(*native.available())"


def available_after_install(folder: Path, path: str) -> str:
    """What the native backend says of itself after ``pip install`` with ``path`` as the only PATH."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    env["PATH"] = path
    python = str(folder / "bin" / "python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", str(ROOT)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked = subprocess.run([python, "-P", "-c", ASK], capture_output=True, text=True, cwd=folder, check=True)
    return asked.stdout.strip()


def test_a_compiler_gives_the_native_backend(tmp_path):
    assert available_after_install(tmp_path / "env", os.environ["PATH"]).startswith("True ")


def test_no_compiler_leaves_an_installation_that_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    said = available_after_install(tmp_path / "env", str(tmp_path / "empty"))
    assert said.startswith("False ")
    assert "no C++ compiler" in said
