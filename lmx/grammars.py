"""What clients ask for, as llguidance's grammars: JSON schemas, regular expressions, tool calls.

Refused is what is wrong and what would take too long: llguidance reports keywords it does not know,
but computes without end on some small schemas.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark

from .errors import InvalidRequest, QueueFull
from .generation import Grammar, Tool

COMPILE_SECONDS: Final = 2.0
STACK_BYTES: Final = 64 * 1024 * 1024
"""llguidance recurses 4 KiB deep for each rule in a row, of which a text can have 8,000."""
LIMITS: Final = LLParserLimits(
    # An object of 1,024 optional properties needs 4,103 and 140,000; its slowest mask takes 40 ms.
    max_items_in_row=10_000, step_max_items=200_000, max_lexer_states=100_000, verbose_errors=False
)  # fmt: skip
MAX_TOOLS: Final = 512
MESSAGE_CHARACTERS: Final = 400
NOTHING: Final = "nothing can match it"
MAX_CHARACTERS: Final = 64 * 1024
MAX_DEPTH: Final = 32
"""Of schemas in schemas."""
MAX_PROPERTIES: Final = 1024
MAX_ENUM: Final = 4096
MAX_PATTERN_CHARACTERS: Final = 1024
MAX_JOINED_PATTERNS: Final = 9
"""Each more that one string must match takes up to 4 times as long: 0.4 s for 9, 21 s for 12."""
MAX_MULTIPLE: Final = 100_000
"""The least common multiple of all `multipleOf`, as digits without zeros at the end: 0.4 s."""

JSON_OPTIONS: Final = {
    "whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"
}  # fmt: skip
"""One line, with a space where `json.dumps` has one or none. Given more, models write blank lines
forever. And whitespace before a colon costs sense: as a name's quote then ends all that is certain,
it comes as a token by itself, and from there SmolLM2 broke the line, which it never does freely."""
_OPTIONS: Final = {"x-guidance": JSON_OPTIONS}
ANY_OBJECT: Final = {"type": "object"} | _OPTIONS

FORMATS: Final = {
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"
}  # fmt: skip
"""What llguidance can enforce."""
_TYPES: Final = {"null", "boolean", "integer", "number", "string", "array", "object"}
_MAPS: Final = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS: Final = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMAS: Final = {*_LISTS, "items", "additionalProperties", "propertyNames", "not", "contains"}
_NOTES: Final = {"title", "description", "$comment", "default", "examples"}
_BOUNDS: Final = {a + b for a in ("min", "max") for b in ("Length", "Items", "Properties")}
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(_MAPS, (dict,)),
    **dict.fromkeys([*_LISTS, "enum", "required"], (list,)),
    **dict.fromkeys(["additionalProperties", "propertyNames", "not"], (dict, bool)),
    **dict.fromkeys(["$ref", "pattern", "format"], (str,)),
    **dict.fromkeys(["multipleOf", "minimum", "maximum", *_BOUNDS], (int, float)),
    "items": (dict, bool, list),
    "type": (str, list),
}
_LOOK_AROUND: Final = re.compile(r"(?<!\\)\(\?<?[=!]")
_LARK: Final = re.compile(
    r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|<[^<>\s]+>'
    r'|~[ \t]*\d+|%json\s*|[&~%]|[^#/"<&~%]+'
)
"""Comments, strings, regular expressions and tokens, as llguidance's lexer has them; the rest."""


class _TooMuch(ValueError):
    """It is valid, but it cannot be enforced."""


@dataclass(frozen=True, slots=True)
class Calls:
    """How the model writes a call, `{"name": ..., "arguments": {...}}` between two markers, and
    which ones it may write."""

    start: str
    end: str
    tools: list[Tool]
    required: bool
    parallel: bool


def answer(grammar: Grammar) -> dict[str, Any]:
    """One of llguidance's grammars."""
    try:
        if len(grammar.text) > MAX_CHARACTERS:
            raise ValueError(f"longer than {MAX_CHARACTERS} characters")
        if grammar.kind == "json_object":
            return {"json_schema": ANY_OBJECT}
        if grammar.kind == "json_schema":
            return {"json_schema": _checked(json.loads(grammar.text)) | _OPTIONS}
        if grammar.kind == "choice":
            choices = json.loads(grammar.text)
            if not 0 < len(choices) <= MAX_ENUM:
                raise ValueError(f"expected 1 to {MAX_ENUM} choices")
            return {"lark_grammar": f"start: CHOICE\nCHOICE: {' | '.join(map(_quoted, choices))}"}
        if grammar.kind == "regex":
            return {"lark_grammar": f"start: /{regex_to_lark(grammar.text, '')}/"}
        return {"lark_grammar": _lark(grammar_from("grammar", grammar.text))}
    except (ValueError, RecursionError) as error:
        raise refused(str(error), grammar.param) from None


