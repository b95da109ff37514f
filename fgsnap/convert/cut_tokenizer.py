"""tokenizer.tables: a tokenizer.json of byte pair encoding, cut so that start-up has next to nothing to build.

``fgsnap.tokenizer`` tells what the parts are and how they give the same tokens as the whole. What it takes for that to
hold of every text is checked here, and then that it does hold of some; a tokenizer that does not pass stays whole.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from array import array
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from fgsnap.tokenizer import CUT, HEAD, SOURCE, Cut, Merge, Tokenizer, Whole, merge_loop

Pair = tuple[str, str]
LARGEST_ID = 1 << 24
SAMPLE = 1 << 12
"""How many tokens the comparison spells out."""

TEXTS = (
    "",
    " ",
    "What is the capital of France?  The capital of France is Paris.\n\n",
    "def f(x):\n\treturn {'a': [1, 22, 333, 4444], \"b\": x ** 2}  # 1e-9\r\n" * 3,
    "naïve café e\u0301 ﬁ Ǆ ½ \u00a0\u200b\ufeff 你好，世界 こんにちは 한글 Привет мир שלום مرحبا नमस्ते ไทย",
    "👩‍👧‍👦🇫🇷 𝔘𝔫𝔦 \U0010ffff \x00\x01\x7f <0x0A> ▁▁ Ġ Ċ <s></s> <|im_start|>user\nhi<|im_end|> [INST] <unk>",
    " " * 70 + "\n" * 30 + "\t" * 9 + "a" * 99 + "=" * 65 + "1234567890" * 7,
)


def cut_tokenizer(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The file to lie beside the checkpoint's tokenizer.json, by its name; none where the library has to do it all."""
    data = files.get(SOURCE)
    cut = None if data is None else _cut(data)
    if data is None or cut is None:
        return {}
    return {CUT: cut} if _agree(Whole(data), Cut(cut, merge_loop() or _merge_in_python(cut))) else {}


def _cut(data: bytes) -> bytes | None:
    """The file, if this is a tokenizer whose merges can be left for last."""
    try:
        library = Library.from_buffer(data)
        whole = msgspec.json.decode(data, type=dict[str, Any])
    except Exception:  # text_section and start-up tell what is wrong with it
        return None
    model = whole.get("model")
    if not isinstance(model, dict) or not _merges_last(model):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    merges = [_pair(merge) for merge in model["merges"] if not str(merge).startswith("#version")]
    added = {token.content: id for id, token in library.get_added_tokens_decoder().items()}
    if not _distinct(vocabulary) or not _harmless(added, model, library):
        return None
    wholes = _whole_words(model, merges) if model.get("ignore_merges") else frozenset[str]()
    known = {token: id for token, id in vocabulary.items() if _is_start(token, model) or token in added}
    known |= {token: vocabulary[token] for token in wholes} | added
    frame = {
        **whole,
        "truncation": None,
        "padding": None,
        "model": {**model, "vocab": known, "merges": []},
    }
    return _file(vocabulary, merges, msgspec.json.encode(frame))


def _pair(merge: Any) -> Pair:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merges_last(model: Mapping[str, Any]) -> bool:
    """Whether it is byte pair encoding that looks up characters as they are, and merges without chance."""
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def _distinct(vocabulary: Mapping[str, int]) -> bool:
    """Whether tables can hold the vocabulary: one token an id, and no empty text."""
    ids = set(vocabulary.values())
    return 0 < len(ids) == len(vocabulary) and max(ids) < LARGEST_ID and "" not in vocabulary


def _harmless(added: Mapping[str, int], model: Mapping[str, Any], library: Library) -> bool:
    """Whether added tokens can join the frame's vocabulary, which gives them their ids there.

    A word must not find one in it that the whole vocabulary does not have.
    """
    strangers = [token for token in added if token not in model["vocab"]]
    if any(_is_start(token, model) for token in strangers):
        return False
    if not model.get("ignore_merges") or library.pre_tokenizer is None:
        return not (model.get("ignore_merges") and strangers)
    return all(len(library.pre_tokenizer.pre_tokenize_str(token)) > 1 for token in strangers)


