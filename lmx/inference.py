"""The inference queue: every generation passes it. Event loop only; never blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio

from .config import Config
from .errors import QueueFull, ServerStopping
from .generation import EmbeddingRequest, GenerationRequest
from .runner_process import RETRY_AFTER_SECONDS, Generation, Runner


class InferenceQueue:
    """Bounds the work in the house: every request that generates holds a place until it is done."""

    def __init__(self, config: Config) -> None:
        self.size = config.queue_size
        self.stopping = False
        self._live: set[Generation] = set()
        self._waits: set[anyio.CancelScope] = set()
        self.outstanding = 0
        """Requests loading, waiting or running."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            QueueFull: all places are taken.
            ServerStopping: the server takes no new work.
        """
        if self.stopping:
            raise ServerStopping("The server is stopping.", retry_after=RETRY_AFTER_SECONDS)
        if self.outstanding >= self.size:
            raise QueueFull(
                f"The queue is full: {self.size} requests are running or waiting.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For a wait that ends when everything does.

        Raises:
            ServerStopping: it was aborted.
        """
        with anyio.CancelScope() as scope:
            self._waits.add(scope)
            try:
                yield
            finally:
                self._waits.remove(scope)
        if scope.cancelled_caught:
            raise ServerStopping("The server is stopping.", retry_after=RETRY_AFTER_SECONDS)

    @asynccontextmanager
    async def generate(
        self, runner: Runner, request: GenerationRequest | EmbeddingRequest
    ) -> AsyncIterator[Generation]:
        """Entered once the runner has accepted the prompt; leaving it cancels what still runs.

        Raises:
            InvalidRequest, ContextLengthExceeded: the runner refuses the prompt.
            RunnerDied, ServerStopping: there is nobody to run it.
        """
        generation = runner.submit(request)
        self._live.add(generation)
        try:
            await generation.accepted()
            yield generation
        finally:
            self._live.discard(generation)
            runner.cancel(generation)

    def refuse_new(self) -> None:
        """Take no more work; what runs may go on."""
        self.stopping = True

    def abort(self) -> None:
        """Fail everything that still runs."""
        self.refuse_new()
        for generation in self._live:
            generation.fail(ServerStopping("The server stopped before the answer was complete."))
        for wait in self._waits:
            wait.cancel()
