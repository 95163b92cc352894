"""Dialects: which one a model speaks, how its calls are read, how conversations are written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lmx.backends import Vocabulary
from lmx.chat_template import ChatTemplate
from lmx.dialect import GENERIC, Dialect, read_dialect
from lmx.errors import InvalidRequest
from lmx.generation import Chat, ChatMessage, Tool, ToolCall
from lmx.output import OutputParser

WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "metric": {"type": "boolean"},
        },
        "required": ["city"],
    },
    strict=False,
)
CLOCK = Tool("clock", None, None, strict=False)
CHAT = Chat([ChatMessage("user", "Hi")], [WEATHER, CLOCK], ["get_weather", "clock"])


def vocabulary(*names: str) -> Vocabulary:
    return Vocabulary([name.encode() for name in names], frozenset(range(len(names))), frozenset())


def speak(
    template: str | None, text: str, *names: str, chat: Chat = CHAT, parser: str | None = None
) -> list[tuple[str, Any]]:
    """What becomes of a model's text, arguments parsed; the same for every cutting tried."""
    dialect = read_dialect(template, vocabulary(*names), parser)
    results = []
    for size in (len(text), 1, 4):
        output = OutputParser(
            (),
            reasoning=dialect.reasoning,
            calls=dialect.format_for(chat),
            structural=dialect.structural,
        )
        parts = []
        for at in range(0, len(text), size):
            parts += output.feed(text[at : at + size])
        parts += output.finish()
        out: list[tuple[str, Any]] = []
        for part in parts:
            if out and out[-1][0] == part.kind != "call":
                out[-1] = (part.kind, out[-1][1] + part.text)
            else:
                out.append((part.kind, part.text))
        results.append(out)
    assert results[0] == results[1] == results[2]
    return [(k, json.loads(text) if k == "arguments" else text) for k, text in results[0]]


def calls(*pairs: tuple[str, dict[str, Any]]) -> list[tuple[str, Any]]:
    return [part for name, args in pairs for part in (("call", name), ("arguments", args))]


PARIS = ("get_weather", {"city": "Paris", "days": 2})
NOW: tuple[str, dict[str, Any]] = ("clock", {})
KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
XTML = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
HARMONY = "{{ tools }}<|channel|><|message|>"

