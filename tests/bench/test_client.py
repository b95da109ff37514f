"""The HTTP client: against servers that behave in every way, over real sockets, and reading what came byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from itertools import chain, repeat

import h11
import pytest

from fgsnap.bench import client
from fgsnap.bench.client import Asking, Endpoint, Exchange, complete, completion_body, endpoint, models, timeline
from fgsnap.bench.load import run
from fgsnap.bench.workload import Work
from fgsnap.errors import FgsnapError, NetworkError, UsageError
from tests.serving import StubWorkers, stub_service

WORK = Work([5, 6, 7], 3, 4)
HOW = Asking("stub", timeout=20)


def event(**chunk) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(said: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": said, "finish_reason": finish}])


USAGE = event(choices=[], usage={"prompt_tokens": 4, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
GOOD = (text("a"), text("b"), text("c", "length"), USAGE, DONE)


def chunked(*parts: bytes, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + body + (b"0\r\n\r\n" if end else b"")


def whole(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


@contextlib.contextmanager
def answering(*replies: bytes, linger: bool = False):
    """An endpoint that answers with one of the replies after the other, and the last one from then on, and closes.

    ``linger``: it keeps connections open.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    open_ones = []

    def serve():
        with contextlib.suppress(OSError):
            for reply in chain(replies, repeat(replies[-1])):
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall(reply)
                open_ones.append(connection)
                if not linger:
                    connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in open_ones:
            connection.close()


def asked(target: Endpoint, timeout: float = 20) -> client.Timeline:
    return timeline(asyncio.run(complete(target, completion_body(WORK, HOW), timeout)), WORK)


