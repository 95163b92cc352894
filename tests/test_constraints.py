"""Constrained decoding: random walks through the masks end in answers that are as asked for."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, Final, Literal

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx import gguf_tokenizer, grammars
from lmx.backends import Vocabulary
from lmx.constraints import MAX_CACHED, Calls, Compiled, Constraint, Constraints
from lmx.errors import GenerationFailed, InvalidRequest, QueueFull
from lmx.generation import Grammar, Tool
from lmx.gguf_header import read_header

from .models import smollm2_gguf
from .schemas import AWKWARD, Schema, objects, schemas

MARKERS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens added to SmolLM2's; the last two are text, as in Qwen's vocabulary."""
REASONING: Final = ("<think>", "</think>")

Ids = npt.NDArray[np.int64]


@cache
def tokenizer() -> Any:
    tokenizer = gguf_tokenizer.build_tokenizer(read_header(smollm2_gguf()))
    tokenizer.add_tokens(list(MARKERS))
    return tokenizer


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


@cache
def vocabulary() -> Vocabulary:
    header = read_header(smollm2_gguf())
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(256 + n): byte for n, byte in enumerate(others)}
    alphabet |= {chr(byte): byte for byte in printable}
    names, types = (header.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    control = {i for i, kind in enumerate(types) if kind == 3}
    tokens = [
        name.encode() if i in control else bytes(alphabet[c] for c in name)
        for i, name in enumerate(names)
    ]
    control |= {len(tokens), len(tokens) + 1}
    end = frozenset(gguf_tokenizer.end_token_ids(header))
    return Vocabulary([*tokens, *(m.encode() for m in MARKERS)], frozenset(control), end)


@cache
def constraints() -> Constraints:
    return Constraints(vocabulary(), encode)


def compiled(
    grammar: Grammar | None = None,
    calls: Calls | None = None,
    reasoning: tuple[str, str] | None = None,
    thinking: bool = False,
) -> Compiled:
    result = constraints().compile(grammar, calls, reasoning=reasoning, thinking=thinking)
    assert result is not None
    return result


def json_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def tool(name: str = "f", parameters: Schema | None = None, *, strict: bool = False) -> Tool:
    return Tool(name, None, parameters, strict)


def calls(*tools: Tool, required: bool = True, parallel: bool = False, **markers: str) -> Calls:
    start, end = markers.get("start", "<tool_call>"), markers.get("end", "</tool_call>")
    return Calls(start, end, list(tools), required, parallel)


def allowed(constraint: Constraint) -> Ids:
    mask = constraint.mask()
    assert constraint.error is None, constraint.error.message
    assert mask is not None and len(mask) == 6148
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def everything_but_the_end(constraint: Constraint) -> bool:
    return set(range(len(vocabulary().tokens))) - set(allowed(constraint)) == vocabulary().end


def feed(constraint: Constraint, text: str) -> None:
    for token in encode(text):
        constraint.accept(token)


def accepts(constraint: Constraint, text: str) -> bool:
    """Every token is in its mask, and an end token in the one after them."""
    for token in encode(text):
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return set(allowed(constraint).tolist()) >= vocabulary().end


def has(ids: Ids, token: int) -> bool:
    at = int(np.searchsorted(ids, token))
    return at < len(ids) and int(ids[at]) == token


CLOSING: Final = [b"}", b"]", b"null", b":", b"</tool_call>", b")", b"\n", b'"']
CLOSING_STRINGS: Final = [b'"', b"@"]


def walk(constraint: Constraint, seed: int, freely: int = 25) -> str:
    """An answer of random tokens; after so many, of those that bring it to its end."""
    rng, tokens, answer = np.random.default_rng(seed), vocabulary().tokens, b""
    for step in range(1000):
        ids = allowed(constraint)
        ends = [c for c in vocabulary().end if has(ids, c)]
        if ends and (step > freely or len(ids) == len(ends)):
            return answer.decode()
        closing = CLOSING_STRINGS if len(ids) > 5000 else CLOSING
        quick = [c for c in map(tokens.index, closing) if has(ids, c)] if step > freely else []
        token = quick[0] if quick else int(rng.choice(ids))
        if token in ends:
            continue
        constraint.accept(token)
        answer += tokens[token]
    raise AssertionError(f"no end: {answer!r:.500}")


def validate(text: str, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@given(schema=schemas, seed=st.integers(0, 999))
@settings(max_examples=200)
def test_generated_schemas(schema: Schema, seed: int) -> None:
    """Whatever tokens are drawn, the answer is valid for its schema."""
    validate(walk(compiled(json_schema(schema)).new(), seed), schema)


@pytest.mark.parametrize("schema", AWKWARD.values(), ids=AWKWARD)
def test_awkward_schemas(schema: Any) -> None:
    """Recursion, unions, booleans and missing types are enforced like the rest."""
    compiled_schema = compiled(json_schema(schema))
    for seed in range(8):
        validate(walk(compiled_schema.new(), seed), schema)


@given(parameters=objects, seed=st.integers(0, 999))
@settings(max_examples=50)
def test_generated_tools(parameters: Schema, seed: int) -> None:
    """A required call names its tool, and its arguments are valid for the tool's schema."""
    text = walk(compiled(calls=calls(tool("get", parameters, strict=True))).new(), seed)
    call = re.fullmatch(r"<tool_call>\n?(.*?)\n?</tool_call>", text, re.DOTALL)
    assert call is not None
    written = json.loads(call[1])
    assert written.keys() == {"name", "arguments"} and written["name"] == "get"
    jsonschema.Draft202012Validator(parameters).validate(written["arguments"])


def test_json_object() -> None:
    """`json_object` is any object, and nothing but an object."""
    for seed in range(10):
        text = walk(compiled(Grammar("json_object", "")).new(), seed)
        assert isinstance(json.loads(text), dict)


def test_whitespace_is_bounded() -> None:
    """One line as `json.dumps` writes it, compact or not: there is no room to ramble in."""
    value = {"a": [1, {"b": []}], "c": "x"}
    for separators in ((", ", ": "), (",", ":")):
        text = json.dumps(value, separators=separators)
        assert accepts(compiled(json_schema({})).new(), text)
    for text in ('{"a" : 1}', '{ "a": 1}', '{"a":  1}', '{"a": 1 }', '{\n"a": 1}', '{"a": 1}\n'):
        assert not accepts(compiled(json_schema({})).new(), text)


LARK = 'start: "a" b+ "é"?\nb: /[0-9]/ | "(" b ")"'
OPAQUE = 'start: A "&" /[~&]/ # & \nA: "a"~2 // ~'
GBNF = 'root ::= "yes" rest*\nrest ::= [ ] [0-9]+'


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[a-c]{3}x?", "[a-c]{3}x?"),
        ("regex", "^a/b$", "a/b"),
        ("regex", "\\d+\n", "\\d+\n"),
        ("choice", '["a", "ab", "q\\"/\\\\", "ü\\n😀\\u0000"]', 'a|ab|q"/\\\\|ü\n😀\x00'),
        ("choice", '["only"]', "only"),
        ("grammar", LARK, r"a([0-9]|\(+[0-9]\)+)+é?"),
        ("grammar", OPAQUE, "aa&[~&]"),
        ("grammar", 'start: %json\n{"const": 1, "format": "x"} "."', "1[.]"),
        ("grammar", GBNF, "yes( [0-9]+)*"),
    ],
)
def test_other_grammars(
    kind: Literal["regex", "choice", "grammar"], text: str, pattern: str
) -> None:
    """Answers match the regular expression, are one of the choices or belong to the grammar."""
    for seed in range(10):
        answer = walk(compiled(Grammar(kind, text)).new(), seed, freely=5)
        assert re.fullmatch(pattern, answer), answer