def _lark(text: str) -> str:
    """Lark without what computes without end: terminals joined by & (or by |, with ~ before each),
    and schemas that are not checked."""
    parts, at = [], 0
    while at < len(text):
        token = _LARK.match(text, at)
        if token is None or token[0] in ("&", "~"):
            raise ValueError(f"{text[at : at + 20]!r}: '{text[at]}' is not supported here")
        at = token.end()
        parts.append(token[0])
        if token[0].startswith("%json"):
            schema, at = json.JSONDecoder().raw_decode(text, at)
            parts.append(json.dumps(_checked(schema)))
    return "".join(parts)


def arguments(tool: Tool, param: str) -> dict[str, Any]:
    """The schema of the tool's arguments, which are an object whatever it says: any object, where
    the schema is too much to enforce and need not be."""
    try:
        text = json.dumps(tool.parameters or {})
        if len(text) > MAX_CHARACTERS:
            raise _TooMuch(f"longer than {MAX_CHARACTERS} characters")
        schema = _checked(json.loads(text))
        if "object" not in (types := schema.get("type", "object")):
            raise ValueError(f"arguments are an object, not {types}")
    except (ValueError, RecursionError) as error:
        if not tool.strict and isinstance(error, _TooMuch | RecursionError):
            return ANY_OBJECT
        raise refused(f"tool {tool.name[:64]!r}: {error}", param) from None
    return schema | {"type": "object"} | _OPTIONS


def calls_lark(calls: Calls, special: dict[str, int], in_text: bool, answer: bool) -> str:
    """The grammar of all calls, or of one from behind its start marker."""

    def marker(text: str) -> str:
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if names else [text]
        return " ".join(f"<[{special[p]}]>" if p in special else _quoted(p) for p in parts if p)

    heads = [f'{{"name": {_quoted(tool.name)}, "arguments": ' for tool in calls.tools]
    tools = [f"{_quoted(head)} @t{i} {_quoted('}')}" for i, head in enumerate(heads)]
    newline = _quoted("\n") + "?"
    call = f"{newline} ({' | '.join(tools)}) {newline} {marker(calls.end)}"
    if in_text:
        return f"start: {call}"
    several = f"call ({newline} call)*" if calls.parallel else "call"
    return f"start: {several}{' | @answer' if answer else ''}\ncall: {marker(calls.start)} {call}"


_spawning = threading.Lock()
"""Held while `threading.stack_size`, which is the process's, is not the default."""
places = threading.BoundedSemaphore(2)
"""Compiling cannot be stopped: one that has been given up keeps its place until it ends."""


def compilation(
    end: frozenset[int], tokenizer: LLTokenizer, grammar: str, seconds: float = COMPILE_SECONDS
) -> Callable[[], LLMatcher | str]:
    """Compile llguidance's JSON of grammars; `end` are the tokens that end an answer. What it
    returns waits until so many seconds are over, for the matcher or why there is none.

    Raises:
        QueueFull: too many others are being compiled.
    """
    if not places.acquire(timeout=seconds):
        raise QueueFull("Other grammars are still being compiled.")
    results: list[LLMatcher | str] = []

    def work() -> None:
        try:
            results.append(_matcher(tokenizer, grammar, end))
        finally:
            places.release()

    thread, deadline = threading.Thread(target=work, daemon=True), time.monotonic() + seconds
    with _spawning:
        threading.stack_size(STACK_BYTES)
        thread.start()
        threading.stack_size(0)

    def result() -> LLMatcher | str:
        thread.join(max(0.0, deadline - time.monotonic()))
        return results[0] if results else f"it takes more than {seconds:g} s to compile"

    return result


def _matcher(tokenizer: LLTokenizer, grammar: str, end: frozenset[int]) -> LLMatcher | str:
    """The matcher, or why there is none. Two masks show most grammars that are too complex."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    probe = matcher.deep_copy()
    for _ in range(2):
        bits = int.from_bytes(probe.compute_bitmask(), "little")
        if probe.is_error():
            # NoExtension and NoExtensionBias: no token is possible.
            return NOTHING if "NoExtension" in probe.get_error() else probe.get_error()
        for token in end:
            bits &= ~(1 << token)
        if not bits:
            return matcher if probe.is_accepting() else NOTHING
        probe.consume_token((bits & -bits).bit_length() - 1)
    return matcher


def refused(why: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{param}': {one_line(why)}", param=param)


def one_line(text: str) -> str:
    return " ".join(text.replace("<non-verbose/>", "").split())[:MESSAGE_CHARACTERS]


def _quoted(text: str) -> str:
    """A string in JSON, which is a literal in Lark too."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(slots=True)
