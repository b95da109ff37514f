"""From exec to the first token: over HTTP of those that serve, of the others until ``generate`` returns it.

Each start is a fresh process over a warm page cache. A client asks as soon as anything answers on the port, and the
time ends when the first streamed text has come. Servers run with the flags that start fastest: llama.cpp with one slot
and without its warm-up, mapped and read; vLLM without compilation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import llama_cpp, ours, vllm_cpu
from engines.contest import Failed
from engines.process import Ended, Launch

from fgsnap.bench import startup
from fgsnap.bench.record import summary
from measures.models import Model
from measures.setting import LLAMA, OURS, VLLM, Setting, Start, inside, others, served, tell

CONTEXT, KV_MEBIBYTES = 2048, 1024
SLOW = (VLLM,)
"""Takes part in every third round only."""


def measure(setting: Setting, model: Model, rounds: int, *, all_engines: bool) -> dict[str, Any]:
    """Seconds of every contestant, and fgsnap's own account of its start in the middle."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "startup.json"
        starters = _starters(setting, model, report, all_engines)
        times: dict[str, list[float | None]] = {name: [] for name in starters}
        failures: dict[str, str] = {}
        accounts: list[startup.Start] = []
        for number in range(-1, rounds):
            for name, start in starters.items():
                if name in failures or (name in SLOW and max(number, 0) % 3):
                    times[name].append(None)
                    continue
                try:
                    seconds = _once(start)
                except (Failed, Ended) as error:
                    failures[name] = str(error)
                    times[name].append(None)
                    tell(f"{name} failed: {error}")
                    continue
                tell(f"start {number + 1} of {rounds}, {name}: {seconds:.3f} s")
                if number >= 0:  # the round before only warms the page cache
                    times[name].append(seconds)
                    if name == OURS:
                        accounts.append(startup.Start(seconds, json.loads(report.read_text())))
    return {
        "model": model.name,
        "seconds": {name: summary(known) for name, values in times.items() if (known := _known(values))},
        "failures": failures,
        "account": startup.account(accounts),
        "canary": accounts[0].report["canary"],
        "times": times,
    }


def ratios(times: dict[str, list[float | None]], peer: str) -> dict[str, float | int]:
    """How many times as long ``peer`` took as fgsnap, round by round."""
    pairs = zip(times[OURS], times[peer], strict=False)
    return summary([theirs / mine for mine, theirs in pairs if mine and theirs], 3)


def _starters(setting: Setting, model: Model, report: Path, all_engines: bool) -> dict[str, Start]:
    homes = setting.homes

    def own(port: int) -> Launch:
        launch = ours.serve(model.snapshot, port, context=CONTEXT, kv_mebibytes=KV_MEBIBYTES)
        return Launch([*launch.command, "--startup-report", str(report)])

    def llama(mapped: bool) -> Callable[[int], Launch]:
        flags = setting.flags._replace(mapped=mapped)
        return lambda port: llama_cpp.serve(homes.llama, model.gguf(), port, flags, context=CONTEXT, sequences=1)

    def vllm(port: int) -> Launch:
        return vllm_cpu.serve(
            homes.vllm, model.checkpoint, port, context=CONTEXT, sequences=1, kv_gibibytes=1, compiled=False
        )

    runners = inside(setting, model) | (others(setting, model) if all_engines else {})
    return {
        OURS: served(setting, OURS, own),
        LLAMA: served(setting, LLAMA, llama(True)),
        f"{LLAMA}, read": served(setting, LLAMA, llama(False)),
        **{name: start for name, start in runners.items() if "in process" not in name},
        VLLM: served(setting, VLLM, vllm),
    }


def _once(start: Start) -> float:
    contestant = start()
    try:
        return contestant.first_text()
    finally:
        contestant.close()


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]
