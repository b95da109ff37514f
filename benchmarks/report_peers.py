"""The section of docs/figures.md about other engines, from benchmarks/results/peers.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measures.curve import LENGTHS
from tables import spread, table

Part = Mapping[str, Any]

INTRODUCTION = """\
## Beside other engines

`make peers` measures all of this on one machine. Every engine has an environment of its own and runs the same weights,
SmolLM2-135M-Instruct in bfloat16, unless a name says otherwise: llama.cpp's Q8_0 and Q4_0 hold fewer bits and give
other answers, and three engines take the model only in float32 or float16. llama.cpp is compiled for this CPU, with
{sets}. Engines that serve are asked over HTTP by the same clients; "in process" is an engine without its server.

"""

PROMISES = """\
### What was promised

A ratio is the median of the ratios within a round; its range is in brackets.

"""

PARTS = {
    "startup": "start-up",
    "speed": "decode and prefill",
    "memory": "memory",
    "load": "loading",
    "large": "the larger model",
    **{f"curve-{prompt}-{answer}": f"the load curve {prompt}/{answer}" for prompt, answer in LENGTHS},
}
"""What each part of a run of peers.py measures."""

STARTUP = """\
### Start-up

Seconds from `exec` to the first token: over HTTP of those that serve, else until the first token is there. llama.cpp
starts with one slot and without its warm-up, vLLM without compiling.

"""

SPEED = """\
### Decode and prefill

Tokens a second, of 1, 8 and 32 sequences at once, and of one prompt of 512 and of 2048 tokens; peak memory is the sum
of each process's highest resident set. Every round gives each engine its turn while the others are stopped.

![Decode and prefill of SmolLM2-135M](peers-speed.png)

"""

HOST = """\
Right before each of these the host read {bytes} GB/s and did {operations} x 10^9 operations/s ({kind}).
fgsnap's decode of one sequence is {decode} of that bandwidth, its prefill of 512 tokens {prefill} of that rate.
"""

CURVE = """\
### Under load

Closed-loop clients, lengths from Normal(mean, 0.3 mean) cut to {context} tokens. Effective throughput is the requests/s
whose first token came within prompt tokens / 512 s and that then kept to {rates} tokens/s; here the best over all
numbers of clients.

"""

MEMORY = """\
### Memory

MiB while serving, with nine tenths of a KV cache of {kv} MiB in use (vLLM: 1 GiB, its least). The weights' file has
{weights} MiB. Pss counts pages that processes share once: a second replica of fgsnap adds {second} MiB.

"""

LOAD = """\
### Loading {gigabytes:.1f} GB

Seconds to map the weights and touch every page. Before a cold run, mincore finds no page of the file in memory, and
after it at least nine tenths of them: a host may take idle memory back.

"""

LARGE = """\
### A larger model

{model}, {gigabytes:.2f} GB in bfloat16, SmolLM2's tokenizer.

