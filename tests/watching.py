"""The application on a socket, over real runners of the fake backend."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import uvicorn
from starlette.applications import Starlette

from lmx.app import create_app
from lmx.config import Config
from lmx.inference import InferenceQueue
from lmx.registry import open_registry
from lmx.runner_process import Runner
from lmx.serve import Server, wired

from .fake_runner import COMMAND
from .folders import mlx_folder
from .serving import TIMEOUT


def config_of(folder: Path, **settings: Any) -> Config:
    """With the models `plain`, `fast`, which has a prefix cache and guesses, and `broken`."""
    for name in ("plain", "fast", "broken"):
        mlx_folder(folder / "models" / "pub" / name)
    values = {
        "models_dir": str(folder / "models"),
        "model_roots": [],
        "state_file": str(folder / "state.json"),
    }
    return msgspec.convert(values | settings, Config)


def app_of(config: Config, queue: InferenceQueue | None = None) -> Starlette:
    return create_app(
        config,
        queue or InferenceQueue(config),
        open_registry=partial(open_registry, new_runner=partial(Runner, command=COMMAND)),
    )


class Live:
    def __init__(self, config: Config) -> None:
        self.queue = InferenceQueue(config)
        app = wired(app_of(config, self.queue))
        options = uvicorn.Config(
            app, http="h11", lifespan="on", log_config=None, ws="none", access_log=False
        )
        self.server = Server(options, self.queue, 0)
        self.client: httpx2.AsyncClient

    async def chat(self, model: str, text: str) -> httpx2.Response:
        return await self.client.post("/v1/chat/completions", json=asked(model, text))

    def stream(self, model: str, text: str) -> AbstractAsyncContextManager[httpx2.Response]:
        body = asked(model, text, stream=True)
        return self.client.stream("POST", "/v1/chat/completions", json=body)


@asynccontextmanager
async def live(folder: Path, **settings: Any) -> AsyncIterator[Live]:
    """The server on a socket; it stops in the end."""
    it = Live(config_of(folder, **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # its connections' too
    url = "http://{}:{}".format(*listener.getsockname())
    with anyio.fail_after(TIMEOUT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.server.serve, [listener])
            async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT) as it.client:
                yield it
            it.server.should_exit = True


def asked(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}
