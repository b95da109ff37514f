"""What a client may send, and what it is told when it sends something else."""

from __future__ import annotations

import json
import time
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgsnap.errors import RequestError
from fgsnap.runtime import answers, protocol
from fgsnap.runtime.answers import Answer, Heading, Piece
from fgsnap.runtime.request import Token

VOCAB = 100


def completion(**fields) -> protocol.Call:
    return protocol.parse_completion(json.dumps({"prompt": "hi", **fields}).encode(), VOCAB)


def chat(**fields) -> protocol.Call:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return protocol.parse_chat(json.dumps(body).encode(), VOCAB)


@pytest.mark.parametrize(
    ("parse", "body", "field", "why"),
    [
        (protocol.parse_completion, b"{}", "prompt", "missing"),
        (protocol.parse_chat, b"{}", "messages", "missing"),
        (protocol.parse_chat, b'{"messages": [{"content": "x"}]}', "messages[0].role", "missing"),
        (protocol.parse_chat, b'{"messages": [{"role": "user"}]}', "messages[0].content", "missing"),
        (protocol.parse_chat, b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content", "missing"),
        (protocol.parse_chat, b" ", "", "empty"),
    ],
)
def test_what_is_missing_is_named(parse, body, field, why):
    with pytest.raises(RequestError) as caught:
        parse(body, VOCAB)
    assert caught.value.param == field and why in caught.value.what


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], [[1], "a"], [100], [-1], [[5, 100]], [1.5], [True], {}, None, 3]
)
def test_other_prompts_are_refused_by_name(prompt):
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.status == 400 and caught.value.param.startswith("prompt")


def test_what_is_left_out_or_null_has_openai_s_defaults():
    for call in (completion(), completion(temperature=None, top_p=None, seed=None, stop=None, n=None, stream=None)):
        params = call.params
        assert (params.temperature, params.top_p, params.top_k, params.seed, params.logprobs) == (1.0, 1.0, 0, None, -1)
        assert (call.choices, call.stop, call.stream, call.include_usage, call.max_tokens) == (
            1,
            (),
            False,
            False,
            None,
        )


def test_every_field_arrives():
    call = completion(
        model="m", n=3, max_tokens=7, temperature=0.5, top_p=0.9, top_k=40, seed=-5, stop=["x", "y"],
        stop_token_ids=[3], ignore_eos=True, logprobs=2, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    params = call.params
    assert (call.model, call.choices, call.max_tokens, call.stop) == ("m", 3, 7, ("x", "y"))
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 40, -5)
    assert (params.stop_token_ids, params.ignore_eos, params.logprobs) == ((3,), True, 2)
    assert call.stream and call.include_usage


def test_fields_of_vllm_arrive():
    call = completion(
        include_stop_str_in_output=True, skip_special_tokens=False, allowed_token_ids=[0, 33, 99], bad_words=["x"],
        truncate_prompt_tokens=7, add_special_tokens=False, spaces_between_special_tokens=True,
    )  # fmt: skip
    assert (call.include_stop, call.skip_special, call.bad_words) == (True, False, ("x",))
    assert (call.truncate_prompt_tokens, call.add_special_tokens) == (7, False)
    assert int.from_bytes(call.params.allowed, "little") == 1 | 1 << 33 | 1 << 99 and len(call.params.allowed) == 16
    plain = completion(allowed_token_ids=None, skip_special_tokens=None, spaces_between_special_tokens=False)
    assert (plain.params.allowed, plain.skip_special, plain.include_stop, plain.add_special_tokens) == (
        b"", True, False, True,
    )  # fmt: skip


