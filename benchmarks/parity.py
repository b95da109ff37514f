"""How far fgsnap's answers are from those of transformers: logits, greedy tokens, and bfloat16 rounding.

Models: SmolLM2-135M-Instruct (the bfloat16 snapshot of its GGUF file, exported for transformers) and tiny random Llama
and Mistral checkpoints. All of a text's tokens are teacher-forced, over a paged cache in ragged chunks.

    python benchmarks/parity.py [--backend native --backend reference] [--output benchmarks/results]

float32: the largest logit difference as a share of the largest logit (promise: 1e-4), and how many of 64 greedy tokens
agree (promise: all). bfloat16: the error against transformers in float32, divided by that of transformers in bfloat16,
twice: root mean square over all logits (promise: at most 1.25), and the largest single logit's, which one outlier of
either side decides and which nothing is promised of. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from common import finish, smollm2_gguf
from compare import Fgsnap, Transformers, mean_error, random_sequences, relative_error, tiny_checkpoint
from tokenizers import Tokenizer

from fgsnap.convert.export import export
from fgsnap.convert.pipeline import convert
from fgsnap.kernels import native
from fgsnap.runtime.decoder import Decoder, load_decoder
from fgsnap.snapshot import open_snapshot

GREEDY, CHUNK, BLOCK_SIZE = 64, 48, 7
PROMISED_LOGITS, PROMISED_RATIO = 1e-4, 1.25
TEXTS = (
    "The lighthouse keeper counted the ships each evening and wrote their names into a thick green book. When the fog "
    "came in, he could hear them before he saw them: first a bell, then the slow beat of an engine, then voices. One "
    "night there was a bell and nothing else. He climbed the stairs, lit the second lamp, and waited until morning.",
    "To sort a list in Python, call sorted(values) for a new list or values.sort() to change the list in place. Both "
    "take a key function: sorted(words, key=len) orders words by their length, and equal ones keep their order.",
    "What is 17 times 23?",
    "Once upon a time there was a small fox who lived at the edge of a wide forest. Every morning she walked down to "
    "the river to drink, and every morning the old heron greeted her with the same question: what did you dream? The "
    "fox never remembered her dreams, so she made them up, and each day they grew longer and stranger. In one of them "
    "the river ran uphill and carried the heron to the moon. The heron laughed for the first time in many years, and "
    "from then on it was the heron who came early, and the fox who was asked to begin again from the start.",
    "A snapshot is a directory with one file for each rank. Whoever opens it reads the manifest first, compares the "
    "sizes and the digests, and maps the files into memory. Nothing is parsed twice, nothing is copied, and nothing in "
    "it can run. If a single byte has changed since it was written, the reader says which file and which part of it, "
    "and stops. The converter pays for all of this once, so that a thousand starts do not have to.",
    "Preheat the oven to 220 degrees. Mix 500 g of flour, 10 g of salt and 7 g of yeast in a large bowl, add 350 ml of "
    "warm water, and knead the dough for ten minutes until it is smooth. Cover it, let it rest for one hour, shape it "
    "into a loaf, and wait another half hour. Cut the top with a sharp knife. Bake for 35 minutes; the bread is ready "
    "when it sounds hollow. 1. Do not open the oven early. 2. Let the loaf cool before you cut it. 3. Keep the crust.",
    "def primes(limit):\n    sieve = [True] * (limit + 1)\n    for n in range(2, int(limit ** 0.5) + 1):\n"
    "        if sieve[n]:\n            for multiple in range(n * n, limit + 1, n):\n"
    "                sieve[multiple] = False\n    return [n for n in range(2, limit + 1) if sieve[n]]\n\n"
    "print(primes(100))  # 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83\n",
)


class Model(NamedTuple):
    """A checkpoint that transformers can load, its snapshot, token sequences, and a prompt to continue."""

    name: str
    checkpoint: Path
    snapshot: Path
    sequences: list[list[int]]
    prompt: list[int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", help="may be given several times; default: all that work here")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    backends = options.backend or ["reference", *(["native"] if native.available()[0] else [])]
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        models = [smollm2(Path(scratch)), *tiny_models(Path(scratch))]
        rows = [row for model in models for row in compared(model, backends)]
    print_table(rows)
    kept = all(row["kept"] for row in rows)
    finish("parity", {"results": rows, "promises_kept": kept}, options.output)
    return 0 if kept else 1


def smollm2(scratch: Path) -> Model:
    snapshot, checkpoint = scratch / "smollm2", scratch / "smollm2-exported"
    convert(str(smollm2_gguf()), snapshot, tp=1, canary=False)
    export(snapshot, checkpoint)
    tokenizer = Tokenizer.from_file(str(snapshot / "tokenizer.json"))
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    sequences = [tokenizer.encode(text).ids for text in TEXTS]
    return Model("SmolLM2-135M-Instruct", checkpoint, snapshot, sequences, tokenizer.encode(question).ids)


def tiny_models(scratch: Path) -> list[Model]:
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    configs: dict[str, tuple[Any, dict[str, Any]]] = {
        "tiny Llama": ("llama", {"rope_parameters": {**llama3, "original_max_position_embeddings": 32}}),
        "tiny Llama, biases, tied": (
            "llama",
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ),
        "tiny Mistral, window 11": ("mistral", {"sliding_window": 11, "head_dim": 8}),
    }
    models = []
    for index, (name, (family, config)) in enumerate(configs.items()):
        checkpoint, snapshot = scratch / f"tiny-{index}", scratch / f"tiny-{index}-snapshot"
        tiny_checkpoint(checkpoint, family, "bfloat16", index, **config)
        convert(str(checkpoint), snapshot, tp=1, canary=False)
        sequences = random_sequences((100, 1, 61), 97, index)
        models.append(Model(name, checkpoint, snapshot, sequences, sequences[2]))
    return models


def compared(model: Model, backends: list[str]) -> list[dict[str, Any]]:
    """One row a backend and dtype."""
    theirs = Transformers(model.checkpoint, "float32")
    exact, tokens = theirs.logits(model.sequences), theirs.greedy(model.prompt, GREEDY)
    rounded = Transformers(model.checkpoint, "bfloat16").logits(model.sequences)
    rows = []
    for backend in backends:
        for dtype in ("float32", "bfloat16"):
            ours = Fgsnap(decoder(model, backend, dtype))
            logits = ours.logits(model.sequences, CHUNK)
            equal = agreeing(ours.greedy(model.prompt, GREEDY), tokens)
            error, ratio = relative_error(logits, exact), mean_error(logits, exact) / mean_error(rounded, exact)
            largest = error / relative_error(rounded, exact)
            exactly = error <= PROMISED_LOGITS and equal == GREEDY
            rows.append(
                {
                    "model": model.name,
                    "backend": backend,
                    "dtype": dtype,
                    "positions": len(exact),
                    "max_relative_logit_error": float(f"{error:.3g}"),
                    "transformers_bfloat16_max_relative_logit_error": float(f"{relative_error(rounded, exact):.3g}"),
                    "greedy_tokens_equal": equal,
                    "rms_error_ratio_to_transformers_bfloat16": float(f"{ratio:.3g}"),
                    "max_error_ratio_to_transformers_bfloat16": float(f"{largest:.3g}"),
                    "kept": exactly if dtype == "float32" else ratio <= PROMISED_RATIO,
                }
            )
    return rows


def decoder(model: Model, backend: str, dtype: str) -> Decoder:
    tokens = max(sum(map(len, model.sequences)), len(model.prompt) + GREEDY)
    blocks = tokens // BLOCK_SIZE + len(model.sequences)
    return load_decoder(
        open_snapshot(model.snapshot), backend=backend, device="cpu", dtype=dtype, blocks=blocks, block_size=BLOCK_SIZE
    )


def agreeing(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))


def print_table(rows: list[dict[str, Any]]) -> None:
    head = f"{'model':26} {'backend':10} {'dtype':9} {'max rel. error':>14} {'greedy':>8}"
    print(f"{head} {'bf16 rms ratio':>14} {'bf16 max ratio':>14}  kept")
    for row in rows:
        print(
            f"{row['model']:26} {row['backend']:10} {row['dtype']:9} {row['max_relative_logit_error']:14.3g} "
            f"{row['greedy_tokens_equal']:>5}/{GREEDY} {row['rms_error_ratio_to_transformers_bfloat16']:14.3g} "
            f"{row['max_error_ratio_to_transformers_bfloat16']:14.3g}  {'yes' if row['kept'] else 'NO'}"
        )


if __name__ == "__main__":
    sys.exit(main())
