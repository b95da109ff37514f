"""docs/families.md: what fgsnap.convert.families says of itself, and how near each family is to transformers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tables import table

from fgsnap.convert.families.published import listing, parameter_count, published
from fgsnap.layout import possible_tp

INTRODUCTION = """\
# Model families

Written by `benchmarks/report.py` from what `fgsnap families` lists and from `benchmarks/results/families.json`.

fgsnap reads {types} model types (`model_type` in config.json). The published config.json of {count} checkpoints over
all of them is planned by the tests and its parameters are counted and compared with what is published; the last table
names them. A config key that would change what is computed, and that fgsnap does not know, is refused by its name.
[adding-a-family.md](adding-a-family.md) tells how to add one.

The features are those of the decoder spec ([format.md](format.md)) that these checkpoints use; what a plain Llama has,
every family may use, and many a family has options beyond what was published.

"""

PARITY = """\

## Parity with transformers

Tiny random checkpoints of every family, made with transformers' own classes (Qwen, the first, with its published
computation in plain torch), over 1, 2, 4 and 8 ranks, a process each. Three sequences run side by side, in chunks and
over KV blocks that do not divide them. Over 4 and 8 ranks the reference computes one checkpoint of each family.

- float32: the largest difference of a logit, as a share of the largest logit; promised: 1e-4. Greedy: tokens of three
  answers of 64 that are equal; promised: all.
- bfloat16: the root mean square error of a token's logits beside transformers in float32, the median of all tokens,
  divided by that of transformers' own bfloat16: 1.00 is as exact as it, less is closer to float32. Promised: 1.5. The
  median, for where two experts are nearly level a rounding picks the other one, and that token outweighs all others.

"""

CHECKPOINTS = """\

## Checkpoints that are planned

Parameters are those of the decoder, a tied head once. KV cache: bytes a token in bfloat16, over all layers.

"""


def families(result: dict[str, Any] | None) -> str:
    """The page; without the parity table where it was never measured."""
    listed, known = listing(), published()
    rows = [
        (f"`{row.model_type}`", row.models, str(len(row.checkpoints) or ""), row.needs, row.refused) for row in listed
    ]
    text = INTRODUCTION.format(types=len(listed), count=len(known))
    text += table(("model type", "models", "planned", "needs beyond a plain decoder", "not supported"), rows)
    return text + (PARITY + parity(result) if result else "") + CHECKPOINTS + checkpoints()


def parity(result: dict[str, Any]) -> str:
    cells: defaultdict[tuple[str, int], dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in result["results"]:
        cells[row["case"], row["tp"]][row["backend"], row["dtype"]] = row
    backends = sorted({row["backend"] for row in result["results"]}, reverse=True)
    heads = ("checkpoint", "ranks", *(f"{dtype}, {name}" for dtype in ("float32", "bfloat16") for name in backends))
    rows = [
        (
            name,
            str(tp),
            *(exact(found.get((backend, "float32"))) for backend in backends),
            *(rounded(found.get((backend, "bfloat16"))) for backend in backends),
        )
        for (name, tp), found in cells.items()
    ]
    return table(heads, rows)


def exact(row: dict[str, Any] | None) -> str:
    if row is None or "refused" in row:
        return "refused" if row else ""
    equal, all_of_them = row["greedy_tokens_equal"], row["greedy_tokens"]
    return f"{row['max_relative_logit_error']:.1e}, {equal} of {all_of_them}"


def rounded(row: dict[str, Any] | None) -> str:
    if row is None or "refused" in row:
        return "refused" if row else ""
    return f"{row['median_error_ratio_to_transformers_bfloat16']:.2f}"


def checkpoints() -> str:
    rows = []
    for checkpoint in sorted(published(), key=lambda each: (each.model_type, each.parameters)):
        spec = checkpoint.spec()
        degrees = ", ".join(str(tp) for tp in possible_tp(spec) if tp in (1, 2, 3, 4, 8, 16))
        kv = f"{2 * spec.kv_values_per_token():,}"
        rows.append((checkpoint.repo, f"`{checkpoint.model_type}`", f"{parameter_count(spec):,}", kv, degrees))
    return table(("checkpoint", "model type", "parameters", "KV cache", "ranks (of 1, 2, 3, 4, 8, 16)"), rows)
