"""The Python API: a snapshot as a callable, batched and streaming, without a server. ``fgsnap.load`` makes one.

Names, options, defaults and results are those of DeepSpeed-MII's ``mii.pipeline``, and more of them.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import functools
import gc
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, Self, TypedDict, Unpack, cast

import msgspec

from fgsnap.errors import FgsnapError, RequestError, UsageError
from fgsnap.runtime.budget import settled_budget
from fgsnap.runtime.counting import tokens_beyond
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.protocol import (
    Bias,
    Choices,
    Count,
    Penalty,
    StopText,
    TokenId,
    TopLogprobs,
    conversation,
    token_ids,
    typed,
)
from fgsnap.runtime.ranks import load_as_chosen
from fgsnap.runtime.request import Constraint, EngineStats, SamplingParams, Token, likelihood
from fgsnap.runtime.shared import Ask, Delta, SharedEngine, placed
from fgsnap.runtime.text import Text
from fgsnap.runtime.worker import begin_grammars, check_canary, engine_as_chosen
from fgsnap.snapshot import Snapshot, open_snapshot

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
"""A text to continue; a conversation, as messages with ``role`` and ``content``; or token ids."""

MAX_LENGTH = 1024  # of prompt and answer, as in MII, where a call says nothing of lengths
CONSTRAINING = ("json_schema", "regex", "choice", "grammar")
MAX_WAITING = 1 << 40  # a batch is as long as its caller makes it


class Options(TypedDict, total=False):
    """How the answers of one call are generated. What is left out, or None, has the default.

    Attributes:
        max_length: most tokens of prompt and answer together; default: the context, or MAX_LENGTH if that is less and
            ``max_new_tokens`` is left out too.
        max_new_tokens: most tokens of the answer; what does not fit into ``max_length`` is left off.
        min_new_tokens: an answer does not end by itself, nor by a stop token or text, before so many.
        ignore_eos: it does not end by itself at all.
        stop: texts that end an answer, and are no part of it.
        stop_token_ids: tokens that do.
        do_sample: False is greedy, and what follows up to ``seed`` has no effect then. Default: True.
        temperature: default 1; 0 is greedy.
        top_p, top_k, min_p: sample within this probability (default 0.9), among so many tokens (default 0: all), and
            among those at least so probable relative to the likeliest (default 0).
        seed: makes sampling repeatable, whatever else is in the batch; answer i of a prompt has ``seed + i``.
        repetition_penalty, presence_penalty, frequency_penalty: as OpenAI and Hugging Face have them; off are 1, 0, 0.
        logit_bias: what to add to the logits of tokens, by token id.
        logprobs: give log probabilities with the tokens, and those of so many of the likeliest ones beside.
        prompt_logprobs: the same of the prompt's tokens.
        json_schema, regex, choice, grammar: what an answer has to be, one of them: JSON by a schema (an object or its
            text), a match of an expression, one of these texts, or what a Lark grammar derives.
        n: answers of each prompt.
        best_of: make so many, and give the ``n`` whose tokens, with the one that ended each, are likeliest in the mean.
            They cannot be streamed.
        timeout: seconds after which a call fails that is not done, looked at after every step.
        priority: those of a lower one go first, among the answers that wait.
        cache_salt: beginnings of prompts are computed once only among calls with the same one.
        return_full_text: an answer's text begins with its prompt's.
    """

    max_length: Count | None
    max_new_tokens: Count | None
    min_new_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None
    ignore_eos: bool | None
    stop: StopText | Annotated[Sequence[StopText], msgspec.Meta(max_length=16)] | None
    stop_token_ids: Annotated[Sequence[TokenId], msgspec.Meta(max_length=64)] | None
    do_sample: bool | None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1000)] | None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    logit_bias: Annotated[Mapping[TokenId, Bias], msgspec.Meta(max_length=1024)] | None
    logprobs: TopLogprobs | None
    prompt_logprobs: TopLogprobs | None
    json_schema: Any
    regex: str | None
    choice: list[str] | None
    grammar: str | None
    n: Choices | None
    best_of: Choices | None
    timeout: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)] | None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None
    return_full_text: bool | None


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, or one piece of it. It prints as its text.

    Attributes:
        generated_text: the answer; of a piece, what is new. The pieces joined are the answer.
        prompt_length: tokens of the prompt.
        generated_length: tokens generated, those of a stop text too; of a piece, so far.
        finish_reason: "stop" (eos, or a stop text or token), "length", or of a piece that is not the last "none".
        index: which answer of the call this is.
        tokens: those generated, or new; ``logprob`` and ``top`` are filled where ``logprobs`` asked for them.
        prompt_tokens: where ``prompt_logprobs`` asked for them, those of the prompt; of a piece, the next of them. The
            first one has no log probability, for nothing comes before it.
    """

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: Literal["stop", "length", "none"]
    index: int = 0
    tokens: tuple[Token, ...] = ()
    prompt_tokens: tuple[Token, ...] = ()

    def __repr__(self) -> str:
        return self.generated_text

    __str__ = __repr__


