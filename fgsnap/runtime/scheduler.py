"""Dynamic SplitFuse: which sequences run in the next forward, and with how many tokens each.

The cost of a forward depends on its number of tokens, hardly on whose they are, so every forward carries exactly the
token budget while there is work for it. Each running sequence that is generating comes first, with one token; prompts
share the rest, cut wherever the budget ends. There is no preemption: admission reserves all the blocks a sequence can
ever need (see blocks), so whoever runs can finish.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from fgsnap.runtime.blocks import BlockPool, Reservation
from fgsnap.runtime.request import Request, SamplingParams


class Sequence:
    """A live request: its prompt and what has been generated so far, and how much of that is in the KV cache.

    Attributes:
        tokens: the prompt, then the generated tokens.
        prompt_length: how many of ``tokens`` are the prompt.
        cached: how many of ``tokens`` have been forwarded, so that their keys and values are cached.
        reservation: its KV blocks, from admission to the end.
        seed: of its random numbers; drawn at submission where the request names none.
    """

    __slots__ = ("cached", "id", "params", "prompt_length", "reservation", "seed", "tokens")

    def __init__(self, request: Request, seed: int) -> None:
        self.id = request.id
        self.params: SamplingParams = request.params
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.cached = 0
        self.reservation = Reservation(0)
        self.seed = seed

    @property
    def longest(self) -> int:
        """The most tokens this sequence can ever have."""
        return self.prompt_length + self.params.max_tokens

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length


class Slice(NamedTuple):
    """The next ``length`` uncached tokens of a sequence, to be forwarded in this step."""

    sequence: Sequence
    length: int


class Scheduler:
    """The queue of waiting sequences, the running ones, and the rule that picks each step's tokens.

    Args:
        pool: the KV blocks to share out.
        token_budget: most tokens in one forward.
        max_sequences: most sequences running at once; at most the budget, so that no step leaves a decode behind.
    """

    def __init__(self, pool: BlockPool, token_budget: int, max_sequences: int) -> None:
        assert 0 < max_sequences <= token_budget
        self._pool = pool
        self._budget = token_budget
        self._max_sequences = max_sequences
        self._waiting: deque[Sequence] = deque()
        # Both in order of admission; a sequence moves from the first to the second with its first generated token.
        self._prompts: dict[str, Sequence] = {}
        self._decodes: dict[str, Sequence] = {}

    @property
    def running(self) -> int:
        return len(self._prompts) + len(self._decodes)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits the whole pool."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its blocks are free at once."""
        if self._prompts.pop(sequence.id, None) is None and self._decodes.pop(sequence.id, None) is None:
            self._waiting.remove(sequence)
        else:
            self._pool.release(sequence.reservation)

    def schedule(self) -> list[Slice]:
        """The next forward's slices: every decode, then as much of the prompts as the budget has room for."""
        self._admit()
        slices = [Slice(sequence, 1) for sequence in self._decodes.values()]
        if self._prompts:
            slices += self._share(self._budget - len(slices))
        for sequence, length in slices:
            end = sequence.cached + length
            if end > len(sequence.reservation.table) * self._pool.block_size:
                self._pool.grow(sequence.reservation, end)
        return slices

    def advance(self, slices: list[Slice]) -> int:
        """Record that a forward has cached these slices; returns how many of their tokens were of prompts."""
        prompt_tokens = 0
        for sequence, length in slices:
            if sequence.cached < sequence.prompt_length:
                prompt_tokens += length
            sequence.cached += length
            if sequence.cached == sequence.prompt_length:
                self._decodes[sequence.id] = self._prompts.pop(sequence.id)
        return prompt_tokens

    def _admit(self) -> None:
        """Start waiting sequences first come, first served, so that a big one cannot be overtaken for ever."""
        while self._waiting and self.running < self._max_sequences:
            reservation = self._pool.reserve(self._waiting[0].longest)
            if reservation is None:
                return
            sequence = self._waiting.popleft()
            sequence.reservation = reservation
            self._prompts[sequence.id] = sequence

    def _share(self, room: int) -> list[Slice]:
        """Cut ``room`` tokens from the prompts: half for the oldest, the rest for those nearest their first token.

        The half keeps a long prompt moving under any load of short ones; the rest lets short ones pass a long one. What
        either cannot use goes to the other, so the room is used up while any prompt has tokens left.
        """
        oldest = next(iter(self._prompts.values()))
        shortest_first = sorted(self._prompts.values(), key=_remaining)
        lengths = {oldest.id: min(_remaining(oldest), room - room // 2)}
        room -= lengths[oldest.id]
        for sequence in shortest_first:
            if room == 0:
                break
            taken = lengths.get(sequence.id, 0)
            extra = min(_remaining(sequence) - taken, room)
            lengths[sequence.id] = taken + extra
            room -= extra
        return [Slice(sequence, lengths[id]) for id, sequence in self._prompts.items() if lengths.get(id)]


def _remaining(sequence: Sequence) -> int:
    return sequence.prompt_length - sequence.cached
