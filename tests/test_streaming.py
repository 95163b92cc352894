"""Event streams, seen from the ASGI server: every message sent, and every way to end early."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from lmx.errors import GenerationFailed, QueueFull
from lmx.streaming import DONE, KEEP_ALIVE, WIRE, EventStream, encode_event, unless_disconnected
from tests.fake_client import Client

pytestmark = pytest.mark.anyio


async def read(client: Client, stream: EventStream) -> None:
    await stream({"type": "http"}, client.receive, client.send)


class Events:
    """A source of events that waits where the test says, and remembers how it ended."""

    def __init__(self, *steps: bytes | Exception | anyio.Event) -> None:
        self._steps = steps
        self.waiting = anyio.Event()
        self.closed = anyio.Event()

    async def stream(self) -> AsyncGenerator[bytes]:
        try:
            for step in self._steps:
                if isinstance(step, anyio.Event):
                    self.waiting.set()
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.closed.set()


async def test_a_whole_stream() -> None:
    """Headers come first and once, then each piece at once, then the end."""
    client = Client()
    await read(client, EventStream(Events(b"data: 1\n\n", b"data: 2\n\n", DONE).stream()))
    start, *bodies = client.sent
    assert start["status"] == 200
    assert dict(start["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    assert [(message["body"], message["more_body"]) for message in bodies] == [
        (b"data: 1\n\n", True),
        (b"data: 2\n\n", True),
        (DONE, True),
        (b"", False),
    ]


async def test_events_hold_json_on_one_line() -> None:
    """Line breaks inside data are escaped, so an event cannot be cut in two."""
    event = encode_event({"text": "a\n\nb\r\u2028"})
    assert event.startswith(b"data: {")
    assert event.count(b"\n") == 2
    assert json.loads(event.removeprefix(b"data: ")) == {"text": "a\n\nb\r\u2028"}


@pytest.mark.parametrize("error", [QueueFull("full"), ValueError("bug")], ids=["ours", "a bug"])
async def test_an_error_before_the_first_event_is_raised(error: Exception) -> None:
    """Nothing is sent, and the very error, in no group, reaches the exception handlers."""
    client = Client()
    with pytest.raises(type(error)) as caught:
        await read(client, EventStream(Events(error).stream()))
    assert caught.value is error
    assert client.sent == []


async def test_an_error_after_the_first_event_is_the_last_event() -> None:
    """The client gets the error object in-band, no [DONE], and a proper end."""
    client = Client()
    error = GenerationFailed("the engine failed", param="p")
    await read(client, EventStream(Events(b"data: 1\n\n", error, DONE).stream()))
    assert client.body == b"data: 1\n\n" + encode_event(error.to_body())
    assert client.complete


async def test_a_bug_after_the_first_event_keeps_its_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client learns that the server failed; what failed stands in the log only."""
    client = Client()
    await read(client, EventStream(Events(b"data: 1\n\n", ValueError("secret")).stream()))
    last = json.loads(client.body.split(b"data: ")[-1])
    assert last["error"]["type"] == "server_error"
    assert b"secret" not in client.body
    assert "secret" in caplog.text
    assert client.complete


async def test_comments_while_waiting() -> None:
    """A silent stream starts and says something again and again; the events follow unharmed."""
    gate = anyio.Event()
    count = 0

    async def on_send() -> None:
        nonlocal count
        count += 1
        if count == 4:  # the headers and three comments
            gate.set()

    client = Client(on_send=on_send)
    events = Events(gate, b"data: 1\n\n")
    await read(client, EventStream(events.stream(), keep_alive_seconds=0.001))
    assert client.sent[0]["type"] == "http.response.start"
    assert client.body.startswith(KEEP_ALIVE * 3)
    assert client.body.replace(KEEP_ALIVE, b"") == b"data: 1\n\n"
    assert client.complete


async def test_no_comment_after_the_end() -> None:
    """A comment that had to wait for the last message to be written is not sent any more."""

    class SlowAtTheEnd(Client):
        async def send(self, message: Message) -> None:
            if message.get("more_body") is False:
                for _ in range(10):  # time enough for the next comment to queue up
                    await anyio.lowlevel.checkpoint()
            await super().send(message)

    client = SlowAtTheEnd()
    await read(client, EventStream(Events(b"data: 1\n\n").stream(), keep_alive_seconds=0))
    assert client.complete


async def test_an_error_after_a_comment_is_in_band() -> None:
    """Once a comment has been sent the status is gone, so the error is an event."""
    gate = anyio.Event()

    async def on_send() -> None:
        gate.set()

    client = Client(on_send=on_send)
    error = QueueFull("full")
    await read(client, EventStream(Events(gate, error).stream(), keep_alive_seconds=0.001))
    assert client.body.replace(KEEP_ALIVE, b"") == encode_event(error.to_body())


async def test_no_comment_while_events_flow() -> None:
    """Comments fill silence only."""
    client = Client()
    await read(client, EventStream(Events(*[b"data: 1\n\n"] * 50).stream()))
    assert KEEP_ALIVE not in client.body


