"""Tokens and logprobs of every backend, from logits of its own, as ops.Sampling words them; and scores of targets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels.ops import HeadArgs, Sampled, Sampling
from fgsnap.kernels.reference import Reference
from tests.kernels.backends import KINDS_OF_BACKEND, exact, exact_one, tensor, weight, whole


def logits(ops, values):
    """``values`` [R, V] as the backend's logits, exactly: one-hot rows pick columns of a head."""
    rows = len(values)
    eye = tensor(ops, torch.eye(rows, dtype=torch.float64))
    head = weight(ops, values.T.contiguous())
    return ops.logits(eye, ops.plan(whole(rows), rows), HeadArgs(head, None, values.shape[1]))


def one_row(ops, values):
    """One row of logits that may hold infinities and NaN: a bias on zeros."""
    zero = tensor(ops, torch.zeros(1, 4, dtype=torch.float64))
    head = weight(ops, torch.zeros(len(values), 4))
    return ops.logits(zero, ops.plan(whole(1), 1), HeadArgs(head, weight(ops, torch.tensor(values)), len(values)))


def picked_by_definition(row, how):
    """ops.Sampling read word by word, over float64 lists."""
    if how.temperature == 0:
        return max(range(len(row)), key=lambda i: (row[i], -i))
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if how.top_k:
        order = order[: how.top_k]
    top = row[order[0]]
    share = {i: torch.tensor((row[i] - top) / how.temperature, dtype=torch.float64).exp().item() for i in order}
    if how.top_p < 1:
        total, reached, kept = sum(share[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            reached += share[i]
            if reached >= how.top_p * total:
                break
        order = kept
    order = sorted(order)
    total, running = sum(share[i] for i in order), 0.0
    for i in order:
        running += share[i]
        if running > how.uniform * total:
            return i
    return order[-1]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, uniform=0.37),
    Sampling(temperature=0.3, uniform=0.91),
    Sampling(temperature=1.0, top_k=1, uniform=0.99),
    Sampling(temperature=2.0, top_k=40, uniform=0.5),
    Sampling(temperature=1.0, top_p=0.9, uniform=0.8),
    Sampling(temperature=5.0, top_p=0.95, uniform=0.6),
    Sampling(temperature=0.7, top_k=50, top_p=0.8, uniform=0.2),
    Sampling(temperature=1.0, top_p=0.0, uniform=0.999),
    Sampling(temperature=1.0, top_k=100000, uniform=0.0),
    Sampling(temperature=1e-6, uniform=0.5),
    Sampling(temperature=50.0, top_p=0.999, uniform=1 - 2**-53),
]


@pytest.mark.parametrize("vocabulary", [3, 97, 5000])
def test_sample_follows_its_definition(backend, vocabulary):
    values = exact(len(SAMPLINGS), vocabulary, scale=3.0)
    found = backend.ops.sample(logits(backend.ops, values), SAMPLINGS)
    expected = [picked_by_definition(row.tolist(), how) for row, how in zip(values, SAMPLINGS, strict=True)]
    assert [sampled.token for sampled in found] == expected


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.95, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_sample_with_many_ties(kind, row, temperature, top_k, top_p, uniform):
    """All backends keep the same tokens among equals; halves make most logits tie."""
    values = torch.tensor([row], dtype=torch.float64) / 2
    how = Sampling(temperature, top_k, top_p, uniform)
    expected = picked_by_definition(values[0].tolist(), how)
    ops = exact_one(kind)
    assert ops.sample(logits(ops, values), [how])[0].token == expected


def test_sample_draws_the_distribution(backend):
    """Evenly spaced uniforms give every token its share to within one draw."""
    values = exact(1, 10, scale=1.5)
    count = 500
    hows = [Sampling(temperature=1.0, uniform=(i + 0.5) / count) for i in range(count)]
    found = backend.ops.sample(logits(backend.ops, values.expand(count, 10).contiguous()), hows)
    counts = torch.bincount(torch.tensor([sampled.token for sampled in found]), minlength=10)
    assert (counts - count * values[0].softmax(-1)).abs().max() <= 1.0


