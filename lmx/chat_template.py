"""A model's own chat template, rendered in a sandbox with a deadline and an output cap.

A template is code that came with the model's files: it must not get out of the sandbox, run for
ever, or fill the memory. The runner renders in worker threads while its main thread decodes, so
signals are no help; the compiled template looks at the clock itself, at the start of every block.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import EngineSettings
from .errors import InvalidRequest, ModelLoadFailed

DEADLINE_SECONDS: Final = 2.0
MAX_CHARS: Final = 16 * 1024**2
"""Of a rendered prompt, and of any string or list that a template builds with + ~ or *."""
MAX_BITS: Final = 4096
"""Of an integer a template computes."""

RESERVED: Final = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
"""Variables of a template that a request cannot set."""


class _Raised(TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Raised(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Unlike jinja2's own, it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _CodeGenerator(CodeGenerator):
    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.look_at_the_clock()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Deadline(threading.local):
    at = 0.0


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            optimized=False,  # or constants would be computed, unchecked, while compiling
        )
        self.deadline = _Deadline()
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def look_at_the_clock(self) -> None:
        if time.monotonic() >= self.deadline.at:
            raise SecurityError("it takes too long")

    def concat(self, parts: Iterable[str]) -> str:
        """Also what the compiled template joins its output with."""
        kept = []
        room = MAX_CHARS
        for part in parts:
            room -= len(part)
            if room < 0:
                raise SecurityError(f"it makes more than {MAX_CHARS} characters")
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else None for v in (left, right)]
        if sizes[0] is not None and sizes[1] is not None:
            size = sizes[0] + sizes[1]
        elif sizes[0] is not None and isinstance(right, int):
            size = sizes[0] * right
        elif sizes[1] is not None and isinstance(left, int):
            size = sizes[1] * left
        else:
            size = 0
        if size > MAX_CHARS:
            raise SecurityError(f"it makes more than {MAX_CHARS} characters")
        if operator != "+" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits * right if operator == "**" else bits + right.bit_length()) > MAX_BITS:
                raise SecurityError("it computes too large a number")
        return super().call_binop(context, operator, left, right)


def own_template(settings: EngineSettings) -> str | None:
    """The template that the configuration wants in place of the model's.

    Raises:
        ModelLoadFailed: its file cannot be read.
    """
    if settings.chat_template is None:
        return None
    try:
        return Path(settings.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"chat_template {settings.chat_template}: {error}") from error


class ChatTemplate:
    """Compiled once; any thread may render, several at a time too.

    Raises:
        ModelLoadFailed: the template does not compile; names the line and the reason.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        self.source: str | None = source
        self._environment = _Environment()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._deadline_seconds = deadline_seconds
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            raise ModelLoadFailed(
                f"The model's chat template does not compile (line {line}): {_reason(error)}"
            ) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt up to where the assistant's answer begins; `kwargs` are variables.

        Raises:
            InvalidRequest: the template refuses these messages, or fails on them; or a variable is
                not the request's to set.
        """
        variables = kwargs or {}
        for name in RESERVED:
            if name in variables:
                raise InvalidRequest(
                    f"Invalid value for 'chat_template_kwargs': '{name}' cannot be set.",
                    param="chat_template_kwargs",
                )
        given = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
        }
        self._environment.deadline.at = time.monotonic() + self._deadline_seconds
        try:
            return self._template.render(given | variables)
        except Exception as error:  # a template can raise nearly anything
            verb = "refuses" if isinstance(error, _Raised) else "cannot render"
            raise InvalidRequest(
                f"The model's chat template {verb} these messages: {_reason(error)}",
                param="messages",
            ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return str(error)[:1000]
    return f"{type(error).__name__}: {error}"[:1000]
