"""The interface between the decoder and a kernel backend.

Each backend has its own tensor type; outside ``kernels`` a tensor is opaque. Letters in shapes: T tokens of the step
over all sequences, S sequences, H width, N query heads, K key-value heads, D head dim, V vocabulary rows, R rows of
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

Tensor = Any  # a backend's own tensor; only that backend looks inside


class Batch(NamedTuple):
    """One ragged forward: prompt chunks and decodes of several sequences, packed without padding.

    Attributes:
        tokens: [T] token ids, sequence after sequence.
        positions: [T] position of each token in its own sequence, from 0.
        starts: [S + 1] where each sequence's tokens begin in ``tokens``; starts[S] == T.
        lengths: [S] keys visible to the sequence's last token: tokens cached before this step plus those in it.
        block_tables: [S] each the KV block indices of the sequence, in order, enough for ``lengths``.
        rows: [R] indices into ``tokens`` whose logits are wanted, ascending.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    starts: Sequence[int]
    lengths: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    rows: Sequence[int]


class NormArgs(NamedTuple):
    """How ``Ops.norm`` normalises; the fields mean what spec.Norm says."""

    kind: Literal["rms", "ln", "l2"]
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    unit_offset: bool = False
    float32_weight: bool = False


class AttentionArgs(NamedTuple):
    """The shape and mask of one layer's attention. ``scale`` multiplies q.k. ``window`` None: all earlier keys."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


class Sampling(NamedTuple):
    """How to pick one row's next token.

    temperature 0 is greedy (ties: lowest id). Otherwise logits are divided by the temperature; ``top_k`` (0: off) keeps
    the k largest (ties: lowest ids); ``top_p`` (1.0: off) then keeps the shortest prefix, in descending order (ties:
    lowest id first), whose probability reaches top_p of what is left; and the token is the first, in ascending id order
    among those kept, at which the running sum of probabilities exceeds ``uniform`` times their total. All in float64.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0
    logprobs: int = -1
    """-1: none; 0: of the picked token; n: also of the n most likely. Of the unscaled, unfiltered logits."""


class Sampled(NamedTuple):
    """One picked token. ``logprob`` and the entry for the same token in ``top`` are the same number."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Ops(Protocol):
    """What a backend implements. Unless said otherwise results are new tensors in the backend's activation dtype."""

    name: str
    device: str
    supports: frozenset[str]
    """Names of the spec features (spec.features) that this backend computes."""

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
        """A read-only tensor over mapped bytes: no copy on CPU, one upload elsewhere. Keeps ``data`` alive.

        dtype is "float32", "bfloat16" or "float16". ``len(data)`` must be exactly the shape's bytes.
        """
        ...

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> Tensor:
        """A rotation table: angle = float32(position) * float32(inverse frequency); cos and sin times ``factor``."""
        ...

    def kv_cache(self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> Sequence[Tensor]:
        """One cache a layer, uninitialised memory of ``blocks`` x ``block_size`` tokens of K and V."""
        ...

    def kv_token_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Bytes that one token takes in one layer's cache, padding included."""
        ...

    def plan(self, batch: Batch, block_size: int) -> Tensor:
        """Everything the ops of one step need to know of ``batch``, uploaded once."""
        ...

    def embed(self, plan: Tensor, table: Tensor, scale: float) -> Tensor:
        """Rows of ``table`` [V, H] for the batch's tokens, times ``scale``: [T, H]."""
        ...

    def norm(self, x: Tensor, args: NormArgs) -> Tensor:
        """Normalise the last axis of x [T, H] in float32."""
        ...

    def add(self, x: Tensor, branch: Tensor, multiplier: float = 1.0) -> Tensor:
        """x + multiplier * branch, both [T, H]. May reuse x's memory: the caller gives x up."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, I] @ weight [O, I]^T + bias [O]: [T, O]. The weight may be of another dtype than x."""
        ...

    def append(self, qkv: Tensor, cache: Tensor, plan: Tensor, args: AttentionArgs, rope: Tensor | None) -> Tensor:
        """Rotate q and k of qkv [T, (N + 2K) D] at their positions, write k and v into the cache: q [T, N D].

        The rotation pairs dimension i with i + dims / 2 among the first dims = 2 * len(frequencies) of each head.
        """
        ...

    def attend(self, q: Tensor, cache: Tensor, plan: Tensor, args: AttentionArgs) -> Tensor:
        """Causal attention of q [T, N D] over the cached keys of each token's own sequence: [T, N D].

        Prompt chunks and decodes in one call; softmax in float32; query head n reads key head n * K / N.
        """
        ...

    def activate(self, x: Tensor, kind: str, gated: bool) -> Tensor:
        """act(x[:, :I]) * x[:, I:] for gated x [T, 2I], else act(x): [T, I]. kind as in spec.Activation."""
        ...

    def logits(
        self,
        x: Tensor,
        plan: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vocab_size: int,
        multiplier: float,
        softcap: float | None,
    ) -> Tensor:
        """float32 logits of the plan's rows of x [T, H]: [R, V]; weight rows from ``vocab_size`` on are left out."""
        ...

    def sample(self, logits: Tensor, how: Sequence[Sampling]) -> list[Sampled]:
        """One token a row of logits [R, V], as Sampling says. A row with NaN or no finite logit gives token -1."""
        ...

    def top_two(self, logits: Tensor) -> list[tuple[int, float]]:
        """For each row the most likely token (ties: lowest id) and its logit's margin over the second."""
        ...

    def floats(self, x: Tensor) -> memoryview:
        """The tensor's values on the host as a flat view of format "f"; for tests and checks."""
        ...
