"""Picking tokens from rows of logits, and their logprobs, as ops.Sampling and ops.Edits define them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fgsnap.kernels.ops import Edits, Sampled, Samples, Sampling
from fgsnap.kernels.philox import uniform

# Into how many the range of logits is divided to find where top_k and top_p end.
BINS = 1024
# Float64 logits that are drawn from at once; what lies in a processor's caches is much quicker to pass over again.
PIECE_BYTES, CACHED_BYTES = 64 << 20, 4 << 20

MINUS, ALL, TINY = -torch.inf, torch.inf, torch.finfo(torch.float64).tiny
NUMBERS = {"i": torch.int32, "d": torch.float64}


def picked(logits: torch.Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
    """One token a row: greedy ones of all rows at once, then all rows that need more, some at a time."""
    tokens = logits.argmax(-1).tolist() if len(how) else []
    healthy = sound(logits)
    tokens = [token if one.target < 0 else one.target for token, one in zip(tokens, how, strict=True)]
    free = [r for r, one in enumerate(how) if healthy[r] and one.target < 0]
    more = [r for r in free if how[r].temperature > 0 or how[r].edits is not None]
    for rows in pieces(more, logits):
        values = edited(logits[rows].double(), [how[r].edits for r in rows])
        found = drawn(values, [how[r] for r in rows], [positions[r] for r in rows])
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    tokens = [token if well else -1 for token, well in zip(tokens, healthy, strict=True)]
    asking = [r for r, one in enumerate(how) if one.logprobs >= 0 and tokens[r] >= 0]
    told = with_logprobs(logits, asking, [tokens[r] for r in asking], [how[r].logprobs for r in asking])
    return Samples(tokens, dict(zip(asking, told, strict=True)))


def scored(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[Sampled]:
    """The targets with their logprobs, and each row's ``top`` most likely tokens; token -1 for a broken row."""
    found = [Sampled(-1)] * len(targets)
    healthy = [row for row, well in enumerate(sound(logits)) if well]
    told = with_logprobs(logits, healthy, [targets[row] for row in healthy], [top] * len(healthy))
    for row, one in zip(healthy, told, strict=True):
        found[row] = one
    return found