def test_every_choice_can_be_taken() -> None:
    """One choice may be the beginning of another; both may be answered, and nothing else."""
    choices = compiled(Grammar("choice", '["a", "ab", "\\"", "é"]'))
    assert all(accepts(choices.new(), text) for text in ("a", "ab", '"', "é"))
    assert not any(accepts(choices.new(), text) for text in ("", "b", "abc"))


def test_only_end_tokens_follow() -> None:
    """After the answer is complete every end token may come, and no other."""
    constraint = compiled(Grammar("choice", '["yes"]')).new()
    assert not set(allowed(constraint)) & vocabulary().end
    feed(constraint, "yes")
    assert set(allowed(constraint)) == vocabulary().end
    constraint.accept(min(vocabulary().end))
    assert set(allowed(constraint)) == vocabulary().end


def test_nothing_to_constrain() -> None:
    """Without a grammar and without tools there is no constraint."""
    assert constraints().compile(None, None, reasoning=REASONING, thinking=True) is None
    assert constraints().compile(None, calls(), reasoning=None, thinking=False) is None


DEEP: Any = 1
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP if isinstance(DEEP, dict) else {}}
WORDS: Final = [f"{n:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for n in range(5000)]

JOINED: Final = {"allOf": [{"pattern": f".*{word}.*"} for word in WORDS[:24]]}

REFUSED: Final[list[tuple[Grammar, str]]] = [
    *(
        (json_schema(schema), expected)
        for schema, expected in [
            (False, "nothing"),
            ([], "object or a boolean"),
            ({"type": "objekt"}, "schema.type"),
            ({"type": [{}]}, "schema.type"),
            ({"properties": []}, "schema.properties"),
            ({"properties": {"a": {"items": 5}}}, "schema.properties.a.items"),
            ({"anyOf": [1]}, "schema.anyOf.0"),
            ({"required": "a"}, "required"),
            ({"minLength": -1}, "minLength"),
            ({"maximum": True}, "maximum"),
            ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
            ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
            ({"enum": []}, "anyOf"),
            ({"$ref": "#"}, "nothing"),
            ({"$ref": "#/definitions/missing"}, "/definitions/missing"),
            ({"$ref": "http://127.0.0.1/s"}, "$ref"),
            ({"not": {"type": "string"}}, "not"),
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"type": "string", "pattern": "(?=a)"}, "look-around"),
            ({"type": "string", "pattern": "a" * 1025}, "1024"),
            ({"minLength": 1.5}, "minLength"),
            ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
            ({"propertyNames": {"enum": ["a"]}, "properties": {}}, "propertyNames"),
            (DEEP, "32"),
            ({"enum": WORDS}, "4096"),
            ({"properties": {word: {} for word in WORDS[:1025]}}, "1024"),
            ({"multipleOf": 99999989}, "multipleOf"),
            ({"allOf": [{"pattern": f".*{word}.*"} for word in WORDS[:30]]}, "patterns"),
            ({"description": "x" * 65536}, "65536"),
        ]
    ),
    (Grammar("json_schema", "{"), "line 1"),
    (Grammar("json_schema", "[" * 60_000), "recursion"),
    (Grammar("regex", "[", "structured_outputs.regex"), "unclosed"),
    (Grammar("regex", r"\bword\b"), "lookaround"),
    (Grammar("regex", "a" * 65537), "65536"),
    (Grammar("choice", "[]"), "choices"),
    (Grammar("choice", json.dumps(WORDS)), "choices"),
    (Grammar("grammar", "root ::= ("), "Expected"),
    (Grammar("grammar", "root ::= missing"), "missing"),
    (Grammar("grammar", ""), "root"),
    (Grammar("grammar", "root ::= " + "(" * 3000), "recursion"),
    (Grammar("grammar", "start: missing"), "missing"),
    (Grammar("grammar", "start: start"), "nothing"),
    (Grammar("grammar", 'start: T\nT: "&" & /a~/'), "'&'"),
    (Grammar("grammar", "start: T\nT: ~(/a/ | /b/)"), "'~'"),
    (Grammar("grammar", 'start: /"/ T # "\nT: /a/ & /b/ # "'), "'&'"),
    (Grammar("grammar", "start: %json " + json.dumps(JOINED)), "patterns"),
    (Grammar("grammar", "start: %json " + "[" * 60_000), "recursion"),
]


