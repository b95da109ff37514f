"""Structured output as clients ask for it, over HTTP, through the official client."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import threading
import time
from pathlib import Path

import jsonschema
import openai
import pydantic
import pytest

import fgsnap
from fgsnap.cli import run_cli
from fgsnap.errors import RequestError
from fgsnap.runtime import protocol
from fgsnap.runtime.constraining import LONGEST
from fgsnap.runtime.generate import answer
from tests.runtime.test_constraints import PERSON
from tests.serving import (
    MODEL,
    StubWorkers,
    alive,
    ask,
    client,
    real_service,
    send_only,
    servable_snapshot,
    stub_service,
    until,
)


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(pattern="^[A-Z][a-z]{1,8}$")
    age: int = pydantic.Field(ge=0, le=130)


@pytest.fixture(scope="module")
def service():
    with stub_service(StubWorkers(max_length=2048, blocks=1024)) as running:
        yield running


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    snapshot = servable_snapshot(tmp_path_factory.mktemp("constrained") / "snap", max_length=1024)
    with real_service(snapshot, "--served-model-name", MODEL) as running:
        yield running


@pytest.fixture(params=["service", "real"])
def llm(request):
    with client(request.getfixturevalue(request.param).url) as made:
        yield made


def chat(llm: openai.OpenAI, **body):
    return llm.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], **{"max_tokens": 800, **body}
    )


def said(llm: openai.OpenAI, **extra) -> str:
    (choice,) = chat(llm, extra_body=extra).choices
    assert choice.finish_reason == "stop"
    return choice.message.content


def test_a_class_is_parsed_into(llm):
    schema = {**Person.model_json_schema(), "x-guidance": {"whitespace_flexible": False}}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    choices = chat(llm, n=3, seed=1, response_format=form).choices
    assert [choice.finish_reason for choice in choices] == ["stop"] * 3
    assert len({Person.model_validate_json(choice.message.content).name for choice in choices}) > 1


def test_the_official_parser(llm):
    """Whitespace is free here, and a random model may go on with it for long."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 800}
    for seed in range(10):
        try:
            answer = llm.chat.completions.parse(**asked, seed=seed, response_format=Person)
        except openai.LengthFinishReasonError:
            continue
        assert isinstance(answer.choices[0].message.parsed, Person)
        return
    raise AssertionError("no answer came to an end")


def test_a_stream(llm):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    chunks = [*chat(llm, stream=True, seed=4, response_format=form)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), PERSON)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_every_way_to_ask(llm):
    assert said(llm, guided_choice=["yes", "no (really)", "maybe?"]) in ("yes", "no (really)", "maybe?")
    assert said(llm, structured_outputs={"choice": ["a.b", "c|d"]}) in ("a.b", "c|d")
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", said(llm, guided_regex="[0-9]{4}-[0-9]{2}"))
    assert re.fullmatch("x{3,5}", said(llm, structured_outputs={"regex": "x{3,5}", "disable_fallback": False}))
    assert said(llm, guided_grammar='start: "a" start "b" | "c"').strip("ab") == "c"
    assert re.fullmatch("[0-9]+", said(llm, structured_outputs={"grammar": "start: /[0-9]+/"}))
    jsonschema.validate(json.loads(said(llm, guided_json=PERSON)), PERSON)
    jsonschema.validate(json.loads(said(llm, structured_outputs={"json": json.dumps(PERSON)})), PERSON)


def test_an_object(llm):
    bias = {str(token): 20 for token in ([125] if llm.base_url else [])}
    text = (
        chat(llm, response_format={"type": "json_object"}, max_tokens=300, logit_bias=bias).choices[0].message.content
    )
    assert text.lstrip().startswith("{")


def test_completions_logprobs_and_stop_texts(llm):
    answer = llm.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=50, logprobs=2, stop="q", extra_body={"guided_regex": "[p-r]{30}"}
    )
    for choice in answer.choices:
        assert re.fullmatch("[pr]*", choice.text) and choice.finish_reason == "stop"
        assert len(choice.logprobs.tokens) == len(choice.text)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": {"description": "x" * LONGEST}}, "guided_json"),
        ({"guided_json": {"description": "x" * 1_000_000}}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["", "a"]}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_grammar": "start: foo"}, "guided_grammar"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[z-a]"}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_names_its_field(service, body, param, stream):
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, **body}
    reply = ask(service.url, "POST", "/v1/chat/completions", body)
    assert (reply.status, reply.error()["param"]) == (400, param)
    assert len(reply.error()["message"]) < 1000


def test_what_asks_for_nothing_is_no_constraint():
    for body in (
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "regex": None}},
    ):
        sent = {"messages": [{"role": "user", "content": "Hi"}], **body}
        assert protocol.parse_chat(json.dumps(sent).encode(), 258).params.constraint is None


def test_nested_too_deeply():
    deep = '{"messages":[{"role":"user","content":"Hi"}],"guided_json":' + '{"a":' * 900 + "1" + "}" * 900 + "}"
    with pytest.raises(RequestError):
        protocol.parse_chat(deep.encode() + b"}", 258)


def test_others_stream_on_while_a_hostile_schema_compiles(real):
    """It is refused when its time is over. The pauses of another stream stay those of its own steps, or nearly."""
    hostile = {"properties": {f"k{index}": {"type": "string"} for index in range(4000)}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "guided_json": hostile, "max_tokens": 5}
    replies = []
    with client(real.url) as llm:
        asking = threading.Thread(target=lambda: replies.append(ask(real.url, "POST", "/v1/chat/completions", body)))
        asking.start()
        times = []
        while asking.is_alive():
            for _ in chat(llm, stream=True, extra_body={"ignore_eos": True}, max_tokens=500):
                times.append(time.monotonic())
        asking.join()
    assert replies[0].status in (200, 400)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert max(pauses) < 2


