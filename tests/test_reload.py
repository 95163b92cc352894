"""A changed configuration file comes into effect over a real socket, while a stream runs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import huggingface_hub.constants
import pytest
import uvicorn
import yaml
from msgspec import structs

from lmx.app import create_app
from lmx.catalog import Model
from lmx.config import Config, load_config
from lmx.errors import ModelNotFound
from lmx.generation import GenerationRequest
from lmx.inference import InferenceQueue
from lmx.memory import Meter
from lmx.messages import Finished, Load
from lmx.registry import NewRunner, Registry, open_registry
from lmx.reload import NEED_RESTART, ConfigFile, apply
from lmx.runner_process import Runner

from .fake_hub import fake_hub
from .fake_models import HELLO, FakeQueue, says
from .fake_runner import COMMAND
from .fake_world import MB, NEED, FakeRunner, World
from .serving import TIMEOUT, serving

pytestmark = pytest.mark.anyio


class Looks:
    """The file is looked at when the test says so."""

    def __init__(self) -> None:
        self._go, self._waiting = anyio.Event(), anyio.Event()

    async def next(self) -> None:
        self._waiting.set()
        await self._go.wait()
        self._go = anyio.Event()

    async def take(self, times: int = 1) -> None:
        """Returns when what was seen has been dealt with."""
        for _ in range(times):
            await self._waiting.wait()
            self._waiting = anyio.Event()
            self._go.set()
        await self._waiting.wait()


class Live:
    """A server on a socket. Its models are `a`, which streams, to `z`, and `moved`, which is found
    where the configuration says `/more`."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "config.yaml"
        self.base = f"models_dir: {folder}/models\nstate_file: {folder}/state.json\n"
        self.path.write_text(self.base + text)
        self.looks = Looks()
        read = partial(load_config, self.path)
        self.file = ConfigFile(self.path, read, next_look=self.looks.next)
        self.config = self.file.read()
        self.world = World(2**40)
        for name in "abcdefghijklmnopqrstuvwxyz":
            self.world.add(name)
        self.world.add("moved")
        self.queue: InferenceQueue = FakeQueue(self.config)
        self.names = iter("efghijklmnopqrstuvwxyz")
        """Of models that are not loaded yet."""
        self.client: httpx2.AsyncClient
        self.registry: Registry

    async def write(self, text: str) -> None:
        self.path.write_text(self.base + text)
        await self.looks.take(2)

    def find_models(self, config: Config) -> list[Model]:
        models = list(self.world.models.values())
        if "/more" not in (config.models_dir, *config.model_roots):
            models = [model for model in models if model.id != "moved"]
        error = "no such backend"
        return [
            m if config.model(m.id).backend is None else replace(m, error=error) for m in models
        ]

    @asynccontextmanager
    async def open_registry(
        self, config: Config, queue: InferenceQueue, new_runner: NewRunner | None = None
    ) -> AsyncIterator[Registry]:
        fake, find = partial(FakeRunner, self.world), self.find_models
        meter = Meter() if new_runner else self.world
        async with open_registry(
            config, queue, new_runner=new_runner or fake, meter=meter, find_models=find
        ) as self.registry:
            yield self.registry

    @asynccontextmanager
    async def serve(self, new_runner: NewRunner | None = None) -> AsyncIterator[None]:
        opened = partial(self.open_registry, new_runner=new_runner)
        app = create_app(self.config, self.queue, config_file=self.file, open_registry=opened)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, ws="none"))
        with anyio.fail_after(TIMEOUT), socket.create_server(("127.0.0.1", 0)) as listener:
            url = "http://{}:{}".format(*listener.getsockname())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.serve, [listener])
                async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT) as self.client:
                    yield
                server.should_exit = True

    async def chat(self, model: str = "a", content: str = "hi", **headers: str) -> httpx2.Response:
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def admin(self, path: str, body: dict[str, Any] | None = None) -> Any:
        method = "GET" if body is None else "POST"
        answer = await self.client.request(method, f"/admin/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def live(tmp_path: Path, text: str = "") -> AsyncIterator[Live]:
    """While it is open a stream runs, which must come to its good end."""
    live = Live(tmp_path, text)
    queue, held = live.queue, anyio.Event()
    assert isinstance(queue, FakeQueue)
    queue.steps = [[says("Hello")], held, [says(", world"), says(finish="stop"), Finished(1, 3)]]
    text = ""

    async def stream() -> None:
        nonlocal text
        body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        async with live.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for part in answer.aiter_text():
                text += part

    async with live.serve(), anyio.create_task_group() as tasks:
        tasks.start_soon(stream)
        await queue.waiting.wait()
        queue.steps = HELLO
        yield live
        assert "Hello" in text and "world" not in text
        held.set()
    assert ", world" in text and text.endswith("data: [DONE]\n\n")


Probe = Callable[[Live], Awaitable[object]]


def status_of(model: str = "a", content: str = "hi") -> Probe:
    async def probe(live: Live) -> int:
        return (await live.chat(model, content)).status_code

    return probe


async def load(live: Live) -> int:
    return (await live.chat(next(live.names))).status_code


async def status_of_admin(live: Live) -> int:
    return (await live.client.get("/admin/status")).status_code


async def unloads(live: Live) -> bool:
    """Whether model b is unloaded after a minute without work."""
    await live.chat("b")
    live.registry.slots["/nowhere/b"].last_used -= 60
    live.registry.guard.look()
    return not live.registry.slots["/nowhere/b"].idle


async def temperature(live: Live) -> float:
    await live.chat("b")
    assert isinstance(live.queue, FakeQueue)
    asked = live.queue.asked[-1]
    assert isinstance(asked, GenerationRequest)
    return asked.params.temperature


async def rows_of_a_load(live: Live) -> int:
    """How many sequences the next model is told to decode together."""
    name = next(live.names)
    await live.chat(name)
    return live.world.runners[-1].load.settings.parallel


async def fine_print(live: Live) -> bool:
    return logging.getLogger("lmx").isEnabledFor(logging.DEBUG)


async def status_of_a_download(live: Live) -> int:
    body = {"model": f"org/{next(live.names)}"}
    return (await live.client.post("/admin/model/download", json=body)).status_code


ROOMY = "hub: {reserve_bytes: 0}"
LIVE = {
    "aliases": ("", "aliases: {gpt-4o: b}", status_of("GPT-4o"), 404, 200),
    "aliases-gone": ("aliases: {gpt-4o: b}", "", status_of("gpt-4o"), 200, 404),
    "queue_size": ("", "queue_size: 1", status_of(), 200, 429),
    "max_body_bytes": ("", "max_body_bytes: 1024", status_of("a", 2000 * "x"), 200, 413),
    "admin_key": ("", "admin_key: secret", status_of_admin, 200, 401),
    "admin_key-gone": ("admin_key: secret", "", status_of_admin, 401, 200),
    "memory.limit_bytes": (
        "",
        f"memory: {{limit_bytes: {NEED + MB}, wait_seconds: 0}}",
        load,
        200,
        503,
    ),
    "memory.limit_fraction": (
        "",
        "memory: {limit_fraction: 3.0e-4, wait_seconds: 0}",
        load,
        200,
        503,
    ),
    "ttl_seconds": ("", "ttl_seconds: 50", unloads, False, True),
    "ttl_seconds-never": ("ttl_seconds: 50", "ttl_seconds: null", unloads, True, False),
    "models.ttl_seconds": ("", "models: {b: {ttl_seconds: 50}}", unloads, False, True),
    "models.pinned": (
        "ttl_seconds: 50",
        "ttl_seconds: 50\nmodels: {b: {pinned: true}}",
        unloads,
        True,
        False,
    ),
    "models.sampling": ("", "models: {b: {sampling: {temperature: 0}}}", temperature, 0.8, 0),
    "models.engine": ("", "models: {e: {}, f: {engine: {parallel: 3}}}", rows_of_a_load, 16, 3),
    "models.backend": ("", "models: {f: {backend: mlx}}", load, 200, 500),
    "sampling": ("", "sampling: {temperature: 0.25}", temperature, 0.8, 0.25),
    "engine": ("", "engine: {parallel: 2}", rows_of_a_load, 16, 2),
    "model_roots": ("", "model_roots: [/more]", status_of("moved"), 404, 200),
    "models_dir": ("", "models_dir: /more", status_of("moved"), 404, 200),
    "log_level": ("", "log_level: debug", fine_print, False, True),
    "hub.offline": (ROOMY, "hub: {offline: true}", status_of_a_download, 200, 502),
    "hub.reserve_bytes": (
        ROOMY,
        f"hub: {{reserve_bytes: {2**60}}}",
        status_of_a_download,
        200,
        507,
    ),
}
"""By setting: the file before and after, what is tried under both, and what comes of it."""
WITH_PROCESSES = {"step_timeout_seconds", "load_timeout_seconds"}
AT_START = {
    "host": "0.0.0.0",
    "port": 4321,
    "state_file": "/elsewhere",
    "shutdown_grace_seconds": 1.5,
    "preload": ["b"],
    "restore": True,
    "log_file": "/elsewhere",
    "log_file_bytes": 2**20,
    "log_format": "json",
}


@pytest.fixture(scope="module", autouse=True)
def hub() -> Iterator[None]:
    """One on this machine, of small models."""
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    with (
        fake_hub({f"org/{name}": files for name in "efgh"}) as hub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        yield


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


@pytest.mark.parametrize(("before", "after", "probe", "first", "then"), LIVE.values(), ids=LIVE)
async def test_live_settings(
    tmp_path: Path, before: str, after: str, probe: Probe, first: object, then: object
) -> None:
    """A setting acts as soon as the file says so, and what runs notices nothing."""
    async with live(tmp_path, before) as server:
        assert await probe(server) == first
        await server.write(after)
        assert await probe(server) == then
        assert server.file.error is None and server.file.need_restart == []


async def test_settings_that_need_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are named in the log, in the status and in the answer, and keep their value until then;
    what else the file says acts."""
    async with live(tmp_path) as server:
        before = await server.admin("config")
        await server.write(yaml.safe_dump(AT_START | {"queue_size": 9}))
        assert await server.admin("config") == before | {"queue_size": 9}
        assert {*(waiting := (await server.admin("status"))["need_restart"])} == NEED_RESTART
        assert f"used after a restart only: {', '.join(waiting)}" in caplog.text
        reloaded = await server.admin("config/reload", {})
        assert reloaded == {"changed": [], "need_restart": waiting, "need_load": []}
        await server.write("")
        assert (await server.admin("status"))["need_restart"] == []


def test_every_setting_is_live_or_needs_a_restart() -> None:
    """None is forgotten, here or in the program."""
    live = {name.partition(".")[0].partition("-")[0] for name in LIVE} | WITH_PROCESSES
    assert live | AT_START.keys() == set(Config.__struct_fields__)
    assert AT_START.keys() == NEED_RESTART


async def test_timeouts_of_processes(tmp_path: Path) -> None:
    """A load is given up after the time that the file says by then; so is an engine that hangs,
    though its process was started under another limit."""

    def new_runner(load: Load, config: Config) -> Runner:
        return Runner(load, config, command=COMMAND)

    server = Live(tmp_path, "engine: {context_length: 100000000}")
    server.queue = InferenceQueue(server.config)
    for name in ("hangs", "other"):
        server.world.add(name)
    async with server.serve(new_runner):
        body = {"model": "a", "stream": True, "max_tokens": 10**8}
        said = {"messages": [{"role": "user", "content": "FOREVER on"}]}
        async with server.client.stream("POST", "/v1/chat/completions", json=body | said) as answer:
            lines = answer.aiter_lines()
            assert "on" in await anext(lines)
            hung: list[httpx2.Response] = []

            async def hang() -> None:
                hung.append(await server.chat("b", "HANG"))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hang)
                while not (slot := server.registry.slots.get("/nowhere/b")) or not slot.leases:
                    await anyio.lowlevel.checkpoint()
                assert slot.runner is not None and slot.runner.pid is not None
                await server.write("step_timeout_seconds: 0.2")
                pid = slot.runner.pid
            assert hung[0].status_code == 503 and "took no step" in hung[0].text
            os.kill(pid, signal.SIGKILL)  # it hangs: only this ends it
            await server.write("load_timeout_seconds: 0.2")
            late = await server.chat("hangs")
            assert late.status_code == 500 and "not loaded after" in late.text
            while "data" not in (line := await anext(lines)):
                pass
            assert "error" not in line


async def test_engine_settings_wait_for_a_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models in memory that would be loaded otherwise now are named, until they would not be."""
    async with live(tmp_path) as server:
        await server.chat("b")
        await server.write("models: {a: {engine: {parallel: 2}}, c: {engine: {parallel: 2}}}")
        assert "used with their next load only: a" in caplog.text
        reloaded = await server.admin("config/reload", {})
        assert reloaded == {"changed": [], "need_restart": [], "need_load": ["a"]}
        await server.write("")
        assert (await server.admin("config/reload", {}))["need_load"] == []


@pytest.mark.parametrize(
    "broken",
    ["queue_size: 0", "[", "models: {a: {engine: {parallel: x}}}"],
)
async def test_a_broken_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str) -> None:
    """It changes nothing, which is said once in the log and stays in the status until it is
    repaired."""
    async with live(tmp_path, "aliases: {old: a}") as server:
        await server.write(f"aliases: {{new: a}}\n{broken}")
        await server.looks.take(5)
        assert (await server.chat("old")).status_code == 200
        error = (await server.admin("status"))["config_error"]
        assert str(server.path) in error
        answer = await server.client.post("/admin/config/reload")
        assert (answer.status_code, error in answer.json()["error"]["message"]) == (400, True)
        said = [r for r in caplog.records if "configuration stays as it is" in r.message]
        assert [(r.levelname, error in r.getMessage()) for r in said] == [("ERROR", True)]
        await server.write("aliases: {new: a}")
        assert (await server.admin("status"))["config_error"] is None
        assert [(await server.chat(name)).status_code for name in ("old", "new")] == [404, 200]


async def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    """Emptied is not yet written: an empty file means the defaults, an open /admin among them."""
    async with live(tmp_path, "aliases: {old: a}") as server:
        server.path.write_text("")
        await server.looks.take()
        assert server.registry.config == server.config
        await server.write("aliases: {new: a}")
        assert server.registry.config.aliases == {"new": "a"}


async def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    """An editor's rename is seen, even where size and time stay the same."""
    async with live(tmp_path, "aliases: {old: a}") as server:
        old, new = server.path.stat(), tmp_path / "config.yaml~"
        new.write_text(server.base + "aliases: {new: a}")
        os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
        new.replace(server.path)
        assert server.path.stat().st_mtime_ns == old.st_mtime_ns
        await server.looks.take(2)
        assert [(await server.chat(name)).status_code for name in ("old", "new")] == [404, 200]


async def test_a_file_that_is_deleted(tmp_path: Path) -> None:
    """What it said stays, which is said; it counts again when it is back as it was."""
    async with live(tmp_path, "aliases: {old: a}") as server:
        server.path.unlink()
        await server.looks.take(3)
        assert "gone" in (await server.admin("status"))["config_error"]
        assert (await server.client.post("/admin/config/reload")).status_code == 400
        assert (await server.chat("old")).status_code == 200
        await server.write("aliases: {old: a}")
        assert (await server.admin("status"))["config_error"] is None


async def test_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts when it appears later; when it is gone again the defaults do not come back."""
    monkeypatch.setenv("HOME", str(tmp_path))
    server, path = Live(tmp_path, ""), tmp_path / ".opta-lmx" / "config.yaml"
    path.parent.mkdir()
    server.file = ConfigFile(path, partial(load_config, None), next_look=server.looks.next)
    server.path, server.base, server.config = path, "", server.file.read()
    async with server.serve():
        await server.write("aliases: {old: a}")
        assert (await server.chat("old")).status_code == 200
        path.unlink()
        await server.looks.take(2)
        for _ in range(2):
            assert (await server.client.post("/admin/config/reload")).status_code == 400
        assert (await server.chat("old")).status_code == 200


async def test_asked_by_a_signal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that has not changed is read again at the next look."""
    async with live(tmp_path) as server:
        server.file.ask()
        await server.looks.take(3)
        assert caplog.text.count("the configuration is read: as before") == 1


async def test_a_scan_that_began_under_the_old_configuration(tmp_path: Path) -> None:
    """What it finds is not what names mean from then on."""
    server = Live(tmp_path, "model_roots: [/more]")
    begun, go_on = threading.Event(), threading.Event()

    def find_models(config: Config) -> list[Model]:
        if config is server.config:
            begun.set()
            assert go_on.wait(TIMEOUT)
        return server.find_models(config)

    async with open_registry(
        server.config, server.queue, meter=server.world, find_models=find_models
    ) as registry:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(registry.models)
            await anyio.to_thread.run_sync(begun.wait, TIMEOUT)
            apply(registry, server.queue, structs.replace(server.config, model_roots=()))
            go_on.set()
        with pytest.raises(ModelNotFound):
            await registry.resolve("moved")


def test_the_program(tmp_path: Path) -> None:
    """A hangup does not end it but has the file read again; flags win over the file then too."""
    (file := tmp_path / "config.yaml").write_text(f"models_dir: {tmp_path}\nmodel_roots: []\n")
    with serving(tmp_path, "--config", str(file), "--log-level", "debug") as server:
        with file.open("a") as config:
            config.write("log_level: error\nqueue_size: 7\n")
        server.process.send_signal(signal.SIGHUP)
        while server.get("/health").json()["queue"]["size"] != 7:
            assert server.process.poll() is None
        assert server.get("/admin/config").json()["log_level"] == "debug"
