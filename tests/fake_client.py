"""The server's side of a connection whose client does what the test says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import Message


class Client:
    """Sends `body` and stays until `gone` is set; `on_send` runs before each message it gets."""

    def __init__(
        self, *, body: bytes = b"", on_send: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.gone = anyio.Event()
        self.sent: list[Message] = []
        self._request: list[Message] = [{"type": "http.request", "body": body}]
        self._on_send = on_send

    async def receive(self) -> Message:
        if self._request:
            return self._request.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._on_send:
            await self._on_send()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False