def test_how_a_chat_ends_for_the_model():
    def ending(**fields):
        call = chat(**fields)
        return call.add_generation_prompt, call.continue_final_message, call.add_special_tokens

    assert ending() == ending(add_generation_prompt=True) == (True, False, False)
    assert ending(add_generation_prompt=False, add_special_tokens=True) == (False, False, True)
    assert ending(continue_final_message=True) == (False, True, False)
    with pytest.raises(RequestError) as caught:
        chat(continue_final_message=True, add_generation_prompt=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("wanted", "head", "kept"), [(3, 0, "789"), (3, 1, "089"), (1, 2, "0"), (99, 1, "0123456789"), (-1, 0, "6789")]
)
def test_a_prompt_is_cut_to_its_last_tokens_after_what_it_begins_with(wanted, head, kept):
    call = completion(truncate_prompt_tokens=wanted, max_tokens=96)
    assert protocol.truncated(call, tuple(range(10)), head, 100) == tuple(map(int, kept))


def test_a_chat_takes_both_names_for_its_length_and_both_fields_for_logprobs():
    assert chat(max_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).params.logprobs == 5
    assert chat(logprobs=False).params.logprobs == -1


def test_vllm_s_switched_off_top_k_is_off():
    assert completion(top_k=-1).params.top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", "7"), ("max_tokens", 2**80), ("max_tokens", True), ("temperature", -0.1),
        ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("n", 0),
        ("n", 129), ("seed", 2**63), ("seed", 1.5), ("stop", ""), ("stop", [""]), ("stop", ["x"] * 17),
        ("stop", "x" * 257), ("stop", 5), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]),
        ("stop_token_ids", [1] * 65), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("stream", "yes"),
        ("stream_options", {"include_usage": 1}), ("model", 5),
        ("ignore_eos", "x"), ("stream_options", {}), ("stop", "\ud800"),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", "x"), ("repetition_penalty", 0), ("repetition_penalty", -1),
        ("repetition_penalty", 10.1), ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", []),
        ("frequency_penalty", 3), ("frequency_penalty", "1"), ("frequency_penalty", True), ("logit_bias", []),
        ("logit_bias", {"1": 101}), ("logit_bias", {"1": -101}), ("logit_bias", {"1": "x"}),
        ("logit_bias", {"1": None}),
        ("logit_bias", {"100": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"a": 1}), ("logit_bias", {"1.0": 1}),
        ("logit_bias", {"": 1}), ("logit_bias", {"\u0663": 1}), ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {str(i): 0 for i in range(1025)}), ("min_tokens", -1), ("min_tokens", 1.5),
        ("min_tokens", 2**40),
        ("best_of", 0), ("best_of", 129), ("best_of", "2"), ("priority", 2**40), ("priority", "high"), ("timeout", 0),
        ("timeout", -1), ("timeout", 1e7), ("timeout", "soon"), ("cache_salt", ""), ("cache_salt", "x" * 257),
        ("cache_salt", 5), ("echo", "yes"), ("echo", 1), ("prompt_logprobs", -1), ("prompt_logprobs", 21),
        ("prompt_logprobs", True), ("stop_token_ids", [100]), ("stop_token_ids", 5), ("max_tokens", -1),
        ("allowed_token_ids", []), ("allowed_token_ids", [100]), ("allowed_token_ids", [-1]), ("bad_words", [""]),
        ("bad_words", ["x"] * 129), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2),
        ("skip_special_tokens", "no"), ("include_stop_str_in_output", 1), ("add_special_tokens", []),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(RequestError) as caught:
        completion(**{field: value})
    assert caught.value.status == 400
    assert caught.value.param.partition("[")[0].partition(".")[0] == field or not caught.value.param
    assert field in str(caught.value) or not caught.value.param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": ["x"] * 65, "best_of": 2}, "prompt"),
        ({"allowed_token_ids": [1], "guided_regex": "a"}, "allowed_token_ids"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(fields, param):
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_more_tokens_at_least_than_at_most_are_refused_also_where_most_is_a_default():
    for call in (
        completion(min_tokens=9, max_tokens=8),
        completion(min_tokens=17),
        completion(min_tokens=1, max_tokens=0, echo=True),
    ):
        with pytest.raises(RequestError) as caught:
            settled(call, 5)
        assert (caught.value.status, caught.value.param) == (400, "min_tokens")
    assert settled(completion(min_tokens=16), 5) == 16


def test_a_chat_has_no_use_for_what_only_completions_have():
    assert chat(echo=False, best_of=1).choices == 1
    for field, value in (("echo", True), ("best_of", 2), ("top_logprobs", 2)):
        with pytest.raises(RequestError) as caught:
            chat(**{field: value})
        assert (caught.value.status, caught.value.param) == (400, field)


def test_every_option_arrives_and_null_is_left_out():
    call = completion(
        min_p=0.1, repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2, logit_bias={"7": -100, "3": 2.5},
        min_tokens=4, best_of=3, n=2, priority=-5, timeout=1.5, cache_salt="s", prompt_logprobs=3,
    )  # fmt: skip
    params = call.params
    assert (params.min_p, params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        0.1,
        1.5,
        -1,
        2,
    )
    assert (params.logit_bias, params.min_tokens, params.prompt_logprobs) == (((3, 2.5), (7, -100)), 4, 3)
    assert (call.choices, call.kept, call.priority, call.timeout, call.cache_salt) == (3, 2, -5, 1.5, "s")
    names = (
        "min_p repetition_penalty presence_penalty frequency_penalty logit_bias min_tokens best_of priority timeout "
    )
    names += "cache_salt prompt_logprobs echo"
    assert completion(**dict.fromkeys(names.split())) == completion()


def test_an_echo_asks_for_the_prompt_s_logprobs_where_it_has_any():
    assert completion(echo=True).params == completion().params and completion(echo=True).echo
    scoring = completion(echo=True, logprobs=2, max_tokens=1)
    assert (scoring.params.prompt_logprobs, scoring.params.ignore_eos, scoring.prompt_top) == (2, True, -1)
    both = completion(echo=True, logprobs=2, prompt_logprobs=5, max_tokens=3)
    assert (both.params.prompt_logprobs, both.params.ignore_eos, both.prompt_top) == (5, False, 5)
    assert settled(completion(echo=True, max_tokens=0), 100) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["x"] * 10**6),
        ("stop", "x" * 7_000_000),
        ("bad_words", ["x"] * 100_000),
        ("logit_bias", {str(i): 1.0 for i in range(75_000)}),
        ("stop_token_ids", [5] * 10**6),
        ("cache_salt", "x" * 7_000_000),
        ("tools", [{}] * 10**6),
        ("prompt", [[1]] * 100_000),
        ("n", 10**4000),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else type(value).__name__,
)
def test_what_is_far_too_long_is_refused_in_no_time(field, value):
    body = json.dumps({"prompt": "hi", field: value}).encode()
    took = []
    for _ in range(3):
        began = time.process_time()
        with pytest.raises(RequestError) as caught:
            protocol.parse_completion(body, VOCAB)
        took.append(time.process_time() - began)
    assert (caught.value.status, caught.value.param) == (400, field) and min(took) < 0.05


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e-999x", "0x1", "01"])
def test_what_is_no_number_in_json_is_refused(number):
    for field in ("temperature", "timeout", "min_p", "logit_bias"):
        value = f'{{"5": {number}}}' if field == "logit_bias" else number
        with pytest.raises(RequestError) as caught:
            protocol.parse_completion(f'{{"prompt": "x", "{field}": {value}}}'.encode(), VOCAB)
        assert caught.value.status == 400


