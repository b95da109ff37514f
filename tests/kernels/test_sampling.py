"""Tokens and logprobs of every backend as tests/doubles.py words ops.Sampling and ops.Edits; and scores of targets."""

from __future__ import annotations

import gc
import itertools
import math
import random
import sys
import time
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.kernels.native import Native, instruction_sets
from fgsnap.kernels.native_sampling import Packer
from fgsnap.kernels.ops import Edits, HeadArgs, Sampled, Sampling
from fgsnap.kernels.philox import uniform
from fgsnap.kernels.reference import Reference
from fgsnap.kernels.tape import address_of
from tests.doubles import pick, picks
from tests.kernels.backends import KINDS_OF_BACKEND, NATIVE_PRESENT, exact, exact_one, tensor, weight, whole

NAN, INF = math.nan, math.inf


def logits(ops, values):
    """``values`` [R, V] as the backend's logits, whatever they are: float32 rows of an embedding table."""
    values = torch.as_tensor(values, dtype=torch.float32)
    if isinstance(ops, Reference):
        return values.clone()  # its embedding would be of its own dtype
    return ops.embed(ops.plan(whole(len(values)), len(values)), weight(ops, values), 1.0)


def sampled(ops, rows, hows, positions=None):
    """What the backend gives, and what the definition says."""
    positions = range(len(rows)) if positions is None else positions
    found = ops.sample(logits(ops, rows), hows, positions)
    plain = torch.as_tensor(rows, dtype=torch.float32).double().tolist()
    return found, picks(plain, hows, positions)


def assert_same(found, expected):
    assert found.tokens == expected.tokens
    assert found.logprobs.keys() == expected.logprobs.keys()
    for row, one in found.logprobs.items():
        other = expected.logprobs[row]
        assert one.token == other.token and [t for t, _ in one.top] == [t for t, _ in other.top]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-9)
        assert all(p == one.logprob for t, p in one.top if t == one.token)


def mask(vocabulary, allowed):
    """A bit for each token, as ops.Edits has them."""
    words = bytearray(-(-vocabulary // 32) * 4)
    for token in allowed:
        words[token // 8] |= 1 << token % 8
    return memoryview(words)


def edits(counts=(), **settings):
    made = Edits(**settings)
    for token in counts:
        made.count(token)
    return made


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.3, seed=2),
    Sampling(temperature=1.0, top_k=1, seed=3),
    Sampling(temperature=2.0, top_k=40, seed=4),
    Sampling(temperature=1.0, top_p=0.9, seed=5),
    Sampling(temperature=5.0, top_p=0.95, seed=6),
    Sampling(temperature=0.7, top_k=50, top_p=0.8, seed=7),
    Sampling(temperature=1.0, top_p=0.0, seed=8),
    Sampling(temperature=1.0, top_k=100000, seed=9),
    Sampling(temperature=1e-6, seed=10),
    Sampling(temperature=50.0, top_p=0.999, seed=11),
    Sampling(temperature=1.0, min_p=0.1, seed=12),
    Sampling(temperature=9.0, top_k=2000, top_p=0.7, min_p=0.3, seed=13),
    Sampling(temperature=9.0, min_p=1.0, seed=14),
    Sampling(temperature=1e-300, top_p=0.5, seed=15),
    Sampling(temperature=1e6, top_k=30, min_p=0.5, seed=2**64 - 1),
    Sampling(temperature=1.0, logprobs=5, edits=edits([1, 2, 2], repetition=1.2, prompt=(0, 1), frequency=0.3)),
    Sampling(temperature=1.0, edits=edits([1], presence=-2.0, bias={0: 1.5, 2: -INF}, banned=(1,))),
    Sampling(temperature=3.0, top_p=0.9, logprobs=0, edits=edits(allowed=mask(5000, range(0, 5000, 2)))),
    Sampling(logprobs=3, target=0),
    Sampling(temperature=1.0, logprobs=0, edits=edits(banned=(0,)), target=0),
]


@pytest.mark.parametrize("vocabulary", [1, 3, 97, 5000])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_sample_follows_its_definition(backend, vocabulary, scale):
    """At scale 0 all logits are equal; at 3 a few have nearly all the weight."""
    assert_same(*sampled(backend.ops, exact(len(SAMPLINGS), vocabulary, scale=scale), SAMPLINGS))


VOCABULARY = 40
tokens = st.integers(0, VOCABULARY + 2)  # some are not of the vocabulary
ties = st.integers(-6, 6).map(lambda half: half / 2)
wild = st.floats(width=32, allow_nan=False, allow_infinity=False)
broken = st.sampled_from([NAN, INF, -INF])
some_edits = st.builds(
    edits,
    st.lists(tokens, max_size=8),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25]),
    bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.1, 100.0, -INF]), max_size=4),
    banned=st.lists(tokens, max_size=4),
    prompt=st.lists(tokens, max_size=6, unique=True),
    allowed=st.none() | st.lists(st.integers(0, VOCABULARY - 1)).map(lambda allowed: mask(VOCABULARY, allowed)),
)
ways = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0, 100.0, 1e-300]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, VOCABULARY - 1, VOCABULARY + 1]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.95, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([-1, -1, 0, 3, VOCABULARY + 1]),
    edits=st.none() | some_edits,
    target=st.just(-1),
)


