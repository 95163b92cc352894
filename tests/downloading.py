"""Downloads from a fake hub into a folder, for their tests."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from lmx import inventory
from lmx.config import Config, HubSettings
from lmx.downloader import Downloads, Job

from .fake_hub import TOKEN, FakeHub, fake_hub

REPO = "org/m"
WEIGHTS = "org/m/model.safetensors"
SMALL = "org/m/config.json"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": random.Random(0).randbytes(300_000),
    "tokenizer.json": b"[]",
    "README.md": b"not fetched",
}
CHOSEN = ["config.json", "model.safetensors", "tokenizer.json"]


class Setup:
    """A models folder, and how downloads into it are set up."""

    def __init__(self, hub: FakeHub, models: Path) -> None:
        self.hub = hub
        self.models = models
        self.model = models / REPO
        self.staging = models / ".downloads" / "org--m"
        self.settings: dict[str, Any] = {"reserve_bytes": 0}
        self.timeout_seconds = 20.0
        self.finished = 0

    def finish(self) -> None:
        self.finished += 1

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Downloads]:
        """As long as a server runs."""
        config = Config(models_dir=str(self.models), hub=HubSettings(**self.settings))
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                yield Downloads(
                    lambda: config,
                    tasks,
                    self.finish,
                    endpoint=self.hub.endpoint,
                    timeout_seconds=self.timeout_seconds,
                    pause_seconds=0,
                )
                tasks.cancel_scope.cancel()

    async def download(self, repo: str = REPO, **choice: Any) -> Job:
        """From start to end."""
        async with self.run() as downloads:
            job = await downloads.start(repo, **choice)
            await job.ended.wait()
            return job

    def files(self, folder: Path | None = None) -> dict[str, bytes]:
        folder = folder or self.model
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name not in (inventory.NAME, ".job.json")
        }

    @property
    def is_clean(self) -> bool:
        """Nothing of a download is left."""
        return not any(self.models.glob(".downloads/*"))


@contextmanager
def setup_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub({REPO: FILES}) as hub:
        yield Setup(hub, folder / "models")


def chosen(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: files[path] for path in CHOSEN}


async def until(event: threading.Event) -> None:
    """Wait for an event of the hub's threads."""
    assert await anyio.to_thread.run_sync(event.wait, 20)
