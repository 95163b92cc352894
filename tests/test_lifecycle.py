"""How models come and go: loads, leases, eviction, idle time, memory; without processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from lmx.config import Config, EngineSettings, ModelSettings
from lmx.errors import (
    Conflict,
    InsufficientMemory,
    LMXError,
    ModelLoadFailed,
    ModelUnloaded,
    RunnerDied,
    ServerStopping,
)
from lmx.inference import InferenceQueue
from lmx.kv_cache import KVCacheSize
from lmx.memory import CRITICAL, WARNING
from lmx.messages import Load
from lmx.registry import Registry
from lmx.slot import Slot

from .fake_world import (
    MB,
    NEED,
    OTHERS,
    WEIGHTS,
    FakeRunner,
    World,
    limited,
    opened,
    registry_over,
    runner,
)

pytestmark = pytest.mark.anyio

ONE_AND_A_HALF = NEED // MB * 3 // 2


@pytest.fixture
def world() -> World:
    world = World()
    for name in "abcd":
        world.add(name)
    return world


async def use(registry: Registry, name: str) -> None:
    async with registry.lease(name):
        pass


async def settle() -> None:
    """Let everything that can run do so, threads too."""
    threads = anyio.to_thread.current_default_thread_limiter()
    turns = 0
    while turns < 200:
        await anyio.lowlevel.checkpoint()
        turns = 0 if threads.borrowed_tokens else turns + 1


async def until(condition: Any) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


def ago(slot: Slot, seconds: float) -> None:
    slot.last_used = anyio.current_time() - seconds


# Room


async def test_the_least_recently_used_goes(world: World, tmp_path: Path) -> None:
    """A load that does not fit unloads the idle model that was used longest ago, and no other."""
    async with opened(world, tmp_path, memory=limited(3 * NEED // MB + 1)) as registry:
        for name in "abca":
            await use(registry, name)
        await use(registry, "d")
        assert world.loaded == ["a", "c", "d"]


async def test_as_few_as_needed_go(world: World, tmp_path: Path) -> None:
    """One large idle model goes instead of several small ones that were used before it."""
    world.add("large", 2 * WEIGHTS)
    async with opened(world, tmp_path, memory=limited(1000)) as registry:
        for name in ("a", "large"):
            await use(registry, name)
        world.add("huge", 2 * WEIGHTS + 100 * MB)
        await use(registry, "huge")
        assert world.loaded == ["a", "huge"]


async def test_a_model_in_use_stays(world: World, tmp_path: Path) -> None:
    """A load waits until the model in its way is idle; that model takes no new work meanwhile."""
    async with (
        opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry,
        anyio.create_task_group() as tasks,
    ):
        async with registry.lease("a") as lease:
            tasks.start_soon(use, registry, "b")
            await until(lambda: registry.slots["/nowhere/a"].state == "draining")
            tasks.start_soon(use, registry, "a")
            await settle()
            assert world.loaded == ["a"]
            runner(lease).check()
        await until(lambda: len(world.runners) == 3)
        await until(lambda: registry.slots["/nowhere/a"].ready)
        assert [r.name for r in world.runners] == ["a", "b", "a"]


async def test_it_does_not_wait_for_ever(world: World, tmp_path: Path) -> None:
    """After the configured time the request gets a 503 with the numbers, and nothing is stuck."""
    async with opened(world, tmp_path, memory=limited(ONE_AND_A_HALF, 0.05)) as registry:
        async with registry.lease("a"):
            with pytest.raises(InsufficientMemory, match="did not become idle within"):
                await use(registry, "b")
            assert registry.slots["/nowhere/a"].state == "ready"  # which takes work again
            await use(registry, "a")
        await use(registry, "b")


async def test_what_never_fits_is_refused_at_once(world: World, tmp_path: Path) -> None:
    """The message has every number, and nothing was unloaded in vain."""
    world.add("giant", 2000 * MB)
    async with opened(world, tmp_path) as registry:
        await use(registry, "a")
        with pytest.raises(InsufficientMemory) as caught:
            await use(registry, "giant")
        assert world.loaded == ["a"]
        for number in (
            "needs 2.13 GB",
            "weights 1.95 GB",
            "KV cache 0 B",
            "working memory 180 MB",
            "may take 1.70 GB",
            "90% of 2.00 GB",
            "290 MB are in use",
            "uses 100 MB",
        ):
            assert number in caught.value.message
        assert registry.slots["/nowhere/giant"].state == "available"


async def test_pinned_models_stay(world: World, tmp_path: Path) -> None:
    """A pinned model is neither unloaded for others nor for being idle."""
    settings = {"memory": limited(ONE_AND_A_HALF), "models": {"a": ModelSettings(pinned=True)}}
    async with opened(world, tmp_path, **settings) as registry:
        await use(registry, "a")
        ago(registry.slots["/nowhere/a"], 1e6)
        registry.guard.look()
        with pytest.raises(InsufficientMemory, match="not pinned would not be enough"):
            await use(registry, "b")
        registry.slots["/nowhere/a"].pinned = False
        await use(registry, "b")
        assert world.loaded == ["b"]


async def test_loads_claim_memory_one_after_the_other(world: World, tmp_path: Path) -> None:
    """Two loads at once cannot both take the last free memory."""
    world.hold = anyio.Event()
    async with (
        opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(use, registry, "a")
        tasks.start_soon(use, registry, "b")
        await settle()
        assert len(world.running) == 1
        world.hold.set()
        await until(lambda: len(world.runners) == 2)


async def test_loads_come_in_order(world: World, tmp_path: Path) -> None:
    """A load that waits for memory is overtaken only by one that takes nothing from it, or smaller
    ones could go on for ever."""
    world.add("small", MB)
    world.add("middle", WEIGHTS // 2)
    async with (
        opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry,
        anyio.create_task_group() as tasks,
    ):
        async with registry.lease("a"):
            tasks.start_soon(use, registry, "b")
            await until(lambda: registry.slots["/nowhere/a"].state == "draining")
            tasks.start_soon(use, registry, "middle")
            tasks.start_soon(use, registry, "small")
            await until(lambda: "small" in world.loaded)
            await settle()
            assert world.loaded == ["a", "small"]
        await until(lambda: "middle" in world.loaded)
        assert [r.name for r in world.runners] == ["a", "small", "b", "middle"]


async def test_who_waited_comes_first(world: World, tmp_path: Path) -> None:
    """A model is not unloaded for the next one before those who waited for it have had it."""
    world.hold = anyio.Event()
    served: list[str] = []

    async def serve(registry: Registry, name: str) -> None:
        async with registry.lease(name):
            served.append(name)
            await settle()

    async with (
        opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry,
        anyio.create_task_group() as tasks,
    ):
        for name in "abbbaa":
            tasks.start_soon(serve, registry, name)
            await until(lambda: bool(world.runners))  # "a" has its memory
        world.hold.set()
        await until(lambda: len(served) == 6)
        assert served == list("aaabbb") and len(world.runners) == 2


async def test_memory_that_does_not_come_back(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What an ended process has left behind counts as used: the load is refused, and it is said."""
    async with opened(world, tmp_path) as registry:
        for name in "ab":
            await use(registry, name)
        world.leaks = True
        await registry.unload("a")
        assert "a has ended, but 290 MB did not come back" in caplog.text
        assert registry.guard.room().others == OTHERS + NEED
        world.leaked = world.total
        with pytest.raises(InsufficientMemory):
            await use(registry, "c")


