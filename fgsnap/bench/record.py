"""What every result says of itself: the machine, the versions, and summaries of repeated measurements."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgsnap.environment import describe, installed
from fgsnap.errors import HostError

PACKAGES = ("fgsnap", "torch", "transformers", "tokenizers", "safetensors", "h11")


def summary(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Median, spread and count of repeated measurements."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": len(values),
    }


def distribution(values: Sequence[float], digits: int = 4) -> dict[str, float | int] | None:
    """Mean, quantiles and count of what was measured on every request or token; None of nothing."""
    if not values:
        return None
    return {
        "mean": round(statistics.fmean(values), digits),
        "p50": round(quantile(values, 0.5), digits),
        "p95": round(quantile(values, 0.95), digits),
        "max": round(max(values), digits),
        "count": len(values),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values are not above, linear between two neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


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
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


def record(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result as it is printed and kept."""
    return {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}


def write(path: Path, content: dict[str, Any]) -> None:
    """Keep a result as JSON. HostError: it cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise HostError(
            f"The result could not be written to {path}.",
            f"{error.strerror}.",
            "Check the path, and the room on its disk.",
        ) from error
