"""Fail when a step of the scheduler has become slower: what `make bench-check` runs.

Measures what ``scheduler.py`` calls ``us_per_sequence_2048``: the best of some rounds, for other work on the machine
only adds to it. It may be at most 0.5, and at most twice what benchmarks/results/scheduler.json says, if that is there.

    python benchmarks/check_scheduler.py [--rounds 5]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from common import arguments
from scheduler import GOALS, SEQUENCES, steps

COMMITTED = Path(__file__).parent / "results" / "scheduler.json"
SLACK = 2.0


def main() -> None:
    options = arguments(__doc__, 5).parse_args()
    found = min(us_per_sequence(max(SEQUENCES)) for _ in range(options.rounds))
    limits = {"the goal": GOALS["us_per_sequence_2048"], **limit_of_committed(COMMITTED)}
    print(json.dumps({"us_per_sequence_2048": round(found, 4), "limits": limits}))
    for name, limit in limits.items():
        if found > limit:
            sys.exit(f"A step takes {found:.3f} us a sequence, more than {limit:.3f}, {name}.")


def limit_of_committed(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    committed = float(json.loads(path.read_text())["us_per_sequence_2048"])
    return {"twice the committed result": SLACK * committed}


def us_per_sequence(count: int) -> float:
    """Microseconds of all parts, of the step in the middle of each."""
    return float(sum(map(median, zip(*steps(count, mixed=False), strict=True)))) / count


if __name__ == "__main__":
    main()
