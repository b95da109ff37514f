"""OpenVINO GenAI, which reads GGUF files, but none in bfloat16: it gets float16 and may compute in bfloat16.

The way from a Hugging Face checkpoint, optimum-intel, needs torchvision and a transformers release that the others do
not use.
"""

from __future__ import annotations

from pathlib import Path

from engines.contest import RUNNERS
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0")


def installed() -> Environment:
    return prepared("openvino", PINS, lambda home: home.pip(*PINS, "numpy"))


def run(home: Environment, gguf: Path) -> Launch:
    """``gguf`` holds the weights in float16."""
    return Launch([home.python, str(RUNNERS / "run_openvino.py"), str(gguf)])