@pytest.mark.parametrize("field", sorted(protocol.UNSUPPORTED))
def test_an_unsupported_field_is_refused_unless_it_asks_for_nothing(field):
    for neutral in protocol.UNSUPPORTED[field]:
        assert completion(**{field: neutral}).choices == 1
    with pytest.raises(RequestError, match=field) as caught:
        completion(**{field: ["something"]})
    assert caught.value.param == field and caught.value.code == "unsupported_parameter"
    assert protocol.OFFERED_AS.get(field, f"Leave '{field}' out") in caught.value.next_step


def test_how_many_logprobs_is_said_in_logprobs_of_completions():
    assert completion(top_logprobs=0).choices == 1
    with pytest.raises(RequestError, match="top_logprobs"):
        completion(top_logprobs=3)


def test_unknown_fields_are_ignored():
    assert completion(user="me", store=True, service_tier="x", metadata={}, whatever=[1]).prompts == ("hi",)


@pytest.mark.parametrize(
    "messages",
    [[], None, "hi", [1], [{}], [{"role": 5}], [{"role": "user", "content": 5}], [{"role": "user", "content": ["a"]}]],
)
def test_wrong_messages_are_refused(messages):
    with pytest.raises(RequestError) as caught:
        chat(messages=messages)
    assert caught.value.param.startswith("messages")


