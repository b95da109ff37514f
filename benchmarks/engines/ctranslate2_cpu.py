"""CTranslate2, in float32: it stores bfloat16 too, but refuses to compute in it on a CPU of this kind."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engines.contest import RUNNERS
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = ("torch==2.13.0", "transformers==5.23.0", "ctranslate2==4.8.5")


def installed() -> Environment:
    return prepared("ctranslate2", PINS, lambda home: home.pip(*PINS, "numpy"))


def prepare(home: Environment, checkpoint: Path) -> Path:
    """The model in CTranslate2's format, made once."""
    made = checkpoint.with_name("ctranslate2")
    if not made.exists():
        command = [home.program("ct2-transformers-converter"), "--model", str(checkpoint), "--output_dir", str(made)]
        subprocess.run(command, check=True, capture_output=True)
    return made


def run(home: Environment, converted: Path, checkpoint: Path) -> Launch:
    runner = str(RUNNERS / "run_ctranslate2.py")
    return Launch([home.python, runner, str(converted), str(checkpoint / "tokenizer.json")])
