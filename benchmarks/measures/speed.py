"""Decode and prefill of several contestants on one model, in paired rounds.

All contestants are up at once, and all but the one whose turn it is are stopped. A round gives each its turn, and the
next one goes through them backwards, so a drift of the machine meets all. What counts is the ratio within a round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from engines.contest import Contestant, Failed
from engines.process import Ended

from fgsnap.bench.record import summary
from measures.machine import Limits, limits
from measures.models import Model
from measures.setting import Start, tell


class Job(NamedTuple):
    """One figure: ``sequences`` > 0 is a decode of that many, of ``size`` tokens each; 0 a prefill of ``size``."""

    sequences: int
    size: int

    @property
    def name(self) -> str:
        return f"decode_{self.sequences}" if self.sequences else f"prefill_{self.size}"


JOBS = (Job(1, 96), Job(8, 96), Job(32, 64), Job(0, 512), Job(0, 2048))
LARGE_JOBS = (Job(1, 32), Job(8, 32), Job(32, 24), Job(0, 512), Job(0, 2048))
QUICK_JOBS = (Job(1, 16), Job(8, 16), Job(0, 512))

Rates = dict[str, dict[str, list[float | None]]]
"""Contestant, figure, and the tokens a second of each round; None where it failed."""


def measure(
    model: Model,
    starters: Mapping[str, Start],
    jobs: Sequence[Job],
    rounds: int,
    program: Path,
    seldom: Collection[str] = (),
) -> dict[str, Any]:
    """Every contestant's figures, and the host's limits measured right before each job.

    Args:
        starters: the contestants; one that cannot start or answer gets a ``failure`` instead of figures.
        program: measures the host.
        seldom: contestants that take part in every other round only, to save time.
    """
    rates: Rates = {}
    rows: dict[str, dict[str, Any]] = {}
    host: dict[str, list[Limits]] = {job.name: [] for job in jobs}
    with ExitStack() as stack:
        running: dict[str, Contestant] = {}
        for name, start in starters.items():
            try:
                running[name], rows[name] = _begun(name, start, stack)
            except (Failed, Ended) as error:
                rows[name] = {"failure": str(error)}
                tell(f"{name} failed: {error}")
        for number in range(rounds):
            for index, job in enumerate(jobs):
                host[job.name].append(limits(program))
                order = list(running) if (number + index) % 2 == 0 else list(reversed(running))
                for name in order:
                    rate = None
                    if number % 2 == 0 or name not in seldom:
                        rate = _turn(name, running[name], job, 100 * number + index, rows[name])
                    rates.setdefault(name, {}).setdefault(job.name, []).append(rate)
        for name, contestant in running.items():
            if rows[name]["answer"]:  # else the model is in programs that have ended
                rows[name]["peak_mebibytes"] = contestant.group.peak() >> 20
    measured = [each for of_job in host.values() for each in of_job]
    for name, of_name in rates.items():
        rows[name] |= {job: _summary(values) for job, values in of_name.items()}
    return {
        "model": model.name,
        "weight_bytes": model.weight_bytes,
        "rounds": rounds,
        "contestants": rows,
        "host": {
            "bytes_per_second": summary([each.bytes_per_second for each in measured], 0),
            "operations_per_second": summary([each.operations_per_second for each in measured], 0),
            "operations": measured[0].operations,
        },
        "shares": _shares(model, jobs, rates, host),
        "rates": rates,
    }


def _begun(name: str, start: Start, stack: ExitStack) -> tuple[Contestant, dict[str, Any]]:
    """A contestant that has answered, and is stopped until its turn."""
    contestant = start()
    stack.callback(contestant.close)
    answer = contestant.answer()
    tell(f"{name} is up: {answer!r}")
    contestant.group.pause()
    return contestant, {"answer": answer}


def _turn(name: str, contestant: Contestant, job: Job, seed: int, row: dict[str, Any]) -> float | None:
    """One contestant's rate at a job, after a trial that is not counted: a host may have dropped idle pages."""
    contestant.group.resume()
    try:
        _rate(contestant, Job(2, 4), 1000 + seed)
        rate = _rate(contestant, job, seed)
    except (Failed, Ended) as error:
        row.setdefault("failures", {})[job.name] = str(error)
        rate = None
    contestant.group.pause()
    tell(f"{job.name}, {name}: " + (f"{rate:.1f} tokens/s" if rate else "failed"))
    return rate


def _rate(contestant: Contestant, job: Job, seed: int) -> float:
    if job.sequences:
        return contestant.decode(job.sequences, job.size, seed)
    return contestant.prefill(job.size, seed)


def _summary(values: Sequence[float | None]) -> dict[str, float | int] | None:
    known = [value for value in values if value is not None]
    return summary(known, 1) if known else None


def _shares(model: Model, jobs: Sequence[Job], rates: Rates, host: Mapping[str, Sequence[Limits]]) -> dict[str, Any]:
    """Each contestant's decode of one sequence as a share of the bandwidth, and prefill as one of the bfloat16 rate."""
    found: dict[str, Any] = {}
    for name, of_name in rates.items():
        for job in jobs:
            if job.sequences > 1:
                continue
            cost = model.weight_bytes if job.sequences else model.prefill_operations(job.size) / job.size
            values = [
                rate * cost / (each.bytes_per_second if job.sequences else each.operations_per_second)
                for rate, each in zip(of_name[job.name], host[job.name], strict=True)
                if rate is not None
            ]
            if values:
                found.setdefault(name, {})[job.name] = summary(values, 3)
    return found


def ratios(rates: Rates, ours: str, peer: str) -> dict[str, dict[str, float | int]]:
    """For each figure, how many times ``peer``'s rate ours is, round by round."""
    found = {}
    for job, values in rates.get(ours, {}).items():
        pairs = [
            mine / other
            for mine, other in zip(values, rates.get(peer, {}).get(job, []), strict=False)
            if mine and other
        ]
        if pairs:
            found[job] = summary(pairs, 3)
    return found
