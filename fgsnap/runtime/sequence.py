"""One live request: its tokens, and how much of them is in which blocks of the KV cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fgsnap.kernels.ops import BlockTable, Edits, Sampling
from fgsnap.runtime.badwords import bad_words
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
        order: what goes first among those of its tenant that wait; the lowest.
        charged: tokens that its tenant has been charged for it; 0 before it starts for the first time.
        how: how its tokens are picked.
        enders: tokens that end it.
        row: its place in the roster, or -1.
        last_step: the step at which it has all its tokens, as long as it is in the roster.
        forwarded: how many of its tokens were ever cached, so that none is counted twice.
        found: how many the prefix cache had when it first started.
        scored: positions of the prompt before this one have told the logprob of the token after them.
        to_score: where that ends; 0 where prompt logprobs are not wanted.
        bad_words: tells which tokens would complete one of them after ``heard``, where it has any.
        matcher: tells which tokens its constraint allows next, where it has one; whoever makes it sets it.
        state: "new" before it is scheduled for the first time, "waiting", "running" or "gone".
    """

    __slots__ = (
        "bad_words", "cached", "charged", "digests", "enders", "forwarded", "found", "heard", "how", "id",
        "last_step", "matcher", "order", "params", "promised", "prompt_length", "request", "root", "row", "scored",
        "state", "table", "to_score", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, seed: int, eos: Collection[int], root: bytes) -> None:
        params = request.params
        self.request = request
        self.id = request.id
        self.params = params
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        # With a constraint eos also says that nothing else can come; where ignore_eos is set, it is allowed only then.
        heeds_eos = params.constraint is not None or not params.ignore_eos
        self.enders = frozenset(params.stop_token_ids) | (frozenset(eos) if heeds_eos else frozenset())
        self.matcher: Matcher | None = None
        self.bad_words = bad_words(params.bad_words) if params.bad_words else None
        self.heard = 0
        edits = _edits(params, request.prompt, self.enders)
        if edits is not None:
            edits.banned = self._banned()
        self.how = _sampling(params, seed, edits)
        self.cached = 0
        self.forwarded = 0
        self.found = 0
        self.scored = 0
        self.to_score = 0 if params.prompt_logprobs < 0 else self.prompt_length - 1
        self.table = BlockTable()
        self.promised = 0
        self.root = root
        self.digests: list[bytes] = []
        self.order: tuple[int, int] = (0, 0)
        self.charged = 0
        self.row = -1
        self.last_step = 0
        self.state = "new"

    @property
    def longest(self) -> int:
        """The most tokens this sequence can ever have."""
        return self.prompt_length + self.params.max_tokens

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def used(self) -> int:
        """Tokens of it that were ever computed, or found cached, each once."""
        return len(self.tokens) if self.generated else self.forwarded

    @property
    def remaining(self) -> int:
        """Known tokens that have not been forwarded."""
        return len(self.tokens) - self.cached

    def within(self, start: int, most: int, rows: int) -> int:
        """Of the ``most`` tokens from ``start`` those that ask for no more than ``rows`` prompt logprobs."""
        end = max(start, self.scored) + rows
        return most if end >= self.to_score else min(most, end - start)

    def unscored(self, start: int, end: int) -> range:
        """The positions among these that have still to tell the logprob of the token after them."""
        return range(max(start, self.scored), min(end, self.to_score))

    def scoring(self, positions: range) -> list[Sampling]:
        """What is asked of these positions."""
        count = self.params.prompt_logprobs
        return [Sampling(logprobs=count, target=self.tokens[position + 1]) for position in positions]

    def note(self, token: int) -> None:
        """Take ``token``, which was just added, into account for those that are picked after it; -1 is none."""
        edits = self.how.edits
        if edits is not None and token >= 0:
            if edits.penalizes:
                edits.count(token)
            if self._hears_others(token) or self.generated == self.params.min_tokens:
                _ban(edits, self._banned())
            if self.matcher is not None and token not in self.enders:
                self.matcher.accept(token)

    def _hears_others(self, token: int) -> bool:
        """Whether other bad words lack only one token after this one than did before it."""
        words = self.bad_words
        if words is None:
            return False
        before, self.heard = self.heard, words.after(self.heard, token)
        return words.saying[before] != words.saying[self.heard]

    def _banned(self) -> tuple[int, ...]:
        """What may not come next: the ends, as long as there are too few tokens, and what completes a bad word."""
        bad = () if self.bad_words is None else self.bad_words.banned(self.heard)
        return (*sorted(self.enders), *bad) if self.generated < self.params.min_tokens else bad

    def constrain(self) -> None:
        """Have the next token picked as its constraint says, if that is known."""
        matcher, edits = self.matcher, self.how.edits
        assert matcher is not None and edits is not None
        if matcher.pending:
            return
        edits.allowed = matcher.mask()
        if matcher.complete:
            _ban(edits, ())


def _ban(edits: Edits, banned: tuple[int, ...]) -> None:
    if banned != edits.banned:
        edits.banned = banned
        edits.version += 1


def _sampling(params: SamplingParams, seed: int, edits: Edits | None) -> Sampling:
    if params.temperature < COLDEST:
        return Sampling(logprobs=params.logprobs, edits=edits)
    return Sampling(params.temperature, params.top_k, params.top_p, params.min_p, seed, params.logprobs, edits)


def _edits(params: SamplingParams, prompt: Collection[int], enders: Collection[int]) -> Edits | None:
    """What is done to its logits; None for most, which is quicker."""
    edits = Edits(
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        bias=dict(params.logit_bias),
        prompt=sorted(set(prompt)) if params.repetition_penalty != 1.0 else (),
        allowed=memoryview(params.allowed) if params.allowed else None,
    )
    bans = params.bad_words or (params.min_tokens and enders)
    asked = params.constraint is not None or params.allowed or bans
    return edits if asked or edits.penalizes or edits.bias else None