async def test_a_meter_that_fails(world: World, tmp_path: Path) -> None:
    """Without a reading nothing is loaded; what is loaded goes on."""
    async with opened(world, tmp_path) as registry:
        await use(registry, "a")
        world.broken = True
        await use(registry, "a")
        with pytest.raises(LMXError, match="does not tell"):
            await use(registry, "b")
        await registry.unload("a")
        world.broken = False
        await use(registry, "b")


async def test_pressure(world: World, tmp_path: Path) -> None:
    """At a warning idle models go one by one; when it is critical no new work is taken."""
    async with opened(world, tmp_path) as registry:
        for name in "ab":
            await use(registry, name)
        async with registry.lease("b"):
            world.level = WARNING
            registry.guard.look()
            await until(lambda: world.loaded == ["b"])
            world.level = CRITICAL
            registry.guard.look()
            with pytest.raises(InsufficientMemory, match="short of memory"):
                await use(registry, "b")
        world.level = 1
        registry.guard.look()
        await use(registry, "b")


async def test_others_take_memory(world: World, tmp_path: Path) -> None:
    """When other programs push the machine over the limit, idle models make way."""
    async with opened(world, tmp_path) as registry:
        await use(registry, "a")
        world.others = world.total - NEED
        registry.guard.look()
        await until(lambda: world.loaded == [])