@pytest.mark.parametrize(
    ("grammar", "expected"), REFUSED, ids=[f"{g.kind}-{g.text:.40}" for g, _ in REFUSED]
)
def test_refused(grammar: Grammar, expected: str) -> None:
    """What is wrong, unsatisfiable, unsupported or too large is refused in one line saying why."""
    with pytest.raises(InvalidRequest) as caught:
        compiled(grammar)
    assert caught.value.param == grammar.param
    assert expected in caught.value.message
    assert len(caught.value.message) <= 500 and "\n" not in caught.value.message


MANY_RULES: Final = "\n".join(
    ["start: r0", *(f"r{i}: r{i + 1}" for i in range(4500)), 'r4500: "x"']
)
"""A row of rules so long that compiling it overflows the usual stack."""


@pytest.mark.parametrize(
    "grammar",
    [
        json_schema({"type": "string", "minLength": 100_000}),
        json_schema({"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"}),
        json_schema({"type": "string", "pattern": "^(a*)*b(.*a){20}$"}),
        json_schema({"type": "array", "minItems": 100_000}),
        json_schema({"enum": WORDS[:4096]}),
        json_schema({"properties": {word: {"type": "string"} for word in WORDS[:1024]}}),
        Grammar("choice", json.dumps(WORDS[:4096])),
        Grammar("grammar", MANY_RULES),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text:.40}",
)
def test_large_but_possible(grammar: Grammar) -> None:
    """Large grammars within the limits compile, and give masks."""
    constraint = compiled(grammar).new()
    for _ in range(5):
        constraint.accept(int(allowed(constraint)[-1]))
        assert constraint.error is None


