"""How long fgsnap takes to compile and install: ``pip install .`` into a new virtual environment, dependencies aside.

    python benchmarks/build.py [--rounds 3] [--output benchmarks/results]

The build tools are fetched by pip as for any user, and that is counted. The goal is at most 90 s on 2 cores.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from common import arguments, finish

from fgsnap.bench.record import summary

ROOT = Path(__file__).parents[1]
GOAL_SECONDS = 90.0


def main() -> None:
    options = arguments(__doc__, 3).parse_args()
    runs = [install() for _ in range(options.rounds)]
    wall = summary([seconds for seconds, _ in runs], 1)
    cpu = summary([seconds for _, seconds in runs], 1)
    met = wall["median"] <= GOAL_SECONDS
    result = {"seconds": wall, "cpu_seconds": cpu, "goal_seconds": GOAL_SECONDS, "met": met}
    finish("build", result, options.output)


def install() -> tuple[float, float]:
    """Seconds, and CPU seconds of all processors together, of one installation."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = str(Path(scratch) / "bin" / "python")
        before, begin = children(), time.monotonic()
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", str(ROOT)]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        seconds = time.monotonic() - begin
        command = [python, "-c", "import fgsnap.built as b; print(b.built_library('_merge.so', 'fgsnap', ''))"]
        made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch).stdout
        assert "_merge.so" in made, "nothing was compiled"
        return seconds, children() - before


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
