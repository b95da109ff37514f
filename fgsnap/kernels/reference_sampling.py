"""Picking tokens from rows of logits, and their logprobs, as ops.Sampling and ops.Edits define them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from fgsnap.kernels.ops import Edits, Sampled, Samples, Sampling
from fgsnap.kernels.philox import uniform

# The first guess at how many tokens make up top_p; it grows until they do.
FIRST_NUCLEUS = 64
# Float64 logits that are drawn from at once.
PIECE_BYTES = 64 << 20

MINUS = -torch.inf


def picked(logits: torch.Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
    """One token a row: greedy ones of all rows at once, then all rows that need more, some at a time."""
    tokens = logits.argmax(-1).tolist() if len(how) else []
    healthy = sound(logits)
    tokens = [token if one.target < 0 else one.target for token, one in zip(tokens, how, strict=True)]
    free = [r for r, one in enumerate(how) if healthy[r] and one.target < 0]
    more = [r for r in free if how[r].temperature > 0 or how[r].edits is not None]
    step = max(1, PIECE_BYTES // (8 * logits.shape[-1]))
    for start in range(0, len(more), step):
        rows = more[start : start + step]
        values = edited(logits[rows].double(), [how[r].edits for r in rows])
        found = drawn(values, [how[r] for r in rows], [positions[r] for r in rows])
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    tokens = [token if well else -1 for token, well in zip(tokens, healthy, strict=True)]
    asking = [r for r, one in enumerate(how) if one.logprobs >= 0 and tokens[r] >= 0]
    return Samples(tokens, {r: with_logprobs(logits[r], tokens[r], how[r].logprobs) for r in asking})


def scored(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[Sampled]:
    """The targets with their logprobs, and each row's ``top`` most likely tokens; token -1 for a broken row."""
    return [
        with_logprobs(row, target, top) if healthy else Sampled(-1)
        for row, target, healthy in zip(logits, targets, sound(logits), strict=True)
    ]


def sound(logits: torch.Tensor) -> list[bool]:
    """Whether each row has a finite logit and no NaN."""
    most = logits.amax(-1)  # NaN where there is any
    well, endless = most.isfinite(), most == torch.inf
    if bool(endless.any()):
        well |= endless & logits.isfinite().any(-1)
    return list(well.tolist())


# --- edits ------------------------------------------------------------------------------------------------------------


def edited(values: torch.Tensor, edits: Sequence[Edits | None]) -> torch.Tensor:
    """``values`` with the edits of their rows: those of all rows together, one kind after the other."""
    rows = [(row, one) for row, one in enumerate(edits) if one is not None]
    for row, one in rows:
        if one.allowed is not None:
            values[row].masked_fill_(~bits(one.allowed, values.shape[-1]).to(values.device), MINUS)
    at, _ = entries(values, ((row, token, 0.0) for row, one in rows for token in one.banned))
    values[at] = MINUS
    at, bias = entries(values, ((row, token, bias) for row, one in rows for token, bias in one.bias.items()))
    values[at] += bias
    repeating = [(row, one) for row, one in rows if one.repetition != 1.0]
    at, by = entries(values, ((row, t, one.repetition) for row, one in repeating for t in {*one.counts, *one.prompt}))
    values[at] = torch.where(values[at] > 0, values[at] / by, values[at] * by)
    at, less = entries(
        values, ((row, t, one.presence + n * one.frequency) for row, one in rows for t, n in one.counts.items())
    )
    values[at] -= less
    return values


