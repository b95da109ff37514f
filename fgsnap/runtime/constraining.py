"""The fields of a body that constrain the answer, OpenAI's, vLLM's and the pipeline's, read into one constraint.

They are bounded here; what they say is looked into by who compiles them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fgsnap.errors import RequestError
from fgsnap.runtime.request import Constraint

LONGEST = 1 << 17
"""Bytes of a schema, an expression or a grammar."""

MOST_CHOICES = 1024
JSON_OBJECT = '{"type":"object"}'
MODES = ("json", "regex", "choice", "grammar", "json_object")


def constraint_of(sent: Mapping[str, Any], fields: Sequence[str]) -> Constraint | None:
    """The constraint that a body asks for in one of ``fields``. RequestError if it is none, or there are two."""
    found = [one for field in fields if (one := _read(field, sent.get(field))) is not None]
    if len(found) > 1:
        raise _wrong(found[1].field, f"{found[0].field} constrains the answer already.")
    return found[0] if found else None


def _read(field: str, value: Any) -> Constraint | None:
    if value is None:
        return None
    if field == "response_format":
        return _response_format(value)
    if field == "structured_outputs":
        return _structured_outputs(value)
    return _MODES[field.removeprefix("guided_")](value, field)


def _response_format(value: Any) -> Constraint | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", JSON_OBJECT, "response_format")
    if kind != "json_schema":
        raise _wrong("response_format", 'It must be an object whose type is "text", "json_object" or "json_schema".')
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or "schema" not in inner:
        raise _wrong("response_format.json_schema", "It must be an object that holds the schema.")
    return _schema(inner["schema"], "response_format")


def _structured_outputs(value: Any) -> Constraint | None:
    field = "structured_outputs"
    if not isinstance(value, dict):
        raise _wrong(field, "It must be an object.")
    asked = {name: one for name, one in value.items() if one is not None and one is not False}
    if strays := sorted(asked.keys() - set(MODES)):
        raise _wrong(field, f"'{strays[0][:40]}' is not supported by this server.")
    if len(asked) > 1:
        raise _wrong(field, f"It names {len(asked)} constraints; it must be one of {', '.join(MODES)}.")
    return next((_MODES[name](one, f"{field}.{name}") for name, one in asked.items()), None)


def _schema(value: Any, field: str) -> Constraint:
    """A schema as an object, or as its text."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(_bounded(value, field))
        except (msgspec.DecodeError, RecursionError):
            raise _wrong(field, "The schema cannot be read as JSON.") from None
    if not isinstance(value, dict | bool):
        raise _wrong(field, "The schema must be an object.")
    return Constraint("json", _bounded(_json(value, field), field), field)


def _json(value: Any, field: str) -> str:
    """The text of a schema, of which a Python program may have made anything."""
    try:
        text = _bounded(msgspec.json.encode(value).decode(), field)
        json.dumps(value, allow_nan=False)  # msgspec makes null of NaN
    except RecursionError:
        raise _wrong(field, "The schema is nested too deeply.") from None
    except (TypeError, ValueError) as error:
        raise _wrong(field, f"The schema cannot be written as JSON: {error}.") from None
    return text


def _json_object(value: Any, field: str) -> Constraint:
    if value is not True:
        raise _wrong(field, "It must be true or false.")
    return Constraint("json", JSON_OBJECT, field)


def _regex(value: Any, field: str) -> Constraint:
    return Constraint("regex", _bounded(value, field), field)


def _grammar(value: Any, field: str) -> Constraint:
    return Constraint("lark", _bounded(value, field), field)


def _choice(value: Any, field: str) -> Constraint:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CHOICES:
        raise _wrong(field, f"It must be a list of 1 to {MOST_CHOICES} texts.")
    if not all(isinstance(one, str) and one for one in value):
        raise _wrong(field, "Every choice must be a text that is not empty.")
    return Constraint("regex", _bounded("|".join(map(re.escape, value)), field), field)


_MODES: dict[str, Callable[[Any, str], Constraint]] = {
    "json": _schema,
    "json_schema": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def _bounded(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(field, "It must be a text that is not empty.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise _wrong(field, "It is not valid Unicode.") from None
    if size > LONGEST:
        raise _wrong(field, f"It has {size} bytes; the most are {LONGEST}.")
    return value


def _wrong(field: str, why: str) -> RequestError:
    return RequestError(f"{field}: {why}", param=field.partition(".")[0], code="invalid_value")
