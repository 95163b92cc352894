"""Chat templates: what Hugging Face's templates expect works, and what would do harm does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmx.chat_template import ChatTemplate
from lmx.errors import InvalidRequest, ModelLoadFailed

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUSY = """\
{%- macro without_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('</think>') -%}
        {%- if '<think>' in part -%}
            {%- set ns.result = ns.result + part.split('<think>')[0] -%}
            {%- continue -%}
        {%- endif -%}
        {%- set ns.result = ns.result ~ part -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{{ bos_token }}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') -%}
{{- system | list | join('\\n\\n') }}
{% for message in messages if message.role != 'system' %}
    {%- if loop.index0 % 2 != (0 if message.role == 'user' else 1) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {%- set content = message.get('content', '') %}
[{{ message.role | capitalize }}]
    {% if message.role == 'assistant' -%}
        {% generation %}{{ without_thinking(content) }}{{ eos_token }}{% endgeneration %}
    {%- else -%}
        {{ content.replace('<', '&lt;') | indent(2) }} {{ {'a': '<é>', 'n': [1, none]} | tojson }}
    {%- endif %}
    {%- if loop.last %} ({{ loop.length }}){% endif %}
{%- endfor %}
"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <you>\nthere"},
    {"role": "assistant", "content": "<think>hm</think> Hello. "},
    {"role": "user", "content": "Bye"},
]


def render(source: str, **options: float) -> str:
    return ChatTemplate(source, **options).render(MESSAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(CHATML, id="chatml"),
        pytest.param(BUSY, id="busy"),
        pytest.param("{{ messages }} {{ messages[0] }} {{ none }} {{ 1.5 }}", id="containers"),
        pytest.param("{{ 7 % 4 }} {{ 2 ** 3 }} {{ 'ab' * 2 }} {{ [1] * 2 + [3] }}", id="operators"),
        pytest.param("{{ ', '.join(['a', 'b']) }} {{ [1, 'b'] | join }}", id="join"),
        pytest.param(
            "{{ 'aXaX' | replace('X', 'y', 1) }} {{ 'aXaX'.replace('X', '') }}", id="replace"
        ),
        pytest.param("{{ {'b': 1, 'a': {}} | tojson(sort_keys=true, indent='\t') }}", id="tojson"),
        pytest.param(
            "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ dict(a=1).items() | list }}", id="set"
        ),
        pytest.param("{% set n = namespace({'a': 1}, b=2) %}{{ n.a + n.b }}", id="namespace"),
        pytest.param(
            "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}", id="scope"
        ),
        pytest.param(
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            id="break",
        ),
        pytest.param("{% block a %}{{ bos_token }}{% endblock %}{{ self.a() }}", id="block"),
        pytest.param(
            "{{ tools }} {{ documents }} {{ tools is defined }} {{ x is defined }}", id="none"
        ),
        pytest.param("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", id="whitespace"),
        pytest.param("{{ strftime_now('%%') }}", id="strftime-now"),
    ],
)
def test_same_as_transformers(source: str) -> None:
    """A prompt is what transformers makes of the same template and messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template(
        [MESSAGES],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(MESSAGES) == expected


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        pytest.param("a\n{% if x %}", r"\(line 2\)", "Unexpected end", id="unfinished"),
        pytest.param(
            "\n\n{{ x | nosuch }}", r"\(line 3\)", "No filter named 'nosuch'", id="filter"
        ),
        pytest.param("{{ " + "(" * 5000, "", "RecursionError", id="deep-expression"),
        pytest.param("{% for x in y %}" * 60 + "{% endfor %}" * 60, "", "blocks", id="deep-loops"),
    ],
)
def test_syntax_error(source: str, line: str, reason: str) -> None:
    """A template that does not compile fails at construction and says where and why."""
    with pytest.raises(ModelLoadFailed, match=f"does not compile ?{line}.*{reason}"):
        ChatTemplate(source)


def test_raise_exception() -> None:
    """The template's own refusal reaches the client in the template's words."""
    with pytest.raises(InvalidRequest, match=r"refuses these messages: Roles must .*\.") as caught:
        ChatTemplate(BUSY).render(MESSAGES[2:])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ nope.x }}", "'nope' is undefined"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ messages[0].content.nope() }}", "no attribute 'nope'"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_failure_while_rendering(source: str, reason: str) -> None:
    """Whatever goes wrong in a template is a bad request that names the messages and the reason."""
    with pytest.raises(InvalidRequest, match=f"cannot render these messages: .*{reason}") as caught:
        render(source)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__self__.globals }}",
        "{{ raise_exception.__func__.__globals__ }}",
        "{{ dict.__globals__.json }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ lipsum.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ environment.filters }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}'|attr('format'))(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
        "{% import 'os' as os %}",
    ],
)
def test_no_way_out(source: str) -> None:
    """A template reaches no Python internals and changes nothing that it is given."""
    try:
        assert render(source) == ""  # what jinja2 makes of an attribute it hides
    except InvalidRequest:
        pass


GROWING = (
    "{%% set n = namespace(x=%s) %%}{%% for i in range(99) %%}{%% set n.x %s %%}{%% endfor %%}"
)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ 'a' * 300000000 }}", id="repeat"),
        pytest.param("{{ 300000000 * 'a' }}", id="repeat-reversed"),
        pytest.param("{{ [1] * 300000000 }}", id="repeat-list"),
        pytest.param(GROWING % ("'aa'", "= n.x + n.x"), id="add"),
        pytest.param(GROWING % ("[1]", "= n.x + n.x"), id="add-list"),
        pytest.param(GROWING % ("'aa'", "= n.x ~ n.x"), id="concatenate"),
        pytest.param(GROWING % ("'aa'", "%}{{ n.x }}{{ n.x }}{% endset"), id="set-block"),
        pytest.param("{% for i in range(100000) %}" + "a" * 999 + "{% endfor %}", id="output"),
        pytest.param("{{ 2 ** 300000000 }}", id="power"),
        pytest.param(GROWING % ("3", "= n.x * n.x"), id="product"),
        pytest.param("{{ range(300000000) | list }}", id="range"),
    ],
)
def test_size_is_limited(source: str) -> None:
    """What would make much out of little is refused before it is made."""
    with pytest.raises(InvalidRequest, match="cannot render"):
        render(source)


def test_any_block_looks_at_the_clock() -> None:
    """With no time at all, even the smallest step is refused."""
    with pytest.raises(InvalidRequest, match="takes too long"):
        render("{% if true %}{% endif %}", deadline_seconds=0)


LOOP = "{% for i in range(100000) %}"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(LOOP * 3 + "{% endfor %}" * 3, id="loops"),
        pytest.param(LOOP + "{{ range(9)|map('string')|list|length }}{% endfor %}", id="filters"),
        pytest.param(
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            id="macros",
        ),
    ],
)
def test_endless_template_ends(source: str) -> None:
    """A template that would run for ages ends, on a thread that is not the main one."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(InvalidRequest, match="takes too long"):
        pool.submit(render, source, deadline_seconds=0.05).result()


