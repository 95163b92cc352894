"""What the handlers of every API share: state, a request's body, a JSON answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Final, NotRequired, TypedDict, get_type_hints

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .downloader import Downloads
from .inference import InferenceQueue
from .logs import Ring
from .records import RequestRecord, Requests
from .registry import Registry
from .reload import ConfigFile
from .schema import decode

BODY_SECONDS: Final = 30.0
"""A request's body must have arrived by then; uvicorn would wait for ever."""


class State(TypedDict):
    """What lives as long as the server; `request.state` in every handler."""

    registry: Registry
    queue: InferenceQueue
    downloads: Downloads
    config_file: ConfigFile
    requests: Requests
    log: Ring
    started: float
    """Unix seconds."""
    record: NotRequired[RequestRecord]
    """Of this request alone; there before any handler."""


class WireResponse(JSONResponse):
    """JSON of wire dataclasses."""

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def endpoint(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Response]]:
    """A route's function, made of one whose annotations say what it takes and returns.

    A parameter `body` is the request's decoded body. `lmx.openapi` reads the same annotations.
    """
    body = get_type_hints(handler).get("body")

    @wraps(handler)
    async def respond(request: Request[State]) -> Response:
        decoded = {} if body is None else {"body": decode(await read_body(request), body)}
        answer = await handler(request, **decoded)
        return answer if isinstance(answer, Response) else WireResponse(answer)

    return respond


async def read_body(request: Request[State]) -> bytes:
    """The body, within the limits of time and size.

    Starlette's own `max_body_size` answers in plain text, so the size is counted here.

    Raises:
        HTTPException: 408, 413 or 415.
        ClientDisconnect: the client left before it had sent everything.
    """
    limit = request.state["registry"].config.max_body_bytes
    # The rest of a refused body is still on its way: the connection is of no more use.
    close = {"Connection": "close"}
    too_large = HTTPException(413, f"The request body is larger than {limit} bytes.", close)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        # Decompressing would undo the limit.
        raise HTTPException(
            415, "Content-Encoding is not supported: send the body as it is.", close
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for data in request.stream():
                body += data
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        late = f"The request body did not arrive within {BODY_SECONDS:.0f} s."
        raise HTTPException(408, late, close) from None
    return bytes(body)