def test_a_client_that_leaves_while_its_schema_compiles(service):
    hostile = {"properties": {f"k{index}": {"type": "string"} for index in range(3900)}}
    leaving = send_only(service.url, "/v1/completions", {"prompt": "a", "guided_json": hostile})
    until(lambda: service.app.open == 1)
    leaving.close()
    until(lambda: service.app.open == 0, 3)
    with client(service.url) as llm:
        assert said(llm, guided_regex="still here") == "still here"


def test_with_tensor_parallel_ranks(tmp_path):
    """Rank 0 alone picks."""
    with (
        real_service(
            servable_snapshot(tmp_path / "snap", tp=2, max_length=1024), "--served-model-name", MODEL
        ) as running,
        client(running.url) as llm,
    ):
        assert said(llm, guided_choice=["yes", "no"]) in ("yes", "no")


def test_a_python_program(tmp_path):
    snapshot = servable_snapshot(tmp_path / "snap", max_length=1024)
    others = {*children(os.getpid())}
    with fgsnap.load(snapshot) as pipe:
        free = pipe("Hi", max_new_tokens=30, seed=1)
        answers = pipe(["Hi", "Ho"], regex="(a|b){5}c", max_new_tokens=20, n=2, ignore_eos=True)
        assert all(re.fullmatch("(a|b){5}c", answer.generated_text) for answer in answers) and len(answers) == 4
        assert {answer.finish_reason for answer in answers} == {"stop"}
        assert pipe("Hi", choice=["yes", "no"])[0].generated_text in ("yes", "no")
        assert json.loads(pipe("Hi", json_schema={"const": [1, "x"]})[0].generated_text) == [1, "x"]
        assert "".join(map(str, pipe.stream("Hi", grammar='start: "a" start "b" | "c"', max_new_tokens=99))).strip("ab")
        for wrong, param in (
            ({"regex": "("}, "regex"),
            ({"choice": []}, "choice"),
            ({"regex": "a", "grammar": "b"}, "gra"),
        ):
            with pytest.raises(RequestError) as refused:
                pipe("Hi", **wrong)
            assert refused.value.param.startswith(param)
        assert pipe.stats().running == pipe.stats().waiting == 0
        assert pipe("Hi", max_new_tokens=30, seed=1) == free
        (nursery,) = {*children(os.getpid())} - others
        grammars = children(nursery)
        assert grammars
    until(lambda: not any(map(alive, (nursery, *grammars))))
    assert answer(snapshot, "Hi", regex="(a|b){5}c", max_new_tokens=20).generated_text[-1] == "c"


def test_the_command_line(tmp_path, capsys):
    snapshot = str(servable_snapshot(tmp_path / "snap", max_length=1024))
    assert run_cli(["run", snapshot, "Hi", "--max-tokens", "20", "--choice", "quite so", "--choice", "not so"]) == 0
    assert capsys.readouterr().out.strip() in ("quite so", "not so")
    assert run_cli(["run", snapshot, "Hi", "--regex", "a", "--choice", "b"]) == 1
    assert "constrains the answer already" in capsys.readouterr().err


def test_python_threads_go_on_while_others_compile(tmp_path):
    """And whoever waits for nothing but a compiler takes no time."""
    hostile = {"properties": {f"k{index}": {"type": "string"} for index in range(3900)}}

    def compile_it() -> None:
        with contextlib.suppress(RequestError):
            pipe("Hi", json_schema=hostile, max_new_tokens=2)

    with fgsnap.load(servable_snapshot(tmp_path / "snap", max_length=1024)) as pipe:
        others = {*children(os.getpid())}
        first = threading.Thread(target=pipe, args=("Hi",), kwargs={"choice": ["yes"]})
        first.start()
        first.join()
        time.sleep(0.1)
        (nursery,) = {*children(os.getpid())} - others
        assert alive(nursery), "its processes end with the program, not with a thread of it"
        began = time.process_time()
        compile_it()
        assert time.process_time() - began < 1
        hostile["properties"]["another"] = {"type": "string"}
        other = threading.Thread(target=compile_it)
        other.start()
        until(lambda: pipe.stats().waiting)
        began = time.monotonic()
        assert len(pipe("Ho", max_new_tokens=3, ignore_eos=True)[0].tokens) == 3
        assert time.monotonic() - began < 1
        other.join()


def test_the_grammar_processes_end_with_the_service(tmp_path):
    with real_service(servable_snapshot(tmp_path / "snap", max_length=1024), "--served-model-name", MODEL) as running:
        worker = running.worker()
        with client(running.url) as llm:
            assert said(llm, guided_choice=["yes"]) == "yes"
        (nursery,) = children(worker)
        (grammar,) = children(nursery)
        running.process.kill()
        until(lambda: not any(map(alive, (worker, nursery, grammar))))


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_options_that_leave_a_constraint_no_token_are_the_request_s_own_doing(service):
    digits = [*b"0123456789"]
    body = {"prompt": "x", "max_tokens": 4, "guided_regex": "[0-9]", "stop_token_ids": digits, "min_tokens": 2}
    reply = ask(service.url, "POST", "/v1/completions", body)
    assert (reply.status, reply.error()["code"], reply.error()["param"]) == (400, "constraint", "guided_regex")
    assert "no token" in reply.error()["message"]
