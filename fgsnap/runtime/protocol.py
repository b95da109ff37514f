"""What a client may send: the OpenAI bodies, checked into one typed call. What it gets back is in ``answers``.

Every number and list is bounded here, so that nothing a client writes reaches the engine unchecked. Fields that are
unknown are ignored, as clients send many; fields that are known and would change the answer in a way this server does
not offer are refused by name.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import re
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from fgsnap.errors import RequestError
from fgsnap.runtime.request import Constraint, SamplingParams

MAX_CHOICES = 128
MAX_ENTRIES = 1 << 20  # logprobs of prompts' tokens in one answer: about 70 MB of it
MAX_OBJECTS = 1 << 14  # in the messages of one request, parts of their contents and of tool calls included
MOST_TOKENS = 1 << 31  # of a context that is not known
CUT_FROM = 16  # contexts; all of a prompt is tokenized before it is cut
COMPLETION_MAX_TOKENS = 16  # what OpenAI's completions answer with when max_tokens is left out

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
TopLogprobs = Annotated[int, msgspec.Meta(ge=0, le=20)]
Choices = Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
AllowedTokens = Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=1 << 18)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = False


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints share. ``null`` is the same as leaving a field out."""

    model: str | None = None
    n: Choices | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], msgspec.Meta(max_length=1024)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], msgspec.Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=64)] | None = None
    ignore_eos: bool | None = False
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    allowed_token_ids: AllowedTokens | None = None
    bad_words: Annotated[list[StopText], msgspec.Meta(max_length=128)] | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)] | None = None
    timeout: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class CompletionBody(Sampled, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None
    echo: bool | None = False
    logprobs: TopLogprobs | None = None
    best_of: Choices | None = None


Body = TypeVar("Body")


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chat message, of which these fields reach the template; ``text`` reads content that comes in parts."""

    role: Name
    content: str | list[dict[str, Any]] | None = None
    name: Name | None = None
    tool_call_id: Name | None = None
    tool_calls: list[dict[str, Any]] | None = None


Messages = Annotated[list[Message], msgspec.Meta(min_length=1, max_length=4096)]


class ChatBody(Sampled, frozen=True, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    logprobs: bool | None = False
    top_logprobs: TopLogprobs | None = None


# Fields that change the answer and that this server does not offer, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "length_penalty": (None, 1),
    "min_length": (None, 0),
    "typical_p": (None, 1),
    "mirostat": (None, 0),
    "dry_multiplier": (None, 0),
    "use_beam_search": (None, False),
    "logits_processors": (None, []),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "return_tokens_as_token_ids": (None, False),
    "guided_whitespace_pattern": (None,),
    "json_schema": (None, {}),
    "grammar": (None, ""),
    "max_new_tokens": (None,),
    "n_predict": (None,),
    "do_sample": (None,),
    "repeat_penalty": (None, 1),
    "prompt_embeds": (None,),
    "return_token_ids": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
}

OFFERED_AS = {
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "do_sample": "temperature, of which 0 is greedy",
    "repeat_penalty": "repetition_penalty",
    "grammar": "guided_grammar",
    "json_schema": "guided_json",
}
"""What other servers' fields are called here."""

LONGEST_LIST = 1 << 16  # bytes of JSON
BRIEF = {
    **dict.fromkeys(("stop", "stop_token_ids", "logit_bias", "cache_salt", "model"), LONGEST_LIST),
    "bad_words": 1 << 19,  # a character may take 12, as "\ud83d\ude00" does
}
"""Bytes of JSON that these take at most, whatever they hold and however it is spelled; nothing more is read."""
LONGEST_SEARCH = 1 << 20  # bytes of a body in which the field is looked for that is no JSON

NO_MARKS = bytes(byte for byte in range(256) if byte not in b'{"')

UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {"top_logprobs": (None, 0)}
UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {"echo": (None, False), "best_of": (None, 1)}

CONSTRAINING = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""Fields that say what the answer has to be."""


class Room(NamedTuple):
    """How long a prompt may be that is read.

    Attributes:
        context: the most tokens of a sequence.
        cut: the prompt is cut to fit it, and may be CUT_FROM times as long.
    """

    context: int
    cut: bool

    @property
    def most(self) -> int:
        return self.context * CUT_FROM if self.cut else self.context


class Call(NamedTuple):
    """One HTTP request, checked. Either ``prompts`` or ``messages`` is filled.

    Attributes:
        params: as for the engine; ``max_tokens`` is settled when the prompt's length and the context are known.
        max_tokens: None where the client left it out.
        choices: answers to make of each prompt, of which the client gets the ``kept`` likeliest.
        echo: the answer begins with the prompt, and so do its logprobs.
        prompt_top: the prompt's logprobs are wanted in a field of their own, with so many of the likeliest; -1: not.
        include_stop: what ends the answer is a part of it.
        skip_special: special tokens are not shown.
        bad_words: texts that the answer must not have.
        truncate_prompt_tokens: keep so many of the prompt's last tokens; -1: as many as the context has room for.
        add_special_tokens: a prompt that comes as text begins with the model's bos, where it has one.
        add_generation_prompt: a chat ends with what the assistant's words begin with.
        continue_final_message: it ends within its last message.
    """

    chat: bool
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, Any], ...]
    params: SamplingParams
    max_tokens: int | None
    choices: int
    kept: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    echo: bool = False
    prompt_top: int = -1
    include_stop: bool = False
    skip_special: bool = True
    bad_words: tuple[str, ...] = ()
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def parse_completion(body: bytes, vocab_size: int, context: int = MOST_TOKENS) -> Call:
    """The body of POST /v1/completions. RequestError names the field at fault.

    Token ids beyond the ``context`` are not read one by one.
    """
    sent = _object(body, CompletionBody, context)
    _refuse_unsupported(sent, UNSUPPORTED_IN_COMPLETIONS)
    _bound_prompts(sent.get("prompt"))
    wanted = typed(sent, CompletionBody)
    if wanted.max_tokens == 0 and not wanted.echo:
        raise _wrong("max_tokens", "Expected `int` >= 1; 0 is for the logprobs of a prompt, with echo.")
    prompts = _prompts(wanted.prompt, vocab_size)
    choices = _choices(wanted)
    _bound_choices(len(prompts), choices)
    call = _call(
        wanted,
        vocab_size,
        chat=False,
        prompts=prompts,
        logprobs=wanted.logprobs,
        max_tokens=wanted.max_tokens,
        constraint=_constraint(sent),
    )
    return (_echoing(call) if wanted.echo else call)._replace(choices=choices)


def parse_chat(body: bytes, vocab_size: int, context: int = MOST_TOKENS) -> Call:
    """The body of POST /v1/chat/completions. RequestError names the field at fault."""
    sent = _object(body, ChatBody, context)
    _refuse_unsupported(sent, UNSUPPORTED_IN_CHAT)
    wanted = typed(sent, ChatBody)
    if wanted.top_logprobs and not wanted.logprobs:
        raise _wrong("top_logprobs", "top_logprobs needs logprobs to be true.")
    goes_on = bool(wanted.continue_final_message)
    if goes_on and wanted.add_generation_prompt:
        raise _wrong("continue_final_message", "It cannot go with add_generation_prompt, which begins a new message.")
    call = _call(
        wanted,
        vocab_size,
        chat=True,
        messages=_spoken(wanted.messages),
        logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
        max_tokens=wanted.max_completion_tokens or wanted.max_tokens,
        constraint=_constraint(sent),
    )
    return call._replace(
        add_special_tokens=bool(wanted.add_special_tokens),  # a template has its own
        add_generation_prompt=wanted.add_generation_prompt is not False and not goes_on,
        continue_final_message=goes_on,
    )


class _Conversation(msgspec.Struct, frozen=True):
    messages: Messages


def conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Messages of Python as a template may have them. RequestError names the field at fault."""
    return _spoken(typed({"messages": messages}, _Conversation).messages)


def _spoken(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    for index, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise _wrong(f"messages[{index}].content", "The field is missing.")
    return tuple(msgspec.to_builtins(message) for message in messages)


def _object(body: bytes, kind: type[msgspec.Struct], context: int) -> dict[str, Any]:
    """The fields that mean something here. What others hold is not read, for it may be long."""
    if not body.strip():
        raise _wrong("", "The body is empty; it must be a JSON object.")
    try:
        if body.lstrip()[:1] != b"{":
            raise _wrong("", f"The body must be a JSON object, not {_json_name(msgspec.json.decode(body))}.")
        raws = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        known = _known_fields(kind)
        cut = bytes(raws.get("truncate_prompt_tokens", b"null")).strip() != b"null"
        sent = {name: _value(name, raw, Room(context, cut)) for name, raw in raws.items() if name in known}
    except RecursionError:
        raise _wrong("", "The body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(body, _known_fields(kind), error) from None
    _refuse_unsupported(sent, UNSUPPORTED)
    return sent


def _known_fields(kind: type[msgspec.Struct]) -> set[str]:
    return {*kind.__struct_fields__, *UNSUPPORTED, *UNSUPPORTED_IN_COMPLETIONS, *UNSUPPORTED_IN_CHAT, *CONSTRAINING}


def _unreadable(body: bytes, known: Container[str], error: Exception) -> RequestError:
    """What to say of a body that is no JSON; with the field at fault, where one is and is soon found."""
    if len(body) <= LONGEST_SEARCH:
        from fgsnap.runtime.misread import first_misread

        field, why = first_misread(body)
        if field in known:
            return _wrong(field, f"It cannot be read as JSON: {why or _without_path(error)}.")
    return _wrong("", f"The body cannot be read as JSON: {_without_path(error)}.")


def _value(name: str, raw: msgspec.Raw, room: Room) -> Any:
    """The field's value. One that is far too long is not read to the end, to find out just that."""
    size = memoryview(raw).nbytes
    if size > BRIEF.get(name, LONGEST_LIST):
        if name in BRIEF:
            raise _wrong(name, f"It is {size} bytes long, of at most {BRIEF[name]}.")
        if name in UNSUPPORTED:
            return raw  # none of the values that ask for nothing is long
        if name == "prompt":
            _bound_lists(bytes(raw), room)
        if name == "messages":
            _bound_objects(bytes(raw))
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _wrong(name, f"It cannot be read as JSON: {_without_path(error)}.") from None


def _bound_lists(raw: bytes, room: Room) -> None:
    """Before token ids are read one by one. Where there is a text among them, that is wrong for another reason."""
    if b'"' in raw or not raw.startswith(b"["):
        return
    nested = raw[1:].lstrip().startswith(b"[")
    if nested:
        _bound_choices(raw.count(b"[") - 1, 1)
    longest = max(part.count(b",") for part in raw.split(b"]")) if nested else raw.count(b",") + 1
    if longest > room.most:
        raise _too_long("prompt", longest, room)


def _bound_objects(raw: bytes) -> None:
    """Before they are made one by one. Braces in texts do not count."""
    if raw.count(b"{") <= MAX_OBJECTS:
        return
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Without two quotes side by side, each brace that is left is inside or outside of a text as it was before.
    marks = unescaped.translate(None, NO_MARKS).replace(b'""', b"")
    count = b"".join(marks.split(b'"')[::2]).count(b"{")
    if count > MAX_OBJECTS:
        raise _wrong("messages", f"They and their parts are {count} objects, of at most {MAX_OBJECTS}.")


def _without_path(error: Exception) -> str:
    """What is wrong; msgspec adds where, as a path whose names are all left out."""
    return str(error).partition(" - at `")[0]


def _constraint(sent: Mapping[str, Any]) -> Constraint | None:
    if sent.keys().isdisjoint(CONSTRAINING):
        return None
    from fgsnap.runtime.constraining import constraint_of

    return constraint_of(sent, CONSTRAINING)


def _refuse_unsupported(sent: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    for field, neutral in unsupported.items():
        if field in sent and not _among(sent[field], neutral):
            raise RequestError(
                f"'{field}' is not supported by this server.",
                next_step=f"It is called {OFFERED_AS[field]} here." if field in OFFERED_AS else f"Leave '{field}' out.",
                param=field,
                code="unsupported_parameter",
            )


def _among(value: Any, neutral: Sequence[Any]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def typed(sent: Mapping[str, Any], kind: type[Body]) -> Body:
    """What was sent, checked. RequestError names the field at fault."""
    try:
        return msgspec.convert(sent, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `")
        # What stands before the last $ belongs to another object, and an object's own names are left out as "[...]".
        field = path.rpartition("$")[2].rstrip("`").lstrip(".").replace("[...]", "")
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", reason):
            raise _wrong(f"{field}.{missing[1]}".lstrip("."), "The field is missing.") from None
        raise _wrong(field, f"{reason}.") from None


def _prompts(prompt: str | list[str | int | list[int]], vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """One entry a prompt, whichever of the four forms was sent."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise _wrong("prompt", "The list is empty.")
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise _wrong("prompt", "Mixes texts, token ids and lists of token ids.")
    if kinds == {str}:
        return tuple(prompt)  # type: ignore[arg-type]
    lists: list[Any] = [prompt] if kinds == {int} else prompt
    return tuple(token_ids(ids, vocab_size) for ids in lists)


def token_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """A prompt that came as token ids. RequestError if it is empty or one is not in the vocabulary."""
    if not ids:
        raise _wrong("prompt", "A list of token ids is empty.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        worst = min(ids) if min(ids) < 0 else max(ids)
        raise _wrong("prompt", f"Token id {worst} is outside the vocabulary of {vocab_size}.")
    return tuple(ids)


def _bound_prompts(prompt: Any) -> None:
    """Before they are looked at one by one."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        _bound_choices(len(prompt), 1)


def _bound_choices(prompts: int, n: int) -> None:
    if prompts * n > MAX_CHOICES:
        raise _wrong("prompt", f"{prompts} prompts x n {n} is more than the {MAX_CHOICES} choices of one request.")


def _choices(wanted: CompletionBody) -> int:
    """Answers to make of each prompt."""
    kept = wanted.n or 1
    best_of = wanted.best_of or kept
    if best_of < kept:
        raise _wrong("best_of", f"best_of {best_of} is less than n {kept}.")
    if best_of > kept and wanted.stream:
        raise _wrong("best_of", "The best answers are known when all have ended; they cannot be streamed.")
    return best_of


def _echoing(call: Call) -> Call:
    """The call with the prompt told as well."""
    params = call.params
    if params.logprobs >= 0:
        params = msgspec.structs.replace(
            params,
            prompt_logprobs=max(params.prompt_logprobs, params.logprobs),
            # Who scores a text asks for one token more and drops the last logprob; an eos must be there to be dropped.
            ignore_eos=params.ignore_eos or call.max_tokens == 1,
        )
    return call._replace(echo=True, params=params)


def _biases(logit_bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Token ids are keys, and so text, in JSON."""
    found = {}
    for key, bias in logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise _wrong("logit_bias", f"'{key[:40]}' is no token id from 0 to {vocab_size - 1}.")
        found[int(key)] = bias
    return tuple(sorted(found.items()))


def _call(
    wanted: Sampled,
    vocab_size: int,
    *,
    chat: bool,
    prompts: tuple[str | tuple[int, ...], ...] = (),
    messages: tuple[dict[str, Any], ...] = (),
    logprobs: int | None,
    max_tokens: int | None,
    constraint: Constraint | None,
) -> Call:
    if wanted.stream_options is not None and not wanted.stream:
        raise _wrong("stream_options", "stream_options needs stream to be true.")
    if wanted.prompt_logprobs is not None and wanted.stream:
        raise _wrong("prompt_logprobs", "prompt_logprobs are not streamed; echo with logprobs is.")
    if wanted.allowed_token_ids is not None and constraint is not None:
        raise _wrong("allowed_token_ids", f"{constraint.field} says which tokens are allowed already.")
    skip_special = wanted.skip_special_tokens is not False
    if wanted.spaces_between_special_tokens is False and not skip_special:
        raise _wrong("spaces_between_special_tokens", "Tokens are shown as the tokenizer spaces them.")
    if wanted.truncate_prompt_tokens == 0:
        raise _wrong("truncate_prompt_tokens", "Expected `int` >= 1, or -1.")
    prompt_top = -1 if wanted.prompt_logprobs is None else wanted.prompt_logprobs
    return Call(
        chat=chat,
        model=wanted.model,
        prompts=prompts,
        messages=messages,
        params=SamplingParams(
            max_tokens=0,
            temperature=1.0 if wanted.temperature is None else wanted.temperature,
            top_k=max(wanted.top_k or 0, 0),
            top_p=1.0 if wanted.top_p is None else wanted.top_p,
            min_p=wanted.min_p or 0.0,
            repetition_penalty=wanted.repetition_penalty or 1.0,
            presence_penalty=wanted.presence_penalty or 0.0,
            frequency_penalty=wanted.frequency_penalty or 0.0,
            logit_bias=_biases(wanted.logit_bias or {}, vocab_size),
            seed=wanted.seed,
            stop_token_ids=tuple(_known("stop_token_ids", wanted.stop_token_ids or (), vocab_size)),
            ignore_eos=bool(wanted.ignore_eos),
            min_tokens=wanted.min_tokens or 0,
            logprobs=-1 if logprobs is None else logprobs,
            prompt_logprobs=prompt_top,
            constraint=constraint,
            allowed=_mask(wanted.allowed_token_ids or (), vocab_size),
        ),
        max_tokens=max_tokens,
        choices=wanted.n or 1,
        kept=wanted.n or 1,
        stop=(wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop or ()),
        stream=bool(wanted.stream),
        include_usage=wanted.stream_options is not None and bool(wanted.stream_options.include_usage),
        priority=wanted.priority or 0,
        timeout=wanted.timeout,
        cache_salt=wanted.cache_salt or "",
        prompt_top=prompt_top,
        include_stop=bool(wanted.include_stop_str_in_output),
        skip_special=skip_special,
        bad_words=tuple(wanted.bad_words or ()),
        truncate_prompt_tokens=wanted.truncate_prompt_tokens,
        add_special_tokens=wanted.add_special_tokens is not False,
    )


def _known(field: str, ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    stray = next((id for id in ids if id >= vocab_size), None)
    if stray is not None:
        raise _wrong(field, f"Token id {stray} is outside the vocabulary of {vocab_size}.")
    return ids


def _mask(allowed: Sequence[int], vocab_size: int) -> bytes:
    """A bit for each token; nothing where all are allowed."""
    if not allowed:
        return b""
    mask = bytearray(-(-vocab_size // 32) * 4)
    for id in _known("allowed_token_ids", allowed, vocab_size):
        mask[id // 8] |= 1 << id % 8
    return bytes(mask)


def truncated(call: Call, prompt: tuple[int, ...], head: int, max_length: int) -> tuple[int, ...]:
    """Of the prompt as many tokens as the call asks for: its last ones, after the first ``head``, which stay."""
    wanted = call.truncate_prompt_tokens
    if wanted is None:
        return prompt
    room = max_length - (1 if call.max_tokens is None else call.max_tokens)
    most = max(wanted if wanted > 0 else room, 1)
    return prompt if len(prompt) <= most else prompt[: min(head, most)] + prompt[len(prompt) - most + head :]


def settled(call: Call, prompt_tokens: int, max_length: int, kv_tokens: int, chat_tokens: int) -> int:
    """How many tokens may be generated; RequestError with the arithmetic when prompt and answer exceed the context.

    Where the client left max_tokens out, a chat gets ``chat_tokens``, or what context and KV cache leave if that is
    less: what an answer may take is reserved for it, so one without a bound would keep all others waiting.
    """
    if prompt_tokens == 0:
        raise _wrong("messages" if call.chat else "prompt", "The prompt has no tokens.")
    if prompt_tokens + (1 if call.max_tokens is None else call.max_tokens) > max_length:
        raise beyond_context(call, prompt_tokens, max_length)
    room = max(min(max_length, kv_tokens) - prompt_tokens, 1)
    chosen = min(chat_tokens if call.chat else COMPLETION_MAX_TOKENS, room)
    length = chosen if call.max_tokens is None else call.max_tokens
    if call.params.min_tokens > length:
        raise _wrong("min_tokens", f"min_tokens {call.params.min_tokens} is more than max_tokens, which is {length}.")
    return length


def too_long(call: Call, least: int, room: Room) -> RequestError:
    """The refusal of a prompt that has so many tokens at least, and is not read to its end."""
    return _too_long("messages" if call.chat else "prompt", least, room, about="at least ")


def entries(call: Call, prompt_tokens: Sequence[int]) -> int:
    """How many logprobs of its prompts' tokens the answer tells; RequestError with the arithmetic where too many.

    A few numbers ask for them, and each choice has them all.
    """
    tops = {"prompt_logprobs": call.prompt_top, "logprobs": call.params.logprobs if call.echo else -1}
    told = {field: top + 1 for field, top in tops.items() if top >= 0}
    total, times = sum(prompt_tokens), 1 if call.chat else call.kept
    count = total * times * sum(told.values())
    if count <= MAX_ENTRIES:
        return count
    each = " + ".join(f"{field} {of_token - 1} + 1" for field, of_token in told.items())
    choices = "" if times == 1 else f" x {times} choices"
    raise RequestError(
        f"The answer would tell {count} logprobs of the prompt, of at most {MAX_ENTRIES}.",
        f"That is {total} tokens of prompt{choices} x ({each}).",
        f"Lower {' or '.join((*told, *(() if times == 1 else ('n',))))}, or send fewer or shorter prompts.",
        param=max(told, key=lambda field: told[field]),
        code="invalid_value",
    )


def beyond_context(call: Call, prompt_tokens: int, max_length: int) -> RequestError:
    """The refusal of a request that the context does not hold, with the arithmetic and the field that is too large."""
    prompt = "messages" if call.chat else "prompt"
    least = 1 if call.max_tokens is None else call.max_tokens
    asked = f"{call.max_tokens} of max_tokens" if call.max_tokens else f"at least {least} to generate"
    alone = prompt_tokens + min(least, 1) > max_length
    return RequestError(
        f"This model's maximum context length is {max_length} tokens; the request needs {prompt_tokens + least}: "
        f"{prompt_tokens} of prompt + {asked}.",
        next_step="Shorten the prompt." if alone else "Lower max_tokens or shorten the prompt.",
        param=prompt if alone else "max_tokens",
        code="context_length_exceeded",
    )


def _too_long(field: str, tokens: int, room: Room, about: str = "") -> RequestError:
    rule = f"This model's maximum context length is {room.context} tokens"
    if room.cut:
        rule += f", and a prompt that is cut may have {room.most}"
    return RequestError(
        f"{rule}; the prompt has {about}{tokens}.",
        next_step="Shorten the prompt.",
        param=field,
        code="context_length_exceeded",
    )


def choosing(call: Call) -> str:
    """The field by which a call has more than one choice, if it has."""
    if call.choices == 1:
        return "prompt"
    return "n" if call.choices == call.kept else "best_of"


def _wrong(field: str, why: str) -> RequestError:
    return RequestError(f"{field}: {why}" if field else why, param=field, code="invalid_value" if field else "")


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
