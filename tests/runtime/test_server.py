"""The HTTP app over the real worker loop, with a stub model and a byte tokenizer, driven by the official client."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgsnap.errors import RequestError
from fgsnap.kernels.ops import Batch, Sampled, Sampling
from fgsnap.runtime import answers, intake, protocol, server
from fgsnap.runtime import service as service_module
from fgsnap.runtime.link import Link
from fgsnap.runtime.options import EngineOptions, ServeOptions
from fgsnap.runtime.places import Places
from fgsnap.runtime.request import EngineStats
from fgsnap.snapshot import open_snapshot
from tests.doubles import ByteText, StubModel
from tests.serving import MODEL, StubWorkers, ask, client, samples, send_only, servable_snapshot, stub_service, until

ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"), ("GET", "/metrics"), ("GET", "/health"), ("GET", "/health/live"),
    ("GET", "/health/ready"), ("GET", "/health/startup"),
]  # fmt: skip
GREEDY = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def service():
    """One service for the tests that leave it as it was."""
    with stub_service() as running:
        until(lambda: running.link.state == "ready")
        yield running


@pytest.fixture(scope="module")
def api(service):
    with client(service.url) as made:
        yield made


def continuation(prompt: str, count: int) -> list[int]:
    """The greedy tokens of the stub model, without engine or server."""
    tokens = list(prompt.encode())
    for _ in range(count):
        model = StubModel(blocks=64)
        length = len(tokens)
        batch = Batch(tokens, range(length), (0, length), (length,), (range(64),), (length - 1,))
        tokens.append(model.sample(model.forward(batch), [Sampling()], [len(tokens)]).tokens[0])
    return tokens[len(prompt.encode()) :]


# ------------------------------------------------------------------------------------------------- right answers


def test_a_completion(api):
    answer = api.completions.create(prompt="hello", max_tokens=6, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.choices[0].text == ByteText().decode(continuation("hello", 6))
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs is None
    assert answer.object == "text_completion" and answer.model == MODEL
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)


def test_without_a_length_a_completion_has_sixteen_tokens(api):
    answer = api.completions.create(prompt="hello", extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage.completion_tokens == 16


def test_a_streamed_completion_is_the_plain_one_in_pieces(api):
    arguments = {**GREEDY, "prompt": "stream me", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    plain = api.completions.create(**arguments)
    chunks = list(api.completions.create(stream=True, **arguments))
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_in_a_last_chunk_without_choices(api):
    chunks = list(
        api.completions.create(
            prompt="abc", max_tokens=4, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True}, **GREEDY,
        )
    )  # fmt: skip
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4 and chunks[-1].usage.prompt_tokens == 3
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


def test_a_chat(api):
    messages = [{"role": "user", "content": "hi"}]
    answer = api.chat.completions.create(messages=messages, max_tokens=5, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.choices[0].message.content == ByteText().decode(continuation("user: hi\nassistant:", 5))
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len("user: hi\nassistant:")


def test_a_chat_may_go_on_with_its_last_message(api):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    for how, text in (
        ({"continue_final_message": True}, "user: hi\nassistant: The answer"),
        ({"add_generation_prompt": False}, "user: hi\nassistant: The answer\n"),
        ({}, "user: hi\nassistant: The answer\nassistant:"),
    ):
        answer = api.chat.completions.create(
            messages=said, max_tokens=4, extra_body={"ignore_eos": True, **how}, **GREEDY
        )
        assert answer.choices[0].message.content == ByteText().decode(continuation(text, 4))
        assert answer.usage.prompt_tokens == len(text)


def test_a_prompt_may_go_without_the_bos_and_keeps_it_when_it_is_cut(service, api, monkeypatch):
    for holder in (service.app, service.app._intake):
        monkeypatch.setattr(holder, "_text", ByteText(add_bos=True))
    found = []
    for sent in ("hello", [*b"hello"]):
        for how in ({}, {"add_special_tokens": False}, {"truncate_prompt_tokens": 3}):
            answer = api.completions.create(prompt=sent, max_tokens=1, echo=True, extra_body=how, **GREEDY)
            found.append((answer.usage.prompt_tokens, answer.choices[0].text[:2]))
    assert found == [(6, "he"), (5, "he"), (3, "lo"), (5, "he"), (5, "he"), (3, "ll")]


def test_a_streamed_chat_begins_with_the_role(api):
    arguments = {**GREEDY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    plain = api.chat.completions.create(**arguments)
    chunks = list(api.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == plain.choices[0].message.content
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens and chunks[0].object == "chat.completion.chunk"


def test_without_a_length_a_chat_may_fill_the_context(api):
    messages = [{"role": "user", "content": "hi"}]
    answer = api.chat.completions.create(messages=messages, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


def test_chats_without_a_length_run_side_by_side():
    """Each reserves the default length, not all of the cache."""
    with stub_service(default_max_tokens=20) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.05
        ask_for = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        found = []

        def one():
            found.append(api.chat.completions.create(extra_body={"ignore_eos": True}, **ask_for))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: service.link.stats and service.link.stats.running == 4)
        for thread in threads:
            thread.join()
        assert [answer.usage.completion_tokens for answer in found] == [20] * 4
        assert {answer.choices[0].finish_reason for answer in found} == {"length"}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd", "e"], ["ab", "cd", "e"]),
        (list(b"ab"), ["ab"]),
        ([list(b"ab"), list(b"cd")], ["ab", "cd"]),
    ],
)
def test_prompts_as_text_token_ids_or_lists_of_either(api, prompt, texts):
    arguments = {"prompt": prompt, "max_tokens": 4, "extra_body": {"ignore_eos": True}, **GREEDY}
    answer = api.completions.create(**arguments)
    expected = [ByteText().decode(continuation(text, 4)) for text in texts]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    assert answer.usage.prompt_tokens == sum(map(len, texts)) and answer.usage.completion_tokens == 4 * len(texts)
    streamed = [""] * len(texts)
    for chunk in api.completions.create(stream=True, **arguments):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_n_choices_differ_and_repeat_with_their_seed(api):
    arguments = {"prompt": "dice", "n": 4, "seed": 3, "max_tokens": 12, "temperature": 1.5, "model": MODEL}
    first, second = (api.completions.create(**arguments) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) == 4
    alone = api.completions.create(**{**arguments, "n": 1})
    assert alone.choices[0].text == texts[0] and first.usage.prompt_tokens == 4


def test_without_a_seed_answers_differ(api):
    arguments = {"prompt": "dice", "max_tokens": 24, "temperature": 1.5, "model": MODEL}
    assert len({api.completions.create(**arguments).choices[0].text for _ in range(3)}) == 3


def test_a_stop_token_ends_with_stop_and_is_not_shown(api):
    tokens = continuation("halt", 8)
    answer = api.completions.create(prompt="halt", max_tokens=8, extra_body={"stop_token_ids": [tokens[3]]}, **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == ByteText().decode(tokens[: tokens.index(tokens[3])])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_with_stop_and_frees_the_engine(service, api, stream):
    # A model of random bytes seldom writes whole characters, so the text is looked at before a stop is chosen from it.
    arguments = {**GREEDY, "prompt": "find a stop", "extra_body": {"ignore_eos": True}}
    text = api.completions.create(max_tokens=200, **arguments).choices[0].text
    at = next(i for i in range(20, len(text)) if text[i].isascii() and text[i] not in text[:i])
    answer = api.completions.create(max_tokens=200, stop=["never!", text[at]], stream=stream, **arguments)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].text == text[:at] and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 200
    until(lambda: all_blocks_free(service.url))


def test_completion_logprobs(api):
    answer = api.completions.create(prompt="p", max_tokens=3, logprobs=2, extra_body={"ignore_eos": True}, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 3
    for number, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert number == max(top.values()) < 0  # greedy: the very same number


def test_chat_logprobs_stream_as_they_are_in_one_piece(api):
    arguments = {
        **GREEDY, "messages": [{"role": "user", "content": "p"}], "max_tokens": 6, "logprobs": True, "top_logprobs": 3,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    plain = api.chat.completions.create(**arguments).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in api.chat.completions.create(stream=True, **arguments)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == plain and len(plain) == 6
    for entry, token in zip(plain, continuation("user: p\nassistant:", 6), strict=True):
        assert entry.bytes == ([token] if token < 256 else []) and len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob


def scores(prompt: bytes, count: int) -> list[Sampled]:
    """The stub model's logprobs of the prompt's bytes but the first, without engine or server."""
    found = []
    for length in range(1, len(prompt)):
        batch = Batch([*prompt[:length]], range(length), (0, length), (length,), (range(64),), (length - 1,))
        model = StubModel(blocks=64)
        how = Sampling(logprobs=count, target=prompt[length])
        found.append(model.sample(model.forward(batch), [how], [length]).logprobs[0])
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_begins_with_the_prompt_s(api, max_tokens, stream):
    """As lm-eval-harness scores texts: prompts of token ids, and one number in token_logprobs and in top_logprobs."""
    texts = ["score me, please", "z", "häß lich"]
    arguments = {**GREEDY, "logprobs": 1, "echo": True, "max_tokens": max_tokens, "seed": 1234, "stream": stream}
    answer = api.completions.create(prompt=[[*text.encode()] for text in texts], **arguments)
    found = pieced(answer) if stream else {choice.index: (choice.text, choice.logprobs) for choice in answer.choices}
    for index, text in enumerate(texts):
        shown, logprobs = found[index]
        size = len(text.encode())
        assert shown.startswith(text) and len(logprobs.tokens) == len(logprobs.text_offset) == size + max_tokens
        expected = scores(text.encode(), 1)
        assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1:size] == pytest.approx([one.logprob for one in expected], abs=1e-9)
        for token, number, top in zip(
            logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert top[token] == number and len(top) <= 2
        starts = [at for at, character in enumerate(text) for _ in character.encode()]
        assert logprobs.text_offset[:size] == starts
        if max_tokens:
            assert logprobs.text_offset[size] == len(text)
    if not stream:
        assert answer.usage.completion_tokens == max_tokens * len(texts)
        assert {choice.finish_reason for choice in answer.choices} == {"length"} or max_tokens == 5


def pieced(stream):
    """A stream's choices as those of one answer: by index their text and logprobs."""
    found = {}
    for chunk in stream:
        for choice in chunk.choices:
            text, logprobs = found.get(choice.index, ("", None))
            if logprobs is None:
                logprobs = choice.logprobs
            elif choice.logprobs is not None:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    getattr(logprobs, name).extend(getattr(choice.logprobs, name))
            found[choice.index] = (text + choice.text, logprobs)
    return found


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_is_scored_once_for_all_its_choices(caching):
    """Without a cache the others have their answers before the first one's prompt is scored, and are told it first."""
    workers = StubWorkers()
    workers.engine = {"prefix_caching": caching, "token_budget": 512}
    texts, count = ["score " * 20, "z" * 70], 3
    asked = {"prompt": texts, "n": count, "max_tokens": 2, "seed": 1, "model": MODEL}
    more = {"ignore_eos": True}
    with stub_service(workers) as service, client(service.url) as api:
        arguments = {**asked, "echo": True, "logprobs": 1}
        whole = api.completions.create(**arguments, extra_body=more)
        rows = sum(len(batch.rows) for batch in workers.model.model.batches)
        assert rows == sum(map(len, texts)) - len(texts) + 2 * count * len(texts)
        streamed = pieced(api.completions.create(**arguments, extra_body=more, stream=True))
        vllm_s = api.completions.create(**asked, extra_body={**more, "prompt_logprobs": 1})
        for choice, other in zip(whole.choices, vllm_s.choices, strict=True):
            text = texts[choice.index // count]
            assert choice.text.startswith(text) and streamed[choice.index] == (choice.text, choice.logprobs)
            expected = pytest.approx([one.logprob for one in scores(text.encode(), 1)], abs=1e-9)
            assert choice.logprobs.token_logprobs[1 : len(text)] == expected
            told = [
                entry[str(ord(byte))]["logprob"]
                for byte, entry in zip(text, other.prompt_logprobs, strict=True)
                if entry
            ]
            assert told == expected


def plain(answer):
    """What was told, without what differs between two answers."""
    return answer.model_dump(exclude={"id", "created"})


@pytest.mark.parametrize("asked", [{"logprobs": 2, "echo": True}, {"extra_body": {"prompt_logprobs": 2}}])
def test_many_logprobs_of_a_prompt_are_made_json_on_a_thread(api, monkeypatch, asked):
    prompts = ["häß" * 50, "and a prompt of many words " * 4]
    wanted = {"prompt": prompts, "n": 3, "seed": 5, "max_tokens": 3, "model": MODEL, **asked}
    few = api.completions.create(**wanted)
    streamed = pieced(api.completions.create(**wanted, stream=True)) if "echo" in asked else None
    threads, spell = set(), ByteText.token_bytes
    monkeypatch.setattr(
        ByteText, "token_bytes", lambda self, id: (threads.add(threading.current_thread().name), spell(self, id))[1]
    )
    monkeypatch.setattr(answers, "INLINE_ENTRIES", 0)
    monkeypatch.setattr(server, "SENT_AT_ONCE", 1000)
    assert plain(api.completions.create(**wanted)) == plain(few)
    assert threads and all(name.startswith("asyncio_") for name in threads)
    if streamed is not None:
        threads.clear()
        chunks = pieced(api.completions.create(**wanted, stream=True))
        assert chunks == streamed == {one.index: (one.text, one.logprobs) for one in few.choices}
        assert any(name.startswith("asyncio_") for name in threads)


@pytest.mark.parametrize(
    ("asked", "each", "param"),
    [
        ({"prompt_logprobs": 3}, 4, "prompt_logprobs"), ({"echo": True, "logprobs": 3}, 4, "logprobs"),
        ({"prompt_logprobs": 0, "echo": True, "logprobs": 2}, 4, "logprobs"),
        ({"prompt_logprobs": 1, "n": 2}, 4, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "n": 2, "best_of": 3}, 4, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "n": 2, "stream": True}, 4, "logprobs"),
    ],
    ids=str,
)  # fmt: skip
def test_so_many_logprobs_of_prompts_are_told_and_no_more(service, monkeypatch, asked, each, param):
    prompts = ["x" * 30, "y" * 20]
    body = {"model": MODEL, "max_tokens": 1, "prompt": prompts, **asked}
    monkeypatch.setattr(protocol, "MAX_ENTRIES", 50 * each)
    assert ask(service.url, "POST", "/v1/completions", body).status == 200
    monkeypatch.setattr(protocol, "MAX_ENTRIES", 50 * each - 1)
    reply = ask(service.url, "POST", "/v1/completions", body)
    error = reply.error()
    assert (reply.status, error["param"], error["code"]) == (400, param, "invalid_value")
    assert f"{50 * each} logprobs" in error["message"] and "50 tokens of prompt" in error["message"]
    assert "Lower " in error["message"] and (" or n," in error["message"]) == ("n" in asked)