def test_messages_reach_the_template_as_they_are():
    parts = [{"type": "text", "text": "b"}]
    call = chat(messages=[{"role": "system", "content": "a"}, {"role": "user", "content": parts, "odd": 1}])
    assert call.messages == ({"role": "system", "content": "a"}, {"role": "user", "content": parts})


def test_choices_are_bounded_over_all_prompts():
    assert len(completion(prompt=["a"] * 64, n=2).prompts) == 64
    with pytest.raises(RequestError, match="choices"):
        completion(prompt=["a"] * 65, n=2)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"1", b'"x"', b"null", b'{"prompt": NaN}', b'{"prompt": 1e999}', b'{"a":"\xff"}',
        b'{"a": {"b": [1e999]}}',
        b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"prompt":"x","zz":' + b"[" * 100_000, b'{"prompt":"\\ud800"}',
        b'{"prompt":"a","seed":' + b"9" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_a_400(body):
    for parse in (protocol.parse_completion, protocol.parse_chat):
        with pytest.raises(RequestError) as caught:
            parse(body, VOCAB)
        assert caught.value.status == 400 and "$[" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "field", "why"),
    [
        (b'{"prompt":"\\ud800"}', "prompt", "half of a surrogate pair"),
        (b'{"model": "m", "prompt" : "a\\udc00b", "n": 1}', "prompt", "half of a surrogate pair"),
        (b'{"prompt":"a","stop":["x", "\\ud83d "]}', "stop", "half of a surrogate pair"),
        (b'{"prompt":"a","temperature":NaN,"top_p":1}', "temperature", "NaN is no number"),
        (b'{"prompt":"a", "logit_bias": {"5": -Infinity}}', "logit_bias", "-Infinity is no number"),
        (b'{"prompt":"a","seed":0x1}', "", "malformed"),
        (b'{"prompt":"a","seed":nan}', "seed", "malformed"),
        (b'{"prompt":"a","zz\\ud800":NaN}', "", "malformed"),
        (b'{"prompt":"\\ud83d\\ude00","zz":"\\ud800"}', "", "truncated"),
        (b'{"prompt":"a","n":1', "", "truncated"),
        (b'{"prompt":"a" "n":1}', "", "malformed"),
        (b'{"prompt":NaN,"x":"\xff"}', "", "malformed"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_json_is_refused_by_the_name_of_its_field(body, field, why):
    with pytest.raises(RequestError, match=why) as caught:
        protocol.parse_completion(body, VOCAB)
    assert caught.value.param == field and str(caught.value).startswith(field or "The body")


def test_in_messages_too_and_not_in_bodies_that_are_too_long_to_look_through():
    body = b'{"messages":[{"role":"user","content":"\\ud800"}]}'
    for spaces, field in (0, "messages"), (protocol.LONGEST_SEARCH, ""):
        with pytest.raises(RequestError) as caught:
            protocol.parse_chat(body + b" " * spaces, VOCAB)
        assert caught.value.param == field


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [field.name for field in msgspec.structs.fields(protocol.ChatBody)] + ["prompt", *protocol.UNSUPPORTED]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_whatever_json_comes_it_is_a_call_or_a_request_error(body):
    for parse in (protocol.parse_completion, protocol.parse_chat):
        try:
            call = parse(json.dumps(body).encode(), VOCAB)
        except RequestError as error:
            assert error.status == 400
        else:
            assert 1 <= call.choices <= protocol.MAX_CHOICES


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_whatever_bytes_come_it_is_a_call_or_a_request_error(body):
    try:
        protocol.parse_completion(body, VOCAB)
    except RequestError as error:
        assert error.status == 400


def settled(call: protocol.Call, prompt: int, *, kv_tokens: int = 1000) -> int:
    return protocol.settled(call, prompt, 100, kv_tokens, 30)


def test_the_length_is_settled_by_the_endpoint_and_the_context():
    assert settled(completion(), 5) == 16
    assert settled(completion(), 95) == 5
    assert settled(chat(), 5) == 30
    assert settled(chat(), 80) == 20
    assert settled(chat(), 25, kv_tokens=50) == 25
    assert settled(chat(max_tokens=95), 5) == 95


def test_beyond_the_context_the_arithmetic_is_told():
    with pytest.raises(RequestError) as caught:
        settled(completion(max_tokens=96), 5)
    assert "100 tokens" in str(caught.value) and "needs 101: 5 of prompt + 96 of max_tokens" in str(caught.value)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="needs 101: 100 of prompt") as unbounded:
        settled(chat(), 100)
    assert "max_tokens" in str(caught.value) and "max_tokens" not in str(unbounded.value), "none was asked for"


@pytest.mark.parametrize(
    ("call", "prompt", "param"),
    [
        (completion(max_tokens=96), 5, "max_tokens"),
        (completion(max_tokens=8000), 99, "max_tokens"),
        (completion(max_tokens=8000), 100, "prompt"),
        (completion(), 100, "prompt"),
        (completion(max_tokens=0, echo=True), 101, "prompt"),
        (chat(max_tokens=96), 5, "max_tokens"),
        (chat(), 100, "messages"),
    ],
)
def test_beyond_the_context_the_field_is_named_that_alone_could_mend_it(call, prompt, param):
    with pytest.raises(RequestError) as caught:
        settled(call, prompt)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [[1] * 101, [[1], [1] * 110]], ids=["ids", "lists of ids"])
