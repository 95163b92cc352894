from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from msgspec import structs

from lmx.config import Config, EngineSettings
from lmx.errors import (
    LMXError,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnloaded,
    QueueFull,
    RunnerDied,
)
from lmx.inference import InferenceQueue
from lmx.registry import Lease, Registry, open_registry
from lmx.runner_process import Runner

from .asking import chat, content
from .fake_runner import COMMAND
from .folders import mlx_folder


def put(root: Path, *names: str) -> Path:
    for name in names:
        mlx_folder(root / name)
    return root


@asynccontextmanager
async def registry(root: Path, config: Config | None = None) -> AsyncIterator[Registry]:
    config = structs.replace(
        config or Config(engine=EngineSettings(context_length=100_000_000)),
        models_dir=str(root),
        model_roots=(),
        state_file=str(root / "state.json"),
    )
    with anyio.fail_after(60):
        async with open_registry(
            config, InferenceQueue(config), new_runner=partial(Runner, command=COMMAND)
        ) as opened:
            yield opened


async def ask(registry: Registry, lease: Lease, text: str) -> str:
    queue = InferenceQueue(Config())
    async with queue.generate(lease.runner, chat(text)) as generation:
        return content([e async for events in generation for e in events])


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["m", "M", "pub/M-4bit", "PUB/m-4BIT", "M-4bit", "pub/m"])
async def test_names_of_a_model(tmp_path: Path, name: str) -> None:
    """Id, publisher/repo and repo, in any case, are the same model."""
    async with registry(put(tmp_path, "pub/M-4bit", "pub/other")) as models:
        assert (await models.resolve(name)).id == "m"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name", ["", "m2", "pub", "pub/", "../m", "/etc/passwd", "m\0", "x" * 9999]
)
async def test_an_unknown_name_is_nobodys(tmp_path: Path, name: str) -> None:
    """Never another model's answer; the error lists what there is and stays short."""
    async with registry(put(tmp_path, "pub/m")) as models:
        with pytest.raises(ModelNotFound, match=r"Available models: m\.$") as caught:
            await models.resolve(name)
        assert len(caught.value.message) < 400 and caught.value.param == "model"


@pytest.mark.anyio
async def test_a_model_is_loaded_once_for_all(tmp_path: Path) -> None:
    """Twenty first requests at once share one load, and a later one finds it loaded."""
    pids = set()
    async with registry(put(tmp_path, "p/m")) as models:
        assert models.slots == {}

        async def use() -> None:
            async with models.lease("m") as lease:
                assert await ask(models, lease, "a b") == "a b "
                pids.add(lease.runner.pid)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(use)
        await use()
        assert len(pids) == 1
        slot = models.slots[str(tmp_path / "p/m")]
        assert (slot.state, slot.leases, slot.answered) == ("ready", 0, 21)
    [pid] = pids
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.anyio
async def test_a_request_that_leaves_does_not_stop_the_load(tmp_path: Path) -> None:
    """The load goes on for the others who wait for it."""
    async with registry(put(tmp_path, "p/m")) as models:
        async with anyio.create_task_group() as tasks:

            async def impatient() -> None:
                async with models.lease("m"):
                    raise AssertionError("not cancelled")

            tasks.start_soon(impatient)
            while not models.slots:
                await anyio.lowlevel.checkpoint()
            assert models.slots[str(tmp_path / "p/m")].state == "loading"
            tasks.cancel_scope.cancel()
        async with models.lease("m") as lease:
            assert await ask(models, lease, "a") == "a "


@pytest.mark.anyio
async def test_a_model_that_does_not_load_fails_its_requests_only(tmp_path: Path) -> None:
    """The reason reaches every request, between the tries too, and another model works."""
    async with registry(put(tmp_path, "p/broken", "p/m")) as models:
        for _ in range(5):
            with pytest.raises(ModelLoadFailed, match="not weights"):
                async with models.lease("broken"):
                    raise AssertionError("loaded")
        async with models.lease("m") as lease:
            assert await ask(models, lease, "a") == "a "
        states = {slot.model.id: slot.state for slot in models.slots.values()}
        assert states == {"broken": "failed", "m": "ready"}


@pytest.mark.anyio
async def test_a_killed_runner_is_replaced(tmp_path: Path) -> None:
    """The next request after a death loads the model again and answers."""
    async with registry(put(tmp_path, "p/m")) as models:
        async with models.lease("m") as lease:
            assert lease.runner.pid is not None
            first = lease.runner.pid
            os.kill(first, signal.SIGKILL)
            await lease.runner.ended.wait()
        async with models.lease("m") as lease:
            assert lease.runner.pid != first
            assert await ask(models, lease, "a") == "a "


@pytest.mark.anyio
async def test_a_model_that_keeps_dying_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """Deaths in a row are answered with 503 and Retry-After instead of endless loading."""
    async with registry(put(tmp_path, "p/m")) as models:
        errors: list[LMXError] = []
        for _ in range(3):
            with pytest.raises(RunnerDied) as caught:
                async with models.lease("m") as lease:
                    await ask(models, lease, "KILL")
            errors.append(caught.value)
        assert "signal 9" in errors[0].message and "signal 9" in errors[1].message
        assert "2 times in a row" in errors[2].message and errors[2].retry_after


@pytest.mark.anyio
async def test_leases_are_places_in_the_queue(tmp_path: Path) -> None:
    """Waiting for a load counts as waiting."""
    async with registry(put(tmp_path, "p/m"), Config(queue_size=1)) as models, models.lease("m"):
        with pytest.raises(QueueFull):
            async with models.lease("m"):
                raise AssertionError("a second place")


@pytest.mark.anyio
async def test_memory_is_all_back_after_unloading(tmp_path: Path) -> None:
    """The process is gone when `unload` returns; the next request loads the model again."""
    async with registry(put(tmp_path, "p/m")) as models:
        for _ in range(3):
            async with models.lease("m") as lease:
                pid = lease.runner.pid
            await models.unload("m")
            assert pid is not None
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            assert models.guard.room().models == 0


@pytest.mark.anyio
async def test_unloading_by_force_fails_the_answer(tmp_path: Path) -> None:
    """A running answer ends with an error that says why."""
    async with registry(put(tmp_path, "p/m")) as models, anyio.create_task_group() as tasks:
        with pytest.raises(ModelUnloaded):
            async with models.lease("m") as lease:
                tasks.start_soon(partial(models.unload, "m", force=True))
                await ask(models, lease, "FOREVER again")


@pytest.mark.anyio
async def test_aliases(tmp_path: Path) -> None:
    """A name from the configuration stands for a model's, in any case."""
    async with registry(put(tmp_path, "p/m"), Config(aliases={"GPT-4o": "p/M"})) as models:
        assert (await models.resolve("gpt-4o")).id == "m"
        with pytest.raises(ModelNotFound):
            await models.resolve("gpt-4")
