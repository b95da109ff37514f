"""A nursery of grammars for the tokens of ByteText; run as a process of its own, as the real one is."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from fgsnap.runtime import nursery
from fgsnap.runtime.grammars import Grammars
from fgsnap.runtime.nursery import Vocabulary, live
from fgsnap.runtime.process import spawn
from tests.doubles import ByteText


def byte_grammars(*how: str) -> Grammars:
    """With "slow", and seconds for a mask's turn, every answer is allowed; see Slow."""
    return Grammars(lambda: spawn("tests.grammars", *how))


def main(arguments: Sequence[str]) -> int:
    if arguments[2:] == ["without"]:
        sys.modules["llguidance"] = None  # type: ignore[assignment]
    if arguments[2:3] == ["slow"]:
        nursery.MASK_SECONDS, nursery.LOADED, nursery.ANSWER_SECONDS, nursery.TOKEN_SECONDS = 0.5, 4, 0.25, 0.01
        nursery.TURN_SECONDS = float(arguments[3]) if arguments[3:] else nursery.TURN_SECONDS
        nursery._maker = lambda read: (lambda constraint: Slow(), read())
    return live(arguments[:2], byte_vocabulary)


class Slow:
    """A matcher of any text: to go on after an "x" takes 0.1 s of processor time, after a "k" 30, and "z" sleeps."""

    def __init__(self) -> None:
        self.token = 0

    def deep_copy(self) -> Slow:
        return Slow()

    def consume_token(self, token: int) -> None:
        self.token = token

    def compute_bitmask(self) -> bytes:
        until = time.process_time() + {ord("x"): 0.1, ord("k"): 30}.get(self.token, 0)
        while time.process_time() < until:
            pass
        time.sleep(0.7 if self.token == ord("z") else 0)
        return b"\xff" * 32 + b"\3\0\0\0"

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False

    def get_error(self) -> Any:
        raise AssertionError


def byte_vocabulary() -> Vocabulary:
    tokens = [bytes([token]) for token in range(256)] + [b"<bos>", b"<eos>"]
    return Vocabulary(tokens, [ByteText.bos, ByteText.eos], ByteText.eos_token_ids, ByteText().encode)
