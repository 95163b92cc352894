"""The vocabulary of text generation, shared by the HTTP side, the runner and the backends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Both backends apply the steps in the order of the fields.

    The order is llama.cpp's, and so LM Studio's.
    """

    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id to a number added to its logit."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or answer
    (https://arxiv.org/abs/1909.05858); 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens seen in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from tokens of the answer once per occurrence."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches p; 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest; 0 is off."""
    temperature: float = 1.0
    """0 is greedy: the likeliest token, whatever the other filters say."""
    seed: int | None = None
    """Same seed, same request, same load: same answer. None draws a fresh one."""
    max_tokens: int | None = None
    """None: as many as the context holds."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV cache was reused instead of computed."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, as a chat template sees it."""

    role: str
    content: str
