"""A Hub on loopback for tests: the few endpoints that huggingface_hub asks when it resolves and downloads a model.

Speaks real HTTP to the real client, so names, revisions, etags, tokens and the cache behave as they do in the field.
Large files are redirected to a second server on its own port, as the Hub does, which answers ranges. It may be told
to fail in the ways that such servers do.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np


class Served(NamedTuple):
    """Bytes of a file that were sent as a range."""

    file: str
    start: int
    stop: int


class Hub:
    """Repositories in memory: ``commits[repository][sha][file]`` are bytes, ``refs[repository][name]`` a sha.

    ``faults`` are what the next ranges meet, one each; ``always`` is what all others meet:

        a number         that status, with "Retry-After: 0"
        reset            nothing but the connection's end
        cut              half of the bytes, then the connection closes
        hang             half of the bytes, then nothing until ``released`` is set
        whole            the whole file with status 200
        other            the range that begins a byte later than the one that was asked for
        unranged         a range that does not say which it is
        short, long      a byte less or more than the range that it says it is
        endless          a byte more, and no length
        etag, size       an answer about another version of the file
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.storage_requests: list[tuple[str, str, str | None]] = []
        self.private: dict[str, str] = {}  # repository -> token that may read it
        self.without_sha256: set[str] = set()  # files that the Hub does not keep as large ones
        self.failing = False
        self.url = ""
        self.storage_url = ""
        self.served: list[Served] = []
        self.faults: deque[str] = deque()
        self.always = ""
        self.hanging = threading.Event()
        self.released = threading.Event()

    def commit(self, repository: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit and let ``ref`` point to it."""
        seed = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits.setdefault(repository, {})[sha] = files
        self.refs.setdefault(repository, {})[ref] = sha
        return sha

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.refs.get(repository, {}).get(revision, revision)
        files = self.commits.get(repository, {}).get(sha)
        return None if files is None else (sha, files)

    def downloads(self) -> list[str]:
        """Names of the files that were fetched whole, in order."""
        fetched = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        fetched += [path for method, path, _ in self.storage_requests if method == "GET" and "?" not in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in fetched]

    def times_served(self, name: str, size: int) -> np.ndarray:
        """How often each byte of a file was sent as part of a range."""
        times = np.zeros(size, np.int64)
        for served in self.served:
            if served.file == name:
                times[served.start : served.stop] += 1
        return times

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin")) and name not in self.without_sha256


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on free loopback ports."""
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), handler(hub)) for handler in (_hub_handler, _storage_handler)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for server in servers
    ]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # of a client that left
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _hub_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path).lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            if hub.failing:
                return self.send(503, b"{}")
            words = path.split("/")
            if words[:2] == ["api", "models"] and len(words) >= 4:
                repository, rest = "/".join(words[2:4]), words[4:]
                revision = "/".join(rest[1:]) or "main"
                blobs = parse_qs(parts.query).get("blobs", ["false"])[0].lower() == "true"
                return self.about(repository, revision, rest[:1] == ["tree"], blobs)
            if len(words) >= 5 and words[2] == "resolve":
                return self.file("/".join(words[:2]), words[3], "/".join(words[4:]))
            return self.send(404, b"{}")

        def known(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """The commit, or None after the Hub's own way of saying no."""
            token = hub.private.get(repository)
            if repository not in hub.commits or (token and self.headers.get("Authorization") != f"Bearer {token}"):
                self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            found = hub.find(repository, revision)
            if found is None:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return found

        def about(self, repository: str, revision: str, tree: bool, blobs: bool) -> None:
            found = self.known(repository, revision)
            if found is None:
                return
            sha, files = found
            if tree:
                body: object = [_entry(hub, name, data) for name, data in sorted(files.items())]
            else:
                body = {
                    "id": repository,
                    "modelId": repository,
                    "sha": sha,
                    "private": False,
                    "tags": [],
                    "siblings": [_sibling(hub, name, data, blobs) for name, data in sorted(files.items())],
                }
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def file(self, repository: str, revision: str, name: str) -> None:
            found = self.known(repository, revision)
            if found is None:
                return
            sha, files = found
            if name not in files:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            elif hub.is_large(name):
                where = f"{hub.storage_url}/{repository}/resolve/{sha}/{quote(name)}"
                self.send(302, b"", {"X-Repo-Commit": sha, "Location": where, **_linked(hub, name, files[name])})
            else:
                self.send(200, files[name], {"X-Repo-Commit": sha, "ETag": f'"{_etag(hub, name, files[name])}"'})

    return Handler


def _storage_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        def answer(self) -> None:
            path = unquote(self.path).lstrip("/")
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            span = f"?{asked[1]}-{asked[2]}" if asked else ""
            hub.storage_requests.append((self.command, path + span, self.headers.get("Authorization")))
            words = path.split("/")
            name = "/".join(words[4:])
            data = hub.commits["/".join(words[:2])][words[3]][name]
            if asked is None:
                self.send(200, data, {"ETag": '"storage"', "Accept-Ranges": "bytes"})
            else:
                self.range(name, data, int(asked[1]), min(int(asked[2]) + 1, len(data)))

        def range(self, name: str, data: bytes, start: int, stop: int) -> None:
            fault = hub.faults.popleft() if hub.faults else hub.always
            if fault.isdecimal():
                self.send(int(fault), b"not now", {"Retry-After": "0"})
            elif fault == "whole":
                self.send(200, data, {"ETag": '"storage"'})
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            else:
                self.part(name, data, start, stop, fault)

        def part(self, name: str, data: bytes, start: int, stop: int, fault: str) -> None:
            if fault == "other":
                start, stop = start + 1, stop + 1
            body = data[start:stop]
            if fault == "short":
                body = body[:-1]
            elif fault in ("long", "endless"):
                body += b"!"
            sent = len(body) // 2 if fault in ("cut", "hang") else len(body)
            self.send_response(206)
            if fault != "unranged":
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data) + (fault == 'size')}")
            if fault == "endless":  # what it sends ends with the connection
                self.close_connection = True
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"another"' if fault == "etag" else '"storage"')
            self.end_headers()
            self.wfile.write(body[:sent])
            hub.served.append(Served(name, start, start + sent))
            if fault == "hang":
                hub.hanging.set()
                hub.released.wait()
            if fault in ("cut", "hang"):
                self.close_connection = True

    return Handler


def _etag(hub: Hub, name: str, data: bytes) -> str:
    """Large files are known by their sha256, small ones by their git blob id."""
    if hub.is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _linked(hub: Hub, name: str, data: bytes) -> dict[str, str]:
    """What the Hub tells of a large file when it redirects."""
    return {"X-Linked-ETag": f'"{_etag(hub, name, data)}"', "X-Linked-Size": str(len(data))}


def _entry(hub: Hub, name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _etag(hub, name, data)}
    if hub.is_large(name):
        entry["lfs"] = {"oid": _etag(hub, name, data), "size": len(data), "pointerSize": 134}
    return entry


def _sibling(hub: Hub, name: str, data: bytes, blobs: bool) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": name}
    if blobs:
        sibling |= {"size": len(data), "blobId": "0" * 40}
        if hub.is_large(name):
            sibling["lfs"] = {"sha256": _etag(hub, name, data), "size": len(data), "pointerSize": 134}
    return sibling
