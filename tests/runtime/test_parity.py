"""A checkpoint, converted and run by every backend, says what transformers says of the same checkpoint."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import transformers

from benchmarks.compare import (
    Fgsnap,
    Transformers,
    mean_error,
    random_sequences,
    relative_error,
    tiny_checkpoint,
)
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import load_decoder
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.request import Request, SamplingParams, Token
from fgsnap.snapshot import open_snapshot

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
LENGTHS = (50, 1, 23)
# No length above is a multiple of the block size or of the chunk.
BLOCK_SIZE, CHUNK = 7, 9


class Case(NamedTuple):
    """A tiny checkpoint: its family, changes to its config, and the deployment's context."""

    family: str
    config: dict
    max_length: int = 128


def scaled(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


SHORT, LONG = [1.0, 1.3, 1.9, 2.2], [1.1, 2.5, 4.0, 7.5]
PLAIN = {
    "grouped queries": Case("llama", {}),
    "one key head each": Case("llama", {"num_key_value_heads": 6}),
    "one key head": Case("llama", {"num_key_value_heads": 1}),
    "tied": Case("llama", {"tie_word_embeddings": True}),
    "wide heads": Case("llama", {"head_dim": 20}),
    "attention biases": Case("llama", {"attention_bias": True}),
    "mlp biases": Case("llama", {"mlp_bias": True}),
    "gelu": Case("llama", {"hidden_act": "gelu"}),
    "gelu tanh": Case("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": Case("llama", {"hidden_act": "relu", "rms_norm_eps": 1e-3}),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral, window": Case("mistral", {"sliding_window": 11, "head_dim": 8}),
    "mistral, tied, long window": Case(
        "mistral", {"sliding_window": 4096, "tie_word_embeddings": True, "head_dim": 12}
    ),
    "linear": Case("llama", scaled("linear", factor=3.0)),
    "dynamic, not stretched": Case("llama", scaled("dynamic", factor=2.0)),
    "llama3": Case(
        "llama",
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "yarn": Case("llama", scaled("yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn, all settings": Case(
        "llama",
        scaled(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=8.0,
            beta_slow=0.5,
            truncate=False,
            mscale=0.8,
            mscale_all_dim=0.5,
        ),
    ),
    "proportional": Case("llama", scaled("proportional", partial_rotary_factor=0.5)),
    "yarn, attention factor": Case(
        "mistral",
        {
            "sliding_window": None,
            **scaled("yarn", factor=2.0, original_max_position_embeddings=128, attention_factor=0.9),
        },
    ),
}
# These rotations depend on the context: transformers picks by the sequence at hand, fgsnap by the deployment.
BY_CONTEXT = {
    "dynamic, stretched": (
        Case("llama", {**scaled("dynamic", factor=2.0), "max_position_embeddings": 32}, max_length=50),
        (50,),
    ),
    "longrope, short": (
        Case(
            "llama",
            scaled("longrope", factor=4.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=64),
            max_length=64,
        ),
        (50, 23),
    ),
    "longrope, long": (
        Case(
            "llama",
            scaled("longrope", factor=4.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=32),
            max_length=256,
        ),
        (50, 33),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes each case's checkpoint and snapshot once: (checkpoint folder, snapshot folder)."""

    @functools.cache
    def make(name, dtype="float32", tp=1):
        case = PLAIN.get(name) or BY_CONTEXT[name][0]
        folder = tmp_path_factory.mktemp("parity")
        tiny_checkpoint(folder / "checkpoint", case.family, dtype, **case.config)
        convert(str(folder / "checkpoint"), folder / "snapshot", tp=tp, canary=False)
        return folder / "checkpoint", folder / "snapshot"

    return make


def decoder(path, backend, dtype, max_length):
    return load_decoder(
        open_snapshot(path),
        backend=backend,
        device="cpu",
        dtype=dtype,
        blocks=60,
        block_size=BLOCK_SIZE,
        max_length=max_length,
        threads=1,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN)
def test_float32_logits_and_greedy_tokens(made, name, backend):
    checkpoint, snapshot = made(name)
    sequences = random_sequences(LENGTHS, 97)
    theirs = Transformers(checkpoint, "float32")
    ours = Fgsnap(decoder(snapshot, backend, "float32", PLAIN[name].max_length))
    error = relative_error(ours.logits(sequences, CHUNK), theirs.logits(sequences))
    assert error <= 1e-4, error
    assert error <= 2e-5, f"{error}: within the promise, but far from what float32 can do"
    prompt = sequences[2]
    assert ours.greedy(prompt, 64) == theirs.greedy(prompt, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BY_CONTEXT)
def test_rotations_that_depend_on_the_context(made, name, backend):
    case, lengths = BY_CONTEXT[name]
    checkpoint, snapshot = made(name)
    sequences = random_sequences(lengths, 97)
    ours = Fgsnap(decoder(snapshot, backend, "float32", case.max_length))
    error = relative_error(ours.logits(sequences, CHUNK), Transformers(checkpoint, "float32").logits(sequences))
    assert error <= 2e-5, error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["grouped queries", "mistral, window", "attention biases", "tied"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(made, name, backend):
    checkpoint, snapshot = made(name, "bfloat16")
    sequences = random_sequences((60, 60, 41), 97)
    exact = Transformers(checkpoint, "float32").logits(sequences)
    theirs = mean_error(Transformers(checkpoint, "bfloat16").logits(sequences), exact)
    ours = mean_error(Fgsnap(decoder(snapshot, backend, "bfloat16", 128)).logits(sequences, CHUNK), exact)
    assert 0 < ours <= 1.25 * theirs, f"ours {ours:.4g}, transformers {theirs:.4g}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_compute_over_a_bfloat16_snapshot(made, backend):
    checkpoint, snapshot = made("grouped queries", "bfloat16")
    sequences = random_sequences(LENGTHS, 97)
    ours = Fgsnap(decoder(snapshot, backend, "float32", 128)).logits(sequences, CHUNK)
    error = relative_error(ours, Transformers(checkpoint, "float32").logits(sequences))
    assert error <= 2e-5, error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float16_checkpoint(made, backend):
    checkpoint, snapshot = made("tied", "float16")
    sequences = random_sequences(LENGTHS, 97)
    model = decoder(snapshot, backend, "auto", 128)
    assert model.dtype == "float32"
    error = relative_error(
        Fgsnap(model).logits(sequences, CHUNK), Transformers(checkpoint, "float32").logits(sequences)
    )
    assert error <= 2e-5, error


@pytest.mark.parametrize("name, tp", [("grouped queries", 2), ("attention biases", 2), ("mistral, window", 2)])
def test_a_snapshot_of_any_degree_opens_at_degree_one(made, name, tp):
    sequences = random_sequences(LENGTHS, 97)
    found = [
        Fgsnap(decoder(made(name, tp=degree)[1], "reference", "float32", 128)).logits(sequences, CHUNK)
        for degree in (1, tp)
    ]
    assert relative_error(found[1], found[0]) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_any_size_give_the_same_logits(made, backend):
    _, snapshot = made("mistral, window")
    sequences = random_sequences(LENGTHS, 97)
    ours = Fgsnap(decoder(snapshot, backend, "float32", 128))
    whole = ours.logits(sequences, 50)
    for chunk in (1, 8, 13):
        assert relative_error(ours.logits(sequences, chunk), whole) <= (0.0 if backend == "native" else 5e-6), chunk


def test_positions_far_into_the_context(tmp_path):
    """Angles of thousands of radians: frequencies a bit apart from transformers' would show here first."""
    tiny_checkpoint(tmp_path / "checkpoint", "llama", max_position_embeddings=4096, num_hidden_layers=1)
    convert(str(tmp_path / "checkpoint"), tmp_path / "snapshot", tp=1, canary=False)
    sequence = random_sequences((3000,), 97)
    model = load_decoder(
        open_snapshot(tmp_path / "snapshot"), backend="auto", device="cpu", blocks=200, max_length=3000, threads=1
    )
    expected = Transformers(tmp_path / "checkpoint", "float32").logits(sequence)[-200:]
    error = relative_error(Fgsnap(model).logits(sequence, 500)[-200:], expected)
    assert error <= 1e-4, error


def test_the_comparison_can_tell_models_apart(made):
    """Weights of the tiny checkpoints are large enough that a small change of the config shows."""
    checkpoint, _ = made("llama3")
    sequences = random_sequences((50,), 97)
    right = Transformers(checkpoint, "float32").logits(sequences)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.rope_parameters["factor"] = 7.0
    other = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    wrong = Transformers.__new__(Transformers)
    wrong._model = other.eval()
    assert relative_error(wrong.logits(sequences), right) > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (20, 0.9)])
def test_one_seed_gives_the_same_tokens_on_every_backend(made, top_k, top_p):
    """In float32, from one counter-based generator; and alone as in company, which changes batches and chunks."""

    def sampled(backend, prompts):
        model = decoder(made("grouped queries")[1], backend, "float32", 128)
        engine = Engine(model, token_budget=CHUNK)
        tokens = {}
        for seed, prompt in prompts.items():
            params = SamplingParams(50, temperature=0.9, top_k=top_k, top_p=top_p, seed=seed)
            engine.submit(Request(str(seed), prompt, params))
        while engine.has_work():
            for output in engine.step().outputs():
                tokens.setdefault(output.request, []).extend(token.id for token in output.tokens)
        return tokens

    prompts = {1: (5, 6, 7), 2: (5, 6, 7), 2**63: tuple(range(20))}
    together = [sampled(backend, prompts) for backend in BACKENDS]
    assert all(tokens == together[0] for tokens in together)
    assert together[0]["1"] != together[0]["2"]
    assert sampled(BACKENDS[-1], {1: (5, 6, 7)}) == {"1": together[0]["1"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [CHUNK, 128])
def test_prompts_have_the_logprobs_that_transformers_gives_them(made, backend, budget):
    """Several prompts at once, in chunks, beside one that generates; a token has one number, in the top and outside."""
    checkpoint, snapshot = made("grouped queries")
    sequences = [list(map(int, tokens)) for tokens in random_sequences((50, 2, 23), 97)]
    engine = Engine(decoder(snapshot, backend, "float32", 128), token_budget=budget)
    engine.submit(Request("other", (1, 2, 3), SamplingParams(20, temperature=0.0)))
    for name, tokens in enumerate(sequences):
        engine.submit(Request(str(name), tuple(tokens), SamplingParams(name % 2, prompt_logprobs=97)))
    found: dict[str, list[Token]] = {}
    while engine.has_work():
        for output in engine.step().outputs():
            found.setdefault(output.request, []).extend(output.prompt)
    expected = Transformers(checkpoint, "float32").logits(sequences).log_softmax(-1)
    for name, (tokens, rows) in enumerate(zip(sequences, expected.split([*map(len, sequences)]), strict=True)):
        told = found[str(name)]
        assert [token.id for token in told] == tokens[1:]
        for token, row in zip(told, rows[:-1], strict=True):
            assert dict(token.top)[token.id] == token.logprob
            assert [logprob for _, logprob in token.top] == sorted(dict(token.top).values(), reverse=True)
            assert [dict(token.top)[id] for id in range(97)] == pytest.approx(row.tolist(), abs=2e-4)
