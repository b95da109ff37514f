"""The sequences that generate, kept as the columns of the batch that they are: a step changes few of them.

Each generates one token a step. So what comes when is known beforehand: a row needs a block every ``block_size`` steps,
and reaches its max_tokens at a step that can be told when it joins. Nothing here looks at every row to find the few for
which something is to be done; what is done for all of them is done by one call that runs through a list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from fgsnap.kernels.ops import BlockTable, Sampling
from fgsnap.runtime.sequence import Sequence

NO_TOKEN = -1
"""What a backend picks where a row has no token."""

NO_CHOICE = -2
"""What the engine makes of it where the model gave one, and the request's own edits left none."""


class Roster:
    """The generating sequences.

    Attributes:
        sequences, ids, texts, tables, how: of each row, its sequence and what of it a step needs.
        last: the token that each row forwards next.
        cached: how many of its tokens are cached, which is the position of that token.
        step: how many steps have been made.
    """

    def __init__(self, block_size: int) -> None:
        self.sequences: list[Sequence] = []
        self.ids: list[str] = []
        self.texts: list[list[int]] = []
        self.tables: list[BlockTable] = []
        self.how: list[Sampling] = []
        self.last: list[int] = []
        self.cached: list[int] = []
        self.step = 0
        self._lengths: list[int] = []
        self._block_size = block_size
        self._growing: list[dict[Sequence, None]] = [{} for _ in range(block_size)]
        self._due: dict[int, dict[Sequence, None]] = {}
        self._edited: dict[Sequence, None] = {}
        self._enders: dict[int, int] = {NO_TOKEN: 1, NO_CHOICE: 1}  # tokens that end some row, and how many of them

    def __len__(self) -> int:
        return len(self.sequences)

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence whose last token is not forwarded yet; its row is the last."""
        sequence.row = len(self.sequences)
        self.sequences.append(sequence)
        self.ids.append(sequence.id)
        self.texts.append(sequence.tokens)
        self.tables.append(sequence.table)
        self.how.append(sequence.how)
        self.last.append(sequence.tokens[-1])
        self.cached.append(sequence.cached)
        self._growing[self._phase(sequence)][sequence] = None
        sequence.last_step = self.step + sequence.params.max_tokens - sequence.generated
        self._due.setdefault(sequence.last_step, {})[sequence] = None
        for token in sequence.enders:
            self._enders[token] = self._enders.get(token, 0) + 1
        if sequence.how.edits is not None:
            self._edited[sequence] = None

    def leave(self, sequence: Sequence) -> None:
        """Let go of a sequence; the last row takes its place."""
        row, last = sequence.row, len(self.sequences) - 1
        sequence.cached = self.cached[row]
        sequence.row = -1
        del self._growing[self._phase(sequence)][sequence]
        self._edited.pop(sequence, None)
        self._forget_end(sequence)
        for token in sequence.enders:
            self._enders[token] -= 1
            if not self._enders[token]:
                del self._enders[token]
        columns: tuple[list[Any], ...] = (
            self.sequences, self.ids, self.texts, self.tables, self.how, self.last, self.cached,
        )  # fmt: skip
        for column in columns:
            column[row] = column[last]
            del column[last]
        if row != last:
            self.sequences[row].row = row

    def growing(self) -> Iterator[Sequence]:
        """The rows whose next token begins a block."""
        for sequence in tuple(self._growing[self.step % self._block_size]):
            if sequence.row >= 0 and self.cached[sequence.row] == len(sequence.table) * self._block_size:
                yield sequence

    def lengths(self) -> list[int]:
        """The keys that each row's next token sees."""
        self._lengths = [cached + 1 for cached in self.cached]
        return self._lengths

    def append(self, tokens: list[int]) -> list[int]:
        """Add a token to each row, whose ``lengths`` are cached now; gives the rows whose text it may have ended."""
        self.step += 1
        deque(map(list.append, self.texts, tokens), 0)
        self.cached = self._lengths
        self.last = tokens
        for sequence in self._edited:
            sequence.note(sequence.tokens[-1])
        if self._enders.keys().isdisjoint(tokens):
            return []
        return [row for row, token in enumerate(tokens) if token in self._enders]

    def due(self) -> list[Sequence]:
        """The rows that have reached their max_tokens."""
        return list(self._due.pop(self.step, ()))

    def _forget_end(self, sequence: Sequence) -> None:
        """Most answers end long before their max_tokens; until then their texts would be kept."""
        due = self._due.get(sequence.last_step)
        if due is not None:
            del due[sequence]
            if not due:
                del self._due[sequence.last_step]

    def _phase(self, sequence: Sequence) -> int:
        """The remainder of the steps that forward a multiple of the block size: the same as long as it stays."""
        return (self.step - sequence.cached) % self._block_size