class _Count:
    root: Any
    properties: int = 0
    enum: int = 0
    patterns: int = 0
    joins: int = 0
    """Places where two schemas apply to one value."""
    multiple: int = 1


def _checked(schema: Any) -> dict[str, Any]:
    """The schema, as an object of what llguidance knows.

    Raises:
        ValueError: not a schema, or too large a one; says where.
    """
    count = _Count(schema)
    _check(schema, "schema", 0, count)
    for number, limit, what in (
        (count.properties, MAX_PROPERTIES, "properties"),
        (count.enum, MAX_ENUM, "enum values"),
        (min(count.patterns, count.joins + 1), MAX_JOINED_PATTERNS, "patterns that apply together"),
        (count.multiple, MAX_MULTIPLE, "states of 'multipleOf'"),
    ):
        if number > limit:
            raise _TooMuch(f"{number} {what}: at most {limit} are allowed")
    if schema is False:
        raise ValueError(NOTHING)
    return {} if schema is True else schema


def _check(schema: Any, where: str, depth: int, count: _Count) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"'{where}' must be an object or a boolean")
    if depth > MAX_DEPTH:
        raise _TooMuch(f"the schema is nested more than {MAX_DEPTH} deep")
    for key, value in schema.items():
        kinds = _KINDS.get(key, (object,))
        known = isinstance(value, kinds) and not (isinstance(value, bool) and int in kinds)
        if not known:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"'{where}.{key}' must be of type {names}")
        inner: dict[Any, Any] = value if key in _MAPS else {"": value} if key in _SCHEMAS else {}
        if key in _SCHEMAS and isinstance(value, list):
            inner = dict(enumerate(value))
        for name, each in inner.items():
            _check(each, f"{where}.{key}.{name}"[:100].rstrip("."), depth + 1, count)
    _rewrite(schema, count.root)
    for name in [schema.get("pattern", ""), *schema.get("patternProperties", {})]:
        if len(name) > MAX_PATTERN_CHARACTERS:
            raise _TooMuch(f"'{where}' has a pattern above {MAX_PATTERN_CHARACTERS} characters")
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if not isinstance(name, str) or name not in _TYPES:
            raise ValueError(f"'{where}.type' must be one of {', '.join(sorted(_TYPES))}")
    if not schema.get("$ref", "#").startswith("#"):
        raise _TooMuch(f"'{where}.$ref' must stay in the schema: it must begin with #")
    count.properties += len(schema.get("properties", ()))
    count.enum += len(schema.get("enum", ()))
    count.patterns += "pattern" in schema
    count.joins += max(0, len(schema.get("allOf", ())) - 1)
    count.joins += "pattern" in schema and not schema.keys().isdisjoint({*_LISTS, "$ref"})
    if (multiple := schema.get("multipleOf", 0)) > 0:
        digits = Decimal(str(multiple)).normalize().as_tuple().digits
        count.multiple = math.lcm(count.multiple, int("".join(map(str, digits))))


def _rewrite(schema: dict[str, Any], root: dict[str, Any]) -> None:
    """Make what Zod and pydantic emit into what llguidance knows, without formats that cannot be
    enforced, which no answer could break, and patterns that cannot be beside formats that can."""
    for key in schema.keys() & _BOUNDS:
        schema[key] = int(schema[key]) if schema[key] % 1 == 0 else schema[key]
    if schema.get("format", "") not in FORMATS:
        schema.pop("format", None)
    pattern, names = schema.get("pattern", ""), schema.get("propertyNames", True)
    too_much = len(pattern) > MAX_PATTERN_CHARACTERS or _LOOK_AROUND.search(pattern)
    if too_much and "format" in schema:
        del schema["pattern"]
    if isinstance(names, dict) and list(names) == ["$ref"]:
        known = root.get("$defs")
        names = known.get(names["$ref"].removeprefix("#/$defs/")) if isinstance(known, dict) else 0
    if isinstance(names, dict):
        names = {k: v for k, v in names.items() if k not in _NOTES and (k, v) != ("type", "string")}
    if isinstance(names, dict) and list(names) == ["enum"] and "properties" not in schema:
        words = "|".join(re.escape(n) for n in names["enum"] if isinstance(n, str))
        if 0 < len(words) < MAX_PATTERN_CHARACTERS - 4 and "patternProperties" not in schema:
            names, each = True, schema.get("additionalProperties", True)
            schema |= {"patternProperties": {f"^({words})$": each}, "additionalProperties": False}
    if names in ({}, True):
        schema.pop("propertyNames", None)
