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
import itertools
import json
import operator
import os
import struct
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

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

    def least_tokens(self, text: str) -> int:
        """How many tokens the text has at least, by its length; 0 where that says nothing."""
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

    def least_tokens(self, text: str) -> int:
        return self._density.least_tokens(text)

    @functools.cached_property
    def _density(self) -> Density:
        return density(self._library, max(len(token.encode()) for token in self._library.get_vocab()))

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

    def least_tokens(self, text: str) -> int:
        return self._density.least_tokens(text)

    @functools.cached_property
    def _density(self) -> Density:
        return density(self._frame, max(map(operator.sub, self._ends, itertools.chain([0], self._ends))))

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


def _byte_alphabet() -> dict[str, int]:
    """Which byte each printable character of a byte-level vocabulary stands for.

    Bytes that print as themselves do; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTE_OF = _byte_alphabet()

UNICODE_FORMS = frozenset(("NFC", "NFD", "NFKC", "NFKD"))
"""Steps that leave ASCII as it is, and may make other texts shorter."""

KEEPING = frozenset(("ByteLevel", "Digits", "Metaspace", "Prepend"))
"""Steps after which a text has as many bytes as before, or more."""


class Density(NamedTuple):
    """How many bytes of a text a token stands for.

    Attributes:
        most: bytes of one token; 0: there is no bound.
        missing: bytes that do not count, for they may be in no token.
        only_ascii: the bound is one for ASCII texts.
    """

    most: int = 0
    missing: bytes = b""
    only_ascii: bool = False

    def least_tokens(self, text: str) -> int:
        if not self.most or (self.only_ascii and not text.isascii()):
            return 0
        return -(-len(text.encode(errors="replace").translate(None, self.missing)) // self.most)


def density(library: Any, longest: int) -> Density:
    """There is a bound where no byte of a text is passed over, so that each lies in a token of the vocabulary.

    So where every step before the model keeps all that it is given, and the model falls back to bytes. One unknown
    token may stand for any number of characters, and so may an added token that takes the spaces beside it along.

    Args:
        library: the tokenizer, or its frame.
        longest: bytes of the longest token as the vocabulary writes it, which is never shorter than what it stands for.
    """
    added = library.get_added_tokens_decoder().values()
    steps = [*_steps(library.normalizer), *_steps(library.pre_tokenizer)]
    forms = [step for step in steps if step["type"] in UNICODE_FORMS]
    missing = _missing_bytes(library, steps)
    if (
        not all(step in forms or _keeps(step) for step in steps)
        or any(token.lstrip or token.rstrip for token in added)
        or missing is None
    ):
        return Density()
    normal = str if library.normalizer is None else library.normalizer.normalize_str
    spelled = [len(text.encode()) for token in added for text in (token.content, normal(token.content))]
    return Density(max([longest, *spelled]), missing, only_ascii=bool(forms))


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one thing after the other."""
    pending = [] if part is None else [json.loads(part.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = [*step.get("normalizers", step.get("pretokenizers", ())), *pending]
        else:
            yield step


def _keeps(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in KEEPING


def _missing_bytes(library: Any, steps: list[dict[str, Any]]) -> bytes | None:
    """The bytes that the model has no token for; None: it has tokens for characters, not for bytes."""
    if type(library.model).__name__ != "BPE":
        return None
    if any(step["type"] == "ByteLevel" for step in steps):
        return bytes(byte for letter, byte in BYTE_OF.items() if library.token_to_id(letter) is None)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    whole = library.model.byte_fallback and all(library.token_to_id(name) is not None for name in names)
    return b"" if whole else None


def _unreadable(name: str, why: str) -> SnapshotRefused:
    return SnapshotRefused(f"{name} cannot be read.", why, "Convert again with a tokenizers library of the same age.")
