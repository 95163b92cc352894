"""How one model writes what is not plain text: its reasoning, its tool calls, its conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from .backends import Template, Vocabulary
from .errors import InvalidRequest
from .generation import Chat, ChatMessage, Tool, ToolCall
from .tool_calls import CallFormat
from .tool_parsers import Parser, find_parser, load_parser, parse_calls, parse_harmony

GENERIC: Final = CallFormat("[TOOL_REQUEST]", "[END_TOOL_REQUEST]")
"""For models without a format of their own; LM Studio has the same."""

_PROMPT: Final = """\
You can call tools. To call one, write a request in exactly this form:
[TOOL_REQUEST]{"name": "tool_name", "arguments": {"parameter": "value"}}[END_TOOL_REQUEST]
Write one request for each call, give every required argument, and write nothing after the last
request. The result comes in the next message as [TOOL_RESULT]...[END_TOOL_RESULT]; never write one
yourself. Answer without a request when no tool is needed. These are the tools, as JSON:
"""

_REASONING: Final = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("[THINK]", "[/THINK]"),
)
"""Markers that are a token each, as a rule."""
_GEMMA: Final = ("<|channel>", "<channel|>")
_KIMI_K3: Final = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
_HARMONY: Final = ("<|channel|>", "<|message|>")
_HARMONY_FRAME: Final = (
    "<|start|>assistant",
    "<|channel|>commentary",
    "<|channel|>final",
    "<|message|>",
    "<|end|>",
)


@dataclass(frozen=True, slots=True)
class Dialect:
    reasoning: tuple[str, str] | None = None
    """The markers around it."""
    structural: tuple[str, ...] = ()
    """Markers that only frame messages."""
    opening: str | None = None
    """What the model writes before content: where a grammar begins. None: where the answer does,
    or behind the reasoning."""
    calls: CallFormat = GENERIC
    """Its `parse` is missing where `parser` is set: that needs the request's tools."""
    parser: Parser | None = None
    native_tools: bool = False
    """The template takes `tools`, and how the model then writes calls is known."""
    short_ids: bool = False
    """The template refuses ids of calls other than of nine letters and digits."""

    def format_for(self, chat: Chat) -> CallFormat | None:
        """How the answer writes calls; None: it may call nothing.

        What is required is forced by a grammar, and so always JSON.
        """
        if not chat.callable:
            return None
        if self.parser is None:
            return self.calls
        if chat.required:
            return GENERIC
        tools, names = [_tool(tool) for tool in chat.tools], frozenset(chat.callable)
        parse = partial(parse_calls, parser=self.parser, tools=tools, callable=names)
        return replace(self.calls, parse=parse)

    def render(self, template: Template, chat: Chat) -> str:
        """The prompt.

        Raises:
            InvalidRequest: the template refuses the conversation, or fails on it.
        """
        tools = [_tool(tool) for tool in chat.tools] or None
        if self.native_tools:
            # Arguments as an object are the rule; some templates concatenate them as text.
            forms = [self._native(chat.messages, parsed=True)]
            if any(m.tool_calls for m in chat.messages):
                forms.append(self._native(chat.messages, parsed=False))
        elif tools is None:
            forms = [_generic(chat.messages)]
        else:
            prompt = _PROMPT + json.dumps(tools, ensure_ascii=False)
            messages = _generic(chat.messages)
            forms = [_led(messages, "system", prompt)]
            if not messages or messages[0]["role"] != "system":
                forms.append(_led(messages, "user", prompt))  # some templates refuse the former
            tools = None
        refusals = []
        for messages in forms:
            try:
                return template.render(messages, tools, chat.template_kwargs)
            except InvalidRequest as error:
                refusals.append(error)
        raise refusals[0]

    def _native(self, messages: list[ChatMessage], *, parsed: bool) -> list[dict[str, Any]]:
        names = {call.id: call.name for m in messages for call in m.tool_calls}
        dicts = []
        for m in messages:
            fields = _message(m)
            if m.tool_calls:
                fields["tool_calls"] = [self._call(call, parsed=parsed) for call in m.tool_calls]
            if m.tool_call_id is not None:
                fields["tool_call_id"] = self._id(m.tool_call_id)
                if m.tool_call_id in names:
                    fields.setdefault("name", names[m.tool_call_id])
            dicts.append(fields)
        return dicts

    def _call(self, call: ToolCall, *, parsed: bool) -> dict[str, Any]:
        arguments = _arguments(call) if parsed else call.arguments
        function = {"name": call.name, "arguments": arguments}
        return {"id": self._id(call.id), "type": "function", "function": function}

    def _id(self, id: str) -> str:
        return re.sub(r"[^a-zA-Z0-9]", "", id)[-9:].rjust(9, "0") if self.short_ids else id