FAMILIES = [
    pytest.param(
        "{{ tools }}<tool_call>{{ tool_call.name }}{{ tool_call.arguments }}",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        calls(PARIS, NOW),
        id="json_tools",
    ),
    pytest.param(
        "{{ tools }}<tool_call>\n<function=",
        "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=clock>\n</function>\n</tool_call>",
        [("content", "Sure."), *calls(PARIS, NOW)],
        id="qwen3_coder",
    ),
    pytest.param(
        "{{ tools }}<arg_key>",
        "<think>Hm</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
        "</tool_call>\n<tool_call>clock</tool_call>",
        [("reasoning", "Hm"), *calls(PARIS, NOW)],
        id="glm47",
    ),
    pytest.param(
        "{{ tools }}<|tool_call>call:x<tool_call|>",
        '<|channel>thought\nHm<channel|><|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}'
        "<tool_call|><|tool_call>call:clock{}<tool_call|>",
        [("reasoning", "Hm"), *calls(PARIS, NOW)],
        id="gemma4",
    ),
    pytest.param(
        "{{ tools }}<start_function_call>",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}"
        "<end_function_call>",
        calls(PARIS),
        id="function_gemma",
    ),
    pytest.param(
        "{{ tools }}<|tool_list_start|>",
        '<|tool_call_start|>[get_weather(city="Paris", days=2), clock()]<|tool_call_end|>Done.',
        [*calls(PARIS, NOW), ("content", "Done.")],
        id="pythonic",
    ),
    pytest.param(
        "{{ tools }}[TOOL_CALLS]",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, '
        '{"name": "clock", "arguments": {}}]',
        calls(PARIS, NOW),
        id="mistral-list",
    ),
    pytest.param(
        "{{ tools }}[TOOL_CALLS]",
        '[THINK]Hm[/THINK][TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}'
        "[TOOL_CALLS]clock[ARGS]{}",
        [("reasoning", "Hm"), *calls(PARIS, NOW)],
        id="mistral-header",
    ),
    pytest.param(
        "{{ tools }}[TOOL_CALLS]",
        '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris", "days": 2}',
        calls(PARIS),
        id="mistral-ids",
    ),
    pytest.param(
        "{{ tools }}<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris'
        '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n<invoke name="clock">\n'
        "</invoke>\n</minimax:tool_call>",
        calls(PARIS, NOW),
        id="minimax_m2",
    ),
    pytest.param(
        "{{ tools }}<|tool_calls_section_begin|>",
        f"Wait.{KIMI[0]}<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.clock:1'
        f"<|tool_call_argument_begin|>{{}}<|tool_call_end|>{KIMI[1]}",
        [("content", "Wait."), *calls(PARIS, NOW)],
        id="kimi_k2",
    ),
    pytest.param(
        "{{ tools }}",
        "<|open|>think<|sep|>Hm<|close|>think<|sep|><|open|>response<|sep|>Wait."
        '<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="get_weather" index="1"'
        '<|sep|><|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>",
        [("reasoning", "Hm"), ("content", "Wait."), *calls(PARIS)],
        id="kimi_k3",
    ),
    pytest.param(
        "{{ tools }}<longcat_tool_call>",
        "<longcat_think>\nHm\n</longcat_think>\n<longcat_tool_call>get_weather\n"
        "<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Paris</longcat_arg_value>\n"
        "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>2</longcat_arg_value>\n"
        "</longcat_tool_call>",
        [("reasoning", "Hm"), *calls(PARIS)],
        id="longcat",
    ),
    pytest.param(
        '{{ tools }}<function name="x"><param name="y">',
        '<function name="get_weather"><param name="city"><![CDATA[Paris]]></param>'
        '<param name="days">2</param></function><function name="clock"></function>',
        calls(PARIS, NOW),
        id="minicpm5",
    ),
    pytest.param(
        "{{ tools }}<atem:function_calls>",
        '<atem:function_calls>\n<atem:invoke name="get_weather">\n<atem:parameter name="city">'
        'Paris</atem:parameter>\n<atem:parameter name="days">2</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls>",
        calls(PARIS),
        id="muse_spark",
    ),
    pytest.param(
        HARMONY,
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}',
        [("reasoning", "Hm"), *calls(PARIS)],
        id="harmony",
    ),
    pytest.param(
        HARMONY,
        "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>analysis"
        "<|message|>Hm<|end|><|start|>assistant to=functions.clock<|channel|>commentary json"
        "<|message|>{}<|call|>",
        [("content", "Wait."), ("reasoning", "Hm"), *calls(NOW)],
        id="harmony-recipient-first",
    ),
    pytest.param(
        HARMONY,
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>"
        "It goes to=functions. OK",
        [("reasoning", "Hm"), ("content", "It goes to=functions. OK")],
        id="harmony-answer",
    ),
    pytest.param(
        "{{ messages }}",
        'I look.\n[TOOL_REQUEST]{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}'
        '[END_TOOL_REQUEST]\n[TOOL_REQUEST]{"name": "clock"}[END_TOOL_REQUEST]',
        [("content", "I look."), *calls(PARIS, NOW)],
        id="generic",
    ),
]
TOKENS = ("<think>", "</think>", "<longcat_think>", "</longcat_think>", "[THINK]", "[/THINK]")