def test_a_chat_tells_its_prompt_s_logprobs_once_for_all_choices(service, monkeypatch):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "n": 5, "prompt_logprobs": 1}
    size = len("user: x\nassistant:")
    monkeypatch.setattr(protocol, "MAX_ENTRIES", 2 * size)
    assert ask(service.url, "POST", "/v1/chat/completions", body).status == 200
    monkeypatch.setattr(protocol, "MAX_ENTRIES", 2 * size - 1)
    assert ask(service.url, "POST", "/v1/chat/completions", body).error()["param"] == "prompt_logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_without_logprobs_is_the_prompt_and_the_answer(api, stream):
    arguments = {**GREEDY, "prompt": "say it", "n": 2, "extra_body": {"ignore_eos": True}}
    plain = api.completions.create(max_tokens=4, **arguments)
    for max_tokens in (0, 4):
        answer = api.completions.create(max_tokens=max_tokens, echo=True, stream=stream, **arguments)
        found = (
            pieced(answer) if stream else {choice.index: (choice.text, choice.logprobs) for choice in answer.choices}
        )
        assert found == {n: ("say it" + plain.choices[n].text * bool(max_tokens), None) for n in (0, 1)}


def test_an_eos_where_a_score_ends_is_there_to_be_dropped(api):
    """Harnesses leave out the last logprob, of the one token they had to ask for; it must not be the prompt's."""
    model = StubModel(blocks=64)
    prompt = next(
        [n, m] for n in range(256) for m in range(256) if model_says(model, [n, m]) == ByteText.eos
    )  # fmt: skip
    answer = api.completions.create(prompt=prompt, max_tokens=1, logprobs=1, echo=True, **GREEDY)
    assert len(answer.choices[0].logprobs.tokens) == 3
    assert api.completions.create(prompt=prompt, max_tokens=1, logprobs=1, **GREEDY).choices[0].logprobs.tokens == []