async def test_the_limit_holds_for_everything_on_the_machine(tmp_path: Path) -> None:
    """Models may take what 90 % leave after others, Metal's working set, and the user's limit."""
    world = World(total=1000 * MB)
    world.add("a")
    async with opened(world, tmp_path) as registry:
        assert registry.guard.room().limit == 900 * MB - OTHERS
        registry.guard.working_set = 700 * MB
        assert registry.guard.room().limit == 700 * MB and "iogpu" in registry.guard.room().rule
        registry.config = Config(memory=limited(600))
        assert (
            registry.guard.room().limit == 600 * MB and "limit_bytes" in registry.guard.room().rule
        )


# The KV cache


async def test_mlx_shares_what_is_free_and_gives_it_back(world: World, tmp_path: Path) -> None:
    """Free memory is granted to the KV caches of MLX models, and taken back for a load."""
    for name in "xy":
        kv = KVCacheSize(((1024, None),))
        world.add(name, format="mlx", kv_cache=kv)
    async with opened(world, tmp_path, memory=limited(1400)) as registry:
        for name in "xya":
            await use(registry, name)
        registry.guard.look()
        slots = {name: registry.slots[f"/nowhere/{name}"] for name in "xya"}
        grants = {
            name: runner.grants[-1] for name, runner in zip("xya", world.runners, strict=True)
        }
        estimates = {n: s.estimate.kv for n, s in slots.items() if s.estimate}
        assert grants["a"] == estimates["a"] == 0
        assert grants["x"] == grants["y"] > estimates["x"] == 4096 * 1024
        assert 0 <= registry.guard.room(grants=True).free < 2
        free = registry.guard.room().free
        assert sum(grants.values()) - sum(estimates.values()) == pytest.approx(free, abs=2)
        await use(registry, "b")
        assert all(estimates["x"] in runner.grants[-3:] for runner in world.running[:2])


# Idle time


@pytest.mark.parametrize(
    ("ttl", "settings", "seconds"),
    [
        (None, {}, 3600),
        (None, {"ttl_seconds": 60.0}, 60),
        (None, {"models": {"a": ModelSettings(ttl_seconds=7)}}, 7),
        (5.0, {"models": {"a": ModelSettings(ttl_seconds=7)}}, 5),
        (None, {"ttl_seconds": None}, None),
    ],
    ids=["default", "configured", "model", "request", "never"],
)
async def test_idle_models_go(
    world: World,
    tmp_path: Path,
    ttl: float | None,
    settings: dict[str, Any],
    seconds: float | None,
) -> None:
    """A model that a request has loaded is unloaded after its time without work."""
    async with opened(world, tmp_path, **settings) as registry:
        async with registry.lease("a", ttl):
            ago(registry.slots["/nowhere/a"], 1e6)
            registry.guard.look()
            assert registry.slots["/nowhere/a"].state == "ready"
        slot = registry.slots["/nowhere/a"]
        assert slot.ttl_seconds(registry.config) == seconds
        ago(slot, (seconds or 1e6) - 1)
        registry.guard.look()
        assert world.loaded == ["a"]
        if seconds is not None:
            ago(slot, seconds + 1)
            registry.guard.look()
            await until(lambda: world.loaded == [])


