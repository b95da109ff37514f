"""The worker's loop over a real socket pair, with a stub model behind a real engine."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fgsnap.errors import HostError, SnapshotRefused
from fgsnap.runtime import wire, worker
from fgsnap.runtime.blocks import BlockPool
from fgsnap.runtime.engine import Engine
from fgsnap.runtime.options import EngineOptions
from fgsnap.runtime.process import BOOT
from fgsnap.runtime.request import Constraint, Request, SamplingParams
from fgsnap.snapshot import open_snapshot
from tests.doubles import StubModel
from tests.serving import Paced, alive, servable_snapshot, until

READY = wire.Ready("stub", "cpu", "1 thread", "asked for", "none", 256, 64, 4, 32)


class Server:
    """The parent's end of the pipe, read message by message."""

    def __init__(self, begin) -> None:
        self.end, theirs = socket.socketpair()
        self.end.settimeout(10)
        self.buffer = wire.FrameBuffer()
        self.messages: list[wire.FromWorker] = []
        self.code: int | None = None

        def live():
            with theirs:
                self.code = worker.run(worker.Pipe(theirs), begin, time.monotonic())

        self.thread = threading.Thread(target=live)
        self.thread.start()

    def send(self, *messages: wire.ToWorker) -> None:
        self.end.sendall(b"".join(map(wire.frame, messages)))

    def next(self) -> wire.FromWorker:
        while not self.messages:
            data = self.end.recv(1 << 16)
            assert data, "the worker closed the pipe"
            self.messages += map(wire.decode_from_worker, self.buffer.feed(data))
        return self.messages.pop(0)

    def until(self, kind, holds=lambda message: True):
        while not (isinstance(message := self.next(), kind) and holds(message)):
            pass
        return message

    def close(self) -> None:
        self.end.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def serve():
    servers = []

    def start(begin):
        servers.append(Server(begin))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def engine(model=None):
    return Engine(model or StubModel(), eos_token_ids=(257,), token_budget=32)


def request(id="r", prompt=(1, 2, 3), **params):
    return Request(
        id, tuple(prompt), SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "temperature": 0, **params})
    )


def tokens_of(server, id="r"):
    tokens = []
    while True:
        for output in server.until(wire.Outputs).step.outputs():
            if output.request == id:
                tokens += [token.id for token in output.tokens]
                if output.finish:
                    return tokens, output.finish


def test_a_start_that_left_garbage_alone_collects_it_once_it_serves(serve):
    gc.disable()
    try:
        assert serve(lambda mark: (engine(), READY)).next() == READY
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()


def test_an_idle_worker_takes_no_time_and_wakes_at_once(serve):
    """There and back through the pipe takes 0.1 ms at rest; here the machine may be busy."""
    server = serve(lambda mark: (engine(), READY))
    server.until(wire.Ready)
    began = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - began < 0.02
    taken = []
    for _ in range(50):
        time.sleep(0.005)
        sent = time.perf_counter()
        server.send(wire.Abort("nobody"))
        server.until(wire.Outputs)
        taken.append(time.perf_counter() - sent)
    assert sorted(taken)[25] < 0.005, taken


def test_phases_then_ready_then_tokens(serve):
    def begin(mark):
        mark("one")
        mark("two")
        return engine(), READY

    server = serve(begin)
    one, two = server.next(), server.next()
    assert (one.name, two.name) == ("one", "two") and one.end == two.begin and one.begin <= one.end <= two.end
    assert server.next() == READY
    server.send(wire.Submit(request()))
    tokens, finish = tokens_of(server)
    assert len(tokens) == 4 and finish == "length"


def test_the_tokens_are_those_of_the_engine_alone(serve):
    server = serve(lambda mark: (engine(), READY))
    server.send(wire.Submit(request("a", (1, 2))), wire.Submit(request("b", (3,) * 50, max_tokens=9)))
    alone = engine()
    alone.submit(request("b", (3,) * 50, max_tokens=9))
    expected = []
    while alone.has_work():
        expected += [token.id for output in alone.step().outputs() for token in output.tokens]
    assert tokens_of(server, "b") == (expected, "length")


def test_every_step_says_how_the_engine_is(serve):
    server = serve(lambda mark: (engine(), READY))
    server.send(wire.Submit(request(prompt=range(100))))
    steps = [server.until(wire.Outputs).stats.steps for _ in range(3)]
    assert steps == [1, 2, 3]


