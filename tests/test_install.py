"""Installing as a user does, in a fresh environment: with a compiler, and without one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.serving import FGSNAP, real_service, servable_snapshot

ROOT = Path(__file__).parent.parent
ASK = "from fgsnap.kernels import native; print(*native.available())"
ASK_MERGES = "from fgsnap.tokenizer import merge_loop; print(merge_loop() is not None)"


class Installed:
    """fgsnap after ``pip install`` into an environment of its own, with ``path`` as the only PATH.

    What fgsnap needs comes from this environment; it is looked for after fgsnap's own.
    """

    def __init__(self, folder: Path, path: str) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.python = str(folder / "bin" / "python")
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
        self.environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
        self.environment |= {"PATH": path, "PYTHONPATH": ""}
        self.run("-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", str(ROOT))

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.python, *arguments], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_a_compiler_gives_the_native_backend(tmp_path):
    installed = Installed(tmp_path / "env", os.environ["PATH"])
    assert installed.run("-P", "-c", ASK).startswith("True ")
    assert installed.run("-P", "-c", ASK_MERGES) == "True\n"
    assert "yes: " in next(line for line in installed.run(*FGSNAP, "env").splitlines() if "backend native" in line)


def test_no_compiler_leaves_an_installation_that_serves_and_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    installed = Installed(tmp_path / "env", str(tmp_path / "empty"))
    assert installed.run("-P", "-c", ASK).startswith("False ")
    assert installed.run("-P", "-c", ASK_MERGES) == "False\n"
    why = "not built: no C++ compiler was found when fgsnap was installed"
    assert f"backend native         no: {why}" in installed.run(*FGSNAP, "env").splitlines()
    snapshot = servable_snapshot(tmp_path / "snap")
    options = ("--kv-memory", "16MiB")
    with real_service(snapshot, *options, python=installed.python, environment={"PYTHONPATH": ""}) as service:
        assert service.url
        told, ready = service.lines
    assert told == f"fgsnap: native cannot: {why}; the reference backend computes, more slowly."
    assert "(reference on cpu, float32, torch " in ready
