"""What the host itself can do, measured by a small compiled program between the contestants' turns."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("machine.cpp")
MEBIBYTES, SECONDS = 1024, 1.0


class Limits(NamedTuple):
    """The host's limits with all its cores, a second; ``operations`` says of which kind."""

    bytes_per_second: float
    operations_per_second: float
    operations: str


def compiled(folder: Path) -> Path:
    """The program, compiled for this host."""
    program = folder / "machine"
    command = ["g++", "-O3", "-march=native", "-std=c++17", "-pthread", str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def limits(program: Path) -> Limits:
    """Measure now; it takes about two seconds."""
    threads = len(os.sched_getaffinity(0))
    command = [str(program), str(threads), str(MEBIBYTES), str(SECONDS)]
    return Limits(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
