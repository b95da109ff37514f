"""What a user chooses, as it travels from the command line to the server and the engine's process."""

from __future__ import annotations

from typing import Literal

import msgspec

BudgetSource = Literal["asked for", "measured", "default"]
"""Where the token budget of a forward comes from."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``fgsnap serve`` and ``run`` let the user choose; None means the engine's or the snapshot's own value."""

    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch_tokens: int | None = None
    max_num_seqs: int = 256
    max_waiting: int = 4096
    admission: Literal["reserve", "optimistic"] = "reserve"
    prefix_caching: bool = True
    max_model_len: int | None = None
    kv_memory: int | None = None
    threads: int | None = None
    tp: int | None = None


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``fgsnap serve``; None means the snapshot's own value, or none."""

    snapshot: str
    host: str = "127.0.0.1"
    port: int = 8000
    engine: EngineOptions = EngineOptions()
    served_model_name: str | None = None
    api_key_file: str | None = None
    verify: str = "manifest"
    startup_report: str | None = None
    grace: float = 30.0
    default_max_tokens: int = 2048
