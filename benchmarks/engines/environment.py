"""A virtual environment of its own for each engine, made of packages and kept below ``.peers/``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
DONE = ".installed"  # holds the pins that the environment was made with

VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


class Environment(NamedTuple):
    """Where an engine lives; ``python`` is its own interpreter."""

    folder: Path

    @property
    def python(self) -> str:
        return self.program("python")

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def pip(self, *arguments: str, **settings: str) -> None:
        """``pip install`` with these arguments, and with these additions to the process environment."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **settings}, stdout=sys.stderr)

    def versions(self, packages: Sequence[str]) -> Mapping[str, str]:
        """The versions of installed packages."""
        command = [self.python, "-c", VERSIONS, *packages]
        found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found


def prepared(name: str, pins: Sequence[str], install: Callable[[Environment], None]) -> Environment:
    """The environment of engine ``name``, made anew unless one with the same pins is there."""
    home = Environment(PEERS / name)
    done, wanted = home.folder / DONE, "\n".join(pins)
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {name}", file=sys.stderr)
        venv.create(home.folder, clear=True, with_pip=True)
        install(home)
        done.write_text(wanted)
    return home