@pytest.mark.parametrize("ttl", [None, 9.0])
async def test_loaded_by_hand(world: World, tmp_path: Path, ttl: float | None) -> None:
    """Such a model has no idle time but the one it was loaded with, whatever requests do."""
    async with opened(world, tmp_path) as registry:
        await use(registry, "a")
        slot = await registry.load("a", ttl=ttl)
        async with registry.lease("a", 5.0):
            pass
        assert slot.ttl_seconds(registry.config) == ttl and len(world.runners) == 1


# Loads


async def test_requests_share_a_load(world: World, tmp_path: Path) -> None:
    """Fifty requests for a cold model: one load, fifty answers."""
    async with opened(world, tmp_path) as registry, anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(use, registry, "a")
        await until(lambda: registry.slots)
        await until(lambda: registry.slots["/nowhere/a"].answered == 50)
        assert len(world.runners) == 1


async def test_gguf_takes_over(world: World, tmp_path: Path) -> None:
    """If the MLX weights do not load, the GGUF ones of the same model do, and it is said why."""
    twin = world.add("twin")
    world.add("m", format="mlx", fallback=twin)
    world.failures["m"] = ModelLoadFailed("Model type xlstm not supported.")
    async with opened(world, tmp_path) as registry:
        for _ in range(2):
            await use(registry, "m")
            await registry.unload("m")
        slot = registry.slots["/nowhere/m"]
        assert slot.using == twin and slot.fallback_reason == "Model type xlstm not supported."
        assert [r.name for r in world.runners] == ["m", "twin", "twin"]
        del world.failures["m"]
        await registry.load("m")  # by hand MLX is tried again
        assert slot.using == world.models["m"] and slot.fallback_reason is None


async def test_a_load_for_nobody_is_given_up(world: World, tmp_path: Path) -> None:
    """A load that still waits for memory ends when all who wanted it have left."""
    async with opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry:
        async with registry.lease("a"):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(use, registry, "b")
                await until(lambda: registry.slots["/nowhere/a"].state == "draining")
                tasks.cancel_scope.cancel()
            await until(lambda: registry.slots["/nowhere/b"].state == "available")
            assert registry.slots["/nowhere/a"].state == "ready"
        assert [r.name for r in world.runners] == ["a"]


async def test_a_runner_that_dies(world: World, tmp_path: Path) -> None:
    """Its memory is free, the next request loads it again; dying again makes that wait."""
    async with opened(world, tmp_path) as registry:
        for _ in range(2):
            async with registry.lease("a") as lease:
                runner(lease).die()
                await runner(lease).ended.wait()
                with pytest.raises(LMXError):
                    runner(lease).check()
                    raise AssertionError
                registry.slots["/nowhere/a"].failures += 1
        registry.slots["/nowhere/a"].not_before = anyio.current_time() + 60
        assert registry.guard.room().models == 0
        with pytest.raises(RunnerDied, match="is not loaded again for 60 s"):
            await use(registry, "a")


async def test_a_model_that_never_loads(world: World, tmp_path: Path) -> None:
    """However often it is tried, by hand even without pauses, the server goes on."""
    world.failures["a"] = ModelLoadFailed("no")
    async with opened(world, tmp_path) as registry:
        for _ in range(1100):
            with pytest.raises(ModelLoadFailed):
                await registry.load("a")
        for _ in range(10):
            with pytest.raises(ModelLoadFailed, match="no") as caught:
                await use(registry, "a")
        assert caught.value.retry_after == 60
        await use(registry, "b")


async def test_memory_on_its_way_back(world: World, tmp_path: Path) -> None:
    """While the system still counts an ended process, a load waits instead of being refused."""
    world.total = int((OTHERS + NEED * 1.5) / 0.9)
    async with opened(world, tmp_path) as registry, anyio.create_task_group() as tasks:
        await use(registry, "a")
        world.leaks = True
        tasks.start_soon(use, registry, "b")
        await until(lambda: registry.slots["/nowhere/a"].runner is None)
        for _ in range(50):
            registry._notify()  # whatever else happens meanwhile
            await anyio.lowlevel.checkpoint()
        assert registry.slots["/nowhere/b"].state == "loading"
        world.leaked = 0
        await until(lambda: world.loaded == ["b"])


