"""Who is next: tenants in turns by tokens, and within each by priority, then first come, first served.

A tenant's turn is a number of tokens: those that its sequences have used, and those that its running ones may still
use. The lowest goes first (start-time fair queueing: Goyal et al., SIGCOMM 1996; charged for what is really served:
Sheng et al., OSDI 2024). Who waits is charged nothing, and who stops gets back what it has not used. A tenant that
begins to wait is put level with the last one that started, so that nobody saves turns up, and what it gets back does
not put it before that.

Let L be the longest sequence, and R the most that the running ones of a tenant may still use. While two tenants have
sequences that are ready to start, the tokens that they use differ by at most 2 L + 4 R, whatever their priorities:

- When one of a starts, a's turn is at most b's. From then on a uses at most what its running ones may, and that one.
- Their turns differ by at most L + R when both have begun to wait: nobody is more than L ahead of the last that
  started, nor more than R behind it.
- A turn is use and promise, but for what it did not get back: at most R, of those that ran when it began to wait.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from fgsnap.runtime.sequence import Sequence

MANY_TENANTS = 1024
"""From so many on, tenants that have no claim to a later turn are forgotten."""

MANY_GONE = 64
"""So many that have left a line may be kept in it whoever waits there."""


class Line:
    """The sequences of one tenant.

    Attributes:
        turn: see above.
        floor: the turn is not lowered below this.
        queue: a heap of those that are ready to start. The first one waits; others may have left meanwhile.
        waiting: how many wait, ready or not.
        live: how many there are.
        begun: how many of them have ever started.
    """

    __slots__ = ("begun", "floor", "live", "queue", "turn", "waiting")

    def __init__(self) -> None:
        self.turn = self.floor = 0
        self.queue: list[tuple[tuple[int, int], Sequence]] = []
        self.waiting = self.live = self.begun = 0


class Turns:
    """The lines of all tenants. ``waiting``: how many sequences wait, ready or not."""

    def __init__(self) -> None:
        self.waiting = 0
        self._lines: dict[str, Line] = {}
        self._ready: dict[Line, None] = {}  # those whose queue is not empty
        self._leading: dict[Line, None] = {}  # those with sequences that have begun; where none ended for longest first
        self._now = 0  # where the turns are: that of the last line of which one started
        self._highest = 0
        self._arrivals = 0

    def __bool__(self) -> bool:
        """Whether anybody is ready to start."""
        return bool(self._ready)

    def join(self, sequence: Sequence) -> bool:
        """Take in a new sequence, which waits; whether it is the first of its line."""
        tenant = sequence.request.tenant
        if tenant not in self._lines:
            self._forget()
            self._lines[tenant] = Line()
        self._lines[tenant].live += 1
        self._arrivals += 1
        sequence.order = (sequence.request.priority, self._arrivals)
        return self.wait(sequence)

    def wait(self, sequence: Sequence) -> bool:
        """Have a sequence wait that is new or has stopped; whether it is the first of its line."""
        line = self._line(sequence)
        if not self.waiting:
            self._now = self._highest  # all have had their turns
        if not line.waiting:
            line.turn, line.floor = max(line.turn, self._now), self._now
        self.waiting += 1
        line.waiting += 1
        return self.line_up(sequence)

    def line_up(self, sequence: Sequence) -> bool:
        """Have one that waits be ready to start; whether it is the first of its line."""
        line = self._line(sequence)
        heappush(line.queue, (sequence.order, sequence))
        self._ready[line] = None
        return line.queue[0][1] is sequence

    def first(self) -> Sequence:
        """Who is to start next. Of equal turns the one goes first whose first sequence came first."""
        return min(self._ready, key=_place).queue[0][1]

    def step_aside(self, sequence: Sequence) -> None:
        """The first one is not ready, though it waits."""
        line = self._line(sequence)
        heappop(line.queue)
        self._tidy(line)

    def start(self, sequence: Sequence) -> None:
        """The first one runs from now on, and is charged all that it may still use."""
        line = self._line(sequence)
        self.step_aside(sequence)
        self.waiting -= 1
        line.waiting -= 1
        if not sequence.charged:
            line.begun += 1
            self._leading.setdefault(line)
        self._now = max(self._now, line.turn)
        line.turn += sequence.longest - sequence.charged
        sequence.charged = sequence.longest
        self._highest = max(self._highest, line.turn)

    def stop(self, sequence: Sequence) -> None:
        """One does not run any more, and gets back what it has not used. A start costs one token at least."""
        line, used = self._line(sequence), max(1, sequence.used)
        line.turn = max(line.floor, line.turn - (sequence.charged - used))
        sequence.charged = used

    def leave(self, sequence: Sequence, *, waited: bool) -> None:
        """Forget a sequence that has stopped, or one that has ``waited`` until now."""
        line = self._line(sequence)
        line.live -= 1
        if waited:
            self.waiting -= 1
            line.waiting -= 1
            self._tidy(line)
        if sequence.charged:
            line.begun -= 1
            del self._leading[line]
            if line.begun:
                self._leading[line] = None

    def leads(self, sequence: Sequence) -> bool:
        """Whether it is of the tenant of whose sequences the first keeps its blocks, until one of them has ended."""
        return self._line(sequence) is next(iter(self._leading))

    def _line(self, sequence: Sequence) -> Line:
        return self._lines[sequence.request.tenant]

    def _tidy(self, line: Line) -> None:
        """See to it that the first in a queue waits, and that those that have left do not pile up in it."""
        if len(line.queue) > 2 * line.waiting + MANY_GONE:
            line.queue = [entry for entry in line.queue if entry[1].state == "waiting"]
            heapify(line.queue)
        while line.queue and line.queue[0][1].state != "waiting":
            heappop(line.queue)
        if not line.queue:
            self._ready.pop(line, None)

    def _forget(self) -> None:
        if len(self._lines) >= MANY_TENANTS:
            kept = {tenant: line for tenant, line in self._lines.items() if line.live or line.turn > self._now}
            self._lines = kept


def _place(line: Line) -> tuple[int, int]:
    (_, arrival), _ = line.queue[0]
    return line.turn, arrival