def test_more_token_ids_than_the_context_has_are_not_read_one_by_one(prompt, monkeypatch):
    body = json.dumps({"prompt": prompt}).encode()
    monkeypatch.setattr(protocol, "LONGEST_LIST", 100)
    monkeypatch.setattr(protocol, "token_ids", None)
    with pytest.raises(RequestError, match="context length is 100 tokens; the prompt has 1") as caught:
        protocol.parse_completion(body, VOCAB, 100)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize("character", ["é", "😀", "\0", '"'])
@pytest.mark.parametrize("escaping", [True, False])
def test_bad_words_are_as_long_as_they_may_be_however_they_are_spelled(character, escaping):
    body = {"prompt": "hi", "bad_words": [character * 256] * 128, "stop": [character * 256] * 16}
    call = protocol.parse_completion(json.dumps(body, ensure_ascii=escaping, indent=2).encode(), VOCAB)
    assert call.bad_words == (character * 256,) * 128 and call.stop == (character * 256,) * 16


def test_bad_words_that_are_longer_in_any_spelling_are_not_read():
    with pytest.raises(RequestError, match="of at most 524288") as caught:
        completion(bad_words=["x" * 600_000])
    assert caught.value.param == "bad_words"


def test_what_is_no_list_of_token_ids_is_not_counted_as_one(monkeypatch):
    monkeypatch.setattr(protocol, "LONGEST_LIST", 0)
    commas = ["a, b, [c], " * 20]
    assert protocol.parse_completion(json.dumps({"prompt": commas}).encode(), VOCAB, 100).prompts == tuple(commas)
    assert completion(prompt=[[1] * 60, [2] * 60]).prompts == ((1,) * 60, (2,) * 60)


