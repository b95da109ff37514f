"""Ways to sample as the C++ backend reads them: structs of csrc/sample.h, kept while their requests run."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence

from fgsnap.kernels.library import address
from fgsnap.kernels.ops import Edits, Sampling
from fgsnap.kernels.tape import address_of, misuse

_SEEDS = (1 << 64) - 1
_COUNTED, _BIASED, _BANNED, _ALLOWED = 3, 6, 9, 13  # words of sample.h's Edits


class Ways:
    """How the rows of a batch are sampled.

    Attributes:
        addresses: of each row's struct.
        asking: rows that want logprobs.
        top: the most logprobs that any of them wants beside its token's own.
        targets: of each row its token where that is known, else -1; None: of no row.
    """

    __slots__ = ("_edits", "_ways", "addresses", "asking", "how", "targets", "top")

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = ways
        self._edits = [way.edits for way in ways if way.edits is not None]
        self.how = [way.how for way in ways]
        self.addresses = array("q", [way.at for way in ways])
        self.asking = [row for row, one in enumerate(self.how) if one.logprobs >= 0]
        self.top = max((self.how[row].logprobs for row in self.asking), default=0)
        known = any(self.how[row].target >= 0 for row in self.asking)
        self.targets = array("q", [one.target for one in self.how]) if known else None

    def refresh(self, vocabulary: int) -> None:
        """Take over what has changed since the last step: counts of tokens, and masks."""
        for edits in self._edits:
            edits.refresh(vocabulary)


class Packer:
    """Makes the structs of a batch; those of requests that were in the last one are used again.

    They are found by identity. They hold on to what they were made of, so nothing else can have its place meanwhile.
    """

    def __init__(self) -> None:
        self._ways = Ways(())
        self._known: dict[int, Way] = {}

    def ways(self, how: Sequence[Sampling], vocabulary: int) -> Ways:
        """Of this batch, with edits as they are now."""
        if self._ways.how != how:  # at once where all are the same objects; equal ones have the same edits
            before, self._known = self._known, {}
            self._ways = Ways([self._way(one, before) for one in how])
        self._ways.refresh(vocabulary)
        return self._ways

    def _way(self, how: Sampling, before: dict[int, Way]) -> Way:
        way = before.get(id(how))
        if way is None:
            way = self._known.get(id(how)) or Way(how)
        self._known[id(how)] = way
        return way


class Way:
    """sample.h's Sampling of one request."""

    __slots__ = ("_words", "at", "edits", "how")

    def __init__(self, how: Sampling) -> None:
        _check(how)
        self.how = how
        self.edits = None if how.edits is None else PackedEdits(how.edits)
        numbers = (how.temperature, how.top_k, how.top_p, how.min_p, how.seed & _SEEDS, how.logprobs)
        self._words = array("q", struct.pack("=dqddQqq", *numbers, self.edits.at if self.edits else 0))
        self.at = address_of(self._words)


class PackedEdits:
    """sample.h's Edits of one request, which follow it as its answer grows. Its arrays are read where they are."""

    __slots__ = ("_allowed", "_banned", "_edits", "_forbidden", "_version", "_words", "at")

    def __init__(self, edits: Edits) -> None:
        penalties = array("d", (edits.repetition, edits.presence, edits.frequency)).tobytes()
        self._edits = edits
        self._forbidden: Sequence[int] = ()
        self._banned = array("i")
        self._version = -1
        self._allowed: memoryview | None = None
        self._words = array("q", penalties + bytes(8 * 11))
        self._put(_BIASED, address_of(edits.biased), address_of(edits.biases), len(edits.biased))
        if edits.repetition != 1.0:
            self._put(_BANNED + 2, address_of(edits.prompt), len(edits.prompt))
        self.at = address_of(self._words)

    def refresh(self, vocabulary: int) -> None:
        """Take over what has changed: an array that has grown may lie elsewhere."""
        edits = self._edits
        if self._version != edits.version:
            self._version = edits.version
            if edits.penalizes:
                self._put(_COUNTED, address_of(edits.counted), address_of(edits.numbers), len(edits.counted))
            if self._forbidden is not edits.banned:
                self._forbidden, self._banned = edits.banned, array("i", edits.banned)
                self._put(_BANNED, address_of(self._banned), len(self._banned))
        if self._allowed is not edits.allowed:
            self._put(_ALLOWED, _mask(edits.allowed, vocabulary))
            self._allowed = edits.allowed

    def _put(self, at: int, *words: int) -> None:
        self._words[at : at + len(words)] = array("q", words)


def _mask(allowed: memoryview | None, vocabulary: int) -> int:
    if allowed is None:
        return 0
    if not allowed.c_contiguous or allowed.nbytes < -(-vocabulary // 32) * 4:
        raise misuse("sample", f"a mask of {allowed.nbytes} bytes for {vocabulary} tokens")
    return address(allowed)


def _check(how: Sampling) -> None:
    if not (0 <= how.temperature < math.inf and how.top_k >= 0):
        raise misuse("sample", "a negative temperature or top_k")
    if not (how.top_p >= 0 and 0 <= how.min_p <= 1):
        raise misuse("sample", f"top_p {how.top_p} or min_p {how.min_p}, which are no probabilities")
    if how.target >= 0 > how.logprobs:
        raise misuse("sample", "a target, and no logprob of it")