@pytest.mark.parametrize("before", [(), (b"data: 1\n\n",)], ids=["before", "after the first event"])
async def test_a_client_that_leaves(before: tuple[bytes, ...]) -> None:
    """The source is cancelled where it waits, its cleanup may await, and nobody is told."""
    client = Client()
    events = Events(*before, anyio.Event())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, client, EventStream(events.stream()))
        await events.waiting.wait()
        client.gone.set()
        await events.closed.wait()
    assert client.body == b"".join(before)
    assert not client.complete


async def test_a_client_that_leaves_while_it_is_written_to() -> None:
    """A source that waits for its event to be sent is closed too."""
    stuck = anyio.Event()

    async def on_send() -> None:
        stuck.set()
        await anyio.sleep_forever()

    client = Client(on_send=on_send)
    events = Events(b"data: 1\n\n")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, client, EventStream(events.stream()))
        await stuck.wait()
        client.gone.set()
        await events.closed.wait()
    assert client.sent == []


@pytest.mark.parametrize("keep_alive_seconds", [0.001, 15.0], ids=["comment", "event"])
async def test_a_client_that_never_reads(keep_alive_seconds: float) -> None:
    """Whatever is stuck in the pipe, the source is closed after the write timeout."""
    client = Client(on_send=anyio.sleep_forever)
    before = [anyio.Event()] if keep_alive_seconds < 1 else []
    events = Events(*before, b"data: 1\n\n")
    await read(
        client,
        EventStream(
            events.stream(), keep_alive_seconds=keep_alive_seconds, write_timeout_seconds=0.01
        ),
    )
    assert events.closed.is_set()
    assert client.sent == []


async def test_a_server_that_reports_a_lost_connection_by_oserror() -> None:
    """ASGI 2.4 servers raise from send: that is a client that left, not a fault."""

    async def on_send() -> None:
        raise OSError("connection lost")

    client = Client(on_send=on_send)
    events = Events(b"data: 1\n\n")
    await read(client, EventStream(events.stream()))
    assert events.closed.is_set()


async def test_an_oserror_of_the_source_is_no_lost_connection() -> None:
    """Only the write side may conclude that the client is gone."""
    client = Client()
    with pytest.raises(BrokenPipeError):
        await read(client, EventStream(Events(BrokenPipeError("runner")).stream()))


async def test_cancelling_the_server_closes_the_source() -> None:
    """A stream cut by shutdown cleans up and passes the cancellation on."""
    client = Client()
    events = Events(anyio.Event())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, client, EventStream(events.stream()))
        await events.waiting.wait()
        tasks.cancel_scope.cancel()
    assert events.closed.is_set()


async def test_unless_disconnected_returns_the_result() -> None:
    """While the client stays, it is as if the work had been awaited."""

    async def work() -> Any:
        return None

    assert await unless_disconnected(Client().receive, work) is None


async def test_unless_disconnected_raises_the_bare_error() -> None:
    """No ExceptionGroup around what the work raises."""

    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await unless_disconnected(Client().receive, work)


async def test_unless_disconnected_cancels_the_work() -> None:
    """A client that leaves cancels the work, and ClientDisconnect tells so."""
    client = Client()
    cleaned = anyio.Event()

    async def work() -> None:
        client.gone.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.set()

    with pytest.raises(ClientDisconnect):
        await unless_disconnected(client.receive, work)
    assert cleaned.is_set()


class FakeWire:
    """A server's `Wire` to the same client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.free = True

    def write(self, body: bytes) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": True}
        self._client.sent.append(message)


async def test_a_piece_past_the_generator() -> None:
    """It comes in its place, while the server can write; without pieces nothing is written."""
    client, gate = Client(), anyio.Event()
    wire = FakeWire(client)
    events = Events(b"data: 1\n\n", gate, b"data: 3\n\n")
    stream = EventStream(events.stream())
    assert not stream.write_now(lambda: b"too early")
    scope = {"type": "http", "extensions": {WIRE: wire}}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream, scope, client.receive, client.send)
        await events.waiting.wait()
        assert stream.write_now(lambda: b"data: 2\n\n") and stream.write_now(lambda: b"")
        wire.free = False
        assert not stream.write_now(lambda: b"not now")
        gate.set()
    assert client.body == b"data: 1\n\ndata: 2\n\ndata: 3\n\n" and client.complete
    assert b"" not in [message["body"] for message in client.sent[1:-1]]


async def test_a_server_without_a_wire() -> None:
    client, gate = Client(), anyio.Event()
    events = Events(b"data: 1\n\n", gate)
    stream = EventStream(events.stream())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, client, stream)
        await events.waiting.wait()
        assert not stream.write_now(lambda: b"data: 2\n\n")
        gate.set()


async def test_no_piece_gets_into_a_comment() -> None:
    """While one is being written, whatever else comes waits its turn."""
    writing, go_on, gate = anyio.Event(), anyio.Event(), anyio.Event()

    async def on_send() -> None:
        if len(client.sent) == 2:  # the comment
            writing.set()
            await go_on.wait()

    client = Client(on_send=on_send)
    scope = {"type": "http", "extensions": {WIRE: FakeWire(client)}}
    stream = EventStream(Events(b"data: 1\n\n", gate).stream(), keep_alive_seconds=0.001)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream, scope, client.receive, client.send)
        await writing.wait()
        assert not stream.write_now(lambda: b"data: 2\n\n")
        go_on.set()
        gate.set()
    assert client.complete
