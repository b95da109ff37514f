"""Constrained answers: every one is what it has to be, and no constraint harms anybody but its own request."""

from __future__ import annotations

import json
import re
import select

import jsonschema
import pytest

from fgsnap.runtime.engine import Engine
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


@pytest.mark.parametrize(
    "pattern", ["[a-f]{3,9}", "(foo|bar)+baz{2}", "[0-9]{3}-[0-9]{4}", "é{2}ü|ö{3}", "a?b*c+d{0,4}"]
)
def test_answers_match_their_expression(engine, pattern):
    found = answers(engine, *(request(f"r{index}", "regex", pattern, temperature=2.0) for index in range(10)))
    for text, last in found.values():
        assert last.finish == "stop" and re.fullmatch(pattern, text)


def test_a_grammar(engine):
    grammar = 'start: "(" start ")" | "x"'
    text, finish = answer(engine, "lark", grammar)
    assert finish == "stop" and re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")")