def test_greedy_takes_the_lowest_of_equals(backend):
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-3.0, -5.0, -3.0, -9.0]]).double()
    found = backend.ops.sample(logits(backend.ops, values), [Sampling()] * 3)
    assert [sampled.token for sampled in found] == [1, 0, 0]
    assert backend.ops.top_two(logits(backend.ops, values)) == [(1, 0.0), (0, 0.0), (0, 0.0)]


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(1.0, 2, 0.9, 0.5), Sampling(logprobs=2), Sampling(1.0, logprobs=0)]
)
def test_a_broken_row_gives_no_token_and_spares_the_others(backend, how):
    ops = backend.ops
    for broken in ([1.0, float("nan"), 0.0], [float("-inf")] * 3, [float("nan")] * 3):
        assert ops.sample(one_row(ops, broken), [how])[0].token == -1
    values = torch.tensor([[0.0, 4.0, 1.0], [float("nan")] * 3]).double()
    rows = tensor(ops, values)
    head = weight(ops, torch.eye(3))
    mixed = ops.logits(rows, ops.plan(whole(2), 2), HeadArgs(head, None, 3))
    assert [sampled.token for sampled in ops.sample(mixed, [Sampling()] * 2)] == [1, -1]


def test_masked_tokens_are_never_drawn(backend):
    hidden = float("-inf")
    row = one_row(backend.ops, [hidden, 0.5, hidden, 0.25, hidden])
    for how in (Sampling(), Sampling(1.0, uniform=0.0), Sampling(9.0, 4, 1.0, 0.99), Sampling(9.0, 0, 0.99, 0.999999)):
        assert backend.ops.sample(row, [how])[0].token in (1, 3), how


def test_logprobs_are_of_the_unfiltered_logits(backend):
    values = exact(4, 300, scale=2.0)
    hows = [
        Sampling(logprobs=0),
        Sampling(0.5, 1, 1.0, 0.3, logprobs=3),
        Sampling(2.0, 0, 0.5, 0.7, logprobs=5),
        Sampling(1.0, uniform=0.2),
    ]
    found = backend.ops.sample(logits(backend.ops, values), hows)
    expected = values.log_softmax(-1)
    for row, (sampled, how) in enumerate(zip(found[:3], hows, strict=False)):
        assert sampled.logprob == pytest.approx(expected[row, sampled.token].item(), abs=1e-9)
        best = expected[row].sort(descending=True, stable=True)
        assert [i for i, _ in sampled.top] == best.indices[: how.logprobs].tolist()
        assert [p for _, p in sampled.top] == pytest.approx(best.values[: how.logprobs].tolist(), abs=1e-9)
        assert all(p == sampled.logprob for i, p in sampled.top if i == sampled.token)
    assert found[3].top == () and found[3].logprob == 0.0


def test_top_logprobs_among_equals_are_the_lowest_ids(backend):
    values = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]]).double()
    found = backend.ops.sample(logits(backend.ops, values), [Sampling(logprobs=3)])[0]
    assert [i for i, _ in found.top] == [1, 2, 3]
    everything = backend.ops.sample(logits(backend.ops, values), [Sampling(logprobs=50)])[0]
    assert [i for i, _ in everything.top] == [1, 2, 3, 5, 0, 4]


def test_top_two(backend):
    values = exact(5, 1000)
    best = values.topk(2).values
    found = backend.ops.top_two(logits(backend.ops, values))
    assert [token for token, _ in found] == values.argmax(-1).tolist()
    assert [margin for _, margin in found] == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-6)


# score


