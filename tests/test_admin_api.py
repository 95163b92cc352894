"""The admin API over HTTP, with runners that only take memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from lmx.app import ROUTES
from lmx.config import Config, load_config
from lmx.errors import ModelLoadFailed
from lmx.reload import ConfigFile

from .fake_world import MB, NEED, World, app_over

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def world() -> World:
    world = World()
    world.add("a", architecture="llama", parameters=135_000_000)
    world.add("b")
    return world


@contextmanager
def serving(
    world: World,
    tmp_path: Path,
    *,
    config_file: ConfigFile | None = None,
    peer: str = "127.0.0.1",
    **settings: Any,
) -> Iterator[TestClient]:
    app = app_over(world, tmp_path, config_file, **settings)
    with TestClient(app, base_url="http://localhost", client=(peer, 1)) as client:
        yield client


@pytest.fixture
def admin(world: World, tmp_path: Path) -> Iterator[TestClient]:
    with serving(world, tmp_path) as client:
        yield client


def test_load_and_unload(admin: TestClient) -> None:
    """Loading what is loaded and unloading what is not are answered with its state."""
    for _ in range(2):
        answer = admin.post("/admin/model/load", json={"model": "A", "ttl_seconds": 60})
        assert answer.status_code == 200, answer.text
        loaded = answer.json()
        assert (loaded["id"], loaded["state"], loaded["ttl_seconds"]) == ("a", "ready", 60)
        assert loaded["loaded"]["memory"]["reserved"] == NEED
        assert loaded["loaded"]["engine"] == "fake 1.0"
        assert loaded["loaded"]["features"] == ["batch", "draft", "prefix"]
        assert loaded["loaded"]["problems"] == ["ragged: token 3 differs"]
        assert 59 < loaded["loaded"]["expires_in_seconds"] <= 60
    for _ in range(2):
        unloaded = admin.post("/admin/model/unload", json={"model": "a"}).json()
        assert (unloaded["state"], unloaded["loaded"]) == ("available", None)


def test_models(admin: TestClient, world: World) -> None:
    """Every model with its state, the broken ones with the reason."""
    world.add("broken", error="config.json: not JSON")
    admin.post("/admin/model/load", json={"model": "b"})
    models = {model["id"]: model for model in admin.get("/admin/models").json()["models"]}
    assert {id: model["state"] for id, model in models.items()} == {
        "a": "available",
        "b": "ready",
        "broken": "available",
    }
    assert models["a"]["architecture"] == "llama" and models["a"]["parameters"] == 135_000_000
    assert not models["broken"]["loadable"] and models["broken"]["error"] == "config.json: not JSON"
    assert admin.get("/admin/models/b").json() == models["b"]
    assert [m["id"] for m in admin.get("/v1/models").json()["data"]] == ["a", "b"]


def test_a_model_whose_files_are_gone(admin: TestClient, world: World) -> None:
    """As long as it is in memory it is listed, once, and can be unloaded; not offered, though."""
    admin.post("/admin/model/load", json={"model": "a"})
    del world.models["a"]
    for _ in range(3):
        models = admin.get("/admin/models").json()["models"]
        assert [(m["id"], m["state"]) for m in models] == [("b", "available"), ("a", "ready")]
    assert [m["id"] for m in admin.get("/v1/models").json()["data"]] == ["b"]
    assert admin.post("/admin/model/unload", json={"model": "a"}).json()["state"] == "available"
    assert admin.get("/admin/models/a").status_code == 404


def test_status(admin: TestClient) -> None:
    """Memory by model, the limit and what makes it, the queue, rates."""
    before = admin.get("/admin/status").json()
    admin.post("/admin/model/load", json={"model": "a"})
    status = admin.get("/admin/status").json()
    assert status["memory"]["total"] == 2048 * MB
    assert "90% of 2.00 GB" in status["memory"]["rule"]
    assert status["memory"]["models"] == NEED
    assert status["memory"]["free"] == before["memory"]["free"] - NEED
    assert status["models"]["a"]["memory"]["measured"] == NEED
    assert status["models"]["a"]["padding"] == 0.0
    assert status["queue"] == {"outstanding": 0, "size": 128}
    assert status["tokens_per_second"] == 0


def test_pin(admin: TestClient) -> None:
    """A pinned model has no idle time; unpinned it has its own again."""
    pinned = admin.post("/admin/model/pin", json={"model": "a"}).json()
    assert (pinned["pinned"], pinned["ttl_seconds"]) == (True, None)
    unpinned = admin.post("/admin/model/pin", json={"model": "a", "pinned": False}).json()
    assert (unpinned["pinned"], unpinned["ttl_seconds"]) == (False, 3600)


def test_a_load_that_fails(admin: TestClient, world: World) -> None:
    """The reason is in the answer and stays in the list."""
    world.failures["a"] = ModelLoadFailed("model.safetensors: cut short")
    answer = admin.post("/admin/model/load", json={"model": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_load_failed")
    model = admin.get("/admin/models/a").json()
    assert (model["state"], model["error"]) == ("failed", "model.safetensors: cut short")


def test_a_load_that_does_not_fit(admin: TestClient, world: World) -> None:
    """503, told not to be tried again by itself, with the numbers."""
    world.add("giant", 3000 * MB)
    answer = admin.post("/admin/model/load", json={"model": "giant"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_memory")
    assert "needs 3." in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("load", {}, 400, "model"),
        ("load", {"model": 1}, 400, "model"),
        ("load", {"model": "a", "tll": 1}, 400, "tll"),
        ("load", {"model": "a", "ttl_seconds": 0}, 400, "ttl_seconds"),
        ("load", {"model": "nobody"}, 404, "model"),
        ("unload", {"model": "nobody"}, 404, "model"),
        ("unload", {"model": "a", "force": "yes"}, 400, "force"),
        ("pin", {"model": "../../etc/passwd"}, 404, "model"),
        ("verify", {"model": "/etc/passwd"}, 404, "model"),
        ("verify", {"model": "a"}, 409, None),
        ("delete", {"model": "a"}, 409, None),
        ("delete", {"model": "a\0"}, 404, "model"),
        ("delete", {"model": "x" * 10_000}, 404, "model"),
        ("download", {"model": "../x"}, 400, None),
        ("download", {"model": "/etc/passwd"}, 400, None),
        ("download", {"model": "x" * 10_000}, 400, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(
    admin: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    """A clear error that names the field; nothing on the disk or the network is touched."""
    answer = admin.post(f"/admin/model/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] in (param, "model")
    assert len(answer.text) < 1000


def test_unknown_downloads(admin: TestClient) -> None:
    """404, in the shape of every error."""
    for method, path in (("GET", "x"), ("GET", "x/events"), ("POST", "x/cancel")):
        answer = admin.request(method, f"/admin/downloads/{path}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "job_not_found"
    assert admin.get("/admin/downloads").json() == {"downloads": []}


def test_it_is_not_for_everybody(world: World, tmp_path: Path) -> None:
    """Each route of /admin refuses strangers, before its handler has run; /v1 does not."""
    with serving(world, tmp_path, peer="8.8.8.8") as stranger:
        for path, methods in admin_routes():
            answer = stranger.request(methods, path.replace("{id}", "a"), content=b"")
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert stranger.get("/v1/models").status_code == 200
    with serving(world, tmp_path, admin_key="s3cret") as client:
        assert client.get("/admin/status").status_code == 401
        for key, status in (("s3cret", 200), ("s3cre", 401)):
            answer = client.get("/admin/status", headers={"X-Admin-Key": key})
            assert answer.status_code == status
        shown = client.get("/admin/config", headers={"X-Admin-Key": "s3cret"})
        assert shown.json()["admin_key"] == "***" and "s3cret" not in shown.text


def test_config(world: World, tmp_path: Path) -> None:
    """What can change does so at once, the rest says that it needs a restart."""
    file = tmp_path / "config.yaml"
    file.write_text(f"models_dir: {tmp_path}/models\nstate_file: {tmp_path}/state.json\n")

    def read() -> Config:
        return load_config(file)

    with serving(world, tmp_path, config_file=ConfigFile(file, read)) as admin:
        nothing: dict[str, Any] = {"changed": [], "need_restart": [], "need_load": []}
        assert admin.post("/admin/config/reload").json() == nothing
        with file.open("a") as config:
            config.write("port: 4321\nqueue_size: 7\naliases: {gpt-4o: a}\nttl_seconds: 5.0\n")
        reloaded = admin.post("/admin/config/reload").json()
        assert reloaded["need_restart"] == ["port"]
        assert sorted(reloaded["changed"]) == ["aliases", "queue_size", "ttl_seconds"]
        shown = admin.get("/admin/config").json()
        assert (shown["port"], shown["queue_size"]) == (1234, 7)
        model = admin.get("/admin/models/GPT-4o").json()
        assert (model["id"], model["aliases"], model["ttl_seconds"]) == ("a", ["gpt-4o"], 5.0)
        assert admin.get("/health").json()["queue"]["size"] == 7
        file.write_text("prot: 1\n")
        answer = admin.post("/admin/config/reload")
        assert answer.status_code == 400 and "prot" in answer.json()["error"]["message"]
        assert admin.get("/admin/config").json() == shown


def admin_routes() -> list[tuple[str, str]]:
    [mount] = [route for route in ROUTES if isinstance(route, Mount)]
    return [
        (f"/admin{re.sub(':path', '', route.path)}", min(route.methods - {"HEAD"}))
        for route in mount.routes
        if isinstance(route, Route) and route.methods
    ]


def test_the_document_has_every_route(admin: TestClient) -> None:
    """/openapi.json describes each route: summary, body, answer; and every reference resolves."""
    document = admin.get("/openapi.json").json()
    described = {
        (path, method.upper()) for path, methods in document["paths"].items() for method in methods
    }
    assert set(admin_routes()) < described
    assert ("/v1/chat/completions", "POST") in described
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], path
            assert ("requestBody" in operation) == (
                method == "post" and "{id}" not in path and "reload" not in path
            )
    names = set(re.findall(r'"#/components/schemas/(\w+)"', msgspec.json.encode(document).decode()))
    assert names <= document["components"]["schemas"].keys()
    assert {"ChatCompletionRequest", "ChatCompletion", "AdminModel", "JobStatus"} <= names
    load = document["components"]["schemas"]["LoadModel"]
    assert load["required"] == ["model"] and "ttl_seconds" in load["properties"]


def test_the_readme_has_every_route() -> None:
    """Each route of /admin stands in README's table."""
    for path, method in admin_routes():
        assert f"`{method} {path}`" in README, f"{method} {path}"