def model_says(model: StubModel, tokens: list[int]) -> int:
    length = len(tokens)
    batch = Batch(tokens, range(length), (0, length), (length,), (range(64),), (length - 1,))
    return model.sample(model.forward(batch), [Sampling()], [length]).tokens[0]


def test_prompt_logprobs_are_those_of_vllm(api):
    """A field of the choice, or of a chat's body: nothing for the first token, then by token id."""
    arguments = {**GREEDY, "max_tokens": 1, "extra_body": {"prompt_logprobs": 2}}
    choice = api.completions.create(prompt="plain", **arguments).choices[0]
    chat = api.chat.completions.create(messages=[{"role": "user", "content": "x"}], **arguments)
    assert choice.logprobs is None and "plain" not in choice.text
    for told, prompt in ((choice.prompt_logprobs, b"plain"), (chat.prompt_logprobs, b"user: x\nassistant:")):
        assert told[0] is None and len(told) == len(prompt)
        for entry, token, one in zip(told[1:], prompt[1:], scores(prompt, 2), strict=True):
            assert entry.keys() == {str(token), *(str(id) for id, _ in one.top)}
            assert entry[str(token)]["logprob"] == pytest.approx(one.logprob, abs=1e-9)
            assert entry[str(token)]["decoded_token"] == bytes([token]).decode(errors="replace")
            assert [entry[str(id)]["rank"] for id, _ in one.top] == [1, 2]
    both = api.completions.create(prompt="plain", logprobs=0, echo=True, **arguments).choices[0]
    assert (
        both.prompt_logprobs == choice.prompt_logprobs
        and [len(top) for top in both.logprobs.top_logprobs[1:5]] == [1] * 4
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_stop_text_has_no_logprobs_but_is_counted(api, stream):
    arguments = {**GREEDY, "messages": [{"role": "user", "content": "cut me"}], "extra_body": {"ignore_eos": True}}
    text = api.chat.completions.create(max_tokens=200, **arguments).choices[0].message.content
    # Behind a wrong byte it is open which token is whose.
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    at = next(i for i, pair in enumerate(pairs)
              if i > 9 and (text[i - 1] + pair).isascii() and pair not in pairs[:i])  # fmt: skip
    answer = api.chat.completions.create(
        max_tokens=200, stop=pairs[at], logprobs=True, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}), **arguments,
    )  # fmt: skip
    parts = list(answer) if stream else [answer]
    entries = [
        entry
        for part in parts
        for choice in part.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]  # fmt: skip
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == text[:at]
    assert all(entry.bytes for entry in entries[-1:])
    tokens = continuation("user: cut me\nassistant:", 200)
    used = parts[-1].usage.completion_tokens
    assert used >= len(entries) + 2 and ByteText().decode(tokens[:used]) == text[: at + 2]


def test_a_bias_forces_a_token_or_bans_it(api):
    first = continuation("bias", 1)[0]
    forced = api.completions.create(prompt="bias", max_tokens=4, logit_bias={"65": 100}, **GREEDY)
    assert forced.choices[0].text == "AAAA"
    banned = api.completions.create(prompt="bias", max_tokens=1, logit_bias={str(first): -100}, logprobs=1, **GREEDY)
    assert banned.choices[0].logprobs.tokens != [bytes([first]).decode(errors="replace")]
    both = api.completions.create(prompt="bias", max_tokens=2, logit_bias={"65": 100, "66": 100}, stop="B", **GREEDY)
    assert set(both.choices[0].text) <= {"A"}


def test_an_answer_has_its_least_tokens_before_it_may_end(api):
    forced = {"logit_bias": {str(ByteText.eos): 100}, "prompt": "end", "max_tokens": 9}
    assert api.completions.create(**forced, **GREEDY).usage.completion_tokens == 0
    answer = api.completions.create(**forced, extra_body={"min_tokens": 5}, **GREEDY)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "stop")
    stops = {"stop_token_ids": [65], "min_tokens": 3}
    answer = api.completions.create(prompt="end", max_tokens=9, logit_bias={"65": 90}, extra_body=stops, **GREEDY)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "stop")


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_turns_away_from_what_was_said(api, penalty):
    arguments = {"prompt": "again", "max_tokens": 24, "logit_bias": {"65": 6.5}, **GREEDY}
    plain = api.completions.create(extra_body={"ignore_eos": True}, **arguments).choices[0].text
    held = api.completions.create(extra_body={"ignore_eos": True, penalty: 2}, **arguments).choices[0].text
    assert plain.count("A") > held.count("A") + 3 and held[0] == plain[0]


