"""Which experts a token picks, as ops.RouterArgs defines it, and how picks are turned round to serve the experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fgsnap.kernels.ops import RouterArgs


def route(logits: torch.Tensor, args: RouterArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token and their weights, both [T, top_k], from float32 logits [T, X]."""
    scores = score(logits, args)
    preference = scores if args.selection_bias is None else scores + args.selection_bias.float()
    choice = logits if args.select_first else preference
    if args.groups > 1:
        choice = choice.masked_fill(~eligible(preference, args), -torch.inf)
    experts = best(choice, args.top_k)
    weights = score(logits.gather(1, experts), args) if args.select_first else scores.gather(1, experts)
    if args.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * args.scale


def score(logits: torch.Tensor, args: RouterArgs) -> torch.Tensor:
    """The router's score function over the last axis."""
    return logits.softmax(-1) if args.score == "softmax" else logits.sigmoid()


def eligible(preference: torch.Tensor, args: RouterArgs) -> torch.Tensor:
    """Whether each expert belongs to one of the token's best groups: [T, X]."""
    members = preference.view(len(preference), args.groups, -1)
    counted = 1 if args.group_rank == "max" else min(2, members.shape[-1])
    kept = best(members.topk(counted).values.sum(-1), args.kept_groups)
    chosen = torch.zeros(members.shape[:2], dtype=torch.bool, device=preference.device).scatter_(1, kept, True)
    return chosen.repeat_interleave(members.shape[-1], dim=1)


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of each row's ``count`` largest values, largest first; of equal ones the lowest index first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def turned_round(experts: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each of ``count`` experts that is picked, with where in ``experts`` [T, top_k], flattened, its picks are.

    Waits for the device once: how many rows an expert gets decides the shape of its products.
    """
    flat = experts.flatten()
    by_expert = flat.sort(stable=True).indices
    shares = by_expert.split(flat.bincount(minlength=count).tolist())
    return ((expert, picks) for expert, picks in enumerate(shares) if len(picks) > 0)
