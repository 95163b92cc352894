"""What becomes of a model's text: reasoning, content, calls, and that the cutting never matters."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.generation import Part, TokenLogprob, ToolCall
from lmx.output import MAX_GAP_CHARS, OutputParser
from lmx.tool_calls import MAX_BODY_CHARS, MAX_HEADER_CHARS, CallFormat

THINK = ("<think>", "</think>")
JSON = CallFormat("<tool_call>", "</tool_call>")
GENERIC = CallFormat("[TOOL_REQUEST]", "[END_TOOL_REQUEST]")


def number(body: str) -> list[ToolCall]:
    """A format whose calls are just numbers, several of them in a block."""
    return [ToolCall("id", word, json.dumps({"n": int(word)})) for word in body.split(",")]


NUMBERS = CallFormat("<n>", "</n>", number)
ENDLESS = CallFormat("[N]", "", number)


def joined(parts: list[Part]) -> list[tuple[str, str]]:
    """Neighbours of one kind as one, without the random ids."""
    out: list[tuple[str, str]] = []
    for part in parts:
        assert part.text and (part.kind == "call") == bool(part.id)
        if out and out[-1][0] == part.kind != "call":
            out[-1] = (part.kind, out[-1][1] + part.text)
        else:
            out.append((part.kind, part.text))
    return out


def run(pieces: list[str], stop: tuple[str, ...] = (), **options: Any) -> Any:
    """(parts, stopped, called)"""
    parser = OutputParser(stop, **options)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return joined(parts + parser.finish()), parser.stopped, parser.called


def cut(text: str, cuts: list[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]


def one_shot(text: str, stop: tuple[str, ...]) -> str:
    """The definition: the text before the earliest place where a stop string begins."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


