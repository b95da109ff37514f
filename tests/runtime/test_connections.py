"""HTTP/1.1 as clients speak it, on real sockets: a small application behind the connections of the service."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import resource
import socket
import threading
import time
from pathlib import Path

import pytest

from fgsnap.runtime import connections
from fgsnap.runtime.connections import Listener

ENDED = []  # paths that the application is done with
GO_ON = threading.Event()


async def app(scope, receive, send):
    try:
        await behave(scope, receive, send)
    finally:
        ENDED.append(scope["path"])


async def behave(scope, receive, send):
    """Answers with what it was asked; some paths behave in ways of their own."""
    if scope["path"] == "/holds":  # reads nothing until it may
        while not GO_ON.is_set():
            await asyncio.sleep(0.01)
    if scope["path"] == "/forever":
        await asyncio.Event().wait()
    if scope["path"] == "/unread":
        await reply(send, 401, b"no")
        return
    if scope["path"] == "/breaks":
        raise RuntimeError("broken")
    if scope["path"] == "/cut":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionAbortedError
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
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
        ENDED.clear()
        GO_ON.clear()
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.listener = Listener(app)
        self.loop.call_soon(self.listener.start, listening)
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    @property
    def connections(self):
        return list(self.listener._connections)

    def close(self, seconds=1.0):
        asyncio.run_coroutine_threadsafe(self.listener.close(seconds), self.loop).result(90)

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
        self.socket = connection
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


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent_until_stuck(connection, data, most):
    """Bytes that a client gets rid of until nobody takes more."""
    sent = 0
    connection.socket.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += connection.socket.send(data)
    connection.socket.settimeout(10)
    return sent


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
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : x\r\n\r\n", 400),
    ],
)
def test_what_is_no_http_is_refused_and_the_connection_closed(service, request_, status):
    with raw(service) as connection:
        connection.sendall(request_)
        response = answer(connection)
        assert response.status == status and response.reason and response.getheader("date")
        message = json.loads(response.read())["error"]["message"]
        assert message.startswith("This is no HTTP request") and "bytearray" not in message
        assert connection.recv(1) == b""


def test_bodies_that_nobody_wants_are_passed_over(service, monkeypatch, capfd):
    monkeypatch.setattr(connections, "DISCARD_LIMIT", 150_000)  # of each
    with raw(service) as connection:
        for _ in range(2):
            connection.sendall(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 1000)
            response = answer(connection)
            assert response.status == 401 and response.read() == b"no"
            connection.sendall(b"x" * 99000)
        connection.sendall(b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n")
        assert json.loads(answer(connection).read())["path"] == "/next"
    assert capfd.readouterr().err == ""


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


def test_who_says_nothing_is_closed_in_time(service, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    with raw(service) as silent, raw(service) as idle:
        idle.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        answer(idle).read()
        assert idle.recv(1) == b"" and silent.recv(1) == b""


def test_headers_that_trickle_in_are_given_up_in_time(service, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    with raw(service) as connection, pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(b"G")
            time.sleep(0.02)


def test_a_body_that_is_not_read_is_not_taken(service):
    with raw(service) as connection:
        connection.sendall(b"POST /holds HTTP/1.1\r\nhost: x\r\ncontent-length: 67108864\r\n\r\n")
        sent = sent_until_stuck(connection, bytes(1 << 20), 64 << 20)
        assert sent < 32 << 20, "what the system holds on its way, and no more"
        GO_ON.set()
        connection.sendall(bytes((64 << 20) - sent))
        assert json.loads(answer(connection).read())["body"] == 64 << 20


def test_requests_that_come_too_early_are_not_taken(service):
    with raw(service) as connection:
        connection.sendall(b"GET /holds HTTP/1.1\r\nhost: x\r\n\r\n")
        early = b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n" * 10000
        assert sent_until_stuck(connection, early, 64 << 20) < 32 << 20
        (held,) = service.connections
        assert len(held._http.trailing_data[0]) < 1 << 20
        GO_ON.set()
        assert [json.loads(answer(connection).read())["path"] for _ in range(3)] == ["/holds", "/b", "/b"]


def test_an_answer_that_is_not_read_is_not_written(service):
    with raw(service) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: any(each._transport.get_write_buffer_size() for each in service.connections))
        time.sleep(0.3)
        (held,) = service.connections
        assert 0 < held._transport.get_write_buffer_size() < 4 << 20 and not ENDED
        assert len(answer(connection).read()) == 64 << 20


def test_who_leaves_in_the_middle_of_an_answer_ends_it(service, caplog):
    with raw(service) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.2)
    until(lambda: ENDED == ["/big"] and not service.connections)
    assert not caplog.records, "nothing is written to a connection that is gone"


def test_who_leaves_while_asking_for_more_ends_what_it_asked_first(service):
    with raw(service) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123")
        until(lambda: service.connections)
    until(lambda: ENDED == ["/x"])
    with raw(service) as connection:
        connection.sendall(b"GET /holds HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.sendall(b"GET /b HTTP/1.1\r\nho")
        time.sleep(0.1)
        connection.sendall(b"st: x\r\n\r\n")
    until(lambda: not service.connections)
    GO_ON.set()
    until(lambda: ENDED == ["/x", "/holds"])


def test_a_client_that_stops_reading_is_given_up(service, monkeypatch):
    monkeypatch.setattr(connections, "STUCK_SECONDS", 0.2)
    with raw(service) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: ENDED == ["/big"] and not service.connections)


def test_a_body_that_does_not_come_is_not_waited_for_without_end(service, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    with raw(service) as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        assert answer(connection).read() == b"no" and connection.recv(1) == b""


def test_who_is_refused_and_does_not_close_is_closed(service, monkeypatch):
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)
    with raw(service) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        assert answer(connection).status == 400
        until(lambda: not service.connections)


def test_what_follows_a_refusal_is_passed_over_but_not_without_end(service, monkeypatch):
    monkeypatch.setattr(connections, "DISCARD_LIMIT", 1 << 20)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 60)
    with raw(service) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(bytes(1 << 16))


def test_a_request_that_breaks_off_in_nonsense_ends_what_it_asked(service):
    with raw(service) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        until(lambda: service.connections)
        connection.sendall(b"nonsense\r\n")
        assert answer(connection).status == 400
    until(lambda: ENDED == ["/x"])


@pytest.mark.parametrize("version", [b"1.0\r\n", b"1.1\r\nhost: x\r\nconnection: close\r\n"])
def test_an_early_answer_reaches_a_client_that_is_still_sending(service, version):
    with raw(service) as connection:
        connection.sendall(b"POST /unread HTTP/%b" % version + b"content-length: 16777216\r\n\r\n")
        connection.sendall(bytes(16 << 20))
        response = answer(connection)
        assert response.status == 401 and response.read() == b"no" and connection.recv(1) == b""


def test_a_connection_gets_its_turn_and_no_more(service):
    """The parts of a body may be so small that reading them takes a thousand times as long as receiving them."""
    taken = []
    with raw(service) as connection:
        connection.sendall(b"POST /holds HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        until(lambda: service.connections)
        (held,) = service.connections
        plain, held.buffer_updated = held.buffer_updated, lambda size: (taken.append(size), plain(size))
        connection.sendall(b"1\r\nx\r\n" * 50000 + b"0\r\n\r\n")
        GO_ON.set()
        assert json.loads(answer(connection).read())["body"] == 50000
    assert max(taken) <= 1 << 14


def test_without_descriptors_it_waits_and_says_so_once(service, capfd, monkeypatch):
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(raw(service)) for _ in range(8)]
        until(lambda: len(service.connections) == 8)
        waiting += [stack.enter_context(socket.socket()) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) - 1, hard))
        try:
            for client in waiting[8:]:
                client.connect(("127.0.0.1", service.port))
            time.sleep(0.5)
            waiting[0].sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer(waiting[0]).status == 200, "others are served meanwhile"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        until(lambda: len(service.connections) == 12)
    assert capfd.readouterr().err == "fgsnap: no more connections can be accepted: Too many open files.\n"


def test_blank_lines_before_a_request_and_whole_addresses_in_it(service):
    with raw(service) as connection:
        connection.sendall(b"\r\n")
        connection.sendall(b"\r\nGET http://example.com/a?b=1 HTTP/1.1\r\nhost: x\r\n\r\n")
        found = json.loads(answer(connection).read())
        assert (found["path"], found["query"]) == ("/a", "b=1")


def test_closing_waits_for_answers_and_for_nothing_else(service):
    with raw(service) as waiting, raw(service) as idle:
        waiting.sendall(b"GET /waits HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: len(service.connections) == 2)
        begin = time.monotonic()
        service.close(60)
        assert time.monotonic() - begin < 30
        assert json.loads(answer(waiting).read())["path"] == "/waits"
        assert waiting.recv(1) == b"" and idle.recv(1) == b""


def test_closing_lets_answers_end_and_cuts_what_does_not(service):
    with raw(service) as waiting, raw(service) as idle, raw(service) as stuck, raw(service) as forever:
        waiting.sendall(b"GET /waits HTTP/1.1\r\nhost: x\r\n\r\n")
        stuck.sendall(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")  # and never reads
        forever.sendall(b"GET /forever HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.1)
        service.close(1.0)
        until(lambda: sorted(ENDED) == ["/big", "/forever", "/waits"])
        assert json.loads(answer(waiting).read())["path"] == "/waits"
        assert waiting.recv(1) == b"" and idle.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            assert not everything(stuck).endswith(b"0\r\n\r\n")
    with pytest.raises(ConnectionRefusedError), raw(service):
        pass