def setting(ops, *, rows=9, vocabulary=301, width=24):
    """Hidden states of ``rows`` tokens, of which every second is wanted, and a head with everything."""
    x, w, b = exact(rows, width), exact(vocabulary, width, seed=1), exact(vocabulary, seed=2)
    plan = ops.plan(whole(rows, wanted=range(1, rows, 2)), rows)
    head = HeadArgs(weight(ops, w, "bfloat16"), weight(ops, b, "bfloat16"), vocabulary - 3, 0.7, 5.0)
    plain = 0.7 * (x[1::2] @ w[: vocabulary - 3].T + b[: vocabulary - 3])
    return tensor(ops, x), plan, head, (5.0 * torch.tanh(plain / 5.0)).log_softmax(-1)


@pytest.mark.parametrize("top", [0, 1, 5, 1000])
def test_scores_are_the_logprobs_of_targets(backend, top):
    x, plan, head, expected = setting(backend.ops)
    targets = [297, 0, 13, 13]
    found = backend.ops.score(x, plan, head, head.vocab_size, targets, top)
    assert [scored.token for scored in found] == targets
    for row, scored in enumerate(found):
        assert scored.logprob == pytest.approx(expected[row, scored.token].item(), abs=1e-4)
        best = expected[row].sort(descending=True, stable=True)
        count = min(top, 298)
        assert [i for i, _ in scored.top] == best.indices[:count].tolist()
        assert [p for _, p in scored.top] == pytest.approx(best.values[:count].tolist(), abs=1e-4)


def test_scores_are_what_sampling_reports(backend):
    """The same numbers to the last bit, so that a prompt's logprobs and an answer's can be told together."""
    x, plan, head, _ = setting(backend.ops)
    sampled = backend.ops.sample(backend.ops.logits(x, plan, head), [Sampling(logprobs=4)] * 4)
    assert backend.ops.score(x, plan, head, head.vocab_size, [s.token for s in sampled], 4) == sampled


def test_no_rows_no_scores(backend):
    x, _, head, _ = setting(backend.ops)
    assert backend.ops.score(x, backend.ops.plan(whole(9, wanted=()), 9), head, head.vocab_size, [], 3) == []


def test_scores_of_a_broken_row_name_no_token(backend):
    ops, rows = backend.ops, torch.tensor([[0.0, 4.0, 1.0], [math.nan] * 3, [0.0, 0.0, 0.0]]).double()
    head = HeadArgs(weight(ops, torch.eye(3)), None, 3)
    found = ops.score(tensor(ops, rows), ops.plan(whole(3), 3), head, head.vocab_size, [1, 1, 2], 1)
    assert found[1] == Sampled(-1)
    assert [scored.token for scored in found] == [1, -1, 2]
    assert found[2].logprob == pytest.approx(-math.log(3), abs=1e-6)


def test_scores_do_not_depend_on_the_pieces(monkeypatch):
    ops, found = Reference("cpu", "float32"), []
    for size in (1 << 20, 1):
        monkeypatch.setattr("fgsnap.kernels.reference.SCORED_BYTES", size)
        x, plan, head, _ = setting(ops)
        found.append(ops.score(x, plan, head, head.vocab_size, [1, 2, 3, 4], 3))
    for one, other in zip(*found, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]


def resident(kind):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) << 10


def test_scores_of_long_prompts_take_little_memory(backend):
    """Logits of all 2,048 rows would take 256 MiB."""
    ops, rows, vocabulary = backend.ops, 2048, 32768
    x, head = tensor(ops, exact(rows, 8)), HeadArgs(weight(ops, exact(vocabulary, 8, seed=1)), None, vocabulary)
    plan = ops.plan(whole(rows), rows)
    ops.score(x, ops.plan(whole(rows, wanted=(0,)), rows), head, head.vocab_size, [1], 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    found = ops.score(x, plan, head, head.vocab_size, [5] * rows, 0)
    assert len(found) == rows and all(scored.logprob < 0 for scored in found)
    assert resident("VmHWM") - before < 160 << 20