@pytest.mark.parametrize(("template", "text", "expected"), FAMILIES)
def test_families(template: str, text: str, expected: list[tuple[str, Any]]) -> None:
    """Each family's reasoning and calls are told from what its models really write."""
    names = [name for name in TOKENS if name in text]
    if "<|channel>" in text:
        names += ["<|channel>", "<channel|>"]
    if "<|open|>" in text:
        names += XTML
    assert speak(template, text, *names) == expected


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ tools }}<arg_key>", "<tool_call>is a marker</tool_call>"),
        ("{{ tools }}<arg_key>", "<tool_call>other<arg_key>a</arg_key></tool_call>"),
        ("{{ tools }}<arg_key>", "<tool_call>clock<arg_key>a</arg_key>"),
        ("{{ tools }}<tool_call>\n<function=", "<tool_call>\n<function=clock>\n</tool_call>"),
        ("{{ tools }}<|tool_call>call:x<tool_call|>", "<|tool_call>call:clock{a<tool_call|>"),
        ("{{ tools }}<start_function_call>", "<start_function_call>call:clock{a}<end_function"),
        ("{{ tools }}<|tool_list_start|>", "<|tool_call_start|>[clock(a={1})]<|tool_call_end|>"),
        ("{{ tools }}<|tool_list_start|>", f"<|tool_call_start|>{'(' * 9**5}<|tool_call_end|>"),
        ("{{ tools }}<|tool_list_start|>", f"<|tool_call_start|>[{'-' * 9**5}]<|tool_call_end|>"),
        ("{{ tools }}[TOOL_CALLS]", '[TOOL_CALLS]clock[ARGS]{"a": '),
        ("{{ tools }}[TOOL_CALLS]", f"[TOOL_CALLS]clock[ARGS]{'[' * 9**5}"),
        ("{{ tools }}<|tool_calls_section_begin|>", f"{KIMI[0]}nothing{KIMI[1]}"),
        ("{{ tools }}<minimax:tool_call>", "<minimax:tool_call>x</minimax:tool_call>"),
        ("{{ tools }}<longcat_tool_call>", "<longcat_tool_call>clock</longcat_tool_call>"),
        (HARMONY, " to=functions.clock<|message|>{"),
        ("{{ messages }}", "[TOOL_REQUEST]{'name': 'clock'}[END_TOOL_REQUEST]"),
    ],
)
def test_what_is_no_call_stays_visible(template: str, text: str) -> None:
    """Malformed, cut off, of a tool nobody has, or made to break the parser: it is content."""
    assert speak(template, f"Look: {text} ") == [("content", f"Look: {text} ")]


def test_types_follow_the_schema() -> None:
    """Where the format has no types, those of the tool's schema hold."""
    text = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>75001</arg_value></tool_call>"
    assert speak("{{ tools }}<arg_key>", text) == calls(("get_weather", {"city": "75001"}))


def test_ids_of_the_model() -> None:
    """A model's own id of a call is kept: its template wants it back."""
    text = (
        f"{KIMI[0]}<|tool_call_begin|>functions.clock:3<|tool_call_argument_begin|>{{}}"
        f"<|tool_call_end|>{KIMI[1]}"
    )
    dialect = read_dialect("{{ tools }}<|tool_calls_section_begin|>", vocabulary(), None)
    output = OutputParser((), calls=dialect.format_for(CHAT))
    assert [part.id for part in output.feed(text)] == ["functions.clock:3", ""]


@pytest.mark.parametrize(
    ("template", "names", "expected"),
    [
        ("", ["<think>", "</think>"], ("<think>", "</think>")),
        ("<think></think>", [], ("<think>", "</think>")),
        ("<think>", ["<think>"], None),
        ("[THINK][/THINK]", ["[THINK]", "[/THINK]"], ("[THINK]", "[/THINK]")),
        ("", ["<|think:start|>", "<|think:end|>"], ("<|think:start|>", "<|think:end|>")),
        ("", ["<|channel>", "<channel|>"], ("<|channel>thought", "<channel|>")),
        ("", XTML, ("<|open|>think<|sep|>", "<|close|>think<|sep|>")),
        (HARMONY, [], ("<|channel|>analysis<|message|>", "<|end|>")),
        ("", [], None),
    ],
)
def test_reasoning(template: str, names: list[str], expected: tuple[str, str] | None) -> None:
    """The markers of the reasoning come from the vocabulary or, as text, from the template."""
    assert read_dialect(template, vocabulary(*names), None).reasoning == expected