def test_the_best_of_several_answers_is_the_likeliest(api):
    arguments = {"prompt": "best", "max_tokens": 6, "temperature": 1.5, "seed": 4, "model": MODEL, "logprobs": 0}
    made = api.completions.create(n=6, extra_body={"ignore_eos": True}, **arguments)
    best = api.completions.create(n=2, best_of=6, extra_body={"ignore_eos": True}, **arguments)
    ranked = sorted(made.choices, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == made.usage and best.usage.completion_tokens == 36


def test_a_stop_text_ends_each_candidate_by_itself(api):
    arguments = {"prompt": "many", "max_tokens": 60, "temperature": 1.5, "seed": 8, "n": 4, "model": MODEL}
    bias = {"97": 9, "98": 9, "99": 9}
    whole = api.completions.create(logit_bias=bias, extra_body={"ignore_eos": True}, **arguments)
    cut = api.completions.create(
        logit_bias=bias, stop=["abc", "ca", "zzz"], extra_body={"ignore_eos": True}, **arguments
    )
    for one, other in zip(whole.choices, cut.choices, strict=True):
        ends = [one.text.find(stop) for stop in ("abc", "ca") if stop in one.text]
        assert other.text == one.text[: min(ends)] if ends else other.text == one.text
        assert other.finish_reason == ("stop" if ends else "length")
    assert {choice.finish_reason for choice in cut.choices} >= {"stop"}


def test_time_is_up_with_504():
    with stub_service() as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.02
        late = {"prompt": "slow", "model": MODEL, "max_tokens": 200, "extra_body": {"ignore_eos": True, "timeout": 0.2}}
        with pytest.raises(openai.InternalServerError) as caught:
            api.completions.create(**late)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match="out of time"):
            for _ in api.completions.create(stream=True, **late):
                pass
        until(lambda: all_blocks_free(service.url))


def late(service, **fields) -> str:
    """The message to a request that runs out of time, long before it is heard of a silent engine again."""
    began = time.monotonic()
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "late", "timeout": 0.2, **fields})
    assert (reply.status, reply.error()["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - began < server.KEEP_ALIVE_SECONDS / 2
    return reply.error()["message"]


def test_the_time_that_the_engine_takes_to_start_counts():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers) as service:
        assert "timeout of 0.2 s" in late(service)
        workers.may_begin.set()
        until(lambda: service.link.state == "ready")
        assert service.app.open == 0 and service.link.stats is None, "the engine never heard of it"


def test_the_time_that_is_spent_waiting_is_not_the_engine_s(monkeypatch):
    workers, submitted = StubWorkers(), []
    workers.may_begin.clear()
    with stub_service(workers) as service:
        submit = service.link.submit
        monkeypatch.setattr(service.link, "submit", lambda one, inbox: (submitted.append(one), submit(one, inbox)))
        with send_only(service.url, "/v1/completions", {"prompt": "x", "timeout": 60, "n": 2}):
            until(lambda: service.app.open == 1)
            time.sleep(0.3)
            workers.may_begin.set()
            until(lambda: len(submitted) == 2)
    assert all(50 < request.timeout < 59.75 for request in submitted)


def test_the_time_that_tokenizing_takes_counts(service, monkeypatch):
    may_go_on = threading.Event()
    monkeypatch.setattr(ByteText, "encode", lambda self, text, **how: may_go_on.wait(10) and [1, 2, 3])
    monkeypatch.setattr(intake, "INLINE", 0)
    late(service)
    may_go_on.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_stands_still_does_not_stretch_the_time(stream):
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.may_step.clear()
        assert "timeout of 0.2 s" in late(service, stream=stream)
        service.workers.model.may_step.set()
        until(lambda: all_blocks_free(service.url))


def test_a_stream_that_has_begun_ends_in_time_though_the_worker_stands_still():
    with stub_service() as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        options = {"ignore_eos": True, "timeout": 0.5}
        stream = api.completions.create(prompt="x", model=MODEL, max_tokens=200, stream=True, extra_body=options)
        next(stream)
        service.workers.model.may_step.clear()
        with pytest.raises(openai.APIError, match="out of time"):
            list(stream)
        service.workers.model.may_step.set()


def test_keys_take_turns_and_priorities_count_within_them():
    workers = StubWorkers()
    workers.engine = {"max_sequences": 1}
    with stub_service(workers, keys=(b"one", b"two")) as service:
        until(lambda: service.link.state == "ready")
        workers.model.may_step.clear()
        order: list[str] = []

        def one(name, key, **fields):
            body = {"prompt": "x", "max_tokens": 2, "ignore_eos": True, **fields}
            assert ask(service.url, "POST", "/v1/completions", body, authorization=f"Bearer {key}").status == 200
            order.append(name)

        asked = [("now", "one", {}), ("a", "one", {}), ("b", "one", {}), ("c", "two", {})]
        asked += [("low", "two", {"priority": 1}), ("high", "one", {"priority": -1})]
        threads = []
        for count, (name, key, fields) in enumerate(asked, 1):
            threads.append(threading.Thread(target=one, args=(name, key), kwargs=fields))
            threads[-1].start()
            until(lambda count=count: len(service.link._open) == count)
        workers.model.delay = 0.02  # so that they are told one after the other
        workers.model.may_step.set()
        for thread in threads:
            thread.join()
        # The first runs when the others come.
        assert order == ["now", "c", "high", "a", "low", "b"]


def test_choices_share_their_prompt_and_other_salts_do_not(service, api):
    before = samples(service.url)
    prompt = "a prompt of forty characters, which is it"
    arguments = {"prompt": prompt, "n": 3, "max_tokens": 2, "temperature": 1, "model": MODEL}
    for salt, cached in (("s1", 80), ("s1", 120), ("s2", 80)):
        answer = api.completions.create(extra_body={"cache_salt": salt, "ignore_eos": True}, **arguments)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 6)
        until(lambda: all_blocks_free(service.url))
        after = samples(service.url)
        assert after["fgsnap_prompt_tokens_cached_total"] - before["fgsnap_prompt_tokens_cached_total"] == cached
        assert after["fgsnap_prompt_tokens_total"] - before["fgsnap_prompt_tokens_total"] == 3 * len(prompt)
        before = after


def test_a_prompt_cache_that_is_off_shares_nothing_and_answers_the_same(api):
    workers = StubWorkers()
    workers.engine = {"prefix_caching": False}
    arguments = {
        "prompt": "just the same prompt",
        "n": 2,
        "max_tokens": 6,
        "extra_body": {"ignore_eos": True},
        **GREEDY,
    }
    with stub_service(workers) as service, client(service.url) as other:
        answers = [other.completions.create(**arguments).choices[0].text for _ in range(2)]
        assert answers == [api.completions.create(**arguments).choices[0].text] * 2
        assert samples(service.url)["fgsnap_prompt_tokens_cached_total"] == 0


def test_answers_are_the_same_after_preemption():
    workers = StubWorkers(blocks=24)
    workers.engine = {"admission": "optimistic"}
    with stub_service(workers) as service, client(service.url) as api:
        answer = api.completions.create(
            prompt=["first", "second", "third"], max_tokens=40, logprobs=1, extra_body={"ignore_eos": True}, **GREEDY
        )
        expected = [ByteText().decode(continuation(prompt, 40)) for prompt in ("first", "second", "third")]
        assert [choice.text for choice in answer.choices] == expected and answer.usage.completion_tokens == 120
        now = samples(service.url)
        assert now["fgsnap_preemptions_total"] > 0 and now["fgsnap_recomputed_tokens_total"] > 0
        assert now["fgsnap_kv_blocks_free"] == now["fgsnap_kv_blocks"]


def test_many_at_once_get_what_each_gets_alone(api):
    prompts = [f"prompt {number}" for number in range(16)]
    found: dict[str, str] = {}

    def one(prompt):
        answer = api.completions.create(prompt=prompt, max_tokens=10, extra_body={"ignore_eos": True}, **GREEDY)
        found[prompt] = answer.choices[0].text

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: ByteText().decode(continuation(prompt, 10)) for prompt in prompts}


