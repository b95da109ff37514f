"""Dynamic SplitFuse: which sequences run in the next forward, and with how many tokens each.

The cost of a forward depends on its number of tokens, hardly on whose they are, so every forward carries exactly the
token budget while there is work for it. Each sequence that generates comes first, with one token; prompts share the
rest, cut wherever the budget ends.

Nobody waits for ever:

- Who waits is started in the order of ``turns``: tenants by the tokens that they have had, then priority, then first
  come, first served. The first in line is never overtaken for want of blocks or places; only who waits for a prefix
  that a running prompt computes lets others pass until it is there.
- With ``reserve``, who is started has all the blocks it can ever need, so it always runs on. With ``optimistic`` it has
  those of its prompt, and when none is left for a next token, the sequence that costs least to compute again gives up
  its own. Never the first, by priority and arrival, of the tenant of which none has ended for longest: so that one
  finishes, and then it is another tenant's turn. Endless high priorities keep back others of their own tenant only.

How long it takes, in steps. Let the share h be half, rounded up, of budget - most sequences + 1 tokens: every step
brings each sequence that generates its token, and the oldest prompt h tokens at least, or what it has left. A prompt
with n tokens to compute that may get m costs at most ceil(n / h) + m - 1 steps, and one that generates m. Of prompts
whose logprobs are wanted MOST_SCORED tokens a step are computed at most, for their logits take memory, and the oldest
goes first: to such a prompt h is no more than that.

- From its start, a sequence has ended after its cost and the ceil(n / h) of the prompts that started before it.
- From its submission, it has ended after its cost, that of all that ran then, and that of all started before it: for
  every step brings that one forward which started first of those that run.
- Preempted, it is as if it were submitted then, with all the tokens it has; it never costs more than at first.
- Steps in which a sequence is held, or comes to be, count for nobody: it keeps its blocks and its place while its
  constraint is followed, which is bounded in time (see nursery), and the others go on beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import Literal, NamedTuple

from fgsnap.kernels.ops import Batch, BlockTable, Sampling
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.roster import Roster
from fgsnap.runtime.sequence import Sequence
from fgsnap.runtime.turns import Turns

Admission = Literal["reserve", "optimistic"]

MOST_PROMPTS = 64
"""Prompts that are under way at once. More would hold blocks long before they are computed."""

MOST_SCORED = 64
"""Rows of prompt logprobs in one step: each is a row of logits, which is as long as the vocabulary."""


class Slice(NamedTuple):
    """The next ``length`` uncached tokens of a prompt, to be forwarded in this step."""

    sequence: Sequence
    length: int


class Scored(NamedTuple):
    """Positions of a prompt whose logits tell the logprobs of the tokens after them: the rows from ``row`` on."""

    sequence: Sequence
    row: int
    positions: range


class Work(NamedTuple):
    """One step: its batch, and how the token of each row is picked, at which position of its sequence.

    The batch begins with the roster's ``decodes``; its rows are those, then those of ``through``: prompts whose last
    token it forwards. Among the latter are the rows of ``scored``.
    """

    batch: Batch
    how: list[Sampling]
    positions: list[int]
    decodes: int
    slices: list[Slice]
    through: list[Sequence]
    scored: Seq[Scored] = ()


class Scheduler:
    """The queue of waiting sequences, the running ones, and the rule that picks each step's tokens.

    Args:
        pool: the KV blocks to share out.
        token_budget: most tokens in one forward.
        max_sequences: most sequences running at once; at most the budget, so that no step leaves a decode behind.
        admission: see above.
    """

    def __init__(
        self, pool: BlockPool, token_budget: int, max_sequences: int, admission: Admission = "reserve"
    ) -> None:
        assert 0 < max_sequences <= token_budget
        self.roster = Roster(pool.block_size)
        self.preemptions = 0
        self.cached_tokens = 0
        self.waiting_tokens = 0  # the most that they can have, prompts included
        self.held: dict[Sequence, None] = {}  # they run, but in no forward for now
        self._pool = pool
        self._budget = token_budget
        self._max_sequences = max_sequences
        self._optimistic = admission == "optimistic"
        self._most_scored = MOST_SCORED
        self._turns = Turns()
        self._prompts: dict[Sequence, None] = {}  # in order of admission
        self._computing: dict[bytes, Sequence] = {}  # digests of blocks that running prompts will fill
        self._parked: dict[bytes, list[Sequence]] = {}  # by the digest that they wait to share
        self._full = False  # no blocks have come back since the first in line found too few

    @property
    def running(self) -> int:
        return len(self._prompts) + len(self.roster) + len(self.held)

    def has_work(self) -> bool:
        """Whether ``schedule`` finds any, or has not yet found that who waits needs what those that are held have."""
        if self._prompts or self.roster.sequences:
            return True
        return self.waiting > 0 and not self._full and self.running < self._max_sequences

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits the whole pool."""
        self._wait(sequence, self._turns.join)

    def remove(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        """Forget a sequence, wherever it is; its blocks are free at once. ``spoiled``: what they hold is wrong."""
        waited = sequence.state == "waiting"
        if waited:
            self.waiting_tokens -= sequence.longest
            self._full = False  # there may be another first in line
        else:
            self._stop(sequence, spoiled)
        sequence.state = "gone"  # its place among those that are parked is passed over later
        self._turns.leave(sequence, waited=waited)

    def hold(self, sequence: Sequence) -> None:
        """Leave one that generates out of the forwards until ``resume``. It has its last token forwarded again then."""
        if sequence.row >= 0:
            self.roster.leave(sequence)
        sequence.cached = len(sequence.tokens) - 1
        self.held[sequence] = None

    def resume(self, sequence: Sequence) -> None:
        del self.held[sequence]
        self.roster.join(sequence)

    def schedule(self) -> Work | None:
        """The next forward: every decode, then as much of the prompts as the budget has room for. None: no work."""
        self._grow()
        self._admit()
        roster, decodes = self.roster, len(self.roster)
        slices = self._share(self._budget - decodes) if self._prompts else []
        if not slices:
            if not decodes:
                return None
            lengths = roster.lengths()
            batch = Batch(roster.last, roster.cached, range(decodes + 1), lengths, roster.tables, range(decodes))
            return Work(batch, roster.how, lengths, decodes, slices, [])
        return self._mixed(slices)

    def advance(self, work: Work) -> tuple[int, int]:
        """Record that the prompts' slices are cached; how many were new tokens of prompts, and how many not new."""
        new = again = 0
        for sequence, length in work.slices:
            first, sequence.cached = sequence.cached, sequence.cached + length
            known = max(0, min(sequence.forwarded - first, length))
            # Who was preempted forwards its last token here too, which is not one of its prompt.
            new += max(0, min(sequence.cached, sequence.prompt_length) - first - known)
            again += known
            sequence.forwarded = max(sequence.forwarded, sequence.cached)
            self._note(sequence, first)
        for sequence, _, positions in work.scored:
            sequence.scored = positions.stop
        for sequence in work.through:
            del self._prompts[sequence]
        return new, again

    def _mixed(self, slices: list[Slice]) -> Work:
        roster, decodes = self.roster, len(self.roster)
        tokens, positions = roster.last.copy(), roster.cached.copy()
        lengths, tables, how = roster.lengths().copy(), roster.tables.copy(), roster.how.copy()
        starts, rows = [*range(decodes + 1)], [*range(decodes)]
        at = lengths.copy()
        through: list[Sequence] = []
        scored: list[Scored] = []
        for sequence, length in slices:
            start, end = sequence.cached, sequence.cached + length
            self._reach(sequence, end)
            if asked := sequence.unscored(start, end):
                scored.append(Scored(sequence, len(rows), asked))
                rows += [len(tokens) + position - start for position in asked]
                at += [position + 1 for position in asked]
                how += sequence.scoring(asked)
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            starts.append(len(tokens))
            lengths.append(end)
            tables.append(sequence.table)
            if end == len(sequence.tokens) and sequence.params.max_tokens:
                rows.append(len(tokens) - 1)
                at.append(end)
                how.append(sequence.how)
                through.append(sequence)
        batch = Batch(tokens, positions, starts, lengths, tables, rows)
        return Work(batch, how, at, decodes, slices, through, scored)

    def _share(self, room: int) -> list[Slice]:
        """Cut ``room`` tokens from the prompts: half for the oldest, the rest for those nearest their first token.

        The half keeps a long prompt moving under any load of short ones; the rest lets short ones pass a long one. What
        either cannot use goes to the other, so the room is used up while any prompt has tokens left; but those whose
        logprobs are wanted have no more than MOST_SCORED rows in all.
        """
        oldest, scores = next(iter(self._prompts)), self._most_scored
        lengths: dict[Sequence, int] = {}
        for sequence, most in [
            (oldest, room - room // 2),
            *((one, room) for one in sorted(self._prompts, key=_remaining)),
        ]:
            if room == 0:
                break
            taken = lengths.get(sequence, 0)
            start = sequence.cached + taken
            extra = min(sequence.remaining - taken, most, room)
            if sequence.scored < sequence.to_score:
                extra = sequence.within(start, extra, scores)
                scores -= len(sequence.unscored(start, start + extra))
            lengths[sequence] = taken + extra
            room -= extra
        return [Slice(sequence, lengths[sequence]) for sequence in self._prompts if lengths.get(sequence)]

    # who runs

    def _admit(self) -> None:
        """Start waiting sequences in their order, as long as there are places and blocks for the first in line."""
        while not self._full and self._turns and self.running < self._max_sequences:
            if len(self._prompts) >= MOST_PROMPTS:
                return
            sequence = self._turns.first()
            if (missing := self._being_computed(sequence)) is not None:
                self._turns.step_aside(sequence)
                self._parked.setdefault(missing, []).append(sequence)
            elif not self._start(sequence):
                self._full = True

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence what it needs to run, or say that there are too few blocks."""
        table = self._pool.take(self._sharable(sequence), self._claim(sequence))
        if table is None:
            return False
        if not self._has_headroom():
            self._pool.release(table, self._claim(sequence) - len(table))
            return False
        sequence.table = table
        sequence.promised = self._claim(sequence) - len(table)
        sequence.cached = len(table) * self._pool.block_size
        sequence.state = "running"
        self._turns.start(sequence)
        self.waiting_tokens -= sequence.longest
        if not sequence.forwarded:
            sequence.found = sequence.cached
        self.cached_tokens += max(0, sequence.cached - sequence.forwarded)
        sequence.forwarded = max(sequence.forwarded, sequence.cached)
        self._prompts[sequence] = None
        for digest in sequence.digests[len(table) :]:
            self._computing.setdefault(digest, sequence)
        return True

    def _sharable(self, sequence: Sequence) -> list[bytes]:
        """The digests of the blocks that it could share. At least one token must be forwarded, and what is scored."""
        tokens = len(sequence.tokens) - 1
        if sequence.scored < sequence.to_score:
            tokens = sequence.scored
        return sequence.digests[: tokens // self._pool.block_size]

    def _claim(self, sequence: Sequence) -> int:
        """Blocks that it must have before it starts: all it can need, or those of the tokens it has and the next."""
        longest = sequence.longest
        return self._pool.needed(min(len(sequence.tokens) + 1, longest) if self._optimistic else longest)

    def _has_headroom(self) -> bool:
        """Whether those that generate could each still draw a block, so that they do not soon take this one's back."""
        generating = len(self.roster) + len(self.held)
        return not self._optimistic or self._pool.available >= min(generating, self._pool.blocks // 8)

    def _being_computed(self, sequence: Sequence) -> bytes | None:
        """The digest of its first block that nobody has cached, if a running prompt will have it soon."""
        if not self._computing:
            return None
        missing = next((digest for digest in self._sharable(sequence) if not self._pool.holds(digest)), None)
        return missing if missing in self._computing else None

    def _grow(self) -> None:
        """Draw a block for each row that needs one, out of those of others where there are no more."""
        for sequence in self.roster.growing():
            while not sequence.promised and not self._promise(sequence):
                victim = self._cheapest()
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self._draw(sequence)

    def _promise(self, sequence: Sequence) -> bool:
        granted = self._pool.promise(1)
        sequence.promised += granted
        return granted

    def _cheapest(self) -> Sequence:
        """Who gives up its blocks: of the lowest priority of its tenant, who has least to compute again."""
        running = [*self._prompts, *self.roster.sequences, *self.held]
        first = min((sequence for sequence in running if self._turns.leads(sequence)), key=_order, default=None)
        others = [sequence for sequence in running if sequence is not first]
        lowest: dict[str, int] = {}
        for request in (sequence.request for sequence in others):
            lowest[request.tenant] = max(request.priority, lowest.get(request.tenant, request.priority))
        return min(
            (sequence for sequence in others if sequence.request.priority == lowest[sequence.request.tenant]),
            key=lambda sequence: (self._cached(sequence), -sequence.order[1]),
        )

    def _cached(self, sequence: Sequence) -> int:
        return sequence.cached if sequence.row < 0 else self.roster.cached[sequence.row]

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks away; it waits where it was in the order, and goes on as if nothing had happened."""
        self.preemptions += 1
        sequence.forwarded = max(sequence.forwarded, self._cached(sequence))
        self._stop(sequence)
        self._wait(sequence, self._turns.wait)

    def _wait(self, sequence: Sequence, line_up: Callable[[Sequence], bool]) -> None:
        if self._pool.caching:
            known, full = len(sequence.digests), len(sequence.tokens) // self._pool.block_size
            parent = sequence.digests[-1] if known else sequence.root
            sequence.digests += self._pool.digests(parent, sequence.tokens, known, full)
        sequence.state = "waiting"
        sequence.cached = 0
        self.waiting_tokens += sequence.longest
        if line_up(sequence):
            self._full = False  # it may be the first of all

    def _stop(self, sequence: Sequence, spoiled: bool = False) -> None:
        """Take a running sequence out, and its blocks back; what they hold can be found as long as it is there."""
        generates = sequence.row >= 0 or sequence in self.held
        if sequence.row >= 0:
            self.roster.leave(sequence)
        self.held.pop(sequence, None)
        self._prompts.pop(sequence, None)
        if generates and not spoiled:
            self._note(sequence, len(sequence.digests) * self._pool.block_size)
        for digest in sequence.digests:
            if self._computing.get(digest) is sequence:
                self._computed(digest)
        if spoiled:
            self._pool.discard(sequence.table)
        self._pool.release(sequence.table, sequence.promised)
        sequence.table, sequence.promised = BlockTable(), 0
        self._turns.stop(sequence)
        self._full = False

    def _computed(self, digest: bytes) -> None:
        """Nobody computes this block any more: who waited for it goes on, with it or without."""
        del self._computing[digest]
        for sequence in self._parked.pop(digest, ()):
            if sequence.state == "waiting" and self._turns.line_up(sequence):
                self._full = False

    # blocks

    def _reach(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.table) * self._pool.block_size < tokens:
            self._draw(sequence)

    def _draw(self, sequence: Sequence) -> None:
        sequence.promised -= 1
        sequence.table.append(self._pool.draw())

    def _note(self, sequence: Sequence, first: int) -> None:
        """Say what is in the blocks that the tokens from ``first`` to what is cached have filled."""
        if not self._pool.caching:
            return
        size = self._pool.block_size
        known, full = len(sequence.digests), sequence.cached // size
        if known < full:  # of an answer, whose digests are made only now
            parent = sequence.digests[-1] if known else sequence.root
            sequence.digests += self._pool.digests(parent, sequence.tokens, known, full)
        for index in range(first // size, full):
            digest = sequence.digests[index]
            self._pool.note(sequence.table[index], digest)
            if digest in self._computing:
                self._computed(digest)


_remaining = attrgetter("remaining")
_order = attrgetter("order")
