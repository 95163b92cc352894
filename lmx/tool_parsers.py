"""mlx-lm's parsers of tool calls, for GGUF models too.

mlx-lm itself is never imported here: that would take a runner seconds and 200 MB.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from .generation import ToolCall
from .tool_calls import tool_call

Parser = Callable[[str, list[dict[str, Any]]], Any]
"""From a body and the tools, as templates see them, to a call as a dict, or to several."""

_BY_TEMPLATE: Final = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>", "arguments")),
)
"""What the template of a model that needs the parser holds. mlx-lm's rules, but for the last, which
knows the JSON of Qwen and Hermes in whatever words the template makes it."""
_BY_TOKENS: Final = (
    ("kimi_k3", (b"<|open|>", b"<|close|>", b"<|sep|>", b"<|end_of_msg|>")),
    ("pythonic", (b"<|tool_call_start|>", b"<|tool_call_end|>")),
)
MAX_GEMMA_CALLS: Final = 64
"""mlx-lm's pattern for Gemma 4 takes time by the square of their number: 1 s for some 1000."""
_PACKAGE: Final = "lmx_tool_parsers"
_HARMONY_CALL = re.compile(r"([\w.-]++)[^{]*?<\|message\|>\s*(\{.*\})\s*(?:<\|call\|>)?", re.DOTALL)
_CALL_ID = re.compile(r"\[CALL_ID\]\w*(?=\[ARGS\])")


def find_parser(named: str | None, template: str, tokens: Collection[bytes]) -> str | None:
    """The parser the model's files name, if there is one, or else the one that fits the model."""
    if named is not None and named.isidentifier() and (_folder() / f"{named}.py").is_file():
        return named
    for name, markers in _BY_TEMPLATE:
        if all(marker in template for marker in markers):
            return name
    return next((n for n, wanted in _BY_TOKENS if all(t in tokens for t in wanted)), None)


def load_parser(name: str) -> tuple[str, str, Parser]:
    """The markers around a block of calls, and what reads the text between them."""
    if _PACKAGE not in sys.modules:  # a package of our own, as the parsers import one another
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(_folder())]
        sys.modules[_PACKAGE] = package
    module = importlib.import_module(f"{_PACKAGE}.{name}")
    return module.tool_call_start, module.tool_call_end, module.parse_tool_call


def _folder() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tool_parsers"


def parse_calls(
    body: str, parser: Parser, tools: list[dict[str, Any]], callable: Collection[str]
) -> list[ToolCall]:
    """
    Raises:
        ValueError: these are no calls of tools that may be called.
    """
    if body.count("call:") > MAX_GEMMA_CALLS:
        raise ValueError("too many calls")
    body = _CALL_ID.sub("", body)  # Mistral's, which mlx-lm would take for the function's name
    try:
        found = parser(body, tools)
        calls = [tool_call(fields) for fields in (found if isinstance(found, list) else [found])]
    except Exception as error:  # code of others on what a model wrote: anything can come
        raise ValueError("no call") from error
    if not calls or any(call.name not in callable for call in calls):
        raise ValueError("no call of these tools")  # some parsers make a call of any text
    return calls


def parse_harmony(body: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """gpt-oss's, behind `to=functions.`; mlx-lm has none.

    Raises:
        ValueError: no call.
    """
    match = _HARMONY_CALL.fullmatch(body)
    if match is None:
        raise ValueError("no call")
    return {"name": match[1], "arguments": match[2]}