def test_a_slow_grammar_is_given_up() -> None:
    """Compiling longer than its time is an error of the request."""
    tokenizer = compiled(Grammar("json_object", "")).tokenizer
    schema = {"type": "object", "properties": {word: {} for word in WORDS[:1000]}}
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    result = grammars.compilation(vocabulary().end, tokenizer, grammar, seconds=0)
    assert result() == "it takes more than 0 s to compile"


def test_few_grammars_at_a_time() -> None:
    """While two are being compiled, given up or not, others are refused, to be tried again."""
    tokenizer = compiled(Grammar("json_object", "")).tokenizer
    with grammars.places, grammars.places, pytest.raises(QueueFull, match="compiled"):
        grammars.compilation(vocabulary().end, tokenizer, "{}", seconds=0)


@pytest.mark.parametrize(
    ("parameters", "strict", "refused"),
    [
        ({"type": "array", "uniqueItems": True}, False, True),
        ({"type": "objekt"}, False, True),
        ({"properties": {"a": {"pattern": "a" * 1025}}}, True, True),
        ({"properties": {"a": {"pattern": "a" * 1025}}}, False, False),
        ({"properties": {"a": {"$ref": "http://127.0.0.1/s"}}}, False, False),
        ({"properties": {word: {} for word in WORDS[:1025]}}, False, False),
        ({"description": "x" * 65536}, False, False),
        (DEEP, False, False),
        ({"properties": []}, False, True),
        ({"properties": {"a": {"uniqueItems": True}}}, True, True),
        ({"properties": {"a": {"uniqueItems": True}}}, False, False),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, False, False),
        ({"type": ["object", "null"]}, True, False),
        ({}, True, False),
        (None, True, False),
    ],
)
def test_tool_schemas(parameters: Schema | None, strict: bool, refused: bool) -> None:
    """A wrong schema is refused by its place; one that cannot be enforced only if it is strict."""
    tools = calls(tool("good"), tool("other", parameters, strict=strict))
    if refused:
        with pytest.raises(InvalidRequest, match="'other'") as caught:
            compiled(calls=tools)
        assert caught.value.param == "tools[1].function.parameters"
    else:
        text = walk(compiled(calls=tools).new(), 1)
        assert isinstance(json.loads(text[11:-12])["arguments"], dict)


