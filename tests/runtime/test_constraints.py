"""Constrained answers: every one is what it has to be, and no constraint harms anybody but its own request."""

from __future__ import annotations

import json
import re
import select
import socket
import time

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgsnap.errors import RequestError
from fgsnap.runtime import grammars as grammars_module
from fgsnap.runtime import nursery
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.grammars import (
    LONG,
    MOST_IDLE,
    Compiled,
    FromGrammar,
    Grammars,
    Grown,
    Matcher,
    decode_constraint,
    frame,
)
from fgsnap.runtime.process import Worker, spawn
from fgsnap.runtime.request import Constraint, Output, Request, SamplingParams
from tests.doubles import ByteText, StubModel
from tests.grammars import byte_grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


PATTERNS = ["[a-f]{3,9}", "(foo|bar)+baz{2}", "[0-9]{3}-[0-9]{4}", "é{2}ü|ö{3}", "a?b*c+d{0,4}"]


@pytest.fixture(scope="module")
def grammars():
    made = byte_grammars()
    yield made
    made.close()


@pytest.fixture
def engine(grammars):
    return constrained_engine(grammars)


def constrained_engine(grammars, **settings) -> Engine:
    model = StubModel(**{"blocks": 256, **settings.pop("model", {})})
    return Engine(model, eos_token_ids=(ByteText.eos,), grammars=lambda: grammars, **settings)


def request(name: str, kind: str, text: str | dict, max_tokens: int = 200, **params) -> Request:
    text = text if isinstance(text, str) else json.dumps(text)
    params = {"seed": sum(name.encode()), **params}
    return Request(name, (1, 2, 3), SamplingParams(max_tokens, constraint=Constraint(kind, text), **params))


def finish(engine: Engine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while engine.has_work() or engine.awaited() is not None:
        if not engine.has_work():
            select.select([engine.awaited()], [], [], 1)
        for output in engine.step().outputs():
            outputs.setdefault(output.request, []).append(output)
    return outputs


def answers(engine: Engine, *requests: Request) -> dict[str, tuple[str, Output]]:
    for one in requests:
        engine.submit(one)
    return {
        name: (ByteText().decode([token.id for output in outputs for token in output.tokens]), outputs[-1])
        for name, outputs in finish(engine).items()
    }


def answer(engine: Engine, *arguments, **params) -> tuple[str, str]:
    """Text and how it ended: as a finish, or the code of an error."""
    text, last = answers(engine, request("one", *arguments, **params))["one"]
    return text, last.code or last.finish


def test_answers_match_their_schema(engine):
    found = answers(engine, *(request(f"r{index}", "json", PERSON) for index in range(20)))
    for text, last in found.values():
        assert last.finish == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert len({text for text, _ in found.values()}) > 15


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_match_their_expression(engine, pattern):
    found = answers(engine, *(request(f"r{index}", "regex", pattern, temperature=2.0) for index in range(10)))
    for text, last in found.values():
        assert last.finish == "stop" and re.fullmatch(pattern, text)


NAMES = st.sampled_from(["a", "bc", "ü", 'quo"te', "$x"])
SCHEMAS = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
                  st.integers(-1000, 1000), st.integers(0, 500)),
        st.builds(lambda values: {"enum": values}, st.lists(st.sampled_from(["x", "yé", 3, None, True]), min_size=1)),
        st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 4)),
        st.builds(lambda pattern: {"type": "string", "pattern": f"^({pattern})$"}, st.sampled_from(PATTERNS)),
    ),
    lambda inner: st.one_of(
        st.builds(lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": least + 2},
                  inner, st.integers(0, 2)),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
        st.builds(lambda found: {"type": "object", "properties": found, "required": [*found][:1],
                                 "additionalProperties": False}, st.dictionaries(NAMES, inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 99), options=st.sampled_from([{}, {"top_k": 3}, {"temperature": 0.0}]))
def test_answers_match_any_schema(engine, schema, seed, options):
    free = {**schema, "x-guidance": {"whitespace_flexible": False}}
    text, finish = answer(engine, "json", free, seed=seed, max_tokens=200, **options)
    assert finish in ("stop", "length")
    if finish == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert len(text) > 20


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.sampled_from([*PATTERNS, "[^a]", "ü*", "(x|yz){2}", "."]), min_size=1, max_size=4), data=st.data()
)
def test_answers_match_any_expression(engine, parts, data):
    """The text that comes is whole characters, also where tokens are not."""
    pattern = data.draw(st.sampled_from(["", "|"])).join(f"({part})" for part in parts)
    text, finish = answer(engine, "regex", pattern, seed=data.draw(st.integers(0, 99)))
    assert finish == "stop" and re.fullmatch(pattern, text)


