"""The client of `lmx bench`: a streamed answer over HTTP, and what the server spends on it.

No SDK and no HTTP library: on the machine that is measured, the client's time is the server's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec
import psutil

from .config import LOCAL
from .errors import GenerationFailed, LMXError

REQUEST_SECONDS: Final = 900.0
"""From asking to the last token, a load and a long prompt on a slow machine included."""

Message = dict[str, str]


@dataclass(eq=False)
class Exchange:
    """A question and its streamed answer; times are of `time.monotonic`."""

    messages: list[Message]
    max_tokens: int
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """Of pieces of text, each of one token or several; never empty in the end."""
    prompt_tokens: int = 0
    tokens: int = 0
    counted: bool = True
    """By the server. If not, its pieces count as tokens."""
    cached_tokens: int = 0
    text: str = ""
    running: asyncio.Event = field(default_factory=asyncio.Event)
    """The first piece has come, or the end."""


class Target(Protocol):
    async def ask(self, exchange: Exchange) -> None:
        """Fill in the answer; cancel it to hang up.

        Raises:
            LMXError: with what the other side says.
        """

    async def padding(self) -> float | None:
        """The largest share of a batch's KV cells that held nothing, of late. None: unknown."""

    def spent(self) -> tuple[float, float, int] | None:
        """CPU seconds of the server's process and of the engine's, and the bytes both hold now.
        Where one process does all, the server's. None: not on this machine."""


def spent(process: psutil.Process) -> tuple[float, float, int]:
    """Of a process, of all below it, and of both."""
    seconds, memory = [], 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            seconds.append(times.user + times.system)
            memory += each.memory_info().rss
    return seconds[0], sum(seconds[1:]), memory


def listener(port: int) -> psutil.Process | None:
    """The process that has the port: of those that inherited it, the oldest."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            sockets = process.net_connections("tcp")
            if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
                found.append(process)
    return min(found, key=lambda process: process.create_time(), default=None)


class ResponseReader:
    """Cuts an HTTP/1 response into the data of its server-sent events. Sans-I/O."""

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self._wire, self._body = bytearray(), bytearray()
        self._stream = self._chunked = False
        self._left: int | None = None
        """Bytes of the body, or of the chunk, that are still to come. None: until the end."""

    def feed(self, data: bytes) -> list[bytes]:
        """No data means that the connection has ended. A response that is no event stream counts
        as one event.

        Raises:
            ValueError: this is not HTTP.
        """
        self._wire += data
        self.ended = not data
        if self.status or self._read_head():
            self._read_body()
        if not self._stream:
            return [bytes(self._body)] if self.ended else []
        *lines, self._body = self._body.split(b"\n")
        # JSON has no line breaks, so each line is an event.
        return [bytes(line[5:]).strip() for line in lines if line.startswith(b"data:")]

    def _read_head(self) -> bool:
        end = self._wire.find(b"\r\n\r\n")
        if end < 0 and not self.ended:
            return False
        first, *lines = self._wire[: max(end, 0)].decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1."):
            raise ValueError(f"this is no HTTP response: {bytes(self._wire[:80])!r}")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.status = int(first.split()[1])
        self._stream = self.status == 200 and "event-stream" in headers.get("content-type", "")
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if self._chunked or "content-length" in headers:
            self._left = int(headers.get("content-length", 0))
        # Each chunk begins with a line break; the first gets the head's last one.
        del self._wire[: end + (2 if self._chunked else 4)]
        return True

    def _read_body(self) -> None:
        while self._chunked:
            if not self._left:
                end = self._wire.find(b"\r\n", 2)
                if end < 0:
                    return
                self._left = int(self._wire[2:end].partition(b";")[0], 16)
                del self._wire[: end + 2]
                self.ended |= not self._left
            if not self._take():
                return
        self._take()
        self.ended |= self._left == 0

    def _take(self) -> int:
        taken = self._wire[: self._left]
        del self._wire[: len(taken)]
        self._body += taken
        if self._left is not None:
            self._left -= len(taken)
        return len(taken)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


class _Arrivals(asyncio.Protocol):
    """What a connection brings, and when."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[bytes, float]] = deque()
        self._error: Exception | None = None
        self._changed, self._ended = asyncio.Event(), asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._pieces.append((data, time.monotonic()))
        self._changed.set()
        if data.endswith(b"0\r\n\r\n"):
            self._ended.set()  # probably; not every server closes the connection then

    def connection_lost(self, error: Exception | None) -> None:
        self._error = error
        self._pieces.append((b"", time.monotonic()))
        self._changed.set()
        self._ended.set()

    async def next(self, *, wait_for_all: bool) -> tuple[bytes, float]:
        """
        Raises:
            OSError: the connection is broken.
        """
        if wait_for_all:
            await self._ended.wait()
        while not self._pieces:
            self._changed.clear()
            await self._changed.wait()
        data, now = self._pieces.popleft()
        if not data and self._error:
            raise self._error
        return data, now