def pieces(rows: Sequence[int], logits: torch.Tensor) -> list[Sequence[int]]:
    """So many rows at a time as are best passed over together."""
    step = max(1, (PIECE_BYTES if logits.is_cuda else CACHED_BYTES) // (8 * logits.shape[-1]))
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def sound(logits: torch.Tensor) -> list[bool]:
    """Whether each row has a finite logit and no NaN."""
    most = logits.amax(-1)  # NaN where there is any
    well, endless = most.isfinite(), most == torch.inf
    if bool(endless.any()):
        well |= endless & logits.isfinite().any(-1)
    return list(well.tolist())


# --- edits ------------------------------------------------------------------------------------------------------------


def edited(values: torch.Tensor, edits: Sequence[Edits | None]) -> torch.Tensor:
    """``values`` with the edits of their rows."""
    for row, one in zip(values, edits, strict=True):
        if one is not None:
            edit(row, one)
    return values


def edit(row: torch.Tensor, edits: Edits) -> None:
    """One row's edits, in place. Tokens that are not of the vocabulary are passed over."""

    def of(tokens: array[int], numbers: array[Any] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where they are in the row, and their numbers."""
        at = tensor(tokens, row.device).long()
        known = (at >= 0) & (at < len(row))
        return at[known], at if numbers is None else tensor(numbers, row.device)[known]

    if edits.allowed is not None:
        row.masked_fill_(~bits(edits.allowed, len(row)).to(row.device), MINUS)
    row[of(array("i", edits.banned))[0]] = MINUS
    at, bias = of(edits.biased, edits.biases)
    row[at] += bias
    if edits.repetition != 1.0:
        at = torch.cat((of(edits.counted)[0], of(edits.prompt)[0]))  # a token of both is written twice, the same
        some = row[at]
        row[at] = torch.where(some > 0, some / edits.repetition, some * edits.repetition)
    if edits.presence != 0.0 or edits.frequency != 0.0:
        at, counts = of(edits.counted, edits.numbers)
        row[at] -= edits.presence + counts * edits.frequency


def tensor(numbers: array[Any], device: torch.device) -> torch.Tensor:
    """A copy, for an array cannot grow while a tensor looks at it."""
    kind = NUMBERS[numbers.typecode]
    if not numbers:
        return torch.empty(0, dtype=kind, device=device)
    return torch.frombuffer(numbers, dtype=kind).to(device, copy=True)


def bits(mask: memoryview, count: int) -> torch.Tensor:
    """The first ``count`` bits of little-endian words."""
    octets = torch.frombuffer(bytearray(mask.cast("B")), dtype=torch.uint8)
    return (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:count].bool()


# --- tokens -----------------------------------------------------------------------------------------------------------


def drawn(values: torch.Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """A token of each row of edited logits [R, V]; -1 where there is none."""
    most, tokens = values.max(-1, keepdim=True)
    shares = weights(values, most, column(values, (one.temperature or 1.0 for one in how)))
    if any(0 < one.top_k < values.shape[-1] for one in how):
        shares *= prefix(values, (shares > 0).to(values.dtype), column(values, (one.top_k or ALL for one in how)))
    if any(one.top_p < 1.0 for one in how):
        parts = column(values, (one.top_p if one.top_p < 1.0 else ALL for one in how))
        shares *= prefix(values, shares, parts * shares.cumsum(-1)[:, -1:])
    if any(one.min_p > 0 for one in how):
        shares *= shares >= column(values, (one.min_p for one in how))
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


def prefix(values: torch.Tensor, shares: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Which shares belong to the shortest prefix of their row that reaches its goal, by descending value, of equal ones
    the first before the others. Nothing is sorted: bins of values tell in which one the prefix ends, and what lies in
    that is divided again until all of it is equal.
    """
    goal = goal.clamp(min=TINY)  # the largest is of it in any case
    reached = torch.zeros_like(goal)
    some, open_shares = values, shares
    while True:
        is_open = open_shares > 0
        high = some.masked_fill(~is_open, MINUS).amax(-1, keepdim=True)
        low = some.masked_fill(~is_open, torch.inf).amin(-1, keepdim=True)
        apart = low < high
        if not bool(apart.any()):
            break
        span = (high - low).masked_fill_(~apart, 1.0)
        bins = (high - some).div_(span).mul_(BINS).nan_to_num_(nan=0.0).clamp_(0, BINS - 1).long()
        running = torch.zeros(len(some), BINS, dtype=some.dtype, device=some.device)
        running = running.scatter_add_(-1, bins, open_shares).cumsum_(-1).add_(reached)
        last = torch.searchsorted(running, goal.minimum(running[:, -1:]))
        reached = torch.cat((reached, running), -1).gather(-1, last)
        is_open &= bins == last
        columns = is_open.any(0).nonzero()[:, 0]
        some, open_shares = some[:, columns], open_shares[:, columns] * is_open[:, columns]
    equal = values == high
    before = (shares * equal).cumsum_(-1).sub_(shares)
    return (values > high) | (equal & (before < goal - reached))


# --- logprobs ---------------------------------------------------------------------------------------------------------


def with_logprobs(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], counts: Sequence[int]
) -> list[Sampled]:
    """Of some rows the token with its logprob, and as many of the most likely as its count says with theirs."""
    found: list[Sampled] = []
    for piece in pieces(range(len(rows)), logits):
        some = logits[[rows[i] for i in piece]]
        logprobs = logprobs_of(some)
        best = most_likely(some, [min(counts[i], logits.shape[-1]) for i in piece])
        for row, i, ids in zip(logprobs, piece, best, strict=True):
            top = tuple(zip(ids.tolist(), row[ids].tolist(), strict=True))
            found.append(Sampled(tokens[i], float(row[tokens[i]]), top))
    return found


def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
    """In float64, of each row as if it were alone: a sum over several rows at once may be rounded otherwise."""
    values = logits.double()
    values = (values - values.amax(-1, keepdim=True)).nan_to_num_(nan=0.0, neginf=MINUS)
    return values.sub_(torch.stack([row.sum() for row in values.exp()]).log_()[:, None])


def most_likely(logits: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Of each row the ids of that many largest logits, descending (ties: lowest id first)."""
    if not any(counts):
        return [torch.empty(0, dtype=torch.long, device=logits.device)] * len(counts)
    wanted = torch.tensor(counts, device=logits.device)[:, None]
    bound = logits.topk(max(counts)).values.gather(-1, (wanted - 1).clamp_(min=0))
    above, equal = logits > bound, logits == bound
    equal &= equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True)
    ids = (above | equal).nonzero()[:, 1].split(list(counts))
    return [some[row[some].argsort(descending=True, stable=True)] for row, some in zip(logits, ids, strict=True)]
