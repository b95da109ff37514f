"""What a checkpoint is to conversion: its tensors read lazily, by rows, over mmap, and its small files with care.

``folder`` and ``gguf`` are such sources, ``dequantised`` is one around another; ``opening`` picks. A reader trusts no
header: every name, size and offset is checked with Python integers against the file before anything is mapped or
allocated. What the tensors mean is the families' business.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from blake3 import blake3

from fgsnap.errors import SourceError
from fgsnap.spec import DType

if TYPE_CHECKING:
    import numpy as np

NUMPY_DTYPES: dict[DType, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
MAX_TEXT_BYTES = 128 << 20
_DIGESTED = 32 << 20
Stamps = dict[Path, tuple[int, int, int] | None]
"""Inode, size and time of the last change of each file."""
LOCAL = "local"
"""The label of a checkpoint that has no name of its own; those of its folder and files are the user's."""
AGAIN = "Download it again; if it stays so, the checkpoint is damaged where it came from."
MAX_RANK = 8
"""Most axes of a tensor."""


class SourceTensor(NamedTuple):
    """One tensor as a source offers it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


class Traffic:
    """Bytes of weights that have come over a network so far; headers do not count. Threads may share it."""

    def __init__(self) -> None:
        self.fetched = 0
        self._lock = Lock()

    def add(self, count: int) -> None:
        """Count the bytes of one answer."""
        with self._lock:
            self.fetched += count


class OtherTensor(NamedTuple):
    """One tensor of a dtype that fgsnap does not compute with, spelled as the checkpoint's format spells it."""

    dtype: str
    shape: tuple[int, ...]


class FileTensor(NamedTuple):
    """One tensor as a file of the checkpoint describes it.

    Attributes:
        name, shape: its own.
        dtype: as safetensors spells it.
        offset: of its first byte from the start of the file.
        bytes: its size.
        strides: bytes from one index to the next, an axis each; None where the rows lie one after the other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    strides: tuple[int, ...] | None = None


class Source(Protocol):
    """A checkpoint, open for reading.

    ``label`` names it wherever it lies: a Hub repository's id, a GGUF file's own name for its model, else LOCAL;
    ``revision`` is the Hub commit, if it came from there; ``config`` has the shape of a Hugging Face config.json.
    ``others`` are tensors of dtypes that fgsnap does not compute with. ``default_dtype`` is the dtype to store
    in when the user asks for none; None keeps each tensor's own. ``dequantised`` names the formats that are read as
    plain numbers. ``traffic`` counts what comes over a network; None where nothing does.
    """

    label: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    others: dict[str, OtherTensor]
    kind: Literal["hf", "gguf"]
    default_dtype: DType | None
    dequantised: tuple[str, ...]
    traffic: Traffic | None

    def rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of axis 0, read only and C-contiguous; bfloat16 comes as its bits in uint16.

        A scalar is one row. A folder gives those of ``others`` as well whose elements are a byte each, as uint8.
        """
        ...

    def text_files(self) -> dict[str, bytes]:
        """The config, tokenizer and chat template files that a snapshot keeps, by name."""
        ...

    def file_digests(self, go_on: Callable[[], None]) -> dict[str, str]:
        """A digest of every source file that was read, by name (``model.gguf`` for any GGUF file). Call it once.

        BLAKE3, or "sha256:" and the sha256 of a weight file from the Hub, which names it so.

        ``go_on`` is called every few milliseconds; what it raises ends the work.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise SourceError if a file that is read is not the one that was opened, or was written to since."""
        ...

    def close(self) -> None: ...


def says_dtype(config: Mapping[str, Any]) -> Any:
    """What a config.json says of its weights' dtype, which may be anything."""
    return config.get("dtype") or config.get("torch_dtype")


def stated_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that a config.json says its weights are in; None where it says none that fgsnap stores."""
    stated = says_dtype(config)
    name = stated.removeprefix("torch.") if isinstance(stated, str) else None
    return next((known for known in NUMPY_DTYPES if known == name), None)


def read_json(path: Path) -> Any:
    """Parse one JSON text file of a checkpoint."""
    return parse_json(read_text(path), path.name)


def parse_json(raw: bytes, label: str) -> Any:
    """Parse JSON bytes, naming the file in the error."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{label} is not JSON.", f"{brief(error)}.", AGAIN) from None


def read_text(path: Path) -> bytes:
    """The bytes of one small text file."""
    with path.open("rb") as file:
        refuse_large_text(path.name, regular_size(file.fileno(), path.name))
        return file.read()


def refuse_large_text(name: str, size: int) -> None:
    """Raise SourceError for a text file that is larger than any real one."""
    if size > MAX_TEXT_BYTES:
        raise SourceError(
            f"{name} has {size} bytes.",
            f"The limit for text files is {MAX_TEXT_BYTES}, which is far above what real ones have.",
            "Check that the file is what its name says; do not use this checkpoint before you know who made it.",
        )


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for reading; its pages belong to the page cache, not to us."""
    with path.open("rb") as file:
        regular_size(file.fileno(), path.name)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def stamps(paths: Iterable[Path]) -> Stamps:
    """What shows of each file whether it was written to or replaced; None where there is none."""
    found: Stamps = {}
    for path in paths:
        try:
            status = path.stat()
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            found[path] = None
    return found


def refuse_changed(before: Stamps) -> None:
    """Raise SourceError where the stamps are not what they were."""
    now = stamps(before)
    changed = [path.name for path in before if now[path] != before[path]]
    if changed:
        raise _changed(changed[0])


def _changed(name: str) -> SourceError:
    return SourceError(
        f"{name} was changed while it was read.",
        "The snapshot would be of neither its old nor its new content.",
        "Convert again when nothing writes to the checkpoint any more.",
    )


class Hasher(Protocol):
    """What hashlib and BLAKE3 have in common."""

    def update(self, data: memoryview, /) -> Any: ...

    def hexdigest(self) -> str: ...


def digest(path: Path, go_on: Callable[[], None], hasher: Hasher | None = None) -> str:
    """BLAKE3 of a file's bytes, or what another hasher makes of them, whatever its name in a Hub cache claims.

    Not sha256 unless the Hub names the file by it, for the output's sha256 takes its time already. Mapped and not read:
    conversion maps the same pages.
    """
    hasher = hasher or blake3()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise _changed(path.name) from None
    with file:
        size = regular_size(file.fileno(), path.name)
        if size:
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                for start in range(0, size, _DIGESTED):
                    go_on()
                    with view[start : start + _DIGESTED] as part:
                        hasher.update(part)
    return hasher.hexdigest()


def show(value: Any) -> str:
    """A value from a file, quoted and short enough for an error line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 128 else "a number beyond 128 bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def brief(error: BaseException) -> str:
    """A library's own words about bad input, cut to fit an error line."""
    text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return text if len(text) <= 120 else f"{text[:117]}..."


def regular_size(descriptor: int, name: str) -> int:
    """The size of an open file, refused when it is no regular one."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(
            f"{name} is not a regular file.",
            "Devices, pipes and folders are not read.",
            "Put the file itself in its place.",
        )
    return status.st_size
