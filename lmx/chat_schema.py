"""OpenAI's chat completion on the wire: what a client may send, and what it gets back.

Shapes from https://platform.openai.com/docs/api-reference/chat; additions of DeepSeek
(`reasoning_content`), SGLang (`separate_reasoning`) and vLLM (`chat_template_kwargs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from . import schema as wire
from .config import SamplingDefaults
from .errors import InvalidRequest
from .generation import Chat, ChatMessage, GenerationRequest, Tool, ToolCall

ROLES: Final = {"developer": "system", "function": "tool"}
"""Roles that chat templates know by another name."""
EFFORTS: Final = {"none": "low", "minimal": "low", "xhigh": "high"}
"""Reasoning efforts that chat templates do not know, and the nearest ones."""


class ContentPart(wire.Wire, frozen=True, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(wire.Wire, frozen=True, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None

    def to_tool_call(self, id: str, where: str) -> ToolCall:
        """Arguments of a call without any are often kept as "". A string may hold anything: agents
        send back what a model has cut off or got wrong, with the error it led to."""
        text = self.arguments
        if isinstance(text, dict):
            text = wire.object_text(text, f"{where}.arguments")
        return ToolCall(id, self.name, text if text and text.strip() not in ("", "null") else "{}")


class MessageToolCall(wire.Wire, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] | None = "function"
    function: CalledFunction


class Message(wire.Wire, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    function_call: CalledFunction | None = None
    """OpenAI's first form of a call; a message of role `function` answers it."""
    reasoning_content: str | None = None
    reasoning: str | None = None

    def to_chat_message(self, where: str) -> ChatMessage:
        """The message for a chat template; `where` is its path, for errors."""
        if self.role == "tool" and self.tool_call_id is None:
            raise wire.missing(f"{where}.tool_call_id")
        if self.role == "function" and self.name is None:
            raise wire.missing(f"{where}.name")
        own = self.role == "assistant"
        return ChatMessage(
            ROLES.get(self.role, self.role),
            self._text(f"{where}.content"),
            tool_calls=tuple(self._calls(where)) if own else (),
            # A function_call has no id: the name is what its answer repeats.
            tool_call_id=self.name if self.role == "function" else self.tool_call_id,
            name=self.name,
            reasoning=(self.reasoning_content or self.reasoning or None) if own else None,
        )

    def _text(self, where: str) -> str:
        if isinstance(self.content, list):
            parts = [_text(part, f"{where}[{i}]") for i, part in enumerate(self.content)]
            return "\n".join(part for part in parts if part is not None)
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            # An assistant's turn may be all tool calls, and a tool return nothing.
            raise InvalidRequest(
                "Invalid value for 'content': expected a string, got null.", param=where
            )
        return self.content or ""

    def _calls(self, where: str) -> Iterator[ToolCall]:
        for i, call in enumerate(self.tool_calls or ()):
            yield call.function.to_tool_call(call.id, f"{where}.tool_calls[{i}].function")
        if self.function_call is not None:
            name = self.function_call.name
            yield self.function_call.to_tool_call(name, f"{where}.function_call")


def _text(part: ContentPart, where: str) -> str | None:
    """None: what another model has thought, which is not for this one."""
    if part.type in ("thinking", "redacted_thinking", "reasoning"):
        return None
    if part.type not in ("text", "input_text", "output_text", "refusal"):
        raise InvalidRequest(
            f"Invalid content type {part.type[:64]!r}: this model takes text only.",
            param=f"{where}.type",
        )
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise wire.missing(f"{where}.{'refusal' if part.type == 'refusal' else 'text'}")
    return text


class FunctionDefinition(wire.Wire, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}\Z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object."""
    strict: bool | Literal["true", "false"] | None = None
    """LM Studio's documentation has it as a string."""


class ToolDefinition(wire.Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    function: FunctionDefinition

    def to_tool(self, where: str) -> Tool:
        function = self.function
        schema = function.parameters or {}
        wire.check_object(schema, f"{where}.function.parameters")
        if schema.get("type", "object") != "object" or not isinstance(
            schema.get("properties", {}), dict
        ):
            raise InvalidRequest(
                f"Invalid schema for function '{function.name}': expected that of an object.",
                param=f"{where}.function.parameters",
            )
        strict = function.strict in (True, "true")
        return Tool(function.name, function.description, function.parameters, strict)


class AllowedTools(wire.Wire, frozen=True, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolDefinition], Meta(min_length=1)]


class ToolChoice(wire.Wire, frozen=True, kw_only=True):
    type: Literal["function", "allowed_tools"]
    function: FunctionDefinition | None = None
    """Its name is enough."""
    allowed_tools: AllowedTools | None = None