def rows_of(vocabulary):
    def of(logit):
        return st.lists(logit, min_size=vocabulary, max_size=vocabulary)

    single = st.integers(0, vocabulary - 1).map(lambda at: [-INF] * at + [2.5] + [-INF] * (vocabulary - 1 - at))
    return of(ties) | of(wild) | of(ties | st.just(-INF)) | of(ties | broken) | of(broken) | single


@st.composite
def batches(draw):
    count, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, VOCABULARY))
    rows = draw(st.lists(rows_of(vocabulary), min_size=count, max_size=count))
    hows = draw(st.lists(ways, min_size=count, max_size=count))
    known = draw(st.lists(st.integers(-vocabulary, vocabulary - 1), min_size=count, max_size=count))
    hows = [how._replace(target=max(t, -1)) if how.logprobs >= 0 else how for how, t in zip(hows, known, strict=True)]
    return rows, hows, draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count))


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=300, deadline=None)
@given(batches())
def test_sample_follows_its_definition_whatever_the_rows(kind, batch):
    """Equal logits, infinities, NaN, one finite logit, huge numbers; every option, alone and with others."""
    assert_same(*sampled(exact_one(kind), *batch))


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9000), ways)
def test_sample_of_large_vocabularies(kind, draw, vocabulary, how):
    """Few different values, so that many candidates are equal, on both sides of what is kept."""
    values = [[draw.randrange(-24, 1) / draw.choice((2, 8, 64)) for _ in range(vocabulary)]]
    if how.edits is not None:
        allowed = [t for t in range(vocabulary) if draw.random() < 0.7]
        how.edits.allowed = None if how.edits.allowed is None else mask(vocabulary, allowed)
    assert_same(*sampled(exact_one(kind), values, [how._replace(top_k=how.top_k * vocabulary // 50)], [5]))


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@pytest.mark.parametrize("bias", [None, {3: 0.25}])
def test_a_large_top_k_ends_where_it_should(kind, bias):
    """Beyond what is kept by a running bound: ties at the end, both zeros, infinities, numbers next to each other."""
    draw, vocabulary = random.Random(1), 2500
    tiny = torch.tensor([1, 2, -(1 << 31) + 1, 0x3F800000, 0x3F800001], dtype=torch.int32).view(torch.float32).tolist()
    levels = (
        [0.0, -0.0], [1.0, 0.5, -0.5, -INF], [INF, 1.0], tiny, [3e38, -3e38, 1e-30, 2e-30],
        [draw.gauss(0, 1) for _ in range(vocabulary)],
    )  # fmt: skip
    rows = [[draw.choice(level) for _ in range(vocabulary)] for level in levels for _ in range(6)]
    tops = itertools.cycle([1024, 1025, vocabulary // 2, 1999, vocabulary - 1, vocabulary])
    hows = [
        Sampling(2.0, top_k, draw.choice((1.0, 0.6)), seed=seed, edits=bias and Edits(bias=bias))
        for seed, top_k in zip(range(len(rows)), tops, strict=False)
    ]
    assert_same(*sampled(exact_one(kind), rows, hows))


@pytest.mark.skipif(not NATIVE_PRESENT, reason="the native backend is not built")
def test_a_large_top_k_takes_the_time_of_a_few_passes():
    """Beside drawing at a temperature alone, in processor time; sorting what is kept takes a hundred times as long."""
    ops, vocabulary = Native(threads=1, dtype="float32"), 100_000
    held = logits(ops, exact(1, vocabulary, scale=2.5))

    def seconds(how):
        taken = []
        for position in range(5):
            began = time.process_time()
            ops.sample(held, [how], [position])
            taken.append(time.process_time() - began)
        return min(taken)

    assert seconds(Sampling(0.8, vocabulary - 1)) < 35 * seconds(Sampling(0.8))


@pytest.mark.parametrize("scale", [0.0, 0.01, 2.5])
@pytest.mark.parametrize(
    "settings", [{"top_k": 1500}, {"top_p": 0.999}, {"top_k": 1999, "top_p": 0.7}, {"min_p": 0.1}, {"logprobs": 5}]
)
def test_the_reference_sorts_no_vocabulary(monkeypatch, settings, scale):
    lengths = [0]

    def noted(method):
        def call(*args, **options):
            found = method(*args, **options)
            lengths.append((found if isinstance(found, torch.Tensor) else found[0]).shape[-1])
            return found

        return call

    for name in ("sort", "argsort", "topk", "unique"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    ops, values = Reference("cpu", "float32"), exact(3, 2000, scale=scale)
    ops.sample(logits(ops, values), [Sampling(0.8, seed=row, **settings) for row in range(3)], range(3))
    assert max(lengths) == settings.get("logprobs", 0)


def test_the_reference_calls_nothing_for_each_token():
    """Penalties and biases: as many calls for thousands of tokens as for one."""
    ops, values = Reference("cpu", "float32"), exact(1, 5000)

    def calls(count):
        some = edits(
            range(count), repetition=1.1, presence=0.5, prompt=range(count), bias=dict.fromkeys(range(count), 1.0)
        )
        made = []
        sys.setprofile(lambda frame, event, _: made.append(event) if event in {"call", "c_call"} else None)
        try:
            ops.sample(logits(ops, values), [Sampling(1.0, edits=some)], [0])
        finally:
            sys.setprofile(None)
        return len(made)

    calls(1)
    assert calls(4000) <= calls(1) + 10


def test_counts_are_read_where_they_lie():
    """A token more of an answer has nothing of its others packed again, wherever its arrays move when they grow."""
    how = Sampling(edits=Edits(presence=1.0))
    packer = Packer()
    for token in range(2000):
        how.edits.count(token // 2)
        [way] = packer.ways([how], 5000)._ways
        where = [address_of(how.edits.counted), address_of(how.edits.numbers), len(how.edits.counted)]
        assert [*way.edits._words[3:6]] == where


def test_long_answers_are_counted_right(backend):
    """As they grow, while others come and go, and after they were away themselves."""
    ops, draw, row = backend.ops, random.Random(4), exact(1, 400, scale=0.3)[0].tolist()
    hows = [Sampling(1.0, seed=seed, edits=Edits(frequency=0.5, repetition=1.2, prompt=(1, 2))) for seed in range(3)]
    for position in range(300):
        present = draw.sample(range(3), draw.randint(1, 3)) if position % 60 < 20 else [0, 1]
        some = [hows[r] for r in present]
        if position % 20:
            found = ops.sample(logits(ops, [row] * len(some)), some, [position] * len(some))
        else:
            found, expected = sampled(ops, [row] * len(some), some, [position] * len(some))
            assert_same(found, expected)
        for how, token in zip(some, found.tokens, strict=True):
            how.edits.count(token)
    assert all(sum(how.edits.counts.values()) > 0 for how in hows) and len(hows[0].edits.counts) > 150


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
def test_tokens_depend_on_their_own_row_alone(kind):
    ops, draw = exact_one(kind), random.Random(3)
    values = exact(len(SAMPLINGS), 500, scale=2.0)
    positions = [draw.randrange(1 << 33) for _ in SAMPLINGS]
    together = ops.sample(logits(ops, values), SAMPLINGS, positions)
    for _ in range(3):
        order = draw.sample(range(len(SAMPLINGS)), len(SAMPLINGS))
        hows, places = [SAMPLINGS[r] for r in order], [positions[r] for r in order]
        found = ops.sample(logits(ops, values[order]), hows, places)
        assert found.tokens == [together.tokens[r] for r in order]
        assert found.logprobs == {order.index(r): one for r, one in together.logprobs.items()}
    for row, how in enumerate(SAMPLINGS):
        alone = ops.sample(logits(ops, values[row : row + 1]), [how], positions[row : row + 1])
        assert alone.tokens == together.tokens[row : row + 1]


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_the_random_number_is_philox(kind, seed, position):
    """Of 8,192 equal logits the token tells the number's first 13 bits."""
    ops = exact_one(kind)
    found = ops.sample(logits(ops, [[1.0] * 8192]), [Sampling(1.0, seed=seed)], [position])
    assert found.tokens == [int(8192 * uniform(seed, position))]


@pytest.mark.parametrize("kind", KINDS_OF_BACKEND)
def test_sample_draws_the_distribution(kind):
    ops, values, count = exact_one(kind), exact(1, 10, scale=1.5), 4000
    found = ops.sample(logits(ops, values.expand(count, 10)), [Sampling(1.0, seed=4)] * count, range(count))
    share = torch.bincount(torch.tensor(found.tokens), minlength=10) / count
    assert (share - values[0].softmax(-1)).abs().max() <= 0.025


def test_greedy_takes_the_lowest_of_equals(backend):
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-3.0, -5.0, -3.0, -9.0]])
    found = backend.ops.sample(logits(backend.ops, values), [Sampling()] * 3, range(3))
    assert found == ([1, 0, 0], {})
    assert backend.ops.top_two(logits(backend.ops, values)) == [(1, 0.0), (0, 0.0), (0, 0.0)]


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(1.0, 2, 0.9, seed=5), Sampling(logprobs=2), Sampling(1.0, edits=edits(banned=(0,)))]
)
def test_a_broken_row_gives_no_token_and_spares_the_others(backend, how):
    values = torch.tensor([[0.0, 4.0, 1.0], [1.0, NAN, 0.0], [-INF] * 3, [NAN] * 3, [INF, -INF, INF], [0.0, 9.0, 1.0]])
    values = values.repeat(1, 30)  # more than one register
    found = backend.ops.sample(logits(backend.ops, values), [how] * 6, range(6))
    assert found.tokens[1:5] == [-1] * 4
    assert found.tokens[0] >= 0 and found.tokens[5] >= 0
    assert found.logprobs.keys() == ({0, 5} if how.logprobs >= 0 else set())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("forbids", [{"banned": range(70)}, {"allowed": mask(70, ())}])
def test_a_row_that_allows_nothing_gives_no_token(backend, temperature, forbids):
    how = Sampling(temperature, top_k=3, logprobs=1, edits=Edits(**forbids))
    found = backend.ops.sample(logits(backend.ops, exact(2, 70)), [how, Sampling(logprobs=0)], [1, 2])
    assert found.tokens[0] == -1 and found.tokens[1] >= 0 and found.logprobs.keys() == {1}


@pytest.mark.parametrize("logprobs", [-1, 2])
@pytest.mark.parametrize(
    "made",
    [edits(banned=(0, 3, 3)), edits(bias={1: -INF}), edits([2], presence=1.0), edits(allowed=mask(5, (1,)))],
    ids=["banned", "bias", "penalty", "allowed"],
)
def test_logits_stay_as_they_are(backend, made, logprobs):
    held = logits(backend.ops, [[1.0, 2.0, -INF, 3.0, 0.0]])
    before = list(backend.ops.floats(held))
    backend.ops.sample(held, [Sampling(1.0, edits=made, logprobs=logprobs)], [0])
    assert list(backend.ops.floats(held)) == before


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.5}])
def test_a_bias_that_leaves_no_number_gives_no_token(backend, settings):
    """Infinity less infinity, beside a row that has many to choose from."""
    values = torch.cat((torch.tensor([[INF, 1.0] + [0.0] * 68]), exact(1, 70).float()))
    hows = [Sampling(1.0, edits=Edits(bias={0: -INF}), **settings), Sampling(1.0, **settings)]
    found, expected = sampled(backend.ops, values, hows)
    assert found == expected and found.tokens[0] == -1


