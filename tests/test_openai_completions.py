"""Completions and embeddings over fake models, and which model can do what."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from lmx import __version__
from lmx.completions_schema import CompletionRequest, EmbeddingsRequest
from lmx.generation import EmbeddingRequest, GenerationRequest, TokenLogprob
from lmx.messages import Embedded, Finished
from tests.fake_models import EMBEDDER, MODEL, Server, says


@pytest.fixture
def sdk(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="lm-studio", http_client=client, max_retries=0
    )


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": MODEL.id, "prompt": "hi", **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_whole_completion(server: Server, client: TestClient) -> None:
    """A completion has exactly OpenAI's fields."""
    answer = complete(client, service_tier="auto")
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("usage")["total_tokens"] == 13
    assert answer == {
        "object": "text_completion",
        "model": "parrot",
        "choices": [
            {"text": "Hello, wörld!", "index": 0, "logprobs": None, "finish_reason": "stop"}
        ],
        "service_tier": "default",
        "system_fingerprint": f"lmx {__version__}, fake 1.0",
    }
    [asked] = server.queue.asked
    assert isinstance(asked, GenerationRequest)
    assert (asked.prompt, asked.params.max_tokens) == (["hi"], 16)


def test_streamed_completion(client: TestClient) -> None:
    """Text as it comes, the finish reason, and the usage if it was asked for."""
    chunks = complete(client, stream=True, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    *pieces, usage = chunks
    found = [(c["text"], c["finish_reason"]) for chunk in pieces for c in chunk["choices"]]
    text = [("Hello", None), (", wö", None), ("rld", None), ("!", None)]
    assert found == [*text, ("", "stop")]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 13
    assert all(chunk["usage"] is None for chunk in pieces)
    assert all("usage" not in chunk for chunk in complete(client, stream=True))


def test_the_sdk_reads_completions(sdk: openai.OpenAI) -> None:
    """The official client gets the same text both ways."""
    whole = sdk.completions.create(model=MODEL.id, prompt="hi")
    stream = sdk.completions.create(model=MODEL.id, prompt="hi", stream=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in stream)


def test_answers_to_several_prompts(server: Server, client: TestClient) -> None:
    """Answer i to prompt p has the index p * n + i, in whatever order they come."""
    order = [3, 0, 2, 1]
    server.queue.steps = [
        [says(f"answer {i}", index=i, finish="stop") for i in order],
        [Finished(1, 4)],
    ]
    choices = complete(client, prompt=["a", "b"], n=2)["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(i, f"answer {i}") for i in range(4)]


def logprob(token: bytes, p: float, *top: tuple[bytes, float]) -> TokenLogprob:
    return TokenLogprob(token, p, list(top))


def test_logprobs_of_a_completion(server: Server, client: TestClient) -> None:
    """Lists by token: the likeliest ones and the drawn one, and where each begins in the text."""
    euro = "€".encode()
    server.queue.steps = [
        [says(" é", logprobs=[logprob(" é".encode(), -0.5, (b" a", -0.25), (b" b", -math.inf))])],
        [says("€", logprobs=[logprob(euro[:1], -1.0), logprob(euro[1:], -2.0)])],
        [says("!", logprobs=[logprob(b"!", -3.0)], finish="stop"), Finished(1, 4)],
    ]
    expected = {
        "tokens": [" é", "bytes:\\xe2", "bytes:\\x82\\xac", "!"],
        "token_logprobs": [-0.5, -1.0, -2.0, -3.0],
        "top_logprobs": [
            {" a": -0.25, " b": -9999.0, " é": -0.5},
            {"bytes:\\xe2": -1.0},
            {"bytes:\\x82\\xac": -2.0},
            {"!": -3.0},
        ],
        "text_offset": [0, 2, 3, 3],
    }
    assert complete(client, logprobs=2)["choices"][0]["logprobs"] == expected
    pieces = [chunk["choices"][0] for chunk in complete(client, logprobs=2, stream=True)]
    for field, values in expected.items():
        assert [v for p in pieces if p["logprobs"] for v in p["logprobs"][field]] == values


def test_the_best_of_several(server: Server, client: TestClient) -> None:
    """Of each prompt's answers those with the likeliest tokens come, likeliest first."""
    means = [-3.0, -1.0, -2.0, -1.0, -2.0, -3.0]
    server.queue.steps = [
        [says("a", index=i, logprobs=[logprob(b"a", p)]) for i, p in enumerate(means)],
        [says(f"{i}", index=i, logprobs=[logprob(b"x", p)]) for i, p in enumerate(means)],
        [says(index=i, finish="stop") for i in range(6)],
        [Finished(1, 12)],
    ]
    answer = complete(client, prompt=["p", "q"], n=2, best_of=3)
    found = [(c["index"], c["text"], c["logprobs"]) for c in answer["choices"]]
    assert found == [(i, text, None) for i, text in enumerate(["a1", "a2", "a3", "a4"])]
    assert answer["usage"]["completion_tokens"] == 12
    shown = complete(client, prompt=["p", "q"], n=1, best_of=3, logprobs=0)["choices"]
    assert [c["logprobs"]["token_logprobs"] for c in shown] == [[-1.0, -1.0], [-1.0, -1.0]]


def test_an_empty_answer_is_never_the_best(server: Server, client: TestClient) -> None:
    """An answer without a token has no likelihood to compare."""
    server.queue.steps = [
        [says(index=0, finish="stop")],
        [says("b", index=1, logprobs=[logprob(b"b", -9.0)], finish="stop"), Finished(1, 2)],
    ]
    assert complete(client, best_of=2)["choices"][0]["text"] == "b"


def test_a_cancelled_completion_is_no_answer(server: Server, client: TestClient) -> None:
    """Nor are embeddings that the server itself has given up."""
    server.queue.steps = [[Finished(1, cancelled=True)]]
    for path, field, model in (("completions", "prompt", MODEL), ("embeddings", "input", EMBEDDER)):
        response = client.post(f"/v1/{path}", json={"model": model.id, field: "hi"})
        assert response.json()["error"]["code"] == "generation_failed"


VECTORS = [[0.6, -0.8], [1.0, 0.0], [0.0, 1.0]]


@pytest.fixture
def embedding(server: Server) -> None:
    events = [Embedded(1, i, struct.pack("<2f", *VECTORS[i])) for i in (2, 0, 1)]
    server.queue.steps = [[events[0]], [*events[1:], Finished(1)]]


@pytest.mark.usefixtures("embedding")
def test_embeddings(server: Server, client: TestClient) -> None:
    """Vectors come in the order of the inputs, whatever order they were made in."""
    body = {"model": "hive/bee", "input": ["a", "b", "c"], "dimensions": 2}
    answer = client.post("/v1/embeddings", json=body).json()
    for item, vector in zip(answer["data"], VECTORS, strict=True):
        assert item.pop("embedding") == pytest.approx(vector)
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": i} for i in range(3)],
        "model": EMBEDDER.id,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    assert server.queue.asked == [EmbeddingRequest(["a", "b", "c"], 2)]


@pytest.mark.usefixtures("embedding")
def test_the_sdk_reads_embeddings(sdk: openai.OpenAI) -> None:
    """The official client asks for base64 and gets the same numbers as with floats."""
    wanted: dict[str, Any] = {"model": EMBEDDER.id, "input": ["a", "b", "c"]}
    decoded = sdk.embeddings.create(**wanted)
    floats = sdk.embeddings.create(**wanted, encoding_format="float")
    assert [item.embedding for item in decoded.data] == [item.embedding for item in floats.data]
    assert floats.data[0].embedding == pytest.approx(VECTORS[0])
    raw = sdk.embeddings.create(**wanted, encoding_format="base64").data[0].embedding
    assert raw == "mpkZP83MTL8="  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("chat/completions", EMBEDDER, {"messages": [{"role": "user", "content": "hi"}]}),
        ("completions", EMBEDDER, {"prompt": "hi"}),
        ("embeddings", MODEL, {"input": "hi"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_model_of_the_wrong_kind(
    server: Server, client: TestClient, path: str, model: Any, body: dict[str, Any], stream: bool
) -> None:
    """What a model cannot do is refused before it is loaded."""
    body = {"model": model.id, "stream": stream, **body}
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert server.queue.asked == []


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
    | st.sampled_from([2**63, 1e308, "float"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.__struct_fields__, *EmbeddingsRequest.__struct_fields__})


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_no_json_breaks_the_server(fuzzed: TestClient, fields: dict[str, Any]) -> None:
    """Whatever stands in the fields, the answer is 200 or an error of the client's."""
    for path, body in (
        ("completions", {"model": MODEL.id, "prompt": "hi"}),
        ("embeddings", {"model": EMBEDDER.id, "input": "hi"}),
    ):
        response = fuzzed.post(f"/v1/{path}", json=body | fields)
        assert response.status_code in (200, 400, 404)
