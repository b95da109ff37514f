"""HTTP/1.1 connections: h11 reads what clients send, and one ASGI application answers.

Servers for any application do this too, but their imports stand between exec and the first token. What is here is what
this application needs: keep-alive, pipelining, flow control both ways, bounded headers, and an end that lets answers
finish.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h11

from fgsnap.errors import RequestError
from fgsnap.runtime.answers import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

HEADER_LIMIT = 1 << 16
BODY_BUFFER = 1 << 16  # of a body that the application has not asked for yet; then reading stops
DISCARD_LIMIT = 64 << 20  # of a body that nobody wants, after its answer
REQUEST_SECONDS = 60.0  # for the headers of a request to arrive
IDLE_SECONDS = 5.0  # until the next request on a connection begins

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Listener:
    """Accepts connections for an application until it is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, listening: socket.socket, backlog: int = 128) -> None:
        """Begin to accept on a socket that listens already; asyncio sets how many connections may wait on it anew."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, sock=listening, backlog=backlog)

    def _connected(self) -> Connection:
        return Connection(self._app, self._connections)

    async def close(self, seconds: float) -> None:
        """Accept no more, let answers that have begun end within ``seconds``, then cut what is left."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.end()
        deadline = time.monotonic() + seconds
        while self._connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.cut()


class Connection(asyncio.Protocol):
    """One client's connection, and the request on it that is being answered.

    Args:
        app: answers requests.
        among: all open connections.
    """

    def __init__(self, app: ASGIApp, among: set[Connection]) -> None:
        self._app = app
        self._among = among
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.SERVER, HEADER_LIMIT)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._writable = asyncio.Event()
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False
        self._refused = False
        self._discarded = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._among.add(self)
        self._writable.set()
        self._expect_request(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.discard(self)
        self._expect_request(None)
        self._writable.set()
        if self._exchange is not None:
            self._exchange.leave()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discard(data)
            return
        if self._http.their_state is h11.IDLE and not self._http.trailing_data[0]:
            self._expect_request(REQUEST_SECONDS)  # from its first byte on, however slowly the others come
        self._http.receive_data(data)
        self._take_events()

    def end(self) -> None:
        """Close as soon as there is no answer to finish."""
        self._ending = True
        if self._exchange is None:
            self._transport.close()

    def cut(self) -> None:
        """Close now, whatever has not been written."""
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()

    async def write(self, data: bytes) -> None:
        """Give data to the transport, once it has room."""
        if not self._writable.is_set():
            await self._writable.wait()
        if not self._transport.is_closing():
            self._transport.write(data)

    def read_on(self, wanted: bool) -> None:
        """Whether more of the request is to be read."""
        if self._transport.is_closing():
            return
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def answered(self) -> None:
        """The exchange has come to its end: close, or go on with the next request."""
        self._exchange = None
        if self._transport.is_closing():
            return
        if self._ending or self._http.our_state is not h11.DONE:
            self._transport.close()
            return
        self.read_on(True)
        if self._http.their_state is h11.DONE:
            self._next_request()
        else:
            self._expect_request(REQUEST_SECONDS)  # the rest of this one's body comes first

    def _next_request(self) -> None:
        self._discarded = 0
        self._http.start_next_cycle()
        self._expect_request(IDLE_SECONDS)
        self._take_events()

    def _expect_request(self, seconds: float | None) -> None:
        """Close the connection unless a request comes in time; None: it came."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._transport.close)

    def _take_events(self) -> None:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                self._refuse(error)
                return
            if isinstance(event, h11.Request):
                self._begin(event)
            elif isinstance(event, h11.Data):
                self._take_body(event.data)
            elif isinstance(event, h11.EndOfMessage):
                if self._exchange is None:
                    self._next_request()
                    return
                self._exchange.take(b"", last=True)
            else:
                if event is h11.PAUSED:  # the next request waits until this one is answered
                    self.read_on(False)
                return

    def _take_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.take(bytes(data), last=False)
        else:
            self._discard(data)

    def _discard(self, data: bytes) -> None:
        self._discarded += len(data)
        if self._discarded > DISCARD_LIMIT:
            self._transport.abort()

    def _begin(self, request: h11.Request) -> None:
        self._expect_request(None)
        exchange = Exchange(self, self._http, scope_of(request, self._transport))
        self._exchange = exchange
        self._task = self._loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ConnectionAbortedError:
            pass  # an answer that broke off; the client sees that it has no end
        except Exception as error:
            show_failure(error)
        if not exchange.complete and not exchange.gone:
            self._transport.abort()

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answer what is no HTTP, if nothing else has been answered yet, and read no more of it.

        What still comes is passed over for a while: to close at once would reset the connection before the client has
        read why.
        """
        self._refused = True
        if self._exchange is not None:
            self._exchange.leave()
            self._exchange = None
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(RequestError("This is no HTTP request that can be read.", str(error), status=400))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=error.error_status_hint, headers=headers)
            events = (response, h11.Data(data=body), h11.EndOfMessage())
            self._transport.write(b"".join(self._http.send(event) or b"" for event in events))
        self._transport.write_eof()
        self._expect_request(IDLE_SECONDS)