def test_edits_follow_the_answer_and_the_grammar(backend):
    """Counts that grow and masks that are replaced or written to in place are seen at once."""
    ops = backend.ops
    row = [4.0, 3.5, 3.0] + [0.0] * 61
    grammar = mask(64, range(64))
    how = Sampling(edits=Edits(frequency=0.4, repetition=1.1, allowed=grammar))
    other = Sampling(edits=Edits(frequency=0.4))
    masks = (range(64), range(64), range(64), range(1, 64), range(2, 64), range(64), range(64))
    for position, allowed in enumerate(masks):
        grammar[:] = mask(64, allowed)
        if position == 4:
            how.edits.allowed = None
        found, expected = sampled(ops, [row, row], [how, other], [position, position])
        assert_same(found, expected)
        for one, token in zip((how, other), found.tokens, strict=True):
            one.edits.count(token)
    assert len(how.edits.counts) > 1 and len(other.edits.counts) > 1


def test_logprobs_are_of_the_logits_as_they_were(backend):
    values = exact(4, 300, scale=2.0)
    forbidden = values.argmax(-1).tolist()
    hows = [
        Sampling(logprobs=3, edits=Edits(banned=forbidden)),
        Sampling(0.5, 1, 1.0, logprobs=3, edits=Edits(bias={7: 100.0})),
        Sampling(2.0, 0, 0.5, logprobs=5, edits=Edits(allowed=mask(300, [9]))),
        Sampling(1.0),
    ]
    found = backend.ops.sample(logits(backend.ops, values), hows, range(4))
    expected = values.log_softmax(-1)
    assert found.tokens[0] not in forbidden and found.tokens[1:3] == [7, 9]
    assert found.logprobs.keys() == {0, 1, 2}
    for row, one in found.logprobs.items():
        assert one.logprob == pytest.approx(expected[row, one.token].item(), abs=1e-9)
        assert one.top[0][0] == forbidden[row]