async def test_the_kv_cache_of_a_pinned_model_shrinks_again(world: World, tmp_path: Path) -> None:
    """What a pinned model takes beyond its estimate, for a long prompt, is waited for."""
    world.add("x", format="mlx", kv_cache=KVCacheSize(((1024, None),)))
    async with (
        opened(world, tmp_path, memory=limited(800)) as registry,
        anyio.create_task_group() as tasks,
    ):
        async with registry.lease("x") as lease:
            registry.slots["/nowhere/x"].pinned = True
            runner(lease).kept = 300 * MB
            registry.guard.look()
            tasks.start_soon(use, registry, "a")
            await settle()
            assert world.loaded == ["x"]
        runner(lease).kept = 0
        await until(lambda: world.loaded == ["a", "x"])


# Unloading


async def test_unload_waits_for_its_requests(world: World, tmp_path: Path) -> None:
    """It drains first; unloading what is not loaded is no error."""
    async with opened(world, tmp_path) as registry, anyio.create_task_group() as tasks:
        async with registry.lease("a"):
            tasks.start_soon(registry.unload, "a")
            await until(lambda: registry.slots["/nowhere/a"].state == "draining")
            await settle()
            assert world.loaded == ["a"]
        await until(lambda: registry.slots["/nowhere/a"].state == "available")
        assert world.loaded == []
        assert (await registry.unload("a")).state == "available"


async def test_unload_by_force(world: World, tmp_path: Path) -> None:
    """The requests that use it fail at once."""
    async with opened(world, tmp_path) as registry, anyio.create_task_group() as tasks:
        async with registry.lease("a") as lease:
            tasks.start_soon(lambda: registry.unload("a", force=True))
            await runner(lease).ended.wait()
            with pytest.raises(LMXError, match="stopped"):
                runner(lease).check()
        await until(lambda: registry.slots["/nowhere/a"].state == "available")


async def test_force_ends_a_load(world: World, tmp_path: Path) -> None:
    """Who waits for it gets the error; whether it loads or waits for memory."""
    world.hold = anyio.Event()
    async with opened(world, tmp_path, memory=limited(ONE_AND_A_HALF)) as registry:
        for name in "ab":
            async with anyio.create_task_group() as tasks:

                async def fails(name: str = name) -> None:
                    with pytest.raises(ModelUnloaded):
                        await use(registry, name)

                tasks.start_soon(fails)
                path = f"/nowhere/{name}"
                await until(lambda path=path: path in registry.slots)
                await settle()
                assert (await registry.unload(name, force=True)).state == "available"
            assert world.loaded == []
            world.hold = None
            await use(registry, name)
            world.hold = anyio.Event()
            await registry.unload(name)


async def test_an_id_that_moves_to_another_model(world: World, tmp_path: Path) -> None:
    """A model that has come later takes the id of a loaded one: each name gets its own answer."""
    old = world.add("m", path=Path("/nowhere/old"))
    world.models["old"] = world.models.pop("m")
    async with opened(world, tmp_path) as registry:
        await use(registry, "m")
        registry.slots["/nowhere/old"].pinned = True
        world.models["old"] = replace(old, id="m@q8")
        world.models["new"] = replace(old, path=Path("/nowhere/new"))
        await registry.models()
        async with registry.lease("m") as lease:
            assert lease.model.path.name == runner(lease).name == "new"
        async with registry.lease("m@q8") as lease:
            assert lease.model.path.name == runner(lease).name == "old"
        assert world.loaded == ["new", "old"] and len(world.runners) == 2
        del world.models["old"]
        await registry.models()  # its files are gone, but it can still be unloaded
        await registry.unload("m@q8")
        assert world.loaded == ["new"]