def received(*parts: bytes) -> client.Timeline:
    """What is read of parts that came at 1, 2, 3 ... seconds."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    stamped = [(float(second), part) for second, part in enumerate(parts, start=1)]
    return timeline(Exchange(connection, 0.0, stamped, len(parts) + 1.0, ""), WORK)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", Endpoint(False, "127.0.0.1", 8000, "/v1")),
        ("http://localhost/v1/", Endpoint(False, "localhost", 80, "/v1")),
        ("https://api.example.org/openai/v1", Endpoint(True, "api.example.org", 443, "/openai/v1")),
        ("http://[::1]:8000/v1", Endpoint(False, "::1", 8000, "/v1")),
    ],
)
def test_an_address_is_taken_apart(url, expected):
    assert endpoint(url) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://[::1/v1", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match="is no address"):
        endpoint(url)


def test_a_whole_answer_has_a_time_for_every_token_and_the_endpoints_own_counts():
    with answering(chunked(*GOOD)) as target:
        found = asked(target)
    assert found.failure == ""
    assert (len(found.chunks), found.prompt_tokens, found.answer_tokens) == (3, 4, 3)
    assert found.began < found.chunks[0] <= found.chunks[-1] <= found.ended


def test_an_event_has_the_time_of_its_last_byte():
    stream = chunked(*GOOD)
    middle = stream.index(b'"b"')
    found = received(stream[:middle], stream[middle:])
    assert found.chunks == (1.0, 2.0, 2.0)
    assert found.gaps == [1.0, 0.0] and found.first_token == 1.0 and found.latency == 2.0


def test_it_does_not_matter_where_the_bytes_are_cut():
    stream = chunked(*GOOD)
    for at in range(1, len(stream)):
        found = received(stream[:at], stream[at:])
        assert (found.failure, len(found.chunks), found.answer_tokens) == ("", 3, 3)
    one_by_one = received(*(stream[i : i + 1] for i in range(len(stream))))
    assert (one_by_one.failure, len(one_by_one.chunks)) == ("", 3)


def test_other_servers_streams_are_read_too():
    # A chunk without text is a token that has none yet; one that only tells the end is no token.
    found = received(chunked(text(""), text("ab"), text("", "length"), DONE))
    assert (found.failure, len(found.chunks), found.answer_tokens) == ("", 2, 2)
    # Windows line ends, comments, no usage, no [DONE], and a body that ends with the connection.
    body = b": hello\r\n\r\n" + text("a").replace(b"\n", b"\r\n") + text("b", "stop").replace(b"\n", b"\r\n")
    found = received(b"HTTP/1.1 200 OK\r\n\r\n" + body)
    assert (found.failure, len(found.chunks), found.prompt_tokens) == ("", 2, 3)
    # Nothing that can be shown: the first token is known by the end alone.
    found = received(chunked(text("", "stop"), USAGE, DONE))
    assert (found.failure, found.chunks, found.answer_tokens) == ("", (1.0,), 3)


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (whole("500 Oops", b'{"error": {"message": "no\\n luck"}}'), "HTTP 500: no luck"),
        (whole("422 Bad", b'{"detail": "prompt"}'), "HTTP 422: {'detail': 'prompt'}"),
        (whole("400 Bad", b'{"error": "prompt"}'), "HTTP 400: prompt"),
        (whole("502 Bad Gateway", b"<html>"), "HTTP 502: <html>"),
        (chunked(*GOOD[:2], end=False), "the answer broke off"),
        (chunked(*GOOD[:2]), "the stream ended before the answer did"),
        (chunked(text("a"), event(error={"message": "the engine died"}), DONE), "an error in the stream: the engine"),
        (chunked(b"data: {nonsense\n\n"), "a chunk that cannot be read"),
        (b"", "the connection was closed at once"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "the answer broke off or is no HTTP"),
    ],
)
def test_a_failure_says_what_it_is(reply, failure):
    with answering(reply) as target:
        assert asked(target).failure.startswith(failure)


def test_an_answer_that_does_not_come_is_given_up():
    with answering(chunked(text("a"), end=False), linger=True) as target:
        assert asked(target, timeout=0.2).failure == "no whole answer within 0.2 s"


def test_a_whole_answer_counts_though_its_connection_stays_open():
    with answering(chunked(*GOOD), linger=True) as target:
        assert asked(target, timeout=0.2).failure == ""


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_absent_endpoint_is_a_failure_of_each_request_and_an_error_at_the_beginning():
    target = endpoint(f"http://127.0.0.1:{closed_port()}/v1")
    assert asked(target).failure == "the connection was refused"
    with pytest.raises(NetworkError, match="does not answer"):
        asyncio.run(models(target, 5))
    with pytest.raises(NetworkError, match=r"no\.such\.host"):
        asyncio.run(models(endpoint("http://no.such.host.invalid/v1"), 20))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (whole("404 Not Found", b'{"error": {"message": "no such route"}}'), "HTTP 404: no such route"),
        (whole("200 OK", b"<html>"), "no list of models"),
        (whole("200 OK", b'{"models": []}'), "no list of models"),
    ],
)
def test_an_endpoint_that_lists_no_models_is_named(reply, why):
    with answering(reply) as target, pytest.raises(FgsnapError, match=why):
        asyncio.run(models(target, 5))


def test_clients_get_every_answer_from_a_service_and_keep_one_request_each():
    workers = StubWorkers()
    asked = [Work([1 + i, 2, 3], 3, 2 + i % 5) for i in range(24)]
    with stub_service(workers) as service:
        level = run(endpoint(f"{service.url}/v1"), HOW, asked, clients=4, seed=0)
        largest = max(len(batch.lengths) for batch in workers.model.model.batches)
    assert [answer.failure for answer in level.timelines] == [""] * 20  # four warmed up
    assert sorted(answer.work.prompt[0] for answer in level.timelines) == list(range(5, 25))
    assert all(answer.answer_tokens == answer.work.max_tokens for answer in level.timelines)
    assert all(answer.prompt_tokens == 3 for answer in level.timelines)
    assert 2 <= largest <= 4


def test_a_key_and_the_wish_for_whole_answers_are_sent():
    with stub_service(keys=[b"secret"]) as service:
        refused = asked(endpoint(f"{service.url}/v1", "wrong"))
        assert refused.failure.startswith("HTTP 401")
        assert asked(endpoint(f"{service.url}/v1", "secret")).failure == ""
        assert [card["id"] for card in asyncio.run(models(endpoint(f"{service.url}/v1", "secret"), 5))] == ["stub"]
    assert json.loads(completion_body(WORK, HOW))["ignore_eos"] is True
    assert "ignore_eos" not in json.loads(completion_body(WORK, HOW._replace(ignore_eos=False)))