def test_top_logprobs_among_equals_are_the_lowest_ids(backend):
    values = [[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]]
    for count, ids in ((3, [1, 2, 3]), (50, [1, 2, 3, 5, 0, 4])):
        found = backend.ops.sample(logits(backend.ops, values), [Sampling(logprobs=count)], [0])
        assert [i for i, _ in found.logprobs[0].top] == ids


def test_backends_agree():
    """On what no test of one backend compares: large vocabularies at every scale."""
    for scale in (0.1, 1.0, 10.0):
        values = exact(len(SAMPLINGS), 30000, seed=7, scale=scale)
        hows = [how for how in SAMPLINGS if how.edits is None or how.edits.allowed is None]
        found = [
            exact_one(kind).sample(logits(exact_one(kind), values[: len(hows)]), hows, range(len(hows))).tokens
            for kind in KINDS_OF_BACKEND
        ]
        assert found.count(found[0]) == len(found)


@pytest.mark.skipif(not NATIVE_PRESENT, reason="the native backend is not built")
def test_every_instruction_set_follows_the_definition():
    """Rows that end in the middle of a register, and threads that share them."""
    rows = exact(len(SAMPLINGS), 1003, seed=2, scale=2.0)
    for name in instruction_sets():
        for threads in (1, 3):
            assert_same(*sampled(Native(threads=threads, instructions=name), rows, SAMPLINGS))


