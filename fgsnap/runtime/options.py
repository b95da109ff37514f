"""What a user chooses, as it travels from the command line to the server and the engine's process."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]

BudgetSource = Literal["asked for", "measured", "default"]
"""Where the token budget of a forward comes from."""

MOST_SEQUENCES = 256
"""Choices in one forward, unless another number is asked for."""


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``serve``, ``run`` and ``fgsnap.load`` let a user choose; None: the engine's or the snapshot's own value."""

    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_batch_tokens: Count | None = None
    max_num_seqs: Count | None = None
    max_waiting: Count = 4096
    admission: Literal["reserve", "optimistic"] = "reserve"
    prefix_caching: bool = True
    max_model_len: Count | None = None
    kv_memory: Count | None = None
    threads: Count | None = None
    tp: Count | None = None

    @property
    def most_running(self) -> int:
        """How many choices run at once, where the token budget has a token for each."""
        return self.max_num_seqs or MOST_SEQUENCES

    def most_live(self, budget: int | None = None) -> int:
        """How many choices the service takes at once: those that run, and those that wait beside them.

        No more run than tokens fit a forward; ``budget``, once that is known.
        """
        return min(self.most_running, budget or self.max_batch_tokens or self.most_running) + self.max_waiting


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
