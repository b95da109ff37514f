"""A snapshot's tokenizer: text to tokens and back, ready in milliseconds however large the vocabulary.

The `tokenizers` library takes a tenth of a second to read a ``tokenizer.json`` of 49,000 tokens and more than a second
for one of 262,000, most of it for vocabulary and merges. So conversion writes ``tokenizer.tables`` beside it: the same
tokenizer cut in two. The *frame* is a tokenizer.json whose model knows single characters and no merges; the library
reads it at once, and does with it what it always does: added tokens, normalisation, cutting into words, characters that
are not in the vocabulary. It gives the characters of each word as tokens, and these are merged here, in C++, over
tables that are used as they lie in the file. Both ways give the same tokens.

Where the snapshot has no such file, or no compiler built the merge loop, the library does it all.

The file is a row of little-endian 32-bit integers, then the texts of all tokens, then the frame:

    V, M, bytes of the texts, bytes of the frame
    ends    V      for each id, where its text ends; an id without a token has an empty text
    starts  V + 1  for each id, the first row of the pairs that begin with it, and at the end M
    rights  M      of each pair that merges the second token; pairs are sorted by first and then second
    ranks   M      of each pair; the lowest is merged first
    merged  M      what each pair becomes
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from array import array
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

# One prompt is tokenized at a time, on one thread; the library's pool would only compete with the engine for cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer as Library

from fgsnap.built import built_library
from fgsnap.errors import SnapshotRefused

SOURCE, CUT = "tokenizer.json", "tokenizer.tables"
HEAD, WORD = 16, 4
"""Bytes of the counts that the tables begin with, and of an integer."""


class Tokenizer(Protocol):
    """What fgsnap needs of a tokenizer. ``encode`` and ``decode`` let other threads run where they take long."""

    @property
    def byte_level(self) -> bool:
        """Whether each character of a token's text stands for one byte."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """The tokens that no text is made of."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that a model wants around it."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens, special ones skipped unless they are asked for."""
        ...

    def id_to_token(self, id: int) -> str | None:
        """The text of a token as the vocabulary writes it."""
        ...


def load_tokenizer(read: Callable[[str], bytes], names: Container[str]) -> Tokenizer:
    """The tokenizer among the files ``names`` of a snapshot, whose contents ``read`` gives.

    Raises:
        SnapshotRefused: the files are not what a tokenizer is read from.
    """
    merge = merge_loop() if CUT in names else None
    if merge is None:
        return Whole(read(SOURCE))
    return Cut(read(CUT), merge)


class Whole:
    """The library alone, from a tokenizer.json."""

    def __init__(self, data: bytes) -> None:
        self._library = _read(data, SOURCE)
        self.byte_level = _is_byte_level(self._library)
        self.size: int = self._library.get_vocab_size()
        self.special = _special(self._library)

    def encode(self, text: str) -> list[int]:
        # As a batch of one: only batches let other threads run meanwhile, and a long prompt takes seconds.
        return list(self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=skip_special))

    def id_to_token(self, id: int) -> str | None:
        token = self._library.id_to_token(id)
        return None if token is None else str(token)


Merge = Callable[..., int]


class Cut:
    """The library for the frame, and the merge loop, from a tokenizer.tables."""

    def __init__(self, data: bytes, merge: Merge) -> None:
        tokens, texts, frame = _parts(data)
        self._frame = _read(data[frame], CUT)
        self.byte_level = _is_byte_level(self._frame)
        self.special = _special(self._frame)
        self._decoder = self._frame.decoder
        self._added = self._frame.get_added_tokens_decoder()
        self._special = frozenset(token.content for token in self._added.values() if token.special)
        self._ends = memoryview(data)[HEAD : HEAD + tokens * WORD].cast("I")
        self._texts = memoryview(data)[texts]
        self._pieces: dict[int, str | None] = {}
        self._merge = functools.partial(merge, data)

    def encode(self, text: str) -> list[int]:
        spelled = self._frame.encode_batch([text], add_special_tokens=False)[0]
        tokens, words = array("I", spelled.ids), array("I", spelled.word_ids)
        count = self._merge(tokens.buffer_info()[0], words.buffer_info()[0], len(tokens))
        if count < 0:
            raise MemoryError("a text is too long to be tokenized here")
        return tokens[:count].tolist()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        skipped = self._special if skip_special else frozenset()
        pieces = [piece for piece in map(self.id_to_token, ids) if piece is not None and piece not in skipped]
        return " ".join(pieces) if self._decoder is None else str(self._decoder.decode(pieces))

    def id_to_token(self, id: int) -> str | None:
        if id not in self._pieces:
            self._pieces[id] = str(self._frame.id_to_token(id)) if id in self._added else self._text(id)
        return self._pieces[id]

    def _text(self, id: int) -> str | None:
        if not 0 <= id < len(self._ends):
            return None
        begin = self._ends[id - 1] if id else 0
        return str(self._texts[begin : self._ends[id]], "utf-8", "replace") or None


@functools.cache
def merge_loop() -> Merge | None:
    """The function in C++, or None where it was not built."""
    path = built_library("_merge.so", "fgsnap", "FGSNAP_MERGE_LIBRARY")
    try:
        merge: Any = None if path is None else ctypes.CDLL(str(path)).fgsnap_merge_words_1
    except (OSError, AttributeError):  # of another machine, or another version
        return None
    if merge is not None:
        merge.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        merge.restype = ctypes.c_int64
    return merge  # type: ignore[no-any-return]


def _parts(data: bytes) -> tuple[int, slice, slice]:
    """How many ids the tables are for, and where texts and frame lie; both end where the counts say."""
    try:
        tokens, pairs, texts, frame = struct.unpack_from("<4I", data)
    except struct.error as error:
        raise _unreadable(CUT, str(error)) from error
    begin = HEAD + (2 * tokens + 1 + 3 * pairs) * WORD
    if len(data) != begin + texts + frame:
        raise _unreadable(CUT, f"It has {len(data)} bytes, and its tables {begin + texts + frame}.")
    return tokens, slice(begin, begin + texts), slice(begin + texts, len(data))


def _read(data: bytes, name: str) -> Any:
    try:
        library = Library.from_buffer(data)
    except Exception as error:  # the library raises plain Exception and ValueError alike
        raise _unreadable(name, str(error)) from error
    # A file saved in the middle of training would otherwise cut or pad every prompt.
    library.no_truncation()
    library.no_padding()
    return library


def _special(library: Any) -> frozenset[int]:
    return frozenset(id for id, token in library.get_added_tokens_decoder().items() if token.special)


def _is_byte_level(library: Any) -> bool:
    return library.decoder is not None and b'"ByteLevel"' in bytes(library.decoder.__getstate__())


def _unreadable(name: str, why: str) -> SnapshotRefused:
    return SnapshotRefused(f"{name} cannot be read.", why, "Convert again with a tokenizers library of the same age.")
