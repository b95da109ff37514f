"""A nursery of grammars for the tokens of ByteText; run as a process of its own, as the real one is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fgsnap.runtime.grammars import Grammars
from fgsnap.runtime.nursery import Vocabulary, live
from fgsnap.runtime.process import spawn
from tests.doubles import ByteText


def byte_grammars() -> Grammars:
    return Grammars(lambda: spawn("tests.grammars"))


def main(arguments: Sequence[str]) -> int:
    if arguments[2:] == ["without"]:
        sys.modules["llguidance"] = None  # type: ignore[assignment]
    return live(arguments[:2], byte_vocabulary)


def byte_vocabulary() -> Vocabulary:
    tokens = [bytes([token]) for token in range(256)] + [b"<bos>", b"<eos>"]
    return Vocabulary(tokens, [ByteText.bos, ByteText.eos], ByteText.eos_token_ids, ByteText().encode)
