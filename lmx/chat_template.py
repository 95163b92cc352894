"""A model's own chat template, rendered in a sandbox with a deadline and an output cap."""

from __future__ import annotations

from .generation import ChatMessage


class ChatTemplate:
    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source

    def render(self, messages: list[ChatMessage]) -> str:
        raise NotImplementedError
