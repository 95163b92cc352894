"""The application: what lives as long as it, every route, and one shape for every error."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import admin_api, events, logs, metrics, openai_api, openapi, page
from .access import AdminOnly
from .config import Config
from .downloader import Downloads
from .endpoint import State, endpoint
from .errors import LMXError, error_body
from .events import Events, StateWithEvents
from .inference import InferenceQueue
from .metrics import Metrics, StateWithMetrics
from .records import RequestRecord, Requests
from .registry import Registry, open_registry
from .reload import ConfigFile
from .streaming import INTERNAL_ERROR

logger = logging.getLogger(__name__)


def _post(path: str, handler: Callable[..., Awaitable[Any]]) -> Route:
    return Route(path, endpoint(handler), methods=["POST"])


def _get(path: str, handler: Callable[..., Awaitable[Any]], **options: Any) -> Route:
    return Route(path, endpoint(handler), **options)


async def document(request: Request[State]) -> dict[str, Any]:
    """This document."""
    return openapi.document(ROUTES)


ROUTES: Final = (
    _get("/v1/models", openai_api.list_models),
    _get("/v1/models/", openai_api.list_models),
    _get("/v1/models/{id:path}", openai_api.retrieve_model),
    _post("/v1/chat/completions", openai_api.chat_completions),
    _post("/v1/completions", openai_api.completions),
    _post("/v1/embeddings", openai_api.embeddings),
    _get("/health", openai_api.health),
    _get("/openapi.json", document),
    _get("/metrics", metrics.metrics, middleware=[Middleware(AdminOnly)]),
    _get("/", page.page),
    Mount(
        "/admin",
        routes=[
            _get("/models", admin_api.list_models),
            _get("/models/{id:path}", admin_api.retrieve_model),
            _post("/model/load", admin_api.load),
            _post("/model/unload", admin_api.unload),
            _post("/model/pin", admin_api.pin),
            _post("/model/verify", admin_api.verify),
            _post("/model/delete", admin_api.delete),
            _post("/model/download", admin_api.download),
            _get("/downloads", admin_api.list_downloads),
            _get("/downloads/{id}", admin_api.retrieve_download),
            _get("/downloads/{id}/events", admin_api.download_events),
            _post("/downloads/{id}/cancel", admin_api.cancel_download),
            _get("/status", admin_api.status),
            _get("/events", events.events),
            _get("/logs", admin_api.logs),
            _get("/config", admin_api.show_config),
            _post("/config/reload", admin_api.reload_config),
        ],
        middleware=[Middleware(AdminOnly)],
    ),
)


class AppState(StateWithEvents, StateWithMetrics):
    pass


OpenRegistry = Callable[[Config, InferenceQueue], AbstractAsyncContextManager[Registry]]


def create_app(
    config: Config,
    queue: InferenceQueue,
    *,
    config_file: ConfigFile | None = None,
    open_registry: OpenRegistry = open_registry,
) -> Starlette:
    """Without `config_file` there is nothing to read anew; `open_registry` is for tests without
    models."""
    file = config_file or ConfigFile(None, lambda: config)
    tallies, feed = Metrics(), Events()
    requests = Requests(logs.ended, tallies.count)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[AppState]:
        with logs.kept(config) as log:
            async with open_registry(config, queue) as registry, anyio.create_task_group() as tasks:
                downloads = Downloads(lambda: registry.config, tasks, registry.rescan)
                await downloads.resume()
                tasks.start_soon(file.watch, registry, queue)
                yield AppState(
                    registry=registry,
                    queue=queue,
                    downloads=downloads,
                    config_file=file,
                    requests=requests,
                    metrics=tallies,
                    events=feed,
                    log=log,
                    started=time.time(),
                )
                tasks.cancel_scope.cancel()

    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(Outermost, requests)],
        exception_handlers={
            LMXError: lmx_error,
            HTTPException: http_error,
            ClientDisconnect: client_disconnected,
        },
    )


async def lmx_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LMXError)
    request.state["record"].fail(error)
    if error.status >= 500:
        logger.error("%r: %s: %s", request.scope["path"], type(error).__name__, error.message)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if not error.should_retry:
        headers["x-should-retry"] = "false"
    return JSONResponse(error.to_body(), error.status, headers)


HTTP_CODES: Final = {
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_content_encoding",
}


async def http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router and `read_body` refuse."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = (
            f"Unknown request URL: {request.method} {request.scope['path']}. "
            "Please check the URL for typos, or see the README for the endpoints there are."
        )
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.scope['path']}."
    type, code = "invalid_request_error", HTTP_CODES.get(error.status_code)
    record = request.state["record"]
    record.code, record.message = code or type, message
    body = error_body(message, type=type, code=code)
    return JSONResponse(body, error.status_code, error.headers)


async def client_disconnected(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what nginx logs for a client that left."""
    return Response(status_code=499)


class Outermost:
    """Gives every request its record and its `x-request-id`, and whatever nobody caught a JSON 500.

    Starlette's own handler of `Exception` raises it again, which makes uvicorn close the
    connection and costs the client its next request too.
    """

    def __init__(self, app: ASGIApp, requests: Requests) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = _request_id(scope)
        client = scope["client"][0] if scope.get("client") else "-"
        record = RequestRecord(id.decode(), client, scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", id)]
                message = {**message, "headers": headers}
            elif not message.get("more_body"):
                record.complete = True
            await send(message)

        with self._requests.follow(record):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                record.fail(error)
                if record.status:
                    raise  # the server must cut the connection, or half an answer looks whole
                logger.exception("%s %r failed", scope["method"], scope["path"])
                await JSONResponse(INTERNAL_ERROR, 500)(scope, receive, send_with_id)


_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def _request_id(scope: Scope) -> bytes:
    """The client's own id, unless it could harm a log or a header; otherwise a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return f"req_{secrets.token_hex(16)}".encode()