texts = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple)


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 40)))
def test_stop_strings(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    """However the text is cut, the content is the text before the first stop string."""
    expected = one_shot(text, stop)
    parts = [("content", expected)] if expected else []
    assert run(cut(text, cuts), stop) == (parts, expected != text, False)


@given(text=texts, stop=stops)
def test_nothing_is_held_back_in_vain(text: str, stop: tuple[str, ...]) -> None:
    """After each character everything is out except what may still become a stop string."""
    parser = OutputParser(stop)
    out = ""
    for end in range(1, len(text) + 1):
        out += "".join(part.text for part in parser.feed(text[end - 1]))
        held = text[len(out) : end]
        assert parser.stopped or not held or any(s.startswith(held) for s in stop)


@given(text=texts, stop=stops, more=texts)
def test_nothing_follows_a_stop(text: str, stop: tuple[str, ...], more: str) -> None:
    """Once stopped, feed and finish return nothing, whatever comes."""
    parser = OutputParser(stop)
    parser.feed(text)
    if parser.stopped:
        assert (parser.feed(more), parser.finish(), parser.stopped) == ([], [], True)


@pytest.mark.parametrize(
    ("stop", "pieces", "emitted", "rest", "stopped"),
    [
        pytest.param((), ["ab", "", "c"], ["ab", "", "c"], "", False, id="no-stops"),
        pytest.param(("",), ["ab"], ["ab"], "", False, id="empty-stop-is-ignored"),
        pytest.param(("END",), ["xE", "N", "Dy"], ["x", "", ""], "", True, id="across-pieces"),
        pytest.param(("END",), ["xE", "Nx"], ["x", "ENx"], "", False, id="begun-in-vain"),
        pytest.param(("END",), ["xEN"], ["x"], "EN", False, id="unfinished-at-the-end"),
        pytest.param(("END",), ["aENDbEND"], ["a"], "", True, id="first-of-two"),
        pytest.param(("END",), ["EEN", "END"], ["E", "EN"], "", True, id="restarts-inside-itself"),
        pytest.param(("ab", "bc"), ["xa", "bc"], ["x", ""], "", True, id="overlapping"),
        pytest.param(("abc", "ab"), ["xab", "c"], ["x", ""], "", True, id="one-begins-the-other"),
        pytest.param(("abcd", "c"), ["abc", "d"], ["", ""], "", True, id="earlier-one-finishes"),
        pytest.param(("abcd", "c"), ["abc", "x"], ["", "ab"], "", True, id="earlier-one-fails"),
        pytest.param(("abcd", "c"), ["abc"], [""], "ab", True, id="earlier-one-never-ends"),
        pytest.param(("é\n\n",), ["é\n", "\n"], ["", ""], "", True, id="not-ascii"),
        pytest.param(("]", "^", "-\\"), ["a[-", "\\"], ["a[", ""], "", True, id="regex-signs"),
    ],
)
def test_pieces(
    stop: tuple[str, ...], pieces: list[str], emitted: list[str], rest: str, stopped: bool
) -> None:
    """Each piece releases exactly the text that no stop string can begin in any more."""
    parser = OutputParser(stop)
    out = ["".join(part.text for part in parser.feed(piece)) for piece in pieces]
    assert out == emitted
    assert ("".join(part.text for part in parser.finish()), parser.stopped) == (rest, stopped)


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def called(name: str, arguments: str) -> list[tuple[str, str]]:
    return [("call", name), ("arguments", arguments)]


def said(text: str) -> list[tuple[str, str]]:
    return [("content", text)]


TRICKY = '{"a": "</tool_call>\\"}", "b": [{"c": "["}, "\\\\"], "é": "\\u00e9"}'


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        # Reasoning.
        ("<think>\nhm\n</think>\n\nHi.\n", {}, [("reasoning", "hm"), *said("Hi.\n")]),
        (" \n<think>a b</think>c", {}, [("reasoning", "a b"), *said("c")]),
        ("<think>\n\n</think>\n\nHi.", {}, said("Hi.")),
        ("<think>cut  ", {}, [("reasoning", "cut  ")]),
        ("<think>cut</thi", {}, [("reasoning", "cut</thi")]),
        ("  Hi <think>x</think>", {}, said("  Hi <think>x</think>")),
        (" " * MAX_GAP_CHARS + "<think>x</think>", {}, [("reasoning", "x")]),
        (" " * 65 + "<think>x</think>", {}, said(" " * 65 + "<think>x</think>")),
        (" <thin", {}, said(" <thin")),
        (" \n", {}, said(" \n")),
        ("\nhm</think>\nHi", {"thinking": True}, [("reasoning", "hm"), *said("Hi")]),
        ("<think>hm</think> Hi", {"reasoning": None}, said("<think>hm</think> Hi")),
        ("\n<think>\nhm</think>\nHi", {"inline": True}, said("\n<think>\nhm</think>\nHi")),
        ("\nhm</think>\nHi", {"inline": True, "thinking": True}, said("\nhm</think>\nHi")),
        (
            "<think>" + written("f", "{}") + "</think>" + written("g", "{}"),
            {},
            [("reasoning", written("f", "{}")), *called("g", "{}")],
        ),
        (
            "<think><tool_call></think>" + written("g", "{}"),
            {"inline": True},
            [*said("<think><tool_call></think>"), *called("g", "{}")],
        ),
        # Calls with streamed arguments.
        (written("f", TRICKY), {}, called("f", TRICKY)),
        (
            "Let me.\n\n" + written("f", "{}") + " \n" + written("g", '{"x":\n[1 ]}') + "\n",
            {},
            [*said("Let me."), *called("f", "{}"), *called("g", '{"x":\n[1 ]}')],
        ),
        (written("f", "{}") + "\n Done. ", {}, [*called("f", "{}"), *said("Done. ")]),
        (
            '<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>',
            {},
            called("f", '{"a":1}'),
        ),
        ('<tool_call>{"name": "f", "arguments": {}}', {}, called("f", "{}")),
        ('<tool_call>{"name": "f", "arguments": {}</tool_call>', {}, called("f", "{}")),
        (
            '[TOOL_REQUEST]{"name": "f", "arguments": {"a": [["[E"]]}}[END_TOOL_REQUEST]',
            {"calls": GENERIC},
            called("f", '{"a": [["[E"]]}'),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {}} more</tool_call>',
            {},
            [*called("f", "{}"), *said("} more</tool_call>")],
        ),
        # Calls that are read as a whole.
        (
            '<tool_call>{"arguments": {"é": "\\u00e9"}, "name": "f"}</tool_call>',
            {},
            called("f", '{"é": "é"}'),
        ),
        ('<tool_call>{"arguments": {}, "name": "f"}', {}, called("f", "{}")),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            {},
            called("f", '{"a": 1}'),
        ),
        ('<tool_call>{"name": "f"}</tool_call>', {}, called("f", "{}")),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', {}, called("f", "{}")),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', {}, called("f", "{}")),
        (
            '<tool_call>{"id": "x", "name": "\\u0066", "arguments": {"a": "\\ud800"}}</tool_call>',
            {},
            called("f", '{"a": "\\ud800"}'),
        ),
        (
            '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>',
            {},
            [*called("f", "{}"), *called("g", "{}")],
        ),
        (
            "<tool_call>{" + " " * MAX_HEADER_CHARS + '"name": "f", "arguments": {}}</tool_call>',
            {},
            called("f", "{}"),
        ),
        (
            "1\n<n>1,2</n>\n<n>3</n>",
            {"calls": NUMBERS},
            said("1") + called("1", '{"n": 1}') + called("2", '{"n": 2}') + called("3", '{"n": 3}'),
        ),
        ("1 [N]1", {"calls": ENDLESS}, [*said("1"), *called("1", '{"n": 1}')]),
        # What is no call stays as it was written.
        ("a\n\n<tool_call>no</tool_call>\nb", {}, said("a\n\n<tool_call>no</tool_call>\nb")),
        ("<tool_call>[[[[[" * 9, {}, said("<tool_call>[[[[[" * 9)),
        ('a <tool_call>{"name": "f"', {}, said('a <tool_call>{"name": "f"')),
        ("a <tool_c", {}, said("a <tool_c")),
        ("a <tool_call>", {}, said("a <tool_call>")),
        (
            '<tool_call>{"name": "\\ud800"}</tool_call>',
            {},
            said('<tool_call>{"name": "\\ud800"}</tool_call>'),
        ),
        (
            '<tool_call>{"name": "", "arguments": {}}</tool_call>',
            {},
            said('<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ),
        (
            '<tool_call>{"name": "f", "arguments": [NaN]}</tool_call>',
            {},
            said('<tool_call>{"name": "f", "arguments": [NaN]}</tool_call>'),
        ),
        (
            "<tool_call>" + "[" * 100_000 + "</tool_call>",
            {},
            said("<tool_call>" + "[" * 100_000 + "</tool_call>"),
        ),
        ("<n>x</n> <n>1</n>", {"calls": NUMBERS}, [*said("<n>x</n>"), *called("1", '{"n": 1}')]),
        ("<n>1", {"calls": NUMBERS}, said("<n>1")),
        ("[N]x ", {"calls": ENDLESS}, said("[N]x ")),
        (
            "<n>" + "1" * (MAX_BODY_CHARS + 1) + "</n>",
            {"calls": NUMBERS},
            said("<n>" + "1" * (MAX_BODY_CHARS + 1) + "</n>"),
        ),
        # Calls that are not asked for.
        (written("f", "{}"), {"calls": None}, said(written("f", "{}"))),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_families(text: str, options: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """Whole, by characters, in pieces of three: the same reasoning, content and calls."""
    options = {"reasoning": THINK, "calls": JSON, **options}
    whole = run([text], **options)
    assert whole == (expected, False, any(kind == "call" for kind, _ in expected))
    if len(text) < 10_000:
        assert run(list(text), **options) == whole
    assert run([text[i : i + 3] for i in range(0, len(text), 3)], **options) == whole


FRAMES = ("<|start|>", "<|final|>", "<|end|>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|think|>a<|end|><|start|><|final|> b", [("reasoning", "a"), *said(" b")]),
        ("<|final|>a<|end|><|start|><|think|>b<|end|>", [*said("a"), ("reasoning", "b")]),
        ("<|final|>a <|think|>", said("a <|think|>")),
        ("<|final|>a\n<|end|><|start|> to=1", [*said("a\n"), *called("1", '{"n": 1}')]),
        ("<|final|><|fin", said("<|fin")),
    ],
)
def test_structural_markers(text: str, expected: list[tuple[str, str]]) -> None:
    """They are left out, and behind one reasoning may open again."""
    reasoning, calls = ("<|think|>", "<|end|>"), CallFormat(" to=", "", number)
    for pieces in ([text], list(text)):
        found, _, _ = run(pieces, reasoning=reasoning, structural=FRAMES, calls=calls)
        assert found == expected


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("<think>a END</think>b ENDc", {}, [("reasoning", "a END"), *said("b ")]),
        ("<think>a END</think>b", {"inline": True}, said("<think>a ")),
        (written("END", '{"a": "END"}') + "END", {}, called("END", '{"a": "END"}')),
        ("<tool_call>END</tool_call>x", {}, said("<tool_call>")),
        ("a </END", {"stop": ("</END", "/E")}, said("a ")),
        ("a\n" + written("f", "{}"), {"stop": ("\n<tool",)}, said("a")),
        ("a" + written("f", "{}"), {"stop": ("<tool",)}, said("a")),
        ("<n>x</n>EN" + "D", {"calls": NUMBERS}, said("<n>x</n>")),
        ("<n>x</n>", {"calls": NUMBERS, "stop": ("n>END",)}, None),
        ("<n>x</n>END", {"calls": NUMBERS, "stop": ("n>END",)}, said("<n>x</")),
    ],
)
def test_stop_strings_are_looked_for_in_content(
    text: str, options: dict[str, Any], expected: list[tuple[str, str]] | None
) -> None:
    """Not in reasoning or calls, but in what looked like a call and is none, and never leak."""
    options = {"stop": ("END",), "reasoning": THINK, "calls": JSON, **options}
    for pieces in ([text], list(text)):
        parts, stopped, _ = run(pieces, **options)
        assert (parts, stopped) == (expected or said(text), expected is not None)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (written("1", '{"n": 1}') + written("2", "{}"), JSON),
        ('<tool_call>[{"name": "1", "arguments": {"n": 1}}, {"name": "2"}]</tool_call>', JSON),
        ("<n>1,2</n> more", NUMBERS),
        ("[N]1,2", ENDLESS),
    ],
)
def test_one_call_only(text: str, calls: CallFormat) -> None:
    """Without parallel calls the answer ends with the first whole call."""
    for pieces in ([text], list(text)):
        assert run(pieces, calls=calls, parallel=False) == (called("1", '{"n": 1}'), True, True)


