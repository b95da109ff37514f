"""What every runner does: read a job a line, do it, write its result a line.

It is imported under the engine's own interpreter, so only the standard library is used here. Whatever else the engine
prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""SmolLM2's chat without its default system prompt, for engines that apply no template."""


class Engine(Protocol):
    """What a runner offers; prompts are token ids."""

    def answer(self, question: str, tokens: int) -> str:
        """Greedy answer to a user's question."""
        ...

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Tokens a second of the batch, each sequence getting ``tokens``, from their first ones on."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Tokens a second of reading a prompt and picking one token."""
        ...


def serve(engine: Engine, told: int) -> None:
    """Do the jobs of stdin until it ends; ``told`` is a descriptor for the results."""
    with os.fdopen(told, "w") as results:
        for line in sys.stdin:
            try:
                said = {"result": _do(engine, json.loads(line))}
            except Exception as error:
                said = {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
            results.write(json.dumps(said) + "\n")
            results.flush()


def results_apart() -> int:
    """A descriptor for the results; stdout itself is stderr from now on, for libraries that print."""
    told = os.dup(1)
    os.dup2(2, 1)
    return told


def rate(stamps: Sequence[float], sequences: int) -> float:
    """Tokens a second of a batch whose steps ended at ``stamps``: all steps but the first, which read the prompts."""
    return sequences * (len(stamps) - 1) / (stamps[-1] - stamps[0])


def timed(tokens: int, work: Callable[[], object]) -> float:
    """Tokens a second of ``work``."""
    begin = time.monotonic()
    work()
    return tokens / (time.monotonic() - begin)


def _do(engine: Engine, job: dict[str, Any]) -> str | float:
    if job["op"] == "answer":
        return engine.answer(job["prompt"], job["tokens"])
    if job["op"] == "decode":
        return engine.decode(job["prompts"], job["tokens"])
    return engine.prefill(job["prompt"])
