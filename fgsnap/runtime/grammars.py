"""Grammars from the engine's side: each in a process of its own, which compiles it and follows the answers it is for.

What a stranger's grammar does to a compiler is not known beforehand: it may take minutes or gigabytes, and some end the
process by a stack overflow. So nothing of it happens in the engine's process. A *nursery* (``nursery``) is spawned when
the first constraint comes. It reads the tokenizer, and forks a child for each grammar; the child ends itself when it
takes too long. What is picked for an answer is told to its grammar's child, which computes the next mask while the
engine computes the next logits.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from fgsnap.errors import RequestError
from fgsnap.runtime import wire
from fgsnap.runtime.process import Worker
from fgsnap.runtime.request import Constraint

if TYPE_CHECKING:
    from fgsnap.runtime import constraint as seam

MOST_GRAMMARS = 128
"""Different grammars that answers are made by at once; each is a process."""

MOST_IDLE = 16
"""Grammars that are kept for later answers."""

MOST_COMPILING = max(2, len(os.sched_getaffinity(0)) // 2)
MOST_WAITING = 256
"""Different grammars that are compiled at once, and that wait for it. Their processes give way to the model's."""

MOST_MEMORY = 4 << 30
"""Bytes that compiled grammars and their answers may take in all, as far as they have told."""

LONG = 8192
"""Characters from which on a grammar is long. One place among those that are compiled is kept for the others."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """Begin an answer; what is asked for here and in Accept comes back as a Mask or Broken of the same number."""

    number: int
    open_end: bool


class Accept(msgspec.Struct, frozen=True, tag=True):
    number: int
    token: int


class Close(msgspec.Struct, frozen=True, tag=True):
    number: int


class Begun(msgspec.Struct, frozen=True, tag=True):
    """The grammar's process is there, and compiles it."""


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """The grammar can be used."""


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """The grammar cannot be used; ``code`` as in request.Output."""

    why: str
    code: str


class Grown(msgspec.Struct, frozen=True, tag=True):
    """How much memory the grammar's process has taken so far."""

    memory: int


class Mask(msgspec.Struct, frozen=True, tag=True):
    number: int
    mask: bytes
    complete: bool


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The answer cannot go on."""

    number: int
    why: str


ToGrammar = Open | Accept | Close
FromGrammar = Begun | Compiled | Unfit | Grown | Mask | Broken

_encoder = msgspec.msgpack.Encoder()
decode_constraint = msgspec.msgpack.Decoder(Constraint).decode
decode_to_grammar = msgspec.msgpack.Decoder(ToGrammar).decode
decode_from_grammar = msgspec.msgpack.Decoder(FromGrammar).decode


def frame(message: ToGrammar | FromGrammar | Constraint) -> bytes:
    """The message with its length in front."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


class Matcher:
    """One answer; see constraint.Matcher."""

    def __init__(self, grammar: Grammar, number: int) -> None:
        self.pending = True
        self.complete = False
        self.error = ""
        self.code = ""
        self._grammar = grammar
        self._number = number
        self._mask = memoryview(b"")

    def accept(self, token: int) -> None:
        self.pending = not self.error
        if self.pending:
            self._grammar.send(Accept(self._number, token))

    def mask(self) -> memoryview:
        assert not self.pending
        return self._mask

    def close(self) -> None:
        self._grammar.close(self._number)

    def take(self, message: Mask) -> None:
        self.pending, self.complete, self._mask = False, message.complete, memoryview(message.mask)

    def fail(self, why: str, code: str) -> None:
        if not self.error:
            self.pending, self.error, self.code = False, why, code
            self._mask = memoryview(bytes(len(self._mask)))


