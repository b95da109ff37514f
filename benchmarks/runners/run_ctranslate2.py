"""CTranslate2's Generator: MODEL TOKENIZER."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jobs

TOLD = jobs.results_apart()

import json  # noqa: E402

import ctranslate2  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402


class CTranslate2:
    def __init__(self, model: str, tokenizer: str) -> None:
        self._generator = ctranslate2.Generator(
            model, "cpu", compute_type="float32", intra_threads=len(os.sched_getaffinity(0))
        )
        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._vocabulary: list[str] = json.loads((Path(model) / "vocabulary.json").read_text())

    def answer(self, question: str, tokens: int) -> str:
        prompt = self._tokenizer.encode(jobs.CHAT.format(question)).tokens
        made = self._generator.generate_batch(
            [prompt], max_length=tokens, include_prompt_in_result=False, end_token="<|im_end|>"
        )
        return str(self._tokenizer.decode(made[0].sequences_ids[0]))

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        ends: dict[int, float] = {}

        def stamp(result: ctranslate2.GenerationStepResult) -> bool:
            ends[result.step] = time.monotonic()  # the last sequence's stands
            return False

        self._generator.generate_batch(
            [self._words(prompt) for prompt in prompts], max_length=tokens, min_length=tokens,
            include_prompt_in_result=False, callback=stamp,
        )  # fmt: skip
        return jobs.rate([ends[step] for step in sorted(ends)], len(prompts))

    def prefill(self, prompt: Sequence[int]) -> float:
        words = self._words(prompt)
        return jobs.timed(
            len(prompt),
            lambda: self._generator.generate_batch([words], max_length=1, include_prompt_in_result=False),
        )

    def _words(self, ids: Sequence[int]) -> list[str]:
        return [self._vocabulary[token] for token in ids]


jobs.serve(CTranslate2(sys.argv[1], sys.argv[2]), TOLD)