"""


def peers(result: Mapping[str, Any]) -> str:
    """The section, with whatever parts have been measured."""
    parts = result["parts"]
    sections = {
        "startup": lambda part: STARTUP + startup(part),
        "speed": lambda part: SPEED + speed(part),
        "memory": memory,
        "load": load,
        "large": large,
    }
    written = [section(parts[name]) for name, section in sections.items() if name in parts]
    if curves := [part for name, part in parts.items() if name.startswith("curve")]:
        written.append(under_load(curves))
    stamps = ", ".join(f"{name} {part['date']} at {part['commit']}" for name, part in parts.items())
    sets = ", ".join(each for each in result["llama_cpp_compiled_with"] if each.startswith("AVX"))
    return (
        INTRODUCTION.format(sets=sets)
        + PROMISES
        + promises(result["verdict"])
        + absent(parts)
        + "\n"
        + "\n".join(written)
        + f"\nMeasured: {stamps}.\n"
    )


def absent(parts: Mapping[str, Part]) -> str:
    """Which parts of the promise nobody has measured."""
    names = [name for part, name in PARTS.items() if part not in parts]
    return f"\nNot measured, though promises were made: {', '.join(names)}.\n" if names else ""


def promises(verdict: Sequence[Part]) -> str:
    rows = []
    for row in verdict:
        low_high = " ({:.3g} to {:.3g})".format(*row["spread"]) if row["spread"] else ""
        goal = f"{'at most' if row['most'] else 'at least'} {row['goal']:g}"
        value = "the peer has none" if row["value"] is None else f"{row['value']:.3g}{low_high}"
        rows.append((row["name"], value, goal, "yes" if row["met"] else "**no**"))
    return table(("", "measured", "promised", "met"), rows)


def startup(part: Part) -> str:
    """Every engine's seconds, and the phases of fgsnap's start in the middle."""
    rows = [(name, spread(seconds, 2)) for name, seconds in part["seconds"].items()]
    rows += [(name, f"failed: {reason}") for name, reason in part["failures"].items()]
    account = part["account"]
    phases = ", ".join(f"{phase} {1000 * seconds:.0f}" for phase, seconds in account["phases"].items())
    uncovered = 100 * account["unaccounted"]
    return (
        table(("", "seconds"), rows)
        + f"\nfgsnap's critical path, milliseconds: {phases}; not accounted for: {uncovered:.1f} %. "
        + f"Its canary was {part['canary']}.\n"
    )


def speed(part: Part) -> str:
    jobs = list(next(iter(part["rates"].values())))
    heads = ("", *(job.replace("_", " ") for job in jobs), "peak MiB")
    host = part["host"]
    shares = part["shares"]["fgsnap"]
    told = HOST.format(
        bytes=spread(_scaled(host["bytes_per_second"], 1e-9), 1),
        operations=spread(_scaled(host["operations_per_second"], 1e-9), 0),
        kind=host["operations"],
        decode=spread(shares["decode_1"]),
        prefill=spread(shares["prefill_512"]),
    )
    return table(heads, _speed_rows(part["contestants"], jobs)) + "\n" + told


def _speed_rows(contestants: Mapping[str, Part], jobs: Sequence[str]) -> Iterator[Sequence[str]]:
    for name, row in contestants.items():
        if "failure" in row:
            yield (name, f"failed: {row['failure']}", *[""] * len(jobs))
        else:
            failed = row.get("failures", {})
            cells = (spread(row[job], 0) if row[job] else f"failed: {failed.get(job)}" for job in jobs)
            yield (name, *cells, str(row.get("peak_mebibytes", "")))


def under_load(parts: Sequence[Part]) -> str:
    rates = [sla["generation_rate"] for sla in parts[0]["slas"]]
    heads = ("prompt/answer", "", *(f"{rate:g} tokens/s" for rate in rates), "all answers")
    rows = []
    pictures = []
    for part in parts:
        lengths = f"{part['prompt']}/{part['answer']}"
        pictures.append(f"![Throughput and latency, {lengths}](peers-curve-{lengths.replace('/', '-')}.png)\n")
        for name, levels in part["curves"].items():
            best = [max(level["effective"][i]["requests_per_second"] for level in levels) for i in range(len(rates))]
            most = max(level["requests_per_second"] for level in levels)
            rows.append((lengths, name, *(f"{value:.2f}" for value in (*best, most))))
    asked = " or ".join(f"{rate:g}" for rate in rates)
    return CURVE.format(context=parts[0]["context"], rates=asked) + table(heads, rows) + "\n" + "\n".join(pictures)


def memory(part: Part) -> str:
    columns = ("Rss", "Pss", "Pss_File", "Pss_Anon")
    rows = [
        (name, count, *(f"{found[count][column] / (1 << 20):.0f}" for column in columns))
        for name, found in part["servers"].items()
        for count in ("one", "two")
        if count in found
    ]
    heads = ("", "replicas", "resident", "Pss", "Pss, files", "Pss, anonymous")
    sizes = {name: part[f"{name}_bytes"] >> 20 for name in ("kv", "weights", "second")}
    return MEMORY.format(**sizes) + table(heads, rows)


def load(part: Part) -> str:
    rows = [(name, spread(seconds, 3)) for name, seconds in part["seconds"].items()]
    return LOAD.format(gigabytes=part["bytes"] / 1e9) + table(("", "seconds"), rows)


def large(part: Part) -> str:
    described = part["speed"]
    head = LARGE.format(model=described["model"].capitalize(), gigabytes=described["weight_bytes"] / 1e9)
    return head + speed(described) + "\n" + startup(part["startup"])


def _scaled(value: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: number * factor for name, number in value.items()}