class Grammar:
    """One grammar's process, and the answers that it follows.

    Args:
        constraint: what it is made of.
        changed: called when it has been compiled, has failed, takes more memory, or has no answers any more.
    """

    def __init__(self, constraint: Constraint, changed: Callable[[Grammar], None]) -> None:
        self.constraint = constraint
        self.long = len(constraint.text) >= LONG
        self.matchers: dict[int, Matcher] = {}
        self.pipe, self.far_end = socket.socketpair()
        self.memory = 0
        self.state = "queued"  # then "sent", "begun", "compiled", and "gone"
        self._changed = changed
        self._buffer = wire.FrameBuffer()
        self._unsent = bytearray()
        self._numbers = 0

    def open(self, open_end: bool) -> Matcher:
        self._numbers += 1
        matcher = self.matchers[self._numbers] = Matcher(self, self._numbers)
        self.send(Open(self._numbers, open_end))
        return matcher

    def close(self, number: int) -> None:
        if self.matchers.pop(number, None) is not None and self.state != "gone":
            self.send(Close(number))
            if not self.matchers:
                self.flush()
                self._changed(self)

    def send(self, message: ToGrammar) -> None:
        """Send with the next ``flush``."""
        self._unsent += frame(message)

    def flush(self) -> None:
        """Send, once it is compiled, for what there is room; the rest goes the next time."""
        if self.state != "compiled":
            return
        try:
            while self._unsent:
                del self._unsent[: self.pipe.send(self._unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()  # it is gone, which is heard of when it is listened to

    def hear(self) -> None:
        """Take in what it has said."""
        try:
            data = self.pipe.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        for body in self._buffer.feed(data):
            self._take(decode_from_grammar(body))

    def end(self, why: str, code: str) -> None:
        """Have its process end, and all its answers."""
        if self.state != "gone":
            self.state = "gone"
            self.pipe.close()
            self.far_end.close()
            for matcher in self.matchers.values():
                matcher.fail(why, code)
            self._changed(self)

    def _take(self, message: FromGrammar) -> None:
        if isinstance(message, Mask):
            if message.number in self.matchers:
                self.matchers[message.number].take(message)
        elif isinstance(message, Broken):
            if message.number in self.matchers:
                self.matchers[message.number].fail(message.why, "constraint")
        elif isinstance(message, Grown):
            self.memory = message.memory
            self._changed(self)
        elif isinstance(message, Unfit):
            self.end(message.why, message.code)
        elif isinstance(message, Compiled):
            self.state = "compiled"
            self.flush()
            self._changed(self)
        else:
            self.state = "begun"

    def _lost(self) -> None:
        if self.state == "begun":
            self.end("it takes more time or memory to compile than it is given", "constraint")
        elif self.state == "compiled":
            self.end("it takes more time or memory to follow than it is given", "constraint")
        else:
            self.end("the process that compiles it could not be started", "unavailable")


class Grammars:
    """All grammars; see constraint.Grammars.

    Args:
        start: starts a nursery.
    """

    def __init__(self, start: Callable[[], Worker]) -> None:
        self._start = start
        self._nursery: Worker | None = None
        self._known: dict[Constraint, Grammar] = {}  # the one that was asked for last is the last
        self._queue: dict[Grammar, None] = {}  # in the order in which they came
        self._turns = 0
        self._compiling: dict[Grammar, None] = {}
        self._poll = select.epoll()
        self._by_pipe: dict[int, Grammar] = {}

    def matcher(self, constraint: Constraint, *, open_end: bool) -> Matcher:
        """RequestError 429 where there are too many grammars."""
        self.hear()  # whether one that is known has ended meanwhile
        constraint = msgspec.structs.replace(constraint, field="")
        grammar = self._known.pop(constraint, None) or self._made(constraint)
        self._known[constraint] = grammar
        matcher = grammar.open(open_end)
        grammar.flush()
        self._compile()
        return matcher

    def flush(self) -> None:
        for grammar in self._known.values():
            grammar.flush()

    def hear(self, within: float = 0.0) -> None:
        for descriptor, _ in self._poll.poll(within):
            if descriptor in self._by_pipe:
                self._by_pipe[descriptor].hear()

    def wait(self, matchers: Sequence[seam.Matcher], seconds: float) -> None:
        self.hear()
        until = time.monotonic() + seconds
        while matchers := [one for one in matchers if one.pending]:
            left = until - time.monotonic()
            if left <= 0:
                return
            self.hear(left)

    def fileno(self) -> int:
        return self._poll.fileno()

    def close(self) -> None:
        """End all of their processes."""
        for grammar in [*self._known.values()]:
            grammar.end("the engine ends", "unavailable")
        if self._nursery is not None:
            self._nursery.kill()
            self._nursery.wait()
            self._nursery.pipe.close()
        self._poll.close()

    def _made(self, constraint: Constraint) -> Grammar:
        live = sum(1 for grammar in self._known.values() if grammar.matchers)
        if live >= MOST_GRAMMARS or len(self._queue) >= MOST_WAITING:
            raise RequestError(
                "Too many different constraints are in use.",
                f"{live} are, and {len(self._queue)} wait to be compiled.",
                "Try again a little later.",
                status=429,
                code="overloaded",
            )
        grammar = Grammar(constraint, self._note)
        self._by_pipe[grammar.pipe.fileno()] = grammar
        self._poll.register(grammar.pipe, select.EPOLLIN)
        self._queue[grammar] = None
        return grammar

    def _note(self, grammar: Grammar) -> None:
        """Something has become of a grammar."""
        if grammar.state in ("compiled", "gone"):
            self._compiling.pop(grammar, None)
        if grammar.state == "gone":
            self._forget(grammar)
        elif grammar.state == "queued" and not grammar.matchers:
            grammar.end("nobody waits for it", "unavailable")
        self._let_go_of_idle()
        self._bound_memory()
        self._compile()

    def _forget(self, grammar: Grammar) -> None:
        if self._known.get(grammar.constraint) is grammar:
            del self._known[grammar.constraint]
        self._queue.pop(grammar, None)
        self._by_pipe = {at: one for at, one in self._by_pipe.items() if one is not grammar}  # closed, so epoll has too

    def _let_go_of_idle(self) -> None:
        idle = [grammar for grammar in self._known.values() if not grammar.matchers and grammar.state == "compiled"]
        for grammar in idle[: max(0, len(idle) - MOST_IDLE)]:
            grammar.end("nobody uses it", "unavailable")

    def _bound_memory(self) -> None:
        """End those that take too much together: who is idle, then who takes the most."""
        while sum(grammar.memory for grammar in self._known.values()) > MOST_MEMORY:
            grammar = max(self._known.values(), key=lambda one: (not one.matchers, one.memory))
            grammar.end("of all in use, which take more memory than they are given, it takes the most", "constraint")

    def _compile(self) -> None:
        """Have the next ones compiled, as many as may be at once."""
        while (grammar := self._next()) is not None:
            del self._queue[grammar]
            self._compiling[grammar] = None
            grammar.state = "sent"
            self._send(grammar)

    def _next(self) -> Grammar | None:
        """The next one to compile: the shortest, and every other time the oldest. None: no place is free."""
        free = MOST_COMPILING - len(self._compiling)
        long_too = free > 0 and sum(one.long for one in self._compiling) < MOST_COMPILING - 1
        able = [one for one in self._queue if long_too or not one.long] if free > 0 else []
        if not able:
            return None
        self._turns += 1
        return able[0] if self._turns % 2 else min(able, key=lambda one: len(one.constraint.text))

    def _send(self, grammar: Grammar) -> None:
        """Hand a grammar to the nursery, or to a new one; where that cannot be, its pipe is closed and it is lost."""
        for _ in range(2):
            nursery = self._nursery = self._nursery or self._start()
            try:
                socket.send_fds(nursery.pipe, [frame(grammar.constraint)], [grammar.far_end.fileno()])
                break
            except OSError:
                nursery.kill()
                nursery.wait()
                nursery.pipe.close()
                self._nursery = None
        grammar.far_end.close()
