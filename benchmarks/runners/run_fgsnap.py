"""fgsnap's engine without HTTP, by way of ``fgsnap bench``'s own code: SNAPSHOT CONTEXT KV_MEBIBYTES."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jobs

TOLD = jobs.results_apart()

from fgsnap.bench import local  # noqa: E402
from fgsnap.runtime.budget import default_budget  # noqa: E402
from fgsnap.runtime.options import EngineOptions  # noqa: E402
from fgsnap.runtime.ranks import load_as_chosen  # noqa: E402
from fgsnap.runtime.request import SamplingParams  # noqa: E402
from fgsnap.runtime.shared import Ask, SharedEngine  # noqa: E402
from fgsnap.runtime.text import Text  # noqa: E402
from fgsnap.runtime.worker import check_canary, engine_as_chosen  # noqa: E402
from fgsnap.snapshot import open_snapshot  # noqa: E402


class Fgsnap:
    def __init__(self, snapshot: Path, context: int, kv_mebibytes: int) -> None:
        options = EngineOptions(max_model_len=context, kv_memory=kv_mebibytes << 20)
        self._snapshot = open_snapshot(snapshot)
        decoder = load_as_chosen(self._snapshot, options)  # before the tokenizer has threads: it may fork
        self._text = Text(self._snapshot)
        check_canary(decoder, self._snapshot)
        self._engine = engine_as_chosen(decoder, self._snapshot, options, default_budget(decoder.ops.device))

    def answer(self, question: str, tokens: int) -> str:
        asked = self._text.render_chat([{"role": "user", "content": question}])
        prompt = self._text.encode(asked, add_special_tokens=False)
        steps = SharedEngine(self._engine, self._text).generate([Ask(prompt, SamplingParams(tokens, temperature=0.0))])
        return "".join(delta.text for deltas in steps for delta in deltas)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        run = local.run(self._engine, [tuple(prompt) for prompt in prompts], tokens)
        rate = local.decode_rate(run.steps, len(prompts))
        assert rate is not None
        return rate

    def prefill(self, prompt: Sequence[int]) -> float:
        return jobs.timed(len(prompt), lambda: local.run(self._engine, [tuple(prompt)], 1))


jobs.serve(Fgsnap(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), TOLD)