def test_long_texts_are_tokenized_aside(service, monkeypatch):
    names = []
    encode = ByteText.encode

    def noted(self, text, **how):
        names.append(threading.current_thread().name)
        return encode(self, text, **how)

    monkeypatch.setattr(ByteText, "encode", noted)
    monkeypatch.setattr(intake, "INLINE", 40)
    for prompt in ("short", "a longer text"):
        assert ask(service.url, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1}).status == 200
    assert names[0] != names[1]


def test_the_model_is_listed(api):
    (card,) = api.models.list().data
    assert card.id == MODEL and card.max_model_len == 256
    assert api.models.retrieve(MODEL).id == MODEL


def test_headers(service):
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, x_request_id="mine")
    assert reply.headers["x-request-id"] == "mine" and "server" not in reply.headers
    assert len(ask(service.url, "GET", "/v1/models").headers["x-request-id"]) == 16
    stream = ask(service.url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True})
    assert stream.headers["content-type"] == "text/event-stream" and stream.body.endswith(b"data: [DONE]\n\n")


# ------------------------------------------------------------------------------------------------- wrong requests


def test_the_client_sees_its_mistakes_as_the_errors_it_knows(api):
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(prompt="x", model=MODEL, max_tokens=0)
    assert caught.value.param == "max_tokens" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(prompt="x", model="gpt-5")
    assert missing.value.code == "model_not_found" and "gpt-5" in missing.value.message
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        api.completions.create(prompt="x", model=MODEL, suffix="y")
    with pytest.raises(openai.BadRequestError, match="No role 'wizard'"):
        api.chat.completions.create(messages=[{"role": "wizard", "content": "x"}], model=MODEL)


@pytest.mark.parametrize("stream", [False, True])
def test_beyond_the_context_the_answer_has_the_arithmetic(api, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(prompt="x" * 250, max_tokens=7, model=MODEL, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 256 tokens; the request needs 257: 250 of prompt + 7" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_a_400_also_for_a_stream(stream):
    with stub_service(StubWorkers(blocks=8)) as service, client(service.url) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.completions.create(prompt="x" * 40, max_tokens=10, model=MODEL, stream=stream)
        assert (
            caught.value.code == "kv_cache_exceeded" and "13 blocks of 4, but the cache has 8" in caught.value.message
        )
        assert all_blocks_free(service.url)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt":' + b"[" * 500_000, 400),
        (b'{"prompt":"\xff"}', 400),
        (b'{"prompt": 5}', 400),
        (b'{"messages": "x"}', 400),
        (b'{"prompt": ""}', 400),
    ],
)
def test_bad_bodies(service, body, status):
    reply = ask(service.url, "POST", "/v1/completions", body)
    assert reply.status == status and set(reply.error()) == {"message", "type", "param", "code"}


WRONG = [
    ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", 9), ("frequency_penalty", "x"),
    ("logit_bias", {"999": 1}), ("logit_bias", {"1": 1000}), ("min_tokens", 99), ("best_of", 0), ("priority", 0.5),
    ("timeout", 0), ("cache_salt", ""), ("echo", 5), ("prompt_logprobs", 99), ("stop", ["x"] * 10**5),
    ("logit_bias", {str(i): 1 for i in range(75_000)}),
    ("prompt", [[1]] * 1000), ("prompt", ["x"] * 129), ("prompt", [5] * 100_000), ("temperature", 1e300),
    ("n", 10**300), ("seed", 2**64), ("max_tokens", 2**31),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field} {n}" for n, (field, _) in enumerate(WRONG)])
def test_a_wrong_option_is_refused_in_no_time_and_the_engine_does_not_hear_of_it(service, field, value):
    body = json.dumps({"prompt": "x", "max_tokens": 5, field: value}).encode()
    before, took = service.link.stats, []
    for _ in range(4):
        began = time.monotonic()
        reply = ask(service.url, "POST", "/v1/completions", body)
        took.append(time.monotonic() - began)
        assert (reply.status, reply.error()["type"]) == (400, "invalid_request_error")
        assert reply.error()["param"] == field
    assert service.link.stats is before and not service.link._open
    assert min(took) < 0.05


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 5e-324}, {"repetition_penalty": 10, "temperature": 0.00001}, {"temperature": 5e-324},
        {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 0.001}, {"top_p": 5e-324},
        {"min_p": 1, "top_k": 2**31, "seed": -(2**63)}, {"logit_bias": {str(i): -100 for i in range(258)}},
        {"stop_token_ids": [*range(64)], "min_tokens": 8}, {"priority": -(2**31)}, {"priority": 2**31},
        {"prompt_logprobs": 20, "echo": True, "logprobs": 20}, {"timeout": 1e6, "cache_salt": "\U0001f600" * 256},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_at_its_limit_is_answered(service, api, extreme):
    arguments = {"prompt": "aaa", "max_tokens": 8, **extreme}
    assert ask(service.url, "POST", "/v1/completions", {"model": MODEL, **arguments}).status == 200
    assert service.link.restarts == 0


def test_unknown_routes_and_methods_are_answered_in_the_same_form(service):
    assert ask(service.url, "GET", "/v2/nothing").error()["type"] == "invalid_request_error"
    assert ask(service.url, "GET", "/v2/nothing").status == 404
    assert ask(service.url, "GET", "/v1/completions").status == 405
    assert ask(service.url, "DELETE", "/v1/models").error()["message"]


def test_a_body_beyond_the_limit_is_a_413_and_is_not_kept(service):
    assert ask(service.url, "POST", "/v1/completions", b"x" * (server.BODY_LIMIT + 1)).status == 413
    assert ask(service.url, "POST", "/v1/completions", b"x" * server.BODY_LIMIT).status == 400


