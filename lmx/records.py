"""What is known of a request when it has ended: for the log, the metrics and /admin/events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from .errors import INTERNAL, LMXError
from .runner_process import Generation

ERRORS_KEPT: Final = 20
TTFTS_KEPT: Final = 1000


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Points in time are `time.monotonic()`'s; what does not apply is None."""

    id: str
    client: str
    method: str
    path: str
    model: str | None = None
    """Id of one that exists: no client can invent it."""
    status: int = 0
    """0: the answer has not begun."""
    complete: bool = False
    """The answer has been sent to its end."""
    code: str | None = None
    """Of the error it ended with, which may be the last event of a stream of status 200."""
    message: str = ""
    generation: Generation | None = None
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    def fail(self, error: Exception) -> None:
        """Keeps the words only: an exception keeps the frames it went through."""
        if isinstance(error, LMXError):
            self.code, self.message = error.code or error.type, error.message
        else:
            self.code, self.message = "internal_error", INTERNAL

    @property
    def finish(self) -> str | None:
        """`stop`, `length`, `tool_calls`, `cancelled` or `error`."""
        if self.code is not None:
            return "error"
        if self.status == 499:
            return "cancelled"
        return self.generation.finish if self.generation else None

    @property
    def queue_seconds(self) -> float | None:
        """Until a model's process has taken the prompt: the wait for the model, its load if need
        be, and tokenizing."""
        return _between(self.began, self._accepted)

    @property
    def prefill_seconds(self) -> float | None:
        """From there to the first token: the wait for a row in the batch, and computing."""
        return _between(self._accepted, self.first_token)

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the last."""
        end = self.generation.ended_at if self.generation else None
        return _between(self.first_token, end or self.ended)

    @property
    def ttft_seconds(self) -> float | None:
        return _between(self.began, self.first_token)

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def first_token(self) -> float | None:
        return self.generation.first_token if self.generation else None

    @property
    def _accepted(self) -> float | None:
        return self.generation.accepted_at if self.generation else None

    @property
    def completion_tokens(self) -> int | None:
        """Of what was cut short, those that had come."""
        if self.generation is None:
            return None
        finished = self.generation.finished
        return finished.completion_tokens if finished else sum(self.generation.tokens.values())

    @property
    def prompt_tokens(self) -> int | None:
        return self.generation.prompt_tokens if self.generation else None

    @property
    def seconds_per_token(self) -> float | None:
        """After the first one."""
        decode, tokens = self.decode_seconds, self.completion_tokens
        return None if decode is None or not tokens else decode / max(1, tokens - 1)

    def fields(self) -> dict[str, str | float | None]:
        """For the log: no text of a prompt or an answer is among them."""
        finished = self.generation.finished if self.generation else None
        values: dict[str, str | float | None] = {
            "id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "status": self.status,
            "finish": self.finish,
            "code": self.code,
            "total": self.seconds,
            "queue": self.queue_seconds,
            "prefill": self.prefill_seconds,
            "decode": self.decode_seconds,
            "prompt": self.prompt_tokens,
            "cached": finished.cached_tokens if finished else None,
            "tokens": self.completion_tokens,
            "reasoning": finished.reasoning_tokens if finished else None,
            "drafted": finished.drafted_tokens if finished else None,
            "accepted": finished.accepted_tokens if finished else None,
        }
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True, slots=True)
class RequestError:
    time: float
    """Unix seconds."""
    request_id: str
    model: str | None
    status: int
    code: str
    message: str


class Requests:
    """Those that run, and what is remembered of others. Each of `observers` is told of every one
    that ends."""

    def __init__(self, *observers: Callable[[RequestRecord], None]) -> None:
        self.live: set[RequestRecord] = set()
        self.errors: deque[RequestError] = deque(maxlen=ERRORS_KEPT)
        """The newest first."""
        self.to_models = 0
        """So many have ended."""
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=TTFTS_KEPT)
        """Of those that have ended: when the first token came, and after how long."""
        self._observers = observers

    def ttfts(self, since: float) -> list[float]:
        """Seconds, of running requests too, whose first token has come after `since`."""
        running = filter(None, map(_ttft, self.live))
        return [seconds for at, seconds in [*self._ttfts, *running] if at > since]

    @contextmanager
    def follow(self, record: RequestRecord) -> Iterator[None]:
        self.live.add(record)
        try:
            yield
        finally:
            self.live.remove(record)
            self._end(record)

    def _end(self, record: RequestRecord) -> None:
        record.ended = time.monotonic()
        self.to_models += record.model is not None
        if (ttft := _ttft(record)) is not None:
            self._ttfts.append(ttft)
        if record.code is not None:
            self.errors.appendleft(
                RequestError(
                    time.time(), record.id, record.model, record.status, record.code, record.message
                )
            )
        elif not record.complete:
            record.status = 499  # what nginx logs for a client that left
        for observe in self._observers:
            observe(record)


def _ttft(record: RequestRecord) -> tuple[float, float] | None:
    first, seconds = record.first_token, record.ttft_seconds
    return None if first is None or seconds is None else (first, seconds)
