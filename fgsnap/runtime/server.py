"""The HTTP side: the routes, and each request watched until its client has its answer or is gone.

A request that arrives before the engine is ready is read, checked and tokenized, and then waits: it is not refused.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, NamedTuple, Protocol

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from fgsnap.errors import RequestError
from fgsnap.runtime import answers, metrics, protocol, wire
from fgsnap.runtime.answers import Piece
from fgsnap.runtime.link import Inbox, Link, Lost, unavailable
from fgsnap.runtime.request import Output, Token
from fgsnap.runtime.request import Request as EngineRequest

BODY_LIMIT = 8 << 20
DISCARD_LIMIT = 64 << 20  # of a body that is too long, read on so far, that its sender gets to see the refusal
BODY_SECONDS = 60.0
KEEP_ALIVE_SECONDS = 10.0
INLINE_CHARACTERS = 1 << 14  # longer texts are tokenized on a thread, so that the streams of others flow on
PUBLIC = frozenset(("/health", "/health/live", "/health/ready", "/health/startup"))

Pieces = AsyncGenerator[Piece | None, None]
Parse = Callable[[bytes, int], protocol.Call]


class Stream(Protocol):
    """The tokens of one answer into text; see text.TextStream."""

    shown: int

    @property
    def finished(self) -> bool: ...

    def feed(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class TextSide(Protocol):
    """What the server needs of text.Text."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> Stream: ...


class Identity(NamedTuple):
    """What is served: the name clients use, the snapshot's id, the size of its vocabulary."""

    model: str
    id: str
    vocab_size: int


class ClientGone(Exception):
    """The client closed its connection."""