@pytest.mark.parametrize(
    ("template", "parser", "start"),
    [
        ("{{ tools }}", "qwen3_coder", "<tool_call>"),
        ("{{ tools }}", "laguna", "<tool_call>"),
        ("{{ tools }}[TOOL_CALLS]", "nosuch", "[TOOL_CALLS]"),
        ("{{ tools }}[TOOL_CALLS]", "../glm47", "[TOOL_CALLS]"),
        ("{{ tools }}", None, GENERIC.start),
        ("[TOOL_CALLS]", None, GENERIC.start),
        ("[TOOL_CALLS]{{ builtin_tools }}", None, GENERIC.start),
        (None, "muse_spark", "<atem:function_calls>"),
        (None, None, GENERIC.start),
    ],
)
def test_format(template: str | None, parser: str | None, start: str) -> None:
    """The parser that the files name, else the template's; generic without, or without tools."""
    dialect = read_dialect(template, vocabulary(), parser)
    assert dialect.calls.start == start
    assert dialect.native_tools == (start != GENERIC.start)


def test_format_for_a_request() -> None:
    """None where nothing may be called, JSON where a grammar will force a call."""
    glm = read_dialect("{{ tools }}<arg_key>", vocabulary(), None)
    qwen = read_dialect("{{ tools }}<tool_call>{{ arguments }}", vocabulary(), None)
    required = replace(CHAT, required=True)
    assert glm.format_for(replace(CHAT, callable=[])) is None
    assert glm.format_for(required) is GENERIC
    assert qwen.format_for(required) is qwen.format_for(CHAT) is qwen.calls
    assert qwen.calls.parse is None
    assert (form := glm.format_for(CHAT)) is not None and form.parse is not None
    text = "<tool_call>clock</tool_call>"
    only_weather = replace(CHAT, callable=["get_weather"])
    assert speak("{{ tools }}<arg_key>", text, chat=only_weather) == [("content", text)]