def test_blocks_are_free_at_once_after_an_abort(serve):
    model = Paced(StubModel())
    model.delay = 0.01
    server = serve(lambda mark: (engine(model), READY))
    server.send(wire.Submit(request(max_tokens=200)))
    running = server.until(wire.Outputs, lambda message: message.step.requests).stats
    assert running.kv_blocks_free < running.kv_blocks
    server.send(wire.Abort("r"))
    after = server.until(wire.Outputs, lambda message: not message.stats.running).stats
    assert after.kv_blocks_free == after.kv_blocks


def test_an_abort_of_something_unknown_is_harmless(serve):
    server = serve(lambda mark: (engine(), READY))
    server.send(wire.Abort("nobody"), wire.Submit(request()))
    assert tokens_of(server)[1] == "length"


def test_a_request_that_cannot_run_is_refused_and_the_others_go_on(serve):
    server = serve(lambda mark: (engine(), READY))
    server.send(wire.Submit(request("bad", max_tokens=1000)), wire.Submit(request()))
    refused = server.until(wire.Refused)
    assert refused.request == "bad" and refused.status == 400 and "1003 tokens" in refused.why
    assert tokens_of(server)[1] == "length"


def test_a_request_that_nobody_foresaw_ends_alone_and_leaves_nothing(serve, monkeypatch, capfd):
    real = BlockPool.digests

    def fragile(self, parent, tokens, start, stop):
        if 13 in tokens:
            raise OverflowError("what is inside stays inside")
        return real(self, parent, tokens, start, stop)

    monkeypatch.setattr(BlockPool, "digests", fragile)
    server = serve(lambda mark: (engine(), READY))
    server.send(wire.Submit(request("bad", (13,) * 9)), wire.Submit(request()))
    refused = server.until(wire.Refused)
    assert (refused.request, refused.status, refused.code) == ("bad", 500, "engine_error")
    assert "inside stays" not in f"{refused.what} {refused.why}"
    assert tokens_of(server)[1] == "length"
    server.send(wire.Abort("bad"), wire.Submit(request("bad")))  # its id is free
    assert tokens_of(server, "bad")[1] == "length"
    server.send(wire.Abort("nobody"))
    stats = server.until(wire.Outputs, lambda message: not message.step.requests).stats
    assert (stats.running, stats.waiting, stats.waiting_tokens, stats.kv_blocks_free) == (0, 0, 0, stats.kv_blocks)
    assert "OverflowError" in capfd.readouterr().err


def test_a_nan_ends_one_request_only(serve):
    server = serve(lambda mark: (engine(StubModel(nan_after=9)), READY))
    server.send(wire.Submit(request("bad", (9,))), wire.Submit(request()))
    assert tokens_of(server, "bad") == ([], "error")
    server.send(wire.Submit(request("later")))
    assert tokens_of(server, "later")[1] == "length"


class Endless:
    """Grammars that are compiled for ever."""

    def __init__(self) -> None:
        self.end, self.other = socket.socketpair()

    def matcher(self, constraint, *, open_end):
        return SimpleNamespace(pending=True, error="", close=lambda: None)

    def fileno(self):
        return self.end.fileno()

    def hear(self):
        pass

    flush = hear

    def close(self):
        self.end.close()
        self.other.close()


def test_a_deadline_is_kept_while_a_constraint_is_compiled(serve, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 60)
    limited = Engine(StubModel(), token_budget=32, grammars=Endless)
    server = serve(lambda mark: (limited, READY))
    params = SamplingParams(4, constraint=Constraint("regex", "a"))
    server.send(wire.Submit(Request("r", (1, 2), params, timeout=0.05)))
    ended = server.until(wire.Outputs, lambda message: message.step.ends)
    assert [(end.request, end.code) for end in ended.step.ends] == [("r", "deadline_exceeded")]


def test_stop_ends_the_loop(serve):
    server = serve(lambda mark: (engine(), READY))
    server.until(wire.Ready)
    server.send(wire.Stop())
    server.thread.join(10)
    assert server.code == 0


def test_the_end_of_the_pipe_ends_the_worker_also_amid_work(serve):
    model = Paced(StubModel())
    model.delay = 0.01
    server = serve(lambda mark: (engine(model), READY))
    server.send(wire.Submit(request(max_tokens=250)))
    server.until(wire.Outputs)
    server.end.close()
    server.thread.join(10)
    assert server.code == 0


