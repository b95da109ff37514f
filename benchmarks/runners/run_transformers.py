"""transformers' ``generate`` in bfloat16: CHECKPOINT."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jobs

TOLD = jobs.results_apart()

import torch  # noqa: E402 - what it prints must not be among the results
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList  # noqa: E402


class Transformers:
    def __init__(self, checkpoint: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    def answer(self, question: str, tokens: int) -> str:
        chat = [{"role": "user", "content": question}]
        ids = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = self._model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return str(self._tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        stamps: list[float] = []

        def stamp(ids: Any, scores: Any, **kwargs: Any) -> Any:
            stamps.append(time.monotonic())
            return torch.zeros(len(ids), dtype=torch.bool)

        self._generate(prompts, tokens, [stamp])
        return jobs.rate(stamps, len(prompts))

    def prefill(self, prompt: Sequence[int]) -> float:
        return jobs.timed(len(prompt), lambda: self._generate([prompt], 1, []))

    def _generate(self, prompts: Sequence[Sequence[int]], tokens: int, criteria: Sequence[Any]) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, stopping_criteria=StoppingCriteriaList(criteria),
            )  # fmt: skip


jobs.serve(Transformers(sys.argv[1]), TOLD)
