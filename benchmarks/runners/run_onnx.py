"""ONNX Runtime GenAI's Generator: MODEL."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import jobs

TOLD = jobs.results_apart()

import onnxruntime_genai as og  # noqa: E402


class Onnx:
    def __init__(self, model: str) -> None:
        self._model = og.Model(model)
        self._tokenizer = og.Tokenizer(self._model)

    def answer(self, question: str, tokens: int) -> str:
        prompt = self._tokenizer.encode(jobs.CHAT.format(question))
        generator = self._generator(1, len(prompt) + tokens)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return str(self._tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        generator = self._generator(len(prompts), len(prompts[0]) + tokens, shortest=len(prompts[0]) + tokens)
        generator.append_tokens([list(prompt) for prompt in prompts])
        stamps = []
        for _ in range(tokens):
            generator.generate_next_token()
            stamps.append(time.monotonic())
        return jobs.rate(stamps, len(prompts))

    def prefill(self, prompt: Sequence[int]) -> float:
        return jobs.timed(len(prompt), lambda: self._first(prompt))

    def _first(self, prompt: Sequence[int]) -> None:
        generator = self._generator(1, len(prompt) + 2)
        generator.append_tokens([list(prompt)])
        generator.generate_next_token()

    def _generator(self, batch: int, longest: int, shortest: int = 0) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=longest, min_length=shortest, batch_size=batch, do_sample=False, past_present_share_buffer=True
        )
        return og.Generator(self._model, parameters)


jobs.serve(Onnx(sys.argv[1]), TOLD)
