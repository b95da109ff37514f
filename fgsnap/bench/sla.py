"""Effective throughput: how many requests a second were answered fast enough to be of use to a reader.

The measure of DeepSpeed-FastGen (arXiv:2401.08671): an answer counts if its first token came within
``prompt tokens / prompt rate`` seconds (512 tokens/s in the paper) and if, at every token after it, the exponential
moving average of the time between tokens was below ``1 / generation rate`` (2, 4 and 6 tokens/s in the paper).
The average has a span of 16 tokens and begins as that of the paper's own tools does: it is of all times so far, with
weights that fall by the factor 1 - 2 / (span + 1) a token and are divided by their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SPAN = 16


class Sla(NamedTuple):
    """What a reader asks for, in tokens a second."""

    prompt_rate: float = 512.0
    generation_rate: float = 4.0


def met(sla: Sla, prompt_tokens: int, first_token: float, gaps: Sequence[float]) -> bool:
    """Whether one answer kept to the SLA.

    Args:
        sla: asked for.
        prompt_tokens: length of the prompt.
        first_token: seconds from the request to the first token.
        gaps: seconds between each token and the one before; empty for an answer of one token.
    """
    if first_token > prompt_tokens / sla.prompt_rate:
        return False
    return all(average < 1 / sla.generation_rate for average in moving_averages(gaps))


def moving_averages(gaps: Iterable[float], span: int = SPAN) -> Iterable[float]:
    """The exponential moving average after each gap."""
    kept = 1 - 2 / (span + 1)
    total = weight = 0.0
    for gap in gaps:
        total = total * kept + gap
        weight = weight * kept + 1
        yield total / weight