def _is_start(token: str, model: Mapping[str, Any]) -> bool:
    """Whether the model may look this token up before anything is merged."""
    return (
        len(token) == 1
        or token == model.get("unk_token")
        or (bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x"))
    )


def _whole_words(model: Mapping[str, Any], merges: list[Pair]) -> frozenset[str]:
    """The tokens that stand for a word of their own text without being what its characters merge to."""
    options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback") if model.get(name) is not None}
    merging = BPE(model["vocab"], merges, **options)
    return frozenset(
        token for token, id in model["vocab"].items() if [part.id for part in merging.tokenize(token)] != [id]
    )


def _file(vocabulary: Mapping[str, int], merges: list[Pair], frame: bytes) -> bytes:
    """Everything in its place. Of a pair that stands twice among the merges the later rank counts."""
    ids = max(vocabulary.values()) + 1
    texts = [b""] * ids
    for token, id in vocabulary.items():
        texts[id] = token.encode()
    rows = {(vocabulary[a], vocabulary[b]): (rank, vocabulary[a + b]) for rank, (a, b) in enumerate(merges)}
    pairs = np.array([(*pair, *rows[pair]) for pair in sorted(rows)], np.uint32).reshape(-1, 4)
    blob = b"".join(texts)
    columns = (
        [ids, len(pairs), len(blob), len(frame)],
        np.cumsum([len(text) for text in texts]),
        np.searchsorted(pairs[:, 0], np.arange(ids + 1)),
        *(pairs[:, column] for column in (1, 2, 3)),
    )
    return b"".join([*(np.asarray(column, "<u4").tobytes() for column in columns), blob, frame])


def _merge_in_python(data: bytes) -> Merge:
    """What the merge loop does, for hosts where it was not built: the same file is checked, and written, everywhere."""
    ids, count = struct.unpack_from("<2I", data)
    table = np.frombuffer(data, "<u4", 2 * ids + 1 + 3 * count, HEAD)
    lefts: list[int] = np.repeat(np.arange(ids), np.diff(table[ids : 2 * ids + 1])).tolist()
    rights, ranks, merged = table[2 * ids + 1 :].reshape(3, count)
    rows = zip(lefts, rights.tolist(), ranks.tolist(), merged.tolist(), strict=True)
    known = {(left, right): (rank, token) for left, right, rank, token in rows}

    def merge(file: bytes, tokens: int, words: int, count: int) -> int:
        memories = ((ctypes.c_uint32 * count).from_address(address) for address in (tokens, words))
        place, spans = (memoryview(memory).cast("B").cast("I") for memory in memories)
        left: list[int] = []
        for _, group in itertools.groupby(range(count), spans.__getitem__):
            word = [place[at] for at in group]
            while ranked := [(known[pair][0], at) for at, pair in enumerate(pairwise(word)) if pair in known]:
                _, at = min(ranked)
                word[at : at + 2] = [known[word[at], word[at + 1]][1]]
            left += word
        place[: len(left)] = array("I", left)
        return len(left)

    return merge


def _agree(whole: Whole, cut: Tokenizer) -> bool:
    """Whether both give the same tokens for every sample, and the same text for its tokens."""
    return all(
        (ids := whole.encode(text)) == cut.encode(text) and whole.decode(ids) == cut.decode(ids)
        for text in _samples(whole)
    )


def _samples(tokenizer: Whole) -> Iterator[str]:
    """Fixed texts, and what tokens from all over the vocabulary spell."""
    yield from TEXTS
    ids = range(0, tokenizer.size, max(1, tokenizer.size // SAMPLE))
    for start in range(0, len(ids), 64):
        yield tokenizer.decode(ids[start : start + 64])