def entries(
    values: torch.Tensor, found: Iterable[tuple[int, int, float]]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Rows and tokens as indices into ``values``, and a number for each; tokens of no vocabulary are passed over."""
    kept = [entry for entry in found if 0 <= entry[1] < values.shape[-1]]
    rows, tokens, numbers = zip(*kept, strict=True) if kept else ((), (), ())
    at = torch.tensor([rows, tokens], dtype=torch.long, device=values.device)
    return (at[0], at[1]), torch.tensor(numbers, dtype=values.dtype, device=values.device)


def bits(mask: memoryview, count: int) -> torch.Tensor:
    """The first ``count`` bits of little-endian words."""
    octets = torch.frombuffer(bytearray(mask.cast("B")), dtype=torch.uint8)
    return (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:count].bool()


# --- tokens -----------------------------------------------------------------------------------------------------------


def drawn(values: torch.Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """A token of each row of edited logits [R, V], of which it keeps what the rules do; -1 where there is none."""
    most, tokens = values.max(-1, keepdim=True)
    temperatures = column(values, (one.temperature or 1.0 for one in how))
    keep_largest(values, {r: one.top_k for r, one in enumerate(how) if 0 < one.top_k < values.shape[-1]})
    keep_largest(values, nuclei(values, most, temperatures, {r: one.top_p for r, one in enumerate(how)}))
    shares = weights(values, most, temperatures)
    shares[shares < column(values, (one.min_p for one in how))] = 0.0
    running = shares.cumsum(-1)
    numbers = (uniform(one.seed, position) for one, position in zip(how, positions, strict=True))
    reached = torch.searchsorted(running, column(values, numbers) * running[:, -1:], right=True)
    # Rounding can leave the sum at the goal: the first token at which it is complete is then the last with a share.
    complete = torch.searchsorted(running, running[:, -1:].contiguous())
    tokens = torch.where(column(values, (one.temperature for one in how)) > 0, reached.minimum(complete), tokens)
    return [int(token) for token in torch.where(most > MINUS, tokens, -1)[:, 0].tolist()]


def column(like: torch.Tensor, numbers: Iterable[float]) -> torch.Tensor:
    """A number a row."""
    return torch.tensor(list(numbers), dtype=like.dtype, device=like.device)[:, None]


def weights(values: torch.Tensor, most: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """What logits weigh beside the largest, which weighs 1 even where it is infinite."""
    return ((values - most) / temperatures).nan_to_num_(nan=0.0, neginf=MINUS).exp_()


def keep_largest(values: torch.Tensor, counts: Mapping[int, int]) -> None:
    """Of each row in ``counts`` keep that many of the largest, of equal ones the first; the others become -inf."""
    if not counts:
        return
    rows, limits = list(counts), list(counts.values())
    some, count = values[rows], torch.tensor(limits, device=values.device)[:, None]
    threshold = some.topk(max(limits)).values.gather(-1, count - 1)
    above, equal = some > threshold, some == threshold
    equal &= equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)
    values[rows] = some.masked_fill(~(above | equal), MINUS)


def nuclei(
    values: torch.Tensor, most: torch.Tensor, temperatures: torch.Tensor, top_p: Mapping[int, float]
) -> dict[int, int]:
    """How many of a row's largest logits reach its top_p, where that is below 1. Looks at few when few suffice."""
    rows = [row for row, share in top_p.items() if share < 1.0]
    if not rows:
        return {}
    some, most, temperatures = values[rows], most[rows], temperatures[rows]
    goal = column(values, (top_p[row] for row in rows)) * weights(some, most, temperatures).sum(-1, keepdim=True)
    count = min(FIRST_NUCLEUS, values.shape[-1])
    while True:
        running = weights(some.topk(count).values, most, temperatures).cumsum(-1)
        if count == values.shape[-1] or bool((running[:, -1:] >= goal).all()):
            sizes = (running < goal).sum(-1).add_(1).clamp_(max=count)
            return dict(zip(rows, sizes.tolist(), strict=True))
        count = min(8 * count, values.shape[-1])


# --- logprobs ---------------------------------------------------------------------------------------------------------


def with_logprobs(row: torch.Tensor, token: int, count: int) -> Sampled:
    """The token with its logprob, and the ``count`` most likely (ties: lowest id first) with theirs."""
    values = row.double()
    values = (values - values.max()).nan_to_num_(nan=0.0, neginf=MINUS)
    logprobs = values - values.exp().sum().log()
    count = min(count, len(row))
    if count == 0:
        return Sampled(token, float(logprobs[token]))
    ids = (row >= row.topk(count).values[-1]).nonzero()[:, 0]
    best = ids[row[ids].argsort(descending=True, stable=True)[:count]]
    return Sampled(token, float(logprobs[token]), tuple(zip(best.tolist(), logprobs[best].tolist(), strict=True)))
