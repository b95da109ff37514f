"""The tokenizer inside a GGUF file, rebuilt as the Hugging Face files that a snapshot keeps.

GGUF stores the vocabulary and names how text is cut before the merges apply (``tokenizer.ggml.pre``); the cutting is
code elsewhere, so each kind is written down here once. A kind that is not listed is refused by name: with the wrong cut
a model seems to work and answers badly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from fgsnap.convert.source import show
from fgsnap.errors import SourceError, UnsupportedModel

# Kinds of token in tokenizer.ggml.token_type; the rest (unknown, unused, byte) need no treatment of their own.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MAX_TOKEN_CHARACTERS = 1024
SPACE = "▁"

# How byte-level vocabularies cut text. In words, GPT-2: contractions, words, numbers and punctuation with one leading
# space each; Llama-3 and Qwen2 also cut numbers into groups of at most 3 or 1 digits and keep line ends together.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_CUT = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}"
QWEN2_CUT = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_CUT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O_CUT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What llama.cpp does for a file that names no kind: punctuation by itself, then the GPT-2 cut, then digits by threes.
GPT2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEFAULT_CUTS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_CUT, r"\p{N}+", r"[0-9][0-9][0-9]")


class Cut(NamedTuple):
    """One kind of ``tokenizer.ggml.pre``: how text is cut, and what its tokenizers do besides."""

    steps: Callable[[], list[Any]]
    whole_words: bool = False  # a piece that is a token itself is taken before any merge
    add_bos: bool = False  # where the file does not say
    nfc: bool = False


def _gpt2() -> list[Any]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _digits_then_gpt2() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _by(*patterns: str) -> Callable[[], list[Any]]:
    def steps() -> list[Any]:
        cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    return steps


LLAMA3 = Cut(_by(LLAMA3_CUT), whole_words=True, add_bos=True)
CUTS: dict[str, Cut] = {
    "gpt-2": Cut(_gpt2),
    "default": Cut(_by(*DEFAULT_CUTS)),
    "smollm": Cut(_digits_then_gpt2),
    "starcoder": Cut(_digits_then_gpt2),
    "refact": Cut(_digits_then_gpt2),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "dbrx": Cut(_by(LLAMA3_CUT)),
    "smaug-bpe": Cut(_by(LLAMA3_CUT)),
    "qwen2": Cut(_by(QWEN2_CUT), nfc=True),
    "tekken": Cut(_by(TEKKEN_CUT), whole_words=True, add_bos=True),
    "gpt-4o": Cut(_by(GPT4O_CUT)),
}

GEMMA = ("gemma2", "gemma3")
"""Architectures whose SentencePiece vocabularies merge runs of blanks, tabs and line ends as whole tokens."""


class Vocabulary(NamedTuple):
    """The checked vocabulary of a GGUF file."""

    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool


def text_files(metadata: dict[str, Any], label: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, where the file has one."""
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        vocabulary, tokenizer = _byte_level(metadata, label)
    elif model == "llama":
        vocabulary, tokenizer = _sentencepiece(metadata, label)
    else:
        raise UnsupportedModel(
            f"{label} has the GGUF tokenizer {show(model)}.",
            "Known are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE).",
            "Convert from the original Hugging Face checkpoint.",
        )
    _add_special_tokens(tokenizer, vocabulary)
    template = metadata.get("tokenizer.chat_template")
    files = {
        "tokenizer.json": (tokenizer.to_str(pretty=False) + "\n").encode(),
        "tokenizer_config.json": _json(_tokenizer_config(vocabulary, metadata)),
        "generation_config.json": _json(_generation_config(vocabulary, metadata, template)),
    }
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return files


def _byte_level(metadata: dict[str, Any], label: str) -> tuple[Vocabulary, Tokenizer]:
    kind = metadata.get("tokenizer.ggml.pre", "default")
    cut = CUTS.get(kind) if isinstance(kind, str) else None
    if cut is None:
        raise UnsupportedModel(
            f"{label} cuts text the way {show(kind)} (tokenizer.ggml.pre), which is not known.",
            f"Known are: {', '.join(sorted(CUTS))}.",
            "Convert from the original Hugging Face checkpoint.",
        )
    vocabulary = _vocabulary(metadata, label, add_bos=cut.add_bos)
    merges = _merges(metadata, vocabulary, label)
    tokenizer = Tokenizer(BPE(_ids(vocabulary), merges, fuse_unk=False, ignore_merges=cut.whole_words))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut.steps())
    tokenizer.decoder = decoders.ByteLevel()
    return vocabulary, tokenizer


