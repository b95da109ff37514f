"""Draw the pictures in docs/ from benchmarks/results/*.json and from nothing else.

    python benchmarks/plots.py [RESULT ...]

RESULT is peers, splitfuse or starvation; left out, all that there are. `make peers` and `make bench` do it, with the
matplotlib of the Python that they measure with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plots_scheduling
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgsnap.bench.plot import draw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
SLA = 1  # the middle one: 4 tokens/s


def main() -> None:
    asked = sys.argv[1:] or [name for name in DRAWN if (RESULTS / f"{name}.json").exists()]
    for name in asked:
        DRAWN[name](json.loads((RESULTS / f"{name}.json").read_text()))


def peers(result: Mapping[str, Any]) -> None:
    parts = result["parts"]
    for name, part in parts.items():
        if name.startswith("curve"):
            draw({engine: _one_sla(levels) for engine, levels in part["curves"].items()}, _picture(name))
    models = [part for part in (parts.get("speed"), parts.get("large", {}).get("speed")) if part]
    for name, part in zip(("speed", "speed-large"), models, strict=False):
        bars(part, _picture(name))


def bars(part: Mapping[str, Any], path: Path) -> None:
    """Two groups of horizontal bars, decode and prefill: a bar for each engine and figure, with its range."""
    rows = {name: row for name, row in part["contestants"].items() if "failure" not in row}
    jobs = list(next(iter(part["rates"].values())))
    figure = Figure(figsize=(11, 1.5 + 0.42 * len(rows)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("decode", "prefill"), strict=True):
        _panel(axes, rows, [job for job in jobs if job.startswith(kind)], kind)
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].invert_yaxis()
    figure.suptitle(part["model"])
    figure.savefig(path, format="png", dpi=150)


def _panel(axes: Axes, rows: Mapping[str, Mapping[str, Any]], jobs: Sequence[str], kind: str) -> None:
    height = 0.8 / len(jobs)
    for index, job in enumerate(jobs):
        known = [(at, row[job]) for at, row in enumerate(rows.values()) if row.get(job)]
        middle = [value["median"] for _, value in known]
        error = [
            [value["median"] - value["min"] for _, value in known],
            [value["max"] - value["median"] for _, value in known],
        ]
        places = [at - 0.4 + (index + 0.5) * height for at, _ in known]
        axes.barh(places, middle, height, xerr=error, label=job.replace("_", " "), error_kw={"linewidth": 0.8})
    axes.set_title(f"{kind}, tokens/s")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def _one_sla(levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**level, "effective": [level["effective"][SLA]]} for level in levels]


def _picture(name: str) -> Path:
    return DOCS / f"peers-{name}.png"


DRAWN: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "peers": peers,
    "splitfuse": lambda result: plots_scheduling.splitfuse(result, DOCS / "splitfuse.png"),
    "starvation": lambda result: plots_scheduling.starvation(result, DOCS / "starvation.png"),
}


if __name__ == "__main__":
    main()
