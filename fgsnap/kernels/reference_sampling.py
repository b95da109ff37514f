"""Picking tokens from rows of logits, and their logprobs, as ops.Sampling defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fgsnap.kernels.ops import Sampled, Sampling

# The first guess at how many tokens make up top_p; it grows until they do.
FIRST_NUCLEUS = 64


def picked(logits: torch.Tensor, how: Sequence[Sampling]) -> list[Sampled]:
    """One token a row: all rows' health and greedy tokens at once, then each row that needs more by itself."""
    tokens = logits.argmax(-1).tolist() if len(how) else []
    for row, (rule, healthy) in enumerate(zip(how, sound(logits), strict=True)):
        if not healthy:
            tokens[row] = -1
        elif rule.temperature > 0:
            tokens[row] = drawn(logits[row], rule)
    return [
        Sampled(token) if rule.logprobs < 0 or token < 0 else with_logprobs(logits[row], token, rule.logprobs)
        for row, (token, rule) in enumerate(zip(tokens, how, strict=True))
    ]


def scored(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[Sampled]:
    """The targets with their logprobs, and each row's ``top`` most likely tokens; token -1 for a broken row."""
    return [
        with_logprobs(row, target, top) if healthy else Sampled(-1)
        for row, target, healthy in zip(logits, targets, sound(logits), strict=True)
    ]


def sound(logits: torch.Tensor) -> list[bool]:
    """Whether each row has a finite logit and no NaN."""
    return list((~logits.isnan().any(-1) & logits.isfinite().any(-1)).tolist())


def drawn(row: torch.Tensor, how: Sampling) -> int:
    """A random token of one sound row of logits."""
    top_k = how.top_k if 0 < how.top_k < len(row) else len(row)
    kept = largest(row, top_k)
    values = row[kept].double()
    weights = ((values - values.max()) / how.temperature).nan_to_num(nan=0.0).exp()
    if how.top_p < 1.0:
        nucleus = largest(values, nucleus_size(weights, how.top_p))
        kept, weights = kept[nucleus], weights[nucleus]
    running = weights.cumsum(0)
    index = int(torch.searchsorted(running, how.uniform * running[-1], right=True))
    # Rounding can leave the sum at the target: the first token at which it is complete is then the last with a share.
    return int(kept[min(index, int(torch.searchsorted(running, running[-1])))])


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, ascending, of the ``count`` largest values; of equal ones the lowest indices."""
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    threshold = values.topk(count).values[-1]
    above = (values > threshold).nonzero()[:, 0]
    equal = (values == threshold).nonzero()[: count - len(above), 0]
    return torch.cat((above, equal)).sort().values


def nucleus_size(weights: torch.Tensor, top_p: float) -> int:
    """How many of the largest weights reach ``top_p`` of their sum. Looks at few of them when few suffice."""
    target = top_p * weights.sum()
    count = min(FIRST_NUCLEUS, len(weights))
    while True:
        running = weights.topk(count).values.cumsum(0)
        if count == len(weights) or running[-1] >= target:
            return min(int(torch.searchsorted(running, target)) + 1, count)
        count = min(8 * count, len(weights))


def with_logprobs(row: torch.Tensor, token: int, count: int) -> Sampled:
    """The token with its logprob, and the ``count`` most likely (ties: lowest id first) with theirs."""
    values = row.double()
    logprobs = values - values.logsumexp(0)
    ids = largest(row, min(count, len(row))).tolist() if count else []
    top = sorted(((i, float(logprobs[i])) for i in ids), key=lambda pair: (-pair[1], pair[0]))
    return Sampled(token, float(logprobs[token]), tuple(top))
