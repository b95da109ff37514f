"""Text to tokens and back: the tokenizer and chat template that travel in the snapshot.

Going in: ``encode`` for plain prompts, and for conversations as ``render_chat`` writes them. Coming out: a TextStream
an answer, which turns tokens into text as they arrive, never shows half a character, and holds back what may yet become
a stop string. A template is data of strangers: it runs in minijinja, which has no way to the host, with bounded fuel.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol, TypedDict, Unpack

from minijinja import Environment, TemplateError

from fgsnap.errors import RequestError, SnapshotRefused
from fgsnap.snapshot import Manifest
from fgsnap.tokenizer import BYTE_OF, load_tokenizer

TEMPLATE_FUEL = 10_000_000
"""Template instructions a rendering may take: a quarter of a second, and thousands of messages."""

MAX_JSON_INDENT = 16
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes in UTF-8, and so at most as many tokens."""
MARK = "THE FINAL MESSAGE ENDS HERE "

Message = Mapping[str, Any]


class TextSource(Protocol):
    """What Text needs of an opened snapshot."""

    @property
    def manifest(self) -> Manifest: ...

    def read_text(self, name: str) -> bytes:
        """The bytes of a text file that the manifest covers."""
        ...


class Decodes(Protocol):
    """Tokens to text: a Text, a Tokenizer, or a test's double."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...


class Told(TypedDict, total=False):
    """How an answer is told.

    Attributes:
        min_tokens: a stop text that is complete within so many tokens does not end it.
        include_stop: the stop text is a part of it.
        skip_special: special tokens have no text.
    """

    min_tokens: int
    include_stop: bool
    skip_special: bool


class Text:
    """The tokenizer and chat template of one snapshot."""

    def __init__(self, snapshot: TextSource) -> None:
        section = snapshot.manifest.text
        self.tokenizer = load_tokenizer(snapshot.read_text, snapshot.manifest.files)
        self.eos_token_ids: tuple[int, ...] = tuple(section.eos_token_ids)
        self._bos = [section.bos_token_id] if section.add_bos and section.bos_token_id is not None else []
        self._template: ChatTemplate | None = None
        if section.template == "jinja":
            source = snapshot.read_text("chat_template.jinja").decode()
            self._template = ChatTemplate(source, self._special_tokens(snapshot))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, after a BOS token if the model wants one, unless it is to go without.

        A conversation goes without: its template writes its own.
        """
        return (self._bos if add_special_tokens else []) + self._ids(text)

    def least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, by its length; 0 where that says nothing."""
        return self.tokenizer.least_tokens(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of tokens, special ones skipped unless they are asked for."""
        return self.tokenizer.decode(ids, skip_special)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it. RequestError if the template refuses it.

        Args:
            messages: the conversation.
            tools: that the template may tell the model of.
            add_generation_prompt: end with what the assistant's words begin with.
            continue_final_message: end within the last message instead, so that it is gone on with.
            variables: for the template.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template.",
                "The checkpoint brought none, so there is no telling how it reads a conversation.",
                "Send a plain prompt (over HTTP, to /v1/completions).",
                param="messages",
            )
        plain = [_plain_message(message) for message in messages]
        variables = {"tools": list(tools) if tools else None, "documents": None, **variables}
        if continue_final_message:
            variables["add_generation_prompt"] = False
            return _within_last(plain, functools.partial(self._template.render, **variables))
        return self._template.render(**variables, messages=plain, add_generation_prompt=add_generation_prompt)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token stands for; half a character for some. Empty for an id without a token."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        byte_level = self.tokenizer.byte_level
        if byte_level and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(match[1], 16)])
        return (piece if byte_level else piece.replace("▁", " ")).encode()

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = (), **how: Unpack[Told]) -> TextStream:
        """A TextStream for one answer; ``prompt`` decides whether its first word begins with a space."""
        return TextStream(self, tuple(stop), prompt, **how)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(_unicode(text))

    def _special_tokens(self, snapshot: TextSource) -> dict[str, str]:
        """The variables such as bos_token that a template may use."""
        if "tokenizer_config.json" in snapshot.manifest.files:
            return _named_tokens(snapshot.read_text("tokenizer_config.json"))
        section = snapshot.manifest.text
        ids = {"bos_token": section.bos_token_id, "eos_token": next(iter(section.eos_token_ids), None)}
        tokens = {name: self.tokenizer.id_to_token(id) for name, id in ids.items() if id is not None}
        return {name: token for name, token in tokens.items() if token is not None}


