"""Running services for tests: the HTTP app over a stub engine in this process, and the real command in its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import openai
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fgsnap.runtime import wire, worker
from fgsnap.runtime.connections import Listener
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.link import Link
from fgsnap.runtime.process import Worker
from fgsnap.runtime.server import App, Identity
from fgsnap.snapshot import Canary, TextSection
from tests.doubles import ByteText, StubModel
from tests.grammars import byte_grammars
from tests.snapshots import make_snapshot, tiny_spec

MODEL = "stub"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Paced:
    """A model that can be made slow, to stand still, or to fail."""

    def __init__(self, model: StubModel) -> None:
        self.model = model
        self.delay = 0.0
        self.raises: Exception | None = None
        self.may_step = threading.Event()
        self.may_step.set()
        self.vocab_size, self.max_length = model.vocab_size, model.max_length
        self.blocks, self.block_size = model.blocks, model.block_size

    def forward(self, batch):
        self.may_step.wait()
        time.sleep(self.delay)
        if self.raises:
            raise self.raises
        return self.model.forward(batch)

    def sample(self, logits, how, positions):
        return self.model.sample(logits, how, positions)


class StubWorkers:
    """Engine workers as threads: the real loop over a real socket pair, with a stub model."""

    def __init__(self, **model) -> None:
        self.shape = model
        self.engine: dict = {}  # further settings of the engines to be started
        self.model = Paced(StubModel(**model))
        self.may_begin = threading.Event()
        self.may_begin.set()
        self.fail_starts = 0
        self.started = 0

    def start(self) -> Worker:
        ours, theirs = socket.socketpair()
        self.started += 1
        self.model = model = Paced(StubModel(**self.shape))

        def begin(mark):
            self.may_begin.wait()
            mark("begin")
            if self.fail_starts:
                self.fail_starts -= 1
                raise RuntimeError("no luck")
            settings = {"token_budget": 32, "grammars": byte_grammars, **self.engine}
            engine = Engine(model, eos_token_ids=(ByteText.eos,), **settings)
            sizes = (model.max_length, model.blocks, model.block_size)
            return engine, wire.Ready("stub", "cpu", "1 thread", "asked for", "none", *sizes, token_budget=32)

        def live():
            with theirs:
                worker.run(worker.Pipe(theirs), begin, time.monotonic())

        def kill():
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_RDWR)
            self.may_begin.set()
            model.may_step.set()
            model.delay = 0.0

        def wait():
            thread.join()
            return "ended"

        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        return Worker(ours, kill, wait)


class StubService:
    """The app with its HTTP server on a thread of this process."""

    def __init__(
        self, workers: StubWorkers, *, stall_seconds: float = 60.0, start_seconds: float = 60.0, **app
    ) -> None:
        self.workers = workers
        self.told: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self.link = Link(workers.start, tell=self.told.append, stall_seconds=stall_seconds, start_seconds=start_seconds)
        self.app = App(ByteText(), self.link, Identity(MODEL, "0" * 64, 258), **{"default_max_tokens": 2048, **app})
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())

    async def _serve(self) -> None:
        http = Listener(self.app)
        http.start(self.listener)
        engine = asyncio.create_task(self.link.supervise(self.workers.start()))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stop, engine}, return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            self.failure = engine.exception()
            await stop
        await self.link.close()
        await http.close(2.0)
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)

    def on_loop(self, call: Callable, *arguments) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def close(self) -> None:
        self.workers.may_begin.set()
        self.workers.model.may_step.set()
        self.on_loop(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def stub_service(workers: StubWorkers | None = None, **settings) -> Iterator[StubService]:
    service = StubService(workers or StubWorkers(), **settings)
    try:
        yield service
    finally:
        service.close()


@contextlib.contextmanager
def client(url: str, key: str = "none", **settings) -> Iterator[openai.OpenAI]:
    """The official client, which does not hide failures by trying again."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, **{"max_retries": 0, "timeout": 30, **settings}) as made:
        yield made


class Reply:
    """A raw HTTP answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def error(self):
        return self.json()["error"]


def ask(url: str, method: str, path: str, body: bytes | dict | None = None, **headers: str) -> Reply:
    """One request over a connection of its own."""
    import http.client

    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as answer:
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())


def send_only(url: str, path: str, body: dict) -> socket.socket:
    """A POST whose answer is left unread; close the socket to be a client that leaves."""
    data = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def samples(url: str) -> dict[str, float]:
    """The metrics without labels."""
    lines = ask(url, "GET", "/metrics").body.decode().splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in rows}


def until(holds: Callable[[], object], seconds: float = 10.0, what: str = "") -> object:
    """Wait for something to become true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.01)
    raise AssertionError(f"did not happen in {seconds} s: {what or holds}")


# ------------------------------------------------------------------------------------------------ the real thing


def byte_tokenizer() -> bytes:
    """A real tokenizer.json of 256 bytes, BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    return tokenizer.to_str().encode()


WRONG_CANARY = Canary("", list(range(14)), [1] * 14, [5.0] * 14)


def servable_snapshot(
    path: Path, *, canary: Literal["right", "wrong", "none"] = "right", max_length: int = 256, tp: int = 1
) -> Path:
    """A tiny random Llama with a tokenizer and a chat template, ready to serve."""
    files = {"tokenizer.json": byte_tokenizer(), "chat_template.jinja": CHAT_TEMPLATE.encode()}
    text = TextSection(eos_token_ids=(257,), template="jinja")

    def write(canary: Canary | None) -> None:
        make_snapshot(
            path, tiny_spec(vocab_size=258, max_length=max_length), tp, text_files=files, text=text, canary=canary
        )

    write(WRONG_CANARY if canary == "wrong" else None)
    if canary == "right":
        command = [sys.executable, "-m", "fgsnap.runtime.canary", str(path)]
        values = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        shutil.rmtree(path)
        write(Canary("", values["tokens"], values["next"], values["margins"]))
    return path


FGSNAP = ("-P", "-m", "fgsnap")  # as installed: nothing comes from the working directory
SERVE = (sys.executable, *FGSNAP, "serve")
ROOT = Path(__file__).parents[1]


class RealService:
    """``fgsnap serve`` in its own process."""

    def __init__(
        self,
        snapshot: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        directory: Path = ROOT,
        python: str = sys.executable,
        command: Sequence[str] = FGSNAP,
    ) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [python, *command, "serve", str(snapshot), "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=_environment(environment),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def url(self) -> str:
        """Where it listens; waits until it is ready."""
        line = until(lambda: next((line for line in self.lines if "ready at" in line), None), 60, "\n".join(self.lines))
        return str(line).split("ready at ")[1].split()[0]

    def worker(self) -> int:
        """The process id of the engine worker; waits until it is ready."""
        assert self.url
        (worker,) = self.children()
        return worker

    def children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = 20) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def real_service(snapshot: Path, *options: str, **settings) -> Iterator[RealService]:
    service = RealService(snapshot, *options, **settings)
    try:
        yield service
    finally:
        service.close()


def run_serve(
    snapshot: Path | str, *options: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``fgsnap serve`` where it is expected to end by itself."""
    return subprocess.run(
        [*SERVE, str(snapshot), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(environment),
    )


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}


def hanging_import(folder: Path, module: str) -> dict[str, str]:
    """The environment in which a Python process that imports ``module`` leaves a file ``hanging`` and stands still."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Hang:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            open({str(folder / 'hanging')!r}, 'w').close()\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Hang())\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
