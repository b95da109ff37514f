"""What is resident while serving: one replica, then two that share the page cache.

Every server gets a small KV cache and has filled nine tenths of it, so that what it takes at work is there; vLLM takes
no less than 1 GiB. Pss counts a page that n processes share as a share of 1/n each, so it adds up.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from engines import llama_cpp, ours, vllm_cpu
from engines.contest import Failed, Server
from engines.process import Ended

from measures.models import Model
from measures.setting import LLAMA, OURS, VLLM, Setting, Start, served, tell

KV_MEBIBYTES = 64
CONTEXT, SEQUENCES, ANSWER = 256, 11, 232
"""Together nearly as many tokens as fit 64 MiB at SmolLM2's 23,040 bytes each."""


def measure(setting: Setting, model: Model) -> dict[str, Any]:
    """Bytes of each server; ``beyond`` is what one replica holds beside the weights and the KV cache."""
    rows: dict[str, Any] = {}
    for name, start in _starters(setting, model).items():
        try:
            rows[name] = _weigh(name, start)
        except (Failed, Ended) as error:
            rows[name] = {"failure": str(error)}
            tell(f"{name} failed: {error}")
    own = rows[OURS]["one"]
    weights = model.snapshot_bytes
    return {
        "model": model.name,
        "weights_bytes": weights,
        "kv_bytes": KV_MEBIBYTES << 20,
        "servers": rows,
        "beyond": own["Pss"] - weights - (KV_MEBIBYTES << 20),
        "second_bytes": rows[OURS]["two"]["Pss"] - own["Pss"],
    }


def _starters(setting: Setting, model: Model) -> dict[str, Start]:
    homes = setting.homes
    flags = setting.flags._replace(mapped=True)
    return {
        OURS: served(
            setting, OURS, lambda port: ours.serve(model.snapshot, port, context=CONTEXT, kv_mebibytes=KV_MEBIBYTES)
        ),
        LLAMA: served(
            setting, LLAMA,
            lambda port: llama_cpp.serve(
                homes.llama, model.gguf(), port, flags, context=CONTEXT, sequences=SEQUENCES
            ),
        ),
        VLLM: served(
            setting, VLLM,
            lambda port: vllm_cpu.serve(
                homes.vllm, model.checkpoint, port, context=CONTEXT, sequences=SEQUENCES, kv_gibibytes=1, compiled=False
            ),
        ),
    }  # fmt: skip


def _weigh(name: str, start: Start) -> dict[str, dict[str, int]]:
    with ExitStack() as stack:
        replicas: list[Server] = []
        found = {}
        for count in ("one", "two"):
            server = start()
            assert isinstance(server, Server)
            stack.callback(server.close)
            server.answer()
            server.decode(SEQUENCES, ANSWER, seed=1)
            replicas.append(server)
            each = [replica.group.memory() for replica in replicas]
            found[count] = {key: sum(row[key] for row in each) for key in each[0]}
            tell(f"{name}, {count}: " + ", ".join(f"{key} {value >> 20} MiB" for key, value in found[count].items()))
    return found
