"""Wall time of the commands that must be instant, beside a bare Python: ``--help``, ``version``, ``inspect``.

Every round runs all of them in turn. The goal for ``--help`` and ``version`` is at most 0.10 s.

    python benchmarks/cli.py [--rounds 21] [--output benchmarks/results]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, finish, smollm2_gguf

from fgsnap.bench.record import summary

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))
GOAL_SECONDS = 0.10


def main() -> None:
    options = arguments(__doc__, 21).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = str(Path(scratch) / "snapshot")
        subprocess.run([FGSNAP, "convert", str(smollm2_gguf()), "-o", snapshot], check=True, capture_output=True)
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "--help": [FGSNAP, "--help"],
            "version": [FGSNAP, "version"],
            "inspect": [FGSNAP, "inspect", snapshot],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for counted in range(-1, options.rounds):
            for name, command in commands.items():
                seconds = run(command)
                if counted >= 0:
                    times[name].append(seconds)
    seconds_of = {name: summary(values) for name, values in times.items()}
    met = all(seconds_of[name]["median"] <= GOAL_SECONDS for name in ("--help", "version"))
    finish("cli", {"seconds": seconds_of, "goal_seconds": GOAL_SECONDS, "met": met}, options.output)


def run(command: list[str]) -> float:
    """Seconds from exec to exit."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


if __name__ == "__main__":
    main()
