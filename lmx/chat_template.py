"""A model's own chat template, rendered in a sandbox with a deadline and limits on size.

A template is code that came with the model's files. Three rules:
1. It cannot get out: jinja2's immutable sandbox, and only plain strings, lists and dicts go in.
2. It ends: every block, call, filter and operator looks at the clock. (Signals reach the main
   thread only, and sys.settrace costs more.)
3. It stays small: what makes much out of little is paid for, before it is made, from one budget;
   padding and string formatting are not offered.
One step in C over values within the limits cannot be interrupted; the watchdog sees to that.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from datetime import datetime
from itertools import chain
from typing import Any, Final

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from .errors import InvalidRequest, ModelLoadFailed
from .generation import ChatMessage

_NO_METHODS: Final = frozenset(
    "center encode expandtabs format format_map ljust rjust to_bytes translate zfill".split()
)
_NO_FILTERS: Final = frozenset(
    "batch center filesizeformat format pprint random round slice striptags sum urlize wordwrap"
    " xmlattr".split()
)
_LIST_FILTERS: Final = frozenset(  # the others make text of what they are given
    "attr count d default dictsort first groupby items last length list map max min reject"
    " rejectattr reverse select selectattr sort unique".split()
)
_ITEM: Final = 32  # characters that an item of a list counts for
_MAX_BITS: Final = 4096
_PASSES: Final = 8  # times max_chars: what a rendering may make in all, intermediate values too


def _length(value: str | list[Any] | tuple[Any, ...]) -> int:
    return len(value) * (1 if isinstance(value, str) else _ITEM)


def _dict(*items: Any, **more: Any) -> dict[str, Any]:
    """In place of the type, whose methods would change the messages."""
    return dict(*items, **more)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Raised(TemplateError):
    """The template called raise_exception."""


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):  # Python and jinja2 would find a __call__, for one, on the object
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _CodeGenerator(CodeGenerator):
    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Budget(threading.local):
    """What the rendering on this thread may still use: nothing, outside of `render`."""

    until = 0.0
    chars = 0


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            optimized=False,  # these two keep jinja2 from computing anything at compile time
            finalize=self._finalize,
        )
        self.max_chars = max_chars
        self.budget = _Budget()
        self.filters |= {"indent": self._indent, "join": self._join}
        self.filters |= {"replace": self._replace, "tojson": self._tojson}
        offered = self.filters.keys() - _NO_FILTERS
        self.filters = {name: self._metered(name, self.filters[name]) for name in offered}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": self._raise_exception,
            "strftime_now": _strftime_now,
        }

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        return self._weighed(value)

    def tick(self) -> None:
        if time.monotonic() >= self.budget.until:
            raise SecurityError("it takes too long")

    def charge(self, chars: int) -> None:
        self.budget.chars -= max(chars, 0)
        if chars > self.max_chars or self.budget.chars < 0:
            raise SecurityError(f"it makes more text than {self.max_chars} characters")

    def _paid(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            self.charge(_length(value))
        return value

    def _weighed(self, value: Any, pad: int = 0, depth: int = 1) -> Any:
        """`value`, after paying for its length as text: parts of containers may be shared."""
        if isinstance(value, (list, tuple, set, dict, ItemsView, KeysView, ValuesView)):
            self.tick()
            for part in chain(*value.items()) if isinstance(value, dict) else value:
                self.charge(_ITEM + pad * depth + (len(part) if isinstance(part, str) else 0))
                self._weighed(part, pad, depth + 1)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        self.charge(sum(map(len, parts)))
        return "".join(parts)

    def join(self, parts: Iterable[Any]) -> str:
        return self.concat([str(self._weighed(part)) for part in parts])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered")
        if operator != "+" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits * abs(right) if operator == "**" else bits + right.bit_length()) > _MAX_BITS:
                raise SecurityError("a number is too large")
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    self.charge(_length(many) * times)
        return self._paid(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self.charge(len(owner))
            if obj.__name__ == "join":
                obj, args = self._join, (*args, owner)
            elif obj.__name__ == "replace":
                obj, args = self._replace, (owner, *args)
        return self._paid(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, int)) and attr in _NO_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No safe `format` instead of the one that is_safe_attribute refuses."""

    def _metered(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if name not in _LIST_FILTERS:
                for value in (*args, *kwargs.values()):
                    self._weighed(value)
            return self._paid(filter(*args, **kwargs))

        return metered

    def _indent(self, text: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> str:
        text = str(text)
        one = width if isinstance(width, int) else len(width)
        self.charge((text.count("\n") + 1) * one)
        return do_indent(text, width, *args, **kwargs)

    def _join(self, parts: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            parts = (self.getitem(part, attribute) for part in parts)
        texts = [str(self._weighed(part)) for part in parts]
        self.charge(sum(map(len, texts)) + len(texts) * len(str(d)))
        return str(d).join(texts)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        self.charge(len(text) + text.count(old) * len(new))
        return str.replace(text, old, new, -1 if count is None else count)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        pad = len(indent) if isinstance(indent, str) else indent or 0
        self._weighed(value, pad + sum(map(len, separators or ())))
        layout: dict[str, Any] = {"indent": indent, "separators": separators}
        return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys, **layout)

    def _raise_exception(self, message: Any) -> None:
        raise _Raised(str(self._weighed(message))[:1000])


class ChatTemplate:
    """Compiled once; any thread may render, several at a time too.

    Raises:
        ModelLoadFailed: the template has a syntax error; names the line and the reason.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        deadline_seconds: float = 2.0,
        max_chars: int = 16 * 1024**2,
    ) -> None:
        self._environment = _Environment(max_chars)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._deadline_seconds = deadline_seconds
        self._max_chars = max_chars
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # a nest too deep is a RecursionError or Python's SyntaxError
            line = f" at line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ModelLoadFailed(
                f"The model's chat template does not compile{line}: {_reason(error)}"
            ) from error

    def render(self, messages: list[ChatMessage]) -> str:
        """The prompt up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the template refuses these messages, or fails on them.
        """
        budget = self._environment.budget
        budget.until = time.monotonic() + self._deadline_seconds
        budget.chars = _PASSES * self._max_chars
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # a template can raise nearly anything
            verb = "refuses" if isinstance(error, _Raised) else "cannot render"
            raise InvalidRequest(
                f"The model's chat template {verb} these messages: {_reason(error)}",
                param="messages",
            ) from error
        finally:
            budget.until = 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return str(error)[:1000]
    return f"{type(error).__name__}: {error}"[:1000]
