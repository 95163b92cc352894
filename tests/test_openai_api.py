"""OpenAI's endpoints over a fake model: exact answers, and what a client's leaving does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anyio
import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from starlette.testclient import TestClient

from lmx import __version__
from lmx.chat_schema import ChatCompletionRequest
from lmx.config import Config, ModelSettings
from lmx.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    LMXError,
    ModelLoadFailed,
    QueueFull,
    RunnerDied,
)
from lmx.generation import Chat, ChatMessage, GenerationRequest
from lmx.messages import Finished
from tests.fake_client import Client
from tests.fake_models import GOOD, Server, says


@pytest.fixture
def sdk(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="lm-studio", http_client=client, max_retries=0
    )


def chat(client: TestClient, **fields: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json=GOOD | fields)


def data_of(response: httpx2.Response) -> list[str]:
    """The data of each event of a stream."""
    events = response.text.split("\n\n")
    assert events.pop() == ""
    return [event.removeprefix("data: ") for event in events]


def test_models(client: TestClient) -> None:
    """Every model on disk is listed with the fields of OpenAI's model object."""
    assert client.get("/v1/models").json() == {
        "object": "list",
        "data": [
            {"id": "parrot", "object": "model", "created": 1_700_000_000, "owned_by": "bird"},
            {
                "id": "zoo/owl/owl-q4.gguf",
                "object": "model",
                "created": 1_700_000_001,
                "owned_by": "zoo",
            },
            {
                "id": "text-embedding-bee",
                "object": "model",
                "created": 1_700_000_002,
                "owned_by": "hive",
            },
        ],
    }
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("parrot", "parrot"),
        ("PARROT", "parrot"),
        ("bird/parrot", "parrot"),
        ("zoo/owl/owl-q4.gguf", "zoo/owl/owl-q4.gguf"),
        ("zoo%2Fowl", "zoo/owl/owl-q4.gguf"),
    ],
)
def test_model(client: TestClient, name: str, id: str) -> None:
    """One model is found by any of its names, slashes included."""
    assert client.get(f"/v1/models/{name}").json()["id"] == id


def test_unknown_model(client: TestClient) -> None:
    """An unknown model is a 404 that lists what there is."""
    response = client.get("/v1/models/../../etc/passwd%0d%0a")
    assert response.status_code == 404
    error = client.get("/v1/models/cat").json()["error"]
    assert error["code"] == "model_not_found"
    assert "parrot" in error["message"]


def test_health(client: TestClient) -> None:
    """Health names the version, the models and the queue."""
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "version": __version__,
        "models": [],
        "queue": {"outstanding": 0, "size": 128},
    }


def test_whole_answer(client: TestClient) -> None:
    """A chat completion has exactly OpenAI's fields, and the id of the model that answered."""
    answer = chat(client, model="Bird/Parrot").json()
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer.pop("id"))
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "parrot",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello, wörld!",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 6,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "system_fingerprint": f"lmx {__version__}, fake 1.0",
    }


def test_stream(client: TestClient) -> None:
    """Role, text as it comes, finish reason, [DONE]; the same id and time in every chunk."""
    *chunks, done = data_of(chat(client, stream=True))
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({(chunk.pop("id"), chunk.pop("created")) for chunk in parsed}) == 1
    rest = {
        "object": "chat.completion.chunk",
        "model": "parrot",
        "system_fingerprint": f"lmx {__version__}, fake 1.0",
    }

    def choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {"choices": [choice]}

    assert parsed == [
        rest | choice({"role": "assistant", "content": ""}),
        rest | choice({"content": "Hello"}),
        rest | choice({"content": ", wö"}),
        rest | choice({"content": "rld"}),
        rest | choice({"content": "!"}),
        rest | choice({}, "stop"),
    ]


def test_stream_with_usage(client: TestClient) -> None:
    """`include_usage` adds a chunk without choices, and a null usage to all others."""
    *chunks, done = data_of(chat(client, stream=True, stream_options={"include_usage": True}))
    *others, last = (json.loads(chunk) for chunk in chunks)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == chat(client).json()["usage"]
    assert all(chunk["usage"] is None for chunk in others)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_service_tier_is_answered_when_asked_for(client: TestClient, stream: bool) -> None:
    """The tier a request asks for is echoed; `auto` is no tier."""
    for asked, told in (("flex", "flex"), ("auto", "default")):
        response = chat(client, stream=stream, service_tier=asked)
        answer = json.loads(data_of(response)[0]) if stream else response.json()
        assert answer["service_tier"] == told


def test_what_the_model_is_asked(server: Server, client: TestClient) -> None:
    """Messages and sampling reach the queue as the request says, the rest from the config."""
    chat(client, temperature=0, max_tokens=5)
    [asked] = server.queue.asked
    assert isinstance(asked, GenerationRequest)
    assert asked.prompt == Chat([ChatMessage("user", "hi")])
    assert (asked.params.temperature, asked.params.max_tokens) == (0.0, 5)
    assert asked.params.top_k == server.config.sampling.top_k


