"""Schemas, tools, reasoning, seeds and embeddings through the whole program, on both engines.

The models are random, which tempts no grammar to look better than it is: they write nothing valid
by themselves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError, LengthFinishReasonError

from . import models, schemas
from .schema_answers import Asker, run
from .serving import Serving, serving

pytestmark = pytest.mark.anyio

MLX, GGUF = "tiny-mlx", "tiny-gguf"
ENGINES = pytest.mark.parametrize("model", [MLX, GGUF])

# As in Qwen's family.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Write calls as <tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{# what it thinks goes before </think> #}"""

# Random models would never close a string: these tokens do.
CLOSING = {109: 25, 77: 25, 2: 25, 23597: 20, 3222: 20, 18: 15}
CLOSE: dict[str, Any] = {"extra_body": {"logit_bias": {str(t): b for t, b in CLOSING.items()}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("home")
    publisher = home / ".opta-lmx" / "models" / "test"
    models.tiny_mlx(publisher / MLX, max_position_embeddings=8192)
    path = models.tiny_gguf(publisher / "gguf", max_position_embeddings=8192)
    path.rename(path.with_name(f"{GGUF}.F32.gguf"))
    shutil.copytree(models.minilm_mlx(), publisher / "MiniLM", copy_function=os.link)
    template = home / "template.jinja"
    template.write_text(TEMPLATE)
    config: dict[str, Any] = {"engine": {"parallel": 8}, "models": {}}
    for model in (MLX, GGUF):
        config["models"][model] = {"engine": {"chat_template": str(template)}}
    (home / ".opta-lmx" / "config.yaml").write_text(json.dumps(config))
    with serving(home) as running:
        yield running


@pytest.fixture
async def client(server: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with server.client() as client:
        yield client


@ENGINES
def test_every_complete_answer_fits_its_schema(server: Serving, model: str) -> None:
    """200 generated schemas and the awkward ones, hot, many at a time, streamed or not."""
    tally = run(Asker(server.url, model, 120, CLOSE), 200)
    assert tally.wrong == []
    assert tally.complete > 3 * tally.cut


TOOL_SCHEMAS = st.lists(schemas.objects, min_size=8, max_size=8)


@ENGINES
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_required_call_is_always_valid(server: Serving, model: str, choice: str) -> None:
    """Whatever the tools' schemas: complete calls of tools there are, arguments as they say."""
    complete = 0

    async def ask(wanted: list[dict[str, Any]]) -> None:
        async with server.client() as client, anyio.create_task_group() as tasks:
            for number in range(len(wanted)):
                tasks.start_soon(one, client, wanted, number)

    async def one(client: AsyncOpenAI, wanted: list[dict[str, Any]], number: int) -> None:
        nonlocal complete
        named = {"type": "function", "function": {"name": f"tool_{number}"}}
        message, finish = await chat(
            client,
            model,
            tools=[tool(f"tool_{i}", schema, strict=True) for i, schema in enumerate(wanted)],
            tool_choice=named if choice == "named" else "required",
            parallel_tool_calls=number % 2 == 0,
            stream=number % 3 == 0,
            temperature=1.5,
            max_tokens=150,
        )
        if finish == "length":
            return
        assert not message["content"]
        assert finish == "tool_calls"
        complete += 1
        calls = message["tool_calls"]
        assert len(calls) == 1 or (choice, number % 2) == ("required", 0)
        for call in calls:
            name = call["function"]["name"]
            assert choice != "named" or name == f"tool_{number}"
            schema = wanted[int(name.removeprefix("tool_"))]
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)

    @settings(
        max_examples=2,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(TOOL_SCHEMAS)
    def some(wanted: list[dict[str, Any]]) -> None:
        anyio.run(ask, wanted)

    some()
    assert complete > 8


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 12},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    strict=True,
)


async def chat(
    client: AsyncOpenAI, model: str, *, stream: bool = False, **more: Any
) -> tuple[dict[str, Any], str]:
    """The message and how it ended; of a stream, as the official client puts it together."""
    body: Any = {
        "model": model,
        "messages": [{"role": "user", "content": "Weather in Paris and Rome?"}],
        **CLOSE,
        **more,
    }
    if stream:
        [choice] = (await put_together(client, body)).choices
    else:
        [choice] = (await client.chat.completions.create(**body)).choices
    message = choice.message.model_dump(exclude_none=True)
    message.pop("annotations", None)
    for call in message.get("tool_calls") or []:
        assert call.pop("id")
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    message["logprobs"] = choice.logprobs and nearly(choice.logprobs.model_dump())
    return {"content": None, **message}, choice.finish_reason


def nearly(value: Any) -> Any:
    """Equal to what differs by rounding: the second prompt is found cached, all but its last token,
    and one row is summed by another kernel than many."""
    if isinstance(value, dict):
        return {key: nearly(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nearly(inner) for inner in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


async def put_together(client: AsyncOpenAI, body: dict[str, Any]) -> Any:
    async with client.chat.completions.stream(**body) as events:
        try:
            async for _ in events:
                pass
        except LengthFinishReasonError as error:
            return error.completion
        return events.current_completion_snapshot


@ENGINES
@pytest.mark.parametrize(
    "more",
    [
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
        {
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        },
        {"tools": [WEATHER]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "top_logprobs": 3},
    ],
    ids=["required", "one", "named", "auto", "json_object", "logprobs"],
)
async def test_a_stream_is_the_whole_answer(
    client: AsyncOpenAI, model: str, more: dict[str, Any]
) -> None:
    """Same request, same seed: the official client makes the same message of the stream."""
    seeded = {"seed": 5, "temperature": 1.2, "max_tokens": 80, **more}
    whole = await chat(client, model, **seeded)
    streamed = await chat(client, model, stream=True, **seeded)
    assert streamed == whole


@ENGINES
@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_begins_behind_the_reasoning(
    client: AsyncOpenAI, model: str, stream: bool
) -> None:
    """What is thought is free, and neither counted as content nor held to the schema."""
    close = {"109": 50.0, "2": 100.0}  # it would rather end at once, which must not be
    message, _ = await chat(
        client,
        model,
        stream=stream,
        max_tokens=30,
        response_format={"type": "json_object"},
        extra_body={"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": close},
    )
    assert message["reasoning_content"].startswith("}}}") and not message["content"]


@ENGINES
async def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(
    client: AsyncOpenAI, model: str
) -> None:
    """Ten times, alone and beside eight others of all kinds."""
    wanted: dict[str, Any] = {"seed": 11, "temperature": 1.0, "max_tokens": 24, "extra_body": {}}
    crowd: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"logprobs": True, "top_logprobs": 20},
        {"presence_penalty": 1.0},
        {"temperature": 0},
        {"seed": 12},
        {"stop": ["a"]},
        {},
    ]
    alone = {str(await chat(client, model, **wanted)) for _ in range(5)}
    together: list[str] = []

    async def one() -> None:
        together.append(str(await chat(client, model, **wanted)))

    for _ in range(5):
        async with anyio.create_task_group() as tasks:
            for more in crowd[:4]:
                tasks.start_soon(lambda more: chat(client, model, max_tokens=40, **more), more)
            tasks.start_soon(one)
            for more in crowd[4:]:
                tasks.start_soon(lambda more: chat(client, model, max_tokens=40, **more), more)
    assert len(alone) == 1 and set(together) == alone


@ENGINES
async def test_n_answers_count_their_prompt_once(client: AsyncOpenAI, model: str) -> None:
    """Four different answers to one prompt, in order, streamed or not."""
    body: Any = {
        "model": model,
        "messages": [{"role": "user", "content": "word " * 50}],
        "n": 4,
        "seed": 3,
        "temperature": 1.5,
        "max_tokens": 10,
    }
    several = await client.chat.completions.create(**body)
    single = await client.chat.completions.create(**body | {"n": 1})
    assert several.usage and single.usage
    assert several.usage.prompt_tokens == single.usage.prompt_tokens
    assert several.usage.completion_tokens <= 40
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4 and texts[0] == single.choices[0].message.content
    streamed = await put_together(client, body)
    assert [choice.message.content for choice in streamed.choices] == texts


NOT_A_TYPE = {"type": "objekt"}
BAD_PATTERN = {"properties": {"a": {"type": "string", "pattern": "("}}}
UNKNOWN = {"type": "function", "function": {"name": "no"}}


@ENGINES
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [tool("f", NOT_A_TYPE)]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", BAD_PATTERN, strict=True)]}, "tools[0].function.parameters"),
        ({"tools": [WEATHER], "tool_choice": UNKNOWN}, "tool_choice"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"extra_body": {"guided_json": NOT_A_TYPE}}, "guided_json"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex"),
        ({"extra_body": {"guided_grammar": "root ::= ("}}, "guided_grammar"),
        ({"extra_body": {"guided_json": {"enum": []}}}, "guided_json"),
    ],
    ids=["tool", "strict tool", "named", "logit_bias", "schema", "regex", "gbnf", "unsatisfiable"],
)
async def test_what_the_model_cannot_be_held_to_is_refused(
    client: AsyncOpenAI, model: str, more: dict[str, Any], param: str
) -> None:
    """A 400 that names the field, streaming or not, before anything is generated."""
    for stream in (False, True):
        body: Any = {"model": model, "messages": [{"role": "user", "content": "x"}], **more}
        with pytest.raises(BadRequestError) as refused:
            await client.chat.completions.create(**body, stream=stream)
        assert refused.value.param == param


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


