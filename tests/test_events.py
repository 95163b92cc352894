"""What the page is told every second."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from .watching import Live, live

pytestmark = pytest.mark.anyio


async def told(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_events(tmp_path: Path) -> None:
    """State and downloads as in the rest of the API, what has ended since the last event, and the
    last errors, the newest first."""
    async with live(tmp_path) as server, server.client.stream("GET", "/admin/events") as answer:
        events = told(answer)
        first = await anext(events)
        assert first["recent"] == {"requests": 0, "tokens_per_second": 0.0, "ttft_seconds": None}
        for text, status in (("a b c", 200), ("FAIL x", 500), ("KILL", 503)):
            assert (await server.chat("plain", text)).status_code == status
        await server.chat("no", "x")
        seen = [await anext(events)]
        while sum(event["recent"]["requests"] for event in seen) < 3:
            seen.append(await anext(events))
        last = await anext(events)
        assert last["recent"]["requests"] == 0
        assert any(event["recent"]["ttft_seconds"] for event in seen)
        assert sorted(event["time"] for event in seen) == [event["time"] for event in seen]
        assert [(e["model"], e["status"], e["code"]) for e in last["errors"]] == [
            (None, 404, "model_not_found"),
            ("plain", 503, "runner_died"),
            ("plain", 500, "generation_failed"),
        ]
        assert all(error["request_id"].startswith("req_") for error in last["errors"])
        for name, path in (("models", "models"), ("downloads", "downloads")):
            assert last[name] == (await server.client.get(f"/admin/{path}")).json()[name]
        status_now = (await server.client.get("/admin/status")).json()
        assert last["status"].keys() == status_now.keys()


async def test_the_first_token_of_a_running_stream_is_news(tmp_path: Path) -> None:
    """Its time is told once, before the request has ended, and its tokens are counted."""

    async def read(server: Live) -> None:
        async with server.stream("plain", "FOREVER x") as stream:
            async for _ in stream.aiter_raw():
                pass

    async with (
        live(tmp_path, engine={"context_length": 100_000_000}) as server,
        server.client.stream("GET", "/admin/events") as answer,
    ):
        events = told(answer)
        assert (await anext(events))["recent"]["ttft_seconds"] is None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, server)
            while (event := await anext(events))["recent"]["ttft_seconds"] is None:
                pass
            assert event["recent"]["requests"] == 0, event
            assert event["status"]["models"]["plain"]["active"] == 1
            after = await anext(events)
            assert after["recent"]["ttft_seconds"] is None
            assert after["recent"]["tokens_per_second"] > 0
            tasks.cancel_scope.cancel()


async def test_all_listeners_get_the_same(tmp_path: Path) -> None:
    """Whoever comes later is answered at once, and the same events go to all."""
    heard: list[list[float]] = []

    async def listen(client: httpx2.AsyncClient) -> None:
        async with client.stream("GET", "/admin/events") as answer:
            events = told(answer)
            heard.append([(await anext(events))["time"] for _ in range(3)])

    async with live(tmp_path) as server, anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(listen, server.client)
    assert len(heard) == 4 and all(times == heard[0] for times in heard)


async def test_events_end_with_the_server(tmp_path: Path) -> None:
    """A server that stops ends the stream in order and does not wait for the listener to go."""
    async with live(tmp_path) as server, server.client.stream("GET", "/admin/events") as answer:
        events = told(answer)
        await anext(events)
        server.server.should_exit = True
        async for _ in events:
            pass