def test_an_answer_cut_by_max_tokens(server: Server, client: TestClient) -> None:
    """The finish reason is the runner's."""
    server.queue.steps = [[says("a", finish="length"), Finished(1, 1)]]
    assert chat(client).json()["choices"][0]["finish_reason"] == "length"


def test_an_empty_answer(server: Server, client: TestClient) -> None:
    """A model that says nothing gives empty content, not none."""
    server.queue.steps = [[says(finish="stop"), Finished(1, 1)]]
    assert chat(client).json()["choices"][0]["message"]["content"] == ""
    assert [json.loads(d)["choices"] for d in data_of(chat(client, stream=True))[:-1]] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]


def test_what_was_drafted(server: Server, client: TestClient) -> None:
    """LM Studio's stats say how good the draft was, beside the usage; without a draft, nothing."""
    server.queue.steps = [
        [says("a", finish="stop"), Finished(1, 9, drafted_tokens=6, accepted_tokens=4)]
    ]
    counts = {
        "total_draft_tokens_count": 6,
        "accepted_draft_tokens_count": 4,
        "rejected_draft_tokens_count": 2,
    }
    assert chat(client).json()["stats"] == counts
    model = ModelSettings(engine={"draft_model": "owl"})
    server.registry.config = Config(models={"parrot": model})
    *others, last, _ = data_of(chat(client, stream=True, stream_options={"include_usage": True}))
    assert json.loads(last)["stats"] == {"draft_model": "owl"} | counts
    assert all("stats" not in json.loads(chunk) for chunk in others)


def test_a_draft_model_is_configured_and_not_chosen(server: Server, client: TestClient) -> None:
    """A request may name the one that is configured, by any of its names."""
    refused = chat(client, draft_model="zoo/owl").json()["error"]
    assert (refused["code"], refused["param"]) == ("unsupported_parameter", "draft_model")
    assert "models.parrot.engine" in refused["message"]
    model = ModelSettings(engine={"draft_model": "zoo/owl/owl-q4.gguf"})
    server.registry.config = Config(models={"parrot": model})
    assert chat(client, draft_model="zoo/owl").status_code == 200
    assert chat(client, draft_model="parrot").json()["error"]["code"] == "unsupported_parameter"
    unknown = chat(client, draft_model="cat")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "draft_model")


REFUSALS = [
    (QueueFull("full", retry_after=2), 429, openai.RateLimitError),
    (ContextLengthExceeded("long", param="messages"), 400, openai.BadRequestError),
    (RunnerDied("died"), 503, openai.InternalServerError),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("error", "status", "raised"), REFUSALS, ids=["full", "long", "died"])
def test_refusals_have_a_status(
    server: Server,
    sdk: openai.OpenAI,
    stream: bool,
    error: LMXError,
    status: int,
    raised: type[openai.APIStatusError],
) -> None:
    """What is refused before the first token is an HTTP error, streaming or not."""
    server.queue.refusal = error
    with pytest.raises(raised) as caught:
        sdk.chat.completions.create(**GOOD, stream=stream)
    assert caught.value.status_code == status
    assert (caught.value.code, caught.value.param) == (error.code, error.param)
    assert caught.value.type == error.type
    if error.retry_after:
        assert caught.value.response.headers["retry-after"] == str(error.retry_after)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_before_the_first_token_has_a_status(
    server: Server, client: TestClient, stream: bool
) -> None:
    """The prompt was accepted, but nothing has been sent yet: 500, which clients retry."""
    server.queue.steps = [GenerationFailed("failed")]
    assert chat(client, stream=stream).status_code == 500


def test_a_model_that_does_not_load(server: Server, sdk: openai.OpenAI) -> None:
    """The client learns that it is the model, and why."""
    server.registry.failure = ModelLoadFailed("weights.safetensors: not weights")
    with pytest.raises(openai.InternalServerError, match="not weights") as caught:
        sdk.chat.completions.create(**GOOD)
    assert caught.value.code == "model_load_failed"


