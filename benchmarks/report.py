"""Write docs/figures.md, docs/families.md, and README.md's figures and number of model types, from what fgsnap says of
itself and from benchmarks/results/*.json.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    fail when they are not what the results say

`make bench` does the first and `make lint` the second.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from report_families import families
from report_peers import peers
from report_scheduling import idle, scheduler, splitfuse, starvation
from tables import medians, spread, table

from fgsnap.convert.families import FAMILIES as MODEL_TYPES

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures.md"
README = ROOT / "README.md"
FAMILIES = ROOT / "docs" / "families.md"
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """\
# Figures

Written by `benchmarks/report.py` from `benchmarks/results/`; `make bench` measures everything anew and writes this page
again. Every figure is a median with its range, except where a column says otherwise.
"""

HEADLINE = """\
On {machine[cpus]} cores of an {machine[cpu]}, SmolLM2-135M's first token comes over HTTP {seconds:.2f} s after `exec`,
{sooner:.0f} times sooner than from transformers; a checkpoint of {gigabytes:.1f} GB converts at {share:.2f} of the
rate of a plain copy, in {memory:.0f} MiB of memory, or {cast:.0f} MiB where weights are cast, and {canary:.0f} MiB for
the canary, at one rank.
[docs/figures.md](docs/figures.md) has all figures, their spread and the commands that measure them."""

STARTUP = """\
## Start-up

From `exec` of `fgsnap serve` to the first token over HTTP, canary included, page cache warm: {model}.
transformers loads the same weights and makes the same token, without a server.

"""

PHASES = """\
Where the critical path of the median run went:

"""

CONVERSION = """\
## Conversion

bfloat16 weights of Llama shape, one rank, {cache} page cache, beside a plain read, write and fsync of the same bytes;
the cast is to float16. Memory is the peak of anonymous memory, and what that is above an idle process with the same
imports. The canary is computed by a process of its own, which has torch loaded.

"""

RESHARDING = """\
## Opening at another degree

A Llama-shaped snapshot of {gigabytes:.2f} GB opened at another tensor parallel degree than its own, a process a rank,
until every page has been touched, beside one of the same weights that was converted at that degree. Native tensors are
mapped; `read` reads the native files into memory. Ratios are of the times of one round. Bytes that were copied, and
bytes that the disk gave in cold loads, are for each byte needed; the last column is the tensor of 1 MiB or more, of any
rank, that asks most of the disk when it is opened by itself. Promised from TP 8: 1.00 copied, at most 1.05 from the
disk, at most 1.2 of the time of a cold native load, and from the page cache, where a native load copies nothing, at
most 1.2 of the time of `read`.

"""

PACKING = """\
## The packed layout

Tokens a second of the native backend on a snapshot made with `--target cpu`, and on a generic one of the same weights.

"""

BUILD = """\
## Building

`pip install .` into a new virtual environment, its build tools included, other packages not: {wall} seconds, {cpu}
seconds of CPU time. Promised: at most {goal:.0f} seconds.
"""

TOKENIZERS = """\
## Loading tokenizers

Milliseconds of CPU time to load a tokenizer, imports left out, and microseconds a token of a long English text: from
`tokenizer.json` by the library, and from the `tokenizer.tables` that conversion makes of it. The tokens are the same.

"""

STREAMS = """
Answers become text one token at a time. Compared with a decoding of prompt and answer in one piece: every token of the
vocabulary, texts of many scripts that part in the middle of characters, wrong bytes, special tokens, stop texts. And
microseconds of CPU time a token, in the first thousand of an answer and in the last of {streamed:,}.

"""

LARGE_CONVERSION = """\
## Converting for many ranks

All {tp} ranks in one pass, beside a plain read + write + fsync of the same bytes. Memory is RssAnon of the converting
process at its peak. Falcon-180B at full depth is planned in {plan} s.

"""

PLAN = """\
## Planning

`fgsnap convert --dry-run` of deployments whose plans lie in `manifests/`, a whole process each; promised: less than
{goal:.0f} second.

"""

PARITY = """\
## Parity with transformers

Logits of the same tokens beside transformers in float32 on the same weights. The max error is relative to the range of
the logits. The last two columns divide by the error of transformers' own bfloat16: 1.00 is as exact as it, less is
closer to float32. Promised: at most 1e-4 and 64 equal tokens in float32, an RMS error of at most 1.25 in bfloat16.

"""


SAMPLING = """\
## Sampling

