"""The pictures of the scheduler's figures, each drawn from its result and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ENDS = {"starved": "s", "dead": "X"}
TITLES = {
    "crowd": "many requests at once",
    "large": "and one nearly as large as the cache",
    "outgrowing": "and one larger than the cache; more come later",
}


def starvation(result: Mapping[str, Any], path: Path) -> None:
    """Finished requests over steps, a panel for each workload; a mark where a scheduler got no further."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(result["workloads"]), sharey=True)
    for axes, (name, workload) in zip(panels, result["workloads"].items(), strict=True):
        for number, (label, story) in enumerate(workload["stories"].items()):
            _story(axes, label, story, f"C{number}")
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_xlabel("steps")
        axes.set_xlim(0, 1.05 * max(_last(story) for story in workload["stories"].values()))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("requests that have finished")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _story(axes: Axes, label: str, story: Mapping[str, Any], colour: str) -> None:
    steps = [0, *story["finished_at"], _last(story)]
    finished = [*range(len(story["finished_at"]) + 1), story["finished"]]
    axes.plot(steps, finished, drawstyle="steps-post", color=colour, label=label)
    if story["end"] in ENDS:
        axes.plot(steps[-1], finished[-1], marker=ENDS[story["end"]], markersize=9, color=colour)
        axes.annotate(
            story["end"], (steps[-1], finished[-1]), xytext=(-6, -8), textcoords="offset points", fontsize=9, ha="right"
        )


def _last(story: Mapping[str, Any]) -> int:
    return int(story["steps"])


def splitfuse(result: Mapping[str, Any], path: Path) -> None:
    """Left, how large the forwards were; right, which share of the gaps between two tokens was at most so long."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (label, row) in enumerate(result["contestants"].items()):
        _sizes(left, label, row, f"C{number}")
        shares = [100 * at / (len(row["gap_quantiles"]) - 1) for at in range(len(row["gap_quantiles"]))]
        right.plot(row["gap_quantiles"], shares, color=f"C{number}", label=label)
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens of a forward, at most")
    left.set_ylabel("% of the forwards")
    right.set_xscale("log")
    right.set_xlabel("seconds between two tokens of an answer")
    right.set_ylabel("% of the gaps, at most so long")
    right.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _sizes(axes: Axes, label: str, row: Mapping[str, Any], colour: str) -> None:
    """Each bin is as wide as the sizes that it counts."""
    total = sum(count for _, count in row["forward_sizes"])
    ends = [end for end, _ in row["forward_sizes"]]
    shares = [100 * count / total for _, count in row["forward_sizes"]]
    axes.step(ends, shares, where="pre", color=colour, label=label)
    axes.fill_between(ends, shares, step="pre", color=colour, alpha=0.15)