class App:
    """The service as an ASGI application.

    Args:
        text: tokenizer and chat template.
        link: to the engine.
        identity: what is served.
        default_max_tokens: the length of a chat's answer whose client names none.
        keys: API keys, of which a client must show one; none: open to all.
        startup: gives the start-up report.
        on_request: called when a generation request has arrived.
        on_token: called when tokens have been written to a client's connection.
        max_open: generation requests at once, waiting ones included.
    """

    def __init__(
        self,
        text: TextSide,
        link: Link,
        identity: Identity,
        *,
        default_max_tokens: int,
        keys: Sequence[bytes] = (),
        startup: Callable[[], dict[str, Any]] = dict,
        on_request: Callable[[], None] = lambda: None,
        on_token: Callable[[], None] = lambda: None,
        max_open: int = 1024,
    ) -> None:
        self.draining = False
        self.open = 0
        self.metrics = metrics.Metrics()
        self._text = text
        self._link = link
        self._identity = identity
        self._default_max_tokens = default_max_tokens
        self._keys = tuple(keys)
        self._startup = startup
        self._on_request = on_request
        self._on_token = on_token
        self._max_open = max_open
        self._held = 0
        self._created = int(time.time())
        self.routes = self._routes()
        self._router = Router(self.routes, redirect_slashes=False, default=_no_route)

    def _routes(self) -> list[Route]:
        return [
            Route("/v1/completions", _Generate(self, protocol.parse_completion), methods=["POST"]),
            Route("/v1/chat/completions", _Generate(self, protocol.parse_chat), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/health", self._ready, methods=["GET"]),
            Route("/health/live", self._live, methods=["GET"]),
            Route("/health/ready", self._ready, methods=["GET"]),
            Route("/health/startup", self._started, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to offer nothing else"
        scope["app"] = self
        reply = _Reply(scope, receive, send, closing=lambda: self.draining)
        try:
            self._check_key(scope)
            await self._router(scope, receive, reply.send)
        except (ClientGone, ClientDisconnect):
            reply.status = 499
        except (RequestError, HTTPException) as error:
            await reply.refuse(_as_request_error(error))
        except Exception as error:
            _show(error)
            await reply.refuse(RequestError("The server failed on this request.", status=500, code="internal_error"))
        self.metrics.responses[_route_name(scope), str(reply.status)] += 1

    def health(self) -> tuple[bool, str]:
        """Whether requests are answered, and the state in a word."""
        if self.draining:
            return False, "draining"
        return self._link.state == "ready", self._link.state

    async def _live(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        ready, state = self.health()
        return _json({"status": state}, 200 if ready else 503)

    async def _started(self, request: Request) -> Response:
        report = self._startup()
        return _json(report, 503 if report.get("ready_seconds") is None else 200)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return _json(self._card())

    async def _metrics(self, request: Request) -> Response:
        body, content_type = metrics.render(self.metrics, self._facts())
        return Response(body, headers={"content-type": content_type})

    async def generate(self, parse: Parse, scope: Scope, receive: Receive, send: Send) -> None:
        """One completion or chat, from its body to its last token, or until its client leaves."""
        began = time.monotonic()
        with self._admitted():
            call = parse(await _body(Request(scope, receive)), self._identity.vocab_size)
            if call.model is not None:
                self._check_model(call.model)
            await unless_gone(receive, self._answer(call, began, send))

    async def _answer(self, call: protocol.Call, began: float, send: Send) -> None:
        prompts = await self._tokenized(call)
        engine = await self._until_ready()
        kv_tokens = engine.kv_blocks * engine.block_size
        lengths = [
            protocol.settled(call, len(prompt), engine.max_length, kv_tokens, self._default_max_tokens)
            for prompt in prompts
        ]
        heading = self._heading(call)
        works = _works(heading.id, call, prompts, lengths)
        answer = answers.Answer(
            heading,
            choices=len(works),
            prompt_tokens=sum(map(len, prompts)),
            spell=None if call.params.logprobs < 0 else self._text.token_bytes,
            usage=call.include_usage,
        )
        async with aclosing(self._pieces(works, call.stop)) as pieces, aclosing(self._timed(pieces, began)) as timed:
            await (self._stream if call.stream else self._whole)(answer, timed, send)

    async def _stream(self, answer: answers.Answer, pieces: Pieces, send: Send) -> None:
        """Chunk by chunk. The headers wait for the first sign of the engine, so that a refusal still has a status."""
        started = False
        try:
            async for piece in pieces:
                data = answers.KEEP_ALIVE if piece is None else answer.chunk(piece)
                if not started:
                    started = True
                    await send(_head(200, b"text/event-stream", (b"cache-control", b"no-cache")))
                    data = answer.opening() + data
                if data:
                    await send(_part(data))
                if data and piece is not None and piece.tokens:
                    self._on_token()
            last = answer.closing()
        except RequestError as error:
            if not started:
                raise
            last = answers.error_event(error)
        await send(_part(last, more=False))

    async def _whole(self, answer: answers.Answer, pieces: Pieces, send: Send) -> None:
        async for piece in pieces:
            if piece is not None:
                answer.add(piece)
        body = answer.whole()
        await send(_head(200, b"application/json", (b"content-length", str(len(body)).encode())))
        await send(_part(body, more=False))
        self._on_token()

    async def _tokenized(self, call: protocol.Call) -> list[tuple[int, ...]]:
        if call.text_size() > INLINE_CHARACTERS:
            return await asyncio.to_thread(self._tokens, call)
        return self._tokens(call)

    def _tokens(self, call: protocol.Call) -> list[tuple[int, ...]]:
        if call.chat:
            return [tuple(self._text.encode_chat(call.messages))]
        return [prompt if isinstance(prompt, tuple) else tuple(self._text.encode(prompt)) for prompt in call.prompts]

    async def _until_ready(self) -> wire.Ready:
        self._held += 1
        try:
            return await self._link.until_ready()
        finally:
            self._held -= 1

    async def _pieces(self, works: Sequence[Work], stop: tuple[str, ...]) -> Pieces:
        """What all choices produce, as it comes; None when nothing came for a while. Leaving early aborts the rest."""
        inbox: Inbox = asyncio.Queue()
        making: dict[str, _Choice] = {}
        try:
            for work in works:
                making[work.request.id] = _Choice(work.choice, self._text.stream(stop, work.request.prompt))
                self._link.submit(work.request, inbox)
            while making:
                output = await _next(inbox)
                if output is None:
                    yield None
                elif output.request in making:
                    piece = making[output.request].take(output)
                    if piece.finish is not None:
                        del making[output.request]
                        self._link.abort(output.request)  # where a stop text ended it, the engine does not know yet
                    yield piece
        finally:
            for id in making:
                self._link.abort(id)

    async def _timed(self, pieces: Pieces, began: float) -> Pieces:
        """The same pieces, observed on their way."""
        last: dict[int, float] = {}
        async for piece in pieces:
            if piece is not None and piece.tokens:
                now = time.monotonic()
                if not last:
                    self.metrics.first_token.observe(now - began)
                if piece.choice in last:
                    self.metrics.between_tokens.observe((now - last[piece.choice]) / len(piece.tokens))
                last[piece.choice] = now
            if piece is not None and piece.finish is not None:
                self.metrics.finished[piece.finish] += 1
            yield piece
        self.metrics.whole_request.observe(time.monotonic() - began)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a generation request while it lasts. RequestError where it may not begin."""
        if self.draining:
            raise unavailable("The service is shutting down.")
        if self.open >= self._max_open:
            raise RequestError(
                "The service is full.",
                f"{self.open} requests are open, the most it takes.",
                "Try again a little later.",
                status=429,
                code="overloaded",
            )
        self.open += 1
        self._on_request()
        try:
            yield
        finally:
            self.open -= 1

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in PUBLIC:
            return
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        # Every key is compared, each in constant time: how long it takes says nothing about any of them.
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(found):
            raise RequestError(
                "No valid API key was sent.",
                next_step="Send 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
            )

    def _check_model(self, name: str) -> None:
        if name != self._identity.model:
            raise RequestError(
                f"The model '{name[:200]}' does not exist here.",
                f"This service has '{self._identity.model}'.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        engine = self._link.engine
        return {
            "id": self._identity.model,
            "object": "model",
            "created": self._created,
            "owned_by": "fgsnap",
            "snapshot": self._identity.id,
            "max_model_len": None if engine is None else engine.max_length,
        }

    def _heading(self, call: protocol.Call) -> answers.Heading:
        id = ("chatcmpl-" if call.chat else "cmpl-") + os.urandom(12).hex()
        fingerprint = f"fgsnap-{self._identity.id[:12]}"
        return answers.Heading(call.chat, id, int(time.time()), self._identity.model, fingerprint)

    def _facts(self) -> metrics.Facts:
        engine = self._link.engine
        rows = self._startup().get("phases", [])
        return metrics.Facts(
            ready=self.health()[0],
            held=self._held,
            restarts=self._link.restarts,
            engine=self._link.stats,
            info={
                "model_name": self._identity.model,
                "id": self._identity.id,
                "backend": engine.backend if engine else "",
                "device": engine.device if engine else "",
            },
            phases=[(row["process"], row["name"], row["end"] - row["begin"]) for row in rows],
        )


class _Generate:
    """A generation route as a bare ASGI endpoint: it watches its client itself, and sends as the tokens come."""

    def __init__(self, app: App, parse: Parse) -> None:
        self._app = app
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app.generate(self._parse, scope, receive, send)


class Work(NamedTuple):
    """One submission to the engine: one choice of a call."""

    choice: int
    request: EngineRequest


def _works(id: str, call: protocol.Call, prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> list[Work]:
    """The choices of every prompt in order. A seed gives each choice of a prompt its own stream of numbers."""
    works: list[Work] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        for choice in range(call.choices):
            seed = None if call.params.seed is None else (call.params.seed + choice) % 2**64
            params = msgspec.structs.replace(call.params, max_tokens=length, seed=seed)
            works.append(Work(len(works), EngineRequest(f"{id}-{len(works)}", prompt, params)))
    return works


async def _next(inbox: Inbox) -> Output | None:
    """The next output, or None after KEEP_ALIVE_SECONDS without one. RequestError for bad news."""
    try:
        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
            item = await inbox.get()
    except TimeoutError:
        return None
    if isinstance(item, Lost):
        raise unavailable(item.why)
    if isinstance(item, wire.Refused):
        raise RequestError(item.what, item.why, item.next_step, status=item.status, param=item.param, code=item.code)
    if item.finish in ("error", "abort"):
        why = item.error or "The engine dropped it."
        raise RequestError("The request failed in the engine.", why, status=500, code="engine_error")
    return item


class _Choice:
    """One choice in the making: its text, and the tokens that the text does not show yet."""

    def __init__(self, index: int, stream: Stream) -> None:
        self._index = index
        self._stream = stream
        self._hidden: list[Token] = []

    def take(self, output: Output) -> Piece:
        """The output with its text; a stop text within it ends the choice."""
        stream, before = self._stream, self._stream.shown
        text = stream.feed([token.id for token in output.tokens])
        if output.finish is not None:
            text += stream.flush()
        self._hidden += output.tokens
        count = stream.shown - before
        shown, self._hidden = tuple(self._hidden[:count]), self._hidden[count:]
        return Piece(self._index, text, output.tokens, shown, "stop" if stream.finished else output.finish)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end, or cancel it and raise ClientGone when the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The whole body. RequestError 413 if it is too long, 408 if it does not arrive."""
    kept, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= BODY_LIMIT:
                    kept += part
                elif size > DISCARD_LIMIT:
                    break
    except TimeoutError:
        raise RequestError(
            "The request body did not arrive in time.", f"It is given {BODY_SECONDS:.0f} s.", status=408
        ) from None
    if size > BODY_LIMIT:
        raise RequestError(
            "The request body is too long.",
            f"The limit is {BODY_LIMIT} bytes.",
            "Send fewer or shorter prompts in one request.",
            status=413,
            code="request_too_large",
        )
    return bytes(kept)


class _Reply:
    """The way back to the client: adds the request's id to the headers, and remembers whether they are out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, closing: Callable[[], bool]) -> None:
        self.status = 0
        self._scope = scope
        self._receive = receive
        self._send = send
        self._closing = closing

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", _request_id(self._scope))]
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Answer with the error; a response that has begun can only be cut."""
        if self.status:
            raise ConnectionAbortedError(f"an answer broke off: {error.what}")
        headers = {"content-type": "application/json"}
        if error.status in (429, 503):
            headers["retry-after"] = "1"
        if error.status in (408, 413) or self._closing():
            headers["connection"] = "close"
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        response = Response(answers.error_body(error), error.status, headers)
        await response(self._scope, self._receive, self.send)


def _request_id(scope: Scope) -> bytes:
    """The client's own x-request-id where it is a reasonable one, else a new one."""
    sent: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return sent if 0 < len(sent) <= 128 else os.urandom(8).hex().encode()


def _route_name(scope: Scope) -> str:
    route = scope.get("route")
    return str(route.path) if route is not None else "other"


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


def _as_request_error(error: RequestError | HTTPException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    what = {404: "There is no such route.", 405: "This route does not take this method."}
    return RequestError(what.get(error.status_code, error.detail), status=error.status_code)


def _show(error: Exception) -> None:
    print(f"fgsnap: a request failed inside the server: {type(error).__name__}.", file=sys.stderr)
    if os.environ.get("FGSNAP_DEBUG"):
        import traceback

        traceback.print_exception(error)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _head(status: int, content_type: bytes, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type), *headers]}


def _part(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
