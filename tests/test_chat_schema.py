"""What a chat completion request asks of the model: messages, tools, structure, reasoning."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from lmx.chat_schema import ChatCompletionRequest
from lmx.errors import InvalidRequest
from lmx.generation import Chat, ChatMessage, Grammar, Tool, ToolCall
from lmx.schema import decode

from .chatting import DEFAULTS, GOOD, allowed, called, named, read, read_chat, tool


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "s"}, ChatMessage("system", "s")),
        ({"role": "developer", "content": "d"}, ChatMessage("system", "d")),
        ({"role": "user", "content": "u", "name": "Ann"}, ChatMessage("user", "u", name="Ann")),
        ({"role": "user", "content": ""}, ChatMessage("user", "")),
        ({"role": "user", "content": []}, ChatMessage("user", "")),
        ({"role": "user", "content": "a\u0000é😀"}, ChatMessage("user", "a\u0000é😀")),
        (
            {"role": "tool", "content": "t", "tool_call_id": "1"},
            ChatMessage("tool", "t", tool_call_id="1"),
        ),
        (
            {"role": "function", "content": "t", "name": "f"},
            ChatMessage("tool", "t", tool_call_id="f", name="f"),
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            ChatMessage("assistant", "", (ToolCall("f", "f", '{"a": 1}'),)),
        ),
        (
            called('{"ä":  [1]}')[0],
            ChatMessage("assistant", "", (ToolCall("1", "f", '{"ä":  [1]}'),)),
        ),
        (called({"ä": [1]})[0], ChatMessage("assistant", "", (ToolCall("1", "f", '{"ä":[1]}'),))),
        (called("")[0], ChatMessage("assistant", "", (ToolCall("1", "f", "{}"),))),
        (called(None)[0], ChatMessage("assistant", "", (ToolCall("1", "f", "{}"),))),
        (
            {"role": "assistant", "content": "a", "tool_calls": [], "reasoning_content": "r"},
            ChatMessage("assistant", "a", reasoning="r"),
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            ChatMessage("assistant", "a", reasoning="r"),
        ),
        ({"role": "assistant"}, ChatMessage("assistant", "")),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            ChatMessage("user", "a\nb"),
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            ChatMessage("assistant", "no"),
        ),
    ],
)
def test_messages(message: dict[str, Any], expected: ChatMessage) -> None:
    """Each of OpenAI's ways to write a text message becomes one turn for the chat template."""
    assert read_chat(messages=[message]).messages == [expected]


