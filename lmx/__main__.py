"""The command line: `python -m lmx [serve] ...`, `... bench ...`, `... convert ...`.

Exit codes: 0 done, 1 a fatal error, 2 a bad flag or configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import re
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import uvicorn

from . import __version__
from .app import create_app
from .bench import add_arguments, bench
from .config import Config, load_config
from .convert import convert
from .errors import ConfigError, LMXError
from .inference import InferenceQueue

KEEP_ALIVE_SECONDS = 75
"""Longer than any client's pool keeps an idle connection: the client is the one to close."""

SHUTDOWN_MARGIN_SECONDS = 5
"""From failing what still runs to cutting the connections."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _GLOBAL_FLAGS):
        arguments = ["serve", *arguments]
    options = _parser().parse_args(arguments)
    try:
        if options.command == "convert":
            convert(options.source, options.target)
            return _say(f"wrote {options.target}", 0)
        if options.command == "bench":
            bench(options)
            return 0
        read_config = partial(_config, options)
        return _serve(read_config(), read_config)
    except ConfigError as error:
        return _say(str(error), 2)
    except LMXError as error:
        return _say(error.message, 1)


_GLOBAL_FLAGS = {"-h", "--help", "--version"}


def _say(message: str, code: int) -> int:
    (sys.stderr if code else sys.stdout).write(f"lmx: {message}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmx", description="Serve local LLMs over the OpenAI API.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lmx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the models on disk (the default command)")
    serve.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="YAML file (default: ~/.opta-lmx/config.yaml if there is one)",
    )
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: 1234)")
    serve.add_argument(
        "--models-dir",
        metavar="DIR",
        help="folder of publisher/repo/ model folders (default: ~/.opta-lmx/models)",
    )
    serve.add_argument("--log-level", metavar="L", help="debug, info (default), warning or error")
    add_arguments(commands.add_parser("bench", help="measure how fast a server or an engine is"))
    converter = commands.add_parser("convert", help="make an MLX folder from a llama GGUF file")
    converter.add_argument("source", type=Path, metavar="FILE.gguf")
    converter.add_argument("target", type=Path, metavar="OUT")
    return parser


def _config(options: argparse.Namespace) -> Config:
    flags = ("host", "port", "models_dir", "log_level")
    given: dict[str, Any] = {
        name: value for name in flags if (value := getattr(options, name)) is not None
    }
    config = load_config(options.config, given)
    if options.models_dir is not None and not Path(options.models_dir).expanduser().is_dir():
        raise ConfigError(f"--models-dir {options.models_dir}: no such folder")
    return config


def _serve(config: Config, read_config: Callable[[], Config]) -> int:
    output = logging.StreamHandler()
    output.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[output])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        why = (
            "the port is taken, by LM Studio perhaps: stop that, or choose another with --port"
            if error.errno == errno.EADDRINUSE
            else error.strerror or str(error)
        )
        return _say(f"cannot listen on {config.host}:{config.port}: {why}", 1)
    queue = InferenceQueue(config)
    server = Server(
        uvicorn.Config(
            create_app(config, queue, read_config=read_config),
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
    logging.getLogger("lmx").info("serving on http://%s:%d", *listener.getsockname()[:2])
    server.run(sockets=[listener])
    return 0 if server.started and not server.broken else 1


class OneLine(logging.Formatter):
    """Keeps names and errors from outside from writing lines of their own, or to the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = re.sub(r"[\0-\x1f\x7f]", lambda c: repr(c[0])[1:-1], record.message)
        return super().formatMessage(record)


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
        self._stopping: asyncio.AbstractEventLoop | None = None
        self.broken = False
        """What lives as long as the application has ended before it: launchd must start anew."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again when it is done: a death by signal to launchd.
        self.should_exit = True
        if self._stopping is not None and sig == signal.SIGINT:
            self._stopping.call_soon_threadsafe(self._queue.abort)  # no grace after a second Ctrl-C

    async def on_tick(self, counter: int) -> bool:
        # uvicorn would go on to serve an application that has nothing left to answer with.
        self.broken = bool(getattr(self.lifespan, "error_occurred", False))
        return await super().on_tick(counter) or self.broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping = asyncio.get_running_loop()
        self._queue.refuse_new()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._abort_later)
            await super().shutdown(sockets)
            tasks.cancel_scope.cancel()

    async def _abort_later(self) -> None:
        await anyio.sleep(self._grace)
        self._queue.abort()


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
