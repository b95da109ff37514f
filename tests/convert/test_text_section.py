"""Where answers end and what texts begin with, as transformers reads the same files."""

from __future__ import annotations

import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from fgsnap.convert.text_section import text_section
from fgsnap.errors import SourceError

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "<bos>"]


def tokenizer_json(*, template=None, sequence=False, special=True):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.add_special_tokens(["<s>", "</s>", "<bos>"])
    if template is not None:
        post = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("<bos>", 5)])
        if sequence:
            post = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), post])
        made.post_processor = post
    return made.to_str().encode()


def section(config=None, **files):
    raw = {
        name.replace("__", "."): value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in files.items()
    }
    return text_section(raw, config or {}, len(TOKENS))


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [4, 2]}, None, (2, 4)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": -1}, None, ()),
        ({}, None, ()),
    ],
)
def test_eos(config, generation, ids):
    files = {} if generation is None else {"generation_config__json": generation}
    assert section(config, **files).eos_token_ids == ids


@pytest.mark.parametrize("value", [6, "2", True, [2, 99]])
def test_an_eos_that_is_no_token_is_refused(value):
    with pytest.raises(SourceError, match="eos_token_id"):
        section({"eos_token_id": value})


@pytest.mark.parametrize("template", [None, "$A", "<s> $A", "<bos> $A", "$A <bos>"])
@pytest.mark.parametrize("explicit", [None, True, False])
@pytest.mark.parametrize("sequence", [False, True])
def test_bos_as_transformers_puts_it(tmp_path, template, explicit, sequence):
    raw = tokenizer_json(template=template, sequence=sequence)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if explicit is not None:
        config["add_bos_token"] = explicit
    (tmp_path / "tokenizer.json").write_bytes(raw)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)("a b").input_ids
    ours = section(tokenizer__json=raw, tokenizer_config__json=config)
    assert ([ours.bos_token_id] if ours.add_bos else []) == [token for token in theirs[:1] if TOKENS[token] != "a"]


def test_bos_by_name_by_object_and_by_config():
    raw = tokenizer_json(special=False)
    assert section(tokenizer__json=raw, tokenizer_config__json={"bos_token": "<bos>"}).bos_token_id == 5
    assert section(tokenizer__json=raw, tokenizer_config__json={"bos_token": {"content": "<s>"}}).bos_token_id == 1
    assert section({"bos_token_id": 1}).bos_token_id == 1
    assert section({"bos_token_id": 99}).bos_token_id is None
    assert section({}).bos_token_id is None


def test_template():
    assert section(chat_template__jinja=b"{{ messages }}").template == "jinja"
    assert section().template is None


@pytest.mark.parametrize("name", ["tokenizer__json", "tokenizer_config__json", "generation_config__json"])
@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff"])
def test_damaged_files_are_named(name, raw):
    with pytest.raises(SourceError, match=name.replace("__", ".")):
        section(**{name: raw})