def test_same_parser_as_mlx_lm() -> None:
    """Templates and vocabularies lead to the parser that mlx-lm itself would take."""
    from mlx_lm.tokenizer_utils import _infer_tool_parser

    from lmx.tool_parsers import find_parser

    @dataclass
    class Tokenizer:
        chat_template: str
        names: tuple[str, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {name: i for i, name in enumerate(self.names)}

    cases = [Tokenizer(str(param.values[0])) for param in FAMILIES]
    cases += [Tokenizer("<tool_call>\\n<function="), Tokenizer("<tool_call>{{ tool_call.name }}")]
    cases += [Tokenizer("", XTML), Tokenizer("", ("<|tool_call_start|>", "<|tool_call_end|>"))]
    for case in cases:
        if "tool_call.arguments" in case.chat_template:
            continue  # known here in more words
        expected = _infer_tool_parser(case)
        if expected != "json_tools":
            names = [name.encode() for name in case.names]
            assert find_parser(None, case.chat_template, names) == expected


def test_engines_are_not_imported() -> None:
    """A parser of mlx-lm's is loaded without mlx-lm, and so without mlx and transformers."""
    code = (
        "import sys; from lmx.backends import Vocabulary; from lmx.dialect import read_dialect;"
        "d = read_dialect('{{ tools }}', Vocabulary([], frozenset(), frozenset()), 'laguna');"
        "assert d.parser; print(*{'mlx', 'mlx_lm', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (output.stdout.strip(), output.stderr) == ("", "")


QWEN = """\
{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' }}
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{%- if message.reasoning_content %}
<think>{{ message.reasoning_content }}</think>
{%- endif %}
{%- for tool_call in message.tool_calls %}
<tool_call>
{"name": "{{ tool_call.function.name }}", "arguments": {{ tool_call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response name="{{ message.name }}">{{ message.content }}</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ASKED = [
    ChatMessage("user", "Weather?"),
    ChatMessage(
        "assistant",
        "",
        (ToolCall("call_1", "get_weather", '{"city": "Zürich"}'), ToolCall("call_2", "clock", "")),
        reasoning="Two calls.",
    ),
    ChatMessage("tool", "Sunny", tool_call_id="call_1"),
    ChatMessage("tool", "12:00", tool_call_id="call_2"),
]


def render(template: str, chat: Chat) -> str:
    return read_dialect(template, vocabulary(), None).render(ChatTemplate(template), chat)


def test_history_in_the_models_own_way() -> None:
    """The template gets tools, calls with their arguments as objects, results and reasoning."""
    chat = Chat(ASKED, [CLOCK], ["clock"], template_kwargs={"enable_thinking": False})
    assert render(QWEN, chat) == (
        "<|im_start|>system\n"
        '{"type": "function", "function": {"name": "clock", "description": "", '
        '"parameters": {"type": "object", "properties": {}}}}<|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant<think>Two calls.</think>"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response name="get_weather">Sunny</tool_response><|im_end|>\n'
        '<|im_start|>user\n<tool_response name="clock">12:00</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n<think></think>"
    )


def test_generic_history() -> None:
    """A template without tools gets them in a system message, and history as text."""
    system = ChatMessage("system", "Be brief.")
    more = [ChatMessage("user", "Thanks."), ChatMessage("assistant", "Bye."), ASKED[0]]
    text = render(PLAIN, Chat([system, *ASKED, *more], [CLOCK], ["clock"]))
    prompt, history = text.split("<user>", 1)
    assert prompt.startswith("<system>Be brief.\n\nYou can call tools.")
    assert prompt.endswith('"parameters": {"type": "object", "properties": {}}}}]')
    expected = (
        "Weather?<assistant>"
        '[TOOL_REQUEST]{"name": "get_weather", "arguments": {"city": "Zürich"}}[END_TOOL_REQUEST]\n'
        '[TOOL_REQUEST]{"name": "clock", "arguments": {}}[END_TOOL_REQUEST]'
        "<user>[TOOL_RESULT]Sunny[END_TOOL_RESULT]\n[TOOL_RESULT]12:00[END_TOOL_RESULT]\n"
        "Thanks.<assistant>Bye.<user>Weather?<assistant>"
    )
    assert history == expected
    assert render(PLAIN, Chat([*ASKED, *more])) == f"<user>{expected}"


def test_generic_prompt_without_system_messages() -> None:
    """A template that refuses system messages gets the tools in the first turn."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    text = render(strict + PLAIN, Chat([ChatMessage("user", "Hi")], [CLOCK], ["clock"]))
    assert text.startswith("<user>Hi\n\nYou can call tools.")
    messages = [ChatMessage("system", "x"), ChatMessage("user", "Hi")]
    with pytest.raises(InvalidRequest, match="No system"):
        render(strict + PLAIN, Chat(messages, [CLOCK], ["clock"]))


def test_arguments_as_text() -> None:
    """A template that concatenates arguments gets them as JSON text."""
    template = (
        "{{ tools }}<arg_key>{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert render(template, Chat(ASKED)).endswith('get_weather{"city": "Zürich"}clock')
    with pytest.raises(InvalidRequest, match="dict"):
        render(template + "{{ 'a' + {} }}", Chat(ASKED))


def test_short_ids() -> None:
    """Mistral's templates want nine letters or digits, and the same for call and result."""
    template = (
        "{{ tools }}[TOOL_CALLS]{% for m in messages %}{% for c in m.tool_calls %}{{ c.id }} "
        "{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    )
    call = ToolCall("call_0123456789abcdef", "clock", "{}")
    messages = [
        ChatMessage("assistant", "", (call, replace(call, id="x-1"))),
        ChatMessage("tool", "1", tool_call_id=call.id),
    ]
    assert render(template, Chat(messages)).endswith("789abcdef 0000000x1 789abcdef")


def test_no_reasoning_beside_content_and_calls() -> None:
    """gpt-oss's template refuses a turn with all three under its own names."""
    template = "{% for m in messages %}{{ m.thinking }},{{ m.reasoning_content }};{% endfor %}"
    call = ToolCall("1", "clock", "{}")
    messages = [
        ChatMessage("assistant", "a", (call,), reasoning="R"),
        ChatMessage("assistant", "", (call,), reasoning="R"),
        ChatMessage("assistant", "a", reasoning="R"),
    ]
    dialect = Dialect(native_tools=True)
    assert dialect.render(ChatTemplate(template), Chat(messages)) == ",R;R,R;R,R;"