def test_too_many_tools() -> None:
    """512 tools compile, one more is refused."""
    tools = [tool(f"tool_{i}", {"properties": {"a": {"type": "string"}}}) for i in range(513)]
    assert walk(compiled(calls=calls(*tools[:512])).new(), 0)
    with pytest.raises(InvalidRequest, match="512"):
        compiled(calls=calls(*tools))


def test_definitions_belong_to_their_tool() -> None:
    """Two tools may use one name for different definitions."""

    def parameters(kind: str) -> Schema:
        return {
            "$defs": {"x": {"type": kind}},
            "properties": {"v": {"$ref": "#/$defs/x"}},
            "required": ["v"],
            "additionalProperties": False,
        }

    both = compiled(calls=calls(tool("i", parameters("integer")), tool("s", parameters("string"))))
    for name, value, good in [("i", 1, True), ("s", "x", True), ("i", "x", False), ("s", 1, False)]:
        call = json.dumps({"name": name, "arguments": {"v": value}})
        assert accepts(both.new(), f"<tool_call>\n{call}\n</tool_call>") == good


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("parallel", "text", "good"),
    [
        (False, CALL, True),
        (False, CALL.replace("\n", ""), True),
        (False, CALL + "\n" + CALL, False),
        (True, CALL + "\n" + CALL, True),
        (True, CALL + CALL, True),
        (True, CALL + "\n\n" + CALL, False),
        (True, "Sure! " + CALL, False),
        (True, CALL + " done", False),
        (True, CALL.replace('"f"', '"g"'), False),
        (True, CALL.replace("{}", "[]"), False),
        (True, "", False),
    ],
)
def test_required(parallel: bool, text: str, good: bool) -> None:
    """A required answer is one call, or several if they may be parallel, and nothing else."""
    assert accepts(compiled(calls=calls(tool(), parallel=parallel)).new(), text) == good


def test_markers_are_tokens() -> None:
    """A marker that is a token is written as that token, and never within a string."""
    constraint = compiled(calls=calls(tool())).new()
    assert set(allowed(constraint)) == {vocabulary().tokens.index(b"<tool_call>")}
    feed(constraint, '<tool_call>{"name": "f", "arguments": {"a": "')
    assert vocabulary().tokens.index(b"</tool_call>") not in allowed(constraint)


def test_text_is_free_until_a_call() -> None:
    """Text has no mask; a call in it has, until its end; then text goes on."""
    constraint = compiled(calls=calls(tool(), required=False, parallel=True)).new()
    for _ in range(2):
        feed(constraint, "Let me see </tool_call>.")
        assert constraint.mask() is None
        feed(constraint, "<tool_call>")
        assert vocabulary().tokens.index(b"\n") in allowed(constraint)
        feed(constraint, '\n{"name": "f", "arguments": {"a": 1}}\n')
        assert set(allowed(constraint)) == {vocabulary().tokens.index(b"</tool_call>")}
        feed(constraint, "</tool_call>")
        assert constraint.mask() is None


def test_one_call_ends_the_answer() -> None:
    """Where calls may not be parallel, only end tokens follow the first one."""
    constraint = compiled(calls=calls(tool(), required=False)).new()
    feed(constraint, "Text. " + CALL)
    assert set(allowed(constraint)) == vocabulary().end


def test_markers_of_text() -> None:
    """A marker that is no token may be cut anywhere; what stands behind it belongs to the call."""
    which = calls(tool(), required=False, start='[{"call":', end="}]")
    constraint = compiled(calls=which).new()
    feed(constraint, 'x [{"ca')
    assert constraint.mask() is None
    feed(constraint, 'll":\n')
    assert constraint.mask() is not None
    assert not accepts(constraint, "\n")


def test_a_call_that_began_otherwise_stays_free() -> None:
    """Where the marker's token goes on with what no call begins with, the call is not bound."""
    tokens = [*vocabulary().tokens, b"[call]nonsense"]
    other = Constraints(Vocabulary(tokens, vocabulary().control, vocabulary().end), encode)
    which = calls(tool(), required=False, start="[call]", end="[/call]")
    compiled = other.compile(None, which, reasoning=None, thinking=False)
    assert compiled is not None
    constraint = compiled.new()
    constraint.accept(len(tokens) - 1)
    assert constraint.mask() is None
    feed(constraint, "more[/call]")
    assert constraint.mask() is not None  # only end tokens


