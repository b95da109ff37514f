"""The same tokens through transformers and through a snapshot; the parity tests and the parity benchmark stand on it.

Tiny checkpoints have random weights that are large enough for every part to matter: attention that is far from uniform,
norms away from 1, biases away from 0.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fgsnap.kernels.ops import Batch, Sampling
from fgsnap.runtime.decoder import Decoder

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_checkpoint(folder: Path, family: str, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """Save a random checkpoint of a model type with transformers' own classes.

    ``changes`` go into its config; ``...`` leaves a setting out.
    """
    # A dict of rope parameters is written back to by transformers, so each checkpoint gets its own.
    settings = {**TINY, **{key: dict(value) if isinstance(value, dict) else value for key, value in changes.items()}}
    torch.manual_seed(seed)
    settings = {key: value for key, value in settings.items() if value is not ...}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                values.normal_(0.0, 0.3)
            elif values.dim() > 1:
                values.normal_(0.0, 1.5 * values.shape[-1] ** -0.5)
            elif isinstance(values, torch.nn.Parameter):
                values.normal_(1.0, 0.2)
    model.to(TORCH[dtype]).save_pretrained(folder)
    return folder


def random_sequences(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


class Transformers:
    """A checkpoint as transformers runs it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH[dtype]).eval()

    def logits(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Float64 logits [all tokens, V], each sequence in one forward of its own."""
        with torch.inference_mode():
            return torch.cat([self._model(torch.tensor([list(tokens)])).logits[0].double() for tokens in sequences])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, one after the other, whatever they are."""
        tokens: list[int] = []
        ids, cache = list(prompt), None
        with torch.inference_mode():
            while len(tokens) < count:
                out = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                ids = tokens[-1:]
        return tokens


class Fgsnap:
    """A decoder fed as an engine would: ragged steps over a paged cache whose blocks lie in random order."""

    def __init__(self, decoder: Decoder, seed: int = 0) -> None:
        self._decoder = decoder
        self._random = random.Random(seed)

    def logits(self, sequences: Sequence[Sequence[int]], chunk: int) -> torch.Tensor:
        """Float64 logits [all tokens, V]; every step carries up to ``chunk`` tokens of every unfinished sequence."""
        tables = self._tables([len(tokens) for tokens in sequences])
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        for done in range(0, max(map(len, sequences)), chunk):
            live = [s for s, tokens in enumerate(sequences) if done < len(tokens)]
            parts = [sequences[s][done : done + chunk] for s in live]
            batch = _batch(parts, [done for _ in live], [tables[s] for s in live])
            rows = self._floats(batch._replace(rows=range(len(batch.tokens))))
            for s, own in zip(live, rows.split([len(part) for part in parts]), strict=True):
                found[s].append(own)
        return torch.cat([part for parts in found for part in parts])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, one after the other, whatever they are."""
        return self.greedy_together([prompt], count, len(prompt))[0]

    def greedy_together(self, prompts: Sequence[Sequence[int]], count: int, chunk: int) -> list[list[int]]:
        """The same of several prompts, in steps of up to ``chunk`` tokens of each prompt and one of each answer."""
        tables = self._tables([len(prompt) + count for prompt in prompts])
        waiting, done = [list(prompt) for prompt in prompts], [0 for _ in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        while live := [s for s, tokens in enumerate(found) if len(tokens) < count]:
            parts = [waiting[s][:chunk] for s in live]
            batch = _batch(parts, [done[s] for s in live], [tables[s] for s in live])
            logits = self._decoder.forward(batch)
            answers = self._decoder.sample(logits, [Sampling()] * len(live), batch.lengths).tokens
            for s, part, answer in zip(live, parts, answers, strict=True):
                done[s] += len(part)
                waiting[s] = waiting[s][len(part) :]
                if not waiting[s]:
                    found[s].append(answer)
                    waiting[s] = [answer]
        return found

    def _floats(self, batch: Batch) -> torch.Tensor:
        logits = self._decoder.ops.floats(self._decoder.forward(batch))
        return torch.frombuffer(bytearray(logits), dtype=torch.float32).view(len(batch.rows), -1).double()

    def _tables(self, lengths: list[int]) -> list[list[int]]:
        free = list(range(self._decoder.blocks))
        self._random.shuffle(free)
        need = [-(-length // self._decoder.block_size) for length in lengths]
        assert sum(need) <= len(free), "the decoder was made with too few blocks"
        return [[free.pop() for _ in range(count)] for count in need]


def _batch(parts: Sequence[Sequence[int]], done: Sequence[int], tables: Sequence[Sequence[int]]) -> Batch:
    """The next parts of sequences of which ``done`` tokens are in the cache; its rows are the last of each part."""
    ends = list(itertools.accumulate(map(len, parts)))
    return Batch(
        tokens=[token for part in parts for token in part],
        positions=[before + i for before, part in zip(done, parts, strict=True) for i in range(len(part))],
        starts=[0, *ends],
        lengths=[before + len(part) for before, part in zip(done, parts, strict=True)],
        block_tables=tables,
        rows=[end - 1 for end in ends],
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def mean_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((found - expected).square().mean().sqrt())


def typical_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over tokens of the root of each one's mean squared difference.

    Where experts are picked, a rounding can pick another one for a token whose two best are nearly level, and that one
    token outweighs all others in their mean.
    """
    return float((found - expected).square().mean(-1).sqrt().median())
