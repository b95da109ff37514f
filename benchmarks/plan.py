"""Wall time of planning the reference deployments: ``fgsnap convert --dry-run`` with nothing but their config.json.

    python benchmarks/plan.py [--rounds 5] [--output benchmarks/results]

Every round plans each of them once, in a process of its own. The goal is less than a second, for Falcon-180B at TP 8
above all. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, finish

from fgsnap.bench.record import summary
from fgsnap.convert.families.published import published
from manifests import DEPLOYMENTS

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))
GOAL_SECONDS = 1.0


def main() -> None:
    options = arguments(__doc__, 5).parse_args()
    configs = {checkpoint.repo: checkpoint.config for checkpoint in published()}
    times: dict[str, list[float]] = {name: [] for name in DEPLOYMENTS}
    with tempfile.TemporaryDirectory() as scratch:
        for counted in range(-1, options.rounds):
            for name, deployment in DEPLOYMENTS.items():
                folder = Path(scratch) / name
                folder.mkdir(exist_ok=True)
                (folder / "config.json").write_text(json.dumps(configs[deployment.repo]))
                seconds = run(folder, deployment.tp, deployment.dtype)
                if counted >= 0:
                    times[name].append(seconds)
    seconds_of = {name: summary(values) for name, values in times.items()}
    met = all(each["median"] < GOAL_SECONDS for each in seconds_of.values())
    finish("plan", {"seconds": seconds_of, "goal_seconds": GOAL_SECONDS, "met": met}, options.output)


def run(folder: Path, tp: int, dtype: str) -> float:
    """Seconds from exec to exit."""
    command = [FGSNAP, "convert", str(folder), "--tp", str(tp), "--dtype", dtype, "--dry-run", "--json"]
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


if __name__ == "__main__":
    main()