def test_messages_of_too_many_parts_are_not_made_one_by_one(monkeypatch):
    monkeypatch.setattr(protocol, "LONGEST_LIST", 0)
    monkeypatch.setattr(protocol, "MAX_OBJECTS", 5)
    part = {"type": "text", "text": 'if (x) { y = "{{{{"; } \\'}
    assert chat(messages=[{"role": "user", "content": [part] * 4}]).messages
    for messages in ([{"role": "user", "content": [part] * 5}], [{"role": "user", "content": "a"}] * 6):
        with pytest.raises(RequestError, match="6 objects, of at most 5") as caught:
            chat(messages=messages)
        assert caught.value.param == "messages"


@pytest.mark.parametrize("field", ["role", "name", "tool_call_id"])
def test_what_is_a_name_in_a_message_is_no_text(field):
    message = {"role": "user", "content": "a", field: "x" * 257}
    with pytest.raises(RequestError) as caught:
        chat(messages=[message])
    assert caught.value.param == f"messages[0].{field}"


def test_an_empty_prompt_is_refused():
    with pytest.raises(RequestError, match="no tokens"):
        settled(completion(), 0)


# ------------------------------------------------------------------------------------------------------- answers


def spell(token: int) -> bytes:
    return {1: b"a", 2: b"bc", 3: b"\xc3", 4: b"\xc3"}[token]


def answer(chat: bool, **settings) -> Answer:
    return Answer(
        Heading(chat, "id", 1, "m", "f"),
        **{"choices": 1, "prompt_tokens": 3, "spell": spell, **settings},
    )


TOKENS = (Token(1, -0.5, ((1, -0.5), (2, -1.0))), Token(3, -0.25, ((4, -0.125), (3, -0.25))))


