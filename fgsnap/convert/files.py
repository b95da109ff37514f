"""Where the bytes of a checkpoint's weight files come from: a folder here, or (``ranges``) the Hub."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fgsnap.convert.source import Stamps, Traffic, digest, map_file, refuse_changed, regular_size, stamps

KEPT = 64 << 20
"""Bytes of ranges that came over a network and are kept, or twice the longest of them."""


class Files(Protocol):
    """A checkpoint's weight files by name. Threads may read at the same time.

    ``traffic`` counts what comes over a network; None where nothing does.
    """

    traffic: Traffic | None

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def size(self, name: str) -> int:
        """Its bytes; asked before any of them is read."""
        ...

    def header(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes ``start:stop``, which say where the weights lie."""
        ...

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes ``start:stop``, which are weights; read only."""
        ...

    def digest(self, name: str, go_on: Callable[[], None]) -> str:
        """What names the file's content in a manifest. ``go_on`` as for ``Source.file_digests``."""
        ...

    def check_unchanged(self) -> None:
        """Raise SourceError if a file is not the one that was opened, or was written to since."""
        ...

    def close(self) -> None:
        """End whatever still reads; what was read stays."""
        ...


class LocalFiles:
    """The files of a folder, mapped when they are first read. Their digests are BLAKE3."""

    traffic: Traffic | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: Stamps = {}
        self._maps: dict[str, mmap.mmap] = {}

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        path = self.folder / name
        if path not in self._stamps:
            self._stamps |= stamps([path])
        with path.open("rb") as file:
            return regular_size(file.fileno(), name)

    def header(self, name: str, start: int, stop: int) -> memoryview:
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return memoryview(file.read(stop - start))

    def read(self, name: str, start: int, stop: int) -> memoryview:
        found = self._maps.get(name)
        if found is None:
            found = self._maps.setdefault(name, map_file(self.folder / name))
        return memoryview(found)[start:stop]

    def digest(self, name: str, go_on: Callable[[], None]) -> str:
        return digest(self.folder / name, go_on)

    def check_unchanged(self) -> None:
        refuse_changed(self._stamps)

    def close(self) -> None:
        """Let go of the maps; each is unmapped when the last array over it is gone."""
        self._maps.clear()
