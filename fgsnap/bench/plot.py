"""Load curves as a picture: latency over throughput, and effective throughput over clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")

Rows = Sequence[Mapping[str, Any]]


def draw(curves: Mapping[str, Rows], path: Path) -> None:
    """Write a PNG of one or several results: ``curves`` maps a label to the rows of ``load.curve``.

    A result has a colour and a marker, and each of its SLAs a kind of line.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (label, rows) in enumerate(curves.items()):
        look = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "clip_on": False}
        _latency(left, label, rows, look)
        _effective(right, label, rows, look)
    right.set_xticks(sorted({row["clients"] for rows in curves.values() for row in rows}))
    _finish(left, "Latency over throughput", "requests/s", "mean latency, s")
    _finish(right, "Effective throughput", "clients", "requests/s within the SLA")
    figure.savefig(path, format="png", dpi=150)


def _latency(axes: Axes, label: str, rows: Rows, look: Mapping[str, Any]) -> None:
    """A point for each number of clients, named by it."""
    points = [(row["requests_per_second"], row["latency"]["mean"], row["clients"]) for row in rows if row["latency"]]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=f"{label}, clients at the points", **look)
    for x, y, clients in points:
        axes.annotate(str(clients), (x, y), xytext=(6, -10), textcoords="offset points", fontsize=8)


def _effective(axes: Axes, label: str, rows: Rows, look: Mapping[str, Any]) -> None:
    """A line for each SLA, and a pale one for all answers."""
    clients = [row["clients"] for row in rows]
    every = [row["requests_per_second"] for row in rows]
    axes.plot(clients, every, color=look["color"], alpha=0.3, linewidth=4, label=f"{label}, all answers")
    for index, sla in enumerate(rows[0]["effective"]):
        name = f"{label}, prompt {sla['prompt_rate']:g}, then {sla['generation_rate']:g} tokens/s"
        kept = [row["effective"][index]["requests_per_second"] for row in rows]
        axes.plot(clients, kept, linestyle=LINES[index % len(LINES)], label=name, **look)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.update_datalim([(0, 0)])  # so that the margins are shares of the whole way from zero
    axes.margins(0.07)
    axes.autoscale_view()
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, ncols=2)
