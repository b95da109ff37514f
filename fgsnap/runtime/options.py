"""What a user chooses of an engine, as it travels from the command line to the engine's process."""

from __future__ import annotations

import msgspec


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``fgsnap serve`` and ``run`` let the user choose; None means the engine's or the snapshot's own value."""

    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch_tokens: int = 512
    max_model_len: int | None = None
    kv_memory: int | None = None
    threads: int | None = None
