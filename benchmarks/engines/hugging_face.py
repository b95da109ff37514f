"""transformers on torch's CPU build, in bfloat16."""

from __future__ import annotations

from pathlib import Path

from engines.contest import RUNNERS
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = ("torch==2.13.0", "transformers==5.23.0")


def installed() -> Environment:
    return prepared("transformers", PINS, lambda home: home.pip(*PINS, "numpy"))


def run(home: Environment, checkpoint: Path) -> Launch:
    return Launch([home.python, str(RUNNERS / "run_transformers.py"), str(checkpoint)])
