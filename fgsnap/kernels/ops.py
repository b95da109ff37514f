"""The interface between the decoder and a kernel backend.

Each backend has its own tensor type; outside ``kernels`` a tensor is opaque. Letters in shapes: T tokens of the step
over all sequences, S sequences, H width, N query heads, K key-value heads, D head dim, E value dim (D unless said
otherwise), V vocabulary rows, R rows of logits, X experts, I inner width.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Tensor = Any  # a backend's own tensor; only that backend looks inside


class BlockTable(array):  # type: ignore[type-arg]  # at run time it takes none
    """The KV blocks of one sequence, in order. ``at`` is where they lie in memory, until the table grows again."""

    __slots__ = ("at",)
    at: int

    def __new__(cls, blocks: Iterable[int] = ()) -> BlockTable:
        table: BlockTable = super().__new__(cls, "i", blocks)  # type: ignore[assignment]
        table.at = table.buffer_info()[0]
        return table

    def append(self, block: int) -> None:
        super().append(block)
        self.at = self.buffer_info()[0]


class Batch(NamedTuple):
    """One ragged forward: prompt chunks and decodes of several sequences, packed without padding.

    Attributes:
        tokens: [T] token ids, sequence after sequence.
        positions: [T] position of each token in its own sequence, from 0.
        starts: [S + 1] where each sequence's tokens begin in ``tokens``; starts[S] == T.
        lengths: [S] keys visible to the sequence's last token: tokens cached before this step plus those in it.
        block_tables: [S] each the KV block indices of the sequence, in order, enough for ``lengths``; at least cost as
            BlockTables.
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


class QkNormArgs(NamedTuple):
    """Norms of every query head and every key head, [D] weights each; before the rotation or after it."""

    query: NormArgs
    key: NormArgs
    after_rope: bool = False


class AlibiArgs(NamedTuple):
    """Biases of Press et al. (arXiv:2108.12409): slope x key position, added to the scaled scores.

    The bias is ``scale`` times the product. With ``bfloat16`` the position, and then the product, is first rounded to
    it: so did some authors. Slopes are multiplied as they are given.
    """

    slopes: Tensor  # [N] float32
    scale: float = 1.0
    bfloat16: bool = False


class TemperatureArgs(NamedTuple):
    """What multiplies a query by its position p; see spec.QueryTemperature."""

    kind: Literal["logn", "step"]
    base: int
    scale: float = 0.0


