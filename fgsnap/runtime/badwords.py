"""Which tokens would complete a bad word, as an answer grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

Words = tuple[tuple[int, ...], ...]


class BadWords:
    """Aho and Corasick's automaton of the words without their last tokens.

    A state is the longest beginning of a word that the answer ends with, 0 that of none; a token moves it on in a time
    that does not depend on how many words there are, or how long or alike they are. Whoever has one of these keeps the
    state, so many answers may share it.

    Attributes:
        tokens: all that the words have.
        saying: for each state, one that completes the same words; two states with the same one ban the same.
    """

    def __init__(self, words: Words) -> None:
        self._next: dict[tuple[int, int], int] = {}
        self._shorter = [0]  # of each state, the longest beginning that it ends with, other than itself
        self._lasts: dict[int, list[int]] = defaultdict(list)  # of the words that lack one token in just this state
        self._banned: dict[int, tuple[int, ...]] = {}
        self._add(words)
        self.tokens = frozenset(chain.from_iterable(words))
        self.saying = [0]
        for state, shorter in enumerate(self._shorter[1:], 1):
            self.saying.append(state if state in self._lasts else self.saying[shorter])

    def after(self, state: int, token: int) -> int:
        """The state after one more token."""
        found = self._next.get((state, token))
        while found is None and state:
            state = self._shorter[state]
            found = self._next.get((state, token))
        return found or 0

    def banned(self, state: int) -> tuple[int, ...]:
        """The tokens that would complete a word; made once, for there may be thousands."""
        said = self.saying[state]
        if said not in self._banned:
            self._banned[said] = tuple(self._completing(said))
        return self._banned[said]

    def _completing(self, state: int) -> Iterator[int]:
        yield from self._lasts.get(state, ())
        while state:
            state = self.saying[self._shorter[state]]
            yield from self._lasts.get(state, ())

    def _add(self, words: Words) -> None:
        """All words token by token, for the state of a beginning needs those of all shorter ones."""
        depth, rest = 0, [(word, 0) for word in words]
        while rest:
            longer = []
            for word, state in rest:
                if len(word) == depth + 1:
                    self._lasts[state].append(word[depth])
                else:
                    longer.append((word, self._beginning(state, word[depth])))
            depth, rest = depth + 1, longer

    def _beginning(self, state: int, token: int) -> int:
        found = self._next.get((state, token))
        if found is None:
            found = len(self._shorter)
            self._shorter.append(self.after(self._shorter[state], token) if state else 0)
            self._next[state, token] = found
        return found


@lru_cache(maxsize=8)
def bad_words(words: Words) -> BadWords:
    """The same for the many choices of a request, which are submitted one after another."""
    return BadWords(words)