def test_a_body_in_endless_chunks_is_cut(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(1000):
                connection.sendall(chunk)
    assert ask(service.url, "GET", "/health/live").status == 200


@pytest.mark.parametrize("header", [b"x: " + b"y" * (2 << 20), b"x: y\r\n" * 400_000], ids=["long", "many"])
def test_a_flood_of_headers_is_cut(service, header):
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        sent = 0
        try:
            for start in range(0, len(head := b"GET / HTTP/1.1\r\nhost: x\r\n" + header), 1 << 16):
                connection.sendall(head[start : start + (1 << 16)])
                sent += 1 << 16
            answer = connection.recv(64)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
    assert answer[:12] in (b"", b"HTTP/1.1 431")
    assert ask(service.url, "GET", "/health/live").status == 200


def test_a_body_that_does_not_come_is_given_up(service, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(64).startswith(b"HTTP/1.1 408")
    until(lambda: service.app.open == 0)


def test_a_server_error_tells_nothing_of_the_inside(service, monkeypatch, capfd):
    monkeypatch.setattr(ByteText, "encode", lambda self, text, **how: 1 / 0)
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x"})
    assert reply.status == 500 and "division" not in reply.body.decode()
    assert "ZeroDivisionError" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- keys


def test_without_a_key_only_health_is_answered():
    with stub_service(keys=(b"first", b"second")) as service:
        until(lambda: service.link.state == "ready")
        assert {(method, route.path.replace("{name:path}", MODEL)) for route in service.app.routes.table
                for method in route.methods - {"HEAD"}} == set(ROUTES)  # fmt: skip
        for method, path in [*ROUTES, ("GET", "/nothing"), ("PUT", "/v1/completions"), ("GET", "//v1/models")]:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic first"},
                {"x_api_key": "first"},
            ):
                status = ask(service.url, method, path, {} if method == "POST" else None, **headers).status
                assert (status == 401) == (path not in server.PUBLIC), (method, path, headers)
        for key in ("first", "second"):
            assert ask(service.url, "GET", "/v1/models", authorization=f"bearer {key}").status == 200
        with client(service.url, "wrong") as api, pytest.raises(openai.AuthenticationError):
            api.models.list()
        with client(service.url, "first") as api:
            assert api.completions.create(prompt="x", model=MODEL, max_tokens=1).usage.completion_tokens == 1


# -------------------------------------------------------------------------------------------- clients that leave


def all_blocks_free(url) -> bool:
    now = samples(url)
    return now.get("fgsnap_kv_blocks_free") == now.get("fgsnap_kv_blocks") and now.get("fgsnap_requests_running") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_is_noticed_and_its_blocks_are_free(path, stream):
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.02
        asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
        body = {**asked, "n": 3, "max_tokens": 200, "ignore_eos": True, "stream": stream}
        with send_only(service.url, path, body):
            until(lambda: service.link.stats and service.link.stats.generated_tokens > 6)
        until(lambda: not service.link._open, what="the server notices")
        steps = service.link.stats.steps
        until(lambda: service.link.stats.kv_blocks_free == service.link.stats.kv_blocks, what="blocks are free")
        assert service.link.stats.steps - steps <= 2, "the step under way, and one more at most"
        assert all_blocks_free(service.url)
        until(lambda: service.app.open == 0)


@pytest.mark.parametrize(
    "options", [{"n": 3}, {"echo": True, "logprobs": 2, "prompt": "y" * 200}, {"n": 3, "best_of": 5}]
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_blocks_are_free_whenever_a_client_leaves(options, steps):
    """While its prompt is read, while it is scored, while some of its choices wait, and while it answers."""
    workers = StubWorkers()
    workers.engine = {"max_sequences": 2}
    with stub_service(workers) as service:
        until(lambda: service.link.state == "ready")
        workers.model.delay = 0.02
        body = {"prompt": "x" * 100, "max_tokens": 40, "ignore_eos": True, **options}
        with send_only(service.url, "/v1/completions", body):
            until(lambda: service.link.stats and service.link.stats.steps >= steps)
        until(lambda: all_blocks_free(service.url) and samples(service.url)["fgsnap_requests_waiting"] == 0)
        assert service.link.stats.steps <= steps + 4 and service.link.stats.waiting_tokens == 0
        until(lambda: service.app.open == 0)


def test_a_tokenizer_that_fails_amid_a_stream_is_told_to_that_client_alone(service, monkeypatch, capfd):
    monkeypatch.setattr(ByteText, "decode", lambda self, ids: 1 / 0 if 33 in ids else "?")
    asked = {"max_tokens": 6, "ignore_eos": True, "logit_bias": {"33": 100}}
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", "stream": True, "echo": True, **asked})
    *_, error, done, _ = reply.body.split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "internal_error" and done == b"data: [DONE]"
    assert ask(service.url, "POST", "/v1/completions", {"prompt": "x", **asked}).status == 500
    assert (
        ask(service.url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, "logit_bias": {"34": 100}}).status
        == 200
    )
    assert "ZeroDivisionError" in capfd.readouterr().err
    until(lambda: all_blocks_free(service.url))


def test_a_client_that_shuts_its_sending_half_counts_as_gone():
    """TCP tells the same of it as of one that closed, and the answer of one that closed must not go on."""
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.02
        body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
        with send_only(service.url, "/v1/completions", body) as connection:
            until(lambda: service.link.stats and service.link.stats.generated_tokens > 2)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(64) == b""
        until(lambda: not service.link._open and all_blocks_free(service.url))
        text = ask(service.url, "GET", "/metrics").body.decode()
        assert 'fgsnap_http_responses_total{route="/v1/completions",status="499"} 1.0' in text


def test_a_client_that_leaves_before_the_engine_is_ready_is_forgotten():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers) as service:
        with send_only(service.url, "/v1/completions", {"prompt": "x", "max_tokens": 5}):
            until(lambda: service.app.open == 1)
        until(lambda: service.app.open == 0)
        workers.may_begin.set()
        until(lambda: service.link.state == "ready")
        assert ask(service.url, "GET", "/health/ready").status == 200
        assert service.link.stats is None, "nothing was ever submitted"


def test_one_hundred_clients_that_come_and_go_leave_nothing_behind():
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.002
        for number in range(100):
            body = {"prompt": f"{number}", "max_tokens": 50, "stream": number % 2 == 0}
            with send_only(service.url, "/v1/completions", body) as connection:
                if number % 3 == 0:
                    time.sleep(0.01)
                elif number % 3 == 1 and number % 2 == 0:
                    connection.recv(10)
        until(lambda: service.app.open == 0 and all_blocks_free(service.url))
        assert not service.link._open


# ----------------------------------------------------------------------------------------- the engine's condition


def test_early_requests_are_held_and_then_answered():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers) as service, client(service.url) as api:
        assert ask(service.url, "GET", "/health/live").status == 200
        assert ask(service.url, "GET", "/health").status == ask(service.url, "GET", "/health/ready").status == 503
        assert ask(service.url, "GET", "/health/ready").json() == {"status": "starting"}
        assert ask(service.url, "GET", "/v1/models").json()["data"][0]["max_model_len"] is None
        answers = []
        threads = [
            threading.Thread(target=lambda n=n: answers.append(api.completions.create(prompt="x", model=MODEL, n=n)))
            for n in (1, 2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: samples(service.url)["fgsnap_requests_held"] == 2)
        assert not answers
        workers.may_begin.set()
        for thread in threads:
            thread.join(10)
        assert sorted(len(answer.choices) for answer in answers) == [1, 2]


def test_before_the_engine_is_ready_the_model_s_context_is_the_limit():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers) as service:
        service.app._identity = service.app._identity._replace(max_length=1000)
        reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x" * 20_000})
        assert reply.status == 400 and "is 1000 tokens; the prompt has at least" in reply.error()["message"]
        assert service.link.state == "starting"


@pytest.mark.parametrize(("asked", "length"), [(None, 256), (100, 100)])
def test_the_longest_context_is_the_model_s_or_the_one_asked_for(tmp_path, asked, length):
    with open_snapshot(servable_snapshot(tmp_path / "snap", canary="none")) as snapshot:
        options = ServeOptions(snapshot="snap", engine=EngineOptions(max_model_len=asked))
        assert service_module._identity(options, snapshot).max_length == length


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_dies_fails_its_requests_and_is_replaced(stream):
    with stub_service() as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.01
        service.on_loop(
            lambda: service._loop.call_later(0.2, setattr, service.workers.model, "raises", OSError("gone"))
        )
        with pytest.raises(openai.APIError, match="engine"):
            answer = api.completions.create(
                prompt="x", model=MODEL, max_tokens=250, stream=stream, extra_body={"ignore_eos": True}
            )
            for _ in answer:
                pass
        until(lambda: service.link.state == "ready" and service.link.restarts == 1)
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=3).choices
        assert "The engine failed. OSError: gone" in service.told[0]
        assert samples(service.url)["fgsnap_worker_restarts_total"] == 1