def test_the_sdk_sees_bad_requests(sdk: openai.OpenAI) -> None:
    """The official client raises its own classes, with `param` and `code`."""
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(**GOOD, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(**GOOD | {"model": "cat"})
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


def test_a_failure_in_the_middle(server: Server, sdk: openai.OpenAI, client: TestClient) -> None:
    """The stream's last event is the error, which the official client raises; no [DONE]."""
    error = RunnerDied("The model's process ended.")
    server.queue.steps = [[says("Hel")], error]
    stream = sdk.chat.completions.create(**GOOD, stream=True)
    said = []
    with pytest.raises(openai.APIError, match="process ended") as caught:
        for chunk in stream:
            said.append(chunk.choices[0].delta.content)
    assert said == ["", "Hel"]
    assert caught.value.code == "runner_died"
    assert json.loads(data_of(chat(client, stream=True))[-1]) == error.to_body()
    assert chat(client).status_code == 503


def test_a_cancelled_generation_is_no_answer(server: Server, client: TestClient) -> None:
    """If the server itself gives a generation up, the client does not get a whole answer."""
    server.queue.steps = [[says("Hel"), Finished(1, 1, cancelled=True)]]
    assert chat(client).json()["error"]["code"] == "generation_failed"


def test_the_sdk_reads_the_same_answer_both_ways(sdk: openai.OpenAI) -> None:
    """The stream, put together by the official client, is the whole answer."""
    whole = sdk.chat.completions.create(**GOOD)
    with sdk.chat.completions.stream(**GOOD, stream_options={"include_usage": True}) as stream:
        streamed = stream.get_final_completion()
    assert stripped(streamed) == stripped(whole)
    assert whole.choices[0].message.content == "Hello, wörld!"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 13


def stripped(answer: ChatCompletion) -> dict[str, Any]:
    """Without what differs between two requests, and what a stream cannot carry."""
    fields = answer.model_dump(exclude_none=True, exclude={"id", "created"})
    fields["choices"][0]["message"].pop("annotations", None)
    return fields


def test_the_sdk_lists_models(sdk: openai.OpenAI) -> None:
    """The official client reads the list and a single model."""
    assert [model.id for model in sdk.models.list()] == [
        "parrot",
        "zoo/owl/owl-q4.gguf",
        "text-embedding-bee",
    ]
    assert sdk.models.retrieve("parrot").owned_by == "bird"


def scope(server: Server, path: str = "/v1/chat/completions") -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "state": {"registry": server.registry, "queue": server.queue},
    }


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("steps", [(), ([says("a")],)], ids=["prefill", "decode"])
async def test_a_client_that_leaves(server: Server, stream: bool, steps: tuple[Any, ...]) -> None:
    """Its generation is given up and its place in the queue is free again."""
    server.queue.steps = [*steps, anyio.Event()]
    client = Client(body=json.dumps(GOOD | {"stream": stream}).encode())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.app, scope(server), client.receive, client.send)
        await server.queue.waiting.wait()
        assert server.queue.outstanding == 1
        client.gone.set()
        await server.queue.left.wait()
    assert server.queue.outstanding == 0
    assert b"[DONE]" not in client.body


@pytest.mark.anyio
async def test_a_body_that_does_not_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops in the middle of its request gets a 408 and loses the connection."""
    monkeypatch.setattr("lmx.endpoint.BODY_SECONDS", 0.01)
    client = Client()
    await client.receive()
    await server.app(scope(server), client.receive, client.send)
    assert client.sent[0]["status"] == 408
    assert (b"connection", b"close") in client.sent[0]["headers"]
    assert json.loads(client.body)["error"]["code"] == "request_timeout"


@pytest.mark.anyio
async def test_a_client_that_leaves_while_it_sends(server: Server) -> None:
    """Half a request and a closed connection are no error of the server."""
    client = Client()
    await client.receive()
    client.gone.set()
    await server.app(scope(server), client.receive, client.send)
    assert client.sent[0]["status"] == 499


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_a_body_over_the_limit(chunked: bool) -> None:
    """A body that is, or says it is, too large is refused with 413, and nothing is generated."""
    server = Server(Config(max_body_bytes=1024))
    body = b" " * 1025
    with TestClient(server.app) as client:
        content = iter([body[:1000], body[1000:]]) if chunked else body
        response = client.post("/v1/chat/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_a_body_at_the_limit() -> None:
    """The limit itself is allowed."""
    server = Server(Config(max_body_bytes=1024))
    with TestClient(server.app) as client:
        content = json.dumps(GOOD).encode().ljust(1024)
        assert client.post("/v1/chat/completions", content=content).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "identity, gzip"])
def test_compressed_bodies_are_refused(client: TestClient, encoding: str) -> None:
    """A compressed body is a 415, whatever it holds."""
    headers = {"Content-Encoding": encoding}
    response = client.post("/v1/chat/completions", content=b"x", headers=headers)
    assert response.status_code == 415


def test_identity_is_no_encoding(client: TestClient) -> None:
    """`Content-Encoding: identity` says nothing and changes nothing."""
    headers = {"Content-Encoding": "identity"}
    assert client.post("/v1/chat/completions", json=GOOD, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[TestClient]:
    with TestClient(Server().app) as client:
        yield client


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["user", "assistant", "text", "auto", "json_object", "function", "required"])
    | st.sampled_from([2**63, 2**64, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "1", "include_usage", "function"])
            | st.sampled_from(["name", "arguments", "tool_calls", "parameters", "json"])
            | st.text(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)
FIELDS = ChatCompletionRequest.__struct_fields__


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(), JSON, min_size=1, max_size=3))
def test_no_json_breaks_the_server(fuzzed: TestClient, fields: dict[str, Any]) -> None:
    """Whatever stands in the fields, the answer is 200 or an error of the client's in one shape."""
    response = chat(fuzzed, **fields)
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        assert set(response.json()) == {"error"}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
