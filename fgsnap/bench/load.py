"""Closed-loop clients: each has one request in flight and sends the next when it has the whole answer.

The method of DeepSpeed-FastGen's benchmark (arXiv:2401.08671): every number of clients is a level of its own; each
client first sends one request that is not counted, then all begin within 10 ms a client and share the level's requests.
The levels make a throughput-latency curve, and with an SLA the effective throughput (see ``sla``).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fgsnap.bench.client import Asking, Endpoint, Exchange, Timeline, complete, completion_body, timeline
from fgsnap.bench.record import distribution
from fgsnap.bench.sla import Sla, met
from fgsnap.bench.workload import Prompts, Work, works
from fgsnap.errors import FgsnapError

STAGGER_SECONDS = 0.01  # a client


class Workload(NamedTuple):
    """What is asked at every level.

    Attributes:
        prompts: draws a prompt.
        prompt_mean, answer_mean: mean lengths in tokens.
        context: the most tokens that prompt and answer may have together; None where that is not known.
        requests: counted requests a client.
        seed: of all lengths, prompts and pauses.
    """

    prompts: Prompts
    prompt_mean: int
    answer_mean: int
    context: int | None
    requests: int
    seed: int


class Level(NamedTuple):
    """What one number of clients got: a timeline a counted request, and the CPU seconds that the clients took."""

    clients: int
    timelines: list[Timeline]
    cpu_seconds: float


def curve(
    target: Endpoint,
    how: Asking,
    workload: Workload,
    levels: Sequence[int],
    slas: Sequence[Sla],
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each number of clients in ``levels``.

    Args:
        check: called after each level; raises where it makes no sense to go on.
        tell: told each level's outcome in a line.

    Raises:
        FgsnapError: the endpoint answers no request at all.
    """
    rows: list[dict[str, Any]] = []
    for clients in levels:
        level = run(target, how, _level_works(workload, clients), clients, workload.seed)
        check()
        rows.append(row(level, slas))
        if not any(each["answered"] for each in rows):
            reason = next(iter(rows[-1]["failures"]))
            raise FgsnapError("The endpoint answered none of the requests.", f"The first failure: {reason}")
        tell(f"{clients} clients: {rows[-1]['requests_per_second']:.2f} requests/s, {rows[-1]['failed']} failed")
    return rows


def run(target: Endpoint, how: Asking, asked: Sequence[Work], clients: int, seed: int) -> Level:
    """Apply one level: the first of the requests, one a client, are not counted."""
    bodies = [completion_body(work, how) for work in asked]  # before the clock runs
    pauses = random.Random(seed)
    delays = [pauses.uniform(0, STAGGER_SECONDS * clients) for _ in range(clients)]
    exchanges, cpu_seconds = asyncio.run(_apply(target, bodies, delays, how.timeout))
    answers = [timeline(exchange, asked[index]) for index, exchange in exchanges]
    return Level(clients, answers, cpu_seconds)


def row(level: Level, slas: Sequence[Sla]) -> dict[str, Any]:
    """The level in numbers; seconds unless a name says otherwise. Times are of whole answers alone.

    ``tokens_per_chunk`` above 1 means that the endpoint sends several tokens at once, so that ``between_tokens`` is
    really between chunks. ``client_cpu`` is how much of one core the clients themselves took.
    """
    whole = [answer for answer in level.timelines if not answer.failure]
    wall = max(answer.ended for answer in level.timelines) - min(answer.began for answer in level.timelines)
    tokens = sum(answer.answer_tokens for answer in whole)
    return {
        "clients": level.clients,
        "requests": len(level.timelines),
        "answered": len(whole),
        "failed": len(level.timelines) - len(whole),
        "failures": dict(Counter(answer.failure for answer in level.timelines if answer.failure).most_common()),
        "ended_early": sum(answer.answer_tokens < answer.work.max_tokens for answer in whole),
        "prompt_tokens": distribution([answer.prompt_tokens for answer in whole], 1),
        "answer_tokens": distribution([answer.answer_tokens for answer in whole], 1),
        "seconds": round(wall, 4),
        "requests_per_second": round(len(whole) / wall, 4),
        "answer_tokens_per_second": round(tokens / wall, 2),
        "latency": distribution([answer.latency for answer in whole]),
        "first_token": distribution([answer.first_token for answer in whole]),
        "between_tokens": distribution([gap for answer in whole for gap in answer.gaps], 5),
        "tokens_per_chunk": round(tokens / max(sum(len(answer.chunks) for answer in whole), 1), 3),
        "effective": [_effective(sla, whole, len(level.timelines), wall) for sla in slas],
        "client_cpu": round(level.cpu_seconds / wall, 3),
    }


def _effective(sla: Sla, whole: Sequence[Timeline], asked: int, wall: float) -> dict[str, float]:
    """Answers within the SLA: their share of all requests, and how many of them a second."""
    kept = sum(met(sla, answer.prompt_tokens, answer.first_token, answer.gaps) for answer in whole)
    return {**sla._asdict(), "share": round(kept / asked, 4), "requests_per_second": round(kept / wall, 4)}


def _level_works(workload: Workload, clients: int) -> list[Work]:
    """One request a client to warm up with, and those that are counted. No two levels have a prompt in common."""
    return works(
        workload.prompts,
        clients * (workload.requests + 1),
        prompt_mean=workload.prompt_mean,
        answer_mean=workload.answer_mean,
        context=workload.context,
        seed=f"{workload.seed}/{clients}",
    )


async def _apply(
    target: Endpoint, bodies: Sequence[bytes], delays: Sequence[float], timeout: float
) -> tuple[list[tuple[int, Exchange]], float]:
    """(index of the request, exchange) for each counted request, and the CPU seconds that this process took."""
    clients = len(delays)
    await asyncio.gather(*(complete(target, body, timeout) for body in bodies[:clients]))
    waiting = deque(enumerate(bodies[clients:], start=clients))
    done: list[tuple[int, Exchange]] = []

    async def client(delay: float) -> None:
        await asyncio.sleep(delay)
        while waiting:
            index, body = waiting.popleft()
            done.append((index, await complete(target, body, timeout)))

    before = time.process_time()
    await asyncio.gather(*map(client, delays))
    return done, time.process_time() - before
