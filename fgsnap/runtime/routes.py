"""The routes besides generation: models, health and metrics. Loaded with the first request for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from fgsnap.errors import RequestError
from fgsnap.runtime import metrics
from fgsnap.runtime.server import GENERATION

if TYPE_CHECKING:
    from fgsnap.runtime.server import App


class Routes:
    """An ASGI application of its own. Its requests raise RequestError where there is nothing to show."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.table = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/health", self._ready, methods=["GET"]),
            Route("/health/live", self._live, methods=["GET"]),
            Route("/health/ready", self._ready, methods=["GET"]),
            Route("/health/startup", self._started, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            # These never come here by POST. They are in the table for the other methods, which are to be told so.
            *(Route(path, app, methods=["POST"]) for path in GENERATION),
        ]
        self._router = Router(self.table, redirect_slashes=False, default=_no_route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            what = {404: "There is no such route.", 405: "This route does not take this method."}
            allow = (error.headers or {}).get("Allow", "")
            raise RequestError(
                what.get(error.status_code, error.detail), status=error.status_code, allow=allow
            ) from error

    async def _live(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        ready, state = self._app.health()
        return _json({"status": state}, 200 if ready else 503)

    async def _started(self, request: Request) -> Response:
        report = self._app.startup()
        return _json(report, 503 if report.get("ready_seconds") is None else 200)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._app.card()]})

    async def _model(self, request: Request) -> Response:
        self._app.check_model(request.path_params["name"])
        return _json(self._app.card())

    async def _metrics(self, request: Request) -> Response:
        body, content_type = metrics.render(self._app.metrics, self._app.facts())
        return Response(body, headers={"content-type": content_type})


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
