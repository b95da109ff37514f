"""Weight files on the Hub, read by HTTP ranges without a copy on disk: each byte that is asked for comes once.

The Hub names a file by its sha256 and redirects to a server that holds it. Every answer is checked to be the range that
was asked for, of a file of the size that the Hub names, under one ETag throughout. A connection that breaks goes on
where it broke. The ranges that came last are kept, since neighbouring slabs share rows; memory is bounded by them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from huggingface_hub import get_hf_file_metadata, get_session
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from fgsnap.convert.files import KEPT, LocalFiles
from fgsnap.convert.hub_errors import HTTP_ERRORS, hub_errors, unreachable
from fgsnap.convert.source import Traffic, digest
from fgsnap.errors import NetworkError, SourceError

MOST_KEPT = 256
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each further attempt while not a byte comes."""
LONGEST_WAIT = 300
"""Seconds that a server may ask to be left alone."""

RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
EXPIRED = frozenset((401, 403, 404, 410))  # a link to the server that holds a file is good for an hour or so
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
SHA256 = re.compile(r"[0-9a-f]{64}")
AGAIN = "Run the same command again; --download keeps the files that have come, --ranks the ranks that are finished."
DOWNLOAD = "Convert with --download, which keeps a copy of the checkpoint in the Hub cache."


class HubFile(NamedTuple):
    """A file as the Hub lists it: where it is asked for, its bytes, and their sha256."""

    url: str
    size: int
    sha256: str


