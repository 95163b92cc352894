"""The application: what lives as long as it, every route, and one shape for every error."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import openai_api
from .config import Config
from .errors import LMXError, error_body
from .inference import InferenceQueue
from .openai_api import State
from .registry import Registry, open_registry
from .streaming import INTERNAL_ERROR

logger = logging.getLogger(__name__)

ROUTES: Final = (
    Route("/v1/models", openai_api.list_models),
    Route("/v1/models/", openai_api.list_models),
    Route("/v1/models/{id:path}", openai_api.retrieve_model),
    Route("/v1/chat/completions", openai_api.chat_completions, methods=["POST"]),
    Route("/health", openai_api.health),
)

OpenRegistry = Callable[[Config, InferenceQueue], AbstractAsyncContextManager[Registry]]


def create_app(
    config: Config,
    queue: InferenceQueue,
    *,
    open_registry: OpenRegistry = open_registry,
) -> Starlette:
    """`open_registry` is for tests, which have no models."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        async with open_registry(config, queue) as registry:
            yield State(config=config, registry=registry, queue=queue)

    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(Outermost)],
        exception_handlers={
            LMXError: lmx_error,
            HTTPException: http_error,
            ClientDisconnect: client_disconnected,
        },
    )


async def lmx_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LMXError)
    if error.status >= 500:
        logger.error("%r: %s: %s", request.scope["path"], type(error).__name__, error.message)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
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
    body = error_body(message, type="invalid_request_error", code=HTTP_CODES.get(error.status_code))
    return JSONResponse(body, error.status_code, error.headers)


async def client_disconnected(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what nginx logs for a client that left."""
    return Response(status_code=499)


class Outermost:
    """Gives every response its `x-request-id`, and whatever nobody caught a JSON 500.

    Starlette's own handler of `Exception` raises it again, which makes uvicorn close the
    connection and costs the client its next request too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [*message.get("headers", ()), (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if started:
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
