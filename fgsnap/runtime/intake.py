"""From a checked call to token ids: long texts aside, a few at a time, and none much further than the context goes.

Tokenizing takes a second for every one or two megabytes, of which a context holds a small part. So a text that is long
beside the context is counted piece by piece, and refused at the piece that is one too many. Between pieces it is
dropped when its client has left.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fgsnap.runtime import protocol

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

INLINE = 1 << 14  # bytes; longer texts are tokenized on a thread, so that the streams of others flow on
AT_ONCE = 2  # threads for that: the engine computes on the same cores
PIECE = 1 << 12  # characters, a few milliseconds' work
SEAM = 1 << 8  # characters at the end of a piece among which a space is looked for, to cut there
CUT_TOKENS = 16  # by which a cut may raise the count: of a word, a number, a special token in two, with a BOS each
DENSE = 8  # characters a token that few texts have; below, a text that is too long is found out by tokenizing it

T = TypeVar("T")
Prompt = str | tuple[int, ...]


class Tokenizes(Protocol):
    """What this needs of text.Text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def least_tokens(self, text: str) -> int: ...

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> str: ...


class Dropped(Exception):
    """Nobody waits for the work any more."""


class Errand:
    """Work on a thread, for as long as somebody waits for it."""

    def __init__(self) -> None:
        self.over = False

    def go_on(self) -> None:
        """Dropped when nobody waits any more."""
        if self.over:
            raise Dropped


class Intake:
    """Makes token ids of calls.

    Args:
        text: tokenizer and chat template.
        context: the most tokens that a prompt can have, as far as is known yet.
    """

    def __init__(self, text: Tokenizes, context: Callable[[], int]) -> None:
        self._text = text
        self._context = context

    async def prompts(self, call: protocol.Call, size: int) -> list[tuple[int, ...]]:
        """The tokens of each prompt, or of the conversation, of a call whose body had ``size`` bytes.

        RequestError where one is longer than the context.
        """
        if size > INLINE and (call.chat or any(isinstance(prompt, str) for prompt in call.prompts)):
            return await self._aside(lambda errand: self._tokens(call, self._texts(call), errand))
        texts = self._texts(call)
        if call.chat and sum(map(len, texts)) > INLINE:  # a template may make much of little
            return await self._aside(lambda errand: self._tokens(call, texts, errand))
        return self._tokens(call, texts, Errand())

    async def _aside(self, work: Callable[[Errand], T]) -> T:
        errand = Errand()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, errand)
        finally:
            errand.over = True

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(AT_ONCE, "tokenize")

    def _texts(self, call: protocol.Call) -> Sequence[Prompt]:
        if not call.chat:
            return call.prompts
        rendered = self._text.render_chat(
            call.messages,
            add_generation_prompt=call.add_generation_prompt,
            continue_final_message=call.continue_final_message,
        )
        return (rendered,)

    def _tokens(self, call: protocol.Call, texts: Sequence[Prompt], errand: Errand) -> list[tuple[int, ...]]:
        encode = functools.partial(self._text.encode, add_special_tokens=call.add_special_tokens)
        room = protocol.Room(self._context(), cut=call.truncate_prompt_tokens is not None)
        most = room.most

        def encoded(text: str) -> tuple[int, ...]:
            errand.go_on()
            if len(text) > DENSE * most:
                least = self._text.least_tokens(text)
                least = least if least > most else _counted(text, most, encode, errand)
                if least > most:
                    raise protocol.too_long(call, least, room)
            return tuple(encode(text))

        return [encoded(text) if isinstance(text, str) else text for text in texts]


def _counted(text: str, most: int, encode: Callable[[str], list[int]], errand: Errand) -> int:
    """How many tokens the text has at least, as far as it was counted: until they are more than ``most``."""
    counted = 0
    for cuts, piece in enumerate(pieces(text)):
        errand.go_on()
        counted += len(encode(piece)) - (CUT_TOKENS if cuts else 0)
        if counted > most:
            break
    return counted


def pieces(text: str) -> Iterator[str]:
    """The text in pieces, cut before a space or a line's end where one is near."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        near = max(text.rfind(space, end - SEAM, end) for space in " \n")
        end = near if near > start else end
        yield text[start:end]
        start = end
    yield text[start:]
