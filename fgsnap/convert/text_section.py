"""What a snapshot knows of text besides the tokenizer: where answers end, and whether prompts begin with a token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from fgsnap.errors import SourceError
from fgsnap.snapshot import TextSection


class _Tokenizer(msgspec.Struct):
    """The parts of a tokenizer.json that matter here; the vocabulary stays bytes until it is asked for."""

    added_tokens: list[Any] = []
    post_processor: Any = None
    model: msgspec.Raw = msgspec.Raw(b"{}")


def text_section(files: Mapping[str, bytes], config: Mapping[str, Any], vocab_size: int) -> TextSection:
    """Settle the text section from the checkpoint's small files, as transformers would read them."""
    stated = {**config, **_present(_json(files, "generation_config.json"))}
    bos_id, add_bos = _bos(_json(files, "tokenizer_config.json"), _tokenizer(files), stated.get("bos_token_id"))
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        bos_id, add_bos = None, False
    return TextSection(
        eos_token_ids=_eos(stated.get("eos_token_id"), vocab_size),
        bos_token_id=bos_id,
        add_bos=add_bos,
        template="jinja" if "chat_template.jinja" in files else None,
    )


def _eos(value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or token >= vocab_size:
            raise SourceError(
                f"The eos_token_id {token!r} is no token of this model.",
                f"Its vocabulary has {vocab_size} entries.",
                "Correct eos_token_id in generation_config.json or config.json.",
            )
    return tuple(sorted({token for token in ids if token >= 0}))  # some configs say -1 for none


def _bos(tokenizer_config: Mapping[str, Any], tokenizer: _Tokenizer, stated: Any) -> tuple[int | None, bool]:
    """The token that begins a text, and whether the tokenizer puts it before raw text.

    The post-processor inside tokenizer.json decides; transformers ignores the flags beside it, which are often stale.
    """
    named = _token_id(tokenizer, tokenizer_config.get("bos_token"))
    bos_id = named if named is not None else stated if type(stated) is int else None
    first = _token_id(tokenizer, _first_special(tokenizer.post_processor))
    return (bos_id, False) if first is None else (first, True)


def _first_special(processor: Any) -> str | None:
    """The special token that a tokenizer.json's post-processor puts before a single text, if any."""
    if not isinstance(processor, dict):
        return None
    for inner in processor.get("processors") or ():
        found = _first_special(inner)
        if found is not None:
            return found
    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    special = first.get("SpecialToken") if isinstance(first, dict) else None
    name = special.get("id") if isinstance(special, dict) else None
    return name if isinstance(name, str) else None


def _token_id(tokenizer: _Tokenizer, token: Any) -> int | None:
    """The id of a token given as text or as an added-token object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return None
    for added in tokenizer.added_tokens:
        if isinstance(added, dict) and added.get("content") == text and type(added.get("id")) is int:
            return int(added["id"])
    inner = msgspec.json.decode(tokenizer.model)
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    found = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return found if type(found) is int else None


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _tokenizer(files: Mapping[str, bytes]) -> _Tokenizer:
    try:
        return msgspec.json.decode(files.get("tokenizer.json", b"{}"), type=_Tokenizer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _damaged("tokenizer.json") from None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(name)
    return value


def _damaged(name: str) -> SourceError:
    return SourceError(f"{name} is not the JSON object it should be.", "It is damaged.", "Download it again.")
