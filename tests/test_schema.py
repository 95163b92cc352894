"""What a chat client may send, and the exact JSON it gets back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.chat_schema import ChatCompletionChunk, ChatCompletionRequest, ChoiceDelta, ChunkChoice
from lmx.errors import InvalidRequest
from lmx.generation import SamplingParams, Usage
from lmx.schema import CompletionUsage

from .chatting import GOOD, allowed, called, named, nested, read, read_bytes, tool, user

FIELDS = ChatCompletionRequest.__struct_fields__

BAD: list[tuple[str, Any, str]] = [
    ("model", None, "model"),
    ("model", 1, "model"),
    ("draft_model", 1, "draft_model"),
    ("ttl", 0, "ttl"),
    ("ttl", "1h", "ttl"),
    ("messages", None, "messages"),
    ("messages", "hi", "messages"),
    ("messages", [], "messages"),
    ("messages", user("hi") * 4097, "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"content": "hi"}], "messages[0].role"),
    ("messages", [{"role": 1, "content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "robot", "content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "x" * 10_000, "content": "hi"}], "messages[0].role"),
    ("messages", [*user("hi"), {"role": "user"}], "messages[1].content"),
    ("messages", user(None), "messages[0].content"),
    ("messages", [{"role": "tool", "content": "t"}], "messages[0].tool_call_id"),
    (
        "messages",
        [{"role": "tool", "tool_call_id": 1, "content": "t"}],
        "messages[0].tool_call_id",
    ),
    ("messages", [{"role": "function", "content": "t"}], "messages[0].name"),
    ("messages", called([]), "messages[0].tool_calls[0].function.arguments"),
    ("messages", called(nested(65)), "messages[0].tool_calls[0].function.arguments"),
    ("messages", called("{}", id=None), "messages[0].tool_calls[0].id"),
    ("messages", called("{}", type="custom"), "messages[0].tool_calls[0].type"),
    (
        "messages",
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        "messages[0].tool_calls[0].function",
    ),
    ("messages", user(1), "messages[0].content"),
    ("messages", user({"text": "hi"}), "messages[0].content"),
    ("messages", user(["hi"]), "messages[0].content[0]"),
    ("messages", user([{"text": "hi"}]), "messages[0].content[0].type"),
    ("messages", user([{"type": "text"}]), "messages[0].content[0].text"),
    ("messages", user([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    ("messages", user([{"type": "refusal"}]), "messages[0].content[0].refusal"),
    (
        "messages",
        user([{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0].content[1].type",
    ),
    ("messages", user([{"type": "input_audio"}]), "messages[0].content[0].type"),
    ("messages", user([{"type": "file"}]), "messages[0].content[0].type"),
    ("stream", "yes", "stream"),
    ("stream", 1, "stream"),
    ("stream_options", True, "stream_options"),
    ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage"),
    ("service_tier", 1, "service_tier"),
    ("temperature", -0.1, "temperature"),
    ("temperature", 2.1, "temperature"),
    ("temperature", "hot", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", -0.1, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("top_p", [1], "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 1.5, "top_k"),
    ("top_k", "40", "top_k"),
    ("min_p", -0.1, "min_p"),
    ("min_p", 1.1, "min_p"),
    ("min_p", "0", "min_p"),
    ("repeat_penalty", 0, "repeat_penalty"),
    ("repeat_penalty", "1", "repeat_penalty"),
    ("repetition_penalty", -1, "repetition_penalty"),
    ("repetition_penalty", {}, "repetition_penalty"),
    ("presence_penalty", 2.1, "presence_penalty"),
    ("presence_penalty", "0", "presence_penalty"),
    ("frequency_penalty", -2.1, "frequency_penalty"),
    ("frequency_penalty", False, "frequency_penalty"),
    ("logit_bias", [], "logit_bias"),
    ("logit_bias", {"hello": 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"1" * 10: 1}, "logit_bias"),
    ("logit_bias", {"1": 101}, "logit_bias"),
    ("logit_bias", {"1": "1"}, "logit_bias"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"),
    ("seed", 2**63, "seed"),
    ("seed", -(2**63) - 1, "seed"),
    ("seed", 2**64, "seed"),
    ("seed", 10**4000, "seed"),
    ("seed", 1.5, "seed"),
    ("seed", "1", "seed"),
    ("stop", "", "stop"),
    ("stop", 1, "stop"),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a", None], "stop[1]"),
    ("stop", ["a"] * 5, "stop"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -2, "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", "100", "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("max_completion_tokens", "100", "max_completion_tokens"),
    ("n", 0, "n"),
    ("n", 9, "n"),
    ("n", 99, "n"),
    ("n", 1.5, "n"),
    ("n", "1", "n"),
    ("tools", {}, "tools"),
    ("tools", [tool("f")] * 513, "tools"),
    ("tools", [{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ("tools", [{"type": "web_search"}], "tools[0].type"),
    ("tools", [{"function": {"name": "f"}}], "tools[0].type"),
    ("tools", [tool(), {"type": "function"}], "tools[1].function"),
    ("tools", [{"type": "function", "function": {}}], "tools[0].function.name"),
    ("tools", [tool("")], "tools[0].function.name"),
    ("tools", [tool("a b")], "tools[0].function.name"),
    ("tools", [tool("a\n")], "tools[0].function.name"),
    ("tools", [tool("x" * 65)], "tools[0].function.name"),
    ("tools", [tool("g"), tool(), tool()], "tools[2].function.name"),
    ("tools", [tool(description=1)], "tools[0].function.description"),
    ("tools", [tool(strict="yes")], "tools[0].function.strict"),
    ("tools", [tool(parameters=[])], "tools[0].function.parameters"),
    ("tools", [tool(parameters="{}")], "tools[0].function.parameters"),
    ("tools", [tool(parameters={"type": "array"})], "tools[0].function.parameters"),
    ("tools", [tool(parameters={"type": None})], "tools[0].function.parameters"),
    ("tools", [tool(parameters={"properties": []})], "tools[0].function.parameters"),
    ("tools", [tool(parameters=nested(65))], "tools[0].function.parameters"),
    ("tools", [tool(parameters={"maximum": 10**20})], "tools[0].function.parameters"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", "any", "tool_choice"),
    ("tool_choice", 1, "tool_choice"),
    ("tool_choice", named("f"), "tool_choice"),
    ("tool_choice", allowed("f"), "tool_choice"),
    ("tool_choice", allowed(), "tool_choice.allowed_tools.tools"),
    ("tool_choice", allowed("f", mode="none"), "tool_choice.allowed_tools.mode"),
    ("tool_choice", {"type": "function"}, "tool_choice.function"),
    ("tool_choice", {"type": "allowed_tools"}, "tool_choice.allowed_tools"),
    ("tool_choice", {"type": "custom"}, "tool_choice.type"),
    ("parallel_tool_calls", "no", "parallel_tool_calls"),
    ("functions", [{"name": "f"}], "functions"),
    ("function_call", {"name": "f"}, "function_call"),
    ("response_format", {}, "response_format.type"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", "text", "response_format"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "n"}},
        "response_format.json_schema.schema",
    ),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "n", "schema": True}},
        "response_format.json_schema.schema",
    ),
    ("structured_outputs", {}, "structured_outputs"),
    ("structured_outputs", {"json_object": False}, "structured_outputs"),
    ("structured_outputs", {"structural_tag": "x"}, "structured_outputs"),
    ("structured_outputs", {"json": "{"}, "structured_outputs.json"),
    ("structured_outputs", {"choice": []}, "structured_outputs.choice"),
    ("structured_outputs", {"choice": [1]}, "structured_outputs.choice[0]"),
    ("structured_outputs", {"regex": "a", "grammar": "b"}, "structured_outputs.grammar"),
    ("guided_json", "true", "guided_json"),
    ("guided_json", [], "guided_json"),
    ("guided_regex", 1, "guided_regex"),
    ("guided_choice", "yes", "guided_choice"),
    ("guided_choice", [], "guided_choice"),
    ("guided_grammar", {}, "guided_grammar"),
    ("reasoning_effort", "max", "reasoning_effort"),
    ("reasoning_effort", "x" * 10_000, "reasoning_effort"),
    ("chat_template_kwargs", [], "chat_template_kwargs"),
    ("chat_template_kwargs", {"a": [{"b": -(2**63) - 1}]}, "chat_template_kwargs"),
    ("separate_reasoning", "no", "separate_reasoning"),
    ("logprobs", 5, "logprobs"),
    ("top_logprobs", 1, "top_logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("top_logprobs", -1, "top_logprobs"),
    ("modalities", ["text", "audio"], "modalities"),
    ("modalities", "text", "modalities"),
    ("audio", {"voice": "alloy", "format": "wav"}, "audio"),
]


@pytest.mark.parametrize(
    ("field", "value", "param"), BAD, ids=[f"{field}={value!r:.40}" for field, value, _ in BAD]
)
def test_bad_values_name_the_field(field: str, value: Any, param: str) -> None:
    """Each wrong value is a 400 of reasonable length whose `param` is the field at fault."""
    with pytest.raises(InvalidRequest) as caught:
        read(**{field: value})
    assert caught.value.status == 400
    assert caught.value.param == param
    assert len(caught.value.message) < 400


def test_every_field_has_bad_values() -> None:
    """No field of the request goes without a row in the table above."""
    assert {field for field, _, _ in BAD} == set(FIELDS)


@pytest.mark.parametrize("field", [f for f in FIELDS if f not in ("model", "messages")])
def test_null_is_the_default(field: str) -> None:
    """A null in any optional field means the same as leaving it out."""
    assert read(**{field: None}) == read()


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields_are_named(field: str) -> None:
    """A missing required field gets OpenAI's message and code."""
    body = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(InvalidRequest) as caught:
        read_bytes(json.dumps(body).encode())
    assert caught.value.to_body()["error"] == {
        "message": f"Missing required parameter: '{field}'.",
        "type": "invalid_request_error",
        "param": field,
        "code": "missing_required_parameter",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"not json",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"model": "\xff", "messages": []}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"model": "m", "messages": [], "temperature": NaN}',
        b'{"model": "m", "messages": [], "temperature": 1e999}',
        b'{"model": "m", "messages": [], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "messages": [], "other": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
        b'{"model": "m", "messages": [], "audio": ' + b'{"a":' * 40_000 + b"1" + b"}" * 40_001,
        b'{"model": "m", "messages": []} {}',
    ],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    """Whatever the bytes are, they are refused as an invalid request and nothing else."""
    with pytest.raises(InvalidRequest):
        read_bytes(body)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(body: bytes) -> None:
    """Random bytes are either a request or an invalid one."""
    try:
        read_bytes(body)
    except InvalidRequest:
        pass


