"""JSON schemas for constrained answers: a strategy, and the awkward ones."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES: Final = ["a", "b", "name", "naïve", 'q"uote', "x y"]
_PATTERNS: Final = ["^[a-z]{2,5}$", "^(yes|no)$", "^[0-9]+-[0-9]+$", r"^\d{4}$", "^b", "[^c]$"]
_FORMATS: Final = ["date", "date-time", "email", "ipv4", "uuid"]
_VALUES: Final = [None, True, 0, -3, 1.5, "", "text", "ü\n", [1, "a"], {"k": None}]

_bounds = st.tuples(st.integers(-50, 50), st.integers(0, 100))
_lengths = st.tuples(st.integers(0, 6), st.integers(0, 10))


def _integers(bounds: tuple[int, int]) -> Schema:
    return {"type": "integer", "minimum": bounds[0], "maximum": bounds[0] + bounds[1]}


def _numbers(bounds: tuple[int, int]) -> Schema:
    # llguidance 1.9 lets 0 pass for 0 < x <= 0.5: an open whole bound with the other one near it.
    low, width = bounds
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + width + 1.5}


def _strings(lengths: tuple[int, int]) -> Schema:
    return {"type": "string", "minLength": lengths[0], "maxLength": sum(lengths)}


_leaves = st.one_of(
    st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda t: {"type": t}),
    st.sampled_from([{"type": ["string", "null"]}, {"type": ["integer", "boolean"]}]),
    st.builds(_integers, _bounds),
    st.builds(_numbers, _bounds),
    st.builds(_strings, _lengths),
    st.sampled_from(_PATTERNS).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(_FORMATS).map(lambda f: {"type": "string", "format": f}),
    st.lists(st.sampled_from(_VALUES), min_size=1, max_size=4).map(lambda v: {"enum": v}),
    st.sampled_from(_VALUES).map(lambda v: {"const": v}),
    st.integers(1, 9).map(lambda n: {"type": "integer", "multipleOf": n}),
)


@st.composite
def _objects(draw: st.DrawFn, schemas: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(st.sampled_from(_NAMES), schemas, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    more = draw(st.one_of(st.none(), st.just(False), schemas))
    closed = {} if more is None else {"additionalProperties": more}
    return {"type": "object", "properties": properties, "required": required, **closed}


@st.composite
def _arrays(draw: st.DrawFn, schemas: st.SearchStrategy[Schema]) -> Schema:
    low = draw(st.integers(0, 3))
    high = low + draw(st.integers(0, 3))
    return {"type": "array", "items": draw(schemas), "minItems": low, "maxItems": high}


def _recursive(value: Schema) -> Schema:
    node = {
        "type": "object",
        "properties": {"value": value, "next": {"$ref": "#/$defs/link"}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    link = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    return {"$defs": {"node": node, "link": link}, "$ref": "#/$defs/node"}


_nested = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=8,
)
schemas = st.one_of(_nested, _objects(_nested), _nested.map(_recursive))
"""Every one of them has answers."""

objects = _objects(_nested)
"""Those whose answers are objects, as a tool's arguments must be."""

AWKWARD: Final[dict[str, Any]] = {
    "anything": {},
    "true": True,
    "no-type": {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "top-level-string": {"type": "string", "maxLength": 20},
    "top-level-array": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    "top-level-any-of": {"anyOf": [{"type": "integer"}, {"type": "object", "maxProperties": 1}]},
    "type-array": {"type": ["object", "array", "string", "null"], "maxItems": 2, "maxLength": 3},
    "recursive-root": {
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
        "additionalProperties": False,
    },
    "recursive-definitions": {
        "definitions": {
            "tree": {
                "type": "object",
                "properties": {
                    "left": {"$ref": "#/definitions/tree"},
                    "right": {"$ref": "#/definitions/tree"},
                    "leaf": {"type": "integer"},
                },
                "additionalProperties": False,
            }
        },
        "$ref": "#/definitions/tree",
    },
    "enum-of-everything": {"enum": _VALUES},
    "one-of": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 9}]},
    "all-of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "pattern-and-length": {
        "type": "string",
        "pattern": "^[a-z ]*$",
        "minLength": 5,
        "maxLength": 9,
    },
    "pattern-with-escapes": {"type": "string", "pattern": r'^["\\/]{3}\t?$'},
    "unknown-format": {"type": "string", "format": "int32", "maxLength": 5},
    "no-more-properties": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "number"}},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}],
        "items": False,
        "minItems": 2,
    },
    "own-options": {"x-guidance": {"whitespace_flexible": True}, "type": "array", "maxItems": 3},
    "annotations": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "T",
        "description": "D",
        "default": {"$ref": "nothing"},
        "type": "boolean",
    },
    "pydantic": {
        "$defs": {"Color": {"enum": ["red", "green"], "title": "Color", "type": "string"}},
        "properties": {
            "color": {"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"},
            "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["color"],
        "title": "Model",
        "type": "object",
    },
    "zod-record": {
        "type": "object",
        "propertyNames": {"type": "string", "description": "D"},
        "additionalProperties": {"type": "integer"},
    },
    "zod-enum-record": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a.b", "x\n", 'q"', "ü", "a|c"]},
        "additionalProperties": {"type": "boolean"},
        "required": ["a.b", "x\n", 'q"'],
    },
    "pydantic-enum-dict": {
        "$defs": {"Color": {"enum": ["red", "green"], "title": "Color", "type": "string"}},
        "properties": {"m": {"propertyNames": {"$ref": "#/$defs/Color"}, "type": "object"}},
        "required": ["m"],
    },
    "whole-floats": {"type": "array", "items": {"maxLength": 2.0}, "minItems": 1.0, "maxItems": 2},
    "format-and-look-around": {"type": "string", "format": "email", "pattern": "^(?!\\.).+@.+$"},
}
