"""Real models behind the engine: a request gets the same answer alone, in any company, and after preemptions."""

from __future__ import annotations

import random

import msgspec
import pytest

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Request, SamplingParams, Token
from fgsnap.snapshot import open_snapshot

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
BATCHES = 50
VOCABULARY = 97

MINE = [
    Request("greedy", tuple(range(9, 22)), SamplingParams(12, temperature=0.0, logprobs=2)),
    Request("seeded", tuple(range(9, 18)), SamplingParams(12, temperature=1.0, top_p=0.9, seed=2**40, logprobs=0)),
    Request(
        "edited",
        (5, 6, 7),
        SamplingParams(
            12, seed=3, top_k=30, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((4, 2.0),), logprobs=1
        ),
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Makes a decoder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("determinism")
    tiny_checkpoint(folder / "checkpoint", "llama", "float32")
    convert(str(folder / "checkpoint"), folder / "snapshot", tp=1, canary=False)

    def make(backend: str, dtype: str, blocks: int = 60) -> Decoder:
        snapshot = open_snapshot(folder / "snapshot")
        return load_decoder(
            snapshot, backend=backend, device="cpu", dtype=dtype, blocks=blocks, block_size=4, max_length=40, threads=1
        )

    return make


def others(draw: random.Random) -> list[Request]:
    """Some requests, of which some begin as those of MINE do."""

    def prompt() -> list[int]:
        return [*range(9, 9 + draw.choice([0, 4, 8])), *draw.choices(range(VOCABULARY), k=draw.randint(1, 12))]

    return [
        Request(f"other{index}", tuple(prompt()), SamplingParams(draw.randint(1, 12), seed=draw.randrange(99)))
        for index in range(draw.randint(1, 6))
    ]


def answers(engine: Engine, arriving: list[Request], draw: random.Random | None = None) -> dict[str, list[Token]]:
    """What each request gets; with ``draw`` some arrive only when others generate already."""
    waiting, given = list(arriving), {request.id: [] for request in arriving}
    while waiting or engine.has_work():
        while waiting and (draw is None or not engine.has_work() or draw.random() < 0.4):
            engine.submit(waiting.pop())
        for output in engine.step().outputs():
            given[output.request] += output.tokens
    return given


def same(given: list[Token], expected: list[Token], apart: float) -> bool:
    ids = [token.id for token in given] == [token.id for token in expected]
    if not apart:
        return given == expected
    floats = zip(given, expected, strict=True)
    return ids and all(one.logprob == pytest.approx(other.logprob, abs=apart) for one, other in floats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_in_company_and_after_preemption_the_answer_is_the_same(model, backend):
    """Bit by bit with the native kernels, whose sums do not depend on the batch; torch's do."""
    decoder, apart = model(backend, "float32"), 0.0 if backend == "native" else 1e-4
    alone = {mine.id: answers(Engine(decoder), [mine])[mine.id] for mine in MINE}
    assert all(len(given) == 12 for given in alone.values())
    small = model(backend, "float32", blocks=11)
    preempted = 0
    for batch in range(BATCHES):
        draw = random.Random(batch)
        tight = batch % 2 == 1
        engine = Engine(
            small if tight else decoder,
            token_budget=draw.randint(6, 40),
            max_sequences=draw.randint(2, 9),
            admission="optimistic" if tight else "reserve",
            prefix_caching=draw.random() < 0.7,
        )
        company = [*MINE, *others(draw)]
        draw.shuffle(company)
        given = answers(engine, company, draw)
        preempted += engine.stats().preemptions > 0
        for mine in MINE:
            assert same(given[mine.id], alone[mine.id], apart), f"{mine.id} in batch {batch}"
    assert preempted >= BATCHES // 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_what_was_said_is_not_said_again_or_otherwise(model, backend):
    """A preempted answer is computed again of the tokens that were given, and goes on after them."""
    decoder = model(backend, "bfloat16", blocks=11)
    preempted = 0
    for batch in range(10):
        draw = random.Random(batch)
        engine = Engine(decoder, token_budget=20, max_sequences=6, admission="optimistic", prefix_caching=False)
        said: dict[str, list[int]] = {}
        for request in [*MINE, *others(draw)]:
            engine.submit(msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, seed=1)))
            said[request.id] = []
        lengths = {request.id: (len(request.prompt), request.params.max_tokens) for request in engine_requests(engine)}
        while engine.has_work():
            live = dict(engine._live)
            for output in engine.step().outputs():
                said[output.request] += [token.id for token in output.tokens]
            for name, sequence in live.items():
                assert sequence.tokens[lengths[name][0] :] == said[name]
        preempted += engine.stats().preemptions > 0
        assert all(len(said[name]) == most for name, (_, most) in lengths.items())
    assert preempted >= 2


def engine_requests(engine: Engine) -> list[Request]:
    return [sequence.request for sequence in engine._live.values()]
