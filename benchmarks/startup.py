"""Time from exec to the first token over HTTP, per backend and phase, beside transformers and a bare ``import torch``.

Every round runs all contestants in turn on SmolLM2-135M-Instruct in bfloat16, so that a drift of the machine meets
all of them. The page cache is warm. fgsnap's time is that of ``fgsnap bench startup``: it ends when the first streamed
token has arrived at a client that connected as soon as it could; transformers' ends, without any HTTP, when
``generate`` returns one token. The native backend's snapshot is packed for CPUs.

    python benchmarks/startup.py [--rounds 7] [--backend native --backend reference] [--output benchmarks/results]

The last line is JSON. ``phases`` are the server's own account of the run with the median wall time; ``unaccounted``
is the share of that wall time that no phase covers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish, smollm2_gguf

from fgsnap.bench.record import summary
from fgsnap.bench.startup import PROMPT, Start, account, start_once
from fgsnap.runtime.options import EngineOptions

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))  # the command as it is installed beside this Python
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
    parser = arguments(__doc__, 7)
    parser.add_argument("--backend", action="append", help="may be given several times; default: native, reference")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    backends = options.backend or ["native", "reference"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for target in set(map(target_of, backends)):
            run([FGSNAP, "convert", str(smollm2_gguf()), "-o", str(folder / target), "--target", target])
        run([FGSNAP, "export", str(folder / target_of(backends[0])), "-o", str(folder / "checkpoint")])
        finish("startup", measure(folder, backends, options.device, options.rounds), options.output)


def target_of(backend: str) -> str:
    """For whose kernels a backend's snapshot is laid out."""
    return "cpu" if backend == "native" else "generic"


def measure(folder: Path, backends: list[str], device: str, rounds: int) -> dict[str, Any]:
    """Run all contestants ``rounds`` times in turn, after one round that only warms the page cache.

    ``folder`` holds a snapshot for each target, and the checkpoint.
    """
    runs: dict[str, list[Start]] = {backend: [] for backend in backends}
    transformers: list[float] = []
    import_torch: list[float] = []
    for counted in range(-1, rounds):
        for backend in backends:
            one = start_once(folder / target_of(backend), EngineOptions(backend=backend, device=device))
            if counted >= 0:
                runs[backend].append(one)
        others = (
            (transformers, [sys.executable, "-c", TRANSFORMERS, str(folder / "checkpoint"), PROMPT]),
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
        backend: summary([t / one.wall for t, one in zip(transformers, of_backend, strict=True)], 2)
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


if __name__ == "__main__":
    main()
