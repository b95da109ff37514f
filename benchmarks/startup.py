"""Time from exec to the first token over HTTP, per backend and phase, beside transformers and a bare ``import torch``.

Every round runs all contestants in turn on SmolLM2-135M-Instruct in bfloat16, so that a drift of the machine meets
all of them. The page cache is warm. fgsnap's time ends when the first streamed token has arrived at a client that
connected as soon as it could; transformers' ends, without any HTTP, when ``generate`` returns one token.

    python benchmarks/startup.py [--rounds 7] [--backend native --backend reference] [--output benchmarks/results]

The last line is JSON. ``phases`` are the server's own account of the run with the median wall time; ``unaccounted``
is the share of that wall time that no phase covers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import finish, smollm2_gguf, summary

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))  # the command as it is installed beside this Python
PROMPT = "What is the capital of France?"
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
chat = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", action="append", help="may be given several times; default: native, reference")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    backends = options.backend or ["native", "reference"]
    with tempfile.TemporaryDirectory() as scratch:
        snapshot, checkpoint = str(Path(scratch) / "snapshot"), str(Path(scratch) / "checkpoint")
        run([FGSNAP, "convert", str(smollm2_gguf()), "-o", snapshot])
        run([FGSNAP, "export", snapshot, "-o", checkpoint])
        finish("startup", measure(snapshot, checkpoint, backends, options.device, options.rounds), options.output)


def measure(snapshot: str, checkpoint: str, backends: list[str], device: str, rounds: int) -> dict[str, Any]:
    """Run all contestants ``rounds`` times in turn, after one round that only warms the page cache."""
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in backends}
    transformers: list[float] = []
    import_torch: list[float] = []
    for counted in range(-1, rounds):
        for backend in backends:
            one = serve_once(snapshot, backend, device)
            if counted >= 0:
                runs[backend].append(one)
        others = (
            (transformers, [sys.executable, "-c", TRANSFORMERS, checkpoint, PROMPT]),
            (import_torch, [sys.executable, "-c", "import torch"]),
        )
        for times, command in others:
            seconds = run(command)
            if counted >= 0:
                times.append(seconds)
    result: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "fgsnap": {backend: account(of_backend) for backend, of_backend in runs.items()},
        "transformers": summary(transformers),
        "import_torch": summary(import_torch),
    }
    result["transformers_over_fgsnap"] = {
        backend: summary([t / one["wall"] for t, one in zip(transformers, of_backend, strict=True)], 2)
        for backend, of_backend in runs.items()
    }
    return result


def run(command: list[str]) -> float:
    """Seconds that a command takes from exec to exit."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    return time.monotonic() - begin


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def serve_once(snapshot: str, backend: str, device: str) -> dict[str, Any]:
    """Start a server, take one token, stop it: wall seconds and the server's own report."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "startup.json"
        command = [FGSNAP, "serve", snapshot, "--port", str(port), "--backend", backend]
        command += ["--device", device, "--startup-report", str(report)]
        begin = time.monotonic()
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            first_token(port, give_up=begin + 120)
            wall = time.monotonic() - begin
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        return {"wall": wall, "report": json.loads(report.read_text())}


def first_token(port: int, give_up: float) -> None:
    """Stream a chat completion and return when its first text has arrived."""
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stream": True})
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            break
        except ConnectionRefusedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.001)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            connection.close()
            return
    raise RuntimeError("the stream ended without a token")


def account(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary of the wall times, and the phases of the run in the middle."""
    middle = sorted(runs, key=lambda one: one["wall"])[len(runs) // 2]
    phases = middle["report"]["critical_path"]
    covered = sum(phase["end"] - phase["begin"] for phase in phases)
    return {
        "seconds": summary([one["wall"] for one in runs]),
        "wall": round(middle["wall"], 4),
        "phases": {phase["name"]: round(phase["end"] - phase["begin"], 4) for phase in phases},
        "unaccounted": round(1 - covered / middle["wall"], 4),
    }


if __name__ == "__main__":
    main()
