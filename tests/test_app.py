"""The application: one shape for every error, a request id everywhere, and its life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from lmx.app import Outermost, create_app
from lmx.config import Config
from lmx.errors import LMXError, QueueFull, ServerStopping
from lmx.inference import InferenceQueue
from lmx.records import Requests
from lmx.registry import Registry
from tests.fake_client import Client
from tests.fake_models import GOOD, Server

from .asking import delta


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error of a response that has the one shape there is."""
    assert response.headers["content-type"] == "application/json"
    [(key, error)] = response.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    return dict(error)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v2/models", 404, "unknown_url"),
        ("POST", "/chat/completions", 404, "unknown_url"),
        ("GET", "/v1/models/cat", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/parrot", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", 400, None),
    ],
)
def test_every_refusal_has_one_shape(
    client: TestClient, method: str, path: str, status: int, code: str | None
) -> None:
    """Whatever is wrong with a request, the error object is OpenAI's."""
    response = client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_an_unknown_url_is_named(client: TestClient) -> None:
    """The message says which method and path do not exist, as the client wrote them."""
    message = error_of(client.post("/v1/chat/complétions"))["message"]
    assert message.startswith("Unknown request URL: POST /v1/chat/complétions. ")


def test_a_wrong_method_learns_the_right_one(client: TestClient) -> None:
    """A 405 carries the Allow header that RFC 9110 asks for."""
    assert client.get("/v1/chat/completions").headers["allow"] == "POST"
    assert set(client.put("/v1/models").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_head(client: TestClient) -> None:
    """HEAD answers like GET, without a body."""
    response = client.head("/v1/models")
    assert response.status_code == 200
    assert response.content == b""


def test_a_trailing_slash_leads_to_the_same_place(client: TestClient) -> None:
    """LM Studio takes no notice of a slash at the end, so clients may send one."""
    assert client.post("/v1/chat/completions/", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    "error", [QueueFull("full", retry_after=3), ServerStopping("stopping", retry_after=3)]
)
def test_retry_after(server: Server, client: TestClient, error: LMXError) -> None:
    """A refusal that will pass says when to come back."""
    server.queue.refusal = error
    response = client.post("/v1/chat/completions", json=GOOD)
    assert response.status_code == error.status
    assert response.headers["retry-after"] == "3"
    assert error_of(response) == error.to_body()["error"]


def test_no_retry_after(client: TestClient) -> None:
    """An error that will not pass says nothing about coming back."""
    assert "retry-after" not in client.get("/v1/models/cat").headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bug_is_a_500(
    server: Server, client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """An unforeseen exception is logged and answered without its text, and goes no further."""
    server.queue.refusal = ValueError("secret")
    response = client.post("/v1/chat/completions", json=GOOD | {"stream": stream})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "ValueError: secret" in caplog.text
    server.queue.refusal = None
    assert client.post("/v1/chat/completions", json=GOOD).status_code == 200


def test_our_own_500_is_logged(
    server: Server, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the engine is in the log as well as in the answer."""
    server.queue.steps = [LMXError("the engine failed")]
    assert client.post("/v1/chat/completions", json=GOOD).status_code == 500
    assert "the engine failed" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/nowhere", None),
        ("POST", "/v1/chat/completions", GOOD),
        ("POST", "/v1/chat/completions", GOOD | {"stream": True}),
    ],
)
def test_every_response_has_a_request_id(
    client: TestClient, method: str, path: str, body: Any
) -> None:
    """Each response has an id of its own, unless the client brought one."""
    first, second = (client.request(method, path, json=body) for _ in range(2))
    assert first.headers["x-request-id"].startswith("req_")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    mine = client.request(method, path, json=body, headers={"X-Request-Id": "trace-1:a_b.c"})
    assert mine.headers["x-request-id"] == "trace-1:a_b.c"


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "<script>", "a\tb", "ä"])
def test_a_strange_request_id_is_replaced(client: TestClient, value: str) -> None:
    """An id that could harm a log is not repeated."""
    response = client.get("/health", headers={b"X-Request-Id": value.encode()})
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.anyio
async def test_a_failure_in_the_middle_of_a_response_cuts_the_connection() -> None:
    """Half a response must not look whole: the server gets the exception and closes."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        raise ValueError("in the middle")

    client = Client()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(ValueError, match="in the middle"):
        await Outermost(app, Requests())(scope, client.receive, client.send)
    assert [message["type"] for message in client.sent] == ["http.response.start"]


def test_an_error_in_a_stream_keeps_the_server_going(server: Server, client: TestClient) -> None:
    """A bug after the first token ends that stream only."""
    server.queue.steps = [[delta(1, "a", 1)], ValueError("bug")]
    response = client.post("/v1/chat/completions", json=GOOD | {"stream": True})
    assert response.status_code == 200
    assert b"server_error" in response.content.split(b"data: ")[-1]
    assert client.get("/health").status_code == 200


def test_the_registry_lives_as_long_as_the_server() -> None:
    """It is opened with the config and the queue before any request, and closed at the end."""
    server = Server()
    life: list[object] = []

    @asynccontextmanager
    async def fake_registry(config: Config, queue: InferenceQueue) -> AsyncIterator[Registry]:
        life.extend([config, queue])
        yield server.registry
        life.append("closed")

    app = create_app(server.config, server.queue, open_registry=fake_registry)
    with TestClient(app) as client:
        assert life == [server.config, server.queue]
        client.get("/health")
    assert life == [server.config, server.queue, "closed"]


def test_the_real_parts_fit(tmp_path: Path) -> None:
    """With nothing replaced the application starts, answers and stops."""
    config = Config(models_dir=str(tmp_path / "models"))
    with TestClient(create_app(config, InferenceQueue(config))) as client:
        assert client.get("/health").json()["queue"] == {"outstanding": 0, "size": 128}
        assert client.get("/v1/models").status_code == 200
        unknown = client.post("/v1/chat/completions", json=GOOD)
        assert (unknown.status_code, error_of(unknown)["param"]) == (404, "model")
