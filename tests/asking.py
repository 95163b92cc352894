"""Requests to a runner, and what its events say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmx.generation import Chat, ChatMessage, FinishReason, GenerationRequest, Part, SamplingParams
from lmx.messages import Delta


def chat(text: str, *, n: int = 1, **params: Any) -> GenerationRequest:
    return GenerationRequest(Chat([ChatMessage("user", text)]), SamplingParams(**params), n)


def delta(id: int, text: str, tokens: int, finish: FinishReason | None = None) -> Delta:
    parts = [Part("content", text)] if text else []
    return Delta(id, 0, parts, tokens, [], finish)


def content(events: Iterable[object], id: int | None = None, index: int = 0) -> str:
    """Of one answer; without an id, of whatever request."""
    deltas = [e for e in events if isinstance(e, Delta) and e.index == index]
    deltas = [e for e in deltas if id in (None, e.id)]
    return "".join(part.text for e in deltas for part in e.parts if part.kind == "content")
