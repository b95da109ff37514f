"""The canary: what a snapshot's model says to one fixed prompt, computed once in float32 and checked at every start.

Conversion runs ``python -m fgsnap.runtime.canary DIR`` in a fresh process: it opens the directory as a server would,
binds every tensor, runs the float32 reference once, and prints the values as JSON. ``--bind-only`` leaves the forward
out, and prints how many tensors were bound; it needs no backend, so neither torch nor a compiler. A server then runs
one prefill of the same prompt; where the reference was sure by more than the backend's rounding can explain, the
backend must agree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import msgspec

from fgsnap.errors import FgsnapError, UsageError
from fgsnap.kernels.choose import choose
from fgsnap.kernels.ops import Batch, Ops, Sampling
from fgsnap.layout import Shape
from fgsnap.runtime.decoder import Decoder
from fgsnap.runtime.weights import Weights, load, load_by_layer
from fgsnap.snapshot import Layout, Snapshot, open_snapshot, packed_bytes
from fgsnap.spec import DecoderSpec, DType, features, rope_frequencies

SENTENCE = "The capital of France is Paris, and the capital of Germany is"
MOST_TOKENS = 16
BIND_ONLY = "--bind-only"
# Logits of one model in two dtypes differ by this much at most: widely more than one of 135M parameters shows.
TOLERANCE = {"float32": 0.02, "float16": 0.25, "bfloat16": 1.0}


class Values(msgspec.Struct, frozen=True):
    """The prompt, and for each of its positions the most likely next token and its logit's margin over the second."""

    tokens: list[int]
    next: list[int]
    margins: list[float]


class Expected(Protocol):
    """What check needs of Values or of the snapshot's own canary."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def next(self) -> Sequence[int]: ...
    @property
    def margins(self) -> Sequence[float]: ...


class Match(msgspec.Struct, frozen=True):
    """The outcome of a check: how many positions were sure enough to compare, and those that disagree."""

    ok: bool
    checked: int
    mismatched: tuple[int, ...]


def prompt(snapshot: Snapshot) -> list[int]:
    """At most MOST_TOKENS ids: the fixed sentence by the snapshot's tokenizer, or without one ids spread out."""
    spec, text = snapshot.manifest.spec, snapshot.manifest.text
    most = min(MOST_TOKENS, spec.max_length)
    ids = _sentence_ids(snapshot)
    if text.add_bos and text.bos_token_id is not None:
        ids = [text.bos_token_id, *ids]
    if not ids or max(ids) >= spec.vocab_size:
        # Knuth's multiplicative hash: the same ids everywhere, and no two neighbours alike.
        ids = [index * 2654435761 % spec.vocab_size for index in range(1, MOST_TOKENS + 1)]
    return ids[:most]


def _sentence_ids(snapshot: Snapshot) -> list[int]:
    if "tokenizer.json" not in snapshot.manifest.files:
        return []
    from fgsnap.tokenizer import load_tokenizer

    return load_tokenizer(snapshot.read_text, snapshot.manifest.files).encode(SENTENCE)


class _Counting:
    """The one op that binding needs: takes a tensor's bytes, and lets go of them."""

    def __init__(self) -> None:
        self.tensors = 0

    def weight(self, data: memoryview, dtype: DType, shape: Shape, layout: Layout) -> None:
        assert data.nbytes == packed_bytes(layout, shape, dtype), "the binder checks this"
        self.tensors += 1


def bind(snapshot: Snapshot) -> int:
    """Bind every tensor by name, dtype, shape and bytes, as a server would, and compute nothing; returns their number.

    Of every rank at the snapshot's own degree, where all of them are mapped and take no memory.

    Raises:
        SnapshotRefused: a tensor is missing, superfluous, or not what the spec says.
    """
    ops, tp = _Counting(), snapshot.manifest.tp
    for rank in range(tp):
        load(snapshot, cast(Ops, ops), tp, rank)
    return ops.tensors