def test_grammar_or_calls() -> None:
    """With both, the answer is one or the other."""
    either = compiled(json_schema({"type": "integer"}), calls(tool(), required=False))
    assert accepts(either.new(), "12")
    assert accepts(either.new(), CALL)
    assert not accepts(either.new(), "12" + CALL)


@pytest.mark.parametrize("newlines", ["", "\n", "\n\n"])
def test_grammar_begins_behind_the_reasoning(newlines: str) -> None:
    """Reasoning is free; behind it, and up to two newlines, comes the grammar."""
    constraint = compiled(json_schema({"type": "integer"}), None, REASONING, True).new()
    feed(constraint, "Hm, <think> {1}\n")
    assert everything_but_the_end(constraint)
    feed(constraint, "</think>" + newlines)
    assert accepts(constraint, "12")
    assert "\n" not in {vocabulary().tokens[token].decode() for token in allowed(constraint)}


def test_newlines_behind_the_reasoning_end() -> None:
    """A third newline is not allowed."""
    constraint = compiled(json_schema({"type": "integer"}), None, REASONING, True).new()
    feed(constraint, "</think>\n")
    tokens = vocabulary().tokens
    assert tokens.index(b"\n\n") not in allowed(constraint)
    assert tokens.index(b"\n") in allowed(constraint)
    feed(constraint, "\n")
    assert tokens.index(b"\n") not in allowed(constraint)


@pytest.mark.parametrize("behind", ['"', ' "', '\n\n"'])
def test_text_markers_of_reasoning(behind: str) -> None:
    """The closing marker may be text; whitespace behind it in the same token does not count."""
    tokens = [*vocabulary().tokens, f"]{behind}".encode()]
    other = Constraints(Vocabulary(tokens, vocabulary().control, vocabulary().end), encode)
    grammar, reasoning = json_schema({"const": "x"}), ("[think]", "[end]")
    result = other.compile(grammar, None, reasoning=reasoning, thinking=True)
    assert result is not None
    constraint = result.new()
    feed(constraint, "thoughts [end")
    assert everything_but_the_end(constraint)
    constraint.accept(len(tokens) - 1)
    assert accepts(constraint, 'x"')


def test_reasoning_may_be_opened_first() -> None:
    """Where the prompt does not end in reasoning, the first token may open it."""
    thinking = compiled(json_schema({"type": "integer"}), None, REASONING)
    opening = vocabulary().tokens.index(b"<think>")
    assert opening in allowed(thinking.new())
    assert accepts(thinking.new(), "12")
    constraint = thinking.new()
    feed(constraint, "<think>free")
    assert everything_but_the_end(constraint)
    feed(constraint, "</think>")
    assert accepts(constraint, "12")
    constraint = thinking.new()
    feed(constraint, "1")
    assert opening not in allowed(constraint)


@pytest.mark.parametrize(
    ("thinking", "text"),
    [(True, "x <tool_call> y"), (False, "\n<think> <tool_call> y"), (False, "<think><tool_call>")],
)
def test_reasoning_about_calls(thinking: bool, text: str) -> None:
    """A start marker within reasoning begins no call, one behind it does."""
    which = calls(tool(), required=False)
    constraint = compiled(None, which, REASONING, thinking).new()
    feed(constraint, text)
    assert constraint.mask() is None
    feed(constraint, "</think>\n\nText ")
    assert constraint.mask() is None
    feed(constraint, CALL)
    assert set(allowed(constraint)) == vocabulary().end


def test_required_call_behind_reasoning() -> None:
    """Reasoning may come before a required call too, and cannot end the answer."""
    constraint = compiled(None, calls(tool()), REASONING, True).new()
    feed(constraint, "Which one?")
    assert everything_but_the_end(constraint)
    feed(constraint, "</think>\n")
    assert accepts(constraint, CALL)


