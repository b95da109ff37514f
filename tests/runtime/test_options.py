"""Request options end to end: the real command, the official client, and a small random model."""

from __future__ import annotations

import threading

import pytest

from tests.serving import ask, client, real_service, samples, servable_snapshot, until

MODEL = "tests/random"
SMALL = ("--kv-memory", "16MiB", "--threads", "1")
GREEDY = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return servable_snapshot(tmp_path_factory.mktemp("options") / "snap", max_length=1024)


@pytest.fixture(scope="module")
def service(snapshot):
    with real_service(snapshot, *SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def api(service):
    with client(service.url) as made:
        yield made


def completed(service, asked):
    with client(service.url) as api:
        return api.completions.create(**asked)


def idle(service) -> bool:
    now = samples(service.url)
    free, blocks = now.get("fgsnap_kv_blocks_free"), now.get("fgsnap_kv_blocks")  # an engine tells with its first step
    return now.get("fgsnap_requests_running", 0) == 0 and free == blocks


def test_three_answers_compute_their_prompt_once(service, api):
    prompt = "a prompt that is long enough to fill several blocks of the cache, and of which a few are shared"
    before = samples(service.url)
    answer = api.completions.create(prompt=prompt, n=3, max_tokens=8, model=MODEL, extra_body={"ignore_eos": True})
    assert len({choice.text for choice in answer.choices}) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 24)
    until(lambda: idle(service))
    after = samples(service.url)
    # All blocks but the one with the last token, which has to be forwarded.
    shared = 2 * ((len(prompt) - 1) // 16) * 16
    assert after["fgsnap_prompt_tokens_cached_total"] - before.get("fgsnap_prompt_tokens_cached_total", 0) == shared
    assert after["fgsnap_prompt_tokens_total"] - before.get("fgsnap_prompt_tokens_total", 0) == 3 * len(prompt)


def test_a_seed_repeats_its_answer_in_any_company(api):
    arguments = {
        "prompt": "seeded", "max_tokens": 24, "seed": 11, "temperature": 1.2, "top_p": 0.95, "n": 2, "model": MODEL,
        "extra_body": {"ignore_eos": True, "min_p": 0.01, "repetition_penalty": 1.1}, "presence_penalty": 0.3,
    }  # fmt: skip
    alone = [choice.text for choice in api.completions.create(**arguments).choices]
    found: list[list[str]] = []

    def again():
        found.append([choice.text for choice in api.completions.create(**arguments).choices])

    def other(number):
        api.completions.create(prompt=f"{number}" * 50 * number, max_tokens=20, temperature=1.5, model=MODEL)

    threads = [threading.Thread(target=again) for _ in range(3)]
    threads += [threading.Thread(target=other, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 3


def test_biases_penalties_and_least_tokens(api):
    forced = api.completions.create(prompt="x", max_tokens=6, logit_bias={"65": 100}, **GREEDY)
    assert forced.choices[0].text != "" and len(set(forced.choices[0].text)) == 1
    told = api.completions.create(prompt="x", max_tokens=1, logprobs=0, logit_bias={"65": 100}, **GREEDY)
    assert told.choices[0].logprobs.token_logprobs[0] < -0.1, "of the logits as the model gave them"
    repeating = {"prompt": "x", "max_tokens": 30, "logit_bias": {"65": 4}, **GREEDY}
    plain = api.completions.create(extra_body={"ignore_eos": True}, **repeating).choices[0].text
    held = api.completions.create(extra_body={"ignore_eos": True}, frequency_penalty=2, **repeating).choices[0].text
    assert len(set(held)) > len(set(plain))
    ending = {"prompt": "x", "max_tokens": 9, "logit_bias": {"257": 100}, **GREEDY}
    assert api.completions.create(**ending).usage.completion_tokens == 0
    answer = api.completions.create(extra_body={"min_tokens": 4}, **ending)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "stop")


def test_stops_across_tokens_and_by_token(api):
    free = {"prompt": "stops", "max_tokens": 40, "seed": 3, "n": 3, "model": MODEL, "logit_bias": {"65": 9, "66": 9}}
    whole = api.completions.create(extra_body={"ignore_eos": True}, **free)
    stop = "ccc"  # ids 65 and 66 are b and c here
    cut = api.completions.create(stop=[stop, "never"], extra_body={"ignore_eos": True}, **free)
    assert any(stop in choice.text for choice in whole.choices)
    for one, other in zip(whole.choices, cut.choices, strict=True):
        assert other.text == one.text.partition(stop)[0]
        assert other.finish_reason == ("stop" if stop in one.text else "length")
    by_token = api.completions.create(extra_body={"ignore_eos": True, "stop_token_ids": [65, 66]}, **free)
    assert all(len(one.text) <= len(other.text) for one, other in zip(by_token.choices, whole.choices, strict=True))
    assert {choice.finish_reason for choice in by_token.choices} == {"stop"}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_text_is_scored_as_its_tokens_were_when_they_were_generated(tmp_path, service, api, tp):
    """lm-eval-harness's request; a degree of two gives the same numbers, within rounding."""
    text = api.completions.create(
        prompt=[*range(40)], max_tokens=30, logprobs=0, extra_body={"ignore_eos": True}, **GREEDY
    )
    chosen = text.choices[0].logprobs.token_logprobs
    prompts = [[*range(40)], [*range(100, 200)] * 3, [7]]
    ask_for = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, **GREEDY}
    scored = api.completions.create(**ask_for)
    assert [len(choice.logprobs.tokens) for choice in scored.choices] == [41, 301, 2]
    assert scored.choices[0].logprobs.token_logprobs[-1] == pytest.approx(chosen[0], abs=1e-5)
    for choice in scored.choices:
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None
        for token, number, top in zip(
            logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert top[token] == number
    until(lambda: idle(service))
    if tp > 1:
        with real_service(servable_snapshot(tmp_path / "snap", tp=tp, max_length=1024), *SMALL) as ranks:
            again = completed(ranks, ask_for)
        for one, two in zip(scored.choices, again.choices, strict=True):
            assert two.logprobs.token_logprobs[1:] == pytest.approx(one.logprobs.token_logprobs[1:], abs=1e-4)


def test_bounds_of_the_command_line(snapshot):
    options = ("--max-num-seqs", "1", "--max-waiting", "1", "--admission", "optimistic", "--no-prefix-caching")
    with real_service(snapshot, *SMALL, *options) as service, client(service.url) as api:
        body = {"prompt": "x" * 60, "max_tokens": 400, "n": 3, "ignore_eos": True}
        reply = ask(service.url, "POST", "/v1/completions", body)
        assert reply.status == 400 and reply.error()["param"] == "n"
        until(lambda: idle(service))
        answer = api.completions.create(prompt="x" * 60, n=2, max_tokens=4, model=MODEL)
        assert len(answer.choices) == 2
        now = samples(service.url)
        assert now["fgsnap_prompt_tokens_cached_total"] == 0


B, C, EOS = 65, 66, 257  # of the byte tokenizer here
BIASED = {str(B): 9, str(C): 9}


def test_a_stop_text_or_token_may_be_a_part_of_the_answer(api):
    free = {"prompt": "stops", "max_tokens": 40, "seed": 3, "model": MODEL, "logit_bias": BIASED, "logprobs": 0}
    shown = {"ignore_eos": True, "include_stop_str_in_output": True}
    (plain,) = api.completions.create(stop="ccc", extra_body={"ignore_eos": True}, **free).choices
    (whole,) = api.completions.create(stop="ccc", extra_body=shown, **free).choices
    assert whole.text == plain.text + "ccc" and len(whole.logprobs.tokens) == len(whole.text)
    assert (plain.finish_reason, plain.stop_reason, whole.stop_reason) == ("stop", "ccc", "ccc")
    without = api.completions.create(extra_body={"ignore_eos": True, "stop_token_ids": [C]}, **free)
    answer = api.completions.create(extra_body={**shown, "stop_token_ids": [C]}, **free)
    assert answer.choices[0].text == without.choices[0].text + "c" and answer.choices[0].logprobs.tokens[-1] == "c"
    assert answer.choices[0].stop_reason == without.choices[0].stop_reason == C
    assert answer.usage.completion_tokens == without.usage.completion_tokens + 1
    chunks = list(api.completions.create(extra_body={**shown, "stop_token_ids": [C]}, stream=True, **free))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].stop_reason == C
    ended = api.completions.create(prompt="x", logit_bias={str(EOS): 100}, **GREEDY).choices[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)


def test_special_tokens_are_shown_where_they_are_asked_for(api):
    forced = {"prompt": "x", "max_tokens": 2, "logit_bias": {str(EOS): 100}, **GREEDY}
    for shown, text in ((True, ""), (False, "<eos><eos>")):
        answer = api.completions.create(extra_body={"ignore_eos": True, "skip_special_tokens": shown}, **forced)
        assert answer.choices[0].text == text and answer.usage.completion_tokens == 2
    kept = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert api.completions.create(extra_body=kept, **forced).choices[0].text == "<eos>"


def test_only_allowed_tokens_are_picked(api):
    asked = {"prompt": "x", "max_tokens": 20, "temperature": 2, "seed": 5, "model": MODEL}
    answer = api.completions.create(extra_body={"allowed_token_ids": [C, B, C]}, **asked).choices[0]
    assert set(answer.text) == {"b", "c"} and answer.finish_reason == "length"


def test_allowed_tokens_that_may_not_be_picked_yet_leave_none(service):
    nothing = {"allowed_token_ids": [B], "stop_token_ids": [B], "min_tokens": 1}
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", **nothing})
    assert (reply.status, reply.error()["code"]) == (400, "constraint") and "no token" in reply.error()["message"]


def test_bad_words_are_not_said(api):
    asked = {"prompt": "x", "max_tokens": 60, "temperature": 1, "seed": 5, "model": MODEL, "logit_bias": BIASED}
    free = api.completions.create(extra_body={"ignore_eos": True}, **asked).choices[0].text
    bad = ["ccc", "bcb", "a"]
    held = api.completions.create(extra_body={"ignore_eos": True, "bad_words": bad}, **asked).choices[0].text
    assert "ccc" in free and "bcb" in free
    assert not any(word in held for word in bad) and "cc" in held and "bc" in held


def test_bad_words_of_too_many_tokens_are_refused_by_name(service):
    words = [f"{index:0256}" for index in range(17)]
    asked = {"prompt": "x", "max_tokens": 1}
    reply = ask(service.url, "POST", "/v1/completions", {**asked, "bad_words": words})
    assert (reply.status, reply.error()["param"]) == (400, "bad_words") and "4352 tokens" in reply.error()["message"]
    assert ask(service.url, "POST", "/v1/completions", {**asked, "bad_words": words[1:]}).status == 200


def test_a_prompt_is_cut_to_its_last_tokens(api):
    for prompt, end in (("long before the very end", "the very end"), ([*range(50), 7, 8, 9], [7, 8, 9])):
        whole = api.completions.create(prompt=end, max_tokens=5, **GREEDY)
        cut = api.completions.create(
            prompt=prompt, max_tokens=5, extra_body={"truncate_prompt_tokens": len(end)}, **GREEDY
        )
        assert cut.choices[0].text == whole.choices[0].text and cut.usage.prompt_tokens == len(end)
    echoed = api.completions.create(
        prompt="much too long", max_tokens=1, echo=True, logprobs=0, extra_body={"truncate_prompt_tokens": 4}, **GREEDY
    )
    assert echoed.choices[0].text.startswith("long") and len(echoed.choices[0].logprobs.tokens) == 5
    fits = api.completions.create(
        prompt="x" * 3000, max_tokens=24, extra_body={"truncate_prompt_tokens": -1, "ignore_eos": True}, **GREEDY
    )
    assert (fits.usage.prompt_tokens, fits.usage.completion_tokens) == (1000, 24)


def test_a_stop_text_does_not_end_an_answer_that_is_too_short(api):
    asked = {"prompt": "x", "max_tokens": 9, "logit_bias": {str(B): 100}, **GREEDY}
    for least, text in ((0, ""), (2, "b"), (3, "bb"), (8, "b" * 7), (9, "b" * 9)):
        answer = api.completions.create(stop="bb", extra_body={"min_tokens": least}, **asked).choices[0]
        assert answer.text == text and answer.finish_reason == ("stop" if least < 9 else "length")


def test_the_best_answer_is_not_an_empty_one_that_ended_against_the_odds(api):
    asked = {"prompt": "best", "max_tokens": 6, "seed": 5, "model": MODEL, "logprobs": 0}
    ends = {"stop_token_ids": [*range(40)], "ignore_eos": True}
    shown = api.completions.create(n=32, extra_body={**ends, "include_stop_str_in_output": True}, **asked).choices
    made = api.completions.create(n=32, extra_body=ends, **asked).choices
    means = [sum(one.logprobs.token_logprobs) / len(one.logprobs.token_logprobs) for one in shown]
    best = api.completions.create(best_of=32, extra_body=ends, **asked).choices[0]
    assert any(one.text == "" for one in made)
    assert best.text == made[means.index(max(means))].text


def test_usage_tells_what_was_cached(api):
    asked = {"prompt": "a prompt of two blocks and a little more", "max_tokens": 2, **GREEDY}
    found = [api.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert found == [0, 32]
    chunks = list(api.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32


def test_what_would_change_the_answer_and_is_not_offered_is_refused_by_name(service):
    refused = {
        "tool_choice": "required", "function_call": {"name": "f"}, "typical_p": 0.5, "mirostat": 2, "min_length": 5,
        "grammar": 'root ::= "a"', "json_schema": {"type": "object"}, "dry_multiplier": 0.8, "reasoning_effort": "high",
    }  # fmt: skip
    for field, value in refused.items():
        reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1, field: value})
        assert (reply.status, reply.error()["param"], reply.error()["code"]) == (400, field, "unsupported_parameter")


def test_a_bad_word_of_spaces_is_refused(service):
    reply = ask(service.url, "POST", "/v1/completions", {"prompt": "x", "bad_words": ["fine", "  "]})
    assert (reply.status, reply.error()["param"]) == (400, "bad_words")
