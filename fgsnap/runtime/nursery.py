"""The process that grammars grow in: it reads the tokenizer once, and forks a child for each grammar.

A child compiles its grammar and then follows any number of answers by it. It ends itself when it takes too much time or
memory, however deep it is in the library, and nobody else ends with it. ``grammars`` is the engine's side.
"""

from __future__ import annotations

import heapq
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fgsnap.runtime import grammars, wire
from fgsnap.runtime.process import Worker, spawn
from fgsnap.runtime.request import Constraint
from fgsnap.runtime.worker import ENDING, die_with

COMPILE_SECONDS = 5.0
MASK_SECONDS = 1.0
"""Processor time for a grammar to be compiled, and for one mask. Whoever takes more is ended with all its answers."""

LOADED = 8
"""So many times that may pass on the clock meanwhile, for hosts that are busy."""

ANSWER_SECONDS = 5.0
TOKEN_SECONDS = 0.02
"""Processor time for all masks of an answer, and what each token adds to it. More, and the answer ends."""

TURN_SECONDS = 5.0
"""Processor time that may go to other answers by the same grammar before a mask's own turn. More, and it ends."""

NICE = 3
"""How much grammars give way to the model."""

MEMORY = 1 << 30
"""Bytes that a grammar may take; what all of them may is grammars.MOST_MEMORY."""

GROWTH = 1 << 22
"""Bytes that it may take more before it tells."""

LONGEST_REASON = 500
NO_ROOM = "it leaves no token to go on with"
TOO_SLOW = "it takes more time to follow than it is given"
CROWDED = "answers by it take more time to follow, together, than they are given"


class Vocabulary:
    """A tokenizer in the shape that the library looks for.

    Args:
        tokens: the bytes of each; empty for an id without a token.
        special: ids that no text is made of.
        eos: ids that end an answer.
        encode: text to tokens.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: list[int], eos: Sequence[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = next(iter(eos), None)
        self.eos = tuple(eos)
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def main(arguments: Sequence[str]) -> int:
    """Live in an interpreter of its own. The arguments: the socket's descriptor, the parent and the snapshot."""
    return live(arguments[:2], lambda: vocabulary(Path(arguments[2])))


def start(snapshot: str) -> Worker:
    """A nursery for the tokenizer of a snapshot."""
    return spawn("fgsnap.runtime.nursery", snapshot)


def vocabulary(path: Path) -> Vocabulary:
    """That of the snapshot at ``path``."""
    from fgsnap.runtime.text import Text
    from fgsnap.snapshot import open_snapshot

    with open_snapshot(path) as snapshot:
        text, size = Text(snapshot), snapshot.manifest.spec.vocab_size
        tokens = [text.token_bytes(token) for token in range(size)]
        special = sorted({*text.tokenizer.special, *text.eos_token_ids})
        return Vocabulary(
            tokens, [token for token in special if token < size], text.eos_token_ids, text.tokenizer.encode
        )


def live(ends: Sequence[str], read: Callable[[], Vocabulary]) -> int:
    """Fork a child for each grammar that comes, until the engine is gone.

    That is when its end of the socket is closed. To ask the kernel would be wrong: it takes the thread that started
    this process for the parent, and in a Python program that one may end long before the engine.
    """
    descriptor = int(ends[0])
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # as _limit_time relies on, whatever this process was started from
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(fileno=descriptor) as pipe:
        make = _maker(read)
        for pipe_of_one, constraint in _asked(pipe):
            _fork(pipe, pipe_of_one, constraint, make)
            pipe_of_one.close()
    return 0


class Unable(Exception):
    """The grammar cannot be used; ``code`` as in request.Output."""

    def __init__(self, why: str, code: str) -> None:
        super().__init__(why)
        self.why = why
        self.code = code


Make = Callable[[Constraint], Any]


def _maker(read: Callable[[], Vocabulary]) -> tuple[Make, Vocabulary | None]:
    """What makes a matcher of a constraint."""
    try:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    except ImportError:
        return _missing, None
    known = read()
    shaped: Any = known
    tokenizer, limits = LLTokenizer(shaped), LLParserLimits(verbose_errors=False)
    return lambda constraint: LLMatcher(tokenizer, _grammar(constraint), log_level=0, limits=limits), known


