"""How many choices may run and wait at once, and how many of them each API key may have.

Half of the places are open to all keys. The other half is divided between them: each is entitled to its part, and what
it has beyond that may not be in a place that another key is entitled to and does not use. So one key that fills the
queue leaves room for all others. With one key or none all places are open.
"""

from __future__ import annotations

from collections import Counter

from fgsnap.errors import RequestError


class Places:
    """The places of a service.

    Args:
        count: choices that may run and wait, of all keys together.
        keys: how many API keys there are.
    """

    def __init__(self, count: int, keys: int) -> None:
        self._keys = keys
        self._taken: Counter[str] = Counter()
        self.resize(count)

    def resize(self, count: int) -> None:
        """Have so many places from now on; who has one keeps it."""
        self._count = count
        fits = 1 < self._keys <= count
        self._own = max(1, count // (2 * self._keys)) if fits else 0

    def take(self, key: str, wanted: int, held: int = 0, field: str = "n") -> None:
        """Give a key so many places, for a request that has ``held`` and asks for more by ``field``.

        RequestError where it cannot have them.
        """
        most = self._count - self._own * max(0, self._keys - 1)
        if held + wanted > most:
            raise RequestError(
                f"The request asks for {held + wanted} choices.",
                f"At most {most} of one client may run and wait here.",
                "Ask for fewer in one request: fewer prompts, or a lower n or best_of.",
                param=field,
            )
        if not wanted:  # who has one keeps it, also where there are fewer now
            return
        taken = self._taken.total()
        free, kept = self._count - taken, self._kept_from(key)
        if wanted > free:
            raise _full("The service is full.", f"{taken} choices run or wait of the {self._count} that may")
        if wanted > free - kept:
            mine = f"{self._taken[key]} choices of this API key run or wait"
            raise _full("This API key has its share.", f"{mine}, and of the {free} free places others keep {kept}")
        self._taken[key] += wanted

    def give_back(self, key: str, count: int) -> None:
        self._taken[key] -= count

    def _kept_from(self, key: str) -> int:
        """The places that the other keys are entitled to and do not use."""
        used = sum(min(taken, self._own) for other, taken in self._taken.items() if other != key)
        return self._own * max(0, self._keys - 1) - used


def _full(what: str, why: str) -> RequestError:
    return RequestError(what, f"{why}.", "Try again a little later.", status=429, code="overloaded")