def test_arguments_are_streamed() -> None:
    """The call goes out with its header, the arguments as they come, the last brace at once."""
    parser = OutputParser((), calls=JSON)
    pieces = ["<tool_call>", '{"name": "f", "arg', 'uments": ', '{"a', '": "b ', "</", '"}', "}"]
    parts = [[(p.kind, p.text) for p in parser.feed(piece)] for piece in pieces]
    arguments = ['{"a', '": "b ', "</", '"}']
    assert parts == [[], [], [], [("call", "f"), ("arguments", arguments[0])]] + [
        [("arguments", text)] for text in arguments[1:]
    ] + [[]]
    assert (parser.finish(), parser.called) == ([], True)


def test_cut_off_arguments_just_end() -> None:
    """What came of them has gone out; no whole call has."""
    text = written("f", '{"a": ["x')[: -len("}\n</tool_call>")]
    assert run(list(text), calls=JSON) == (called("f", '{"a": ["x'), False, False)


def test_ids() -> None:
    """A call has the id the model gave it or a fresh one, in OpenAI's form."""
    own = '<tool_call>{"id": "x1", "name": "f"}</tool_call>'
    for text in (written("f", "{}"), own):
        ids = {OutputParser((), calls=JSON).feed(text)[0].id for _ in range(9)}
        if text == own:
            assert ids == {"x1"}
        else:
            assert len(ids) == 9
            assert all(len(id) == 29 and id.startswith("call_") for id in ids)