Microseconds to pick the tokens of one step, an option at a time, on {threads} threads: logits of a normal distribution,
at a temperature of 0.8 but for greedy and *flat*, where all tokens are nearly as likely. Plain is torch code that sorts
the vocabulary. The memory's time is what reading the logits once takes at the {bandwidth:.1f} GB/s of a sum over a
large tensor in the same run; logits that were just computed may lie in a cache, which is faster. Numbers beside one
another are those of {batches} rows.

"""

GEMMA = """\
## Gemma 3 270M from its GGUF file

The published Q4_K_M file, dequantised. Its tokenizer, rebuilt from the file, beside Gemma's own: {merges:,} merges,
{same}, and {differ} of {texts:,} texts in many scripts ({tokens:,} tokens) with other tokens. Its logits and greedy
tokens beside transformers in float32 on the same file, which has a reader of its own for it, after a short prompt and
after one beyond the window of 512; in bfloat16 the error is that of all logits, as a ratio to transformers' own. Then
`fgsnap serve` in float32, whose text is compared with that of transformers. Promised: the same tokenizer; in float32 at
most 1e-4, 64 equal tokens and the same text; in bfloat16 an RMS error of at most 1.25 times.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for name, result in results.items():
        if result.get("quick"):
            sys.exit(f"benchmarks/results/{name}.json is of a --quick run, which measures nothing")
    pages = {
        FIGURES: page(results),
        FAMILIES: families(results.get("families")),
        README: with_types(with_headline(README.read_text(), headline(results))),
    }
    for path, text in pages.items():
        if not options.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is not what benchmarks/results/ says: run python benchmarks/report.py")


def headline(results: dict[str, dict[str, Any]]) -> str:
    start, large = results["startup"], results["convert"]["sizes"][-1]
    return HEADLINE.format(
        machine=start["machine"],
        seconds=start["fgsnap"]["native"]["seconds"]["median"],
        sooner=start["transformers_over_fgsnap"]["native"]["median"],
        gigabytes=large["bytes"] / 1e9,
        share=large["share_of_plain"]["median"],
        memory=large["peak_anonymous_mebibytes"]["max"],
        cast=large["cast"]["peak_anonymous_mebibytes"],
        canary=large["canary"]["peak_anonymous_mebibytes"],
    )


def with_headline(readme: str, sentence: str) -> str:
    before, begin, rest = readme.partition("<!-- figures -->\n")
    _, end, after = rest.partition("\n<!-- /figures -->")
    assert begin and end, "README.md has lost the marks around its sentence on figures"
    return before + begin + sentence + end + after


def with_types(readme: str) -> str:
    counted, found = re.subn(r"(?<=\*\*Models\*\*: )\d+(?= model types)", str(len(MODEL_TYPES)), readme)
    assert found == 1, "README.md has lost its number of model types"
    return counted


def page(results: dict[str, dict[str, Any]]) -> str:
    sections = {
        "startup": startup,
        "peers": peers,
        "cli": commands,
        "packing": packing,
        "tokenizer_loading": tokenizers,
        "build": build,
        "convert": conversion,
        "convert_scale": large_conversion,
        "reshard": resharding,
        "plan": plans,
        "parity": parity,
        "gemma": gemma,
        "sampling": sampling,
        "scheduler": scheduler,
        "idle": idle,
        "splitfuse": splitfuse,
        "starvation": starvation,
    }
    known = {name: section for name, section in sections.items() if name in results}
    parts = [section(results[name]) + measured_on(name, results[name]) for name, section in known.items()]
    return "\n".join([INTRODUCTION, *parts])


def startup(result: dict[str, Any]) -> str:
    ours, ratios = result["fgsnap"], result["transformers_over_fgsnap"]
    wall = table(
        ("", "seconds", "transformers / fgsnap"),
        [
            *((f"fgsnap, `{name}`", spread(each["seconds"]), spread(ratios[name], 1)) for name, each in ours.items()),
            ("transformers", spread(result["transformers"]), ""),
            ("`import torch` alone", spread(result["import_torch"]), ""),
        ],
    )
    phases = [
        "- `{}`, milliseconds: {}; not accounted for: {:.1f} %.".format(
            name,
            ", ".join(f"{phase} {1000 * seconds:.0f}" for phase, seconds in each["phases"].items()),
            100 * each["unaccounted"],
        )
        for name, each in ours.items()
    ]
    return STARTUP.format(model=result["model"]) + f"{wall}\n{PHASES}" + "\n".join(phases) + "\n"