class Exchange:
    """A request and its answer, as an ASGI application sees them.

    Attributes:
        scope: of ASGI's "http" kind.
        gone: the client has left.
        complete: the answer has been written.
    """

    def __init__(self, connection: Connection, http: h11.Connection, scope: Scope) -> None:
        self.scope = scope
        self.gone = False
        self.complete = False
        self._connection = connection
        self._http = http
        self._body = bytearray()
        self._arrived = False  # the whole body, and whether the application has been told so
        self._told = False
        self._changed = asyncio.Event()
        self._head = b""  # goes out with the first part of the body
        self._chunked = False

    def take(self, data: bytes, *, last: bool) -> None:
        """A part of the body has come."""
        self._body += data
        self._arrived = last
        if len(self._body) > BODY_BUFFER:
            self._connection.read_on(False)
        self._changed.set()

    def leave(self) -> None:
        """The client has left."""
        self.gone = True
        self._changed.set()

    async def receive(self) -> Message:
        if self._http.they_are_waiting_for_100_continue and not self.gone:
            await self._connection.write(
                self._http.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b""
            )
        while not (self.gone or self.complete):
            if self._body or (self._arrived and not self._told):
                body, self._body = bytes(self._body), bytearray()
                self._told = self._arrived
                return {"type": "http.request", "body": body, "more_body": not self._arrived}
            self._changed.clear()
            self._connection.read_on(True)
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._head = self._start(message)
            return
        last = not message.get("more_body", False)
        data = self._head + self._part(message.get("body", b""))
        self._head = b""
        if last:
            data += self._http.send(h11.EndOfMessage()) or b""
        await self._connection.write(data)
        if last:
            self.complete = True
            self._changed.set()
            self._connection.answered()

    def _start(self, message: Message) -> bytes:
        headers = [*message.get("headers", ()), (b"date", date())]
        sized = any(name == b"content-length" for name, _ in headers)
        self._chunked = not sized and self.scope["http_version"] == "1.1" and self.scope["method"] != "HEAD"
        if (b"connection", b"close") in self.scope["headers"]:
            headers.append((b"connection", b"close"))
        status = HTTPStatus(message["status"])
        return self._http.send(h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())) or b""

    def _part(self, data: bytes) -> bytes:
        if not data or self.scope["method"] == "HEAD":
            return b""
        if self._chunked:  # as h11 frames it, without its checks: every streamed token comes by here
            return b"%x\r\n%b\r\n" % (len(data), data)
        return self._http.send(h11.Data(data=data)) or b""


def scope_of(request: h11.Request, transport: asyncio.Transport) -> Scope:
    """ASGI's description of a request."""
    raw_path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode("ascii"),
        "method": request.method.decode("ascii"),
        "scheme": "http",
        "root_path": "",
        "path": unquote(raw_path.decode("latin-1")),
        "raw_path": raw_path,
        "query_string": query,
        "headers": [(name.lower(), value) for name, value in request.headers],
        "server": _address(transport.get_extra_info("sockname")),
        "client": _address(transport.get_extra_info("peername")),
    }


def show_failure(error: Exception) -> None:
    """Tell the operator of a fault that is the server's own."""
    print(f"fgsnap: a request failed inside the server: {type(error).__name__}.", file=sys.stderr)
    if os.environ.get("FGSNAP_DEBUG"):
        import traceback

        traceback.print_exception(error)


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None


def date() -> bytes:
    """The time as a Date header has it (RFC 9110), whatever the locale."""
    now = time.gmtime()
    day, month = DAYS[now.tm_wday], MONTHS[now.tm_mon - 1]
    return f"{day}, {now.tm_mday:02} {month} {now.tm_year} {time.strftime('%H:%M:%S', now)} GMT".encode()
