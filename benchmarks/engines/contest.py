"""The two kinds of contestant, measured with the same words: a server over HTTP, and a runner that has no server.

Both answer ``decode`` and ``prefill`` in tokens a second and can be paused while others are measured. A server is asked
by the clients of ``fgsnap bench``; a runner is a program of ``runners/`` under the engine's own interpreter, told what
to do by a line of JSON.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.process import Group, Launch
from fgsnap.bench import client, load
from fgsnap.bench.client import Asking, Timeline
from fgsnap.bench.workload import Work

HOST, MODEL = "127.0.0.1", "model"
WARM = Work([1000] * 8, 8, 2)
QUESTION = "What is the capital of France?"
START_SECONDS = 600.0
PROMPT = 16  # tokens before a decode
RUNNERS = Path(__file__).parents[1] / "runners"


class Failed(Exception):
    """A contestant cannot do what it was asked; says why."""


class Server:
    """An OpenAI-compatible server of our own on a port of its own."""

    def __init__(self, launch: Launch, port: int, log: Path) -> None:
        self.group = Group(launch, log)
        self.endpoint = client.endpoint(f"http://{HOST}:{port}/v1")
        self._port = port

    def first_text(self) -> float:
        """Seconds from exec until the first text of a streamed answer came, asked for as soon as anything answers."""
        body = _chat(stream=True, max_tokens=4)
        while True:
            response = self._post(body)
            if response is not None:
                for line in response:
                    if line.startswith(b"data: {") and _text(json.loads(line[6:])):
                        seconds = time.monotonic() - self.group.began
                        response.close()
                        return seconds
                raise Failed("the stream ended without a text")
            self._wait(0.001)

    def answer(self) -> str:
        """What it says to the question, greedily; waits until it can."""
        while (response := self._post(_chat(stream=False, max_tokens=16))) is None:
            self._wait(0.02)
        return str(json.load(response)["choices"][0]["message"]["content"])

    def decode(self, sequences: int, tokens: int, seed: int) -> float:
        """Tokens a second while ``sequences`` answers are written at once, from the last one's first token on."""
        works = [Work(ids, PROMPT, tokens) for ids in prompts(sequences, PROMPT, seed)]
        return steady_rate(self._run(works, sequences))

    def prefill(self, length: int, seed: int) -> float:
        """Tokens a second of one prompt, until its first token came."""
        answer = self._run([Work(prompts(1, length, seed)[0], length, 1)], 1)[0]
        return length / answer.first_token

    def close(self) -> None:
        self.group.close()

    def _run(self, works: Sequence[Work], clients: int) -> list[Timeline]:
        asked = [WARM] * clients + list(works)
        answers = load.run(self.endpoint, Asking(MODEL), asked, clients, seed=0).timelines
        failure = next((answer.failure for answer in answers if answer.failure), "")
        if failure:
            raise Failed(failure)
        return answers

    def _post(self, body: str) -> http.client.HTTPResponse | None:
        """The response to a chat; None while the server is not there, or says that it is loading."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=START_SECONDS)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):
            return None
        if response.status == 503:
            return None
        if response.status != 200:
            raise Failed(f"HTTP {response.status}: {response.read().decode(errors='replace')[:300]}")
        return response

    def _wait(self, seconds: float) -> None:
        self.group.check()
        if time.monotonic() - self.group.began > START_SECONDS:
            raise Failed(f"no answer within {START_SECONDS:g} s")
        time.sleep(seconds)


class Runner:
    """A program without HTTP that holds the model and does one job after the other."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.group = Group(launch, log, talks=True)

    def first_text(self) -> float:
        """Seconds from exec until the first token of an answer was there."""
        self._ask({"op": "answer", "prompt": QUESTION, "tokens": 1})
        return time.monotonic() - self.group.began

    def answer(self) -> str:
        return str(self._ask({"op": "answer", "prompt": QUESTION, "tokens": 16}))

    def decode(self, sequences: int, tokens: int, seed: int) -> float:
        """Tokens a second of a batch, from its first tokens on."""
        return float(self._ask({"op": "decode", "prompts": prompts(sequences, PROMPT, seed), "tokens": tokens}))

    def prefill(self, length: int, seed: int) -> float:
        """Tokens a second of one prompt, its first token included."""
        return float(self._ask({"op": "prefill", "prompt": prompts(1, length, seed)[0]}))

    def close(self) -> None:
        self.group.close()

    def _ask(self, job: Mapping[str, Any]) -> Any:
        pipes = self.group.process
        assert pipes.stdin is not None and pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps(job).encode() + b"\n")
            pipes.stdin.flush()
        except BrokenPipeError:
            pipes.wait()
        line = pipes.stdout.readline()
        if not line:
            pipes.wait()
            self.group.check()
        said = json.loads(line)
        if "failure" in said:
            raise Failed(said["failure"])
        return said["result"]


Contestant = Server | Runner


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that no prefix cache has seen: ids that are ordinary tokens of every vocabulary used here."""
    draw = random.Random(seed)
    return [draw.choices(range(1000, 30000), k=length) for _ in range(count)]


def steady_rate(answers: Sequence[Timeline]) -> float:
    """Tokens a second while all answers were being written: from the last first chunk to the first last chunk.

    A server may send several tokens in a chunk; each of an answer's chunks counts as the same share of its tokens.
    """
    begin = max(answer.chunks[0] for answer in answers)
    end = min(answer.chunks[-1] for answer in answers)
    if end <= begin:
        raise Failed("the answers were never all being written at once")
    tokens = 0.0
    for answer in answers:
        inside = sum(begin < chunk <= end for chunk in answer.chunks)
        tokens += inside * answer.answer_tokens / len(answer.chunks)
    return tokens / (end - begin)


def _chat(*, stream: bool, max_tokens: int) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    return json.dumps(
        {"model": MODEL, "messages": messages, "temperature": 0, "stream": stream, "max_tokens": max_tokens}
    )


def _text(chunk: Mapping[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in chunk.get("choices", ()))