def test_requests_that_come_while_the_engine_is_replaced_are_held():
    workers = StubWorkers()
    with stub_service(workers) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        workers.may_begin.clear()
        workers.model.raises = OSError("gone")
        with pytest.raises(openai.InternalServerError) as caught:
            api.completions.create(prompt="x", model=MODEL)
        assert caught.value.status_code == 503 and caught.value.code == "unavailable"
        assert caught.value.response.headers["retry-after"] == "1"
        until(lambda: workers.started == 2)
        assert ask(service.url, "GET", "/health/ready").json() == {"status": "restarting"}
        threading.Timer(0.1, workers.may_begin.set).start()
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=3).choices


def test_a_stalled_worker_is_told_and_replaced():
    with stub_service(stall_seconds=0.4) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        hung = service.workers.model
        service.workers.may_begin.clear()
        hung.may_step.clear()
        with pytest.raises(openai.InternalServerError, match="stalled") as caught:
            api.completions.create(prompt="x", model=MODEL)
        assert caught.value.response.headers["retry-after"] == "1"
        service.workers.may_begin.set()
        until(lambda: service.link.state == "ready")
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=3).choices
        assert "stalled" in service.told[0] and service.link.restarts == 1


def test_while_stalled_ready_says_so_and_live_stays():
    workers = StubWorkers()
    with stub_service(workers, stall_seconds=0.3) as service:
        until(lambda: service.link.state == "ready")
        start = workers.start

        def replacement_that_takes_long():
            workers.may_begin.clear()
            return start()

        service.link._start = replacement_that_takes_long
        workers.model.may_step.clear()
        with send_only(service.url, "/v1/completions", {"prompt": "x"}):
            until(lambda: ask(service.url, "GET", "/health/ready").json() == {"status": "stalled"})
            assert ask(service.url, "GET", "/health/ready").status == 503
            assert ask(service.url, "GET", "/health/live").status == 200
        workers.may_begin.set()
        until(lambda: service.link.state == "ready")
        assert ask(service.url, "GET", "/health/ready").json() == {"status": "ready"}


def test_an_idle_engine_is_not_stalled():
    with stub_service(stall_seconds=0.1) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        time.sleep(0.5)
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=3).choices and service.link.restarts == 0


def test_a_first_start_that_fails_ends_the_service():
    workers = StubWorkers()
    workers.fail_starts = 1
    with stub_service(workers) as service:
        until(lambda: service.failure)
        assert service.failure.what == "The engine failed." and workers.started == 1
        reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x"})
        assert reply.status == 503 and reply.error()["type"] == "server_error"


def test_a_first_start_that_hangs_ends_the_service():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers, start_seconds=0.2) as service:
        with send_only(service.url, "/v1/completions", {"prompt": "x"}) as connection:
            until(lambda: service.failure)
            assert connection.recv(64).startswith(b"HTTP/1.1 503")
        assert service.failure.lines()[:2] == [
            "The engine hung while it started.",
            "Nothing was heard of it for 0.2 s.",
        ]
        assert workers.started == 1


def test_a_replacement_that_hangs_is_replaced(monkeypatch):
    from fgsnap.runtime import link

    async def no_time(seconds):
        pass

    monkeypatch.setattr(link, "backoff", no_time)
    workers = StubWorkers()
    with stub_service(workers, start_seconds=0.2) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        workers.may_begin.clear()
        workers.model.raises = OSError("gone")
        assert ask(service.url, "POST", "/v1/completions", {"prompt": "x"}).status == 503
        until(lambda: service.link.restarts == 2 and service.link.state == "ready")
        assert "hung while it started" in service.told[1] and "0.2 s" in service.told[1]
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=3).choices


def test_replacements_are_tried_again_and_again(monkeypatch):
    from fgsnap.runtime import link

    slept = []

    async def no_time(seconds):
        slept.append(seconds)

    monkeypatch.setattr(link, "RETRIES", 2)
    monkeypatch.setattr(link, "backoff", no_time)
    workers = StubWorkers()
    with stub_service(workers) as service:
        until(lambda: service.link.state == "ready")
        workers.fail_starts = 9
        workers.model.raises = OSError("gone")
        assert ask(service.url, "POST", "/v1/completions", {"prompt": "x"}).status == 503
        until(lambda: service.failure)
        assert workers.started == 4 and slept == [0.0, 1.0, 2.0]


def test_an_error_in_the_middle_of_a_stream_is_a_chunk_that_clients_see():
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.01
        service.on_loop(
            lambda: service._loop.call_later(0.3, setattr, service.workers.model, "raises", OSError("gone"))
        )
        body = {"prompt": "x", "max_tokens": 250, "stream": True, "ignore_eos": True}
        reply = ask(service.url, "POST", "/v1/completions", body)
        *_, error, done, rest = reply.body.split(b"\n\n")
        assert reply.status == 200 and done == b"data: [DONE]" and not rest
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "unavailable"


def test_a_nan_is_an_error_of_that_request_only():
    with stub_service(StubWorkers(nan_after=ord("!"))) as service, client(service.url) as api:
        with pytest.raises(openai.InternalServerError, match="no finite logit") as caught:
            api.completions.create(prompt="x!", model=MODEL)
        assert caught.value.status_code == 500
        assert api.completions.create(prompt="x", model=MODEL, max_tokens=2).choices
        assert service.link.restarts == 0


def test_when_full_it_says_so():
    workers = StubWorkers()
    workers.may_begin.clear()
    with stub_service(workers, max_open=2) as service:
        with (
            send_only(service.url, "/v1/completions", {"prompt": "x"}),
            send_only(service.url, "/v1/completions", {"prompt": "x"}),
        ):
            until(lambda: service.app.open == 2)
            reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x"})
            assert reply.status == 429 and reply.headers["retry-after"] == "1"
            assert reply.error()["type"] == "rate_limit_error"
        until(lambda: service.app.open == 0)


def test_more_choices_than_may_run_and_wait_are_told_when_to_come_again():
    """One rule: as many as run at once, and as many as may wait beside them, over all requests."""
    workers = StubWorkers()
    workers.engine = {"max_sequences": 2, "max_waiting": 3}
    with stub_service(workers) as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        workers.model.delay = 0.1
        body = {"prompt": "x" * 40, "n": 5, "max_tokens": 60, "ignore_eos": True}
        with send_only(service.url, "/v1/completions", body):
            until(lambda: service.link.stats and service.link.stats.generated_tokens > 4)
            stats = service.link.stats
            assert (stats.running, stats.waiting, stats.waiting_tokens) == (2, 3, 3 * 100)
            with pytest.raises(openai.RateLimitError, match="2 choices run and 3 wait") as caught:
                api.completions.create(prompt="x", model=MODEL, stream=True)
            # Three of 100 tokens wait, and some twenty a second come, after the prompts at least.
            assert 3 <= int(caught.value.response.headers["retry-after"]) <= 60
            assert caught.value.code == "overloaded" and service.link.stats.waiting == 3
        until(lambda: all_blocks_free(service.url))
        workers.model.delay = 0.0
        assert len(api.completions.create(prompt="x", model=MODEL, n=5).choices) == 5


@pytest.mark.parametrize(("count", "keys", "own"), [(8, 0, 0), (8, 1, 0), (8, 2, 2), (8, 8, 1), (5, 3, 1), (2, 3, 0)])
def test_no_key_can_take_the_places_that_others_are_entitled_to(count, keys, own):
    places = Places(count, keys)
    most = count - own * max(0, keys - 1)
    for _ in range(most):
        places.take("0", 1)
    with pytest.raises(RequestError) as refused:
        places.take("0", 1)
    assert refused.value.status == 429 and ("API key" in refused.value.what) == (own > 0)
    for key in map(str, range(1, keys)):
        for _ in range(own):
            places.take(key, 1)
        with pytest.raises(RequestError) as refused:
            places.take(key, 1)
        assert refused.value.status == 429
    places.give_back("0", most)
    places.take("0", most)


