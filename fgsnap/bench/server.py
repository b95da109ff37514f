"""A ``fgsnap serve`` that a benchmark starts for itself, in a process of its own, and ends when it is done."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fgsnap.errors import FgsnapError
from fgsnap.runtime.options import EngineOptions

HOST = "127.0.0.1"
END_SECONDS = 20.0


class Server:
    """The running process.

    Attributes:
        port: on HOST; it listens soon after the start.
        began: when the process was started, on the monotonic clock.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, began: float, log: Path) -> None:
        self.port = port
        self.began = began
        self._process = process
        self._log = log

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def check(self, patience: float = 0.0) -> None:
        """FgsnapError with the server's last words, if it has ended, or does so within ``patience`` seconds."""
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise FgsnapError(f"The server that was measured {how}.", _last_words(self._log))

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait until requests are answered, and return the start-up report. FgsnapError: the server ended instead."""
        while (report := self._report()) is None:
            self.check()
            time.sleep(0.02)
        return report

    def _report(self) -> dict[str, Any] | None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", "/health/startup")
            response = connection.getresponse()
            return dict(json.load(response)) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


@contextmanager
def serving(snapshot: Path, engine: EngineOptions, *options: str) -> Iterator[Server]:
    """Start a server over ``snapshot`` on a free port, and end it on the way out."""
    port = _free_port()
    command = [*_command(), "serve", str(snapshot), "--host", HOST, "--port", str(port), *_flags(engine), *options]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "stderr"
        with log.open("wb") as stderr:
            began = time.monotonic()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield Server(process, port, began, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    process.kill()
    process.wait()


def _command() -> list[str]:
    """The command as it is installed beside this Python, else the package that this process runs."""
    installed = Path(sys.executable).with_name("fgsnap")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "fgsnap"]


def _flags(engine: EngineOptions) -> list[str]:
    """What was chosen; the rest is the server's own default."""
    chosen = {name.replace("_", "-"): getattr(engine, name) for name in engine.__struct_fields__}
    default = EngineOptions()
    flags: list[str] = []
    for name, value in chosen.items():
        if value == getattr(default, name.replace("-", "_")):
            continue
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _last_words(log: Path) -> str:
    """The error that the server ended with, else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    begins = next((i for i in reversed(range(len(lines))) if lines[i].startswith("Error: ")), len(lines) - 1)
    return " ".join(lines[begins:]) if lines else "It said nothing."
