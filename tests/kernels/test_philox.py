"""The counter-based generator against the known answers of its authors (Random123 1.14, kat_vectors) and its use."""

from __future__ import annotations

import pytest

from fgsnap.kernels.philox import philox, uniform

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    assert philox(counter, key) == answer


def test_uniform_is_the_top_53_bits_of_the_first_two_words() -> None:
    assert uniform(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    first, second, _, _ = philox((5, 1, 0, 0), (7, 3))
    assert uniform(7 | 3 << 32, 5 | 1 << 32) == ((first << 32 | second) >> 11) / 2**53


def test_uniform_stays_below_one_and_depends_on_both_arguments() -> None:
    draws = {uniform(seed, position) for seed in (0, 1, 2**32, 2**64 - 1) for position in range(500)}
    assert len(draws) == 2000
    assert min(draws) >= 0 and max(draws) < 1
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)


def test_a_seed_is_taken_modulo_64_bits() -> None:
    assert uniform(2**64 + 9, 4) == uniform(9, 4)
    assert uniform(-1, 4) == uniform(2**64 - 1, 4)
