"""OpenAI's completions without a chat, and embeddings, on the wire.

Shapes from https://platform.openai.com/docs/api-reference/completions and .../embeddings.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from . import schema as wire
from .config import SamplingDefaults
from .errors import InvalidRequest
from .generation import EmbeddingRequest, GenerationRequest

Text = Annotated[str, Meta(min_length=1)]

MAX_ANSWERS: Final = 128
MAX_INPUTS: Final = 2048
DEFAULT_MAX_TOKENS: Final = 16


class CompletionRequest(wire.SampledRequest, frozen=True, kw_only=True):
    prompt: str | Annotated[list[str | wire.TokenId | wire.TokenIds], Meta(min_length=1)]
    n: Annotated[float, Meta(ge=1, le=20, multiple_of=1)] | None = None
    best_of: Annotated[float, Meta(ge=1, le=20, multiple_of=1)] | None = None
    logprobs: Annotated[float, Meta(ge=0, le=5, multiple_of=1)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def answers(self) -> int:
        """To each prompt."""
        return int(self.n or 1)

    @property
    def chosen(self) -> bool:
        """There are more answers than the client gets."""
        return self.best_of is not None and self.best_of > self.answers

    def to_request(self, defaults: SamplingDefaults) -> GenerationRequest:
        wire.refuse(echo=self.echo, suffix=self.suffix)
        if self.best_of is not None and self.best_of < self.answers:
            raise InvalidRequest("'best_of' must not be less than 'n'.", param="best_of")
        if self.chosen and self.stream:
            raise InvalidRequest("'best_of' answers cannot be streamed.", param="best_of")
        prompts = wire.to_inputs(self.prompt, "prompt")
        each = int(self.best_of or self.answers)
        if len(prompts) * each > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {each} answers each: "
                f"at most {MAX_ANSWERS} answers can be asked for at once.",
                param="prompt",
            )
        params = self.to_sampling(
            defaults,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.limit("max_tokens"),
            logprobs=0 if self.chosen and self.logprobs is None else self.logprobs,
        )
        return GenerationRequest(prompts, params, n=each, grammar=self.to_grammar())


class EmbeddingsRequest(wire.ModelRequest, frozen=True, kw_only=True):
    input: Text | Annotated[list[Text | wire.TokenId | wire.TokenIds], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: wire.Count | None = None

    def to_request(self) -> EmbeddingRequest:
        inputs = wire.to_inputs(self.input, "input")
        if len(inputs) > MAX_INPUTS:
            raise InvalidRequest(f"'input' has more than {MAX_INPUTS} texts.", param="input")
        dimensions = None if self.dimensions is None else min(int(self.dimensions), wire.MAX_COUNT)
        return EmbeddingRequest(inputs, dimensions)


class CompletionLogprobs(wire.Wire, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The likeliest tokens and the drawn one."""
    text_offset: list[int]
    """Characters of the text before each token."""


class CompletionChoice(wire.Wire, frozen=True, kw_only=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(wire.Answer, frozen=True, kw_only=True):
    """The whole answer, and a piece of it in a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Embedding(wire.Wire, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | bytes
    """As bytes, float32 in little endian, it is base64 in JSON."""


class EmbeddingUsage(wire.Wire, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(wire.Wire, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
