"""The random numbers of sampling: Philox 4x32-10 (Salmon et al., SC 2011), one draw for each (seed, position).

Counter-based: a request's tokens depend on its seed and positions alone, never on what else is in the batch, on the
backend, or on whether it was preempted.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds over four 32-bit counter words with a 64-bit key."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        left, right = _MULTIPLY[0] * a, _MULTIPLY[1] * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & _MASK, (left >> 32) ^ d ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits for a 64-bit ``seed`` and the ``position`` of the token to be drawn."""
    high, low, _, _ = philox((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((high << 32 | low) >> 11) * 2.0**-53
