"""One live request: its tokens, and how much of them is in which blocks of the KV cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fgsnap.kernels.ops import Edits, Sampling
from fgsnap.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from fgsnap.runtime.constraint import Matcher

# Below this a temperature only overflows the softmax; the limit it approaches is greedy.
COLDEST = 1e-5


class Sequence:
    """A live request.

    Attributes:
        tokens: the prompt, then the generated tokens.
        prompt_length: how many of ``tokens`` are the prompt.
        cached: how many of ``tokens`` have been forwarded; not kept while it generates (see roster).
        table: its KV blocks, in order.
        promised: blocks that it may still draw.
        digests: of the blocks that are full of its tokens, as far as they are known.
        order: what goes first among those that wait; the lowest.
        how: how its tokens are picked.
        enders: tokens that end it.
        row: its place in the roster, or -1.
        forwarded: how many of its tokens were ever cached, so that none is counted twice.
        matcher: tells which tokens its constraint allows next.
        state: "new" before it is scheduled for the first time, "waiting", "running" or "gone".
    """

    __slots__ = (
        "cached", "deadline", "digests", "enders", "forwarded", "how", "id", "matcher", "order", "params",
        "promised", "prompt_length", "request", "root", "row", "state", "table", "tokens",
    )  # fmt: skip

    def __init__(
        self, request: Request, seed: int, eos: Collection[int], root: bytes, matcher: Matcher | None = None
    ) -> None:
        params = request.params
        self.request = request
        self.id = request.id
        self.params = params
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        # With a constraint eos also says that nothing else can come; where ignore_eos is set, it is allowed only then.
        heeds_eos = matcher is not None or not params.ignore_eos
        self.enders = frozenset(params.stop_token_ids) | (frozenset(eos) if heeds_eos else frozenset())
        self.matcher = matcher
        self.how = _sampling(params, seed, _edits(params, request.prompt, self.enders, matcher))
        self.cached = 0
        self.forwarded = 0
        self.table: list[int] = []
        self.promised = 0
        self.root = root
        self.digests: list[bytes] = []
        self.order: tuple[int, int, int] = (0, 0, 0)
        self.deadline = float("inf")
        self.row = -1
        self.state = "new"

    @property
    def longest(self) -> int:
        """The most tokens this sequence can ever have."""
        return self.prompt_length + self.params.max_tokens

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Known tokens that have not been forwarded."""
        return len(self.tokens) - self.cached

    def note(self, token: int) -> None:
        """Take ``token``, which was just added, into account for those that are picked after it."""
        edits = self.how.edits
        if edits is not None:
            if edits.penalizes:
                edits.count(token)
            if edits.banned and self.generated >= self.params.min_tokens:
                _unban(edits)
            if self.matcher is not None and token >= 0 and token not in self.enders:
                self.matcher.accept(token)

    def constrain(self) -> None:
        """Have the next token picked as its constraint says, once that is known."""
        matcher, edits = self.matcher, self.how.edits
        assert matcher is not None and edits is not None
        edits.allowed = matcher.mask()
        if matcher.complete and edits.banned:
            _unban(edits)


def _unban(edits: Edits) -> None:
    edits.banned = ()
    edits.version += 1


def _sampling(params: SamplingParams, seed: int, edits: Edits | None) -> Sampling:
    if params.temperature < COLDEST:
        return Sampling(logprobs=params.logprobs, edits=edits)
    return Sampling(params.temperature, params.top_k, params.top_p, params.min_p, seed, params.logprobs, edits)


def _edits(
    params: SamplingParams, prompt: Collection[int], enders: Collection[int], matcher: Matcher | None
) -> Edits | None:
    """What is done to its logits; None for most, which is quicker."""
    edits = Edits(
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        bias=dict(params.logit_bias),
        banned=sorted(enders) if params.min_tokens else (),
        prompt=sorted(set(prompt)) if params.repetition_penalty != 1.0 else (),
    )
    return edits if matcher is not None or edits.penalizes or edits.bias or edits.banned else None
