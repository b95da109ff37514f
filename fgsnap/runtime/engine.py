"""The engine: requests in, tokens out, one forward at a time.

``step()`` is the whole of serving in four words: schedule, forward, sample, commit. The engine knows the model only as
something that turns a ragged batch into logits, and logits into tokens; it touches no tensor and imports no tensor
library. It is not thread-safe: one thread submits, aborts and steps.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Protocol

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Sampled, Samples, Sampling
from fgsnap.runtime.badwords import bad_words
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.request import MOST_BAD_TOKENS, EngineStats, Output, Request, SamplingParams, Step, Token
from fgsnap.runtime.roster import NO_CHOICE, NO_TOKEN
from fgsnap.runtime.scheduler import Admission, Scheduler, Work
from fgsnap.runtime.sequence import Sequence

if TYPE_CHECKING:
    from fgsnap.runtime.constraint import Grammars, Matcher


class Model(Protocol):
    """What the engine needs of a decoder. ``blocks`` x ``block_size`` tokens is the size of its KV cache."""

    vocab_size: int
    max_length: int
    blocks: int
    block_size: int

    def forward(self, batch: Batch) -> Any:
        """Cache the batch's keys and values, and return the logits of its rows."""
        ...

    def sample(self, logits: Any, how: list[Sampling], positions: list[int]) -> Samples:
        """Pick one token a row of logits; -1 where a row has no finite logit."""
        ...


