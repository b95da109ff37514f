"""Bad words: what they ban, against their rule, and that it costs the same however many they are."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgsnap.runtime.badwords import Words, bad_words
from fgsnap.runtime.request import MOST_BAD_TOKENS, Request, SamplingParams
from fgsnap.runtime.sequence import Sequence

ALIKE = 16
TEXT = [1, 2] * 50 + [1] * 100 + [9] * 20


def sequence_of(words: Words, **params) -> Sequence:
    request = Request("r", (1, 2, 3), SamplingParams(**{"max_tokens": 999, "bad_words": words} | params))
    return Sequence(request, 0, (3,), b"")


def say(sequence: Sequence, text: list[int]) -> None:
    for token in text:
        sequence.tokens.append(token)
        sequence.note(token)


def instructions(work: Callable[[], object]) -> int:
    """How many instructions of Python's ``work`` takes: what a clock would tell on a machine that does nothing else."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


few = st.integers(0, 2)


@given(st.lists(st.lists(few, min_size=1, max_size=5).map(tuple), min_size=1, max_size=8), st.lists(few, max_size=24))
def test_what_is_banned_is_what_would_complete_a_word(words, text):
    sequence = sequence_of(tuple(words))
    edits = sequence.how.edits
    for length in range(len(text) + 1):
        said = text[:length]
        expected = {last for *before, last in words if said[len(said) - len(before) :] == before}
        assert set(edits.banned) == expected
        version, banned = edits.version, edits.banned
        say(sequence, text[length : length + 1])
        assert (edits.version != version) == (edits.banned != banned)


def test_ends_are_held_off_beside_bad_words_and_then_are_not():
    sequence = sequence_of(((1,), (2, 5)), min_tokens=2)
    seen = [{*sequence.how.edits.banned}]
    for token in (2, 4, 2):
        say(sequence, [token])
        seen.append({*sequence.how.edits.banned})
    assert seen == [{1, 3}, {1, 3, 5}, {1}, {1, 5}]


@pytest.mark.parametrize(
    "words",
    [
        tuple((token,) for token in range(256)),
        tuple((1,) * (ALIKE - 1) + (token,) for token in range(256)),
        tuple((token,) + (1,) * (ALIKE - 1) for token in range(256)),
        tuple((1,) * length for length in range(1, 90)),
        ((1,) * (MOST_BAD_TOKENS - 1) + (2,),),
    ],
    ids=["single tokens", "that end otherwise", "that begin otherwise", "within each other", "one long"],
)
def test_many_words_cost_no_more_a_token_than_one(words):
    one, many = sequence_of(((1, 5),)), sequence_of(words)
    say(many, TEXT)  # what is banned is made once for all answers of a request
    many = sequence_of(words)
    assert instructions(lambda: say(many, TEXT)) < 2 * instructions(lambda: say(one, TEXT))


def test_the_choices_of_a_request_share_what_is_made_of_its_words():
    words = [tuple((1,) * (ALIKE - 1) + (token,) for token in range(256)) for _ in range(2)]
    bad_words.cache_clear()
    first = instructions(lambda: sequence_of(words[0]))
    again = instructions(lambda: sequence_of(words[1]))
    assert again < first / 20
