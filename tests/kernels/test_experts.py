"""Experts of every backend, with every way to pick them, against plain float64 arithmetic, one token at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels.ops import ActivationArgs, ExpertsArgs, RouterArgs
from tests.kernels.backends import KINDS_OF_BACKEND, assert_close, exact, exact_one, optional, tensor, values_of, weight

WIDTH, INNER = 24, 10
# An expert rounds after its products and after its activation, and what several of them give may cancel.
ROUNDINGS = 6


class Router(NamedTuple):
    """A router's numbers; the fields are those of RouterArgs."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    selection_bias: torch.Tensor | None = None
    score: str = "softmax"
    top_k: int = 2
    select_first: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_rank: str = "max"
    renormalize: bool = False
    scale: float = 1.0

    def args(self, ops, dtype="float32"):
        numbers = (weight(ops, self.weight, dtype), optional(ops, self.bias), optional(ops, self.selection_bias))
        return RouterArgs(*numbers, *self[3:])

    def picked(self, x):
        """The experts of one token x [H] and their weights."""
        logits = (self.weight @ x + (0.0 if self.bias is None else self.bias)).tolist()
        scores = self.scored(logits)
        extra = [0.0] * len(logits) if self.selection_bias is None else self.selection_bias.tolist()
        preference = [s + e for s, e in zip(scores, extra, strict=True)]
        open_to_choice = self.eligible(preference)
        rank = logits if self.select_first else preference
        experts = sorted(open_to_choice, key=lambda e: (-rank[e], e))[: self.top_k]
        weights = self.scored([logits[e] for e in experts]) if self.select_first else [scores[e] for e in experts]
        total = sum(weights) if self.renormalize else 1.0
        return [(e, w / total * self.scale) for e, w in zip(experts, weights, strict=True)]

    def scored(self, logits):
        if self.score == "sigmoid":
            return [1 / (1 + math.exp(-v)) for v in logits]
        total = sum(math.exp(v) for v in logits)
        return [math.exp(v) / total for v in logits]

    def eligible(self, preference):
        size = len(preference) // self.groups
        counted = 1 if self.group_rank == "max" else 2
        groups = [range(g * size, (g + 1) * size) for g in range(self.groups)]
        ranks = [sum(sorted((preference[e] for e in group), reverse=True)[:counted]) for group in groups]
        kept = sorted(range(self.groups), key=lambda g: (-ranks[g], g))[: self.kept_groups]
        return [e for g in sorted(kept) for e in groups[g]]


class Experts(NamedTuple):
    """The experts' numbers; the fields are those of ExpertsArgs."""

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    kind: str = "silu"
    gated: bool = True
    clamp: float | None = None
    weigh_input: bool = False

    def args(self, ops, dtype="float32"):
        return ExpertsArgs(
            weight(ops, self.gate_up, dtype),
            optional(ops, self.gate_up_bias),
            weight(ops, self.down, dtype),
            optional(ops, self.down_bias),
            ActivationArgs(self.kind, self.gated, self.clamp),
            self.weigh_input,
        )

    def one(self, e, x):
        inner = self.gate_up[e] @ x + (0.0 if self.gate_up_bias is None else self.gate_up_bias[e])
        return self.down[e] @ self.act(inner) + (0.0 if self.down_bias is None else self.down_bias[e])

    def act(self, inner):
        if not self.gated:
            return inner.clamp(min=0)
        gate, up = inner.chunk(2)
        if self.kind == "silu":
            return gate * torch.sigmoid(gate) * up
        gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def expected(self, x, router):
        out = torch.zeros_like(x)
        for t, row in enumerate(x):
            for e, share in router.picked(row):
                out[t] += self.one(e, share * row) if self.weigh_input else share * self.one(e, row)
        return out


def router(count, **changes):
    return Router(exact(count, WIDTH, seed=1, scale=WIDTH**-0.5), **changes)


def experts(count, *, biased=False, **changes):
    rows = 2 * INNER if changes.get("gated", True) else INNER
    return Experts(
        exact(count, rows, WIDTH, seed=2, scale=WIDTH**-0.5),
        exact(count, rows, seed=3) if biased else None,
        exact(count, WIDTH, INNER, seed=4, scale=INNER**-0.5),
        exact(count, WIDTH, seed=5) if biased else None,
        **changes,
    )


def found(ops, x, chosen_router, chosen_experts, dtype="float32"):
    args = chosen_router.args(ops, dtype), chosen_experts.args(ops, dtype)
    return values_of(ops, ops.experts(tensor(ops, x), *args), *x.shape)


