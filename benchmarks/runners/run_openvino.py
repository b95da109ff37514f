"""OpenVINO GenAI's LLMPipeline: GGUF."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import jobs

TOLD = jobs.results_apart()

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402


class OpenVino:
    def __init__(self, gguf: str) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = 2
        self._pipeline = genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU")

    def answer(self, question: str, tokens: int) -> str:
        wanted = genai.GenerationConfig(max_new_tokens=tokens, do_sample=False, apply_chat_template=False)
        return str(self._pipeline.generate([jobs.CHAT.format(question)], [wanted])[0].m_generation_ids[0])

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        # A request lives as long as its handle.
        handles = [self._pipeline.add_request(i, _tensor(ids), _exactly(tokens)) for i, ids in enumerate(prompts)]
        stamps = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            stamps.append(time.monotonic())
        assert len(handles) == len(prompts)
        return jobs.rate(stamps, len(prompts))

    def prefill(self, prompt: Sequence[int]) -> float:
        return jobs.timed(len(prompt), lambda: self._pipeline.generate([_tensor(prompt)], [_exactly(1)]))


def _tensor(prompt: Sequence[int]) -> ov.Tensor:
    return ov.Tensor(np.array([prompt], dtype=np.int64))


def _exactly(tokens: int) -> genai.GenerationConfig:
    return genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)


jobs.serve(OpenVino(sys.argv[1]), TOLD)
