"""HTTP/1.1 as clients speak it, on real sockets: a small application behind the connections of the service."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time

import pytest

from fgsnap.runtime import connections
from fgsnap.runtime.connections import Listener


async def app(scope, receive, send):
    """Answers with what it was asked; some paths behave in ways of their own."""
    if scope["path"] == "/unread":
        await reply(send, 401, b"no")
        return
    if scope["path"] == "/breaks":
        raise RuntimeError("broken")
    if scope["path"] == "/cut":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionAbortedError
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for part in (b"one ", b"two ", b"three"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    if scope["path"] == "/big":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    if scope["path"] == "/waits":
        await asyncio.sleep(0.3)
    said = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "body": len(body),
    }
    await reply(send, 200, json.dumps(said).encode())


async def reply(send, status, body):
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Service:
    def __init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.listener = Listener(app)
        self.loop.run_until_complete(self.listener.start(self.listening, 77))
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def close(self, seconds=1.0):
        asyncio.run_coroutine_threadsafe(self.listener.close(seconds), self.loop).result(10)

    def stop(self):
        self.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and not self.listener._connections
        self.loop.close()


@pytest.fixture
def service():
    made = Service()
    yield made
    made.stop()


class Kept(io.BufferedReader):
    """What has been read ahead of one answer belongs to the next, so the end of an answer does not close it."""

    def close(self):
        pass


class Raw:
    """A connection whose bytes are in the test's hand."""

    def __init__(self, connection):
        self.sendall = connection.sendall
        self.file = Kept(socket.SocketIO(connection, "r"))
        self.recv = self.file.read

    def makefile(self, mode):
        return self.file


@contextlib.contextmanager
def raw(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        yield Raw(connection)


def answer(connection, method="GET"):
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response


def everything(connection):
    return connection.file.read()


def test_one_connection_serves_many_requests(service):
    client = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    for number in range(5):
        client.request("POST", f"/a%20b?n={number}", body=b"x" * number)
        response = client.getresponse()
        assert response.status == 200 and response.getheader("date").endswith(" GMT")
        assert json.load(response) == {"method": "POST", "path": "/a b", "query": f"n={number}", "body": number}
    client.close()


def test_a_stream_is_chunked_and_of_http_1_0_ends_with_the_connection(service):
    with raw(service) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        response = answer(connection)
        assert response.getheader("transfer-encoding") == "chunked" and response.read() == b"one two three"
    with raw(service) as connection:
        connection.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        data = everything(connection)
        assert b"transfer-encoding" not in data.lower() and data.endswith(b"\r\n\r\none two three")


def test_requests_that_come_at_once_are_answered_in_order(service):
    paths = ["/waits", "/b", "/stream", "/d"]
    with raw(service) as connection:
        connection.sendall(b"".join(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode() for path in paths))
        bodies = []
        for _ in paths:
            response = answer(connection)
            bodies.append(response.read())
        assert [json.loads(bodies[i])["path"] for i in (0, 1, 3)] == ["/waits", "/b", "/d"]
        assert bodies[2] == b"one two three"


def test_a_head_request_gets_no_body(service):
    with raw(service) as connection:
        for path in (b"/x", b"/stream"):
            connection.sendall(b"HEAD %b HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            response = answer(connection, "HEAD")
            assert response.status == 200 and response.read() == b""
        connection.sendall(b"GET /after HTTP/1.1\r\nhost: x\r\n\r\n")
        assert json.loads(answer(connection).read())["path"] == "/after"


def test_who_asks_first_whether_to_send_a_body_is_told_to(service):
    with raw(service) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n")
        assert connection.file.readline().startswith(b"HTTP/1.1 100 ") and connection.file.readline() == b"\r\n"
        connection.sendall(b"abc")
        assert json.loads(answer(connection).read())["body"] == 3


def test_a_chunked_body_is_put_together(service):
    with raw(service) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            connection.sendall(b"5\r\nhello\r\n")
            time.sleep(0.02)
        connection.sendall(b"0\r\n\r\n")
        assert json.loads(answer(connection).read())["body"] == 15


def test_a_large_body_and_a_large_answer_pass(service):
    client = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    client.request("POST", "/x", body=bytes(20 << 20))
    assert json.load(client.getresponse())["body"] == 20 << 20
    client.request("GET", "/big")
    assert len(client.getresponse().read()) == 64 << 20
    client.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a host
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (1 << 17), 431),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n", 400),
    ],
)
def test_what_is_no_http_is_refused_and_the_connection_closed(service, request_, status):
    with raw(service) as connection:
        connection.sendall(request_)
        response = answer(connection)
        assert response.status == status
        assert json.loads(response.read())["error"]["message"].startswith("This is no HTTP request")
        assert connection.recv(1) == b""


def test_a_body_that_nobody_wants_is_passed_over(service):
    with raw(service) as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 1000)
        response = answer(connection)
        assert response.status == 401 and response.read() == b"no"
        connection.sendall(b"x" * 99000 + b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n")
        assert json.loads(answer(connection).read())["path"] == "/next"


def test_but_not_without_end(service, monkeypatch):
    monkeypatch.setattr(connections, "DISCARD_LIMIT", 1 << 20)
    with raw(service) as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        assert answer(connection).status == 401
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(bytes(1 << 16))


def test_a_client_that_asks_to_close_is_closed(service):
    with raw(service) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        data = everything(connection)
        assert b"connection: close" in data.lower() and data.endswith(b"}")


def test_an_application_that_breaks_ends_the_connection_and_nothing_else(service, capfd):
    for path in (b"/breaks", b"/cut"):
        with raw(service) as connection:
            connection.sendall(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            with contextlib.suppress(ConnectionResetError):
                assert not everything(connection).endswith(b"0\r\n\r\n")
    assert capfd.readouterr().err == "fgsnap: a request failed inside the server: RuntimeError.\n"
    with raw(service) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(connection).status == 200


def test_who_says_nothing_is_closed_in_time(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    service = Service()
    try:
        with raw(service) as silent, raw(service) as idle:
            idle.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
            answer(idle).read()
            assert idle.recv(1) == b"" and silent.recv(1) == b""
    finally:
        service.stop()


def test_headers_that_trickle_in_are_given_up_in_time(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    service = Service()
    try:
        with raw(service) as connection, pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"G")
                time.sleep(0.02)
    finally:
        service.stop()


def test_as_many_clients_may_wait_as_were_asked_for(service):
    held = struct.unpack_from("I", service.listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0]
    assert held == 77, "asyncio listens anew, with a backlog of its own where none is given"


def test_closing_lets_answers_end_and_cuts_what_does_not(service):
    with raw(service) as waiting, raw(service) as idle, raw(service) as stuck:
        waiting.sendall(b"GET /waits HTTP/1.1\r\nhost: x\r\n\r\n")
        stuck.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")  # and never reads
        time.sleep(0.1)
        service.close(1.0)
        assert json.loads(answer(waiting).read())["path"] == "/waits"
        assert waiting.recv(1) == b"" and idle.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            assert not everything(stuck).endswith(b"0\r\n\r\n")
    with pytest.raises(ConnectionRefusedError), raw(service):
        pass
