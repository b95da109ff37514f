"""Lengths and prompts of a load: as they are meant to be distributed, exact in tokens, and the same for a seed."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fgsnap.bench.workload import COMMON_IDS, of_ids, of_tokenizer, words, works
from fgsnap.errors import NotFound, SourceError, UsageError
from tests.serving import byte_tokenizer

TEXTS = [path.read_text() for path in sorted((Path(__file__).parents[2] / "fgsnap").rglob("*.py"))]


def drawn(count, *, prompt_mean=500, answer_mean=60, context=None, seed="1"):
    lengths = {"prompt_mean": prompt_mean, "answer_mean": answer_mean}
    return works(of_ids(COMMON_IDS), count, **lengths, context=context, seed=seed)


def test_lengths_are_normal_with_a_deviation_of_three_tenths():
    made = drawn(4000)
    for lengths, mean in (([w.prompt_tokens for w in made], 500), ([w.max_tokens for w in made], 60)):
        assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.02)
        assert statistics.stdev(lengths) == pytest.approx(0.3 * mean, rel=0.05)
        within = sum(abs(length - mean) <= 0.3 * mean for length in lengths) / len(lengths)
        assert within == pytest.approx(0.683, abs=0.03)


def test_every_prompt_has_its_length_and_no_two_begin_alike():
    made = drawn(200)
    assert all(len(work.prompt) == work.prompt_tokens for work in made)
    assert len({tuple(work.prompt[:4]) for work in made}) == 200


def test_prompt_and_answer_stay_below_the_context_and_above_zero():
    made = drawn(2000, prompt_mean=200, answer_mean=3, context=256)
    assert max(work.prompt_tokens + work.max_tokens for work in made) == 255
    assert min(work.max_tokens for work in made) == 1
    assert min(min(work.prompt_tokens for work in drawn(2000, prompt_mean=2)), 1) == 1


def test_a_seed_gives_the_same_requests_and_another_gives_others():
    assert drawn(50) == drawn(50)
    assert not {tuple(work.prompt) for work in drawn(50)} & {tuple(work.prompt) for work in drawn(50, seed="2")}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Blanks are written as a mark, and one is put before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["<eos>"])
    lines = [line for text in TEXTS for line in text.replace("\n", " ").split("  ") if 0 < len(line) < 200]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it learns: no token of two words
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.pre_tokenizer = None
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_text_has_exactly_as_many_tokens_as_were_asked_for(make, tmp_path):
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = of_tokenizer(tmp_path / "tokenizer.json", as_text=True)
    for length in (1, 2, 17, 600):
        prompt = text(random.Random(length), length)
        assert len(tokenizer.encode(prompt, add_special_tokens=False).ids) == length
    ids = of_tokenizer(tmp_path / "tokenizer.json", as_text=False)
    assert set(ids(random.Random(0), 500)) <= set(words(tokenizer).ids)


def test_the_same_file_gives_the_same_prompts(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    first, second = (of_tokenizer(tmp_path / "tokenizer.json", as_text=True) for _ in range(2))
    assert first(random.Random(3), 50) == second(random.Random(3), 50)


def test_a_vocabulary_without_words_gives_ids_but_no_text(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(byte_tokenizer())
    ids = of_tokenizer(file, as_text=False)(random.Random(0), 5000)
    assert set(ids) == set(range(256))  # neither BOS nor EOS
    with pytest.raises(UsageError, match="--prompt-format ids"):
        of_tokenizer(file, as_text=True)


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"absent\.json"):
        of_tokenizer(tmp_path / "absent.json", as_text=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"config\.json is not a tokenizer\.json"):
        of_tokenizer(tmp_path / "config.json", as_text=False)
