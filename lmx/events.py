"""GET /admin/events: all that a page shows, made once a second for all who look."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator
from statistics import median
from typing import Any, Final, cast

import anyio
from starlette.requests import Request
from starlette.responses import Response

from . import admin_api
from .admin_api import Status
from .endpoint import State
from .records import Requests
from .streaming import EventStream, encode_event

PERIOD_SECONDS: Final = 1.0


class Events:
    def __init__(self) -> None:
        self._lock = anyio.Lock()
        self._number = 0
        self._event = b""
        self._made = -math.inf
        self._ended = 0
        self._generated: dict[int | None, int] = {}
        """Tokens by process, as of the last event."""

    async def stream(self, request: Request[State]) -> AsyncGenerator[bytes]:
        """A slow reader gets what is new when it has read, and nothing that was new before."""
        seen = 0
        while not request.state["queue"].stopping:
            # To who has just come, an event that is not a second old is new.
            if seen == self._number or self._left() < 0:
                async with self._lock:
                    if seen == self._number or self._left() < 0:  # nobody else has made one
                        await anyio.sleep(max(0.0, self._left()))
                        self._event = encode_event(await self._make(request))
                        self._number += 1
            seen = self._number
            yield self._event

    def _left(self) -> float:
        """Seconds until the next event is due."""
        return self._made + PERIOD_SECONDS - time.monotonic()

    async def _make(self, request: Request[State]) -> dict[str, Any]:
        requests, status = request.state["requests"], await admin_api.status(request)
        return {
            "time": time.time(),
            "status": status,
            "models": (await admin_api.list_models(request)).models,
            "downloads": (await admin_api.list_downloads(request)).downloads,
            "recent": self._recent(status, requests),
            "errors": list(requests.errors),
        }

    def _recent(self, status: Status, requests: Requests) -> dict[str, float | None]:
        """Since the last event; where nobody has looked for a while, there is none."""
        now = time.monotonic()
        watched = now - self._made < 2 * PERIOD_SECONDS
        since, self._made = (self._made if watched else now), now
        ended, self._ended = requests.to_models - self._ended, requests.to_models
        ttfts, before = requests.ttfts(since), self._generated
        self._generated = {model.pid: model.tokens_generated for model in status.models.values()}
        new = sum(n - before.get(pid, 0) for pid, n in self._generated.items())
        return {
            "requests": ended if watched else 0,
            "tokens_per_second": new / (now - since) if watched else status.tokens_per_second,
            "ttft_seconds": median(ttfts) if ttfts else None,
        }


class StateWithEvents(State):
    events: Events


async def events(request: Request[State]) -> Response:
    """Status, models, downloads, rates and errors as server-sent events, one each second."""
    return EventStream(cast(StateWithEvents, request.state)["events"].stream(request))
