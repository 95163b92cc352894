"""Answers while the client is still there: server-sent events, and work that ends with it.

Nothing here knows whose protocol the events speak, except the shape of an error event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Final, Protocol, TypeVar

import anyio
import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import INTERNAL, LMXError, error_body

logger = logging.getLogger(__name__)
T = TypeVar("T")

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
"""A comment: clients must ignore it (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

INTERNAL_ERROR: Final = error_body(INTERNAL, type="server_error")
"""What a client learns about a fault of ours that has no error class; the log has the rest."""


encode_json: Final = msgspec.json.Encoder().encode


def encode_event(data: object) -> bytes:
    """`data` as one event. JSON holds no raw line break, so one `data:` line is enough."""
    return b"data: " + encode_json(data) + b"\n\n"


async def unless_disconnected(
    receive: Receive,
    work: Callable[[], Awaitable[T]],
    *watchers: Callable[[], Awaitable[None]],
) -> T:
    """What `work` returns or raises; it is cancelled as soon as the client is gone.

    The request's body must have been read: from then on ASGI has only `http.disconnect` to tell.
    Each of `watchers` runs beside the work and returns if it finds the client gone. The work has a
    task of its own: in the request's, a wake-up for each token goes through every middleware.

    Raises:
        ClientDisconnect: the client left first.
    """

    done: list[T] = []
    failed: list[Exception] = []

    async def do() -> None:
        # An error that left the group would come out wrapped in an ExceptionGroup.
        try:
            done.append(await work())
        except Exception as error:
            failed.append(error)
        tasks.cancel_scope.cancel()

    async def leave_after(watcher: Callable[[], Awaitable[None]]) -> None:
        await watcher()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(do)
        for watcher in watchers:
            tasks.start_soon(leave_after, watcher)
        while (await receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()
    if failed:
        raise failed[0]
    if not done:
        raise ClientDisconnect
    return done[0]


WIRE: Final = "lmx.wire"
"""The extension of ASGI's scope that holds a request's `Wire`."""


class Wire(Protocol):
    """What is behind `send`, for pieces of a body: no coroutine, and past the middlewares."""

    @property
    def free(self) -> bool:
        """The headers are sent, the client is there, and nothing waits to be sent."""

    def write(self, body: bytes) -> None:
        """Only while it is `free`."""


class EventStream(Response):
    """Sends encoded events as they are made; several may come in one piece.

    The status is sent with the first of them, so an error before it is raised to the exception
    handlers and gets a status of its own. From then on an error is the last event, in place of the
    one that says `last` that all has been sent. While there is nothing to send, comments keep the
    connection busy, because clients and proxies give up on a silent one.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        last: bytes = b"",
        keep_alive_seconds: float = 15.0,
        write_timeout_seconds: float = 60.0,
    ) -> None:
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering: nginx would hold events back until its buffer is full.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._last = last
        self._keep_alive_seconds = keep_alive_seconds
        self._write_timeout_seconds = write_timeout_seconds
        self._writer: _Writer | None = None

    def write_now(self, piece: Callable[[], bytes]) -> bool:
        """Send a piece past the generator, if that need not wait and the server can do it. Only
        while the generator waits for something: then all it made before has been sent."""
        return self._writer is not None and self._writer.write_now(piece)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = scope.get("extensions", {}).get(WIRE)
        writer = self._writer = _Writer(send, self.raw_headers, wire)
        watch = partial(self._watch, writer)
        try:
            await unless_disconnected(receive, lambda: self._send_events(writer), watch)
        except ClientDisconnect:
            pass  # nobody is left to be told

    async def _watch(self, writer: _Writer) -> None:
        """Write comments while nothing else is written; end when the client has not read anything
        for the whole timeout. One look now and then: a deadline for each write costs as much as
        the write."""
        often = wait = min(self._keep_alive_seconds, self._write_timeout_seconds)
        with suppress(ClientDisconnect, TimeoutError):
            while True:
                await anyio.sleep(wait)
                limit = self._write_timeout_seconds if writer.busy else self._keep_alive_seconds
                left = limit - (time.monotonic() - writer.since)
                if left <= 0 and writer.busy:
                    return
                if left <= 0:
                    with anyio.fail_after(self._write_timeout_seconds):
                        await writer.write(KEEP_ALIVE)
                wait = min(often, left) if left > 0 else often

    async def _send_events(self, writer: _Writer) -> None:
        try:
            async with aclosing(self._events) as events:
                async for piece in events:
                    await writer.write(piece)
            last = self._last
        except ClientDisconnect:
            raise
        except Exception as error:
            if not writer.started:
                raise
            if isinstance(error, LMXError):
                logger.error("a stream failed: %s: %s", type(error).__name__, error.message)
                body = error.to_body()
            else:
                logger.exception("a stream failed")
                body = INTERNAL_ERROR
            last = encode_event(body)
        await writer.write(last, more=False)


class _Writer:
    """The client's end of a stream, written by one task at a time."""

    def __init__(
        self, send: Send, headers: list[tuple[bytes, bytes]], wire: Wire | None = None
    ) -> None:
        self._send = send
        self._wire = wire
        self._headers = headers
        self._lock = asyncio.Lock()  # anyio's goes once around the event loop
        self.started = False
        self._ended = False
        self.since = time.monotonic()
        """When the last write began or ended."""

    @property
    def busy(self) -> bool:
        """Something is being written: the client does not read as fast."""
        return self._lock.locked()

    def write_now(self, piece: Callable[[], bytes]) -> bool:
        if self._wire is None or self.busy or not self._wire.free:
            return False
        if body := piece():
            self._wire.write(body)
        self.since = time.monotonic()
        return True

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """
        Raises:
            ClientDisconnect: gone.
        """
        async with self._lock:
            if self._ended:
                return  # a comment that waited here while the last piece was written
            self._ended = not more
            self.since = time.monotonic()
            try:
                if not self.started:
                    self.started = True
                    start = {"type": "http.response.start", "status": 200}
                    await self._send(start | {"headers": self._headers})
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
            except OSError as error:  # servers of ASGI spec 2.4 and later
                raise ClientDisconnect from error
            self.since = time.monotonic()