class HubFiles:
    """The weight files of a repository: those in the Hub's cache from there, the others by ranges.

    Args:
        repository: names the source in errors.
        folder: where the cache has the commit's files.
        remote: the files to read from the Hub, by name.
    """

    def __init__(self, repository: str, folder: Path, remote: dict[str, HubFile]) -> None:
        self.traffic = Traffic() if remote else None
        self._local = LocalFiles(folder)
        self._ended = Event()
        self._remote = {name: Remote(repository, name, file, self._ended) for name, file in remote.items()}
        self._kept = Kept()

    def has(self, name: str) -> bool:
        return name in self._remote or self._local.has(name)

    def size(self, name: str) -> int:
        remote = self._remote.get(name)
        return remote.file.size if remote else self._local.size(name)

    def header(self, name: str, start: int, stop: int) -> memoryview:
        remote = self._remote.get(name)
        return remote.fetch(start, stop) if remote else self._local.header(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        remote, traffic = self._remote.get(name), self.traffic
        if remote is None or traffic is None:
            return self._local.read(name, start, stop)

        def fetch(start: int, stop: int) -> memoryview:
            data = remote.fetch(start, stop)
            traffic.add(len(data))
            return data

        return self._kept.read(name, start, stop, fetch)

    def digest(self, name: str, go_on: Callable[[], None]) -> str:
        """The sha256 by which the Hub knows the file, so that it does not matter where its bytes came from.

        That of a file in the cache is computed, and must be what the cache has the file for.
        """
        remote = self._remote.get(name)
        if remote is not None:
            return f"sha256:{remote.file.sha256}"
        path = self._local.folder / name
        found = digest(path, go_on, hashlib.sha256())
        known = path.resolve().name
        if SHA256.fullmatch(known) and known != found:
            raise SourceError(
                f"{name} in the Hub cache is damaged.",
                f"Its sha256 is {found[:16]}..., and it should be {known[:16]}...",
                "Remove the repository from the cache (hf cache rm) and convert again.",
            )
        return f"sha256:{found}"

    def check_unchanged(self) -> None:
        self._local.check_unchanged()

    def close(self) -> None:
        """End every fetch, also one that waits to try again."""
        self._ended.set()
        self._local.close()


class Ended(Exception):
    """Nobody wants the bytes any more."""


class Again(Exception):
    """An attempt failed, and a later one may not. ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


FAILURES: tuple[type[Exception], ...] = (Again, *HTTP_ERRORS)


class Location(NamedTuple):
    """Where a file can be had for a while, and what to send along."""

    url: str
    headers: dict[str, str]


class Remote:
    """One file on the Hub. Threads may fetch at the same time, each over a connection of its own."""

    def __init__(self, repository: str, name: str, file: HubFile, ended: Event) -> None:
        self.file = file
        self._name = name
        self._where = f"{name} of {repository}"
        self._ended = ended
        self._lock = Lock()
        self._location: Location | None = None
        self._etags: dict[str, str | None] = {}

    def fetch(self, start: int, stop: int) -> memoryview:
        """Bytes ``start:stop``. Goes on where a connection broke, and gives up when none comes for several attempts."""
        data = memoryview(bytearray(stop - start))
        at, waits = 0, iter(WAITS)
        with hub_errors(self._where, None):
            while at < len(data):
                before = at
                try:
                    for part in self._parts(start + at, stop):
                        if at + len(part) > len(data):
                            raise self._no_ranges(f"It sent more than the {stop - start} bytes that were asked for.")
                        data[at : at + len(part)] = part
                        at += len(part)
                    failure = Again("The answer ended early.")
                except FAILURES as error:
                    failure = _again(error)
                if at < len(data):
                    waits = iter(WAITS) if at > before else waits
                    self._pause(failure, next(waits, None))
        return data.toreadonly()

    def _pause(self, failure: Again, seconds: float | None) -> None:
        if seconds is None:
            raise unreachable(self._where, failure, AGAIN)
        if self._ended.wait(min(max(seconds, failure.wait), LONGEST_WAIT)):
            raise Ended

    def _parts(self, at: int, stop: int) -> Iterator[bytes]:
        if self._ended.is_set():
            raise Ended
        location = self._located()
        headers = {**location.headers, "Range": f"bytes={at}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", location.url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
            self._check(response, location, at, stop)
            for part in response.iter_raw():
                if self._ended.is_set():
                    raise Ended
                yield part

    def _located(self) -> Location:
        with self._lock:
            if self._location is None:
                self._location = self._locate()
            return self._location

    def _locate(self) -> Location:
        """Ask the Hub where the file is. Only the Hub itself gets the user's token."""
        url = self.file.url
        found = get_hf_file_metadata(url, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        if found.size not in (None, self.file.size):
            raise self._changed(f"It has {found.size} bytes now, not {self.file.size}.")
        if found.etag and SHA256.fullmatch(found.etag) and found.etag != self.file.sha256:
            raise self._changed("The Hub names another sha256 for it than it listed.")
        target = urljoin(url, found.location)
        own = urlsplit(target)[:2] == urlsplit(url)[:2]
        return Location(target, build_hf_headers(token=None if own else False))

    def _check(self, response: Any, location: Location, at: int, stop: int) -> None:
        """Raise unless the answer is what was asked for."""
        status, headers = response.status_code, response.headers
        if status in RETRIED:
            raise Again(f"The answer was {status}.", _retry_after(headers))
        if status in EXPIRED:
            with self._lock:
                if self._location is location:
                    self._location = None
            raise Again(f"The answer was {status}.")
        if status == 416:
            raise self._changed(f"It has no bytes {at} to {stop} any more.")
        if status == 200:
            raise self._no_ranges("It sent the whole file.")
        if status != 206:
            raise unreachable(self._where, f"The answer was {status}.", AGAIN)
        told = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        length = headers.get("Content-Length", str(stop - at))
        if told is None or (int(told[1]), int(told[2])) != (at, stop - 1) or length != str(stop - at):
            sent = f"{length} bytes as {headers.get('Content-Range')!r}"
            raise self._no_ranges(f"Asked for bytes {at}-{stop - 1}, it sent {sent}.")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self._no_ranges(f"It sent the range as {headers['Content-Encoding']!r}.")
        if told[3] not in ("*", str(self.file.size)):
            raise self._changed(f"It has {told[3]} bytes now, not {self.file.size}.")
        etag = headers.get("ETag")
        first = self._etags.setdefault(urlsplit(str(response.url)).netloc, etag)
        if etag != first:
            raise self._changed(f"Its ETag was {first} and is {etag}.")

    def _changed(self, why: str) -> SourceError:
        return SourceError(
            f"{self._name} was changed on the Hub while it was read.",
            why,
            "Convert again; if it stays so, what stands between here and the Hub serves stale files.",
        )

    def _no_ranges(self, why: str) -> NetworkError:
        return NetworkError(f"The server of {self._where} does not send ranges of it.", why, DOWNLOAD)


def _again(error: Exception) -> Again:
    """What a failed attempt was; raised on if a later one cannot be better."""
    if isinstance(error, Again):
        return error
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in RETRIED:
            raise error
        return Again(f"The answer was {error.response.status_code}.", _retry_after(error.response.headers))
    return Again(str(error) or type(error).__name__)


def _retry_after(headers: Any) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


class Range:
    """Bytes ``start:stop`` of a file, fetched or on their way."""

    def __init__(self, name: str, start: int, stop: int) -> None:
        self.key = (name, start)
        self.start = start
        self.stop = stop
        self.data: Future[memoryview] = Future()

    def within(self, start: int, stop: int) -> tuple[int, int, memoryview]:
        """The part of ``start:stop`` that lies here, with its bytes; waits for them."""
        low, high = max(start, self.start), min(stop, self.stop)
        return low, high, self.data.result()[low - self.start : high - self.start]


class Kept:
    """The ranges that were asked for last, so that none is fetched twice soon, nor by two threads at a time."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, int], Range] = {}  # the one used last stands last
        self._lock = Lock()

    def read(self, name: str, start: int, stop: int, fetch: Callable[[int, int], memoryview]) -> memoryview:
        """Bytes ``start:stop`` of a file; ``fetch`` is asked for those that are not here."""
        if start == stop:
            return memoryview(b"")
        with self._lock:
            parts, absent = self._cover(name, start, stop)
        self._fill(absent, fetch)
        if len(parts) == 1:
            return parts[0].within(start, stop)[2]
        joined = memoryview(bytearray(stop - start))
        for part in parts:
            low, high, data = part.within(start, stop)
            joined[low - start : high - start] = data
        return joined.toreadonly()

    def _cover(self, name: str, start: int, stop: int) -> tuple[list[Range], list[Range]]:
        """The ranges that hold these bytes, in order, and those of them that are new."""
        held = [r for r in self._ranges.values() if r.key[0] == name and r.start < stop and start < r.stop]
        parts: list[Range] = []
        absent: list[Range] = []
        at = start
        for part in sorted(held, key=lambda part: part.start):
            if at < part.start:
                absent.append(Range(name, at, part.start))
                parts.append(absent[-1])
            parts.append(part)
            at = part.stop
        if at < stop:
            absent.append(Range(name, at, stop))
            parts.append(absent[-1])
        for part in parts:
            self._ranges.pop(part.key, None)
            self._ranges[part.key] = part
        self._let_go()
        return parts, absent

    def _let_go(self) -> None:
        sizes = {key: part.stop - part.start for key, part in self._ranges.items()}
        held, most = sum(sizes.values()), max(KEPT, 2 * max(sizes.values()))
        for key, size in sizes.items():
            if held <= most and len(self._ranges) <= MOST_KEPT:
                return
            if self._ranges[key].data.done():
                del self._ranges[key]
                held -= size

    def _fill(self, absent: list[Range], fetch: Callable[[int, int], memoryview]) -> None:
        for at, part in enumerate(absent):
            try:
                part.data.set_result(fetch(part.start, part.stop))
            except BaseException as error:
                with self._lock:
                    for left in absent[at:]:
                        self._ranges.pop(left.key, None)
                for left in absent[at:]:
                    left.data.set_exception(error)
                raise
