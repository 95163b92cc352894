"""The models: their names, who uses them, and their way into memory and out of it. Event loop only.

Every change of a state is told to all who wait, and they look again. Loads claim their memory one
at a time, in the order they came: first idle models go, least recently used first, then those in
use take no new work until they are idle, because somebody has always work for a busy one.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from . import catalog, memory
from .catalog import Model
from .config import Config
from .errors import (
    UNLOADED,
    Conflict,
    InsufficientMemory,
    LMXError,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnloaded,
    RunnerDied,
    ServerStopping,
)
from .guard import GRANT_SECONDS, Guard
from .inference import InferenceQueue
from .loading import convert, draft_for, inspect, with_paths
from .memory import Meter, size
from .messages import Load
from .runner_process import Runner
from .slot import Attempt, Slot, State
from .state import StateFile, Tested

logger = logging.getLogger(__name__)

START_ATTEMPTS: Final = 2
"""A model during whose load at start the machine went down so often is left alone at start."""

NewRunner = Callable[[Load, Config], Runner]
FindModels = Callable[[Config], list[Model]]


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to use a loaded model until the lease is given back."""

    model: Model
    runner: Runner


class Registry:
    def __init__(
        self,
        config: Config,
        queue: InferenceQueue,
        tasks: TaskGroup,
        turn: Path,
        new_runner: NewRunner,
        meter: Meter,
        find_models: FindModels,
        state: StateFile,
    ) -> None:
        self.config = config
        """May be replaced while running; where the state file lies is read at start only."""
        self.slots: dict[str, Slot] = {}
        """By path: ids change when other models come and go."""
        self._queue = queue
        self._tasks = tasks
        self._turn = turn
        self._new_runner = new_runner
        self._find_models = find_models
        self._found: list[Model] = []
        self._restoring: list[str] = []
        """Models still to be loaded at start."""
        self._changed = anyio.Event()
        self.guard = Guard(self, meter)
        self._state = state

    # Names

    async def models(self) -> list[Model]:
        """All models on disk now, sorted by id."""
        config = self.config
        found = await anyio.to_thread.run_sync(self._find_models, config)
        for model in found:
            if str(model.path) in self.slots:
                self.slot(model)
        # What was looked for by the last configuration answers who asked for it, and nobody else.
        self._found = found if config is self.config else []
        return found

    def rescan(self) -> None:
        """Files have changed: look again when the next name is asked for."""
        self._found = []

    async def resolve(self, name: str, param: str = "model") -> Model:
        """The model called `name`: an alias, its id, `publisher/repo`, or the repo; any case.

        Raises:
            ModelNotFound: never another model's answer.
        """
        aliases = {alias.lower(): target for alias, target in self.config.aliases.items()}
        wanted = aliases.get(name.lower(), name)
        # The disk is looked at again only for a name that is new.
        model = catalog.named(wanted, self._found) or catalog.named(wanted, await self.models())
        if model is None:  # its files are gone, but it is in memory
            model = catalog.named(wanted, [s.model for s in self.slots.values() if s.runner])
        if model is None:
            listed = ", ".join(model.id for model in self._found if model.usable) or "none"
            raise ModelNotFound(
                f"The model '{name[:200]}' does not exist. Available models: {listed}.",
                param=param,
            )
        return model

    def slot(self, model: Model) -> Slot:
        slot = self.slots.setdefault(str(model.path), Slot(model))
        if slot.model != model:
            slot.model = model  # its id or its files have changed
            if slot.runner is None and slot.attempt is None:
                slot.using, slot.fallback_reason = model, None
        return slot

    # Use

    @asynccontextmanager
    async def lease(self, wanted: str | Model, ttl: float | None = None) -> AsyncIterator[Lease]:
        """Hold the model, which may be called by a name, in memory, loading it first if need be.

        Raises:
            ModelNotFound, ModelLoadFailed, InsufficientMemory, QueueFull, ServerStopping
            RunnerDied: it keeps dying, and the time to try again has not come.
        """
        model = wanted if isinstance(wanted, Model) else await self.resolve(wanted)
        with self._queue.place():
            self.guard.admit()
            slot = self.slot(model)
            with self._queue.interruptible():
                runner = await self._ready(slot, explicit=False)
                # Nothing awaits between here and the count, or the model could go away.
                slot.leases += 1
            if not slot.explicit:
                slot.ttl = ttl or slot.ttl
            try:
                yield Lease(model, runner)
                slot.failures = 0
                slot.answered += 1
            finally:
                slot.leases -= 1
                slot.last_used = anyio.current_time()
                self._notify()

    async def load(self, name: str, *, ttl: float | None = None) -> Slot:
        """Load by hand: the model then stays until memory is needed or `ttl` seconds are over.

        Raises:
            As `lease`.
        """
        slot = self.slot(await self.resolve(name))
        if slot.runner is None:
            slot.not_before, slot.fallback_reason = 0.0, None  # a person has asked
        with self._queue.interruptible():
            await self._ready(slot, explicit=True)
        slot.explicit, slot.ttl = True, ttl
        return slot

    async def unload(self, name: str, *, force: bool = False) -> Slot:
        """Wait until nobody uses the model, then free its memory. With `force`, fail its requests,
        and those that wait for its load.

        Raises:
            ModelNotFound
        """
        slot = self.slot(await self.resolve(name))
        while slot.state == "loading":
            if force and slot.attempt is not None:
                slot.attempt.scope.cancel()
            await self.change()
        if slot.state == "ready":
            self.begin_unload(slot, "asked to")
        if force and slot.state == "draining" and slot.runner is not None:
            await slot.runner.stop()
        while slot.leaving:
            await self.change()
        return slot

    async def delete(self, name: str) -> Model:
        """Unload the model and remove its files.

        Raises:
            ModelNotFound
            Conflict: it lies in a folder that is not LMX's own, or cannot be removed.
        """
        model = await self.resolve(name)
        if not model.removable:
            raise Conflict(f"{model.path} is not in {self.config.models_dir}: LMX only reads it.")
        slot = self.slot(model)
        while slot.state == "loading":
            await self.change()
        if slot.state == "ready":
            self.begin_unload(slot, "it is being deleted")
        try:
            # While it drains: then whoever waits for it finds nothing to load. What runs keeps the
            # files it has open.
            await anyio.to_thread.run_sync(catalog.remove, model)
        except OSError as error:
            raise Conflict(f"{model.path} cannot be removed: {error}") from error
        finally:
            self.rescan()
        while slot.leaving:
            await self.change()
        return model

    async def _ready(self, slot: Slot, *, explicit: bool) -> Runner:
        """Wait for the one load that all who wait share, starting it if nobody has."""
        slot.waiting += 1
        try:
            while (runner := slot.ready) is None:
                if self._queue.stopping:
                    raise ServerStopping("The server is stopping.")
                if slot.state == "ready" or slot.leaving:  # on its way out
                    await self.change()
                    continue
                attempt = slot.attempt or self._start_load(slot, explicit)
                await attempt.done.wait()
                if attempt.error is not None:
                    raise attempt.error
            return runner
        finally:
            slot.waiting -= 1

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def change(self) -> None:
        await self._changed.wait()

    def _set(self, slot: Slot, to: State) -> None:
        slot.state = to
        self._notify()

    # Loading

    def _start_load(self, slot: Slot, explicit: bool) -> Attempt:
        if refusal := slot.refusal():
            raise refusal
        attempt = slot.attempt = Attempt()
        slot.explicit, slot.ttl, slot.error = explicit, None, None
        self._set(slot, "loading")
        # A task of its own: the request that started it may go away, the others still wait.
        self._tasks.start_soon(self._load, slot, attempt)
        return attempt

    async def _load(self, slot: Slot, attempt: Attempt) -> None:
        after: State = "ready"
        try:
            with attempt.scope:
                await self._load_either(slot)
            if attempt.scope.cancelled_caught:
                raise ModelUnloaded(UNLOADED)
        # Even a bug of ours must fail this load, whose requests wait, and not the server.
        except Exception as error:
            known = isinstance(error, LMXError | OSError)
            logger.error(
                "%s does not load: %s", slot.model.id, error, exc_info=None if known else error
            )
            if slot.runner is not None:
                await slot.runner.stop()
            slot.clear()
            attempt.error = error if isinstance(error, LMXError) else ModelLoadFailed(str(error))
            after = "available"
            if not isinstance(error, InsufficientMemory | ModelUnloaded):
                after = "failed"
                slot.back_off(attempt.error)
                slot.counts["model_load_failures"] += 1
            self.rescan()
        else:
            slot.counts["model_loads"] += 1
        slot.last_used = anyio.current_time()
        slot.attempt = None
        attempt.done.set()
        self._set(slot, after)
        self.guard.share()  # before its first request, whose prompt may be long
        await self._remember()

    async def _load_either(self, slot: Slot) -> None:
        """The model, or if it cannot be loaded the GGUF weights of the same one."""
        fallback = slot.model.fallback
        if slot.fallback_reason is None or fallback is None:
            try:
                return await self._load_model(slot, slot.model)
            except InsufficientMemory:
                raise
            except LMXError as error:
                if fallback is None or self._queue.stopping:
                    raise
                logger.warning("%s: GGUF takes over: %s", slot.model.id, error.message)
                slot.fallback_reason = error.message
                slot.clear()
        await self._load_model(slot, fallback)

    async def _load_model(self, slot: Slot, model: Model) -> None:
        started = anyio.current_time()
        if model.error is not None:
            raise ModelLoadFailed(model.error)
        if model.convert_from is not None and not model.path.exists():
            await convert(model.convert_from, model.path)
            await self.models()
            model = slot.model  # which now has its facts
        engine = slot.engine = self.config.engine_for(slot.model.id)
        draft = await self._draft(model, engine.draft_model)
        engine = with_paths(engine, draft)
        given_up = threading.Event()
        parts = [model] if draft is None else [model, draft]
        try:
            look = partial(inspect, parts, engine, given_up)
            mark = await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
        finally:
            given_up.set()
        path = str(model.path)
        learnt = self._state.remembered.working.get(path)
        need = memory.estimate(model, engine, learnt, draft)
        await self.guard.make_room(slot, need)
        logger.info("loading %s from %s: %s", slot.model.id, path, size(need.total))
        tested = self._state.remembered.tested.get(path)
        if tested is not None and (tested.fingerprint != mark or tested.problems):
            tested = None
        features = None if tested is None else tested.features
        load = Load(path, model.format, engine, need.kv, features, str(self._turn))
        runner = self._new_runner(load, self.config)
        slot.start(model, runner)
        await self._tasks.start(self._supervise, slot, runner)
        with anyio.move_on_after(GRANT_SECONDS):
            await runner.grant(need.kv).wait()
        if runner.exit is not None:
            raise RunnerDied(runner.exit)
        assert runner.loaded is not None
        if tested is None:
            tested = Tested(mark, runner.loaded.features, runner.loaded.problems)
            self._state.remembered.tested[path] = tested
            for problem in tested.problems:
                logger.warning("%s: %s", slot.model.id, problem)
        slot.problems = tested.problems
        slot.loaded_bytes = slot.measure(self.guard.meter)
        logger.info(
            "%s is ready after %.1f s; it takes %s, %s were expected, %s with a full KV cache",
            slot.model.id,
            anyio.current_time() - started,
            *map(size, (slot.loaded_bytes, need.loaded, need.total)),
        )

    async def _draft(self, model: Model, name: str | None) -> Model | None:
        """What `name`, which guesses for `model`, stands for.

        Raises:
            ModelLoadFailed: nothing that could.
        """
        if name is None:
            return None
        try:
            return draft_for(model, await self.resolve(name))
        except ModelNotFound as error:
            raise ModelLoadFailed(f"draft_model of {model.id}: {error.message}") from error

    async def _supervise(
        self, slot: Slot, runner: Runner, *, task_status: TaskStatus[None]
    ) -> None:
        await runner.run(task_status=task_status)
        if slot.state == "ready" and slot.runner is runner and not self._queue.stopping:
            logger.error("%s: %s", slot.model.id, runner.exit)
            slot.clear()
            slot.back_off(None)
            slot.counts["runner_deaths"] += 1
            self._set(slot, "failed")

    # Unloading

    def keep(self, slot: Slot) -> None:
        """Take back `begin_unload`, if it is still in use."""
        if slot.state == "draining" and slot.leases:
            self._set(slot, "ready")

    def begin_unload(self, slot: Slot, why: str, *, evicting: bool = False) -> None:
        logger.info("unloading %s: %s", slot.model.id, why)
        slot.evicting = evicting
        self._set(slot, "draining")
        self._tasks.start_soon(self._unload, slot)

    async def _unload(self, slot: Slot) -> None:
        runner = slot.runner
        assert runner is not None
        while slot.leases and slot.state == "draining" and not runner.ended.is_set():
            await self.change()
        if slot.state != "draining":
            return  # the load that wanted its memory has given up
        self._set(slot, "unloading")
        slot.counts["model_unloads"] += 1
        slot.counts["model_evictions"] += slot.evicting
        if (learnt := slot.learnt(self.guard.meter)) is not None:
            self._state.remembered.working[str(slot.using.path)] = learnt
        limit, private = self.guard.limit(), slot.process(self.guard.meter).private
        await runner.stop()
        slot.clear()
        missing = await memory.returned(self.guard.limit, limit, private)
        if missing:
            logger.warning("%s has ended, but %s did not come back", slot.model.id, size(missing))
        self._set(slot, "available")
        await self._remember()

    # Start and end

    async def start(self) -> None:
        """Load what the configuration wants loaded."""
        # Before the first request changes what is remembered.
        remembered, explicit = self._state.remembered, {*self._state.remembered.explicit}
        self._restoring = remembered.loaded if self.config.restore else []
        await self.models()  # the first look at a large disk takes seconds
        await self.guard.start()
        for name in dict.fromkeys([*self.config.preload, *self._restoring]):
            if remembered.starting.get(name, 0) >= START_ATTEMPTS:
                logger.error("%s is not loaded at start: the last attempts ended LMX", name)
                continue
            remembered.starting[name] = remembered.starting.get(name, 0) + 1
            await self._remember()
            try:
                slot = await self.load(name)
                slot.explicit = name in self.config.preload or name in explicit
            except ServerStopping:
                return
            except LMXError as error:
                logger.error("%s is not loaded at start: %s", name, error.message)
            remembered.starting.pop(name, None)
            self._restoring = [other for other in self._restoring if other != name]
            await self._remember()

    async def _remember(self) -> None:
        if not self._queue.stopping:  # what is loaded now is what shall be restored
            loaded = [slot for slot in self.slots.values() if slot.state == "ready"]
            ids = [slot.model.id for slot in loaded]
            remembered = self._state.remembered
            remembered.loaded = list(dict.fromkeys([*ids, *self._restoring]))
            remembered.explicit = [slot.model.id for slot in loaded if slot.explicit]
        await self._state.save()

    async def stop(self) -> None:
        """End all runners."""
        async with anyio.create_task_group() as tasks:
            for slot in self.slots.values():
                if slot.runner is not None:
                    tasks.start_soon(slot.runner.stop)
        self._state.remembered.starting.clear()  # whatever was loading, this is no crash
        await self._state.save()


@asynccontextmanager
async def open_registry(
    config: Config,
    queue: InferenceQueue,
    *,
    new_runner: NewRunner = Runner,
    meter: Meter | None = None,
    find_models: FindModels = catalog.find_models,
) -> AsyncIterator[Registry]:
    state = StateFile(config.state_file)
    await state.read()
    with tempfile.TemporaryDirectory(prefix="lmx-") as folder:
        async with anyio.create_task_group() as tasks:
            registry = Registry(
                config,
                queue,
                tasks,
                Path(folder) / "gpu",
                new_runner,
                meter or Meter(),
                find_models,
                state,
            )
            tasks.start_soon(registry.start)
            tasks.start_soon(registry.guard.watch)
            try:
                yield registry
            finally:
                queue.abort()
                with anyio.CancelScope(shield=True):
                    await registry.stop()
                tasks.cancel_scope.cancel()
