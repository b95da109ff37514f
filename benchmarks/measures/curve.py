"""Closed-loop clients on the three servers: throughput over latency, and effective throughput.

The method of ``fgsnap bench serve`` with the lengths of DeepSpeed-FastGen's figures, scaled to SmolLM2's context. All
servers get the same requests, level by level in turn, in the other order at every second level; those that wait are
stopped. A level begins with one short request a client that is not counted, and is measured once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from engines.contest import MODEL, Failed, Server
from engines.process import Ended

from fgsnap.bench import load
from fgsnap.bench.client import Asking
from fgsnap.bench.sla import Sla
from fgsnap.bench.workload import COMMON_IDS, Work, of_ids, works
from measures.setting import Start, tell

LENGTHS = ((1200, 60), (1900, 128), (500, 500))
LEVELS = (1, 2, 4, 8, 16, 32)
CONTEXT = 2048
FEWEST, EACH = 6, 2  # requests of a level, and of each of its clients
SLAS = tuple(Sla(512.0, rate) for rate in (2.0, 4.0, 6.0))
WARM = Work([1000] * 8, 8, 2)


def measure(starters: Mapping[str, Start], lengths: tuple[int, int], levels: Sequence[int]) -> dict[str, Any]:
    """For each server a row of ``load.row`` a level; ``lengths`` are the means of prompt and answer."""
    with ExitStack() as stack:
        running: dict[str, Server] = {}
        failures: dict[str, str] = {}
        for name, start in starters.items():
            server = start()
            assert isinstance(server, Server)
            stack.callback(server.close)
            try:
                tell(f"{name} is up: {server.answer()!r}")
            except (Failed, Ended) as error:
                failures[name] = str(error)
                tell(f"{name} failed: {error}")
                continue
            server.group.pause()
            running[name] = server
        curves: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for index, clients in enumerate(levels):
            for name in list(running) if index % 2 == 0 else list(reversed(running)):
                curves[name].append(_level(name, running[name], *lengths, clients))
    slas = [sla._asdict() for sla in SLAS]
    shape = {"prompt": lengths[0], "answer": lengths[1], "context": CONTEXT, "slas": slas}
    return {**shape, "curves": curves, "failures": failures}


def effective(rows: list[dict[str, Any]], sla: int) -> float:
    """Most requests a second within an SLA, whatever the number of clients."""
    return max(float(row["effective"][sla]["requests_per_second"]) for row in rows)


def _level(name: str, server: Server, prompt: int, answer: int, clients: int) -> dict[str, Any]:
    counted = works(
        of_ids(COMMON_IDS), max(EACH * clients, FEWEST), prompt_mean=prompt, answer_mean=answer, context=CONTEXT,
        seed=f"{prompt}/{answer}/{clients}",
    )  # fmt: skip
    server.group.resume()
    level = load.run(server.endpoint, Asking(MODEL), [WARM] * clients + counted, clients, seed=clients)
    server.group.pause()
    row = load.row(level, SLAS)
    shown = ", ".join(f"{each['requests_per_second']:.2f}" for each in row["effective"])
    tell(
        f"{prompt}/{answer}, {clients} clients, {name}: {row['requests_per_second']:.2f} requests/s, "
        f"{shown} within the SLAs, {row['failed']} failed"
    )
    return row