def test_a_start_that_fails_is_told_with_its_exit_code(serve):
    def begin(mark):
        raise HostError("No.", "Because.", "Do.")

    server = serve(begin)
    assert server.next() == wire.Failed("No.", "Because.", "Do.", 6)
    server.thread.join(10)
    assert server.code == 6


def test_an_unforeseen_error_is_told_without_its_trace(serve):
    model = Paced(StubModel())
    model.raises = ValueError("the third\nsecret line")
    server = serve(lambda mark: (engine(model), READY))
    server.send(wire.Submit(request()))
    failed = server.until(wire.Failed)
    assert failed.why == "ValueError: the third" and failed.exit_code == 1


# ---------------------------------------------------------------------------------------------- with a real model


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return servable_snapshot(tmp_path_factory.mktemp("worker") / "snap")


def options(path, **settings):
    with open_snapshot(path) as opened:
        engine = EngineOptions(kv_memory=1 << 20, threads=1)
        return wire.Begin(**{"snapshot": str(path), "id": opened.id, "engine": engine, **settings})


def begin(told, mark=lambda name: None):
    return worker.begin_engine(lambda: told, mark)


@pytest.mark.parametrize("verify", ["manifest", "full"])
def test_a_real_start(snapshot, verify):
    marks = []
    made, ready = begin(options(snapshot, verify=verify), marks.append)
    before, after = ["import engine", "command line", "open"], ["map and bind", "canary"]
    assert marks == [*before, *(["verify"] if verify == "full" else []), *after]
    assert ready.canary.startswith("canary ") and ready.max_length == 256 and ready.token_budget == 128
    assert not made.has_work() and made.stats().kv_blocks == ready.kv_blocks > 0


def test_another_snapshot_at_the_same_place_is_refused(snapshot):
    with pytest.raises(SnapshotRefused, match="another snapshot"):
        begin(options(snapshot, id="0" * 64))


def test_a_canary_that_does_not_match_is_refused(tmp_path):
    path = servable_snapshot(tmp_path / "snap", canary="wrong")
    with pytest.raises(SnapshotRefused, match="does not compute what it should"):
        begin(options(path))


def test_without_a_canary_the_logits_have_to_be_finite(tmp_path):
    path = servable_snapshot(tmp_path / "snap", canary="none")
    _, ready = begin(options(path))
    assert ready.canary == "no canary recorded, logits finite"


def test_full_verification_finds_a_flipped_byte(tmp_path):
    path = servable_snapshot(tmp_path / "snap", canary="none")
    chosen = options(path, verify="full")
    rank = path / "rank-00000-of-00001.safetensors"
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)
    with pytest.raises(SnapshotRefused):
        begin(chosen)


def start_process(snapshot, parent):
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", BOOT, ".", str(theirs.fileno()), str(parent)]
        ours.sendall(wire.frame(options(snapshot)))
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()])


def test_a_worker_process_ignores_the_signals_of_the_terminal_and_ends_with_its_pipe(snapshot):
    ours, process = start_process(snapshot, os.getpid())
    with ours, process:
        buffer, messages = wire.FrameBuffer(), []
        ours.settimeout(30)
        while not any(isinstance(message, wire.Ready) for message in messages):
            messages += map(wire.decode_from_worker, buffer.feed(ours.recv(1 << 16)))
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        ours.sendall(wire.frame(wire.Submit(request())))
        until(lambda: any(o.finish for m in map(wire.decode_from_worker, buffer.feed(ours.recv(1 << 16)))
                          if isinstance(m, wire.Outputs) for o in m.step.outputs()))  # fmt: skip
        ours.close()
        assert process.wait(10) == 0


def test_a_worker_whose_parent_is_already_gone_does_not_start(snapshot):
    ours, process = start_process(snapshot, parent=1)
    with ours, process:
        assert process.wait(20) == 0


def test_a_fork_whose_parent_is_already_gone_ends_without_a_word():
    program = (
        "import socket\n"
        "from fgsnap.runtime import process, worker\n"
        "ours, theirs = socket.socketpair()\n"
        "process._become(lambda: worker.live(theirs, 0.0, parent=1), 'worker', set())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_worker_dies_with_a_parent_that_is_killed(snapshot):
    """A parent that cannot say goodbye, while the worker is busy and does not look at its pipe."""
    program = (
        "import os, sys, time, socket, signal\n"
        "from fgsnap.runtime import worker\n"
        "parent = os.getpid()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    worker.die_with(parent)\n"
        "    print(os.getpid(), flush=True)\n"
        "    while True: time.sleep(1)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    until(lambda: not alive(child))