Pieces = Generator[Response, None, None]
StreamingFn = Callable[[list[Response]], object]


class _Wanted(NamedTuple):
    """A call, checked.

    Attributes:
        asks: what to ask the engine.
        openings: what the text of each answer begins with.
        best: the caller gets the first number of each second number of answers; None: all.
    """

    asks: list[Ask]
    stop: tuple[str, ...]
    openings: list[str]
    best: tuple[int, int] | None


class Pipeline:
    """A snapshot that is open and has proved itself by its canary. ``fgsnap.load`` makes one.

    Any number of threads may use it: what they ask for at the same time runs as one batch, and each is given the tokens
    it would get alone. Nothing runs in the background; streams that are open move on when any call or stream is read.

    After Ctrl-C, an error of one call, or a stream that is left early, the pipeline goes on to work: what was
    begun is dropped and its memory free. A step that fails closes it.
    """

    is_rank_0 = True  # as in MII; under torchrun the other ranks never get a pipeline

    def __init__(self, snapshot: Snapshot, text: Text, engine: SharedEngine, max_length: int) -> None:
        self._snapshot = snapshot
        self._text = text
        self._engine = engine
        self._max_length = max_length

    @property
    def max_length(self) -> int:
        """The context: most tokens of a prompt and its answer."""
        return self._max_length

    @property
    def has_chat_template(self) -> bool:
        """Whether a prompt may be a conversation."""
        return self._text.has_chat_template

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        streaming_fn: StreamingFn | None = None,
        **options: Unpack[Options],
    ) -> list[Response]:
        """The answers to one prompt or several, in order, ``n`` of each. All of them run at once.

        Args:
            prompts: a prompt, or a sequence of them.
            streaming_fn: called after each step with the pieces that are new.
            options: see Options.

        Raises:
            RequestError: a prompt or an option is wrong; ``param`` names it, and nothing of this call goes on.
            FgsnapError: the model failed; nothing of this call goes on.
        """
        wanted = self._wanted(prompts, options)
        if streaming_fn is not None:
            _check_streamable(wanted)
        parts: list[list[Response]] = [[] for _ in wanted.asks]
        endings: dict[int, Token] = {}
        for pieces in self._pieces(wanted, endings):
            for piece in pieces:
                parts[piece.index].append(piece)
            if streaming_fn is not None:
                streaming_fn(pieces)
        answers = [_joined(pieces) for pieces in parts]
        return answers if wanted.best is None else _best(answers, endings, *wanted.best)

    def stream(self, prompts: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> Pieces:
        """The same answers piece by piece, as they come; ``index`` says which one a piece belongs to.

        Leaving the iterator early, or closing it, ends what is left of the answers.

        Raises:
            RequestError, FgsnapError: as a call does; what only the engine finds out comes with the first piece.
        """
        wanted = self._wanted(prompts, options)
        _check_streamable(wanted)
        return (piece for pieces in self._pieces(wanted, {}) for piece in pieces)

    def stats(self) -> EngineStats:
        """Gauges and counters of the engine as of now."""
        return self._engine.stats()

    def close(self) -> None:
        """Let go of weights, KV cache and other ranks. Streams that are open end with an error."""
        self._engine.close()
        gc.collect()  # a decoder is in a cycle with its own methods, and may hold most of the memory and other ranks
        self._snapshot.close()

    destroy = close  # its name in MII

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wanted(self, prompts: Prompt | Sequence[Prompt], options: Options) -> _Wanted:
        checked = _checked(options)
        constraint = _constraint(checked)
        best = _best_of(checked)
        asks: list[Ask] = []
        openings: list[str] = []
        batch, places = _batch(prompts)
        for prompt, place in zip(batch, places, strict=True):
            with placed(place):
                opening, ids = self._encoded(prompt, checked)
                params = _params(checked, _room(checked, len(ids), self._max_length), constraint)
            for choice in range(best[1] if best else checked.get("n") or 1):
                seed = None if params.seed is None else (params.seed + choice) % 2**64
                asks.append(_ask(checked, ids, msgspec.structs.replace(params, seed=seed), place))
                openings.append(opening)
        return _Wanted(asks, _stops(checked), openings, best)

    def _encoded(self, prompt: Prompt, options: Options) -> tuple[str, Sequence[int]]:
        """A prompt as text, where an answer begins with it, and as tokens. One that is far too long is not read."""
        told = options.get("return_full_text")
        if isinstance(prompt, str):
            return prompt if told else "", self._tokens(prompt, options)
        if _begins_with(int, prompt):
            _room(options, len(prompt), self._max_length)
            if _all_are(int, prompt):
                ids = token_ids(cast(Sequence[int], prompt), self._snapshot.manifest.spec.vocab_size)
                return self._text.decode(ids) if told else "", ids
        if isinstance(prompt, Sequence) and not prompt:
            raise RequestError("The prompt is empty.", "A model continues at least one token.", param="prompt")
        if not _begins_with(Mapping, prompt):
            raise RequestError(
                "The prompt is neither text, nor a conversation, nor token ids.",
                "A conversation is a list of messages, each with 'role' and 'content'.",
                param="prompt",
            )
        text = self._text.render_chat(conversation(cast(Sequence[Message], prompt)))
        # A template writes its own special tokens.
        return text if told else "", self._tokens(text, options, add_special_tokens=False)

    def _tokens(self, text: str, options: Options, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text; RequestError, without tokenizing it to its end, where they are far too many."""
        encode = functools.partial(self._text.encode, add_special_tokens=add_special_tokens)
        limit, _ = _limit(options, self._max_length)
        if least := tokens_beyond(text, limit - 1, self._text.least_tokens, encode):
            raise _too_long(f"at least {least}", options, self._max_length)
        return encode(text)

    def _pieces(self, wanted: _Wanted, endings: dict[int, Token]) -> Iterator[list[Response]]:
        """The pieces of each step. ``endings`` gets the tokens that end answers and are no part of them."""
        lengths = [0] * len(wanted.asks)
        openings = list(wanted.openings)
        firsts = [(Token(ask.prompt[0]),) if ask.params.prompt_logprobs >= 0 else () for ask in wanted.asks]

        def piece(delta: Delta) -> Response:
            if delta.ending is not None:
                endings[delta.answer] = delta.ending
            lengths[delta.answer] += len(delta.tokens)
            opening, openings[delta.answer] = openings[delta.answer], ""
            first, firsts[delta.answer] = firsts[delta.answer], ()
            return Response(
                generated_text=opening + delta.text,
                prompt_length=len(wanted.asks[delta.answer].prompt),
                generated_length=lengths[delta.answer],
                finish_reason=cast(Literal["stop", "length", "none"], delta.finish or "none"),
                index=delta.answer,
                tokens=delta.tokens,
                prompt_tokens=first + delta.prompt,
            )

        for deltas in self._engine.generate(wanted.asks, wanted.stop):
            yield [piece(delta) for delta in deltas]


def load(
    path: Path | str,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    tp: int | None = None,
    threads: int | None = None,
    kv_memory: int | None = None,
    max_model_len: int | None = None,
    max_batch_tokens: int | None = None,
    max_num_seqs: int | None = None,
    admission: Literal["reserve", "optimistic"] = "reserve",
    prefix_caching: bool = True,
) -> Pipeline:
    """Open a snapshot, check its canary, and give a pipeline that answers; close it, or use it in a ``with``.

    At a tensor parallel degree above 1 the other ranks are processes that are forked from this one. So call this
    early: before the program has threads, and with ``device="cuda"`` before torch has used a GPU. That torch is
    imported does no harm, but what it computes on the CPU starts threads. Under torchrun, this
    returns in rank 0 only, and ends the other processes (SystemExit) when rank 0 has closed its pipeline.

    Args:
        path: the snapshot's directory.
        backend: "native", "reference" (torch) or "auto", as the others: see ``fgsnap serve --help``.
        device: "cpu" or "cuda".
        dtype: of activations and KV cache: "bfloat16", "float16" or "float32".
        tp: tensor parallel degree; None: the snapshot's, or what this host has room for.
        threads: CPU threads of all ranks; None: those there are.
        kv_memory: bytes of the KV cache; None: 2 GiB, or half of what the weights leave.
        max_model_len: longest context in tokens; None: the model's.
        max_batch_tokens: token budget of one forward; None: what ``fgsnap bench budget`` measured here, else 128 on a
            CPU and 512 on a GPU, or twice ``max_num_seqs`` if that is given and more.
        max_num_seqs: most answers in one forward, each with a token of the budget; what a call asks for beyond waits
            its turn. None: 256.
        admission: "reserve" the KV cache that an answer may need before it begins, or be "optimistic", and preempt.
        prefix_caching: compute equal beginnings of prompts once.

    Raises:
        NotFound, SnapshotRefused: the snapshot cannot be opened, or does not compute what it should.
        UsageError: an option is wrong.
        HostError: this host lacks the memory, the device or a package.
    """
    chosen = {name: value for name, value in locals().items() if name != "path"}
    try:
        options = msgspec.convert({**chosen, "max_waiting": MAX_WAITING}, EngineOptions)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `$.")
        raise UsageError(f"{field.rstrip('`')}: {reason}.", "", "See help(fgsnap.load).") from None
    try:
        return opened(open_snapshot(path), options)
    except FgsnapError as error:
        error.why, error.next_step = _as_arguments(error.why), _as_arguments(error.next_step)
        raise


def _as_arguments(text: str) -> str:
    """What names flags of the command line, with the arguments of ``load`` in their place."""

    def named(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return name if name in EngineOptions.__struct_fields__ else flag[0]

    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", named, text)


def opened(snapshot: Snapshot, options: EngineOptions) -> Pipeline:
    """The pipeline of a snapshot, which it closes, also where this fails."""
    with ExitStack() as failing:
        failing.callback(snapshot.close)
        decoder = load_as_chosen(snapshot, options)  # before the tokenizer has threads: it may fork
        text = Text(snapshot)
        check_canary(decoder, snapshot)
        budget = settled_budget(options, snapshot.id, decoder)
        grammars = functools.partial(begin_grammars, str(snapshot.path))
        engine = engine_as_chosen(decoder, snapshot, options, budget.tokens, grammars)
        failing.pop_all()
        return Pipeline(snapshot, text, SharedEngine(engine, text), decoder.max_length)


def _checked(options: Options) -> Options:
    for name in options:
        if name not in Options.__annotations__:
            raise RequestError(
                f"There is no option {name!r}.", "", _hint(name, list(Options.__annotations__)), param=name
            )
    checked = typed(cast(Mapping[str, Any], options), Options)
    _check_unicode("stop", _stops(checked))
    _check_unicode("cache_salt", (checked.get("cache_salt") or "",))
    return checked


def _check_unicode(name: str, texts: Sequence[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode.", f"Character {error.start} is half of a surrogate pair.", param=name
        ) from None


def _hint(name: str, names: list[str]) -> str:
    if name == "stream":
        return "Call the pipeline's stream(), or give a streaming_fn."
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are {', '.join(names)}."


def _batch(prompts: Prompt | Sequence[Prompt]) -> tuple[Sequence[Prompt], list[str]]:
    """The prompts, and what to call each in an error; a single one needs no name."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestError("What is asked is neither a prompt nor a list of prompts.", param="prompts")
    if isinstance(prompts, str) or _begins_with(Mapping, prompts) or _begins_with(int, prompts):
        return [cast(Prompt, prompts)], [""]
    return cast(Sequence[Prompt], prompts), [f"prompts[{index}]" for index in range(len(prompts))]


def _begins_with(kind: type, items: object) -> bool:
    """Whether it is a list whose first item, of maybe very many, is of this kind."""
    listed = isinstance(items, Sequence) and not isinstance(items, bytes | bytearray) and len(items) > 0
    return listed and _all_are(kind, [cast(Sequence[object], items)[0]])


def _all_are(kind: type, items: object) -> bool:
    return isinstance(items, Sequence) and all(isinstance(i, kind) and not isinstance(i, bool) for i in items)


def _limit(options: Options, context: int) -> tuple[int, str]:
    """Most tokens of prompt and answer, and what says so."""
    asked = options.get("max_length") or (context if options.get("max_new_tokens") else MAX_LENGTH)
    return (asked, "max_length") if asked < context else (context, "the context")


def _room(options: Options, prompt: int, context: int) -> int:
    """Most tokens of the answer to a prompt of so many. RequestError where there is not one."""
    limit, _ = _limit(options, context)
    if prompt >= limit:
        raise _too_long(str(prompt), options, context)
    least, room = options.get("min_new_tokens") or 0, min(limit - prompt, options.get("max_new_tokens") or limit)
    if least > room:
        raise RequestError(
            f"min_new_tokens is {least}.", f"The answer has room for {room} tokens.", param="min_new_tokens"
        )
    return room


def _too_long(tokens: str, options: Options, context: int) -> RequestError:
    limit, name = _limit(options, context)
    return RequestError(
        f"The prompt does not fit {name}.",
        f"It has {tokens} tokens and {name} {limit}, of which the answer needs at least one.",
        f"Shorten the prompt, or raise {'max_length' if limit < context else 'max_model_len'} if it was lowered.",
        param="prompt",
        code="context_length_exceeded",
    )


def _best_of(options: Options) -> tuple[int, int] | None:
    """How many answers to give, and of how many that are made; None: of as many."""
    kept = options.get("n") or 1
    made = options.get("best_of") or kept
    if made < kept:
        raise RequestError(f"best_of is {made}.", f"It is less than n, which is {kept}.", param="best_of")
    return (kept, made) if made > kept else None


def _check_streamable(wanted: _Wanted) -> None:
    if wanted.best is not None:
        raise RequestError(
            "The answers cannot be streamed.", "With best_of the best are known when all have ended.", param="best_of"
        )


def _stops(options: Options) -> tuple[str, ...]:
    stop = options.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _ask(options: Options, prompt: Sequence[int], params: SamplingParams, place: str) -> Ask:
    return Ask(
        prompt,
        params,
        place,
        priority=options.get("priority") or 0,
        timeout=options.get("timeout"),
        cache_salt=options.get("cache_salt") or "",
    )


def _constraint(options: Options) -> Constraint | None:
    if options.keys().isdisjoint(CONSTRAINING):
        return None
    from fgsnap.runtime.constraining import constraint_of

    return constraint_of(options, CONSTRAINING)


def _params(options: Options, max_tokens: int, constraint: Constraint | None) -> SamplingParams:
    temperature, top_p = options.get("temperature"), options.get("top_p")
    logprobs, prompt_logprobs = options.get("logprobs"), options.get("prompt_logprobs")
    if logprobs is None and _best_of(options):
        logprobs = 0  # they tell which answers are best
    if options.get("do_sample") is False:
        temperature = 0.0
    return SamplingParams(
        max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_k=options.get("top_k") or 0,
        top_p=0.9 if top_p is None else top_p,
        min_p=options.get("min_p") or 0.0,
        repetition_penalty=options.get("repetition_penalty") or 1.0,
        presence_penalty=options.get("presence_penalty") or 0.0,
        frequency_penalty=options.get("frequency_penalty") or 0.0,
        logit_bias=tuple(sorted((options.get("logit_bias") or {}).items())),
        seed=options.get("seed"),
        stop_token_ids=tuple(options.get("stop_token_ids") or ()),
        ignore_eos=options.get("ignore_eos") or False,
        min_tokens=options.get("min_new_tokens") or 0,
        logprobs=-1 if logprobs is None else logprobs,
        prompt_logprobs=-1 if prompt_logprobs is None else prompt_logprobs,
        constraint=constraint,
    )


def _joined(pieces: list[Response]) -> Response:
    """The answer that these pieces make."""
    return msgspec.structs.replace(
        pieces[-1],
        generated_text="".join(piece.generated_text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        prompt_tokens=tuple(token for piece in pieces for token in piece.prompt_tokens),
    )


def _best(answers: list[Response], endings: Mapping[int, Token], kept: int, made: int) -> list[Response]:
    """Of each ``made`` answers the ``kept`` likeliest, by the mean logprob of what was generated."""

    def likely(answer: Response) -> float:
        return likelihood(answer.tokens, endings.get(answer.index))

    groups = [answers[first : first + made] for first in range(0, len(answers), made)]
    best = [answer for group in groups for answer in sorted(group, key=likely, reverse=True)[:kept]]
    return [msgspec.structs.replace(answer, index=index) for index, answer in enumerate(best)]
