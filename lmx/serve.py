"""The server process: the listening socket, uvicorn, an orderly end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
from types import FrameType

import anyio
import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from . import logs
from .app import create_app
from .errors import LMXError
from .inference import InferenceQueue
from .reload import ConfigFile
from .streaming import WIRE

KEEP_ALIVE_SECONDS = 75
"""Longer than any client's pool keeps an idle connection: the client is the one to close."""

SHUTDOWN_MARGIN_SECONDS = 5
"""From failing what still runs to cutting the connections."""

TICK_SECONDS = 1.0
"""From one look whether the application has ended to the next; the `Date` header is as old."""

OPEN_FILES = 10240
"""As many as macOS lets a process ask for (OPEN_MAX)."""


def serve(config_file: ConfigFile) -> int:
    """Serve until a signal; the exit code."""
    raise_file_limit()
    config = config_file.read()
    signal.signal(signal.SIGHUP, lambda signum, frame: config_file.ask())
    logs.setup(config)
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        why = (
            "the port is taken, by LM Studio perhaps: stop that, or choose another with --port"
            if error.errno == errno.EADDRINUSE
            else error.strerror or str(error)
        )
        raise LMXError(f"cannot listen on {config.host}:{config.port}: {why}") from error
    queue = InferenceQueue(config)
    server = Server(
        uvicorn.Config(
            wired(create_app(config, queue, config_file=config_file)),
            # httptools is 4 us a token faster, but drops the body of a request that offers h2c, as
            # Java's client does, and limits no header; uvloop saves nothing with many streams.
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(config.shutdown_grace_seconds) + SHUTDOWN_MARGIN_SECONDS,
        ),
        queue,
        config.shutdown_grace_seconds,
    )
    # What is imported stays: looking through it for garbage takes 4 ms, in the middle of streams.
    gc.freeze()
    logging.getLogger("lmx").info("serving on http://%s:%d", *listener.getsockname()[:2])
    server.run(sockets=[listener])
    return 0 if server.started and not server.broken else 1


class _Wire:
    """A piece of a body as uvicorn's `send` would write it."""

    def __init__(self, request: RequestResponseCycle) -> None:
        self._request = request

    @property
    def free(self) -> bool:
        r = self._request
        over = r.disconnected or r.response_complete
        return r.response_started and not (over or r.flow.write_paused)

    def write(self, body: bytes) -> None:
        self._request.transport.write(self._request.conn.send(h11.Data(data=body)))


def wired(app: ASGIApp) -> ASGIApp:
    """The application with a `Wire` in the scope of each request."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        request = getattr(send, "__self__", None)
        if isinstance(request, RequestResponseCycle):
            scope.setdefault("extensions", {})[WIRE] = _Wire(request)
        await app(scope, receive, send)

    return outer


def raise_file_limit() -> None:
    """launchd allows 256, and every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """uvicorn, except that a signal ends it with exit code 0 and streams get a last event."""

    def __init__(self, config: uvicorn.Config, queue: InferenceQueue, grace: float) -> None:
        super().__init__(config)
        self._queue = queue
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exit = asyncio.Event()
        self.broken = False
        """What lives as long as the application has ended before it: launchd must start anew."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again when it is done: a death by signal to launchd.
        # No grace after a second Ctrl-C.
        again = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._queue.abort if again else self._exit.set)

    async def main_loop(self) -> None:
        # uvicorn's own looks ten times a second: half of what an idle server would do.
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with anyio.move_on_after(TICK_SECONDS):
                await self._exit.wait()

    async def on_tick(self, counter: int) -> bool:
        # uvicorn would go on to serve an application that has nothing left to answer with.
        self.broken = bool(getattr(self.lifespan, "error_occurred", False))
        return await super().on_tick(counter) or self.broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.refuse_new()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._abort_later)
            await super().shutdown(sockets)
            tasks.cancel_scope.cancel()

    async def _abort_later(self) -> None:
        await anyio.sleep(self._grace)
        self._queue.abort()