def commands(result: dict[str, Any]) -> str:
    names = {"python": "`python -c pass`"}
    rows = [(names.get(name, f"`fgsnap {name}`"), spread(each, 3)) for name, each in result["seconds"].items()]
    return f"## Commands\n\nWall time of a whole process.\n\n{table(('', 'seconds'), rows)}"


def packing(result: dict[str, Any]) -> str:
    rates, ratios = result["tokens_per_second"], result["cpu_over_generic"]
    rows = [
        (job.replace("_", " "), spread(rates["cpu"][job], 0), spread(rates["generic"][job], 0), spread(ratio))
        for job, ratio in ratios.items()
    ]
    return PACKING + table(("", "`--target cpu`", "generic", "ratio"), rows)


def build(result: dict[str, Any]) -> str:
    wall, cpu = spread(result["seconds"], 0), spread(result["cpu_seconds"], 0)
    return BUILD.format(wall=wall, cpu=cpu, goal=result["goal_seconds"])


def tokenizers(result: dict[str, Any]) -> str:
    heads = ("", "tokens", "merges", "`tokenizer.json`", "`tokenizer.tables`", "a token", "a token, from tables")
    rows = [
        (
            row["name"],
            f"{row['tokens']:,}",
            f"{row['merges']:,}",
            *(spread(row[way]["load_milliseconds"], 1) for way in ("whole", "cut")),
            *(spread(row[way]["encode_microseconds_a_token"], 2) for way in ("whole", "cut")),
        )
        for row in result["tokenizers"]
    ]
    return TOKENIZERS + table(heads, rows) + streams(result)


def streams(result: dict[str, Any]) -> str:
    heads = ("", "answers", "tokens", "that differ", "a token, of the first 1,000", "a token, of the last 1,000")
    rows = [
        (
            row["name"],
            *(f"{row['streams'][count]:,}" for count in ("answers", "tokens", "mismatches")),
            *(spread(row["cut"][f"stream_microseconds_a_token{end}"], 1) for end in ("", "_at_the_end")),
        )
        for row in result["tokenizers"]
    ]
    return STREAMS.format(streamed=result["streamed_tokens"]) + table(heads, rows)


def conversion(result: dict[str, Any]) -> str:
    rows = [
        (
            f"{size['bytes'] / 1e9:.2f} GB",
            spread(size["convert_seconds"]),
            spread(size["plain_seconds"]),
            spread(size["share_of_plain"]),
            f"{size['peak_anonymous_mebibytes']['max']:.1f} (+{size['mebibytes_above_idle']:.1f})",
            f"{size['cast']['peak_anonymous_mebibytes']:.1f} (+{size['cast']['mebibytes_above_idle']:.1f})",
            f"{size['canary']['peak_anonymous_mebibytes']:.1f} (+{size['canary']['mebibytes_above_idle']:.1f})",
        )
        for size in result["sizes"]
    ]
    heads = ("checkpoint", "seconds", "plain copy", "share of its rate", "memory, MiB", "with a cast", "canary")
    return CONVERSION.format(cache=result["cache"]) + table(heads, rows)


def large_conversion(result: dict[str, Any]) -> str:
    sparse, real = result["sparse"], result["real"]
    heads = ("checkpoint", "seconds", "plain copy", "share of its rate", "memory, MiB")
    rows = [
        (
            f"Falcon-180B, {sparse['layers']} of 80 layers, zeros: {sparse['bytes'] / 1e9:.2f} GB",
            f"{sparse['seconds']:.1f}",
            "",
            "",
            f"{sparse['peak_anonymous_mebibytes']:.1f}",
        ),
        (
            f"a Falcon of random weights: {real['bytes'] / 1e9:.2f} GB",
            spread(real["convert_seconds"]),
            spread(real["plain_seconds"]),
            spread(real["share_of_plain"]),
            f"{real['peak_anonymous_mebibytes']:.1f}",
        ),
    ]
    return LARGE_CONVERSION.format(tp=result["tp"], plan=spread(result["plan"]["seconds"])) + table(heads, rows)