def test_threads_share_a_template() -> None:
    """Each rendering has its own deadline; many at once do not disturb each other."""
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    expected = "".join(m["content"] for m in MESSAGES)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(template.render, [MESSAGES] * 100)) == {expected}


def test_long_conversations_fit() -> None:
    """A prompt of ten million characters stays within the default limits."""
    pair = [("user", "x" * 100_000), ("assistant", "y" * 100_000)]
    messages = [{"role": role, "content": content} for role, content in pair] * 50
    assert len(ChatTemplate(CHATML).render(messages)) > 10_000_000


def test_strftime_now() -> None:
    """Templates may print today's date."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


def test_tools_and_variables() -> None:
    """The template sees the tools and the request's own variables; it keeps its own source."""
    template = ChatTemplate("{{ tools[0].name }} {{ enable_thinking }} {{ documents }}")
    variables = {"enable_thinking": False, "documents": [1], "self": 2}
    assert template.render(MESSAGES, [{"name": "f"}], variables) == "f False [1]"
    assert template.source == "{{ tools[0].name }} {{ enable_thinking }} {{ documents }}"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []},
        {"tools": None},
        {"add_generation_prompt": False},
        {"bos_token": ""},
        {"x": 1, "eos_token": "x"},
    ],
    ids=lambda kwargs: [*kwargs][-1],
)
def test_reserved_variables(kwargs: Mapping[str, object]) -> None:
    """What makes the prompt a prompt is not the request's to set."""
    with pytest.raises(InvalidRequest, match=f"'{[*kwargs][-1]}' cannot be set") as caught:
        ChatTemplate(CHATML).render(MESSAGES, None, dict(kwargs))
    assert caught.value.param == "chat_template_kwargs"