def test_a_grammar(engine):
    grammar = 'start: "(" start ")" | "x"'
    text, finish = answer(engine, "lark", grammar)
    assert finish == "stop" and re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")")


def test_what_may_go_on_for_ever_ends_where_it_may_or_at_max_tokens(engine):
    assert answer(engine, "regex", "a*b*", temperature=3.0)[1] == "stop"
    text, finish = answer(engine, "regex", "a+", max_tokens=9, logit_bias=((ord("a"), 100.0),), ignore_eos=True)
    assert (text, finish) == ("a" * 9, "length")


def test_a_complete_answer_ends_whatever_else_is_asked_for(engine):
    """ignore_eos and min_tokens forbid what is the only thing left to come."""
    assert answer(engine, "regex", "abc", ignore_eos=True) == ("abc", "stop")
    assert answer(engine, "regex", "abc", min_tokens=50) == ("abc", "stop")


def test_min_tokens_keeps_an_answer_going(engine):
    text, finish = answer(engine, "regex", "(ab)*", min_tokens=30)
    assert finish == "stop" and len(text) >= 30 and set(text) == set("ab")


def test_a_bias_cannot_leave_the_constraint(engine):
    bias = ((ord("z"), 100.0), (ord("b"), 90.0))
    assert answer(engine, "regex", "[abc]{5}", logit_bias=bias) == ("bbbbb", "stop")


def test_penalties_and_logprobs(engine):
    found = answers(engine, request("r", "regex", "[a-z]{6}", presence_penalty=2.0, logprobs=3, repetition_penalty=1.5))
    text, last = found["r"]
    assert re.fullmatch("[a-z]{6}", text) and last.finish == "stop"


def test_a_stop_token_within_the_constraint(engine):
    text, finish = answer(engine, "regex", "[a-d]{1,40}", stop_token_ids=(ord("c"),), ignore_eos=True)
    assert finish == "stop" and "c" not in text


def test_a_constraint_that_other_options_leave_no_token(engine):
    stopping = {"stop_token_ids": (ord("a"),), "min_tokens": 5}
    assert answer(engine, "regex", "a{9}", **stopping) == ("", "constraint")
    assert answer(engine, "regex", "a{3}") == ("aaa", "stop")


def test_several_eos_tokens(grammars):
    """The library knows one of them, the first."""
    engine = constrained_engine(grammars)
    assert answer(engine, "regex", "a|aa|aaa")[1] == "stop"


def test_constrained_and_free_requests_share_steps(engine):
    free = [Request(f"f{index}", (1, index), SamplingParams(20, seed=index)) for index in range(4)]
    alone = {one.id: answers(engine, one)[one.id][0] for one in free}
    found = answers(engine, *free, *(request(f"c{index}", "json", PERSON) for index in range(4)))
    assert {name: found[name][0] for name in alone} == alone
    for index in range(4):
        jsonschema.validate(json.loads(found[f"c{index}"][0]), PERSON)


def test_a_preempted_answer_goes_on_as_if_nothing_had_happened(grammars):
    requests = [request(f"r{index}", "regex", "[a-z]{30,40}", max_tokens=60) for index in range(6)]
    apart = constrained_engine(grammars)
    alone = {one.id: answers(apart, one)[one.id][0] for one in requests}
    engine = constrained_engine(grammars, model={"blocks": 30}, admission="optimistic")
    found = answers(engine, *requests)
    assert engine.stats().preemptions > 0
    assert {name: text for name, (text, _) in found.items()} == alone
    assert engine.stats().kv_blocks_free == 30