def read_dialect(
    template_source: str | None, vocabulary: Vocabulary, tool_parser: str | None
) -> Dialect:
    """
    Args:
        template_source: None where the template is code.
        tool_parser: mlx-lm's parser that the model's files name.
    """
    source = template_source or ""
    if all(marker in source for marker in _HARMONY):
        return Dialect(  # https://github.com/openai/harmony/blob/main/docs/format.md
            reasoning=("<|channel|>analysis<|message|>", "<|end|>"),
            structural=_HARMONY_FRAME,
            opening="<|channel|>final<|message|>",
            calls=CallFormat(" to=functions.", ""),
            parser=parse_harmony,
            native_tools=True,
        )
    tokens = set(vocabulary.tokens)
    dialect = Dialect(_reasoning(source, tokens))
    if _has(tokens, _KIMI_K3):
        opening = "<|open|>response<|sep|>"
        closing = ("<|close|>response<|sep|>", "<|close|>message<|sep|>")
        dialect = replace(dialect, structural=(opening, *closing), opening=opening)
    name = find_parser(tool_parser, source, tokens)
    if name is None or not (template_source is None or re.search(r"\btools\b", source)):
        return dialect
    start, end, parser = load_parser(name)
    return replace(
        dialect,
        calls=CallFormat(start, end),
        parser=None if name == "json_tools" else parser,
        native_tools=True,
        short_ids=name == "mistral",
    )


def _reasoning(source: str, tokens: Collection[bytes]) -> tuple[str, str] | None:
    for markers in _REASONING:
        if _has(tokens, markers):
            return markers
    if _has(tokens, _GEMMA):
        return "<|channel>thought", "<channel|>"
    if _has(tokens, _KIMI_K3):
        return "<|open|>think<|sep|>", "<|close|>think<|sep|>"
    return next((m for m in _REASONING if all(marker in source for marker in m)), None)


def _has(tokens: Collection[bytes], wanted: tuple[str, ...]) -> bool:
    return all(name.encode() in tokens for name in wanted)


def _tool(tool: Tool) -> dict[str, Any]:
    # Templates concatenate the description and walk the parameters, whether they are there or not.
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _message(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
        if not (message.content and message.tool_calls):  # gpt-oss's template refuses all three
            fields["thinking"] = message.reasoning
    return fields


def _arguments(call: ToolCall) -> dict[str, Any]:
    """As an object, which templates walk through, even if the model wrote something else."""
    try:
        parsed = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": call.arguments}


def _generic(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """With calls as text of the assistant's turns and results as user's turns."""
    dicts: list[dict[str, Any]] = []
    after_result = False
    for m in messages:
        fields = _message(m)
        if m.tool_calls:
            requests = [_request(call) for call in m.tool_calls]
            fields["content"] = "\n".join(filter(None, [m.content, *requests]))
        if m.role == "tool":
            result = f"[TOOL_RESULT]{m.content}[END_TOOL_RESULT]"
            fields = {"role": "user", "content": result}
        if after_result and fields["role"] == "user":  # many templates want turns to alternate
            dicts[-1]["content"] += "\n" + fields["content"]
            continue
        dicts.append(fields)
        after_result = m.role == "tool"
    return dicts


def _request(call: ToolCall) -> str:
    body = {"name": call.name, "arguments": _arguments(call)}
    return f"{GENERIC.start}{json.dumps(body, ensure_ascii=False)}{GENERIC.end}"


def _led(messages: list[dict[str, Any]], role: str, prompt: str) -> list[dict[str, Any]]:
    """With the prompt added to the first message, if this has the role, or put before it."""
    if messages and messages[0]["role"] == role:
        content = f"{messages[0]['content']}\n\n{prompt}"
        return [messages[0] | {"content": content}, *messages[1:]]
    return [{"role": role, "content": prompt}, *messages]