def _missing(constraint: Constraint) -> Any:
    raise Unable("the package llguidance, which constraints need, is not installed here", "not_supported")


def _grammar(constraint: Constraint) -> str:
    """In the library's own form, in which no text is taken for one of another kind."""
    if constraint.kind == "json":
        return f'{{"grammars": [{{"json_schema": {constraint.text}}}]}}'
    if constraint.kind == "regex":
        from llguidance import LLMatcher

        return str(LLMatcher.grammar_from_regex(constraint.text))
    return json.dumps({"grammars": [{"lark_grammar": constraint.text}]})


def _asked(pipe: socket.socket) -> Iterator[tuple[socket.socket, Constraint]]:
    """Each grammar with its pipe. They are sent one by one, and their pipes with their first bytes."""
    buffer, pipes = wire.FrameBuffer(), []
    while True:
        data, descriptors, _, _ = socket.recv_fds(pipe, 1 << 16, 16)
        if not data:
            return
        pipes += [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for body in buffer.feed(data):
            yield pipes.pop(0), grammars.decode_constraint(body)


def _fork(parent: socket.socket, pipe: socket.socket, constraint: Constraint, make: Any) -> None:
    nursery = os.getpid()
    if os.fork():
        return
    code = 1
    try:
        parent.close()
        _be_quiet()
        os.nice(NICE)
        if die_with(nursery):
            Child(pipe, *make).live(constraint)
        code = 0
    except OSError:
        code = 0  # the engine is gone, or wants it no more
    finally:
        os._exit(code)


def _be_quiet() -> None:
    """Keep a library that a stranger's grammar ends from writing into the operator's log."""
    if not os.environ.get("FGSNAP_DEBUG"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Answer:
    """What a grammar's process knows of an answer.

    Attributes:
        open_end: as constraint.Grammars has it.
        token: to take in before the next mask; None: none.
        tokens: how many it has.
        spent: processor time that its masks took.
        asked: processor time of the process when the next one was asked for.
    """

    def __init__(self, open_end: bool) -> None:
        self.open_end = open_end
        self.matcher: Any = None
        self.token: int | None = None
        self.tokens = 0
        self.spent = 0.0
        self.asked = 0.0


class Child:
    """A grammar's process. Of the answers that ask for a mask, that goes first which has taken the least time so far.

    Args:
        pipe: to the engine.
        make: makes a matcher of the constraint.
        known: the vocabulary; None where ``make`` only raises.
    """

    def __init__(self, pipe: socket.socket, make: Make, known: Vocabulary | None) -> None:
        self._pipe = pipe
        self._make = make
        self._eos = known.eos if known else ()
        self._answers: dict[int, Answer] = {}
        self._asking: list[tuple[float, int]] = []  # a heap; those that were closed meanwhile are passed over
        self._unsent = bytearray()
        self._told = self._before = _resident()

    def live(self, constraint: Constraint) -> None:
        """Compile, and follow answers until the engine closes its end."""
        self._send(grammars.Begun())
        _limit_memory()
        try:
            _limit_time(COMPILE_SECONDS)
            first = self._compiled(constraint)
            _limit_time(0)
        except Unable as error:
            self._send(grammars.Unfit(error.why, error.code))
            return
        self._say(grammars.Compiled())
        self._tell_of_memory()
        self._flush(wait=True)
        for messages in self._heard():
            for message in messages:
                self._take(message)
            if self._asking:
                self._serve(heapq.heappop(self._asking)[1], first)
                self._tell_of_memory()
                self._flush(wait=not self._asking)

    def _compiled(self, constraint: Constraint) -> Any:
        """A matcher at the beginning, from which others are copied."""
        try:
            first = self._make(constraint)
        except (ValueError, RecursionError) as error:
            raise Unable(_brief(str(error)), "constraint") from error
        if not first.is_error():
            first.deep_copy().compute_bitmask()  # of which much is kept for those that follow
        if first.is_error():
            raise Unable(_reason(first), "constraint")
        return first

    def _heard(self) -> Iterator[list[grammars.ToGrammar]]:
        """What has come; waited for only where no mask is asked for."""
        buffer = wire.FrameBuffer()
        while True:
            try:
                data = self._pipe.recv(1 << 16, socket.MSG_DONTWAIT if self._asking else 0)
            except BlockingIOError:
                yield []
                continue
            if not data:
                return
            yield [*map(grammars.decode_to_grammar, buffer.feed(data))]

    def _take(self, message: grammars.ToGrammar) -> None:
        if isinstance(message, grammars.Close):
            self._answers.pop(message.number, None)
            return
        if isinstance(message, grammars.Open):
            self._answers[message.number] = Answer(message.open_end)
        answer = self._answers[message.number]
        if isinstance(message, grammars.Accept):
            answer.token = message.token
            answer.tokens += 1
        answer.asked = time.process_time()
        heapq.heappush(self._asking, (answer.spent, message.number))

    def _serve(self, number: int, first: Any) -> None:
        """Find out what may come next in an answer, within the time that is left to it."""
        answer = self._answers.get(number)
        if answer is None:
            return
        began = time.process_time()
        if began - answer.asked > TURN_SECONDS:
            self._say(grammars.Broken(number, CROWDED))
            return
        _limit_time(MASK_SECONDS)
        reply = self._next(number, answer, first)
        _limit_time(0)
        answer.spent += time.process_time() - began
        slow = answer.spent > ANSWER_SECONDS + TOKEN_SECONDS * answer.tokens
        self._say(grammars.Broken(number, TOO_SLOW) if slow else reply)

    def _next(self, number: int, answer: Answer, first: Any) -> grammars.Mask | grammars.Broken:
        if answer.matcher is None:
            answer.matcher = first.deep_copy()
        else:
            answer.matcher.consume_token(answer.token)
        mask = bytearray(answer.matcher.compute_bitmask())
        if answer.matcher.is_error():
            return grammars.Broken(number, _reason(answer.matcher))
        if not any(mask):
            return grammars.Broken(number, NO_ROOM)
        complete = self._mend(mask, answer.matcher.is_stopped(), answer.open_end)
        return grammars.Mask(number, bytes(mask), complete)

    def _mend(self, mask: bytearray, stopped: bool, open_end: bool) -> bool:
        """Allow every token that ends an answer, or none, where the library allows the one it knows."""
        if not self._eos or not mask[self._eos[0] // 8] >> self._eos[0] % 8 & 1:
            return False
        for token in self._eos:
            mask[token // 8] &= ~(1 << token % 8)
        complete = stopped or not any(mask)
        if complete or not open_end:
            for token in self._eos:
                mask[token // 8] |= 1 << token % 8
        return complete

    def _say(self, message: grammars.FromGrammar) -> None:
        self._unsent += grammars.frame(message)

    def _tell_of_memory(self) -> None:
        resident = _resident()
        if resident > self._told + GROWTH:
            self._told = resident
            self._say(grammars.Grown(resident - self._before))

    def _flush(self, *, wait: bool) -> None:
        """Send what has been said, and what there is no room for later, unless nothing else is to be done."""
        try:
            while self._unsent:
                del self._unsent[: self._pipe.send(self._unsent, 0 if wait else socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return

    def _send(self, message: grammars.FromGrammar) -> None:
        self._pipe.sendall(grammars.frame(message))


def _resident() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_time(seconds: float) -> None:
    """End this process when it has computed so long from now, or taken much longer for it; 0: do not."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * LOADED)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what ends it is nothing to look into


def _reason(matcher: Any) -> str:
    why = _brief(matcher.get_error())
    return NO_ROOM if why.startswith("NoExtension") else why


def _brief(why: str) -> str:
    """The first lines of the library's words; they repeat the whole grammar where it is at fault."""
    words = " ".join(why.replace("<non-verbose/>", "").split())
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " ..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
