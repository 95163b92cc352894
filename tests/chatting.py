"""Chat completion requests, as clients write them and as the model gets them."""

from __future__ import annotations

import json
from typing import Any, Final

from lmx.chat_schema import ChatCompletionRequest
from lmx.config import SamplingDefaults
from lmx.generation import Chat, GenerationRequest
from lmx.schema import decode

DEFAULTS: Final = SamplingDefaults(temperature=0.5, top_p=0.6, top_k=7, min_p=0.1)
GOOD: Final = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def read(**fields: Any) -> GenerationRequest:
    return read_bytes(json.dumps(GOOD | fields).encode())


def read_bytes(body: bytes) -> GenerationRequest:
    return decode(body, ChatCompletionRequest).to_request(DEFAULTS)


def read_chat(**fields: Any) -> Chat:
    prompt = read(**fields).prompt
    assert isinstance(prompt, Chat)
    return prompt


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def called(arguments: Any, **fields: Any) -> list[Any]:
    """A history with a call."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "content": None, "tool_calls": [call | fields]}]


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels > 1 else {}
