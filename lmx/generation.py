"""The vocabulary of text generation, shared by the HTTP side, the runner and the backends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]


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
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the drawn one, from the model's own
    distribution: before bias, penalties, grammar and temperature. None: no report."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str
    """The schema, the regular expression, a JSON list of strings, or Lark or GBNF."""
    param: str = "response_format"
    """What the client has asked for it by."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    """A JSON schema of an object."""
    strict: bool
    """The schema must be enforced; without it, as far as it can be."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, as a chat template sees it."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's answer: the call it answers."""
    name: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that waits for the assistant's turn."""

    messages: list[ChatMessage]
    tools: list[Tool] = field(default_factory=list)
    """What the model is shown: nothing, where it may not call anything."""
    callable: list[str] = field(default_factory=list)
    """Names of those it may call."""
    required: bool = False
    """It must call one of them."""
    parallel: bool = True
    """It may call several at once."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    inline_reasoning: bool = False
    """Leave the reasoning in the content, markers included."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    prompt: Chat | list[str | list[int]]
    """A conversation, or prompts as text or token ids, each with answers of its own."""
    params: SamplingParams
    n: int = 1
    """Answers to each prompt. Answer `i` to prompt `p` has index `p * n + i`."""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    inputs: list[str | list[int]]
    """Texts or token ids."""
    dimensions: int | None = None
    """Cut each vector to so many and make it a unit vector again (Matryoshka embeddings,
    https://arxiv.org/abs/2205.13147)."""


class Part(msgspec.Struct, array_like=True, frozen=True):
    """A piece of an answer, as the client sees it."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    """`call` begins a tool call; `arguments` go on with the one begun last."""
    text: str
    """Of a `call`: the function's name. All `arguments` of a call together are JSON."""
    id: str = ""
    """Of a `call`."""


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    token: bytes
    """What it stands for, which may be a part of a UTF-8 character; a control token's name."""
    logprob: float
    top: list[tuple[bytes, float]] = []
    """The likeliest tokens at this place and their logprobs, likeliest first."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV cache was reused instead of computed."""
    reasoning_tokens: int = 0
    """Of the completion tokens."""
    drafted_tokens: int = 0
    """Guessed ahead by speculative decoding."""
    accepted_tokens: int = 0
    """Of these, the ones that were right."""
