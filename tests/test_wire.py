"""Streams past the middlewares, over real sockets and real runners of the fake backend."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from lmx.bench_client import ResponseReader
from lmx.serve import _Wire

from .watching import Live, asked, live

pytestmark = pytest.mark.anyio

WORDS = [f"w{number % 97}" for number in range(4_000)]
"""With log-probabilities over 300 bytes each, which the buffers of sockets do not hold."""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What goes past the middlewares."""
    pieces: list[bytes] = []
    write = _Wire.write

    def noted(self: _Wire, body: bytes) -> None:
        pieces.append(body)
        write(self, body)

    monkeypatch.setattr(_Wire, "write", noted)
    return pieces


async def open_stream(it: Live, text: str) -> socket.socket:
    """A connection with a small window, on which a streaming request was sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    url = it.client.base_url
    await loop.sock_connect(connection, (url.host, url.port))
    body = json.dumps(asked("plain", text, stream=True, logprobs=True)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(connection, head.encode() + body)
    return connection


async def until_generated(it: Live) -> None:
    """The model has nothing left to do, whatever of it was read."""
    while any(m["active"] for m in (await it.client.get("/health")).json()["models"]):
        pass


async def texts(connection: socket.socket, received: bytes) -> list[str]:
    """Of all events of the response that has begun so, which must be whole."""
    response = ResponseReader()
    events = response.feed(received)
    while data := await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
        events += response.feed(data)
    connection.close()
    assert response.ended and events.pop() == b"[DONE]"
    return [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]


async def test_a_client_that_does_not_read_misses_nothing(
    tmp_path: Path, written: list[bytes]
) -> None:
    """Pieces are written past the middlewares until its buffers are full, and then wait."""
    context = {"context_length": 3 * len(WORDS), "prefix_cache_bytes": 0}
    async with live(tmp_path, engine=context) as it:
        connection = await open_stream(it, " ".join(WORDS))
        first = await asyncio.get_running_loop().sock_recv(connection, 1)
        await until_generated(it)
        at_once = sum(map(len, written))
        assert "".join(await texts(connection, first)).split() == WORDS
    assert 0 < at_once < 200 * len(WORDS)


async def test_a_client_that_leaves(tmp_path: Path, written: list[bytes]) -> None:
    """Its request ends, and the next is answered."""
    async with live(tmp_path, engine={"context_length": 10_000_000}) as it:
        async with it.stream("plain", "FOREVER a") as response:
            lines = response.aiter_lines()
            while not written:
                await anext(lines)
        await until_generated(it)
        assert (await it.chat("plain", "a b")).json()["choices"][0]["message"]["content"] == "a b "