async def test_delete(world: World, tmp_path: Path) -> None:
    """Only what lies in LMX's own folder can be deleted; who waits meanwhile finds nothing."""
    folder = tmp_path / "pub" / "c"
    for file in ("config.json", "model.safetensors"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"{}")
    async with opened(world, tmp_path) as registry, anyio.create_task_group() as tasks:
        with pytest.raises(Conflict, match="only reads it"):
            await registry.delete("a")
        world.add("c", path=folder, format="mlx", repo="c", removable=True)
        await registry.models()
        async with registry.lease("c"):
            tasks.start_soon(registry.delete, "c")
            await until(lambda: not folder.exists())
            assert world.loaded == ["c"]
            with pytest.raises(Conflict, match="cannot be removed"):
                await registry.delete("c")
        await until(lambda: world.loaded == [])


async def test_waiting_ends_with_the_server(world: World, tmp_path: Path) -> None:
    """Who waits for a load when the server stops gets an error instead of the connection's end."""
    world.hold = anyio.Event()
    config = Config(state_file=str(tmp_path / "state.json"))
    queue = InferenceQueue(config)
    errors: list[Exception] = []

    async def ask(registry: Registry, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        try:
            await use(registry, "a")
        except ServerStopping as error:
            errors.append(error)

    async with registry_over(world)(config, queue) as registry:
        async with anyio.create_task_group() as tasks:
            await tasks.start(ask, registry)
            await until(lambda: world.runners)
            queue.abort()
        assert len(errors) == 1
        world.hold.set()


# Restarts


async def test_preload(world: World, tmp_path: Path) -> None:
    """Configured models are loaded at start; one that does not load is no reason not to start."""
    world.failures["b"] = ModelLoadFailed("no")
    async with opened(world, tmp_path, preload=("b", "nobody", "a")) as registry:
        await until(lambda: world.loaded == ["a"])
        assert registry.slots["/nowhere/a"].explicit
        assert registry.slots["/nowhere/b"].state == "failed"


@pytest.mark.parametrize("restore", [False, True])
async def test_restore(world: World, tmp_path: Path, restore: bool) -> None:
    """What was loaded when the server stopped is loaded again if so configured."""
    async with opened(world, tmp_path) as registry:
        for name in "ab":
            await use(registry, name)
        await registry.unload("a")
    if restore:
        world.hold = anyio.Event()
        async with opened(world, tmp_path, restore=True):
            await until(lambda: world.running)  # it is stopped before b is loaded
        world.hold = None
    async with opened(world, tmp_path, restore=restore) as registry:
        await until(lambda: world.loaded == (["b"] if restore else []))
        await settle()
        if restore:
            assert registry.slots["/nowhere/b"].ttl_seconds(registry.config) == 3600
        assert "/nowhere/a" not in registry.slots


async def test_a_model_that_ends_the_machine(world: World, tmp_path: Path) -> None:
    """One during whose load the machine went down twice is left alone at the next start."""
    file = tmp_path / "state.json"
    for attempts in (1, 2):
        world.hold = anyio.Event()
        async with opened(world, tmp_path, preload=("a", "b")):
            await until(lambda: world.running)
            left_behind = file.read_bytes()
        assert json.loads(left_behind)["starting"] == {"a": attempts}
        file.write_bytes(left_behind)  # the machine had no time to tidy up
    world.hold = None
    async with opened(world, tmp_path, preload=("a", "b")) as registry:
        await until(lambda: world.loaded == ["b"])
        await use(registry, "a")  # who asks for it gets it


async def test_a_damaged_state_file(world: World, tmp_path: Path) -> None:
    """It is forgotten, not fatal."""
    (tmp_path / "state.json").write_text('{"loaded": 7')
    async with opened(world, tmp_path, restore=True) as registry:
        await use(registry, "a")
        await registry.unload("a")
    assert json.loads((tmp_path / "state.json").read_text())["loaded"] == []


async def test_the_next_estimate_has_learnt(world: World, tmp_path: Path) -> None:
    """A model that took more than was expected is expected to take as much the next time."""
    async with opened(world, tmp_path) as registry:
        async with registry.lease("a") as lease:
            runner(lease).bytes += 50 * MB
        await registry.unload("a")
        await use(registry, "a")
        estimate = registry.slots["/nowhere/a"].estimate
        assert estimate is not None and estimate.total == NEED + 50 * MB


async def test_past_prompts_are_no_working_memory(world: World, tmp_path: Path) -> None:
    """What a model needs while it works is learnt, though past prompts took more at other times."""
    async with opened(world, tmp_path) as registry:
        async with registry.lease("a") as lease:
            for past, working in ((0, 50), (500, 0), (0, 0)):
                runner(lease).past = past * MB
                runner(lease).bytes = NEED + (past + working) * MB
                registry.guard.look()
                runner(lease).grant(past * MB)
        await registry.unload("a")
        await use(registry, "a")
        estimate = registry.slots["/nowhere/a"].estimate
        assert estimate is not None and estimate.total == NEED + 50 * MB


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_past_prompts_give_way_before_models_do(
    world: World, tmp_path: Path, busy: bool
) -> None:
    """A load that would fit without the KV caches of past prompts unloads nobody."""
    world.add("x", format="mlx", kv_cache=KVCacheSize(((1024, None),)))
    async with opened(world, tmp_path, memory=limited(1000)) as registry, AsyncExitStack() as stack:
        async with registry.lease("x") as lease:
            runner(lease).past = 500 * MB
            runner(lease).bytes += 500 * MB
            runner(lease).grant(600 * MB)
        if busy:
            await stack.enter_async_context(registry.lease("x"))
        assert registry.guard.room().free < NEED
        await use(registry, "a")
        assert world.loaded == ["a", "x"] and len(world.runners) == 2


# The test at load, and what is sent with it


def loads(world: World) -> list[Load]:
    return [runner.load for runner in world.runners]


async def test_what_was_tested_is_not_tested_again(world: World, tmp_path: Path) -> None:
    """A model is tested at its first load, and anew when its settings have changed, or if the last
    test found anything: that may be gone."""
    passed, other = EngineSettings(), EngineSettings(draft_tokens=0)
    for settings, problems in ((passed, []), (passed, []), (other, ["ragged: no"]), (other, [])):
        world.problems = problems
        async with opened(world, tmp_path, engine=settings, preload=("a",)) as registry:
            await until(lambda: world.loaded)
            await use(registry, "a")
            assert registry.slots["/nowhere/a"].problems == problems
    assert [load.features for load in loads(world)] == [None, world.features, None, None]


async def test_the_runner_gets_paths(world: World, tmp_path: Path) -> None:
    """A draft model's id becomes its path, and ~ the home folder."""
    draft = ModelSettings(engine={"draft_model": "b", "prefix_disk_dir": "~/p"})
    async with opened(world, tmp_path, models={"a": draft}) as registry:
        await use(registry, "a")
        estimate = registry.slots["/nowhere/a"].estimate
    [load] = loads(world)
    assert load.settings.draft_model == "/nowhere/b"
    assert load.settings.prefix_disk_dir == str(Path.home() / "p")
    assert estimate is not None and estimate.weights == 2 * WEIGHTS


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("a", "cannot guess for itself"),
        ("none", "'none' does not exist"),
        ("mlx", "mlx is mlx, chat, and not gguf, chat"),
        ("embedder", "embedder is gguf, embedding, and not"),
        ("broken", "no tokenizer"),
    ],
)
async def test_a_draft_model_that_will_not_do(
    world: World, tmp_path: Path, draft: str, message: str
) -> None:
    """The load fails and says what is wrong with it."""
    world.add("mlx", format="mlx")
    world.add("embedder", kind="embedding")
    world.add("broken", error="no tokenizer")
    settings = ModelSettings(engine={"draft_model": draft})
    async with opened(world, tmp_path, models={"a": settings}) as registry:
        with pytest.raises(ModelLoadFailed, match=f"draft_model of a: .*{message}"):
            await use(registry, "a")
    assert world.runners == []