PLAIN = SamplingParams(temperature=0.5, top_p=0.6, top_k=7, min_p=0.1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
        ({"logit_bias": {}}, {}),
        ({"logit_bias": {"50256": -100, "7": 1.5}}, {"logit_bias": {50256: -100.0, 7: 1.5}}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": 42.0}, {"seed": 42}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["a", "b", "c", "d"]}, {"stop": ("a", "b", "c", "d")}),
        ({"stop": []}, {}),
        ({"max_tokens": 1}, {"max_tokens": 1}),
        ({"max_tokens": 100.0}, {"max_tokens": 100}),
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"max_tokens": 10**12}, {"max_tokens": 2**31 - 1}),
        ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}),
        ({"max_completion_tokens": -1, "max_tokens": 9}, {"max_tokens": None}),
        ({"max_completion_tokens": None, "max_tokens": 9}, {"max_tokens": 9}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    ],
)
def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every sampling field arrives under its own name; what is left out comes from the defaults."""
    assert read(**fields).params == dataclasses.replace(PLAIN, **expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"n": 1.0},
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": []},
        {"function_call": "auto"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"modalities": ["text"]},
        {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"ttl": 300, "draft_model": "d", "cache_prompt": True, "anything": [{"else": None}]},
        {"parallel_tool_calls": True, "separate_reasoning": True, "verbosity": "low"},
        {"chat_template_kwargs": {}, "prediction": {"type": "content", "content": "x"}},
    ],
)
def test_harmless_fields_change_nothing(fields: dict[str, Any]) -> None:
    """Fields without a meaning here, and values that ask for nothing special, are accepted."""
    assert read(**fields) == read()


def test_absent_and_null_are_told_apart() -> None:
    """UNSET fields are left out of the JSON, and None is null."""
    chunk = ChatCompletionChunk(
        id="chatcmpl-1",
        created=5,
        model="m",
        system_fingerprint="f",
        choices=[ChunkChoice(index=0, delta=ChoiceDelta(content="x"))],
    )
    assert msgspec.json.encode(chunk).decode() == (
        '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m",'
        '"choices":[{"index":0,"delta":{"content":"x"},"logprobs":null,"finish_reason":null}],'
        '"system_fingerprint":"f"}'
    )
    nulled = msgspec.structs.replace(chunk, usage=None, service_tier="default")
    assert json.loads(msgspec.json.encode(nulled))["usage"] is None
    assert json.loads(msgspec.json.encode(nulled))["service_tier"] == "default"


def test_usage_adds_up() -> None:
    """The total is the sum, and what was cached and drafted is where OpenAI reports it."""
    usage = msgspec.to_builtins(CompletionUsage.of(Usage(10, 5, 4, 2, 8, 3)))
    assert usage == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 2,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 5,
        },
    }
