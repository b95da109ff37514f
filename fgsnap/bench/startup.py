"""Time from exec to the first token over HTTP, and the server's own account of it.

A round starts a fresh ``fgsnap serve``, connects to it as soon as its socket is open, and ends when the first text of a
streamed answer has arrived. Its phases come from ``--startup-report``.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgsnap.bench.record import summary
from fgsnap.bench.server import HOST, Server, serving
from fgsnap.errors import FgsnapError
from fgsnap.runtime.options import EngineOptions
from fgsnap.snapshot import open_snapshot

PROMPT = "What is the capital of France?"
ENDING_SECONDS = 5.0  # a server that failed to start still answers while it ends


class Start(NamedTuple):
    """One start: seconds from exec to the first token at the client, and the server's report."""

    wall: float
    report: dict[str, Any]


def measure(
    snapshot: Path, engine: EngineOptions, rounds: int, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The account of ``rounds`` starts, after one that only warms the page cache."""
    start_once(snapshot, engine)
    starts = []
    for number in range(1, rounds + 1):
        starts.append(start_once(snapshot, engine))
        tell(f"start {number} of {rounds}: {starts[-1].wall:.3f} s")
    report = starts[0].report
    facts = {name: report[name] for name in ("snapshot", "backend", "device", "canary")}
    return {**facts, **account(starts)}


def start_once(snapshot: Path, engine: EngineOptions) -> Start:
    """Start a server, take one token, stop it."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "startup.json"
        question = _question(snapshot)
        with serving(snapshot, engine, "--startup-report", str(report)) as server:
            _await_first_token(server, *question)
            wall = time.monotonic() - server.began
        return Start(wall, json.loads(report.read_text()))


def account(starts: Sequence[Start]) -> dict[str, Any]:
    """Summaries of the wall time and of every phase on the critical path, and the phases of the start in the middle.

    The middle start's phases follow one another; ``unaccounted`` is the share of its wall time that none covers.
    """
    middle = sorted(starts, key=lambda start: start.wall)[len(starts) // 2]
    phases = _phases(middle)
    every: dict[str, list[float]] = {}
    for start in starts:
        for name, seconds in _phases(start).items():
            every.setdefault(name, []).append(seconds)
    return {
        "seconds": summary([start.wall for start in starts]),
        "wall": round(middle.wall, 4),
        "phases": {name: round(seconds, 4) for name, seconds in phases.items()},
        "unaccounted": round(1 - sum(phases.values()) / middle.wall, 4),
        "phase_seconds": {name: summary(seconds) for name, seconds in every.items()},
    }


def _phases(start: Start) -> dict[str, float]:
    return {phase["name"]: phase["end"] - phase["begin"] for phase in start.report["critical_path"]}


def _question(snapshot: Path) -> tuple[str, str]:
    """Route and body of the request: a chat where the snapshot has a template, else a text to continue."""
    opened = open_snapshot(snapshot)
    chat = opened.manifest.text.template == "jinja"
    opened.close()
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    body = json.dumps({**asked, "temperature": 0, "max_tokens": 16, "ignore_eos": True, "stream": True})
    return "/v1/chat/completions" if chat else "/v1/completions", body


def _await_first_token(server: Server, route: str, body: str) -> None:
    """Ask, and return when the first text of the answer has arrived."""
    connection = _ask_at_once(server, route, body)
    try:
        response = connection.getresponse()
        if response.status != 200:
            server.check(ENDING_SECONDS)
            raise FgsnapError("The server refused the request.", response.read().decode(errors="replace"))
        for line in response:
            if line.startswith(b"data: {") and _has_text(json.loads(line[6:])):
                return
    except (OSError, http.client.HTTPException) as error:
        server.check(ENDING_SECONDS)
        raise FgsnapError("The server broke off its answer.", str(error)) from error
    finally:
        connection.close()
    raise FgsnapError("The answer ended without any text.", "", "Try another snapshot, or --backend reference.")


def _ask_at_once(server: Server, route: str, body: str) -> http.client.HTTPConnection:
    """A connection with the request on its way, made as soon as the server's socket is open."""
    while True:
        connection = http.client.HTTPConnection(HOST, server.port)
        try:
            connection.request("POST", route, body, {"Content-Type": "application/json"})
            return connection
        except ConnectionRefusedError:
            server.check()
            time.sleep(0.001)


def _has_text(chunk: dict[str, Any]) -> bool:
    if "error" in chunk:
        raise FgsnapError("The server failed on the request.", str(chunk["error"].get("message", "")))
    choice = chunk["choices"][0]
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))
