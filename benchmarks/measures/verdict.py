"""The ratios that were promised, from whatever parts have been measured, and whether each is met.

A ratio is the median of those within a round (for start-up, load and speed), so that a drift of the machine meets both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from measures import curve, speed, startup
from measures.setting import LLAMA, OURS, TRANSFORMERS, VLLM

Part = Mapping[str, Any]


class Promise(NamedTuple):
    """A ratio or figure: at least ``goal``, or at most where ``most``; ``spread`` is least and most of the rounds.

    ``value`` is None where the peer's figure is 0 and no ratio tells of it; ``met`` is then whether ours is more.
    """

    name: str
    value: float | None
    goal: float
    most: bool = False
    spread: tuple[float, float] | None = None
    alone: bool = False

    @property
    def met(self) -> bool:
        if self.value is None:
            return self.alone
        return self.value <= self.goal if self.most else self.value >= self.goal


def verdict(parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """A row for every promise that the parts say something of."""
    rules = {
        "startup": _startup,
        "speed": _speed,
        **{name: _curve for name in parts if name.startswith("curve")},
        "memory": _memory,
        "large": _large,
        "load": _load,
    }
    promises = [promise for name, rule in rules.items() if name in parts for promise in rule(parts[name])]
    return [{**promise._asdict(), "met": promise.met} for promise in promises]


def _startup(part: Part) -> Iterator[Promise]:
    own = part["seconds"][OURS]
    yield Promise("start-up: seconds", own["median"], 0.22, True, (own["min"], own["max"]))
    yield from _sooner("start-up", part)


def _sooner(what: str, part: Part) -> Iterator[Promise]:
    """How long fgsnap takes to start beside the best of llama.cpp's ways, and how much longer the others take."""
    seconds, times = part["seconds"], part["times"]
    rival = min((name for name in seconds if name.startswith(LLAMA)), key=lambda name: float(seconds[name]["median"]))
    longer = startup.ratios(times, rival)
    spread = (round(1 / longer["max"], 3), round(1 / longer["min"], 3))
    yield Promise(f"{what}: seconds / those of {LLAMA}", round(1 / longer["median"], 3), 1.0, True, spread)
    for peer, goal in ((VLLM, 150.0), (TRANSFORMERS, 15.0)):
        if peer in seconds:
            yield _of(f"{what}: seconds of {peer} / fgsnap's", startup.ratios(times, peer), goal)


def _speed(part: Part) -> Iterator[Promise]:
    goals = {
        LLAMA: {"decode_1": 1.05, "decode_8": 1.5, "decode_32": 1.6, "prefill_512": 1.5, "prefill_2048": 1.5},
        VLLM: {"decode_1": 2.5, "decode_8": 1.6, "decode_32": 2.0, "prefill_512": 2.0, "prefill_2048": 2.0},
    }
    yield from _faster("", part, goals)
    share = part["shares"][OURS]["decode_1"]
    yield _of("decode_1: share of the memory bandwidth", share, 0.88)


def _faster(what: str, part: Part, goals: Mapping[str, Mapping[str, float]]) -> Iterator[Promise]:
    for peer, of_peer in goals.items():
        found = speed.ratios(part["rates"], OURS, peer)
        for job, goal in of_peer.items():
            if job in found:
                yield _of(f"{what}{job}: rate / that of {peer}", found[job], goal)


def _curve(part: Part) -> Iterator[Promise]:
    middle = 1  # 4 tokens/s
    lengths, curves = f"{part['prompt']}/{part['answer']}", part["curves"]
    own = curve.effective(curves[OURS], middle)
    for peer, goal in ((VLLM, 2.5), (LLAMA, 1.5)):
        theirs = curve.effective(curves[peer], middle) if peer in curves else 0.0
        ratio = round(own / theirs, 3) if theirs else None
        yield Promise(f"effective throughput, {lengths}: / that of {peer}", ratio, goal, alone=own > 0)


def _memory(part: Part) -> Iterator[Promise]:
    yield Promise("memory: MB beside weights and KV cache", round(part["beyond"] / 1e6, 1), 120.0, True)


def _large(part: Part) -> Iterator[Promise]:
    goals = {
        LLAMA: {"decode_1": 1.0, "decode_8": 1.3, "decode_32": 1.5, "prefill_512": 1.2, "prefill_2048": 1.2},
        VLLM: {"decode_1": 1.5, "decode_8": 1.5, "decode_32": 1.5},
    }
    yield from _faster("larger model, ", part["speed"], goals)
    yield from _sooner("larger model, start-up", part["startup"])


def _load(part: Part) -> Iterator[Promise]:
    warm = part["warm_ratio"]
    yield Promise(
        "load: warm seconds / safetensors'", warm["median"], 1.2, most=True, spread=(warm["min"], warm["max"])
    )
    yield _of("load: cold rate / dd's", part["cold_share_of_dd"], 0.9)


def _of(name: str, ratio: Mapping[str, float], goal: float) -> Promise:
    return Promise(name, ratio["median"], goal, spread=(ratio["min"], ratio["max"]))
