"""Whether the streams of a tokenizer say what the whole answer decodes to.

Each answer is streamed token by token after a prompt, and compared with prompt and answer in one piece: every token of
the vocabulary in random order, texts of many scripts that part in the middle of characters, wrong bytes, stop texts.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from fgsnap.runtime.text import REPLACEMENT, TextStream
from fgsnap.tokenizer import BYTE_OF, Tokenizer

TEXTS = (
    "One, two  and three.\n\n\n\tdef f(x):\r\n    return x + 1  # ½ … “quoted” €",
    "👩‍👧‍👦 👨🏽‍🚀 🇫🇷🇯🇵 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏿 ☂️ 1️⃣",
    "你好，世界。\n𠮷野家 㐂 龘 𪚥 日本語のテキスト、カタカナ、한국어 텍스트",
    "नमस्ते दुनिया क्षि श्रीमान् ज्ञान தமிழ் বাংলা",
    "مرحبا بالعالم، كيف حالك؟ ﷽ עִבְרִית",
    "e\u0301 a\u0308 o\u0302\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́O",
    "𝔘𝔫𝔦 𐍈 ꙮ ᚠᛇᚻ ⵣ 𓀀𓂀 ༀ ក្រុម ไทย ລາວ မြန်မာ ᠮᠣᠩᠭᠣᠯ հայերեն ქართული",
    "zero\u200b\u200d\ufeff\u2028 private \ue000\U000f0000 last \U0010ffff",
)
SEED = 9
ANSWER = 48
"""Tokens of an answer that holds a part of the vocabulary."""
WRONG, STOPPED = 500, 500
"""Answers with wrong bytes, and with a stop text."""
BEYOND = 300_000
"""An id that no vocabulary reaches."""
BYTE = re.compile("<0x([0-9A-F]{2})>")


class Answer(NamedTuple):
    prompt: list[int]
    ids: list[int]
    wanted: str
    stop: str = ""


class Checked(NamedTuple):
    answers: int
    tokens: int
    mismatches: int


def check(tokenizer: Tokenizer) -> Checked:
    """Stream answers of every kind; those that say something else are printed."""
    answers = tokens = mismatches = 0
    for answer in Answers(tokenizer):
        said = streamed(tokenizer, answer)
        answers, tokens = answers + 1, tokens + len(answer.ids)
        if said != answer.wanted:
            mismatches += 1
            print(f"after {answer.prompt[-9:]}, {answer.ids} say {said!r}, not {answer.wanted!r}", file=sys.stderr)
    return Checked(answers, tokens, mismatches)


def streamed(tokenizer: Tokenizer, answer: Answer) -> str:
    stream = TextStream(tokenizer, [answer.stop], answer.prompt)
    return "".join([*(stream.feed([id]) for id in answer.ids), stream.flush()])


class Answers:
    """Answers of every kind, and what is to be said of each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._reader = Reader(tokenizer)
        self._random = random.Random(SEED)
        self._special = sorted(tokenizer.special)
        self._texts = [tokenizer.encode(text) for text in TEXTS]

    def __iter__(self) -> Iterator[Answer]:
        yield from self._vocabulary()
        for text, own in zip(TEXTS, self._texts, strict=True):
            for ids in (own, self._reader.spelled(text), self._parted(text)):
                yield from (self._answer(ids[:cut], ids[cut:]) for cut in range(len(ids) + 1))
        yield from (self._wrong_bytes(share / WRONG) for share in range(WRONG))
        yield from (self._stopped() for _ in range(STOPPED))

    def _answer(self, prompt: list[int], ids: list[int]) -> Answer:
        return Answer(prompt, ids, self._reader.after(prompt, ids))

    def _vocabulary(self) -> Iterator[Answer]:
        """Every token, special ones too, each answer after some tokens of the one before."""
        ids = self._random.sample(self._reader.known, len(self._reader.known))
        for begin in range(0, len(ids), ANSWER):
            prompt = ids[max(begin - self._random.randrange(20), 0) : begin]
            yield self._answer(prompt, ids[begin : begin + ANSWER])

    def _parted(self, text: str) -> list[int]:
        """The tokens of a text with special ones between its words, few or very many."""
        words = [self._tokenizer.encode(word) for word in re.findall(r"\s*\S+", text)]
        return [id for word in words for id in (*word, *self._special[:1] * self._random.choice((0, 1, 3, 12, 70)))]

    def _wrong_bytes(self, share: float) -> Answer:
        """Single bytes among tokens of every kind."""
        texts = [id for ids in self._texts for id in ids]
        kinds = (self._reader.bytes, self._reader.known, texts)
        weights = (share, (1 - share) / 2, (1 - share) / 2)
        drawn = self._random.choices(kinds, weights, k=self._random.randrange(150))
        return self._answer(self._tokenizer.encode("Hello there.\n x"), [self._random.choice(kind) for kind in drawn])

    def _stopped(self) -> Answer:
        """A text that a part of itself ends."""
        first, second = self._random.sample(self._texts, 2)
        answer = self._answer(first, second)
        begin = self._random.randrange(len(answer.wanted))
        stop = answer.wanted[begin : begin + self._random.randrange(1, 9)]
        return answer._replace(stop=stop, wanted=answer.wanted[: answer.wanted.find(stop)])


class Reader:
    """Reads whole answers, as the library does but for one thing.

    Where single bytes stand for a character that the vocabulary has not, the library makes U+FFFD of all bytes in a row
    if one of them is wrong. A stream has shown the characters before it; so they stay here.

    Attributes:
        known: all tokens.
        bytes: those that stand for single bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = ((id, tokenizer.id_to_token(id)) for id in range(BEYOND))
        self._pieces = {id: piece for id, piece in pieces if piece is not None}
        self._values = {id: value for id, piece in self._pieces.items() if (value := self._value(piece)) is not None}
        self.known, self.bytes = list(self._pieces), list(self._values)
        word = next((id for id, piece in self._pieces.items() if re.fullmatch(r"▁\w+", piece)), None)
        self._strips = word is not None and not tokenizer.decode([word]).startswith(" ")

    def _value(self, piece: str) -> int | None:
        """The byte that a token stands for."""
        if self._tokenizer.byte_level:
            return BYTE_OF.get(piece)
        found = BYTE.fullmatch(piece)
        return int(found[1], 16) if found else None

    def spelled(self, text: str) -> list[int]:
        """A text in tokens of single bytes, as far as there are any."""
        ids = {value: id for id, value in self._values.items()}
        return [ids[byte] for byte in text.encode() if byte in ids]

    def after(self, prompt: list[int], ids: list[int]) -> str:
        """What an answer says after a prompt; half a character at the end of the prompt is the answer's."""
        whole, before = self.read(prompt + ids), self.read(prompt)
        return whole[len(before if whole.startswith(before) else before.rstrip(REPLACEMENT)) :]

    def read(self, ids: Sequence[int]) -> str:
        if self._tokenizer.byte_level:
            return self._tokenizer.decode(ids)
        spoken = (id for id in ids if id in self._pieces and id not in self._tokenizer.special)
        text = "".join(self._words(list(run), single) for single, run in groupby(spoken, self._values.__contains__))
        return text.removeprefix(" ") if self._strips else text

    def _words(self, ids: list[int], single: bool) -> str:
        if not single:
            return "".join(self._pieces[id] for id in ids).replace("▁", " ")
        data = bytes(self._values[id] for id in ids)
        try:
            return data.decode()
        except UnicodeDecodeError as wrong:
            return data[: wrong.start].decode() + REPLACEMENT * (len(data) - wrong.start)
