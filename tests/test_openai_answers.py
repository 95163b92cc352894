"""Calls, reasoning, logprobs and several answers, as OpenAI's client gets them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionStreamOptionsParam
from starlette.testclient import TestClient

from lmx.generation import Part, TokenLogprob
from lmx.messages import Finished
from lmx.openai_answers import token_text
from tests.fake_models import GOOD, HELLO, Server, Step, says

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
    for name in ("f", "g")
]

CALLS: Sequence[Step] = (
    [says(Part("reasoning", "Let me "))],
    [says(Part("reasoning", "see."), "I call ")],
    [says("two.", Part("call", "f", "call_1"), Part("arguments", '{"a"'))],
    [says(Part("arguments", ": 1}")), says(Part("call", "g", "call_2"), Part("arguments", "{}"))],
    [says(finish="tool_calls"), Finished(1, 9, 4)],
)

ONLY_CALLS: Sequence[Step] = (
    [says(Part("call", "f", "call_1"))],
    [says(Part("arguments", "{}"), finish="tool_calls"), Finished(1, 2)],
)


def post(client: TestClient, **fields: Any) -> Any:
    response = client.post("/v1/chat/completions", json=GOOD | fields)
    assert response.status_code == 200, response.text
    return response.json()


def choices_of(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The choice of each chunk of a stream."""
    response = client.post("/v1/chat/completions", json=GOOD | fields | {"stream": True})
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


def deltas_of(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    return [choice["delta"] for choice in choices_of(client, **fields)]


def test_calls_and_reasoning_in_a_whole_answer(server: Server, client: TestClient) -> None:
    """Reasoning, content and calls stand in fields of their own."""
    server.queue.steps = CALLS
    answer = post(client, tools=TOOLS)
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "I call two.",
        "reasoning_content": "Let me see.",
        "refusal": None,
        "annotations": [],
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": 1}'},
            },
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


def test_calls_and_reasoning_in_a_stream(server: Server, client: TestClient) -> None:
    """A call begins with its index, id and name; then come its arguments as they are written."""
    server.queue.steps = CALLS
    deltas = deltas_of(client, tools=TOOLS)
    first, second = (
        {"index": i, "id": f"call_{i + 1}", "type": "function", "function": function}
        for i, function in enumerate(
            ({"name": "f", "arguments": ""}, {"name": "g", "arguments": ""})
        )
    )
    assert deltas == [
        {"role": "assistant", "content": None},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"content": "I call "},
        {"content": "two."},
        {"tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [second]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]


@pytest.mark.parametrize(
    ("parts", "tools", "content"),
    [
        ([Part("call", "f", "1"), Part("arguments", "{}")], TOOLS, None),
        ([Part("reasoning", "r"), Part("call", "f", "1"), Part("arguments", "{}")], TOOLS, None),
        ([Part("reasoning", "r")], TOOLS, ""),
        ([Part("reasoning", "r")], [], ""),
        ([], TOOLS, ""),
        ([], [], ""),
    ],
)
def test_content_is_null_only_beside_calls(
    server: Server, client: TestClient, parts: list[Part], tools: list[Any], content: str | None
) -> None:
    """A message of calls alone has null as content, any other without text an empty one."""
    server.queue.steps = [[says(*parts, finish="stop"), Finished(1, 1)]]
    assert post(client, tools=tools)["choices"][0]["message"]["content"] == content
    contents = [delta.get("content") for delta in deltas_of(client, tools=tools)]
    assert "".join(filter(None, contents)) == ""
    assert ("" in contents) == (content == "")


def logprob(token: bytes, p: float = -0.5, *top: tuple[bytes, float]) -> TokenLogprob:
    return TokenLogprob(token, p, list(top))


EURO = "€".encode()
LOGPROBS: Sequence[Step] = (
    [says(Part("reasoning", "r"))],
    [says("a", logprobs=[logprob(b"a", -0.25, (b"a", -0.25), (b"b", -math.inf))])],
    [says("€", logprobs=[logprob(EURO[:2], -1.0), logprob(EURO[2:] + b"!", -math.inf)])],
    [says("x", logprobs=[logprob(b"x")], finish="stop"), Finished(1, 4)],
)


def test_logprobs(server: Server, client: TestClient) -> None:
    """Each token of the content with its bytes; half a character is written as OpenAI does."""
    server.queue.steps = LOGPROBS
    logprobs = post(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert logprobs["content"][0] == {
        "token": "a",
        "logprob": -0.25,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]},
            {"token": "b", "logprob": -9999.0, "bytes": [98]},
        ],
    }
    assert [(t["token"], t["logprob"], t["bytes"]) for t in logprobs["content"][1:]] == [
        ("bytes:\\xe2\\x82", -1.0, [0xE2, 0x82]),
        ("bytes:\\xac!", -9999.0, [0xAC, 0x21]),
        ("x", -0.5, [0x78]),
    ]


