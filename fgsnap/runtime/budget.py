"""How many tokens a forward carries at most: as many as the user says, else as were measured here, else a default.

``fgsnap bench budget`` keeps what it measures in the user's cache, a small file for each snapshot and host. A file that
is damaged, or was measured elsewhere, is said to be ignored in one line; it never keeps an engine from starting.
"""

# Annotations are not postponed here: msgspec would have to compile each one from its text at every start.

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from fgsnap.runtime.options import BudgetSource, EngineOptions

if TYPE_CHECKING:
    from fgsnap.runtime.decoder import Decoder

CPU_BUDGET = 128
"""Beyond some hundred tokens a CPU gains hardly any throughput, and everybody who generates waits for all of them."""

GPU_BUDGET = 512
MOST_TOKENS = 1 << 20


class Budget(NamedTuple):
    """Tokens of a forward, and where the number comes from."""

    tokens: int
    source: BudgetSource


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a start needs of the file: the budget, and what it was measured for."""

    snapshot: str
    host: str
    max_batch_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]


def settled_budget(options: EngineOptions, snapshot: str, decoder: "Decoder") -> Budget:
    """The budget of a forward of ``decoder``, which computes the snapshot with the id ``snapshot``.

    Where only the number of sequences was asked for, it has a token for each of them, and as many for prompts.
    """
    if options.max_batch_tokens is not None:
        return Budget(options.max_batch_tokens, "asked for")
    needed = 2 * (options.max_num_seqs or 0)
    tokens = _measured(snapshot, decoder)
    found = Budget(default_budget(decoder.ops.device), "default") if tokens is None else Budget(tokens, "measured")
    return found if found.tokens >= needed else Budget(needed, "asked for")


def default_budget(device: str) -> int:
    """The budget of a forward on ``device`` where nobody has asked for one and none was measured."""
    return CPU_BUDGET if device == "cpu" else GPU_BUDGET


def _measured(snapshot: str, decoder: "Decoder") -> int | None:
    """What was measured of the snapshot on this host."""
    folder = cache_folder(snapshot)
    if not folder.is_dir():  # the usual case costs one look
        return None
    host = host_of(decoder)
    path = budget_file(folder, host)
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        _tell_ignored(path, error.strerror or str(error) if isinstance(error, OSError) else str(error))
        return None
    if (kept.snapshot, kept.host) != (snapshot, host):
        _tell_ignored(path, "it was measured for another snapshot or host")
        return None
    return kept.max_batch_tokens


def _tell_ignored(path: Path, why: str) -> None:
    words = " ".join(why.split()).rstrip(".")
    print(f"fgsnap: the token budget in {path} is ignored: {words}.", file=sys.stderr, flush=True)


def cache_folder(snapshot: str) -> Path:
    """Where the user's cache has what was measured of a snapshot."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # What is no absolute path is to be ignored, says the XDG base directory specification.
    root = Path(chosen) if chosen.startswith("/") else Path(os.path.expanduser("~"), ".cache")
    return root / "fgsnap" / snapshot


def budget_file(folder: Path, host: str) -> Path:
    """The file in ``folder`` of what was measured on ``host``."""
    import hashlib  # costs a start some milliseconds where nothing else has loaded it

    return folder / hashlib.sha256(host.encode()).hexdigest()[:16] / "budget.json"


def host_of(decoder: "Decoder") -> str:
    """What the time of a forward depends on beside the snapshot: processor, backend, dtype, threads and ranks."""
    return f"{_processor()}: {decoder.ops.name} on {decoder.ops.device}, {decoder.setting}"


def _processor() -> str:
    """The processor's name. The kernel writes the list of all of them as it is read, so only its beginning is."""
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:  # noqa: PTH123 - Path.open has no such short read
            lines = file.read(4096).decode(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, os.uname().machine)