class ChatTemplate:
    """A Jinja chat template, rendered as transformers renders it.

    Args:
        source: the template.
        special_tokens: variables such as bos_token that every rendering sees.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._environment = Environment(
            trim_blocks=True, lstrip_blocks=True, pycompat=True, fuel=TEMPLATE_FUEL, auto_escape_callback=_no_escape,
            debug=False,
        )  # fmt: skip
        self._environment.add_filter("tojson", _tojson)
        self._environment.add_global("raise_exception", _raise_exception)
        self._environment.add_global("strftime_now", _strftime_now)
        self._broken = ""
        try:
            self._environment.add_template("chat", _GENERATION.sub(_as_if, source))
        except TemplateError as error:
            # Plain prompts need no template, so only a chat request meets this.
            self._broken = _reason(error)

    def render(self, **variables: Any) -> str:
        """The conversation as one text. RequestError if the template refuses it or does not come to an end."""
        if self._broken:
            raise _template_error(self._broken)
        try:
            return str(self._environment.render_template("chat", **(self._special_tokens | variables)))
        except RequestError:
            raise
        except Exception as error:  # what a stranger's template can make the filters raise is open-ended
            raise _template_error(_reason(error)) from error


# Templates written for training mark the assistant's words; transformers renders the block as if there were no marks.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(generation|endgeneration)(\s*[-+]?%\})")


def _as_if(mark: re.Match[str]) -> str:
    return mark[1] + ("if true" if mark[2] == "generation" else "endif") + mark[3]


def _no_escape(name: str) -> bool:
    return False


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it: neither ASCII nor HTML escapes."""
    if indent is not None and indent > MAX_JSON_INDENT:
        raise ValueError(f"tojson(indent={indent}) is wider than {MAX_JSON_INDENT}")
    item_key = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=item_key, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise RequestError(
        "The model's chat template refuses this conversation.",
        str(message),
        "Change the messages as it asks.",
        param="messages",
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _template_error(reason: str) -> RequestError:
    return RequestError(
        "The model's chat template cannot render this conversation.",
        reason,
        "Check the roles and fields of the messages, or send a plain prompt.",
        param="messages",
    )


def _within_last(messages: Sequence[dict[str, Any]], render: Callable[..., str]) -> str:
    """The conversation up to the last word of its last message; as transformers does it, by a mark behind that."""
    *before, last = messages
    content = last.get("content")
    if not isinstance(content, str):
        raise RequestError("The final message has no text to go on with.", param="messages")
    text = render(messages=[*before, {**last, "content": content + MARK}])
    at = text.rfind(MARK.rstrip())
    if at < 0 or content.strip() not in text:
        raise RequestError(
            "The final message cannot be continued.",
            "The model's chat template does not show it as it is.",
            "Leave continue_final_message out.",
            param="continue_final_message",
        )
    kept = text[:at]
    return kept if text.startswith(MARK, at) else kept.rstrip()  # else the template trims, and would that message too


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, and the arguments of tool calls as objects."""
    plain = dict(message)
    if isinstance(plain.get("content"), list | tuple):
        plain["content"] = "\n".join(_part_text(part) for part in plain["content"])
    if isinstance(plain.get("content"), str):
        plain["content"] = _unicode(plain["content"])
    if isinstance(plain.get("tool_calls"), list | tuple):
        plain["tool_calls"] = [_plain_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(
        f"A message holds a content part of type {kind!r}.",
        "This model reads text only.",
        'Send content as a string, or as parts like {"type": "text", "text": "..."}.',
        param="messages",
    )


def _plain_tool_call(call: Any) -> Any:
    """The OpenAI API carries arguments as a JSON text; templates print the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _unicode(text: str) -> str:
    """The text, if it has a UTF-8 form: arguments of a command line and JSON escapes need not have one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "The text is not valid Unicode.",
            f"Character {error.start} is half of a surrogate pair.",
            "Send it as UTF-8, or with both halves of the escape.",
        ) from None
    return text


def _named_tokens(data: bytes) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, each written as a string or as {"content": ...}."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise SnapshotRefused(
            "tokenizer_config.json is not a JSON object.", "The chat template needs it.", "Convert again."
        )
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


class TextStream:
    """The text of one answer, as its tokens arrive.

    Args:
        tokenizer: decodes tokens.
        stop: texts that end the answer. The one that is complete first counts; of two, the longer.
        prompt: the tokens before the answer, whose last few decide how its first word is spaced.
        min_tokens, include_stop, skip_special: see Told.

    What ``feed`` and ``flush`` return, joined, is the whole answer up to the stop text, or its end, and nothing more.

    Attributes:
        shown: how many of the tokens have a part in that text. At the end these are all but those of the stop text,
            and, where bytes before it were wrong, the token that showed them to be so.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        decode = tokenizer.decode if skip_special else functools.partial(tokenizer.decode, skip_special=False)
        self._characters = Characters(decode, prompt)
        self._stops = StopTexts(stop, include=include_stop)
        self._unheeded = min_tokens  # tokens to come that no stop text ends
        self._starts: deque[int] = deque()  # of each token not yet shown: the characters before its own
        self._whole = 0  # characters of all tokens
        self._out = 0  # characters let out
        self.shown = 0

    @property
    def matched(self) -> str | None:
        """The stop text that ended the answer."""
        return self._stops.matched

    @property
    def finished(self) -> bool:
        """Whether a stop text ended the answer, so that its request can be aborted."""
        return self._stops.matched is not None

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens let out; often one word, sometimes nothing yet."""
        return "".join([self._feed(id) for id in ids])

    def _feed(self, id: int) -> str:
        if self.finished:
            return ""
        self._starts.append(self._whole)
        whole = self._characters.feed([id])
        self._whole += len(whole)
        text = self._stops.feed(whole, heeded=self._unheeded <= 0)
        self._unheeded -= 1
        return self._show(text)

    def _show(self, text: str) -> str:
        self._out += len(text)
        while self._starts and self._starts[0] < self._out:
            self._starts.popleft()
            self.shown += 1
        return text

    def flush(self) -> str:
        """The text still held back, at the end of the answer."""
        if self.finished:
            return ""
        rest = self._stops.feed(self._characters.flush(), heeded=self._unheeded < 0)
        text = self._show(rest + self._stops.flush())
        if not self.finished:  # tokens at the end that have no text, such as special ones, are part of the answer
            self.shown += len(self._starts)
            self._starts.clear()
        return text


class Characters:
    """Tokens to whole characters.

    A token may hold a part of a character, which decodes to U+FFFD; so text that ends in U+FFFD is held back until
    later tokens complete it. Text depends on its neighbours (a first word loses its space), so a decoding begins with
    tokens that were already shown.

    Attributes:
        context: how many tokens of the prompt to begin with.
        lookback: among how many of its last tokens one with text is looked for.
        patience: a character has at most four bytes, so after so many tokens without a whole one the bytes are wrong,
            not incomplete.
        longest_window: how many tokens to decode again at most.
    """

    context = 8
    lookback = 128
    patience = 8
    longest_window = 64

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = self._tail(prompt)
        self._shown = decode(self._window) if self._window else ""  # of the text of the window
        # Tokens at the front of the window whose characters are whole, and shown.
        self._settled = 0 if REPLACEMENT in self._shown else len(self._window)
        self._stalled = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The characters that are whole after these tokens and were not before."""
        # One by one: text then does not depend on how tokens were grouped on their way here.
        return "".join([self._feed(id) for id in ids])

    def _feed(self, id: int) -> str:
        self._window.append(id)
        text = self._text()
        shown, whole = len(self._shown), len(text.rstrip(REPLACEMENT))
        if whole == len(text):
            self._stalled = 0
            self._settle(text)
        else:
            self._stalled = 0 if whole > shown else self._stalled + 1
            whole = max(whole if self._stalled < self.patience else len(text) - 1, shown)
            self._shown = text[:whole]
        if len(self._window) > self.longest_window:
            self._shorten(held=len(text) - whole)
        return text[shown:whole]

    def flush(self) -> str:
        """Everything held back, as it is."""
        text = self._text()
        rest = text[len(self._shown) :]
        self._shown = text
        return rest

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The last few tokens of the prompt that have text: whole characters, or else what belongs to the last one."""
        prompt = prompt[-self.lookback :]
        # Where nothing but special tokens follows: found by halves, for each choice of a request does this.
        end = bisect_left(range(len(prompt)), True, key=lambda start: not self._decode(list(prompt[start:]))) or len(
            prompt
        )
        begin = max(end - self.context, 0)
        for cut in range(end, max(end - LONGEST_CHARACTER, begin), -1):
            start = next((start for start in range(begin, cut) if self._is_whole(prompt[start:cut])), None)
            if start is not None:
                return list(prompt[start if cut == end else cut : end])
        return list(prompt[max(end - LONGEST_CHARACTER + 1, 0) : end])

    def _is_whole(self, ids: Sequence[int]) -> bool:
        text = self._decode(list(ids))
        return bool(text) and REPLACEMENT not in text

    def _text(self) -> str:
        """The text of the window, which begins with what was shown."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):  # half a character at the end of the prompt has become a whole one
            self._shown = self._shown.rstrip(REPLACEMENT)
        if not text.startswith(self._shown):  # some decoders take back whole characters when a part of one follows
            self._window, self._settled, self._shown = self._window[self._settled :], 0, ""
            text = self._decode(self._window)
        return text

    def _settle(self, text: str) -> None:
        """Forget tokens that no longer influence what follows, so that a step costs the same however long the text."""
        fresh = self._window[self._settled :]
        if alone := self._decode(fresh):
            self._window, self._shown = fresh, alone
        elif self._shown:  # special tokens, or one space: what is before them tells that no word here is the first
            del self._window[self._settled :]
        else:
            self._shown = text
        self._settled = len(self._window)

    def _shorten(self, held: int) -> None:
        """Leave out the middle of a window in which no character ends with a token, or none is right."""
        del self._window[self.context : -self.context]
        self._settled = min(self._settled, self.context)
        text = self._decode(self._window)
        self._shown = text[: max(len(text) - held, 0)]


class StopTexts:
    """Lets text through up to the first stop text, holding back what may be the beginning of one.

    Args:
        stop: the texts.
        include: let the stop text through as well.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = tuple(text for text in stop if text)
        self._first = frozenset(text[0] for text in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include = include
        self._held = ""
        self._unheeded = 0  # characters at the front of what is held, in which no stop text ends
        self.matched: str | None = None

    def feed(self, text: str, *, heeded: bool = True) -> str:
        """The part of all text so far that is now safe to show. A stop text that ends in it counts where ``heeded``."""
        if not self._stop:
            return text
        self._held += text
        if not heeded:
            self._unheeded = len(self._held)
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := self._find(stop)) >= 0]
        if found:
            after, end, self.matched = min(found)
            end = after if self._include else end
        else:
            end = self._safe_end()
        shown, self._held = self._held[:end], self._held[end:]
        self._unheeded -= end
        return shown

    def flush(self) -> str:
        """What was held back in vain."""
        rest = "" if self.matched is not None else self._held
        self._held = ""
        return rest

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(self._unheeded - len(stop) + 1, 0))

    def _safe_end(self) -> int:
        """Where the earliest possible beginning of a stop text is in the held text."""
        for start in range(max(len(self._held) - self._longest + 1, 0), len(self._held)):
            if self._held[start] in self._first and any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)
