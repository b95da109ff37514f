"""One request to an OpenAI-compatible endpoint over HTTP/1.1, on a connection of its own.

While a load is measured, all that a client does is to stamp bytes with the time at which they came: reading HTTP and
JSON would take time away from the other clients' stamps, and from a server on the same machine. ``timeline`` reads them
when the load is over.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import h11
import msgspec

from fgsnap.bench.workload import Work
from fgsnap.errors import FgsnapError, NetworkError, UsageError

READ_BYTES = 1 << 16
SHOWN_CHARACTERS = 300  # of an error that an endpoint answers with


class Asking(NamedTuple):
    """How every request is asked.

    Attributes:
        model: the name that the endpoint knows it by.
        temperature: 0 is greedy.
        ignore_eos: ask for answers of exactly the wanted length, by a field that servers have and OpenAI has not.
        timeout: seconds that one answer may take.
    """

    model: str
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0


class Endpoint(NamedTuple):
    """Where an API answers: ``path`` is what stands before ``/completions``."""

    secure: bool
    host: str
    port: int
    path: str
    key: str = ""


class Exchange(NamedTuple):
    """A request and everything that came back, as it came.

    Attributes:
        connection: what was sent, for reading what came.
        began: when the connection was asked for, on the monotonic clock.
        parts: (when, bytes) of each read.
        ended: when the endpoint closed the connection, or the failure came.
        failure: why there is no more; empty where the endpoint closed the connection by itself.
    """

    connection: h11.Connection
    began: float
    parts: list[tuple[float, bytes]]
    ended: float
    failure: str


class Timeline(NamedTuple):
    """One answer over time.

    Attributes:
        work: what was asked.
        began: when it was asked, on the monotonic clock.
        chunks: when each streamed chunk came; normally it is one token.
        ended: when the answer was complete.
        prompt_tokens, answer_tokens: as the endpoint counts them, else as asked and as chunks came.
        failure: why it is no answer; empty for a whole one.
    """

    work: Work
    began: float
    chunks: tuple[float, ...]
    ended: float
    prompt_tokens: int
    answer_tokens: int
    failure: str = ""

    @property
    def latency(self) -> float:
        return self.ended - self.began

    @property
    def first_token(self) -> float:
        return self.chunks[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


def endpoint(url: str, key: str = "") -> Endpoint:
    """The endpoint at ``url``, such as http://127.0.0.1:8000/v1. UsageError where it is no such address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https"):
        raise UsageError(f"'{url}' is no address of an API.", "", "Write it as http://HOST:PORT/v1")
    secure = parts.scheme == "https"
    return Endpoint(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"), key)


def completion_body(work: Work, how: Asking) -> bytes:
    """The body of a streamed completion that answers ``work``."""
    body: dict[str, Any] = {
        "model": how.model,
        "prompt": work.prompt,
        "max_tokens": work.max_tokens,
        "temperature": how.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode({**body, "ignore_eos": True} if how.ignore_eos else body)


async def complete(target: Endpoint, body: bytes, timeout: float) -> Exchange:
    """Send a completion request, and take what comes until the endpoint closes the connection. It never raises."""
    return await _exchange(target, "POST", "/completions", body, timeout)


async def models(target: Endpoint, timeout: float) -> list[dict[str, Any]]:
    """The models that the endpoint lists.

    Raises:
        NetworkError: it cannot be reached, or answers no HTTP.
        FgsnapError: it answers with an error.
    """
    where = f"{target.host} port {target.port}"
    exchange = await _exchange(target, "GET", "/models", b"", timeout)
    try:
        status, pieces = _response(exchange)
    except _Broken as broken:
        raise NetworkError(
            f"The endpoint at {where} does not answer.", f"{broken}.", "Start it, or correct --url, and try again."
        ) from None
    body = b"".join(data for _, data in pieces)
    if status != 200:
        raise FgsnapError(
            f"The endpoint at {where} does not list its models.", _refusal(status, body), "Correct --url or the key."
        )
    try:
        return list(msgspec.json.decode(body, type=_Models).data)
    except msgspec.DecodeError as error:
        raise FgsnapError(
            f"What {where} answers to GET {target.path}/models is no list of models.", str(error)
        ) from None


def timeline(exchange: Exchange, work: Work) -> Timeline:
    """Read what came back for ``work``."""
    chunks: list[float] = []
    whole, usage, ended, failure = False, _Usage(), exchange.ended, ""
    try:
        status, pieces = _response(exchange)
        if status != 200:
            raise _Broken(_refusal(status, b"".join(data for _, data in pieces)))
        for ended, data in _events(pieces):
            if data == b"[DONE]":
                whole = True
                break
            chunk = msgspec.json.decode(data, type=_Chunk)
            if chunk.error is not None:
                raise _Broken(f"an error in the stream: {_message(chunk.error)}")
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                whole = whole or choice.finish_reason is not None
                if choice.text or choice.finish_reason is None:
                    chunks.append(ended)
        if not whole:
            raise _Broken("the stream ended before the answer did")
    except _Broken as broken:
        failure = str(broken)
    except msgspec.DecodeError as error:
        failure = f"a chunk that cannot be read: {error}"
    answered = usage.completion_tokens if usage.completion_tokens is not None else len(chunks)
    return Timeline(
        work,
        exchange.began,
        tuple(chunks or [ended]),
        ended,
        usage.prompt_tokens or work.prompt_tokens,
        answered,
        failure,
    )


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


class _Broken(Exception):
    """There is no whole answer; says why."""


async def _exchange(target: Endpoint, method: str, route: str, body: bytes, timeout: float) -> Exchange:
    connection = h11.Connection(h11.CLIENT)
    request = _request(connection, target, method, route, body)
    parts: list[tuple[float, bytes]] = []
    failure = ""
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout):
            await _talk(target, request, parts)
    except TimeoutError:
        failure = f"no whole answer within {timeout:g} s"
    except OSError as error:
        failure = _reason(error)
    return Exchange(connection, began, parts, time.monotonic(), failure)


async def _talk(target: Endpoint, request: bytes, parts: list[tuple[float, bytes]]) -> None:
    """Send the request and collect what comes, until the other side closes."""
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=_tls() if target.secure else None)
    try:
        writer.write(request)
        while data := await reader.read(READ_BYTES):
            parts.append((time.monotonic(), data))
    finally:
        writer.close()


@cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the host's certificates takes long."""
    return ssl.create_default_context()


def _request(connection: h11.Connection, target: Endpoint, method: str, route: str, body: bytes) -> bytes:
    host = f"[{target.host}]" if ":" in target.host else target.host
    headers = [("host", f"{host}:{target.port}"), ("connection", "close"), ("accept", "*/*")]
    if body:
        headers += [("content-type", "application/json"), ("content-length", str(len(body)))]
    if target.key:
        headers.append(("authorization", f"Bearer {target.key}"))
    sent = [
        h11.Request(method=method, target=target.path + route, headers=headers),
        *([h11.Data(data=body)] if body else []),
        h11.EndOfMessage(),
    ]
    return b"".join(connection.send(event) or b"" for event in sent)


def _response(exchange: Exchange) -> tuple[int, list[tuple[float, bytes]]]:
    """Status and body of the answer, each piece with the time at which it came."""
    status, pieces = 0, []
    try:
        for when, data in (*exchange.parts, (exchange.ended, b"")):
            exchange.connection.receive_data(data)
            while (event := exchange.connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    pieces.append((when, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    return status, pieces
                elif isinstance(event, h11.ConnectionClosed):
                    break
    except h11.RemoteProtocolError as error:
        raise _Broken(exchange.failure or _broken_off(exchange, error)) from None
    raise _Broken(exchange.failure or "the connection was closed without an answer")


def _broken_off(exchange: Exchange, error: Exception) -> str:
    return f"the answer broke off or is no HTTP: {error}" if exchange.parts else "the connection was closed at once"


def _events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, and when its last byte came."""
    rest = b""
    for when, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip()


def _refusal(status: int, body: bytes) -> str:
    """Status and message of an answer that is an error."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = body.decode(errors="replace")
    return f"HTTP {status}: {_message(said.get('error', said) if isinstance(said, dict) else said)}"


def _message(error: Any) -> str:
    """What an error says, whichever of the usual shapes it has, in one line."""
    said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:SHOWN_CHARACTERS]


def _reason(error: OSError) -> str:
    """What went wrong with a connection."""
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    return error.strerror or str(error) or type(error).__name__
