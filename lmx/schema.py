"""What OpenAI's endpoints share on the wire: decoding, the fields that steer generation, models.

Shapes from https://platform.openai.com/docs/api-reference; additions of LM Studio and vLLM are
marked. Decoding never trusts the client: everything it can get wrong is an `InvalidRequest` that
names the field in `param`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .config import SamplingDefaults
from .errors import InvalidRequest, MissingParameter, UnsupportedParameter
from .generation import Grammar, SamplingParams, Usage

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
TokenKey = Annotated[str, Meta(pattern=r"^[0-9]{1,9}\Z")]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]

SMALLEST_TOP_P: Final = 1e-6
"""0 means this, the likeliest token alone; the engines differ over a real 0."""
MAX_COUNT: Final = 2**31 - 1
"""Counts above this mean the same as this; it fits every engine's integers."""
MAX_NESTING: Final = 64


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object. Of what comes in, fields that are not declared are skipped."""


class ModelRequest(Wire, frozen=True, kw_only=True):
    model: str
    ttl: Annotated[float, Meta(gt=0)] | None = None
    """LM Studio's: seconds without work after which the model is unloaded."""


class StreamOptions(Wire, frozen=True, kw_only=True):
    include_usage: bool | None = None


class StructuredOutputs(Wire, frozen=True, kw_only=True):
    """vLLM's; one of them."""

    json: str | dict[str, Any] | None = None
    """A JSON schema."""
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None
    grammar: str | None = None
    """Lark or GBNF."""

    def grammars(self, prefix: str) -> Iterator[Grammar]:
        """What is set; each field's parameter is its name behind `prefix`."""
        if self.json is not None:
            param = f"{prefix}json"
            yield Grammar("json_schema", object_text(self.json, param), param)
        if self.json_object:
            yield Grammar("json_object", "", f"{prefix}json_object")
        if self.regex is not None:
            yield Grammar("regex", self.regex, f"{prefix}regex")
        if self.choice is not None:
            choices = msgspec.json.encode(self.choice).decode()
            yield Grammar("choice", choices, f"{prefix}choice")
        if self.grammar is not None:
            yield Grammar("grammar", self.grammar, f"{prefix}grammar")


class JSONSchemaFormat(Wire, frozen=True, kw_only=True):
    """Whether it is `strict` makes no difference: it is enforced."""

    schema: dict[str, Any]