async def test_a_draft_model_takes_the_format_that_is_loaded(world: World, tmp_path: Path) -> None:
    """Where GGUF takes over for the model, the draft model's GGUF weights do as well."""
    fallback = world.add("b-gguf")
    world.add("b", format="mlx", fallback=fallback)
    settings = ModelSettings(engine={"draft_model": "b"})
    async with opened(world, tmp_path, models={"a": settings}) as registry:
        await use(registry, "a")
    assert loads(world)[0].settings.draft_model == "/nowhere/b-gguf"


# Everything at once


@contextmanager
def checked(world: World, registry: Registry, held: dict[FakeRunner, int]) -> Iterator[None]:
    """What must hold at any time."""
    yield
    assert world.others + sum(r.bytes for r in world.running) <= world.total
    for fake, count in held.items():
        assert not count or fake.running, "unloaded under a lease"
    assert len(world.loaded) == len(set(world.loaded))


@pytest.mark.parametrize("seed", range(4))
async def test_a_thousand_random_operations(world: World, tmp_path: Path, seed: int) -> None:
    """Loads, uses, unloads, pins, deaths, failures and pressure in any order: no model is loaded
    twice or unloaded under a lease, memory stays below the limit, and nothing is ever stuck."""
    choose = random.Random(seed)
    for name in "abcd":
        world.add(name, choose.choice((WEIGHTS, WEIGHTS // 2, 2 * WEIGHTS)))
    held: dict[FakeRunner, int] = {}
    answers = {"good": 0, "refused": 0}

    async def client(registry: Registry, name: str) -> None:
        try:
            async with registry.lease(name, choose.choice((None, 1.0))) as lease:
                fake = runner(lease)
                held[fake] = held.get(fake, 0) + 1
                try:
                    for _ in range(choose.randrange(20)):
                        with checked(world, registry, {} if fake.exit else {fake: 1}):
                            await anyio.lowlevel.checkpoint()
                        fake.check()
                finally:
                    held[fake] -= 1
            answers["good"] += 1
        except LMXError:
            answers["refused"] += 1

    async def operator(what: str, registry: Registry, name: str) -> None:
        try:
            if what == "load":
                await registry.load(name, ttl=choose.choice((None, 1.0)))
            else:
                await registry.unload(name, force=what == "force")
        except LMXError:
            pass

    async with opened(world, tmp_path, memory=limited(800), queue_size=512) as registry:
        async with anyio.create_task_group() as tasks:
            for _ in range(1000):
                name = choose.choice("abcd")
                match choose.choice(["use"] * 12 + ["load", "unload", "force"] + ["turn"] * 6):
                    case "use":
                        tasks.start_soon(client, registry, name)
                    case "turn":
                        match choose.randrange(8):
                            case 0 if world.running:
                                choose.choice(world.running).die()
                            case 1:
                                world.failures = {name: ModelLoadFailed("no")}
                            case 2:
                                world.failures = {}
                            case 3:
                                registry.guard.look()
                            case 4 if (path := f"/nowhere/{name}") in registry.slots:
                                registry.slots[path].pinned = choose.choice((None, True))
                            case 5:
                                world.level = choose.choice((1, 1, 1, WARNING))
                            case 6 if (path := f"/nowhere/{name}") in registry.slots:
                                registry.slots[path].not_before = 0.0
                    case what:
                        tasks.start_soon(operator, what, registry, name)
                for _ in range(choose.randrange(8)):
                    await anyio.lowlevel.checkpoint()
            for slot in registry.slots.values():
                slot.pinned = None
        # Nothing runs any more: every model is at rest, and each can still be had.
        world.failures, world.level = {}, 1
        assert all(not slot.leases and not slot.waiting for slot in registry.slots.values())
        assert not any(held.values())
        for name in "abcd":
            registry.slots[f"/nowhere/{name}"].not_before = 0.0
            await use(registry, name)
        assert answers["good"] > 50
