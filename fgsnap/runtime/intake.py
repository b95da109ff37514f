"""From a checked call to token ids: long texts aside, a few at a time, and none much further than the context goes.

A text that is long beside the context is counted piece by piece (see counting), and refused at the piece that is one
too many. Between pieces it is dropped when its client has left.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fgsnap.runtime import protocol
from fgsnap.runtime.counting import tokens_beyond

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

INLINE = 1 << 14  # bytes; longer texts are tokenized on a thread, so that the streams of others flow on
AT_ONCE = 2  # threads for that: the engine computes on the same cores

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
            if least := tokens_beyond(text, most, self._text.least_tokens, encode, errand.go_on):
                raise protocol.too_long(call, least, room)
            return tuple(encode(text))

        return [encoded(text) if isinstance(text, str) else text for text in texts]