class ResponseFormat(Wire, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None
    schema: dict[str, Any] | None = None
    """llama.cpp's, and others'."""

    def to_grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.json_schema is not None and self.type == "json_schema":
            text = object_text(self.json_schema.schema, "response_format.json_schema.schema")
        elif self.schema is not None:
            text = object_text(self.schema, "response_format.schema")
        elif self.type == "json_schema":
            raise missing("response_format.json_schema")
        else:
            return Grammar("json_object", "")
        return Grammar("json_schema", text)


class SampledRequest(ModelRequest, frozen=True, kw_only=True):
    """What chat completions and completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Without `stream` OpenAI refuses it; LM Studio's clients send it always, so it is ignored."""
    service_tier: str | None = None
    draft_model: str | None = None
    """LM Studio's; here it can only be the one that is configured."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: CountOrNoLimit | None = None
    """LM Studio's; 0 and -1 are off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Factor | None = None
    """LM Studio's name."""
    repetition_penalty: Factor | None = None
    """Everybody else's."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    """-1 is no seed, as in llama.cpp and so in LM Studio."""
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    max_tokens: CountOrNoLimit | None = None
    """-1 is no limit, LM Studio's habit."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    """vLLM's older names for the same."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def grammars(self) -> Iterator[Grammar]:
        """What the answer must match."""
        if self.response_format is not None and (grammar := self.response_format.to_grammar()):
            yield grammar
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        yield from guided.grammars("guided_")
        if self.structured_outputs is not None:
            asked = list(self.structured_outputs.grammars("structured_outputs."))
            if not asked:
                what = "'structured_outputs' names no structure that is known here."
                raise InvalidRequest(what, param="structured_outputs")
            yield from asked

    def to_grammar(self) -> Grammar | None:
        asked = list(self.grammars())
        if len(asked) > 1:
            first, second, *_ = (grammar.param for grammar in asked)
            raise InvalidRequest(
                f"'{first}' and '{second}' cannot be combined: an answer can have one of them.",
                param=second,
            )
        return asked[0] if asked else None

    def to_sampling(
        self, defaults: SamplingDefaults, *, max_tokens: int | None, logprobs: float | None
    ) -> SamplingParams:
        top_k = _or(self.top_k, defaults.top_k)
        return SamplingParams(
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            repetition_penalty=_or(_or(self.repeat_penalty, self.repetition_penalty), 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            top_k=min(max(int(top_k), 0), MAX_COUNT),
            top_p=max(_or(self.top_p, defaults.top_p), SMALLEST_TOP_P),
            min_p=_or(self.min_p, defaults.min_p),
            temperature=_or(self.temperature, defaults.temperature),
            seed=None if self.seed in (None, -1) else int(self.seed),
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=None if logprobs is None else int(logprobs),
        )

    def limit(self, param: str) -> int | None:
        """The limit of tokens in the field `param`."""
        limit: float | None = getattr(self, param)
        if limit is None or limit == -1:
            return None
        if limit < 1:
            raise InvalidRequest(f"Invalid value for '{param}': expected 1 or more.", param=param)
        return min(int(limit), MAX_COUNT)


def refuse(**wanted: object) -> None:
    """
    Raises:
        UnsupportedParameter: something that is correct, but not built, is wanted.
    """
    for param, value in wanted.items():
        if value:
            raise UnsupportedParameter(
                f"Unsupported parameter: this value of '{param}' is not supported.", param=param
            )


def to_inputs(value: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """A text, several, one's token ids or those of several: a list in each case."""
    if isinstance(value, str):
        return [value]
    ids = [item for item in value if isinstance(item, int)]
    if not ids:
        return [item for item in value if not isinstance(item, int)]
    if len(ids) < len(value):
        kinds = [isinstance(item, int) for item in value]
        raise InvalidRequest(
            f"'{param}' mixes token ids with something else.",
            param=f"{param}[{kinds.index(not kinds[0])}]",
        )
    return [ids]


def object_text(value: str | dict[str, Any], param: str) -> str:
    """The JSON of an object, which clients send as it is or as a string."""
    try:
        parsed = _decoder(dict[str, Any]).decode(value) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"Invalid value for '{param}': expected a JSON object.", param=param
        ) from None
    check_object(parsed, param)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def check_object(value: dict[str, Any], param: str) -> None:
    """
    Raises:
        InvalidRequest: msgpack could not carry it, or a template not walk through it.
    """
    if not _plain(value, MAX_NESTING):
        raise InvalidRequest(
            f"Invalid value for '{param}': nested more than {MAX_NESTING} levels deep, "
            "or a whole number of more than 64 bits.",
            param=param,
        )


def _plain(value: object, levels: int) -> bool:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_plain(item, levels - 1) for item in inner)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


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
    if absent := _MISSING.fullmatch(what):
        return missing(f"{path}.{absent[1]}".lstrip("."))
    if unknown := _UNKNOWN.fullmatch(what):
        path = f"{path}.{unknown[1]}".lstrip(".")
        return InvalidRequest(f"Unknown parameter: '{path}'.", param=path)
    where = f" for '{path}'" if path else ""
    what = what.replace("`", "").replace("float that's a multiple of 1.0", "a whole number")
    what = what[:200]  # it may quote what the client has sent
    return InvalidRequest(f"Invalid value{where}: {what}.", param=path or None)


def missing(param: str) -> MissingParameter:
    return MissingParameter(f"Missing required parameter: '{param}'.", param=param)


# What goes out. None is sent as null, UNSET is not sent.


class PromptTokensDetails(Wire, frozen=True, kw_only=True):
    cached_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(Wire, frozen=True, kw_only=True):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(Wire, frozen=True, kw_only=True):
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
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=usage.reasoning_tokens,
                accepted_prediction_tokens=usage.accepted_tokens,
                rejected_prediction_tokens=usage.drafted_tokens - usage.accepted_tokens,
            ),
        )


class Stats(Wire, frozen=True, kw_only=True):
    """LM Studio's, of speculative decoding."""

    draft_model: str | UnsetType = UNSET
    """Not there: what the text repeats was the draft."""
    total_draft_tokens_count: int
    accepted_draft_tokens_count: int
    rejected_draft_tokens_count: int

    @classmethod
    def of(cls, usage: Usage, draft_model: str | None) -> Stats | UnsetType:
        """UNSET: nothing was drafted."""
        if not usage.drafted_tokens:
            return UNSET
        return cls(
            draft_model=draft_model or UNSET,
            total_draft_tokens_count=usage.drafted_tokens,
            accepted_draft_tokens_count=usage.accepted_tokens,
            rejected_draft_tokens_count=usage.drafted_tokens - usage.accepted_tokens,
        )


class Answer(Wire, frozen=True, kw_only=True):
    """A completion of any kind, or a piece of it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Any]
    usage: CompletionUsage | UnsetType | None = UNSET
    """Of a piece, with `include_usage`: null, except in the last one. Without it: not there."""
    stats: Stats | UnsetType = UNSET
    """Beside a usage that is not null."""
    service_tier: str | UnsetType = UNSET
    system_fingerprint: str


class Model(Wire, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(Wire, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