HOSTILE = {
    "no schema": ("json", "[1]"),
    "a wrong type": ("json", {"type": "banana"}),
    "what is not supported": ("json", {"not": {"type": "string"}}),
    "a deep schema": ("json", '{"properties":{"a":' * 3000 + "{}" + "}}" * 3000),
    "a loop of references": ("json", {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}),
    "a reference elsewhere": ("json", {"$ref": "http://127.0.0.1:9/schema"}),
    "a bomb of alternatives": (
        "json",
        {"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}} for j in range(8)]} for i in range(8)]},
    ),
    "no expression": ("regex", "("),
    "many groups": ("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "many stars": ("regex", "a" + "*" * 20_000),
    "no grammar": ("lark", "start: foo"),
    "a deep grammar": ("lark", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "doubled terms": ("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"'),
    "a chain of rules": ("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(8000)) + 'a8000: "x"'),
    "a chain of terms": ("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(8000)) + 'A8000: "x"'),
    "a set difference": ("lark", "start: A\nA: /.*a.{50}/ & ~/.*b.{50}/ & /(.*c.{40})*/"),
    "many repetitions": ("regex", "a{1000000000}"),
    "optional letters": ("regex", "(a?){2000}a{2000}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_ends_alone_and_soon(engine, name):
    last = the_end_beside_another(engine, HOSTILE[name])
    assert (last.finish, last.code) == ("error", "constraint") and 0 < len(last.error) < 600


def test_a_constraint_that_a_fast_host_compiles_in_time_ends_soon_either_way(engine):
    last = the_end_beside_another(engine, ("json", {"properties": {f"k{i}": {"type": "string"} for i in range(5000)}}))
    assert (last.finish, last.code) in {("error", "constraint"), ("stop", ""), ("length", "")}


A_MOMENT = 0.1
"""Seconds that a step beside a grammar does not take, but where the processors are busy with something else."""


def the_end_beside_another(engine, constraint):
    """The last output of a request under this constraint; another answer flows on meanwhile."""
    engine.submit(Request("other", (1, 2), SamplingParams(250, ignore_eos=True)))
    engine.submit(request("hostile", *constraint))
    began, pauses, outputs = time.monotonic(), [], {"other": [], "hostile": []}
    while not outputs["hostile"] or outputs["hostile"][-1].finish is None:
        before = time.monotonic()
        for output in engine.step().outputs():
            outputs[output.request].append(output)
        pauses.append(time.monotonic() - before)
        if len(outputs["other"]) % 250 == 249:
            engine.abort("other")
            engine.submit(Request("other", (1, 2), SamplingParams(250, ignore_eos=True)))
    engine.abort("other")
    assert time.monotonic() - began < nursery.LOADED * nursery.COMPILE_SECONDS + 5
    assert sum(pause > A_MOMENT for pause in pauses) <= 3 + len(pauses) // 100
    assert outputs["other"]
    return outputs["hostile"][-1]


@pytest.fixture(scope="module")
def slow():
    made = byte_grammars("slow")
    yield made
    made.close()


def saying(name: str, letter: str, max_tokens: int) -> Request:
    """An answer of this letter alone, by a grammar that is slow with some letters."""
    return request(name, "lark", "any", max_tokens, logit_bias=((ord(letter), 100.0),), ignore_eos=True)


def test_no_step_waits_for_a_slow_mask(slow):
    """Its answer is held meanwhile, and goes on with the token that it would have had."""
    engine = constrained_engine(slow)
    begin(engine, saying("slow", "x", 2))
    engine.submit(Request("other", (1, 2), SamplingParams(250, seed=1, ignore_eos=True)))
    found = every_output(engine)
    ((place, token),) = [(at, one.tokens[0].id) for at, one in enumerate(found) if one.request == "slow"]
    assert token == ord("x") and {one.finish for one in found} == {None, "length"} and len(found) == 251
    assert place >= 5, "the other waited too"
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_who_waits_for_nothing_but_a_slow_mask_takes_no_time(slow):
    engine = constrained_engine(slow)
    begin(engine, saying("slow", "z", 2))
    while engine.has_work():
        engine.step()
    assert engine.awaited() is not None and engine.stats().running == 1
    began, steps = time.process_time(), engine.stats().steps
    (outputs,) = finish(engine).values()
    assert outputs[-1].finish == "length"
    assert time.process_time() - began < 0.1 and engine.stats().steps == steps + 1


def test_an_answer_that_is_slow_to_follow_ends_alone(slow):
    """It has taken its processor time; one by the same grammar, that only slept, has not."""
    found = answers(constrained_engine(slow), saying("x", "x", 50), saying("o", "o", 50), saying("z", "z", 2))
    text, last = found["x"]
    assert 2 <= len(text) <= 5 and (last.code, last.error) == ("constraint", nursery.TOO_SLOW)
    assert found["o"][0] == "o" * 50 and found["o"][1].finish == found["z"][1].finish == "length"


def test_a_mask_that_does_not_come_to_an_end_ends_its_grammar(slow):
    engine = constrained_engine(slow)
    engine.submit(Request("other", (1, 2), SamplingParams(200, seed=1, ignore_eos=True)))
    found = answers(engine, saying("k", "k", 50))
    assert (found["k"][0], found["k"][1].code) == ("k", "constraint")
    assert found["other"][1].finish == "length"


def test_slow_answers_let_the_others_by_their_grammar_pass(slow):
    """Else it would wait for each of the slow masks, once a token, and be the last."""
    engine = constrained_engine(slow)
    for number in range(4):
        engine.submit(saying(f"x{number}", "x", 3))
    engine.submit(saying("o", "o", 4))
    ended = [output.request for output in every_output(engine) if output.finish == "length"]
    assert len(ended) == 5 and ended[-1] != "o"


def test_where_too_many_answers_are_slow_the_last_in_turn_end():
    made = byte_grammars("slow", "0.15")
    engine = constrained_engine(made)
    found = answers(engine, *(saying(f"x{number}", "x", 2) for number in range(5)))
    ends = [(last.finish, last.code, last.error) for _, last in found.values()]
    assert {*ends} == {("length", "", ""), ("error", "constraint", nursery.CROWDED)} and len(ends) == 5
    made.close()


def begin(engine: Engine, one: Request) -> None:
    """Have it say its first token."""
    engine.submit(one)
    while not engine.stats().generated_tokens:
        select.select([engine.awaited()], [], [])
        engine.step()


def every_output(engine: Engine) -> list[Output]:
    found = []
    while engine.has_work() or engine.awaited() is not None:
        found += engine.step().outputs()
    return found


def test_what_only_looks_hostile(engine):
    alternatives = [f"word{index}" for index in range(3000)]
    assert answer(engine, "regex", "|".join(alternatives))[0] in alternatives
    assert answer(engine, "regex", "(a+)+b")[1] == "stop"
    assert answer(engine, "regex", "a{1,1000000}", max_tokens=20, ignore_eos=True) == ("a" * 20, "length")


def test_an_aborted_request_is_forgotten_while_its_constraint_compiles(engine):
    engine.submit(request("gone", "lark", HOSTILE["doubled terms"][1]))
    assert engine.awaited() is not None and not engine.has_work()
    engine.abort("gone")
    assert engine.awaited() is None and engine.stats().waiting == 0
    assert answer(engine, "regex", "ok") == ("ok", "stop")


def test_a_deadline_ends_a_request_whose_constraint_compiles(grammars):
    now = [0.0]
    engine = constrained_engine(grammars, clock=lambda: now[0])
    kind, text = HOSTILE["a set difference"]
    engine.submit(Request("late", (1,), SamplingParams(5, constraint=Constraint(kind, text + " ")), timeout=1.0))
    now[0] = 2.0
    (output,) = engine.step().ends
    assert output.code == "deadline_exceeded" and engine.awaited() is None


def test_equal_constraints_share_a_grammar_and_few_are_kept():
    made = byte_grammars()
    engine = constrained_engine(made)
    answers(engine, *(request(f"r{index}", "regex", "[ab]{4}") for index in range(5)))
    assert len(made._known) == 1
    for index in range(MOST_IDLE + 5):
        answer(engine, "regex", f"[ab]{{4}}{index}")
    assert len(made._known) <= MOST_IDLE + 1
    made.close()


def test_a_grammar_whose_process_is_killed_ends_its_answers_only(grammars, engine):
    engine.submit(request("kept", "regex", "[a-z]{100}"))
    engine.submit(request("lost", "regex", "[0-9]{100}"))
    while engine.awaited() is not None:
        engine.step()
    lost = next(one for constraint, one in grammars._known.items() if constraint.text == "[0-9]{100}")
    lost.pipe.shutdown(2)
    found = finish(engine)
    assert found["lost"][-1].code == "constraint"
    assert found["kept"][-1].finish == "stop"


def test_a_nursery_that_dies_is_replaced():
    made = byte_grammars()
    engine = constrained_engine(made)
    assert answer(engine, "regex", "one") == ("one", "stop")
    made._nursery.kill()
    made._nursery.wait()
    codes = [answer(engine, "regex", f"two{index}") for index in range(2)]
    assert codes[1] == ("two1", "stop")
    made.close()


def test_an_engine_without_grammars_says_so():
    with pytest.raises(RequestError) as refused:
        Engine(StubModel()).submit(request("r", "regex", "a"))
    assert refused.value.status == 501 and len(refused.value.lines()) == 2


def test_without_the_library_a_constraint_is_refused():
    made = Grammars(lambda: spawn("tests.grammars", "without"))
    assert answer(constrained_engine(made), "regex", "a") == ("", "not_supported")
    made.close()


def test_a_known_grammar_that_ended_meanwhile_is_compiled_again():
    made = byte_grammars()
    engine = constrained_engine(made)
    assert answer(engine, "regex", "one") == ("one", "stop")
    (known,) = made._known.values()
    known.pipe.shutdown(2)
    assert answer(engine, "regex", "one") == ("one", "stop")
    made.close()


class Compiler:
    """A nursery whose grammars are compiled when they are told to be."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.pipes: dict[str, socket.socket] = {}
        self.order: list[str] = []
        self.matchers: dict[str, Matcher] = {}
        self.grammars = Grammars(lambda: Worker(self.near, lambda: None, lambda: ""))

    def ask(self, *texts: str) -> None:
        for text in texts:
            self.matchers[text] = self.grammars.matcher(Constraint("lark", text), open_end=False)
            self.look()

    def compile(self, text: str) -> None:
        self.tell(text, Compiled())
        self.look()

    def tell(self, text: str, message: FromGrammar) -> None:
        self.pipes[text].sendall(frame(message))
        self.grammars.hear()

    def look(self) -> None:
        while select.select([self.far], [], [], 0)[0]:
            data, (descriptor,), _, _ = socket.recv_fds(self.far, 1 << 20, 1)
            text = decode_constraint(data[4:]).text
            self.pipes[text] = socket.socket(fileno=descriptor)
            self.order.append(text)

    def close(self) -> None:
        self.grammars.close()
        for pipe in [self.far, *self.pipes.values()]:
            pipe.close()


@pytest.fixture
def compiler():
    made = Compiler()
    yield made
    made.close()


def test_a_short_grammar_is_compiled_beside_long_ones(compiler, monkeypatch):
    monkeypatch.setattr(grammars_module, "MOST_COMPILING", 2)
    long = [str(number) * LONG for number in range(4)]
    compiler.ask(*long, "a", "b")
    assert compiler.order == [long[0], "a"]
    compiler.compile("a")
    assert compiler.order == [long[0], "a", "b"]
    compiler.compile(long[0])
    assert compiler.order == [long[0], "a", "b", long[1]]


def test_no_grammar_waits_for_ever_for_shorter_ones(compiler, monkeypatch):
    monkeypatch.setattr(grammars_module, "MOST_COMPILING", 2)
    oldest, older = "x" * 100, "x" * 50
    compiler.ask("first", "second", oldest, older, *"abcd")
    for text in ("first", "second", "a", older):
        compiler.compile(text)
    assert compiler.order == ["first", "second", oldest, "a", older, "b"], "the oldest and the shortest take turns"


def test_grammars_take_no_more_memory_together_than_they_are_given(compiler, monkeypatch):
    """Who is idle goes first, then who takes the most; one that has not told of more goes on."""
    monkeypatch.setattr(grammars_module, "MOST_MEMORY", 100)
    compiler.ask("idle", "large", "small")
    for text, memory in (("idle", 10), ("small", 40), ("large", 50)):
        compiler.compile(text)
        compiler.tell(text, Grown(memory))
    idle, large, small = compiler.matchers.values()
    idle.close()
    compiler.tell("small", Grown(49))
    assert {one.text for one in compiler.grammars._known} == {"large", "small"} and not large.error
    compiler.tell("small", Grown(60))
    assert (small.code, large.error) == ("constraint", "") and "memory" in small.error


def test_a_grammar_tells_of_the_memory_that_it_takes():
    made = byte_grammars()
    keys = {f"k{index}": {"type": "string"} for index in range(2000)}
    answer(constrained_engine(made), "json", {"properties": keys}, max_tokens=2)
    (grammar,) = made._known.values()
    assert 1 << 22 < grammar.memory < 1 << 30
    made.close()
