"""Results for people: small tables on stdout, and what went wrong on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

Result = Mapping[str, Any]
Summary = Mapping[str, float] | None


def startup(result: Result) -> None:
    starts = result["seconds"]
    counted = f"{starts['runs']} start{'s' * (starts['runs'] > 1)}"
    click.echo(f"{result['backend']} on {result['device']}, {result['setting']}, {result['canary']}, {counted}\n")
    phases = [(f"  {name}", *_spread(phase, 3)) for name, phase in result["phase_seconds"].items()]
    _table(("seconds", "median", "min", "max"), [("exec to first token", *_spread(starts, 3)), *phases])
    click.echo(f"\nNot accounted for in the median start: {100 * result['unaccounted']:.1f} %.")


def latency(result: Result) -> None:
    click.echo(f"{_engine(result)}, batch {result['batch']}\n")
    rows = [
        ("first token, ms", *_spread(result["first_token"], 1, 1000)),
        ("prefill, tokens/s", *_spread(result["prefill_tokens_per_second"], 1)),
        ("between tokens P50, ms", *_spread(result["between_tokens_p50"], 2, 1000)),
        ("between tokens P95, ms", *_spread(result["between_tokens_p95"], 2, 1000)),
        ("decode, tokens/s", *_spread(result["decode_tokens_per_second"], 1)),
    ]
    _table(("", "median", "min", "max"), rows)


def throughput(result: Result) -> None:
    click.echo(f"{_engine(result)}; tokens/s, median (min to max)\n")
    names = ("prefill_tokens_per_second", "decode_tokens_per_second", "answer_tokens_per_second")
    rows = [(row["batch"], row["requests"], *(_range(row[name]) for name in names)) for row in result["batches"]]
    _table(("batch", "requests", "prefill", "decode", "answers, overall"), rows)


def budget(result: Result) -> None:
    click.echo(f"{result['host']}\n")
    best = max(row["tokens_per_second"] for row in result["forwards"])
    rows = [
        (
            row["tokens"],
            row["decodes"],
            *_spread(row["seconds"], 2, 1000),
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / best:.0%}",
        )
        for row in result["forwards"]
    ]
    _table(("tokens", "decodes", "ms, median", "min", "max", "tokens/s", "of the best"), rows)
    knee = f"{result['max_batch_tokens']} tokens: the fewest with {result['share']:.0%} of the best tokens/s"
    click.echo(f"\nA forward should carry {knee}.\nKept in {result['path']}, where 'fgsnap serve' and 'run' find it.")


def serve(result: Result) -> None:
    workload, levels = result["workload"], result["levels"]
    lengths = f"{workload['prompt_mean']} prompt + {workload['answer_mean']} answer tokens in the mean"
    where = f", {result['backend']} on {result['device']}" if "backend" in result else ""
    click.echo(f"{result['model']} at {result['url']}{where}, {lengths}\n")
    heads = ("clients", "requests/s", "tokens/s", "latency", "first token", "between tokens", "within SLA", "failed")
    _table(heads, [_level(level) for level in levels])
    slas = levels[0]["effective"]
    rates = ", ".join(f"{sla['generation_rate']:g}" for sla in slas)
    click.echo(
        "\nSeconds: latency is the mean, first token and between tokens are P50 / P95. Within SLA: requests/s with a\n"
        f"first token within prompt tokens / {slas[0]['prompt_rate']:g} s, and after it {rates} tokens/s."
    )
    for level in levels:
        _complain(level, workload["ignore_eos"])


def _level(level: Result) -> Sequence[object]:
    return (
        level["clients"],
        f"{level['requests_per_second']:.2f}",
        f"{level['answer_tokens_per_second']:.1f}",
        f"{level['latency']['mean']:.3f}" if level["latency"] else "-",
        _quantiles(level["first_token"], 3),
        _quantiles(level["between_tokens"], 4),
        " / ".join(f"{sla['requests_per_second']:.2f}" for sla in level["effective"]),
        f"{level['failed']} of {level['requests']}",
    )


def _complain(level: Result, whole_length: bool) -> None:
    """What makes a level's figures worth less than they look."""
    for reason, count in level["failures"].items():
        click.echo(f"{level['clients']} clients, {count} failed: {reason}", err=True)
    if whole_length and level["ended_early"]:
        click.echo(f"{level['clients']} clients, {level['ended_early']} answers ended before their length", err=True)


def _engine(result: Result) -> str:
    where = f"{result['backend']} on {result['device']}, {result['setting']}"
    return f"{where}, {result['prompt']} prompt + {result['answer']} answer tokens"


def _quantiles(value: Summary, digits: int) -> str:
    return f"{value['p50']:.{digits}f} / {value['p95']:.{digits}f}" if value else "-"


def _spread(value: Summary, digits: int, scale: float = 1) -> tuple[str, str, str]:
    """Median, least and most; dashes of what was not measured."""
    if value is None:
        return "-", "-", "-"
    median, least, most = (f"{scale * value[name]:.{digits}f}" for name in ("median", "min", "max"))
    return median, least, most


def _range(value: Summary) -> str:
    return "{} ({} to {})".format(*_spread(value, 1)) if value else "-"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Numbers to the right; the first column to the left if it holds words."""
    lines = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    named = not lines[-1][0].isdecimal()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join([line[0].ljust(widths[0]) if named else cells[0], *cells[1:]]))