def test_logprobs_come_with_their_text(server: Server, client: TestClient) -> None:
    """A chunk of content has the logprobs of its tokens, any other has none."""
    server.queue.steps = LOGPROBS
    choices = choices_of(client, logprobs=True)
    found = [
        (choice["delta"].get("content"), len(choice["logprobs"]["content"]))
        for choice in choices
        if choice["logprobs"]
    ]
    assert found == [("", 0), ("a", 1), ("€", 2), ("x", 1)]


def test_logprobs_without_text_are_not_lost(server: Server, client: TestClient) -> None:
    """Logprobs that come without content get a chunk of their own."""
    server.queue.steps = [[says(logprobs=[logprob(b"a")])], [says(finish="stop"), Finished(1, 1)]]
    assert [t["token"] for t in post(client, logprobs=True)["choices"][0]["logprobs"]["content"]]
    assert len(choices_of(client, logprobs=True)) == 3


def test_no_logprobs_unless_asked_for(client: TestClient) -> None:
    """The field is null; when it was asked for, an answer without content has an empty list."""
    assert post(client)["choices"][0]["logprobs"] is None
    assert post(client, logprobs=True)["choices"][0]["logprobs"]["content"] == []


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (b"", ""),
        ("é".encode(), "é"),
        (b" \xf0\x9f", "bytes: \\xf0\\x9f"),
        (b"\xff", "bytes:\\xff"),
        (b"\\x", "\\x"),
    ],
)
def test_token_text(token: bytes, text: str) -> None:
    """A token is its text, and what is no UTF-8 in it is escaped and marked."""
    assert token_text(token) == text


MANY: Sequence[Step] = (
    [says("b", index=1), says("c", index=2), says("a", index=0)],
    [says("B", index=1, finish="stop"), says("A", index=0)],
    [says(index=0, finish="stop"), says("C", index=2, finish="stop"), Finished(1, 6)],
)

MANY_CALLS: Sequence[Step] = (
    [says(Part("call", "f", "call_1"), index=1)],
    [says("a", logprobs=[logprob(b"a")]), says(Part("arguments", "{}"), index=1)],
    [says(finish="stop"), says(finish="tool_calls", index=1), Finished(1, 2)],
)


def test_several_answers(server: Server, client: TestClient) -> None:
    """Each has its index, role and finish reason; the usage counts all."""
    server.queue.steps = MANY
    answer = post(client, n=3)
    found = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
    assert found == [(0, "aA", "stop"), (1, "bB", "stop"), (2, "cC", "stop")]
    assert answer["usage"]["completion_tokens"] == 6
    choices = choices_of(client, n=3)
    assert [c["index"] for c in choices if "role" in c["delta"]] == [0, 1, 2]
    assert [c["index"] for c in choices if c["finish_reason"]] == [1, 0, 2]


@pytest.fixture
def sdk(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="lm-studio", http_client=client, max_retries=0
    )


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (HELLO, {}),
        (HELLO, {"tools": TOOLS}),
        (CALLS, {"tools": TOOLS}),
        (ONLY_CALLS, {"tools": TOOLS}),
        (LOGPROBS, {"logprobs": True, "top_logprobs": 2}),
        (MANY, {"n": 3}),
        (MANY_CALLS, {"n": 2, "tools": TOOLS, "logprobs": True}),
    ],
    ids=["text", "tools", "calls", "calls-only", "logprobs", "n", "all"],
)
def test_the_sdk_reads_the_same_answer_both_ways(
    server: Server, sdk: openai.OpenAI, steps: Sequence[Step], fields: dict[str, Any]
) -> None:
    """The stream, put together by the official client, is the whole answer."""
    server.queue.steps = steps
    whole = sdk.chat.completions.create(**GOOD, **fields).model_dump(exclude_none=True)
    usage: ChatCompletionStreamOptionsParam = {"include_usage": True}
    with sdk.chat.completions.stream(**GOOD, **fields, stream_options=usage) as stream:
        streamed = stream.get_final_completion().model_dump(exclude_none=True)
    for answer in (whole, streamed):
        del answer["id"], answer["created"]
        for choice in answer["choices"]:
            choice["message"].pop("annotations", None)  # a stream cannot carry it
            for call in choice["message"].get("tool_calls", ()):
                call.pop("index", None)  # what the client adds
                call["function"].pop("parsed_arguments", None)
    assert streamed == whole
