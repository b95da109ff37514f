"""Which field of a body is no JSON. Only for bodies that were found to be none, to tell their senders more."""

from __future__ import annotations

import re
from json import JSONDecoder, dumps
from typing import NamedTuple

import msgspec

GAP = re.compile(r"[ \t\n\r]*")


class Misread(NamedTuple):
    """A field's name, empty if the fault is in no field's value; and what is wrong, if there is more to say."""

    field: str = ""
    why: str = ""


def first_misread(body: bytes) -> Misread:
    """The first field of a JSON object whose value cannot be read."""
    try:
        return _search(body.decode())
    except (ValueError, RecursionError):  # the fault is between fields, or so deep that nothing is found out
        return Misread()


def _search(text: str) -> Misread:
    at = _after(text, "{", 0)
    while True:
        field, at = JSONDecoder().raw_decode(text, _gap(text, at))
        begin = _after(text, ":", at)
        why, at = _value(text, begin)
        if at < 0:
            return Misread(str(field), why)
        at = _after(text, ",", at)


def _value(text: str, begin: int) -> tuple[str, int]:
    """Where the value ends that begins here; -1 and why if it cannot be read."""
    try:
        _, end = JSONDecoder(parse_constant=_refuse_constant).raw_decode(text, begin)
        msgspec.json.decode(text[begin:end])
    except _NoNumber as error:
        return f"{error} is no number of it", -1
    except ValueError:
        return ("" if _is_unicode(text, begin) else "half of a surrogate pair stands alone in it"), -1
    return "", end


def _is_unicode(text: str, begin: int) -> bool:
    try:
        value, _ = JSONDecoder().raw_decode(text, begin)
        dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except ValueError:
        pass
    return True


class _NoNumber(Exception):
    pass


def _refuse_constant(name: str) -> None:
    raise _NoNumber(name)


def _gap(text: str, at: int) -> int:
    found = GAP.match(text, at)
    return at if found is None else found.end()


def _after(text: str, mark: str, at: int) -> int:
    """Where the gap after ``mark`` ends, which is the next that stands here. ValueError if it does not."""
    at = _gap(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"no {mark}")
    return _gap(text, at + 1)
