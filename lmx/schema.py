"""OpenAI's chat completion on the wire: what a client may send, and what it gets back.

Shapes from https://platform.openai.com/docs/api-reference/chat; LM Studio's additions are marked.
Decoding never trusts the client: everything it can get wrong is an `InvalidRequest` that names the
field in `param`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .config import SamplingDefaults
from .errors import InvalidRequest, MissingParameter, UnsupportedParameter
from .generation import ChatMessage, SamplingParams, Usage

T = TypeVar("T")

# Many clients keep whole numbers in floats: 100.0 is one, 100.5 is not.
Count = Annotated[float, Meta(ge=1, multiple_of=1)]
CountOrNoLimit = Annotated[float, Meta(ge=-1, multiple_of=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Factor = Annotated[float, Meta(gt=0)]
Seed = (
    Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    | Annotated[float, Meta(ge=-(2**53), le=2**53, multiple_of=1)]
)
StopString = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[str, Meta(pattern=r"^[0-9]{1,9}\Z")]
Bias = Annotated[float, Meta(ge=-100, le=100)]

MAX_COUNT: Final = 2**31 - 1
"""Counts above this mean the same as this; it fits every engine's integers."""

ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""OpenAI's roles, and the ones that chat templates know for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentPart:
    type: str
    text: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str | list[ContentPart] | None = None

    def to_chat_message(self, where: str) -> ChatMessage:
        """The message for a chat template; `where` is its path, for errors."""
        if self.role not in ROLES:
            known = ", ".join(f"'{role}'" for role in ROLES)
            raise InvalidRequest(
                f"Invalid value: {self.role[:64]!r}. Supported values are: {known}.",
                param=f"{where}.role",
            )
        where += ".content"
        if isinstance(self.content, list):
            parts = [_text(part, f"{where}[{i}]") for i, part in enumerate(self.content)]
            return ChatMessage(ROLES[self.role], "\n".join(parts))
        if self.content is None and self.role != "assistant":
            # Only an assistant's turn may be all tool calls and no text.
            raise InvalidRequest(
                "Invalid value for 'content': expected a string, got null.", param=where
            )
        return ChatMessage(ROLES[self.role], self.content or "")


def _text(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise InvalidRequest(
            f"Invalid content type {part.type[:64]!r}: this model takes text only.",
            param=f"{where}.type",
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise _missing(f"{where}.{part.type}")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    include_usage: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletionRequest:
    """The fields that matter here. OpenAI's others, and unknown ones, are skipped."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Without `stream` OpenAI refuses it; LM Studio's clients send it always, so it is ignored."""
    service_tier: str | None = None
    ttl: Annotated[float, Meta(gt=0)] | None = None
    """LM Studio's: seconds without work after which the model is unloaded."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: CountOrNoLimit | None = None
    """LM Studio's; 0 and -1 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Factor | None = None
    """LM Studio's name."""
    repetition_penalty: Factor | None = None
    """Everybody else's."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    """-1 is no seed, as in llama.cpp and so in LM Studio."""
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    max_tokens: CountOrNoLimit | None = None
    """-1 is no limit, LM Studio's habit."""
    max_completion_tokens: CountOrNoLimit | None = None

    n: Count | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[float, Meta(ge=0, le=20, multiple_of=1)] | None = None
    modalities: list[str] | None = None
    audio: Any = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def to_messages(self) -> list[ChatMessage]:
        return [m.to_chat_message(f"messages[{i}]") for i, m in enumerate(self.messages)]

    def to_sampling(self, defaults: SamplingDefaults) -> SamplingParams:
        top_k = _or(self.top_k, defaults.top_k)
        return SamplingParams(
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            repetition_penalty=_or(_or(self.repeat_penalty, self.repetition_penalty), 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            top_k=min(max(int(top_k), 0), MAX_COUNT),
            top_p=_or(self.top_p, defaults.top_p),
            min_p=_or(self.min_p, defaults.min_p),
            temperature=_or(self.temperature, defaults.temperature),
            seed=None if self.seed in (None, -1) else int(self.seed),
            max_tokens=self._max_tokens(),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )

    def _max_tokens(self) -> int | None:
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        limit: float | None = getattr(self, name)
        if limit is None or limit == -1:
            return None
        if limit < 1:
            raise InvalidRequest(f"Invalid value for '{name}': expected 1 or more.", param=name)
        return min(int(limit), MAX_COUNT)

    def __post_init__(self) -> None:
        """Refuse what is correct but not built."""
        no_tool = (None, "none", "auto")
        refused = {
            "n": self.n is not None and self.n > 1,
            "tools": self.tools,
            "tool_choice": self.tool_choice not in no_tool,
            "functions": self.functions,
            "function_call": self.function_call not in no_tool,
            "response_format": self.response_format and self.response_format.type != "text",
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "modalities": any(modality != "text" for modality in self.modalities or ()),
            "audio": self.audio is not None,
        }
        for param, wanted in refused.items():
            if wanted:
                raise UnsupportedParameter(
                    f"Unsupported parameter: this value of '{param}' is not supported yet.",
                    param=param,
                )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


@cache
def _decoder(type: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type)


def decode(body: bytes, type: type[T]) -> T:
    """
    Raises:
        InvalidRequest: not JSON, or not a request that can be served; `param` names the field.
    """
    try:
        request: T = _decoder(type).decode(body)  # type: ignore[arg-type]
        return request
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}") from None


# msgspec has the path in its message only: "... - at `$.a[0].b`", "... - at `key` in `$.a`".
_VALIDATION = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(\w+)`")
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def _invalid(message: str) -> InvalidRequest:
    match = _VALIDATION.fullmatch(message)
    assert match is not None  # both parts can be empty
    what = match["what"]
    path = (match["path"] or "").removesuffix("[...]")
    if missing := _MISSING.fullmatch(what):
        return _missing(f"{path}.{missing[1]}".lstrip("."))
    if unknown := _UNKNOWN.fullmatch(what):
        path = f"{path}.{unknown[1]}".lstrip(".")
        return InvalidRequest(f"Unknown parameter: '{path}'.", param=path)
    where = f" for '{path}'" if path else ""
    what = what.replace("`", "").replace("float that's a multiple of 1.0", "a whole number")
    return InvalidRequest(f"Invalid value{where}: {what}.", param=path or None)


def _missing(param: str) -> MissingParameter:
    return MissingParameter(f"Missing required parameter: '{param}'.", param=param)


# What goes out. Fields in OpenAI's order; None is sent as null, UNSET is not sent.


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokensDetails:
    cached_tokens: int
    audio_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTokensDetails:
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionUsage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletionMessage:
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    index: int = 0
    message: ChatCompletionMessage
    logprobs: None = None
    finish_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletion:
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage | UnsetType | None
    service_tier: str | UnsetType = UNSET
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkChoice:
    index: int = 0
    delta: ChoiceDelta
    logprobs: None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletionChunk:
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    service_tier: str | UnsetType = UNSET
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | UnsetType | None = UNSET
    """With `include_usage`: null, except in the last chunk. Without it: not there at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    object: Literal["list"] = "list"
    data: list[Model]