def test_packed_ways_are_never_mixed_up():
    """They are kept by identity, and identities are used again when objects are gone."""
    packer = Packer()
    for step in range(300):
        hows = [Sampling(1.0, seed=step * 10 + row, edits=edits(bias={row: float(step)})) for row in range(step % 5)]
        hows += hows[:1]
        ways = packer.ways(hows, 100)
        assert all(way.how is how for way, how in zip(ways._ways, hows, strict=True))
        assert ways.addresses == array("q", [way.at for way in ways._ways])
        del hows, ways
        gc.collect(0)


def test_equal_ways_of_different_answers_stay_apart(backend):
    """Two requests with the same options and seed, whose answers differ."""
    ops, row = backend.ops, [1.0, 0.9, 0.0]
    for _ in range(30):
        hows = [Sampling(edits=Edits(presence=1.0)) for _ in range(2)]
        hows[1].edits.count(0)
        assert ops.sample(logits(ops, [row] * 2), hows, [3, 3]).tokens == [0, 1]
        del hows


def test_ways_are_kept_for_a_batch_that_stays():
    packer, hows = Packer(), [Sampling(1.0, seed=row) for row in range(4)]
    first = packer.ways(list(hows), 100)
    assert packer.ways(list(hows), 100) is first
    fewer = packer.ways(hows[1:], 100)
    assert fewer.addresses == first.addresses[1:]