class AttentionArgs(NamedTuple):
    """The shape and mask of one layer's attention.

    Query head n reads key head n * K // N. A score is scale * q.k; then softcap * tanh(score / softcap); then the ALiBi
    bias is added. ``window`` w: a query at position p sees the keys from p - w + 1 on. ``chunk`` c: those of p's own
    multiple of c. None: all earlier ones. ``sinks``: a logit a head that joins the softmax's denominator, without a
    value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: AlibiArgs | None = None
    sinks: Tensor | None = None  # [N]
    qk_norm: QkNormArgs | None = None
    temperature: TemperatureArgs | None = None


class LatentArgs(NamedTuple):
    """Multi-head latent attention (arXiv:2405.04434) of N heads, in the absorbed form.

    The cache holds, for each token and once for all heads, its normed latent [kv_rank] and one rotated key [rope_dim].
    A query head is q_nope [nope_dim] and q_rope [rope_dim]; its score with a key is scale times
    (up_keys[n] q_nope) . latent + q_rope . key; its output is up_values[n] times the softmax's mean of the latents.
    """

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    scale: float
    norm: NormArgs
    up_keys: Tensor  # [N, kv_rank, nope_dim]
    up_values: Tensor  # [N, value_dim, kv_rank]


class HeadArgs(NamedTuple):
    """How hidden states become logits: softcap * tanh(multiplier * (x @ weight^T + bias) / softcap).

    Rows of the weight [V, H] and the bias [V] from ``vocab_size`` on are padding and left out.
    """

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    multiplier: float = 1.0
    softcap: float | None = None


class RouterArgs(NamedTuple):
    """How a token picks ``top_k`` of X experts, and what their outputs are multiplied by.

    scores = softmax or sigmoid of the logits x @ weight^T + bias, in float32. Without ``select_first`` the k experts
    of the largest score + selection_bias are taken (ties: lowest id) and weigh their scores; with it, those of the
    largest logits, and the score function is applied to those k logits alone. ``groups`` splits the experts into equal
    neighbours, of which the ``kept_groups`` best are eligible: best by their largest, or by the sum of their two
    largest, score + selection_bias. ``renormalize`` divides the k weights by their sum; ``scale`` multiplies them.
    """

    weight: Tensor  # [X, H]
    bias: Tensor | None  # [X]
    selection_bias: Tensor | None  # [X]
    score: Literal["softmax", "sigmoid"]
    top_k: int
    select_first: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_rank: Literal["max", "top2_sum"] = "max"
    renormalize: bool = False
    scale: float = 1.0


class ActivationArgs(NamedTuple):
    """An activation; kind and clamp as in spec.Mlp. Gated: act(x[:, :I]) * x[:, I:], else act(x)."""

    kind: str
    gated: bool = True
    clamp: float | None = None


class ExpertsArgs(NamedTuple):
    """X equal MLPs: down[e] @ act(gate_up[e] @ x + gate_up_bias[e]) + down_bias[e].

    ``weigh_input`` multiplies an expert's input by its weight instead of its output.
    """

    gate_up: Tensor  # [X, 2I or I, H]
    gate_up_bias: Tensor | None  # [X, 2I or I]
    down: Tensor  # [X, H, I]
    down_bias: Tensor | None  # [X, H]
    activation: ActivationArgs
    weigh_input: bool = False


class Edits:
    """What is done to one row's logits before a token is picked, in this order; it changes as its answer grows.

    Tokens and numbers lie in arrays, which backends read where they are.

    1. Tokens whose bit in ``allowed`` is 0 become -inf (bit t % 32 of the little-endian 32-bit word t // 32), and so
       do those of ``banned``.
    2. ``bias[t]`` is added to the logit of t.
    3. A token that ``counts`` or ``prompt`` has: its logit is divided by ``repetition`` if above 0, else multiplied.
    4. A token that ``counts`` has n of, n > 0: ``presence`` + n * ``frequency`` is subtracted from its logit.

    Attributes:
        counted, numbers: the different tokens of the answer so far, as they came, and how many of each.
        biased, biases: the tokens of ``bias``, and what is added to each.
        prompt: the different tokens of the prompt, where ``repetition`` is not 1.
        version: goes up with every change of ``counts`` and ``banned``, so that a backend may keep what it made of
            them. ``allowed`` may change at any time.
    """

    __slots__ = (
        "_places", "allowed", "banned", "biased", "biases", "counted", "frequency", "numbers", "presence", "prompt",
        "repetition", "version",
    )  # fmt: skip

    def __init__(
        self,
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Mapping[int, float] | None = None,
        banned: Sequence[int] = (),
        prompt: Sequence[int] = (),
        allowed: memoryview | None = None,
    ) -> None:
        self.repetition = repetition
        self.presence = presence
        self.frequency = frequency
        self.biased = array("i", bias or ())
        self.biases = array("d", bias.values() if bias else ())
        self.banned = tuple(banned)
        self.prompt = array("i", prompt)
        self.allowed = allowed
        self.counted = array("i")
        self.numbers = array("i")
        self._places: dict[int, int] = {}
        self.version = 0

    @property
    def bias(self) -> dict[int, float]:
        """What is added to a token's logit."""
        return dict(zip(self.biased, self.biases, strict=True))

    @property
    def counts(self) -> dict[int, int]:
        """How many of each token the answer has so far."""
        return dict(zip(self.counted, self.numbers, strict=True))

    @property
    def penalizes(self) -> bool:
        """Whether ``counts`` matters."""
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    def count(self, token: int) -> None:
        """Take note of one more token of the answer."""
        place = self._places.setdefault(token, len(self.counted))
        if place == len(self.counted):
            self.counted.append(token)
            self.numbers.append(0)
        self.numbers[place] += 1
        self.version += 1


class Sampling(NamedTuple):
    """How to pick one row's tokens, the same for a request's whole life; what changes with its answer is in ``edits``.

    temperature 0 is greedy (ties: lowest id). Otherwise logits are divided by the temperature; ``top_k`` (0: off) keeps
    the k largest (ties: lowest ids); ``top_p`` (1.0: off) then keeps the shortest prefix, in descending order (ties:
    lowest id first), whose probability reaches top_p of what is left; ``min_p`` (0.0: off) then drops those whose
    probability is below min_p times the largest one; and the token is the first, in ascending id order among those
    kept, at which the running sum of probabilities exceeds u times their total. u is philox.uniform(seed, position) of
    the token's position in its sequence, so it depends on nothing else. All in float64.

    ``target`` 0 or more is the token itself, rather than picking one: for logprobs, which it needs, of a known text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int = -1
    """-1: none; 0: of the picked token; n: also of the n most likely. Of the logits as the model gave them."""
    edits: Edits | None = None
    target: int = -1


class Sampled(NamedTuple):
    """One picked token. ``logprob`` and the entry for the same token in ``top`` are the same number."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Samples(NamedTuple):
    """One token for each row, -1 where there is none, and logprobs by row for those that asked."""

    tokens: list[int]
    logprobs: dict[int, Sampled]


class Ops(Protocol):
    """What a backend implements.

    Unless said otherwise results are new tensors of the backend's choice of dtype. A tensor that is given to ``add``,
    ``activate``, ``gate`` or ``norm_heads`` is given up: the backend may write the result into its memory.

    Under tensor parallelism every rank has its own backend; only ``all_reduce``, ``gather``, ``score`` and
    ``norm_heads`` talk to the others, and every rank must come to them in the same order.
    """

    name: str
    device: str
    setting: str
    """What it computes with, for display: instruction set or library, and threads."""
    supports: frozenset[str]
    """Names of the spec features (spec.features) that this backend computes."""

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int], layout: str = "row") -> Tensor:
        """A read-only tensor over mapped bytes: no copy on CPU, one upload elsewhere. Keeps ``data`` alive.

        dtype is "float32", "bfloat16" or "float16". ``len(data)`` must be exactly the bytes that the shape takes in
        the layout: "row" is row-major; "words32" cuts a matrix into panels of 32 rows, the last one filled up with
        zeros, and each row into words of 4 bytes, and stores panel after panel, word after word the panel's 32 rows.
        """
        ...

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> Tensor:
        """A rotation table: angle = float32(position) * float32(inverse frequency); cos and sin times ``factor``."""
        ...

    def kv_cache(self, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> Tensor:
        """One layer's cache, uninitialised memory of ``blocks`` x ``block_size`` tokens of K and V."""
        ...

    def kv_block_bytes(self, block_size: int, kv_heads: int, head_dim: int) -> int:
        """Bytes that one KV block takes in one layer's cache, padding included."""
        ...

    def latent_cache(self, blocks: int, block_size: int, args: LatentArgs) -> Tensor:
        """One layer's cache for latent attention."""
        ...

    def latent_block_bytes(self, block_size: int, args: LatentArgs) -> int:
        """Bytes that one KV block takes in one layer's latent cache, padding included."""
        ...

    def plan(self, batch: Batch, block_size: int) -> Tensor:
        """Everything the ops of one step need to know of ``batch``, uploaded once."""
        ...

    def taped(self, forward: Callable[[Tensor], Tensor], block_size: int) -> Callable[[Batch], Tensor]:
        """``forward(plan)``, which ends in ``logits``, as a function of a batch.

        A backend may call it once, record the ops that it calls and replay them for every batch after: so it must do
        nothing but call ops, the same ones whatever the plan.
        """
        ...

    def embed(self, plan: Tensor, table: Tensor, scale: float, first: int = 0) -> Tensor:
        """Rows of ``table`` [V, H] for the batch's tokens, times ``scale``: [T, H].

        ``first`` is the token id of the table's first row. A token outside the table gives a row of zeros, for
        all_reduce to sum.
        """
        ...

    def positions(self, plan: Tensor, table: Tensor, offset: int) -> Tensor:
        """Row position + ``offset`` of ``table`` [P, H] for each of the batch's tokens: [T, H]."""
        ...

    def norm(self, x: Tensor, args: NormArgs) -> Tensor:
        """Normalise the last axis of x [T, H] in float32."""
        ...

    def norm_heads(self, qkv: Tensor, args: AttentionArgs, query: NormArgs, key: NormArgs, heads: int) -> Tensor:
        """Normalise all queries [N D] and all keys [K D] of qkv [T, (N + 2K) D], each as one vector over all ranks.

        ``heads`` is how many query heads all ranks have together, those of zeros not counted.
        """
        ...

    def add(self, x: Tensor, branch: Tensor, multiplier: float = 1.0) -> Tensor:
        """x + multiplier * branch, both [T, H]."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, I] @ weight [O, I]^T + bias [O]: [T, O]. The weight may be of another dtype than x."""
        ...

    def append(self, qkv: Tensor, cache: Tensor, plan: Tensor, args: AttentionArgs, rope: Tensor | None) -> Tensor:
        """Norm and rotate q and k of qkv [T, (N + 2K) D] as ``args`` says, write k and v into the cache: q [T, N D].

        The rotation pairs dimension i with i + dims / 2 among the first dims = 2 * len(frequencies) of each head.
        """
        ...

    def attend(self, q: Tensor, cache: Tensor, plan: Tensor, args: AttentionArgs) -> Tensor:
        """Causal attention of q [T, N D] over the cached keys of each token's own sequence: [T, N D].

        Prompt chunks and decodes in one call; softmax in float32.
        """
        ...

    def latent_append(
        self, q: Tensor, latent: Tensor, cache: Tensor, plan: Tensor, args: LatentArgs, rope: Tensor | None
    ) -> Tensor:
        """Norm the latents and rotate the keys of ``latent`` [T, kv_rank + rope_dim] into the cache.

        Returns the queries, q [T, N (nope_dim + rope_dim)] multiplied by up_keys and rotated:
        [T, N (kv_rank + rope_dim)].
        """
        ...

    def latent_attend(self, q: Tensor, cache: Tensor, plan: Tensor, args: LatentArgs) -> Tensor:
        """Causal attention of latent_append's queries over the cached latents: [T, N value_dim]."""
        ...

    def activate(self, x: Tensor, args: ActivationArgs) -> Tensor:
        """The activation of x [T, 2I] if gated, else of x [T, I]: [T, I]."""
        ...

    def gate(self, branch: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """branch [T, H] times sigmoid(x [T, H] @ weight [1, H]^T)."""
        ...

    def experts(self, x: Tensor, router: RouterArgs, args: ExpertsArgs) -> Tensor:
        """What each token's experts make of x [T, H], weighed and summed: [T, H]."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in rank order, the same bits on every rank."""
        ...

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """The ranks' logits [R, V / ranks] side by side: [R, vocab_size]."""
        ...

    def logits(self, x: Tensor, plan: Tensor, head: HeadArgs) -> Tensor:
        """float32 logits of the plan's rows of x [T, H]: [R, V]."""
        ...

    def score(
        self, x: Tensor, plan: Tensor, head: HeadArgs, vocab_size: int, targets: Sequence[int], top: int
    ) -> list[Sampled]:
        """For each of the plan's rows the logprob of its target token and of the ``top`` most likely.

        ``head`` is this rank's, and ``vocab_size`` that of all ranks together, as for ``gather``.

        Never holds more than a bounded piece of the [R, V] logits: for the logprobs of long prompts. A row with NaN or
        no finite logit gives token -1, as in ``sample``.
        """
        ...

    def sample(self, logits: Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
        """One token a row of logits [R, V], as Sampling says, for ``positions`` [R] of their sequences.

        A row with NaN or no finite logit, or none that its edits allow, gives token -1. ``logits`` stays as it is.
        """
        ...

    def top_two(self, logits: Tensor) -> list[tuple[int, float]]:
        """For each row the most likely token (ties: lowest id) and its logit's margin over the second."""
        ...

    def floats(self, x: Tensor) -> memoryview:
        """The tensor's values on the host as a flat view of format "f"; for tests and checks."""
        ...