def test_restart() -> None:
    """Restarting with an answer is the same as having drawn it, whatever came before."""
    thinking = compiled(None, calls(tool(), required=False), REASONING, True)
    answer = encode('Hm.</think>\n\nSo: <tool_call>\n{"name": "f", "arg')
    drawn, restarted = thinking.new(), thinking.new()
    for token in answer:
        drawn.accept(token)
    feed(restarted, "</think><tool_call>{")
    restarted.restart(answer)
    assert drawn.mask() is not None
    assert drawn.mask() == restarted.mask()
    restarted.restart([])
    assert restarted.mask() is None


def test_a_refused_token_is_an_error() -> None:
    """A token that the mask did not allow ends in an error, and in no mask any more."""
    constraint = compiled(json_schema({"type": "integer"})).new()
    feed(constraint, "word")
    assert isinstance(constraint.error, GenerationFailed)
    assert constraint.mask() is None
    constraint.restart([])
    assert constraint.error is None and accepts(constraint, "12")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_token_beyond_the_vocabulary(thinking: bool) -> None:
    """Padded logits may yield one: it is no text in free stretches, elsewhere an error."""
    constraint = compiled(json_schema({"type": "integer"}), None, REASONING, thinking).new()
    constraint.accept(len(vocabulary().tokens))
    assert (constraint.error is None) == thinking


def test_too_much_to_compute_is_an_error() -> None:
    """A mask that cannot be computed within the limits is an error, and None."""
    constraint = compiled(Grammar("regex", "(((a{0,1000}){0,1000}){0,1000}){0,1000}")).new()
    while constraint.mask() is not None:
        constraint.accept(vocabulary().tokens.index(b"a"))
    assert isinstance(constraint.error, GenerationFailed)


def test_answers_are_independent() -> None:
    """Answers of one compiled grammar do not know each other."""
    number = compiled(json_schema({"type": "integer"}))
    one, two = number.new(), number.new()
    feed(one, "12")
    assert accepts(two, "-3") and accepts(one, "4")


def test_grammars_are_kept() -> None:
    """A grammar is compiled once while it is among the last used ones."""
    mine = Constraints(vocabulary(), encode)

    def matcher(number: int) -> Any:
        grammar = json_schema({"const": number})
        result = mine.compile(grammar, None, reasoning=None, thinking=False)
        assert result is not None
        return result.matcher

    first = matcher(0)
    assert matcher(0) is first
    for number in range(1, MAX_CACHED + 1):
        matcher(number)
    assert matcher(0) is not first


def test_refusals_are_kept() -> None:
    """What was refused is not compiled again."""
    mine = Constraints(vocabulary(), encode)

    def refuse() -> None:
        with pytest.raises(InvalidRequest, match="unclosed"):
            mine.compile(Grammar("grammar", "start: /[/"), None, reasoning=None, thinking=False)

    refuse()
    with grammars.places, grammars.places:
        refuse()


def test_awkward_vocabulary() -> None:
    """Tokens twice in the vocabulary may both come; nameless and broken ones never do."""
    tokens = [b"</s>", b"", b"", b"\xff", b"a", b"b", b"a", b"ab", b" a"]
    small = Vocabulary(tokens, frozenset({0, 1}), frozenset({0}))
    # A tokenizer that puts a space before every text, as SentencePiece's does.
    odd = Constraints(small, lambda text: [8] if text == "a" else [8, 5])
    result = odd.compile(Grammar("regex", "a|b|ab"), None, reasoning=None, thinking=False)
    assert result is not None and result.new().mask() == bytes([0b11110000, 0, 0, 0])
    result = odd.compile(Grammar("choice", '["ab"]'), None, reasoning=None, thinking=False)
    assert result is not None
    constraint = result.new()
    mask = constraint.mask()
    assert mask is not None and mask[1] == 0  # no space
    constraint.accept(7)
    assert constraint.mask() == bytes([1, 0, 0, 0])
