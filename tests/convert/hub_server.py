"""A Hub on loopback for tests: the few endpoints that huggingface_hub asks when it resolves and downloads a model.

Speaks real HTTP to the real client, so names, revisions, etags, tokens and the cache behave as they do in the field.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory: ``commits[repository][sha][file]`` are bytes, ``refs[repository][name]`` a sha."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.private: dict[str, str] = {}  # repository -> token that may read it
        self.failing = False
        self.url = ""

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
        """Names of the files that were fetched, in order."""
        fetched = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in fetched]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on a free loopback port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Stay quiet."""

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            if hub.failing:
                return self.send(503, b"{}")
            parts = path.split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                repository, rest = "/".join(parts[2:4]), parts[4:]
                revision = "/".join(rest[1:]) or "main"
                return self.about(repository, revision, rest[:1] == ["tree"])
            if len(parts) >= 5 and parts[2] == "resolve":
                return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
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

        def about(self, repository: str, revision: str, tree: bool) -> None:
            found = self.known(repository, revision)
            if found is None:
                return
            sha, files = found
            if tree:
                body: object = [_entry(name, data) for name, data in sorted(files.items())]
            else:
                body = {
                    "id": repository,
                    "modelId": repository,
                    "sha": sha,
                    "private": False,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in sorted(files)],
                }
            self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def file(self, repository: str, revision: str, name: str) -> None:
            found = self.known(repository, revision)
            if found is None:
                return
            sha, files = found
            if name in files:
                self.send(200, files[name], {"ETag": f'"{_etag(name, files[name])}"', "X-Repo-Commit": sha})
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _etag(name: str, data: bytes) -> str:
    """Large files are known by their sha256, small ones by their git blob id."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 134}
    return entry