@given(
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), max_size=60),
    count=st.integers(1, 40),
    keys=st.integers(2, 4),
)
def test_whatever_others_do_a_key_gets_its_part_of_the_places(moves, count, keys):
    places, taken = Places(count, keys), Counter()
    for number, change in moves:
        key = str(number % keys)
        if change < 0:
            back = min(-change, taken[key])
            places.give_back(key, back)
            taken[key] -= back
        elif change:
            try:
                places.take(key, change)
            except RequestError as error:
                own = max(1, count // (2 * keys)) if keys <= count else 0
                assert taken[key] + change > own, "its own place was refused"
                assert (error.status == 400) == (change > count - own * (keys - 1))
            else:
                taken[key] += change
        assert taken.total() <= count


def test_no_more_places_are_given_than_an_engine_with_a_small_budget_has():
    options = EngineOptions(max_num_seqs=256, max_waiting=6)
    places = Places(options.most_live(), 2)
    assert (options.most_live(), options.most_live(32)) == (262, 38)
    places.resize(options.most_live(32))
    places.take("0", 38 - 38 // 4)
    with pytest.raises(RequestError, match="of the 9 free places others keep 9"):
        places.take("0", 1)


def test_who_has_a_place_keeps_it_where_there_are_fewer_now():
    places = Places(4, 0)
    places.take("", 4)
    places.resize(3)
    places.take("", 0, 1)
    with pytest.raises(RequestError, match="full"):
        places.take("", 1)


def test_a_key_that_fills_the_queue_leaves_places_to_the_others():
    workers = StubWorkers()
    workers.engine = {"max_sequences": 2, "max_waiting": 6}
    with stub_service(workers, keys=(b"one", b"two"), max_open=8) as service:
        until(lambda: service.link.state == "ready")
        workers.model.may_step.clear()
        body = {"prompt": "x", "max_tokens": 2}
        threads, replies = [], {"one": [], "two": []}

        def send(key: str, count: int, **fields) -> None:
            def one() -> None:
                reply = ask(service.url, "POST", "/v1/completions", {**body, **fields}, authorization=f"Bearer {key}")
                replies[key].append(reply)

            new = [threading.Thread(target=one) for _ in range(count)]
            for thread in new:
                thread.start()
            threads.extend(new)

        many = ask(service.url, "POST", "/v1/completions", {**body, "n": 7}, authorization="Bearer one")
        assert (many.status, many.error()["param"]) == (400, "n"), "which it can never have"
        send("one", 8)
        until(lambda: len(replies["one"]) == 2 and service.app.open == 6, what="two of the first key's are refused")
        for reply in replies["one"]:
            assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
            why = "6 choices of this API key run or wait, and of the 2 free places others keep 2"
            assert why in reply.error()["message"]
        send("two", 1, n=2)
        until(lambda: service.app.open == 7)
        send("two", 1)
        until(lambda: replies["two"])
        assert replies["two"][0].status == 429 and "8 choices run or wait" in replies["two"][0].body.decode()
        workers.model.may_step.set()
        for thread in threads:
            thread.join()
        assert sorted(reply.status for reply in replies["one"]) == [200] * 6 + [429] * 2
        assert sorted(reply.status for reply in replies["two"]) == [200, 429]
        until(lambda: service.app.places._taken.total() == 0)


@pytest.mark.parametrize(
    ("fields", "param", "choices"),
    [
        ({"n": 9}, "n", 9),
        ({"best_of": 16}, "best_of", 16),
        ({"prompt": ["x"] * 9}, "prompt", 9),
        ({"prompt": ["x"] * 5, "n": 2}, "n", 10),
    ],
    ids=str,
)
def test_what_never_has_a_place_is_not_told_to_come_again(fields, param, choices):
    with stub_service(max_open=8) as service:
        reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", **fields})
        assert (reply.status, reply.error()["param"]) == (400, param) and "retry-after" not in reply.headers
        assert f"asks for {choices} choices. At most 8" in reply.error()["message"]


def test_when_to_come_again_is_bounded_and_by_what_is_known():
    stats = EngineStats(1, 1, 8, 8, prompt_tokens=0, generated_tokens=0, steps=0, waiting_tokens=10**9)
    link = Link(None, tell=print)
    assert link.retry_after() == 1, "nothing is known yet"
    link._start_took = 7.2
    assert link.retry_after() == 8, "as long as the last start took"
    link.state, link.stats = "ready", stats
    assert link.retry_after() == 60
    link.stats = EngineStats(1, 0, 8, 8, prompt_tokens=0, generated_tokens=0, steps=0)
    assert link.retry_after() == 1
    link.state = "stopping"
    assert link.retry_after() == 1


def test_while_draining_new_requests_go_elsewhere_and_old_ones_finish():
    with stub_service() as service, client(service.url) as api:
        until(lambda: service.link.state == "ready")
        service.workers.model.delay = 0.02
        stream = api.completions.create(
            prompt="x", model=MODEL, max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        service.app.draining = True
        reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x"})
        assert reply.status == 503 and reply.headers["retry-after"] == "1" and reply.headers["connection"] == "close"
        assert ask(service.url, "GET", "/health/ready").json() == {"status": "draining"}
        assert ask(service.url, "GET", "/health/live").status == 200
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_silent_engine_is_bridged_by_comments(monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.05)
    with stub_service() as service:
        until(lambda: service.link.state == "ready")
        service.workers.model.may_step.clear()
        threading.Timer(0.4, service.workers.model.may_step.set).start()
        body = {"prompt": "x", "max_tokens": 2, "stream": True, "ignore_eos": True}
        reply = ask(service.url, "POST", "/v1/completions", body)
        assert reply.body.startswith(b": still working\n\n") and reply.body.endswith(b"data: [DONE]\n\n")


# ------------------------------------------------------------------------------------------------------- metrics


def test_metrics_count(service, api):
    before = samples(service.url)
    api.completions.create(prompt="count me", max_tokens=5, extra_body={"ignore_eos": True}, **GREEDY)
    after = samples(service.url)
    grown = {name: after[name] - before[name] for name in after if name.startswith("fgsnap_")}
    assert grown["fgsnap_prompt_tokens_total"] == 8 and grown["fgsnap_generated_tokens_total"] == 5
    assert grown["fgsnap_time_to_first_token_seconds_count"] == grown["fgsnap_request_seconds_count"] == 1
    assert grown["fgsnap_inter_token_seconds_count"] == 4
    text = ask(service.url, "GET", "/metrics").body.decode()
    assert 'fgsnap_choices_finished_total{reason="length"}' in text
    assert 'fgsnap_http_responses_total{route="/v1/completions",status="200"}' in text
    assert 'fgsnap_snapshot_info{backend="stub",device="cpu",id="' in text


def test_metrics_are_well_formed(service):
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(ask(service.url, "GET", "/metrics").body.decode()))
    assert all(family.documentation for family in families)
    histograms = {family.name: family for family in families if family.type == "histogram"}
    assert len(histograms) == 3
    for family in histograms.values():
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