def resharding(result: dict[str, Any]) -> str:
    rows = [
        (
            f"`{pair['target']}`, {pair['from']} to {pair['to']}",
            spread(pair["seconds"]["resharded cold"]),
            spread(pair["seconds"]["native cold"]),
            spread(pair["cold_ratio"]),
            spread(pair["cold_ratio_to_read"]),
            spread(pair["warm_ratio"]),
            spread(pair["warm_ratio_to_read"]),
            f"{pair['copied']:.2f}",
            spread(pair["device_reads"], 3),
            f"{pair['device_reads_of_tensors']['most']:.3f}",
        )
        for pair in result["pairs"]
    ]
    heads = (
        "target, degrees", "cold, s", "native, cold, s", "ratio", "to `read`", "warm ratio", "to `read`", "copied",
        "from the disk", "of a tensor",
    )  # fmt: skip
    return RESHARDING.format(gigabytes=result["pairs"][0]["bytes"] / 1e9) + table(heads, rows)


def parity(result: dict[str, Any]) -> str:
    rows = [
        (
            row["model"],
            f"`{row['backend']}`",
            row["dtype"],
            f"{row['max_relative_logit_error']:.1e}",
            f"{row['greedy_tokens_equal']} of 64" if row["dtype"] == "float32" else "",
            f"{row['rms_error_ratio_to_transformers_bfloat16']:.2f}" if row["dtype"] == "bfloat16" else "",
            f"{row['max_error_ratio_to_transformers_bfloat16']:.2f}" if row["dtype"] == "bfloat16" else "",
        )
        for row in result["results"]
    ]
    heads = ("model", "backend", "weights", "max error", "equal greedy tokens", "RMS error", "max error, ratio")
    return PARITY + table(heads, rows)


def plans(result: dict[str, Any]) -> str:
    rows = [(f"`{name}`", spread(each)) for name, each in result["seconds"].items()]
    return PLAN.format(goal=result["goal_seconds"]) + table(("deployment", "seconds"), rows)


def gemma(result: dict[str, Any]) -> str:
    found = result["tokenizer"]
    words = GEMMA.format(
        merges=found["merges"],
        same="the same ones" if found["merges_equal"] else "not the same ones",
        differ=found["texts_that_differ"] or "none",
        texts=found["texts"],
        tokens=found["tokens"],
    )
    rows = [
        (
            f"`{row['backend']}`, {row['dtype']}",
            f"{row['max_relative_logit_error']:.1e}",
            "" if row["dtype"] == "float32" else f"{row['rms_error_ratio_to_transformers_bfloat16']:.2f}",
            equal_tokens(row),
        )
        for row in result["parity"]
    ]
    rows += [(f"`fgsnap serve --tp {row['tp']}`, beside TP 1", "", "", equal_tokens(row)) for row in result["served"]]
    return words + table(("", "max error", "RMS ratio in bfloat16", "equal greedy tokens"), rows)


def sampling(result: dict[str, Any]) -> str:
    options: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        options.setdefault((row["vocabulary"], row["option"]), []).append(row)
    batches = [str(row["batch"]) for row in next(iter(options.values()))]
    words = SAMPLING.format(
        threads=result["threads"]["native"],
        bandwidth=result["bandwidth_gigabytes_per_second"],
        batches=" / ".join(batches),
    )
    heads = (
        *(f"`native`, {batch} rows" if batch != "1" else "`native`, 1 row" for batch in batches),
        "`reference`, medians", "plain / native, medians", "native / memory's time, medians",
    )  # fmt: skip
    tables = []
    for vocabulary in dict.fromkeys(size for size, _ in options):
        lines = [
            (
                option,
                *(spread(row["microseconds"]["native"], 0) for row in rows),
                medians([row["microseconds"]["reference"] for row in rows], 0),
                medians([row["plain_over_native"] for row in rows if "plain_over_native" in row], 1),
                medians([row["native_over_limit"] for row in rows], 1),
            )
            for (size, option), rows in options.items()
            if size == vocabulary
        ]
        tables.append(table((f"{vocabulary:,} tokens", *heads), lines))
    return words + "\n".join(tables)


def equal_tokens(row: dict[str, Any]) -> str:
    return " and ".join(map(str, row["greedy_tokens_equal"])) + " of 64"


def measured_on(name: str, result: dict[str, Any]) -> str:
    machine = result["machine"]
    measured = {**machine["versions"], **result.get("peers", {})}
    versions = ", ".join(f"{package} {version}" for package, version in measured.items())
    host = f"{machine['cpus']} cores of {machine['cpu']}, {machine['memory']}, Python {machine['python']}"
    return f"\n`python benchmarks/{name}.py`, {result['date']}: {host}, {versions}.\n"


if __name__ == "__main__":
    main()