class ChatCompletionRequest(wire.SampledRequest, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: wire.CountOrNoLimit | None = None
    n: Annotated[float, Meta(ge=1, le=8, multiple_of=1)] | None = None

    tools: Annotated[list[ToolDefinition], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None
    """False: the reasoning stays in the content."""

    logprobs: bool | None = None
    top_logprobs: Annotated[float, Meta(ge=0, le=20, multiple_of=1)] | None = None
    modalities: list[str] | None = None
    audio: Any = None

    def to_request(self, defaults: SamplingDefaults) -> GenerationRequest:
        no_tool = (None, "none", "auto")
        wire.refuse(
            functions=self.functions,
            function_call=self.function_call not in no_tool,
            modalities=any(modality != "text" for modality in self.modalities or ()),
            audio=self.audio is not None,
        )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed with 'logprobs'.", param="top_logprobs"
            )
        newer = self.max_completion_tokens is not None
        params = self.to_sampling(
            defaults,
            max_tokens=self.limit("max_completion_tokens" if newer else "max_tokens"),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        chat, grammar = self._to_chat(defaults), self.to_grammar()
        return GenerationRequest(
            chat, params, n=int(self.n or 1), grammar=None if chat.required else grammar
        )

    def _to_chat(self, defaults: SamplingDefaults) -> Chat:
        tools = [tool.to_tool(f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        names = [tool.name for tool in tools]
        if twice := next((i for i, name in enumerate(names) if name in names[:i]), None):
            raise InvalidRequest(
                f"There are two tools '{names[twice]}'.", param=f"tools[{twice}].function.name"
            )
        callable, required = self._to_callable(names)
        named = isinstance(self.tool_choice, ToolChoice) and self.tool_choice.type == "function"
        kwargs = self.chat_template_kwargs or {}
        wire.check_object(kwargs, "chat_template_kwargs")
        if (effort := self.reasoning_effort) is not None:
            # What gpt-oss, Qwen and DeepSeek call it.
            thinking = dict.fromkeys(("enable_thinking", "thinking"), effort != "none")
            kwargs = {"reasoning_effort": EFFORTS.get(effort, effort), **thinking, **kwargs}
        separate = self.separate_reasoning
        return Chat(
            [message.to_chat_message(f"messages[{i}]") for i, message in enumerate(self.messages)],
            tools=tools if callable else [],
            callable=callable,
            required=required,
            parallel=self.parallel_tool_calls is not False and not named,
            template_kwargs=kwargs,
            inline_reasoning=not (defaults.separate_reasoning if separate is None else separate),
        )

    def _to_callable(self, names: list[str]) -> tuple[list[str], bool]:
        """The tools that may be called, and whether one of them must be."""
        required = True
        match self.tool_choice:
            case None | "auto":
                return names, False
            case "none":
                return [], False
            case "required":
                wanted = names
            case ToolChoice(type="function", function=function):
                if function is None:
                    raise wire.missing("tool_choice.function")
                wanted = [function.name]
            case ToolChoice(allowed_tools=allowed):
                if allowed is None:
                    raise wire.missing("tool_choice.allowed_tools")
                wanted = list(dict.fromkeys(tool.function.name for tool in allowed.tools))
                required = allowed.mode == "required"
        unknown = [name for name in wanted if name not in names]
        if unknown or not names:
            what = f"a tool '{unknown[0]}'" if unknown else "any tool"
            raise InvalidRequest(
                f"Invalid value for 'tool_choice': there is not {what} in 'tools'.",
                param="tool_choice",
            )
        return wanted, required


# What goes out. None is sent as null, UNSET is not sent.


class TopLogprob(wire.Wire, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(wire.Wire, frozen=True, kw_only=True):
    content: list[ContentLogprob]
    refusal: None = None


class CalledTool(wire.Wire, frozen=True, kw_only=True):
    """A call, or a piece of it: only the first has more than the index and arguments."""

    index: int | UnsetType = UNSET
    """Of a piece."""
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionPiece


class FunctionPiece(wire.Wire, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ChatCompletionMessage(wire.Wire, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    refusal: None = None
    annotations: tuple[()] = ()
    tool_calls: list[CalledTool] | UnsetType = UNSET


class Choice(wire.Wire, frozen=True, kw_only=True):
    index: int
    message: ChatCompletionMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None


class ChatCompletion(wire.Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]


class ChoiceDelta(wire.Wire, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChunkChoice(wire.Wire, frozen=True, kw_only=True):
    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(wire.Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
