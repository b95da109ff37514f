"""The canary: its prompt, its values, its check, and the fresh process that computes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fgsnap.errors import FgsnapError
from fgsnap.kernels import native
from fgsnap.runtime import canary
from fgsnap.runtime.decoder import load_decoder
from fgsnap.snapshot import TextSection, open_snapshot
from fgsnap.spec import LongRope, Rope
from tests.snapshots import make_snapshot, random_weights, tiny_spec

BACKENDS = ["reference", *(["native"] if native.available()[0] else [])]


def word_tokenizer():
    words = {
        word: index for index, word in enumerate(["?", *dict.fromkeys(canary.SENTENCE.replace(",", " ,").split())])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode(), len(words)


def opened(path, spec=None, tp=1, **changes):
    make_snapshot(path, spec or tiny_spec(), tp, **changes)
    return open_snapshot(path)


def test_the_prompt_is_the_sentence_by_the_snapshots_tokenizer(tmp_path):
    files, words = word_tokenizer()
    text = TextSection(eos_token_ids=(0,), bos_token_id=60, add_bos=True)
    ids = canary.prompt(opened(tmp_path / "a", text_files={"tokenizer.json": files}))
    assert ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 10, 5] and words == 11
    with_bos = canary.prompt(opened(tmp_path / "b", text_files={"tokenizer.json": files}, text=text))
    assert with_bos == [60, *ids]


def test_the_prompt_without_a_tokenizer_is_spread_over_the_vocabulary(tmp_path):
    ids = canary.prompt(opened(tmp_path / "a"))
    assert len(ids) == 16 and len(set(ids)) > 8 and all(0 <= i < 61 for i in ids)
    assert canary.prompt(opened(tmp_path / "b")) == ids
    assert len(canary.prompt(opened(tmp_path / "c", tiny_spec(max_length=5)))) == 5


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_not_trusted(tmp_path):
    files, _ = word_tokenizer()
    ids = canary.prompt(opened(tmp_path / "a", tiny_spec(vocab_size=7), text_files={"tokenizer.json": files}))
    assert len(ids) == 16 and max(ids) < 7


@pytest.mark.parametrize("tp", [1, 2])
def test_compute_agrees_with_a_float32_decoder(tmp_path, tp):
    snapshot = opened(tmp_path / "a", tp=tp, dtype="bfloat16")
    values = canary.compute(snapshot)
    assert len(values.tokens) == len(values.next) == len(values.margins) == 16
    assert all(margin >= 0 for margin in values.margins)
    decoder = load_decoder(snapshot, backend="reference", device="cpu", dtype="float32", blocks=8)
    assert canary.check(decoder, values, 0.0) == canary.Match(ok=True, checked=16, mismatched=())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend_matches(tmp_path, backend, dtype):
    snapshot = opened(tmp_path / "a", dtype="bfloat16")
    values = canary.compute(snapshot)
    decoder = load_decoder(snapshot, backend=backend, device="cpu", dtype=dtype, blocks=8, block_size=5, threads=1)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    match = canary.check(decoder, values, tolerance)
    assert match.ok and match.checked >= 8, match


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_weight_is_noticed(tmp_path, backend):
    spec, arrays = tiny_spec(), random_weights(tiny_spec())
    values = canary.compute(opened(tmp_path / "a", weights=arrays))
    arrays["layers.1.down.weight"] = np.flipud(arrays["layers.1.down.weight"]).copy()
    decoder = load_decoder(opened(tmp_path / "b", spec, weights=arrays), backend=backend, device="cpu", blocks=8)
    match = canary.check(decoder, values, 0.01)
    assert not match.ok and match.mismatched


def test_positions_within_the_tolerance_need_not_agree(tmp_path):
    snapshot = opened(tmp_path / "a")
    values = canary.compute(snapshot)
    wrong = canary.Values(values.tokens, [(token + 1) % 61 for token in values.next], values.margins)
    decoder = load_decoder(snapshot, backend="reference", device="cpu", blocks=8)
    assert canary.check(decoder, wrong, 1e9) == canary.Match(ok=True, checked=0, mismatched=())
    middle = sorted(values.margins)[7]
    match = canary.check(decoder, wrong, middle)
    assert match.checked == 8 and match.mismatched == tuple(i for i, m in enumerate(values.margins) if m > middle)


def test_not_a_number_fails_whatever_the_tolerance(tmp_path):
    arrays = random_weights(tiny_spec())
    values = canary.compute(opened(tmp_path / "a", weights=arrays))
    arrays["layers.0.out.weight"][3, 3] = np.nan
    broken = opened(tmp_path / "b", weights=arrays)
    decoder = load_decoder(broken, backend="reference", device="cpu", blocks=8)
    assert canary.check(decoder, values, 1e9).mismatched == tuple(range(16))
    with pytest.raises(FgsnapError, match="no finite logits"):
        canary.compute(broken)


def run(*arguments):
    command = [sys.executable, "-m", "fgsnap.runtime.canary", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_fresh_process_prints_the_same_values(tmp_path):
    snapshot = opened(tmp_path / "a", dtype="bfloat16")
    done = run(tmp_path / "a")
    assert done.returncode == 0, done.stderr
    values = canary.compute(snapshot)
    printed = json.loads(done.stdout)
    assert printed["tokens"] == values.tokens and printed["next"] == values.next
    assert printed["margins"] == pytest.approx(values.margins, abs=1e-4)


NO_BACKEND = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from fgsnap.runtime.canary import main
code = main(["--bind-only", sys.argv[1]])
assert "fgsnap.kernels.native" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("tp", [1, 2])
def test_binding_alone_needs_no_backend(tmp_path, tp):
    with opened(tmp_path / "a", tp=tp) as snapshot:
        count = len(snapshot.manifest.tensors)
    command = [sys.executable, "-c", NO_BACKEND, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"tensors": count}


def test_binding_alone_still_refuses_what_is_damaged(tmp_path):
    opened(tmp_path / "a").close()
    os.truncate(tmp_path / "a" / "rank-00000-of-00001.safetensors", 4096)
    done = run("--bind-only", tmp_path / "a")
    assert done.returncode == 3 and "rank-00000-of-00001.safetensors" in done.stderr and done.stdout == ""
    assert run("--bind-only").returncode == 2


def test_errors_of_the_process_are_short_lines_and_exit_codes(tmp_path):
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 4 and 1 <= len(missing.stderr.splitlines()) <= 3 and missing.stdout == ""
    assert run().returncode == 2


@pytest.mark.parametrize("max_length", [20, 128])
def test_a_shorter_deployment_still_compares_the_models_own_rotation(tmp_path, max_length):
    """LongRoPE picks its table by the deployment's length; the canary was computed with that of the model's."""
    longrope = LongRope(tuple([1.0] * 4), tuple([7.0] * 4), original_length=32, attention_factor=1.3)
    spec = msgspec.structs.replace(tiny_spec(), ropes=(Rope(theta=100.0, dims=8, longrope=longrope),))
    snapshot = opened(tmp_path / "a", spec)
    values = canary.compute(snapshot)
    decoder = load_decoder(snapshot, backend="reference", device="cpu", blocks=8, block_size=16, max_length=max_length)
    match = canary.check(decoder, values, 1e-4)
    assert match.ok and match.checked >= 15


def test_a_cache_smaller_than_the_prompt_checks_its_beginning(tmp_path):
    snapshot = opened(tmp_path / "a")
    values = canary.compute(snapshot)
    decoder = load_decoder(snapshot, backend="reference", device="cpu", blocks=3, block_size=3, max_length=9)
    assert canary.check(decoder, values, 0.0) == canary.Match(ok=True, checked=9, mismatched=())