@pytest.mark.parametrize("how", [{"echo_top": 2}, {"prompt_top": 2, "spell": None}, {"echo_top": 1, "prompt_top": 2}])
def test_a_prompt_s_logprobs_are_made_once_for_all_its_choices(how):
    prompt = (Token(2), *TOKENS, Token(4, -0.5, ((1, -0.5),)), *TOKENS * 50)
    spelled = Counter()

    def counted(token: int) -> bytes:
        spelled[token] += 1
        return spell(token)

    def made(choices: int, each: int) -> tuple[list[dict], int]:
        spelled.clear()
        making = answer(False, **{"choices": choices, "each": each, "prompt_spell": counted, "spell": counted, **how})
        for index in range(choices):
            own = Token(1 + index % 2, -float(index))
            making.add(Piece(index, "bca", (), (), None, prompt[index // each :]))
            making.add(Piece(index, "x", (own,), (own,), "length"))
        told = json.loads(b"".join(making.whole()))["choices"]
        return [{**choice, "index": 0} for choice in told], spelled.total()

    once, cost = made(2, each=1)
    all_three, cost_of_six = made(6, each=3)
    assert cost_of_six <= cost + 4 * 2, "only the answers' own tokens"
    assert [one.get("prompt_logprobs") for one in all_three] == [
        once[0].get("prompt_logprobs")] * 3 + [once[1].get("prompt_logprobs")] * 3  # fmt: skip
    if "spell" not in how:
        for index, choice in enumerate(all_three):
            expected = once[index // 3]["logprobs"]
            assert choice["logprobs"]["text_offset"] == expected["text_offset"]
            assert choice["logprobs"]["top_logprobs"][:-1] == expected["top_logprobs"][:-1]
            assert choice["logprobs"]["token_logprobs"][-1] == -index


def test_completion_logprobs_keep_the_picked_token_s_own_number():
    made = answer(chat=False)
    made.add(Piece(0, "a", TOKENS, TOKENS, "stop"))
    logprobs = json.loads(b"".join(made.whole()))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "�"]
    assert logprobs["token_logprobs"] == [-0.5, -0.25]
    assert logprobs["top_logprobs"] == [{"a": -0.5, "bc": -1.0}, {"�": -0.25}]
    assert logprobs["text_offset"] == [0, 1]


def test_offsets_go_on_from_chunk_to_chunk():
    made = answer(chat=False)
    offsets = []
    for token in (1, 2, 1):
        data = made.chunk(Piece(0, "?", (Token(token),), (Token(token),), None))
        offsets += json.loads(data.removeprefix(b"data: "))["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 1, 3]


def test_chat_logprobs_tell_the_bytes():
    made = answer(chat=True)
    made.add(Piece(0, "a", TOKENS, TOKENS, "stop"))
    content = json.loads(b"".join(made.whole()))["choices"][0]["logprobs"]["content"]
    assert content[1] == {
        "token": "�", "logprob": -0.25, "bytes": [0xC3],
        "top_logprobs": [
            {"token": "�", "logprob": -0.125, "bytes": [0xC3]}, {"token": "�", "logprob": -0.25, "bytes": [0xC3]},
        ],
    }  # fmt: skip


def test_usage_counts_tokens_whether_or_not_they_show():
    made = answer(chat=True, usage=True, spell=None)
    assert made.chunk(Piece(0, "", (Token(1),), (), None)) == b""
    made.chunk(Piece(0, "a", (Token(1), Token(2)), (Token(1),), "length"))
    closing = made.closing()
    assert closing.endswith(answers.DONE)
    last = json.loads(closing.split(b"\n\n")[0].removeprefix(b"data: "))
    assert last["choices"] == []
    counts = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert last["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_cached_tokens_are_those_that_the_first_choice_of_each_prompt_found():
    made = answer(chat=False, choices=4, each=2)
    for choice, cached in ((0, 4), (1, 8), (3, 8), (2, 16), (2, 0)):
        made.add(Piece(choice, "", (), (), None, cached=cached))
    assert made.usage()["prompt_tokens_details"] == {"cached_tokens": 20}


def test_the_token_that_ended_an_answer_counts_for_its_likelihood():
    """An empty answer was once the likeliest of all, whatever the odds that it ended at once."""
    made = answer(chat=False, choices=6, each=6, best=6)
    one = Token(1, -0.5)
    made.add(Piece(0, "unlikely end", (one,), (one,), "stop", ending=Token(9, -4.0)))
    made.add(Piece(1, "long", (one, one), (one, one), "length"))
    made.add(Piece(2, "ended", (one,), (one,), None))
    made.add(Piece(2, "", (), (), "stop", ending=Token(9, -0.1)))
    made.add(Piece(3, "unknown", (), (), "stop"))
    made.add(Piece(4, "empty", (), (), "stop", ending=Token(9, -3.0)))
    made.add(Piece(5, "likely empty", (), (), "stop", ending=Token(9, -0.2)))
    texts = [choice["text"] for choice in json.loads(b"".join(made.whole()))["choices"]]
    assert texts == ["likely empty", "ended", "long", "unlikely end", "empty", "unknown"]


def test_what_ended_an_answer_is_told_with_its_end():
    made = answer(chat=False, spell=None)
    chunks = [
        made.chunk(Piece(0, "a", (Token(1),), (), end, stop_reason=why)) for end, why in ((None, None), ("stop", 7))
    ]
    first, last = (json.loads(chunk.removeprefix(b"data: "))["choices"][0] for chunk in chunks)
    assert "stop_reason" not in first and last["stop_reason"] == 7


def test_an_error_reads_as_openai_s():
    error = RequestError("No.", "Because.", "Do.", status=404, param="model", code="model_not_found")
    assert json.loads(answers.error_body(error)) == {
        "error": {
            "message": "No. Because. Do.", "type": "invalid_request_error", "param": "model", "code": "model_not_found",
        }
    }  # fmt: skip
    assert json.loads(answers.error_body(RequestError("x", status=503)))["error"]["type"] == "server_error"
