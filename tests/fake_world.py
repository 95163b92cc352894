"""A machine without processes: runners that only take memory, and a meter that counts it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskStatus
from starlette.applications import Starlette

from lmx.app import create_app
from lmx.catalog import Model
from lmx.config import Config, MemoryLimits
from lmx.errors import LMXError, ModelLoadFailed, ModelUnloaded
from lmx.inference import InferenceQueue
from lmx.kv_cache import KVCacheSize
from lmx.memory import Meter, Process, System
from lmx.messages import Load, Loaded, Report
from lmx.registry import Lease, Registry, open_registry
from lmx.reload import ConfigFile
from lmx.runner_process import Runner

MB = 2**20
OTHERS = 100 * MB
"""What the rest of the machine uses."""
WEIGHTS = 200 * MB
RUNTIME = 80 * MB + WEIGHTS // 20
NEED = WEIGHTS + RUNTIME
"""Of a model that `World.add` makes without more ado."""


class World(Meter):
    """`load` events and failures are set by the test before a model is asked for."""

    def __init__(self, total: int = 2048 * MB) -> None:
        self.total = total
        self.others = OTHERS
        self.leaks = False
        """The memory of a process that ends from now on does not come back."""
        self.leaked = 0
        self.level = 1
        self.broken = False
        self.runners: list[FakeRunner] = []
        """All there have been."""
        self.hold: anyio.Event | None = None
        """Loads wait for it."""
        self.failures: dict[str, LMXError] = {}
        """By the last part of the path: why it does not load."""
        self.features = ["batch", "draft", "prefix"]
        self.problems = ["ragged: token 3 differs"]
        """What the test at load says."""
        self.models: dict[str, Model] = {}

    def add(self, name: str, weights: int = WEIGHTS, **fields: Any) -> Model:
        values: dict[str, Any] = {
            "id": name,
            "path": Path("/nowhere") / name,
            "format": "gguf",
            "publisher": "pub",
            "repo": name,
            "quantization": None,
            "created": 0,
            "size_bytes": weights,
            "context_length": 4096,
            "kv_cache": KVCacheSize(()),
        }
        self.models[name] = Model(**values | fields)
        return self.models[name]

    @property
    def running(self) -> list[FakeRunner]:
        return [runner for runner in self.runners if runner.running]

    @property
    def loaded(self) -> list[str]:
        return sorted(runner.name for runner in self.running)

    def system(self) -> System:
        if self.broken:
            raise OSError("the system does not tell")
        taken = sum(runner.bytes for runner in self.running)
        return System(self.total, self.others + self.leaked + taken)

    def process(self, pid: int) -> Process:
        taken = sum(runner.bytes for runner in self.running if runner.pid == pid)
        return Process(taken, taken)

    def pressure(self) -> int:
        return self.level

    def metal_working_set(self) -> int | None:
        return None


class FakeRunner(Runner):
    def __init__(self, world: World, load: Load, config: Config) -> None:
        self._world = world
        self.load = load
        self.name = Path(load.path).name
        self.loaded = None
        self.report = Report(0, load.kv_bytes, 0)
        self.kv_used = 0
        self.exit = None
        self.ended = anyio.Event()
        self.generated = 0
        self.running = False
        self.bytes = 0
        self.grants: list[int] = []
        self.kept = 0
        """What it does not give back of its KV cache."""
        self.past = 0
        """What past prompts take of its KV cache: given back when a grant is smaller."""
        self.used = 0
        """Clients that hold it now."""
        self._stop = anyio.Event()
        world.runners.append(self)

    @property
    def pid(self) -> int:
        return 1000 + self._world.runners.index(self)

    @property
    def active(self) -> int:
        return self.used

    @property
    def granting(self) -> bool:
        return False

    def grant(self, kv_bytes: int) -> anyio.Event:
        self.grants.append(kv_bytes)
        self._reported(Report(self.bytes, max(kv_bytes, self.kept), self.past))
        given_back = max(0, self.past - kv_bytes)
        self.past -= given_back
        self.bytes -= given_back
        done = anyio.Event()
        done.set()
        return done

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        world = self._world
        assert self.name not in world.loaded, "loaded twice"
        self.running = True
        self.bytes = world.models[self.name].size_bytes + RUNTIME
        try:
            await anyio.lowlevel.checkpoint()
            while world.hold is not None and not (world.hold.is_set() or self._stop.is_set()):
                await anyio.lowlevel.checkpoint()
            if failure := world.failures.get(self.name):
                raise failure
            if self._stop.is_set():
                raise ModelLoadFailed("stopped")
            known = self.load.features
            problems = world.problems if known is None else []
            self.loaded = Loaded(4096, 16, "fake 1.0", known or world.features, problems)
            task_status.started()
            await self._stop.wait()
        finally:
            self.running = False
            world.leaked += self.bytes if world.leaks else 0
            if self.exit is None:
                self.exit = "The model's process ended."
            self.ended.set()

    def die(self) -> None:
        self.exit = "The model's process ended (signal 9)."
        self._stop.set()

    async def stop(self) -> None:
        self.exit = "stopped"
        self._stop.set()
        await self.ended.wait()

    def check(self) -> None:
        """What a client notices when the process is gone."""
        if self.exit is not None:
            raise ModelUnloaded(self.exit)


def registry_over(
    world: World,
) -> Callable[[Config, InferenceQueue], AbstractAsyncContextManager[Registry]]:
    """`open_registry` with no look at the disk."""
    return partial(
        open_registry,
        new_runner=lambda load, config: FakeRunner(world, load, config),
        meter=world,
        find_models=lambda config: list(world.models.values()),
    )


def app_over(
    world: World, folder: Path, config_file: ConfigFile | None = None, **settings: Any
) -> Starlette:
    files = {"models_dir": str(folder / "models"), "state_file": str(folder / "state.json")}
    config = msgspec.convert(files | settings, Config)
    queue = InferenceQueue(config)
    return create_app(config, queue, config_file=config_file, open_registry=registry_over(world))


@asynccontextmanager
async def opened(world: World, tmp_path: Path, **settings: Any) -> AsyncIterator[Registry]:
    config = Config(state_file=str(tmp_path / "state.json"), **settings)
    with anyio.fail_after(60):
        async with registry_over(world)(config, InferenceQueue(config)) as registry:
            yield registry


def limited(megabytes: int, wait_seconds: float = 300.0) -> MemoryLimits:
    return MemoryLimits(limit_bytes=megabytes * MB, wait_seconds=wait_seconds)


def runner(lease: Lease) -> FakeRunner:
    assert isinstance(lease.runner, FakeRunner)
    return lease.runner
