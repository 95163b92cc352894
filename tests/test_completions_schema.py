"""What a client of completions and of embeddings may send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmx.completions_schema import CompletionRequest, EmbeddingsRequest
from lmx.config import SamplingDefaults
from lmx.errors import InvalidRequest, UnsupportedParameter
from lmx.generation import EmbeddingRequest, GenerationRequest, Grammar
from lmx.schema import SampledRequest, decode

DEFAULTS = SamplingDefaults()
SHARED = SampledRequest.__struct_fields__
"""Tested with chats."""


def complete(**fields: Any) -> GenerationRequest:
    body = json.dumps({"model": "m", "prompt": "hi"} | fields).encode()
    return decode(body, CompletionRequest).to_request(DEFAULTS)


def embed(**fields: Any) -> EmbeddingRequest:
    body = json.dumps({"model": "m", "input": "hi"} | fields).encode()
    return decode(body, EmbeddingsRequest).to_request()


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ({"prompt": ["a"] * 65, "best_of": 2}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", None]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [1, 2, "a"]}, "prompt[2]"),
    ({"prompt": [1, [2]]}, "prompt[1]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": [[1], [2, "a"]]}, "prompt[1][1]"),
    ({"n": 0}, "n"),
    ({"n": 99}, "n"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 21}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"suffix": 1}, "suffix"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS, ids=lambda v: f"{v!r:.60}")
def test_bad_completions_name_the_field(fields: dict[str, Any], param: str) -> None:
    """Each wrong value is a 400 whose `param` is the field at fault, or the item in it."""
    with pytest.raises(InvalidRequest) as caught:
        complete(**fields)
    assert caught.value.param == param
    assert isinstance(caught.value, UnsupportedParameter) == (
        fields in ({"echo": True}, {"suffix": "x"})
    )


def test_every_field_of_a_completion_has_bad_values() -> None:
    """No field that only completions have goes without a row in the table above."""
    own = {*CompletionRequest.__struct_fields__} - {*SHARED}
    assert own <= {field for fields, _ in BAD_COMPLETIONS for field in fields}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [""]),
        (" a", [" a"]),
        (["a", ""], ["a", ""]),
        ([0, 5], [[0, 5]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        ([7] * 500, [[7] * 500]),
    ],
)
def test_prompts(prompt: Any, expected: list[str | list[int]]) -> None:
    """A text, several, token ids or several lists of them."""
    assert complete(prompt=prompt).prompt == expected


def test_a_completion_is_short_unless_more_is_asked_for() -> None:
    """16 tokens is OpenAI's default here; -1 is LM Studio's way to ask for no limit."""
    assert complete().params.max_tokens == 16
    assert complete(max_tokens=5).params.max_tokens == 5
    assert complete(max_tokens=-1).params.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "n", "logprobs"),
    [
        ({}, 1, None),
        ({"n": 2, "best_of": 2, "stream": True}, 2, None),
        ({"n": 20}, 20, None),
        ({"n": 2, "best_of": 5}, 5, 0),
        ({"best_of": 5, "logprobs": 3}, 5, 3),
        ({"logprobs": 0}, 1, 0),
        ({"echo": False, "suffix": "", "logprobs": None, "user": "u"}, 1, None),
    ],
)
def test_answers_to_a_completion(fields: dict[str, Any], n: int, logprobs: int | None) -> None:
    """To choose the best, all are generated and their logprobs are needed."""
    wanted = complete(**fields)
    assert (wanted.n, wanted.params.logprobs) == (n, logprobs)


def test_a_completion_may_have_a_structure() -> None:
    """vLLM's fields work here as in a chat."""
    assert complete(guided_choice=["a"]).grammar == Grammar("choice", '["a"]', "guided_choice")
    structured = complete(response_format={"type": "json_object"})
    assert structured.grammar == Grammar("json_object", "")


BAD_EMBEDDINGS: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"ttl": 0}, "ttl"),
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": [1, "a"]}, "input[1]"),
    ({"input": [[-1]]}, "input[0][0]"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": 1.5}, "dimensions"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_EMBEDDINGS, ids=lambda v: f"{v!r:.60}")
def test_bad_embeddings_name_the_field(fields: dict[str, Any], param: str) -> None:
    """Each wrong value is a 400 whose `param` is the field at fault, or the item in it."""
    with pytest.raises(InvalidRequest) as caught:
        embed(**fields)
    assert caught.value.param == param


def test_every_field_of_an_embedding_has_bad_values() -> None:
    """No field goes without a row in the table above."""
    fields = {field for fields, _ in BAD_EMBEDDINGS for field in fields}
    assert fields == set(EmbeddingsRequest.__struct_fields__)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, EmbeddingRequest(["hi"])),
        ({"input": ["a"] * 2048}, EmbeddingRequest(["a"] * 2048)),
        ({"input": [5] * 3000}, EmbeddingRequest([[5] * 3000])),
        ({"input": [[1], [2]], "user": "u"}, EmbeddingRequest([[1], [2]])),
        ({"dimensions": 64.0}, EmbeddingRequest(["hi"], 64)),
        ({"dimensions": 10**30}, EmbeddingRequest(["hi"], 2**31 - 1)),
    ],
)
def test_embeddings(fields: dict[str, Any], expected: EmbeddingRequest) -> None:
    """Texts and token ids, one or many, and how long the vectors shall be."""
    assert embed(**fields) == expected
