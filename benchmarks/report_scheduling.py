"""The sections of docs/figures.md about the scheduler."""

from __future__ import annotations

from typing import Any

from tables import spread, table

SCHEDULER = """\
## What a step costs beside the model

Microseconds of a step with a model that costs nothing: `schedule` decides who runs and finds the blocks, `plan` lays
the batch out for the kernels, `commit` adds the tokens, stops and ends. Prefix cache, reservations, stop tokens,
deadlines and tenants are on. In the mixed rows an eighth of the sequences ends in every 16 steps, and others with
prompts of 100 tokens take their place. Picking the tokens and making their text comes beside that, a sequence.
Promised: at most {goal} a sequence of 2048, and not more than at 64; measured {measured} decoding and {mixed} mixed.

"""

LOOPS = """\

The loops of other engines in the same rounds, decoding, microseconds a sequence and step. They do less: neither builds
the batch in it.

"""

SPLITFUSE = """\
## SplitFuse under a backlog

{model}: {decodes} answers are being generated all the time while {clients} clients ask one prompt after the other, of
{shortest} to {longest} tokens and {requests} in all, and take {answer} tokens each. It ends when the prompts do not
suffice for all clients any more. Gaps are those between two tokens of the {decodes} answers. The same engine and model
throughout, in turn within every round; the other two policies live in the benchmark: *prefill first* forwards waiting
prompts whole and alone, up to {most} tokens at once, as vLLM did when SplitFuse was published; *no chunking* forwards
whole prompts beside the decodes. {knee} tokens is the budget that was measured in this run. The backlog is the share of
steps that left prompt tokens behind. Promised: P95 / P50 of at most {goal}.

![How large the forwards were, and how long the gaps](splitfuse.png)

"""

IDLE = """\
## At rest, and woken up

In {seconds:g} s without a request the HTTP process of a service on SmolLM2 takes {http:g} s of CPU and the engine's
{engine:g} s, of which the kernel counts hundredths. From a request in the pipe of an idle engine's process to its first
token, with a model that costs nothing: {wake} microseconds, {p95:.0f} in the slowest of twenty. Promised: no CPU, and
less than {goal:,}.
"""

STARVATION = """\
## Nobody waits for ever

The same requests under fgsnap's scheduler and under the rules of DeepSpeed-FastGen, re-created from its source, with a
KV cache of {blocks} blocks of {block_size} tokens and forwards of {budget}. *Blocks back at once* is FastGen with the
blocks of finished requests given back a step sooner than it does. The bound is computed before the first step. Nothing
is timed. [scheduling.md](scheduling.md) tells what happens.

"""


def scheduler(result: dict[str, Any]) -> str:
    heads = (
        "",
        "sequences",
        "schedule",
        "plan",
        "commit",
        "all, a sequence",
        "picking, a sequence",
        "text, a sequence",
    )
    rows = [
        (
            row["kind"],
            f"{row['sequences']:,}",
            *(spread(row[f"{part}_us"], 1) for part in ("schedule", "plan", "commit")),
            spread(row["us_per_sequence"], 3),
            *(_known(row[f"{part}_us_per_sequence"], 2) for part in ("sample", "detokenise")),
        )
        for row in result["rows"]
    ]
    most = {row["kind"]: row["us_per_sequence"]["median"] for row in result["rows"] if row["sequences"] == 2048}
    goal, measured = result["goals"]["us_per_sequence_2048"], result["us_per_sequence_2048"]
    words = SCHEDULER.format(goal=f"{goal:g}", measured=f"{measured:.3f}", mixed=f"{most['mixed']:.3f}")
    words += table(heads, rows)
    return words + (_loops(result) if result["loops"] else "")


def _loops(result: dict[str, Any]) -> str:
    rows = [(row["engine"], f"{row['sequences']:,}", spread(row["us_per_sequence"], 3)) for row in result["loops"]]
    ratios = {name.removeprefix("of_").replace("_", "-"): ratio for name, ratio in result["ratios_2048"].items()}
    said = "; ".join(f"fgsnap's over {name}'s at 2048: {spread(ratio, 3)}" for name, ratio in ratios.items())
    return f"{LOOPS}{table(('', 'sequences', 'a sequence'), rows)}\n{said}.\n"


def splitfuse(result: dict[str, Any]) -> str:
    workload = result["workload"]
    words = SPLITFUSE.format(
        model=result["model"],
        knee=result["knee"],
        goal=f"{result['goal']:g}",
        most=result["prefill_first_tokens"],
        **workload,
    )
    heads = (
        "", "forward tokens P50 / P95", "forward P50, ms", "gap P50, ms", "gap P95, ms", "longest gap, ms", "P95 / P50",
        "prompt tokens/s", "backlog",
    )  # fmt: skip
    rows = [
        (
            name,
            " / ".join(str(row["forward_tokens"][share]) for share in ("p50", "p95")),
            spread(_milliseconds(row["forward_p50"]), 0),
            *(spread(_milliseconds(row[f"gap_{share}"]), 0) for share in ("p50", "p95", "max")),
            spread(row["p95_over_p50"]),
            spread(row["prompt_tokens_per_second"], 0),
            f"{100 * row['backlog']:.0f} %",
        )
        for name, row in result["contestants"].items()
    ]
    return words + table(heads, rows)


def idle(result: dict[str, Any]) -> str:
    http, engine = result["cpu_seconds"]
    return IDLE.format(
        seconds=result["seconds"],
        http=http,
        engine=engine,
        wake=spread(result["wake_up_us"], 0),
        p95=result["wake_up_p95_us"],
        goal=result["goals"]["wake_up_us"],
    )


def starvation(result: dict[str, Any]) -> str:
    words = STARVATION.format(**result["cache"], budget=result["budget"])
    heads = ("", "", "finished", "refused", "steps", "bound", "lost blocks", "tokens forwarded", "end")
    rows = [
        (
            name if first else "",
            label,
            f"{story['finished']} of {workload['requests']}",
            str(story["refused"]),
            f"{story['steps']:,}",
            f"{workload['bounds'][label.split()[-1]]:,}" if label.startswith("fgsnap") else "none",
            f"{story['preempted']:,}",
            f"{story['forwarded']:,}",
            "" if story["end"] == "finished" else f"**{story['end']}**",
        )
        for name, workload in result["workloads"].items()
        for first, (label, story) in zip([True, *[False] * 9], workload["stories"].items(), strict=False)
    ]
    return words + table(heads, rows)


def _known(value: dict[str, float] | None, digits: int) -> str:
    return spread(value, digits) if value else ""


def _milliseconds(value: dict[str, float]) -> dict[str, float]:
    return {name: 1000 * seconds for name, seconds in value.items()}