def test_what_is_no_way_to_sample_is_refused():
    ops = exact_one(KINDS_OF_BACKEND[0])
    if isinstance(ops, Reference):
        pytest.skip("the native backend is not built")
    for how in (Sampling(INF), Sampling(NAN), Sampling(1.0, -1), Sampling(1.0, 0, NAN), Sampling(1.0, 0, 1.0, 1.5)):
        with pytest.raises(ValueError, match="sample: "):
            ops.sample(logits(ops, [[0.0]]), [how], [0])
    for how in (Sampling(target=0), Sampling(logprobs=0, target=33)):
        with pytest.raises(ValueError, match="target"):
            ops.sample(logits(ops, [[0.0] * 33]), [how], [0])
    with pytest.raises(ValueError, match="sample: a mask of 4 bytes for 33 tokens"):
        ops.sample(logits(ops, [[0.0] * 33]), [Sampling(edits=Edits(allowed=mask(32, ())))], [0])


def test_the_definition_itself():
    """What tests/doubles.py says is what a reader of ops.Sampling expects of a plain case."""
    row = [math.log(share) for share in (0.1, 0.4, 0.2, 0.3)]
    number = uniform(9, 4)
    running = [(0, 0.1), (1, 0.5), (2, 0.7), (3, 1.0)]
    assert pick(row, Sampling(1.0, seed=9), 4) == Sampled(next(t for t, share in running if share > number))
    assert {pick(row, Sampling(1.0, top_k=2, seed=s), 0).token for s in range(40)} == {1, 3}
    assert {pick(row, Sampling(1.0, top_p=0.71, seed=s), 0).token for s in range(60)} == {1, 2, 3}
    assert {pick(row, Sampling(1.0, min_p=0.6, seed=s), 0).token for s in range(40)} == {1, 3}


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
    sampled = backend.ops.sample(backend.ops.logits(x, plan, head), [Sampling(logprobs=4)] * 4, range(4))
    assert backend.ops.score(x, plan, head, head.vocab_size, sampled.tokens, 4) == [*sampled.logprobs.values()]


def test_sampling_a_known_token_tells_what_scoring_does(backend):
    x, plan, head, _ = setting(backend.ops)
    targets = [297, 0, 13, 13]
    hows = [Sampling(logprobs=3, target=target) for target in targets]
    found = backend.ops.sample(backend.ops.logits(x, plan, head), hows, range(4))
    assert found.tokens == targets
    assert [*found.logprobs.values()] == backend.ops.score(x, plan, head, head.vocab_size, targets, 3)


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