def test_control_tokens() -> None:
    """One is text where it is part of a marker, and anywhere in a call."""
    parser = OutputParser((), reasoning=("<|channel>thought", "<channel|>"), calls=NUMBERS)
    names = ("<|channel>", "<channel|>", "<n>", "<x>")
    assert [parser.shows(name) for name in names] == [True, True, True, False]
    parser.feed("<n>1<")
    assert parser.shows("<x>")
    parser.feed("/n>")
    assert not parser.shows("<x>")


def test_reasoning_is_known() -> None:
    """Whether it is reasoning now, inline or not, and when the prompt began it."""
    for inline in (False, True):
        parser = OutputParser((), reasoning=THINK, inline=inline)
        seen = [
            parser.reasoning
            for piece in ("\n", "<think>", "a", "</think", ">", "b")
            if parser.feed(piece) is not None
        ]
        assert seen == [False, True, True, True, False, False]
    assert OutputParser((), reasoning=THINK, thinking=True).reasoning


snippets = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<n>", "</n>", "<", "</", "<|s|>"),
        *('{"name": "f", "arguments": ', "{", "}", '"', "\\", "[", "]", ", ", "1"),
        *("\n", " ", "x", "é", "END", "E", written("g", '{"a": 1}')),
    ]
)


@given(
    text=st.lists(snippets, max_size=25).map("".join),
    cuts=st.lists(st.integers(0, 150), max_size=20),
    stop=st.sampled_from([(), ("END",), ("\n\n", "x"), (">", "<tool_"), ("\n<", "}")]),
    calls=st.sampled_from([None, JSON, NUMBERS, CallFormat("<n>", "", number)]),
    reasoning=st.sampled_from([None, THINK]),
    inline=st.booleans(),
    thinking=st.booleans(),
    parallel=st.booleans(),
    structural=st.sampled_from([(), ("<|s|>",)]),
)
def test_the_cutting_does_not_matter(
    text: str, cuts: list[int], stop: tuple[str, ...], **options: Any
) -> None:
    """Any cutting gives the same parts; no stop string leaks; what is only content is all of it."""
    cuts = [min(at, len(text)) for at in cuts]
    whole = run([text], stop, **options)
    assert run(cut(text, cuts), stop, **options) == whole
    assert run(list(text), stop, **options) == whole
    parts, stopped, _ = whole
    content = "".join(text for kind, text in parts if kind == "content")
    if {kind for kind, _ in parts} <= {"content"}:
        assert not any(s in content for s in stop)
        if not stopped and options["reasoning"] is None and not options["structural"]:
            assert content == text


