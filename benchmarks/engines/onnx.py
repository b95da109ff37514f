"""ONNX Runtime GenAI, in float32: its CPU kernels lack bfloat16 (there is none for a Where of that type)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engines.contest import RUNNERS
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)


def installed() -> Environment:
    return prepared("onnx", PINS, lambda home: home.pip(*PINS, "numpy"))


def prepare(home: Environment, checkpoint: Path) -> Path:
    """The model as ONNX in float32, made once by the package's own builder."""
    made = checkpoint.with_name("onnx")
    if not (made / "genai_config.json").exists():
        builder = [home.python, "-m", "onnxruntime_genai.models.builder"]
        command = [*builder, "-i", str(checkpoint), "-o", str(made), "-p", "fp32", "-e", "cpu"]
        subprocess.run(command, check=True, capture_output=True)
    return made


def run(home: Environment, built: Path) -> Launch:
    return Launch([home.python, str(RUNNERS / "run_onnx.py"), str(built)])
