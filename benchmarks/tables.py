"""Numbers and tables as the pages of figures write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def spread(value: Mapping[str, float], digits: int = 2) -> str:
    """A median and its range."""
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


def medians(values: Iterable[Mapping[str, float]], digits: int) -> str:
    return " / ".join(f"{value['median']:,.{digits}f}" for value in values)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
