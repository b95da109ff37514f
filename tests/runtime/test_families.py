"""Every family: a checkpoint in its own form, converted, and run by every backend, says what transformers says."""

from __future__ import annotations

import functools

import pytest

from benchmarks import qwen1
from benchmarks.compare import Fgsnap, Transformers, random_sequences, relative_error, tiny_checkpoint
from benchmarks.family_cases import CASES, VOCABULARY
from fgsnap.convert.families import FAMILIES
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import load_decoder
from fgsnap.snapshot import open_snapshot

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]
SEQUENCES = random_sequences((50, 1, 23), VOCABULARY)
# No length above is a multiple of the block size or of the chunk.
BLOCK_SIZE, CHUNK = 7, 9
ANSWER = 64


def checkpoint(folder, case, **changes):
    """A case's checkpoint in float32; ``changes`` go into its config."""
    maker = qwen1.tiny_checkpoint if case.family == "qwen" else tiny_checkpoint
    return maker(folder, case.family, "float32", **{**case.config, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case's snapshot, and the logits and greedy tokens of its checkpoint."""

    @functools.cache
    def make(name):
        case = CASES[name]
        folder = tmp_path_factory.mktemp("families")
        model = checkpoint(folder / "checkpoint", case)
        convert(str(model), folder / "snapshot", tp=1, canary=False)
        theirs = (
            qwen1.Qwen1(model, "float32", case.max_length) if case.family == "qwen" else Transformers(model, "float32")
        )
        return folder / "snapshot", theirs.logits(SEQUENCES), [theirs.greedy(tokens, ANSWER) for tokens in SEQUENCES]

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_float32_logits_and_greedy_tokens(made, name, backend):
    path, logits, answers = made(name)
    decoder = load_decoder(
        open_snapshot(path), backend=backend, device="cpu", dtype="float32", blocks=60, block_size=BLOCK_SIZE,
        max_length=CASES[name].max_length, threads=1,
    )  # fmt: skip
    ours = Fgsnap(decoder)
    error = relative_error(ours.logits(SEQUENCES, CHUNK), logits)
    assert error <= 1e-4, error
    assert error <= 2e-5, f"{error}: within the promise, but far from what float32 can do"
    assert ours.greedy_together(SEQUENCES, ANSWER, CHUNK) == answers


def test_every_family_has_a_case():
    """Those with a vision tower are the same decoders under other names."""
    assert {case.family for case in CASES.values()} == set(FAMILIES) - {"gemma3", "llama4"}
