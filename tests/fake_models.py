"""A registry and a queue without runners: their models say what the test wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette

from lmx.app import create_app
from lmx.catalog import Model
from lmx.config import Config
from lmx.errors import LMXError
from lmx.generation import EmbeddingRequest, FinishReason, GenerationRequest, Part
from lmx.inference import InferenceQueue
from lmx.messages import Accepted, Delta, Embedded, Finished, Loaded
from lmx.registry import Lease, Registry
from lmx.runner_process import Generation, Runner

MODEL = Model(
    id="parrot",
    path=Path("/models/bird/parrot"),
    format="mlx",
    publisher="bird",
    repo="parrot",
    quantization=None,
    created=1_700_000_000,
)
SLASHED = Model(
    id="zoo/owl/owl-q4.gguf",
    path=Path("/models/zoo/owl/owl-q4.gguf"),
    format="gguf",
    publisher="zoo",
    repo="owl",
    quantization="q4",
    created=1_700_000_001,
)
EMBEDDER = Model(
    id="text-embedding-bee",
    path=Path("/models/hive/bee"),
    format="gguf",
    publisher="hive",
    repo="bee",
    quantization=None,
    created=1_700_000_002,
    kind="embedding",
)

GOOD: dict[str, Any] = {"model": MODEL.id, "messages": [{"role": "user", "content": "hi"}]}
"""A request that is served."""

Events = list[Delta | Embedded | Finished]
Step = Events | anyio.Event | Exception
"""Events that come together, a wait, or a failure."""


def says(
    *parts: Part | str, index: int = 0, finish: FinishReason | None = None, **fields: Any
) -> Delta:
    """What answer `index` gains; a string is content."""
    pieces = [Part("content", part) if isinstance(part, str) else part for part in parts]
    return Delta(1, index, pieces, 1, finish=finish, **fields)


HELLO: Sequence[Step] = (
    [says("Hello")],
    [says()],
    [says(", wö"), says("rld")],
    [says("!"), says(finish="stop"), Finished(1, 6, cached_tokens=3)],
)


class FakeRunner(Runner):
    """No process: only what a handler reads."""

    def __init__(self) -> None:
        self.loaded = Loaded(4096, 16, "fake 1.0", [])
        self.exit = None


class FakeGeneration(Generation):
    def __init__(self, steps: Sequence[Step], waiting: anyio.Event) -> None:
        super().__init__(1)
        self.put(Accepted(1, 7))
        self._steps = steps
        self._waiting = waiting

    def __aiter__(self) -> AsyncIterator[Events]:
        return self._play()

    async def _play(self) -> AsyncIterator[Events]:
        for step in self._steps:
            if isinstance(step, anyio.Event):
                self._waiting.set()
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step


class FakeQueue(InferenceQueue):
    """Plays `steps` for every request, or refuses it with `refusal`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.steps = HELLO
        self.refusal: Exception | None = None
        self.asked: list[GenerationRequest | EmbeddingRequest] = []
        self.waiting = anyio.Event()
        """A generation has reached a wait."""
        self.left = anyio.Event()
        """A generation has been given up or finished."""

    @asynccontextmanager
    async def generate(
        self, runner: Runner, request: GenerationRequest | EmbeddingRequest
    ) -> AsyncIterator[Generation]:
        self.asked.append(request)
        if self.refusal:
            raise self.refusal
        try:
            yield FakeGeneration(self.steps, self.waiting)
        finally:
            self.left.set()


class FakeRegistry(Registry):
    """Has the three models; each is loaded by being asked for, unless `failure` is set."""

    def __init__(self, config: Config, queue: InferenceQueue) -> None:
        self.config = config
        self.slots = {}
        self._queue = queue
        self._found = []
        self.failure: LMXError | None = None

    async def models(self) -> list[Model]:
        self._found = [MODEL, SLASHED, EMBEDDER]
        return self._found

    @asynccontextmanager
    async def lease(self, wanted: str | Model, ttl: float | None = None) -> AsyncIterator[Lease]:
        model = wanted if isinstance(wanted, Model) else await self.resolve(wanted)
        with self._queue.place():
            if self.failure:
                raise self.failure
            yield Lease(model, FakeRunner())


class Server:
    """The application over the fakes, which exist before it starts, so that a test can set them."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.queue = FakeQueue(self.config)
        self.registry = FakeRegistry(self.config, self.queue)
        self.app: Starlette = create_app(self.config, self.queue, open_registry=self._open_registry)

    @asynccontextmanager
    async def _open_registry(
        self, config: Config, queue: InferenceQueue
    ) -> AsyncIterator[Registry]:
        yield self.registry