BIAS, SELECTION = exact(12, seed=6), exact(12, seed=7, scale=0.3)
ROUTERS = {
    "softmax": {},
    "softmax, renormalized": {"renormalize": True},
    "softmax, scaled": {"scale": 16.0, "top_k": 3},
    "one of all": {"top_k": 1},
    "all of all": {"top_k": 12},
    "bias": {"bias": BIAS},
    "first the logits, then softmax": {"select_first": True, "top_k": 4, "bias": BIAS},
    "first the logits, then sigmoid": {"select_first": True, "top_k": 1, "score": "sigmoid"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, renormalized and scaled": {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    "selection bias": {"score": "sigmoid", "selection_bias": SELECTION, "top_k": 4},
    "groups by the largest": {"groups": 4, "kept_groups": 2, "top_k": 3},
    "groups by the two largest": {
        "groups": 4,
        "kept_groups": 2,
        "top_k": 4,
        "group_rank": "top2_sum",
        "score": "sigmoid",
        "selection_bias": SELECTION,
        "renormalize": True,
        "scale": 2.5,
    },
    "all groups": {"groups": 3, "kept_groups": 3},
    "groups of one": {"groups": 12, "kept_groups": 5},
    "groups and first the logits": {"groups": 3, "kept_groups": 1, "select_first": True, "selection_bias": SELECTION},
}


@pytest.mark.parametrize("rows", [1, 29])
@pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS.keys())
def test_every_way_to_pick_experts(backend, changes, rows):
    x, how, which = exact(rows, WIDTH), router(12, **changes), experts(12)
    assert_close(found(backend.ops, x, how, which), which.expected(x, how), backend.activation, ROUNDINGS)


KINDS = {
    "biases": {"biased": True},
    "clamp": {"biased": True, "kind": "clamped_swiglu", "clamp": 0.7},
    "not gated": {"kind": "relu", "gated": False},
    "weighs its input": {"weigh_input": True},
    "weighs its input, biases": {"weigh_input": True, "biased": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_expert(backend, changes, dtype):
    x, how, which = exact(17, WIDTH), router(5, score="sigmoid"), experts(5, **changes)
    assert_close(found(backend.ops, x, how, which, dtype), which.expected(x, how), backend.activation, ROUNDINGS)


def test_equals_go_to_the_lowest_ids(backend):
    """Zeros as a router: every expert and every group ties."""
    x, which = exact(3, WIDTH), experts(12)
    for changes in ({"top_k": 3}, {"top_k": 3, "groups": 4, "kept_groups": 2}, {"top_k": 3, "select_first": True}):
        how = Router(torch.zeros(12, WIDTH).double(), **changes)
        assert [e for e, _ in how.picked(x[0])] == [0, 1, 2]
        assert_close(found(backend.ops, x, how, which), which.expected(x, how), backend.activation, ROUNDINGS)


def test_experts_that_nobody_picks_are_not_touched(backend):
    """Whatever they hold: zero times NaN would not be zero."""
    x, how, which = exact(6, WIDTH), router(12, bias=torch.tensor([9.0] * 4 + [-9.0] * 8).double()), experts(12)
    expected = which.expected(x, how)
    which.gate_up[4:] = which.down[4:] = torch.nan
    assert_close(found(backend.ops, x, how, which), expected, backend.activation, ROUNDINGS)


def test_a_token_does_not_notice_the_others(backend):
    """Alone or among tokens that pick the same experts, and beside a broken one."""
    ops, x, how, which = backend.ops, exact(9, WIDTH), router(4), experts(4)
    together = found(ops, x, how, which)
    alone = torch.cat([found(ops, row[None], how, which) for row in x])
    assert_close(together, alone, backend.activation, ROUNDINGS)
    x[3] = torch.nan
    broken = found(ops, x, how, which)
    assert broken[3].isnan().all()
    assert_close(broken[[0, 1, 2, 4, 5, 6, 7, 8]], alone[[0, 1, 2, 4, 5, 6, 7, 8]], backend.activation, ROUNDINGS)


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.sampled_from([1, 2, 3, 4]),
    kept=st.integers(1, 4),
    top_k=st.integers(1, 6),
    score=st.sampled_from(["softmax", "sigmoid"]),
    select_first=st.booleans(),
    renormalize=st.booleans(),
    group_rank=st.sampled_from(["max", "top2_sum"]),
    biased=st.booleans(),
    weigh_input=st.booleans(),
)
def test_any_mixture_of_ways(kind, rows, groups, kept, top_k, biased, weigh_input, **how):
    kept = min(kept, groups)
    chosen = router(
        12,
        groups=groups,
        kept_groups=kept,
        top_k=min(top_k, kept * 12 // groups),
        selection_bias=SELECTION if biased else None,
        **how,
    )
    x, which = exact(rows, WIDTH, seed=rows), experts(12, biased=biased, weigh_input=weigh_input)
    assert_close(found(exact_one(kind), x, chosen, which), which.expected(x, chosen), 2e-6, ROUNDINGS)