def tokens(*texts: str) -> list[tuple[str, TokenLogprob]]:
    return [(text, TokenLogprob(text.encode(), -1.0)) for text in texts]


@pytest.mark.parametrize(
    ("texts", "stop", "expected"),
    [
        (("<think>", "a", "</think>", "\n\n", "b", " ", "c"), (), ["b", " ", "c"]),
        (("a", "\n", "<tool_call>", "no", "</tool_call>", "b"), (), None),
        (("a", "\n", "<tool_call>", '{"name": "f", "arguments": {', "}}", "</tool_call>"), (), "a"),
        (("a", "b E", "N", "D", "c"), ("END",), ["a"]),
        (("a", "b", " E", "N", "D", "c"), ("END", " END"), ["a", "b"]),
        (("a", " E", "N", "x"), ("END",), None),
    ],
)  # fmt: skip
def test_logprobs(
    texts: tuple[str, ...], stop: tuple[str, ...], expected: list[str] | None
) -> None:
    """Tokens whose text is content come out with its last piece, and no others."""
    parser = OutputParser(stop, reasoning=THINK, calls=JSON)
    content, seen = "", b""
    for text, logprob in tokens(*texts):
        content += "".join(p.text for p in parser.feed(text, logprob) if p.kind == "content")
        seen += b"".join(t.token for t in parser.take_logprobs())
        assert content.encode().startswith(seen)
    content += "".join(p.text for p in parser.finish() if p.kind == "content")
    seen += b"".join(t.token for t in parser.take_logprobs())
    assert content.encode().startswith(seen)
    assert seen.decode() == "".join(texts if expected is None else expected)


def test_logprobs_of_parts_of_characters() -> None:
    """A token that ends within a character goes with the text that completes it."""
    parser = OutputParser(("END",))
    halves = [TokenLogprob(byte, -1.0) for byte in (b"\xc3", b"\xa9")]
    assert parser.feed("", halves[0]) == []
    assert parser.take_logprobs() == []
    assert [part.text for part in parser.feed("é", halves[1])] == ["é"]
    assert parser.take_logprobs() == halves
    parser.feed("EN")
    parser.feed("", halves[0])
    parser.feed("D")
    assert parser.take_logprobs() == []


def test_long_calls_take_linear_time() -> None:
    """A call of 200 KB, a token at a time, is looked at piece by piece, not over and over."""
    for calls, opening in ((JSON, written("f", '{"a": "')[:-14]), (NUMBERS, "<n>")):
        parser = OutputParser((), calls=calls)
        parser.feed(opening)
        block = parser._block
        assert block is not None
        for _ in range(50_000):
            parser.feed("abcd")
            assert len(block._window) < 32


def test_a_token_that_holds_part_of_a_stop_string_is_not_reported() -> None:
    """What precedes the stop string in it is content, its logprob would show the rest."""
    parser = OutputParser(("END",))
    parts: list[Part] = []
    for token in ("one ", "twoE", "ND"):
        parts += parser.feed(token, TokenLogprob(token.encode(), -1.0))
    assert "".join(part.text for part in parts) == "one two" and parser.stopped
    assert [entry.token for entry in parser.take_logprobs()] == [b"one "]
