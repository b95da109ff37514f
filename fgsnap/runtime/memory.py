"""How much memory this process may still have: what the host says, every cgroup around the process, and its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available(mapped: int = 0, root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping; None where the host does not tell.

    Args:
        mapped: bytes of files that this process has mapped and reads all the time. They may lie in memory already, but
            count as available, for they would make room.
        root: where it is asked.
    """
    there = min((*_of_host(root), *_of_groups(root)), default=None)
    own = min(_of_limits(root), default=None)  # mapped files are counted in what is used of these
    if there is not None:
        there = max(there - mapped, 0)
    return min((found for found in (there, own) if found is not None), default=None)


def _of_host(root: Path) -> Iterator[int]:
    found = _table(root / "proc/meminfo").get("MemAvailable:")
    if found is not None:
        yield found * 1024


def _of_groups(root: Path) -> Iterator[int]:
    """What each cgroup with a limit leaves, in either version of cgroups."""
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in own:
        old = "memory" in controllers.split(",")
        if controllers and not old:
            continue
        top = root / "sys/fs/cgroup" / ("memory" if old else "")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _of_group(folder, *(OLD_NAMES if old else NAMES))


LIMITS = {"Max address space": "VmSize:", "Max data size": "VmData:"}


def _of_limits(root: Path) -> Iterator[int]:
    """What the process's own limits leave, which ulimit -v and -d set."""
    used = _table(root / "proc/self/status")
    try:
        rows = [(line[:25].strip(), line[25:].split()) for line in (root / "proc/self/limits").read_text().splitlines()]
    except OSError:
        return
    for name, columns in rows:
        if name in LIMITS and columns and columns[0].isdecimal():
            yield max(int(columns[0]) - used.get(LIMITS[name], 0) * 1024, 0)


NAMES = ("memory.max", "memory.current", "")
OLD_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
NO_LIMIT = 1 << 62  # version 1 writes a number near 2^63 where it has no limit


def _of_group(folder: Path, limit_name: str, usage_name: str, prefix: str) -> Iterator[int]:
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is not None and usage is not None and limit < NO_LIMIT:
        # Pages of files, such as the weights, are counted as used, but make room when it is needed.
        rows = _table(folder / "memory.stat")
        files = rows.get(f"{prefix}active_file", 0) + rows.get(f"{prefix}inactive_file", 0)
        yield max(limit - max(usage - files, 0), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _table(path: Path) -> dict[str, int]:
    """The first two words of each line, as name and number."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
