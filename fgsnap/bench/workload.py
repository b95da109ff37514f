"""What clients ask for: prompts of an exact number of tokens, and lengths as DeepSpeed-FastGen's benchmark draws them.

Lengths of prompts and answers come from Normal(mean, 0.3 mean) (arXiv:2401.08671; its "variance" of 30 % is a standard
deviation in its tools), cut where the context ends. Every prompt is drawn anew, so no prefix cache helps. The same seed
gives the same requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fgsnap.errors import NotFound, SourceError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEVIATION = 0.3
"""Standard deviation of a length, as a share of its mean."""

COMMON_IDS = range(1_000, 30_000)
"""Token ids that nearly every model has, none of them special: for an endpoint whose tokenizer is not known."""

FEWEST_WORDS = 100

Prompt = str | list[int]
Prompts = Callable[[random.Random, int], Prompt]
"""Draws a prompt of so many tokens."""


class Work(NamedTuple):
    """One request: a prompt, its length in tokens, and how many tokens to answer with."""

    prompt: Prompt
    prompt_tokens: int
    max_tokens: int


def works(
    prompts: Prompts, count: int, *, prompt_mean: int, answer_mean: int, context: int | None, seed: str
) -> list[Work]:
    """``count`` requests; prompt and answer together stay one token below ``context``, room for a BOS token."""
    draw = random.Random(seed)
    room = (context or 1 << 30) - 1
    made = []
    for _ in range(count):
        answer = _length(draw, answer_mean, room - 1)
        prompt = _length(draw, prompt_mean, room - answer)
        made.append(Work(prompts(draw, prompt), prompt, answer))
    return made


def _length(draw: random.Random, mean: int, most: int) -> int:
    return max(min(round(draw.gauss(mean, DEVIATION * mean)), most), 1)


def of_ids(ids: Sequence[int]) -> Prompts:
    """Prompts as token ids, each of them drawn from ``ids``."""
    return lambda draw, length: draw.choices(ids, k=length)


class Words(NamedTuple):
    """The words of a tokenizer that are one token each, wherever they stand in a text of such words.

    Attributes:
        ids: their tokens.
        texts: the words, in the same order.
        lead: what a text of them begins with.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    lead: str = ""


def of_tokenizer(file: Path, *, as_text: bool) -> Prompts:
    """Prompts of random words, as token ids or as a text that has exactly as many tokens.

    A vocabulary without words, such as one of bytes, gives ids of any of its tokens.

    Args:
        file: the model's tokenizer.json.

    Raises:
        NotFound, SourceError: there is no such file, or it is something else.
        UsageError: text is asked for, and the tokenizer has no words to make it of.
    """
    tokenizer = _tokenizer(file)
    known = words(tokenizer)
    if len(known.ids) >= FEWEST_WORDS:
        return _of_words(known) if as_text else of_ids(known.ids)
    if as_text:
        raise UsageError(
            f"No text of an exact length can be made with {file}.",
            f"Only {len(known.ids)} of its tokens are lower-case words.",
            "Send token ids: --prompt-format ids",
        )
    return of_ids(sorted(tokenizer.get_vocab(with_added_tokens=False).values()))


def words(tokenizer: Tokenizer) -> Words:
    """The lower-case words of a tokenizer."""
    pieces = sorted(tokenizer.get_vocab(with_added_tokens=False).items())  # it comes in another order every time
    # A word's own token carries the blank before it, which byte-level vocabularies write in another way.
    likely = {match[1]: id for piece, id in pieces if (match := re.fullmatch("[Ġ▁]([a-z]+)", piece))}

    def alone(lead: str) -> Words:
        encoded = tokenizer.encode_batch([lead + word for word in likely], add_special_tokens=False)
        kept = [word for word, found in zip(likely, encoded, strict=True) if found.ids == [likely[word]]]
        return Words(tuple(likely[word] for word in kept), tuple(kept), lead)

    # Some tokenizers add the first blank of a text themselves, others do not.
    return max(alone(" "), alone(""), key=lambda found: len(found.ids))


def _of_words(known: Words) -> Prompts:
    return lambda draw, length: known.lead + " ".join(draw.choices(known.texts, k=length))


def _tokenizer(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not file.is_file():
        raise NotFound(f"There is no tokenizer file {file}.", "", "Name the model's tokenizer.json.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise SourceError(f"{file} is not a tokenizer.json.", str(error)) from error