def _sentencepiece(metadata: dict[str, Any], label: str) -> tuple[Vocabulary, Tokenizer]:
    """SentencePiece BPE: merges are not stored but follow from the scores; unknown characters fall back to bytes."""
    vocabulary = _vocabulary(metadata, label, add_bos=True)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens) or {*map(type, scores)} != {float}:
        raise SourceError(f"{label} has no score for each token.", "A SentencePiece vocabulary needs them.")
    if metadata.get("general.architecture") in GEMMA:
        vocabulary = _with_runs(vocabulary, label)
        merges = _gemma_merges(vocabulary, scores)
    else:
        merges = _scored_merges(vocabulary, scores)
    unknown = None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown]
    model = BPE(_ids(vocabulary), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return vocabulary, tokenizer


def _vocabulary(metadata: dict[str, Any], label: str, *, add_bos: bool) -> Vocabulary:
    """The token list and its special ids, each checked to be in range."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise SourceError(f"{label} has no vocabulary.", "tokenizer.ggml.tokens should be a list of texts.")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise SourceError(f"{label} has no type for each token.", f"It has {len(tokens)} tokens.")
    _check_distinct(tokens, label)
    longest = max(tokens, key=len)
    if len(longest) > MAX_TOKEN_CHARACTERS:
        raise SourceError(f"{label} has a token of {len(longest)} characters.", f"The limit is {MAX_TOKEN_CHARACTERS}.")

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise SourceError(f"{label} has {show(value)} as its {key} token.", f"There are {len(tokens)} tokens.")
        return value

    said = metadata.get("tokenizer.ggml.add_bos_token", add_bos)
    bos = token_id("bos")
    return Vocabulary(
        tokens,
        types,
        bos,
        token_id("eos"),
        token_id("unknown"),
        token_id("padding"),
        add_bos=bool(said) and bos is not None,
    )


def _check_distinct(tokens: list[str], label: str) -> None:
    if len(set(tokens)) != len(tokens):
        raise SourceError(f"{label} has a token twice.", "One text cannot have two ids.")


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary.tokens)}


def _merges(metadata: dict[str, Any], vocabulary: Vocabulary, label: str) -> list[tuple[str, str]]:
    """The stored merges as pairs, both sides and their sum in the vocabulary."""
    stored = metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise SourceError(f"{label} has no merges.", "A byte-level vocabulary needs tokenizer.ggml.merges.")
    known = set(vocabulary.tokens)
    merges = []
    for merge in stored:
        left, _, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not {left, right, left + right} <= known:
            raise SourceError(f"{label} has the merge {show(merge)}.", "Both parts and the whole must be tokens.")
        merges.append((left, right))
    return merges


def _scored_merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token from two others, best score first: the order in which SentencePiece merges."""
    ids = {token: index for token, index in _ids(vocabulary).items() if vocabulary.types[index] == NORMAL}
    found = [(-scores[index], index, ids[left], ids[right], left, right) for index, left, right in _ways_to_merge(ids)]
    found.sort()
    return [(left, right) for *_, left, right in found]


def _gemma_merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The same as Gemma's own tokenizer.json has it: tokens of every type take part, and longer parts come first.

    User-defined tokens have the score 0 there, the best there is, where llama.cpp writes -1000.
    """
    best = [0.0 if kind == USER_DEFINED else score for kind, score in zip(vocabulary.types, scores, strict=True)]
    found = [
        (-best[index], -len(left), -len(right), index, left, right)
        for index, left, right in _ways_to_merge(_ids(vocabulary))
    ]
    found.sort()
    return [(left, right) for *_, left, right in found]


def _ways_to_merge(ids: dict[str, int]) -> Iterator[tuple[int, str, str]]:
    """Each token's id with each two tokens that it is made of."""
    for token, index in ids.items():
        for at in range(1, len(token)):
            if token[:at] in ids and token[at:] in ids:
                yield index, token[:at], token[at:]


def _with_runs(vocabulary: Vocabulary, label: str) -> Vocabulary:
    """The vocabulary with its runs of blanks as the normalised text has them; llama.cpp writes real blanks."""
    tokens = [token.replace(" ", SPACE) if not token.strip(" ") else token for token in vocabulary.tokens]
    _check_distinct(tokens, label)
    return vocabulary._replace(tokens=tokens)


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are special; user-defined ones are matched whole in text but stay text."""
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if token and (kind == CONTROL or index == vocabulary.unknown):
            special.append(AddedToken(token, special=True, normalized=False))
        elif token and kind == USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    if vocabulary.add_bos and vocabulary.bos is not None:
        bos = vocabulary.tokens[vocabulary.bos]
        if ":" in bos or bos.startswith("$"):
            raise SourceError(f"The beginning-of-text token {show(bos)} cannot stand in a template.")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, vocabulary.bos)]
        )


def _tokenizer_config(vocabulary: Vocabulary, metadata: dict[str, Any]) -> dict[str, Any]:
    named = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.padding,
    }
    return {
        **{name: vocabulary.tokens[index] for name, index in named.items() if index is not None},
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _generation_config(vocabulary: Vocabulary, metadata: dict[str, Any], template: Any) -> dict[str, Any]:
    """The ids that end an answer: the file's own, and the end-of-turn token that its chat template writes."""
    ids = _ids(vocabulary)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if isinstance(template, str):
        ends += [ids.get(token) for token in END_OF_TURN if token in template]
    known = list(dict.fromkeys(end for end in ends if type(end) is int and 0 <= end < len(vocabulary.tokens)))
    values = {"bos_token_id": vocabulary.bos, "pad_token_id": vocabulary.padding}
    result: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if known:
        result["eos_token_id"] = known[0] if len(known) == 1 else known
    return result


END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