class Engine:
    """Runs any number of requests on one model, each with the tokens it would get alone.

    Args:
        model: the decoder.
        eos_token_ids: tokens that end a request, unless it ignores them.
        token_budget: most tokens in one forward.
        max_sequences: most requests running at once; never more than the budget, for each needs a token in every step.
        max_waiting: most requests waiting beside ``max_sequences`` that run; more are refused with status 429.
        admission: "reserve" all blocks that a request can ever need, or "optimistic": start more, and preempt.
        prefix_caching: share the blocks of equal beginnings.
        grammars: gives what makes grammars of constraints, when the first one is asked for; None: they are refused.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        model: Model,
        *,
        eos_token_ids: Collection[int] = (),
        token_budget: int = 512,
        max_sequences: int = 256,
        max_waiting: int = 4096,
        admission: Admission = "reserve",
        prefix_caching: bool = True,
        grammars: Callable[[], Grammars] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._pool = BlockPool(model.blocks, model.block_size, caching=prefix_caching)
        self._scheduler = Scheduler(self._pool, token_budget, min(max_sequences, token_budget), admission)
        self._roster = self._scheduler.roster
        self._max_live = min(max_sequences, token_budget) + max_waiting
        self._clock = clock
        self._live: dict[str, Sequence] = {}
        self._begin_grammars = grammars
        self._grammars: Grammars | None = None
        self._compiling: dict[Sequence, None] = {}  # not scheduled yet: their first mask is pending
        self._constrained: dict[Sequence, None] = {}  # the others with a constraint
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; who ended before is passed over
        self._deadlines_set = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._recomputed_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError if it is malformed or could never run, whatever else is running.

        One with a constraint is queued once that is compiled, and ends with an error if it cannot be.
        """
        self._check(request)
        seed = request.params.seed
        if seed is None:
            seed = int.from_bytes(os.urandom(8))
        sequence = Sequence(request, seed, self._eos, self._pool.root(request.cache_salt))
        sequence.matcher = self._matcher(request.params)
        if sequence.matcher is None:
            self._scheduler.add(sequence)
        else:
            self._compiling[sequence] = None
        self._live[request.id] = sequence  # last, so that what fails before leaves nothing behind
        if request.timeout is not None:
            self._end_by(sequence, self._clock() + request.timeout)

    def abort(self, request: str) -> None:
        """Drop a request, free its blocks and say no more about it. One that already ended is no error."""
        sequence = self._live.pop(request, None)
        if sequence is not None:
            self._remove(sequence)

    def close(self) -> None:
        """End the processes that constraints have begun."""
        if self._grammars is not None:
            self._grammars.close()

    def has_work(self) -> bool:
        """Whether ``step`` would run a forward, or find that who waits needs the blocks of those that are held."""
        return self._scheduler.has_work()

    def awaited(self) -> int | None:
        """A file descriptor that is readable when ``step`` may find that a constraint was compiled, or a mask has come.

        None: nobody waits for either.
        """
        waits = self._compiling or self._scheduler.held
        return self._grammars.fileno() if self._grammars is not None and waits else None

    def time_left(self) -> float | None:
        """Seconds until a deadline is over, for which ``step`` has to be called; None: there is none."""
        return max(self._deadlines[0][0] - self._clock(), 0.0) if self._deadlines else None

    def step(self) -> Step:
        """Run one forward and return what it produced, at most one token a request."""
        ends = self._expire() if self._deadlines else []
        if self._compiling or self._scheduler.held:
            ends += self._hear()
        work = self._scheduler.schedule()
        if work is None:
            return Step([], [], {}, ends)
        logits = self._model.forward(work.batch)
        if self._constrained:
            self._constrain(work)
        samples = self._model.sample(logits, work.how, work.positions) if work.how else NO_SAMPLES
        if NO_TOKEN in samples.tokens:
            samples = self._told_apart(samples, work, logits)
        step = self._commit(work, samples, ends)
        if self._constrained and self._grammars is not None:
            self._grammars.flush()
        return step

    def stats(self) -> EngineStats:
        """Gauges and counters as of now. Blocks promised to a running request count as taken."""
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._waiting,
            kv_blocks=self._pool.blocks,
            kv_blocks_free=self._pool.available,
            prompt_tokens=self._prompt_tokens + self._scheduler.cached_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._roster.step,
            cached_tokens=self._scheduler.cached_tokens,
            preemptions=self._scheduler.preemptions,
            recomputed_tokens=self._recomputed_tokens,
            waiting_tokens=self._scheduler.waiting_tokens + sum(one.longest for one in self._compiling),
        )

    @property
    def _waiting(self) -> int:
        return self._scheduler.waiting + len(self._compiling)

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.constraint is None:
            return None
        if self._begin_grammars is None:
            raise RequestError(
                "Answers cannot be constrained here.",
                "The engine was made without grammars.",
                param=params.constraint.field,
                status=501,
                code="not_supported",
            )
        self._grammars = self._grammars or self._begin_grammars()
        return self._grammars.matcher(params.constraint, open_end=params.ignore_eos)

    def _hear(self) -> list[Output]:
        """Schedule those whose constraint has been compiled, or whose mask has come; end those for which it cannot."""
        assert self._grammars is not None
        self._grammars.hear()
        self._grammars.flush()  # also where there was no room the last time, and no forward since
        ends = []
        for sequence in [*self._compiling, *self._scheduler.held]:
            matcher = sequence.matcher
            assert matcher is not None
            if matcher.error:
                ends.append(self._end(sequence, Output(sequence.id, (), "error", matcher.error, matcher.code)))
            elif matcher.pending:
                continue
            elif sequence in self._compiling:
                del self._compiling[sequence]
                self._constrained[sequence] = None
                self._scheduler.add(sequence)
            else:
                self._scheduler.resume(sequence)
        return ends

    def _told_apart(self, samples: Samples, work: Work, logits: Any) -> Samples:
        """The samples with NO_CHOICE in rows that would have a token, were it not for their requests' own edits."""
        if all(how.edits is None for how in work.how):
            return samples
        free = self._model.sample(logits, [Sampling()] * len(work.how), work.positions).tokens
        pairs = zip(samples.tokens, free, strict=True)
        tokens = [NO_CHOICE if token == NO_TOKEN and other != NO_TOKEN else token for token, other in pairs]
        return Samples(tokens, samples.logprobs)

    def _constrain(self, work: Work) -> None:
        """Have tokens picked as constraints say, waiting but a moment for what they say; see ``_unpicked``."""
        assert self._grammars is not None
        picked = [one for one in self._constrained if one.row >= 0]
        picked += [one for one in work.through if one.matcher is not None]
        self._grammars.wait([one.matcher for one in picked if one.matcher is not None], PATIENCE_SECONDS)
        for sequence in picked:
            sequence.constrain()

    def _commit(self, work: Work, samples: Samples, ends: list[Output]) -> Step:
        """Add the tokens to their texts, and take out whoever has ended."""
        samples, prompts = _parted(work, samples)
        if self._constrained:
            samples = self._unpicked(work, samples)
        roster, decodes, tokens = self._roster, work.decodes, samples.tokens
        requests = roster.ids.copy()
        cached: dict[str, int] = {}
        if work.slices:
            new, again = self._scheduler.advance(work)
            cached = {one.id: one.found for one, _ in work.slices if one.found and not one.remaining}
            self._prompt_tokens += new
            self._recomputed_tokens += again
            prompts = self._sound(prompts, ends)
            ends += self._only_computed(work)
        ended = [row for row in roster.append(tokens[:decodes]) if self._stops(roster.sequences[row], tokens[row])]
        stopped = [(row, roster.sequences[row]) for row in ended]
        for sequence in roster.due():
            if not self._stops(sequence, sequence.tokens[-1]):
                ends.append(self._end(sequence, Output(sequence.id, finish="length")))
        requests += [sequence.id for sequence in work.through]
        broken = [row for row, sequence in enumerate(work.through, decodes) if sequence.state == "gone"]
        stopped += self._first_tokens(work, tokens, ends)
        for row, sequence in stopped:
            if _late(sequence):
                sequence.tokens.pop()
                self._scheduler.hold(sequence)
            else:
                ends.append(self._stopped(sequence, samples.logprobs.get(row)))
        silent = [*broken, *(row for row, _ in stopped)]  # nobody gets their tokens
        self._generated_tokens += len(tokens) - len(silent)
        return _without(silent, requests, tokens, samples.logprobs, ends, prompts, cached)

    def _first_tokens(self, work: Work, tokens: list[int], ends: list[Output]) -> list[tuple[int, Sequence]]:
        """Have those whose prompt is through generate from now on; gives those whose first token has ended them."""
        stopped = []
        for row, sequence in enumerate(work.through, work.decodes):
            if sequence.state == "gone":  # another row of it was broken
                continue
            sequence.tokens.append(tokens[row])
            if self._stops(sequence, tokens[row]):
                stopped.append((row, sequence))
                continue
            sequence.note(tokens[row])
            if sequence.generated == sequence.params.max_tokens:
                ends.append(self._end(sequence, Output(sequence.id, finish="length")))
            else:
                self._roster.join(sequence)
        return stopped

    def _unpicked(self, work: Work, samples: Samples) -> Samples:
        """The samples without the tokens of those whose mask has not come. They forward their last token again."""
        late = {one.row for one in self._constrained if one.row >= 0 and _late(one)}
        late |= {row for row, one in enumerate(work.through, work.decodes) if _late(one)}
        if not late:
            return samples
        return samples._replace(tokens=[NO_TOKEN if row in late else one for row, one in enumerate(samples.tokens)])

    def _only_computed(self, work: Work) -> list[Output]:
        """End those that are through and want no answer."""
        through = [live for live, _ in work.slices if not live.params.max_tokens and not live.remaining]
        return [self._end(live, Output(live.id, finish="length")) for live in through if live.state == "running"]

    def _sound(self, prompts: list[Output], ends: list[Output]) -> list[Output]:
        """Those of ``prompts`` that have no error; whoever has one ends."""
        for output in prompts:
            if output.finish is not None:
                ends.append(self._end(self._live[output.request], output, spoiled=True))
        return [output for output in prompts if output.finish is None]

    def _stops(self, sequence: Sequence, token: int) -> bool:
        return token < 0 or token in sequence.enders

    def _stopped(self, sequence: Sequence, last: Sampled | None) -> Output:
        """End a sequence whose last token does not belong to it; ``last`` is that token, where it has a logprob."""
        token, matcher = sequence.tokens.pop(), sequence.matcher
        if token < 0 and matcher is not None and matcher.error:
            return self._end(sequence, Output(sequence.id, (), "error", matcher.error, matcher.code))
        if token == NO_TOKEN:
            return self._end(sequence, _not_finite(sequence), spoiled=True)
        if token == NO_CHOICE:
            return self._end(sequence, Output(sequence.id, (), "error", NOTHING_LEFT, "constraint"))
        ending = Token(token) if last is None else Token(*last)
        return self._end(sequence, Output(sequence.id, finish="stop", ending=ending))

    def _end(self, sequence: Sequence, output: Output, *, spoiled: bool = False) -> Output:
        del self._live[sequence.id]
        self._remove(sequence, spoiled=spoiled)
        return output

    def _remove(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        if sequence in self._compiling:
            del self._compiling[sequence]
            sequence.state = "gone"
        else:
            self._scheduler.remove(sequence, spoiled=spoiled)
        if sequence.matcher is not None:
            self._constrained.pop(sequence, None)
            sequence.matcher.close()

    def _end_by(self, sequence: Sequence, deadline: float) -> None:
        self._deadlines_set += 1
        heappush(self._deadlines, (deadline, self._deadlines_set, sequence))
        if len(self._deadlines) > 2 * len(self._live) + FEW_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[2].state != "gone"]
            heapify(self._deadlines)

    def _expire(self) -> list[Output]:
        """End everything whose time is over."""
        ends, now = [], self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heappop(self._deadlines)
            if sequence.state != "gone":
                why = f"its timeout of {sequence.request.timeout:g} s is over"
                ends.append(self._end(sequence, Output(sequence.id, (), "error", why, "deadline_exceeded")))
        return ends

    def _check(self, request: Request) -> None:
        if request.id in self._live:
            raise RequestError(f"A request with the id '{request.id}' is still running.", param="id")
        if len(self._live) >= self._max_live:
            waiting = self._waiting
            raise RequestError(
                "The queue is full.",
                f"{len(self._live) - waiting} choices run and {waiting} wait, together the most that may.",
                "Try again a little later.",
                status=429,
                code="overloaded",
            )
        _check_params(request)
        if not request.prompt:
            raise RequestError("The prompt is empty.", "A model continues at least one token.", param="prompt")
        vocab = self._model.vocab_size
        stray = _stray(request.prompt, vocab)
        if stray is not None:
            raise RequestError(f"The prompt holds token id {stray}.", f"The ids are 0 to {vocab - 1}.", param="prompt")
        for name, tokens in (
            ("logit_bias", [t for t, _ in request.params.logit_bias]),
            ("stop_token_ids", request.params.stop_token_ids),
            ("bad_words", bad_words(request.params.bad_words).tokens),
        ):
            stray = _stray(tokens, vocab)
            if stray is not None:
                raise RequestError(f"{name} names token id {stray}.", f"The ids are 0 to {vocab - 1}.", param=name)
        if request.params.allowed and len(request.params.allowed) != -(-vocab // 32) * 4:
            raise RequestError("The allowed tokens are of another vocabulary.", param="allowed_token_ids")
        self._check_size(len(request.prompt), request.params.max_tokens)

    def _check_size(self, prompt: int, max_tokens: int) -> None:
        total = prompt + max_tokens
        wanted = f"{prompt} prompt tokens + {max_tokens} max_tokens = {total} tokens"
        param = "prompt" if prompt >= self._model.max_length else "max_tokens"
        if total > self._model.max_length:
            raise RequestError(
                "The request is longer than the model's context.",
                f"{wanted}, but the context is {self._model.max_length} tokens.",
                "Shorten the prompt or lower max_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        blocks = self._pool.needed(total)
        if blocks > self._pool.blocks:
            raise RequestError(
                "The request does not fit the KV cache, even alone.",
                f"{wanted} = {blocks} blocks of {self._pool.block_size}, but the cache has {self._pool.blocks}.",
                "Shorten the prompt, lower max_tokens, or have a larger KV cache (--kv-memory, in Python kv_memory).",
                param=param,
                code="kv_cache_exceeded",
            )


def _without(
    silent: list[int],
    requests: list[str],
    tokens: list[int],
    logprobs: dict[int, Sampled],
    ends: list[Output],
    prompts: list[Output],
    cached: dict[str, int],
) -> Step:
    """The step without the rows whose token nobody gets."""
    if not silent:
        return Step(requests, tokens, {row: Token(*one) for row, one in logprobs.items()}, ends, prompts, cached)
    gone = {*silent}
    left = [row for row in range(len(tokens)) if row not in gone]
    return Step(
        [requests[row] for row in left],
        [tokens[row] for row in left],
        {place: Token(*logprobs[row]) for place, row in enumerate(left) if row in logprobs},
        ends,
        prompts,
        cached,
    )


def _parted(work: Work, samples: Samples) -> tuple[Samples, list[Output]]:
    """The samples without the rows of prompts' tokens, and what these tell."""
    if not work.scored:
        return samples, []
    told, outputs = set[int](), []
    for sequence, first, positions in work.scored:
        rows = range(first, first + len(positions))
        told.update(rows)
        sound = all(row in samples.logprobs for row in rows)
        tokens = tuple(Token(*samples.logprobs[row]) for row in rows) if sound else ()
        outputs.append(Output(sequence.id, prompt=tokens) if sound else _not_finite(sequence))
    left = [row for row in range(len(samples.tokens)) if row not in told]
    logprobs = {place: samples.logprobs[row] for place, row in enumerate(left) if row in samples.logprobs}
    return Samples([samples.tokens[row] for row in left], logprobs), outputs


def _not_finite(sequence: Sequence) -> Output:
    return Output(sequence.id, (), "error", "the model gave no finite logit for this request", "not_finite")


def _late(sequence: Sequence) -> bool:
    return sequence.matcher is not None and sequence.matcher.pending


PATIENCE_SECONDS = 0.005
"""A step waits so long, in all, for masks that have not come when its logits have. Who is later is held meanwhile."""

NO_SAMPLES = Samples([], {})

NOTHING_LEFT = "the options of the request together leave no token to go on with"

FEW_DEADLINES = 64
"""So many deadlines of requests that have ended may be kept whatever is live."""

MOST = 1 << 32
"""A count beyond everything, which backends can still take."""

MOST_BIASES = 1024
"""Entries of one logit_bias."""


def _stray(tokens: Collection[int], vocab: int) -> int | None:
    """A token that is none of the vocabulary."""
    return next((token for token in tokens if not 0 <= token < vocab), None)


def _check_params(request: Request) -> None:
    params = request.params
    biases = [bias for _, bias in params.logit_bias]
    bad = sum(map(len, params.bad_words))
    rules = (
        ("max_tokens", params.max_tokens, params.max_tokens >= 0, "0 or more"),
        ("temperature", params.temperature, 0 <= params.temperature < math.inf, "a number from 0 up"),
        ("top_k", params.top_k, 0 <= params.top_k < MOST, "0 (off) or more"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", params.repetition_penalty, 0 < params.repetition_penalty < math.inf, "above 0"),
        ("presence_penalty", params.presence_penalty, math.isfinite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", params.frequency_penalty, math.isfinite(params.frequency_penalty), "a finite number"),
        ("logit_bias", f"of {len(biases)} tokens", len(biases) <= MOST_BIASES, f"of at most {MOST_BIASES}"),
        ("logit_bias", biases, all(map(math.isfinite, biases)), "of finite numbers"),
        ("bad_words", params.bad_words, all(params.bad_words), "of at least one token each"),
        ("bad_words", f"of {bad} tokens", bad <= MOST_BAD_TOKENS, f"of at most {MOST_BAD_TOKENS} in all"),
        ("min_tokens", params.min_tokens, 0 <= params.min_tokens <= params.max_tokens, "from 0 to max_tokens"),
        ("logprobs", params.logprobs, -1 <= params.logprobs < MOST, "-1 (none) or more"),
        ("prompt_logprobs", params.prompt_logprobs, -1 <= params.prompt_logprobs < MOST, "-1 (none) or more"),
        ("timeout", request.timeout, request.timeout is None or 0 < request.timeout < math.inf, "seconds above 0"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise RequestError(f"{name} is {value}.", f"It must be {rule}.", param=name)
