"""What the log says and where it goes: stderr or a file, and the last lines in memory."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import anyio

from .config import Config
from .errors import ConfigError
from .records import RequestRecord

logger = logging.getLogger("lmx.requests")

BACKUPS: Final = 5
LINES_KEPT: Final = 1000
LINE_CHARACTERS: Final = 4096
"""What is kept of a longer line in memory."""
FOLLOW_SECONDS: Final = 0.2

QUIET: Final = ("/health", "/metrics", "/admin")
"""Asked every few seconds by programs that watch."""


def setup(config: Config) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    outputs: list[logging.Handler] = [logging.StreamHandler()]
    if config.log_file is not None:
        outputs[0].setLevel(logging.WARNING)
        outputs.append(_file(Path(config.log_file).expanduser(), config.log_file_bytes))
    for output in outputs:
        output.setFormatter(formatter(config))
    logging.basicConfig(handlers=outputs)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    set_level(config)


def set_level(config: Config) -> None:
    logging.getLogger().setLevel(config.log_level.upper())


def _file(path: Path, size: int) -> logging.Handler:
    """Written by whoever logs, the event loop too: a line takes some 10 us, the renaming of six
    files less than a millisecond."""
    from logging.handlers import RotatingFileHandler  # 10 ms to import

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return RotatingFileHandler(
            path, maxBytes=size, backupCount=BACKUPS, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise ConfigError(f"log_file {path}: {error.strerror or error}") from error


def formatter(config: Config) -> logging.Formatter:
    if config.log_format == "json":
        return JSONLines()
    return OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s")


class OneLine(logging.Formatter):
    """Keeps names and errors from outside from writing lines of their own, or to the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = re.sub(r"[\0-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], record.message)
        return super().formatMessage(record)


class JSONLines(logging.Formatter):
    """ASCII only, line breaks escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := getattr(record, "request", None):
            fields |= {"message": "request"} | request
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def ended(record: RequestRecord) -> None:
    """One line for a request, such as `req_1 127.0.0.1 POST /v1/embeddings bee 200 stop total=0.1
    queue=0.0 prompt=7`."""
    quiet = record.method in ("GET", "HEAD") and record.path.startswith(QUIET)
    level = logging.DEBUG if quiet and record.status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    fields = record.fields() | {"path": quote(record.path[:200])}
    names = ("id", "client", "method", "path", "model", "status", "finish")
    words = ["-" if fields[name] is None else str(fields[name]) for name in names]
    words += [f"{k}={v}" for k, v in fields.items() if k not in names and v is not None]
    logger.log(level, "%s", " ".join(words), extra={"request": fields})


class Ring(logging.Handler):
    """The last lines of the log. Written by any thread."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._count = 0
        """Of all lines there have been."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).split("\n"):
            self._lines.append(line[:LINE_CHARACTERS])
            self._count += 1

    def since(self, number: int) -> tuple[list[str], int]:
        """The lines from `number` on that are still there, and the number of the next one."""
        self.acquire()
        try:
            lines, count = list(self._lines), self._count
        finally:
            self.release()
        new = max(0, count - number)
        return lines[max(0, len(lines) - new) :], count

    async def tail(self, lines: int, stop: Callable[[], bool]) -> AsyncGenerator[bytes]:
        """The last lines, then new ones until `stop`. Who reads too slowly misses some."""
        last, number = self.since(0)
        new = last[max(0, len(last) - lines) :]
        skipped = 0
        while True:
            if skipped:
                new.insert(0, f"... {skipped} lines are left out: they came faster than read")
            yield "".join(f"{line}\n" for line in new).encode(errors="backslashreplace")
            before = number
            new = []
            while not new:
                if stop():
                    return
                await anyio.sleep(FOLLOW_SECONDS)
                new, number = self.since(before)
            skipped = number - before - len(new)


@contextmanager
def kept(config: Config) -> Iterator[Ring]:
    """Keep the last lines from now on."""
    ring = Ring(formatter(config))
    logging.getLogger().addHandler(ring)
    try:
        yield ring
    finally:
        logging.getLogger().removeHandler(ring)
        ring.close()