def compute(snapshot: Snapshot) -> Values:
    """One float32 forward of the canary prompt on the reference backend, a layer at a time.

    Raises:
        FgsnapError: some position has no finite logits.
    """
    spec, tokens = snapshot.manifest.spec, prompt(snapshot)
    ops, _ = choose("reference", "cpu", features(spec), "float32")
    weights = load_by_layer(snapshot, ops)
    decoder = _decoder(spec, weights, ops, 1, len(tokens), "float32")
    logits = decoder.forward(_batch(decoder, tokens))
    broken = [position for position, picked in enumerate(_greedy(decoder, logits, tokens)) if picked < 0]
    if broken:
        raise FgsnapError(
            "The model gives no finite logits.",
            f"The float32 reference saw NaN or infinities at canary position {broken[0]} of {len(tokens)}.",
            "Check that the checkpoint itself is sound.",
        )
    pairs = ops.top_two(logits)
    return Values(tokens, [token for token, _ in pairs], [margin for _, margin in pairs])


def check(decoder: Decoder, canary: Expected, tolerance: float) -> Match:
    """Prefill the canary prompt into the cache's first blocks and compare; call it while no request is running.

    A position whose margin is at most ``tolerance`` need not agree, but every position must have finite logits. Of a
    prompt longer than the whole cache the beginning is checked: what comes later does not change it. Tensor parallel
    ranks have the rotations of the deployment alone: where these are others than compute's, no position need agree.
    """
    if not _rotates_as_computed(decoder):
        if decoder.tp > 1:
            tolerance = math.inf
        else:
            decoder = _as_computed(decoder)
    tokens = canary.tokens[: decoder.blocks * decoder.block_size]
    picked = _greedy(decoder, decoder.forward(_batch(decoder, tokens)), tokens)
    sure = [position for position in range(len(tokens)) if canary.margins[position] > tolerance]
    broken = {position for position, token in enumerate(picked) if token < 0}
    wrong = broken | {position for position in sure if picked[position] != canary.next[position]}
    return Match(not wrong, len(sure), tuple(sorted(wrong)))


def _rotates_as_computed(decoder: Decoder) -> bool:
    """Whether the decoder has the rotations of the model's own length, by which compute went."""
    spec, length = decoder.spec, decoder.max_length
    return all(rope_frequencies(rope, length) == rope_frequencies(rope, spec.max_length) for rope in spec.ropes)


def _as_computed(decoder: Decoder) -> Decoder:
    """A decoder over the same weights with the rotations of the model's own length."""
    spec = decoder.spec
    blocks = min(decoder.blocks, MOST_TOKENS)
    return _decoder(spec, decoder.weights, decoder.ops, blocks, decoder.block_size, decoder.dtype)


def _decoder(spec: DecoderSpec, weights: Weights, ops: Ops, blocks: int, block_size: int, dtype: str) -> Decoder:
    length = spec.max_length
    return Decoder(spec, weights, ops, blocks=blocks, block_size=block_size, max_length=length, dtype=dtype)


def _greedy(decoder: Decoder, logits: object, tokens: Sequence[int]) -> list[int]:
    return decoder.sample(logits, [Sampling()] * len(tokens), range(len(tokens))).tokens


def _batch(decoder: Decoder, tokens: Sequence[int]) -> Batch:
    count = len(tokens)
    blocks = range(-(-count // decoder.block_size))
    return Batch(tokens, range(count), (0, count), (count,), (blocks,), range(count))


def main(arguments: Sequence[str]) -> int:
    """Print the canary of a directory, or what was bound; errors as three lines and their exit code."""
    try:
        directories = [argument for argument in arguments if argument != BIND_ONLY]
        if len(directories) != 1:
            raise UsageError("One directory is needed.", "", f"Run: python -m fgsnap.runtime.canary [{BIND_ONLY}] DIR")
        snapshot = open_snapshot(Path(directories[0]), committed=False)
        result = {"tensors": bind(snapshot)} if BIND_ONLY in arguments else compute(snapshot)
        print(msgspec.json.encode(result).decode())
    except FgsnapError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
