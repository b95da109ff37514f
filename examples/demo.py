"""From a checkpoint to an answer: convert, serve, ask over HTTP, and show where the start-up time went.

Usage: python examples/demo.py CHECKPOINT SNAPSHOT_DIR PROMPT
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(checkpoint: str, snapshot: str, prompt: str) -> None:
    """Convert ``checkpoint`` unless ``snapshot`` is there and sound, then serve it and answer ``prompt``."""
    if Path(snapshot).exists():
        fgsnap("verify", snapshot)
    else:
        fgsnap("convert", checkpoint, "-o", snapshot, "--target", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "startup.json"
        port = free_port()
        command = [*FGSNAP, "serve", snapshot, "--port", str(port), "--startup-report", str(report)]
        show(command)
        server = subprocess.Popen(command)
        try:
            # No waiting for readiness: a request that comes too early is held until the canary has matched.
            print(f"> {prompt}")
            for text in ask(f"http://127.0.0.1:{port}/v1/chat/completions", prompt):
                print(text, end="", flush=True)
            print()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        print()
        show_phases(json.loads(report.read_text()))


FGSNAP = [sys.executable, "-m", "fgsnap"]


def fgsnap(*arguments: str) -> None:
    """Run one fgsnap command, shown as a user would type it."""
    show([*FGSNAP, *arguments])
    if code := subprocess.run([*FGSNAP, *arguments]).returncode:
        sys.exit(code)  # it has said why


def show(command: list[str]) -> None:
    print("$ fgsnap", *command[len(FGSNAP) :], flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, prompt: str, patience: float = 60.0) -> Iterator[str]:
    """The model's greedy answer as it streams in; tries again while the server's socket is not open yet."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 64, "stream": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    give_up = time.monotonic() + patience
    while True:
        try:
            response = urllib.request.urlopen(request)
            break
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > give_up:
                raise
            time.sleep(0.001)
    with response:
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def show_phases(report: dict[str, Any]) -> None:
    """Print the phases of the start-up report, one a line, with a bar for when each ran."""
    phases = report["phases"]
    whole = max(phase["end"] for phase in phases)
    print(f"start-up, from exec to the first token: {whole * 1000:.0f} ms")
    for phase in phases:
        begin, end = (round(40 * phase[edge] / whole) for edge in ("begin", "end"))
        bar = " " * begin + "#" * max(end - begin, 1)
        print(f"  {phase['process']:<7} {phase['name']:<18} {(phase['end'] - phase['begin']) * 1000:7.1f} ms  {bar}")


if __name__ == "__main__":
    main(*sys.argv[1:])