async def test_embeddings_by_the_official_client(server: Serving, client: AsyncOpenAI) -> None:
    """Hundreds at once, in order, base64 as the client asks; similar sentences are near."""
    name = "text-embedding-minilm"
    words = ["A cat sits on the mat.", "There is a kitten on the rug.", "Stocks fell on Monday."]
    made = await client.embeddings.create(model=name, input=[*words, *(f"{i}" for i in range(200))])
    cat, kitten, stocks = (item.embedding for item in made.data[:3])
    assert [item.index for item in made.data] == list(range(203)) and len(cat) == 384
    assert dot(cat, kitten) > 0.5 > 0.2 > dot(cat, stocks)
    single = await client.embeddings.create(model=name, input="7", dimensions=10)
    [vector] = [item.embedding for item in single.data]
    assert abs(dot(vector, vector) - 1) < 1e-6 and made.usage.prompt_tokens > 600
    assert dot(made.data[10].embedding[:10], vector) > 0
    with pytest.raises(BadRequestError) as refused:
        await client.embeddings.create(model=name, input="word " * 600)
    assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")
    loaded = server.get(f"/admin/models/{name}").json()
    assert loaded["kind"] == "embedding"
    memory = loaded["loaded"]["memory"]
    assert loaded["size_bytes"] < memory["measured_loaded"] < memory["estimated_loaded"]