F, G = Tool("f", None, None, False), Tool("g", None, None, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"tools": [F, G], "callable": ["f", "g"]}),
        ({"tool_choice": "auto"}, {"tools": [F, G], "callable": ["f", "g"]}),
        ({"tool_choice": "none"}, {}),
        ({"tool_choice": "required"}, {"tools": [F, G], "callable": ["f", "g"], "required": True}),
        (
            {"tool_choice": named("g")},
            {"tools": [F, G], "callable": ["g"], "required": True, "parallel": False},
        ),
        ({"tool_choice": allowed("g")}, {"tools": [F, G], "callable": ["g"]}),
        (
            {"tool_choice": allowed("g", "f", "g", mode="required")},
            {"tools": [F, G], "callable": ["g", "f"], "required": True},
        ),
        (
            {"parallel_tool_calls": False},
            {"tools": [F, G], "callable": ["f", "g"], "parallel": False},
        ),
    ],
)
def test_tool_choice(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """What the model is shown, what it may call, and whether it must."""
    chat = read_chat(tools=[tool("f"), tool("g")], **fields)
    assert chat == Chat([ChatMessage("user", "hi")], **expected)


@pytest.mark.parametrize("choice", [named("h"), allowed("f", "h")], ids=["named", "allowed"])
def test_tools_that_are_not_there_cannot_be_chosen(choice: dict[str, Any]) -> None:
    """A choice of a tool that is not among the tools names `tool_choice`."""
    with pytest.raises(InvalidRequest, match="'h'") as caught:
        read(tools=[tool("f")], tool_choice=choice)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("strict", "expected"),
    [(None, False), (False, False), ("false", False), (True, True), ("true", True)],
)
def test_tools(strict: object, expected: bool) -> None:
    """A tool arrives with its description and schema; `strict` may be a string."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 2**64 - 1}}}
    chat = read_chat(tools=[tool("a.b-c_1", description="d", parameters=schema, strict=strict)])
    assert chat.tools == [Tool("a.b-c_1", "d", schema, expected)]


SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{},"a":{}}}'


def json_schema(**fields: Any) -> dict[str, Any]:
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA} | fields}
    return {"response_format": format}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        (json_schema(), Grammar("json_schema", SCHEMA_TEXT)),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        (
            {"response_format": {"type": "json_schema", "schema": SCHEMA}},
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        (json_schema(strict=True), Grammar("json_schema", SCHEMA_TEXT)),
        (json_schema(strict="true", name=None), Grammar("json_schema", SCHEMA_TEXT)),
        ({"guided_json": SCHEMA}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"guided_json": '{"type": "string"}'}, Grammar("json_schema", '{"type": "string"}')),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["é", "b"]}, Grammar("choice", '["é","b"]')),
        ({"guided_grammar": 'start: "a"'}, Grammar("grammar", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]')),
        ({"structured_outputs": {"grammar": "x"}}, Grammar("grammar", "x")),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar("regex", "a")),
    ],
)
def test_grammars(fields: dict[str, Any], expected: Grammar) -> None:
    """OpenAI's and vLLM's ways to ask for a structure, with the order of the schema kept, and the
    name of what has asked for it."""
    grammar = read(**fields).grammar
    assert grammar is not None and grammar.param.partition(".")[0] in fields
    assert replace(grammar, param=expected.param) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (json_schema() | {"guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ],
)
def test_one_structure_only(fields: dict[str, Any], param: str) -> None:
    """Two structures cannot be had, even if they are the same."""
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert caught.value.param == param


def test_a_required_call_needs_no_response_format() -> None:
    """A call that must be made wins over a response format; one that may be made does not."""
    assert read(tools=[tool()], tool_choice="required", **json_schema()).grammar is None
    assert read(tools=[tool()], **json_schema()).grammar is not None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {"a": [1, {"b": None}]}}, {"a": [1, {"b": None}]}),
        *(
            (
                {"reasoning_effort": given},
                {"reasoning_effort": effort, "enable_thinking": think, "thinking": think},
            )
            for given, effort, think in (
                ("none", "low", False),
                ("minimal", "low", True),
                ("low", "low", True),
                ("medium", "medium", True),
                ("high", "high", True),
                ("xhigh", "high", True),
            )
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"thinking": 7, "x": 1}},
            {"reasoning_effort": "low", "enable_thinking": True, "thinking": 7, "x": 1},
        ),
    ],
)
def test_template_kwargs(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """The effort sets what templates know it by; the template's own variables win."""
    assert read_chat(**fields).template_kwargs == expected


def test_reasoning_may_stay_inline() -> None:
    """The request decides, and where it does not, the configuration."""
    assert not read_chat().inline_reasoning
    assert read_chat(separate_reasoning=False).inline_reasoning
    inline = msgspec.structs.replace(DEFAULTS, separate_reasoning=False)
    for fields, expected in (({}, True), ({"separate_reasoning": True}, False)):
        body = json.dumps(GOOD | fields).encode()
        prompt = decode(body, ChatCompletionRequest).to_request(inline).prompt
        assert isinstance(prompt, Chat)
        assert prompt.inline_reasoning is expected


def test_n() -> None:
    """One answer unless more are asked for."""
    assert [read(**fields).n for fields in ({}, {"n": 1}, {"n": 8.0})] == [1, 1, 8]


@pytest.mark.parametrize("arguments", ['{"a":', "[1]", '"x"', "not json", '{"a": NaN}', "{}{}"])
def test_what_a_model_got_wrong_may_stand_in_the_history(arguments: str) -> None:
    """Agents send a broken call back with the error it led to: its text is kept."""
    function = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": None, "function": function}]}
    result = {"role": "tool", "tool_call_id": "1", "content": None}
    messages = read_chat(messages=[{"role": "user", "content": "x"}, turn, result]).messages
    assert messages[1].tool_calls[0].arguments == arguments and messages[2].content == ""


@pytest.mark.parametrize("arguments", [None, "", " ", "null", {}])
def test_a_call_without_arguments(arguments: object) -> None:
    """However it is written, it is an empty object."""
    function = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}
    [message] = read_chat(messages=[turn]).messages
    assert message.tool_calls[0].arguments == "{}"


def test_content_parts_of_other_makers() -> None:
    """Text by its names in other APIs is text, and what another model thought is left out."""
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "output_text", "text": "a"},
        {"type": "input_text", "text": "b"},
    ]
    [message] = read_chat(messages=[{"role": "assistant", "content": parts}]).messages
    assert message.content == "a\nb"
