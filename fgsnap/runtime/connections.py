"""HTTP/1.1 connections: h11 reads what clients send, and one ASGI application answers.

Servers for any application do this too, but their imports stand between exec and the first token. What is here is what
this application needs: keep-alive, pipelining, flow control both ways, bounded headers, and an end that lets answers
finish.
"""

from __future__ import annotations

import asyncio
import contextlib
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
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Scope

HEADER_LIMIT = 1 << 16
READ = 1 << 14  # bytes taken from a connection before others get their turn
BODY_BUFFER = 1 << 16  # of a body, or of requests to come, that nobody has asked for yet; then reading stops
DISCARD_LIMIT = 64 << 20  # of what nobody wants, after its answer
REQUEST_SECONDS = 60.0  # for the headers of a request to arrive, or for a body that nobody wants
IDLE_SECONDS = 75.0  # until the next request on a connection begins: longer than proxies keep a connection idle
LINGER_SECONDS = 5.0  # for a client to close what is over
STUCK_SECONDS = 120.0  # for a client to read on, when the system holds no more for it
RETRY_SECONDS = 1.0  # until the next attempt to accept, when the system has no room for more connections

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Listener:
    """Accepts connections for an application until it is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._connections: set[Connection] = set()
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def start(self, listening: socket.socket) -> None:
        """Begin to accept on a socket that listens already."""
        listening.setblocking(False)
        self._listening = listening
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listening))

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        full = False
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except ConnectionAbortedError:  # a client that left again
                continue
            except OSError as error:
                if not full:
                    print(f"fgsnap: no more connections can be accepted: {error.strerror}.", file=sys.stderr)
                full = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            full = False
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._connected, accepted)

    def _connected(self) -> Connection:
        return Connection(self._app, self._connections)

    async def close(self, seconds: float) -> None:
        """Accept no more, let answers that have begun end within ``seconds``, then cut what is left."""
        if self._accepting is not None and self._listening is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._listening.close()
        for connection in list(self._connections):
            connection.end()
        deadline = time.monotonic() + seconds
        while self._connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.cut()


class Connection(asyncio.BufferedProtocol):
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
        self._stuck: asyncio.TimerHandle | None = None
        self._buffer = bytearray(READ)
        self._ending = False
        self._over = False  # what still comes is passed over
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
        self.resume_writing()
        if self._exchange is not None:
            self._exchange.leave()

    def pause_writing(self) -> None:
        self._writable.clear()
        self._stuck = self._loop.call_later(STUCK_SECONDS, self._transport.abort)

    def resume_writing(self) -> None:
        self._writable.set()
        if self._stuck is not None:
            self._stuck.cancel()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(memoryview(self._buffer)[:nbytes])
        if self._over:
            self._discard(data)
            return
        if self._http.their_state is h11.IDLE and not self._http.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # RFC 9112, 2.2
            if not data:
                return
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
        await self._writable.wait()
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
        body_to_come = self._http.their_state is h11.SEND_BODY
        if self._ending or self._http.our_state is not h11.DONE:
            if body_to_come:
                self._hang_up()
            else:
                self._transport.close()
            return
        self.read_on(True)
        if body_to_come:
            self._expect_request(REQUEST_SECONDS)
        else:
            self._next_request()

    def _hang_up(self) -> None:
        """Say that nothing more is written, and pass over for a while what still comes.

        To close at once would reset the connection, and the client would not read what was answered.
        """
        self._over = True
        self._transport.write_eof()
        self.read_on(True)
        self._expect_request(LINGER_SECONDS)

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
                self._refuse(str(error).partition(":")[0], error.error_status_hint)
                return
            if isinstance(event, h11.Request):
                if not self._begin(event):
                    return
            elif isinstance(event, h11.Data):
                self._take_body(event.data)
            elif isinstance(event, h11.EndOfMessage):
                if self._exchange is None:
                    self._next_request()
                    return
                self._exchange.take(b"", last=True)
            else:
                if event is h11.PAUSED and len(self._http.trailing_data[0]) > BODY_BUFFER:
                    self.read_on(False)  # until this request is answered
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

    def _begin(self, request: h11.Request) -> bool:
        """Have the application answer; False: the request was refused."""
        self._expect_request(None)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            # A proxy before this server may believe the other one of the two (RFC 9112, 6.1).
            self._refuse("it has a Content-Length and a Transfer-Encoding", 400)
            return False
        exchange = Exchange(self, self._http, scope_of(request, self._transport))
        self._exchange = exchange
        self._task = self._loop.create_task(self._run(exchange))
        return True

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ConnectionAbortedError:
            pass  # an answer that broke off; the client sees that it has no end
        except Exception as error:
            show_failure(error)
        if not exchange.complete and not exchange.gone:
            self._transport.abort()

    def _refuse(self, why: str, status: int) -> None:
        """Answer what is no HTTP, if nothing else has been answered yet, and read no more of it."""
        if self._exchange is not None:
            self._exchange.leave()
            self._exchange = None
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = RequestError("This is no HTTP request that can be read.", f"{why}.", status=status)
            body = error_body(error)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            head = _head(self._http, status, headers)
            rest = (self._http.send(event) or b"" for event in (h11.Data(data=body), h11.EndOfMessage()))
            self._transport.write(b"".join((head, *rest)))
        self._hang_up()


def _head(http: h11.Connection, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Status line and headers of an answer."""
    reason = HTTPStatus(status).phrase.encode()
    response = h11.Response(status_code=status, headers=[*headers, (b"date", date())], reason=reason)
    return http.send(response) or b""


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
        headers = list(message.get("headers", ()))
        sized = any(name == b"content-length" for name, _ in headers)
        self._chunked = not sized and self.scope["http_version"] == "1.1"
        return _head(self._http, message["status"], headers)

    def _part(self, data: bytes) -> bytes:
        if not data or self.scope["method"] == "HEAD":
            return b""
        if self._chunked:  # as h11 frames it, without its checks: every streamed token comes by here
            return b"%x\r\n%b\r\n" % (len(data), data)
        return self._http.send(h11.Data(data=data)) or b""


def scope_of(request: h11.Request, transport: asyncio.Transport) -> Scope:
    """ASGI's description of a request."""
    raw_path, _, query = _origin_form(request.target).partition(b"?")
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


def _origin_form(target: bytes) -> bytes:
    """A target without scheme and host, which a client that takes this server for a proxy puts before it."""
    if not target.lower().startswith((b"http://", b"https://")):
        return target
    _, slash, rest = target.partition(b"//")[2].partition(b"/")
    return b"/" + rest if slash else b"/"


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