class Server:
    """Any that speaks OpenAI's API, by its URL with or without the /v1."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._process = listener(self._port) if self._host in LOCAL else None

    async def ask(self, exchange: Exchange) -> None:
        body = {
            "model": self._model,
            "messages": exchange.messages,
            "temperature": 0,
            "max_tokens": exchange.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        finished = False
        usage: _Usage | None = None

        def take(data: bytes, now: float) -> None:
            nonlocal finished, usage
            if data == b"[DONE]":
                return
            chunk = _chunk.decode(data)
            if chunk.error:
                raise ValueError(data.decode())
            usage = chunk.usage or usage  # some send one with each chunk
            for choice in chunk.choices or ():
                finished |= choice.finish_reason is not None
                delta = choice.delta
                if text := delta.content or delta.reasoning_content or delta.reasoning:
                    exchange.running.set()
                    exchange.arrivals.append(now)
                    exchange.text += text

        exchange.sent = time.monotonic()
        await self._request(
            "POST /v1/chat/completions", msgspec.json.encode(body), take, exchange.running
        )
        if not finished:
            raise self._failed("the stream ended before the answer")
        exchange.tokens, exchange.counted = len(exchange.arrivals), usage is not None
        exchange.arrivals = exchange.arrivals or [time.monotonic()]
        if usage:
            exchange.tokens, exchange.prompt_tokens = usage.completion_tokens, usage.prompt_tokens
            details = usage.prompt_tokens_details
            exchange.cached_tokens = (details and details.cached_tokens) or 0

    async def padding(self) -> float | None:
        found: list[float] = []

        def take(data: bytes, now: float) -> None:
            found.append(msgspec.json.decode(data)["models"][self._model]["padding"])

        # Another server than LMX has no such page, or something else there.
        with suppress(LMXError, LookupError, TypeError):
            await self._request("GET /admin/status", b"", take)
        return found[0] if found else None

    def spent(self) -> tuple[float, float, int] | None:
        with suppress(psutil.Error):  # not ours to look into
            return spent(self._process) if self._process else None
        return None

    async def _request(
        self,
        what: str,
        body: bytes,
        take: Callable[[bytes, float], None],
        running: asyncio.Event | None = None,
    ) -> None:
        """`take` gets each event's data and when it came: at once until `running` is set, and the
        others at the end, because looking at them takes time from what is measured."""
        head = (
            f"{what.replace(' ', f' {self._path}')} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Accept: text/event-stream, application/json\r\nConnection: close\r\n\r\n"
        )
        response = ResponseReader()

        def look(data: bytes, now: float) -> None:
            for event in response.feed(data):
                if response.status != 200:
                    said = event.decode(errors="replace")[:2000]
                    raise ValueError(f"HTTP status {response.status}: {said}")
                take(event, now)

        arrivals = _Arrivals()
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_connection(
                    lambda: arrivals, self._host, self._port, ssl=self._tls or None
                )
                try:
                    transport.write(head.encode() + body)
                    while not response.ended:
                        later = running is not None and running.is_set()
                        look(*await arrivals.next(wait_for_all=later))
                finally:
                    transport.close()
        except TimeoutError:
            raise self._failed(f"no answer in {REQUEST_SECONDS:.0f} s") from None
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise self._failed(str(error)) from error

    def _failed(self, why: str) -> LMXError:
        return GenerationFailed(f"{self._url}: {why}")
