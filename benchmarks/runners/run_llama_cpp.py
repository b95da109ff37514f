"""llama.cpp without its server: LLAMA_BATCHED_BENCH GGUF FLAG... Every job starts the program anew.

Its rates do not hold the time that it takes to load. It makes up its own prompts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import jobs


class LlamaBatchedBench:
    """Only rates: the program has no words, and ends after each job."""

    def __init__(self, program: str, gguf: str, flags: Sequence[str]) -> None:
        self._command = [program, "-m", gguf, *flags, "--output-format", "jsonl"]

    def answer(self, question: str, tokens: int) -> str:
        return ""

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        return self._rate("speed_tg", len(prompts), len(prompts[0]), tokens)

    def prefill(self, prompt: Sequence[int]) -> float:
        return self._rate("speed_pp", 1, len(prompt), 1)

    def _rate(self, which: str, sequences: int, prompt: int, tokens: int) -> float:
        size = str(sequences * (prompt + tokens))
        shape = ["-c", size, "-npl", str(sequences), "-npp", str(prompt), "-ntg", str(tokens)]
        done = subprocess.run([*self._command, *shape], check=True, capture_output=True, text=True)
        row = next(line for line in done.stdout.splitlines() if line.startswith("{"))
        return float(json.loads(row)[which])


jobs.serve(LlamaBatchedBench(sys.argv[1], sys.argv[2], sys.argv[3:]), jobs.results_apart())
