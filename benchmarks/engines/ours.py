"""fgsnap itself, as it is installed beside the Python that runs this benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

from engines.contest import HOST, MODEL, RUNNERS
from engines.process import Launch

FGSNAP = str(Path(sys.executable).with_name("fgsnap"))


def serve(snapshot: Path, port: int, *, context: int, kv_mebibytes: int) -> Launch:
    command = [FGSNAP, "serve", str(snapshot), "--host", HOST, "--port", str(port), "--served-model-name", MODEL]
    return Launch([*command, "--max-model-len", str(context), "--kv-memory", f"{kv_mebibytes}MiB"])


def run(snapshot: Path, *, context: int, kv_mebibytes: int) -> Launch:
    runner = str(RUNNERS / "run_fgsnap.py")
    return Launch([sys.executable, runner, str(snapshot), str(context), str(kv_mebibytes)])
