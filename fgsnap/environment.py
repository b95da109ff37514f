"""What ``fgsnap env`` reports: this host and installation, without importing anything heavy."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fgsnap import __version__
from fgsnap.errors import UsageError
from fgsnap.kernels import library

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "numpy",
    "starlette",
    "h11",
)
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def describe() -> dict[str, str | list[str]]:
    """Name and value of everything that a bug report about this host should carry. Secrets are named, never shown."""
    return {
        "fgsnap": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu features": [name for name in _CPU_FEATURES if name in _cpu_flags()],
        "cpus usable": str(len(os.sched_getaffinity(0))),
        "numa nodes": _numa_nodes(Path("/sys/devices/system/node")),
        "threads": _threads(),
        "memory": _memory(),
        "backend native": _native_backend(),
        "backend reference": _reference_backend(),
        "packages": [f"{name} {found}" for name in _PACKAGES if (found := installed(name))],
        "environment": [f"{name}={_shown(name)}" for name in sorted(os.environ) if name.startswith(("FGSNAP_", "HF_"))],
    }


def _native_backend() -> str:
    works, reason = library.available()
    if not works:
        return f"no: {reason}"
    _, *others = library.instruction_sets()
    return f"yes: {reason}" + (f", could use {', '.join(others)}" if others else "")


def _threads() -> str:
    """How many a serving process would start, and what sets that number."""
    try:
        count, reason = min(library.thread_limits(), key=lambda limit: limit[0])
    except UsageError as error:
        return f"cannot be told: {error.what}"
    return f"{count}: {reason}"


def _numa_nodes(root: Path) -> list[str]:
    """Each memory node with its processors, such as "0: 0-31"; empty where the kernel knows of none."""
    lists = sorted(root.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name.removeprefix("node")))
    return [f"{path.parent.name.removeprefix('node')}: {path.read_text().strip()}" for path in lists]


def _reference_backend() -> str:
    found = installed("torch")
    return f"yes: torch {found}" if found and find_spec("torch") else "no: pip install 'fgsnap[torch]'"


def installed(package: str) -> str:
    """The version of an installed package; empty where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _shown(name: str) -> str:
    return "(set)" if any(word in name for word in _SECRET) else os.environ[name]


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key) and ":" in line), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    return frozenset((_cpu_info("flags") or _cpu_info("Features")).split())


def _memory() -> str:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * page / (1 << 30):.1f} GiB"
