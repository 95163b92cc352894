"""Tool calls as models write them: one block of text between two markers. Text in, `Part`s out.

A block whose body is JSON is streamed: the arguments go out as they come. Any other is read when it
is whole. What turns out to be no call is given back as it was written.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .generation import Part, ToolCall

MAX_BODY_CHARS: Final = 256 * 1024
"""Of what is read as a whole: the parsers behind it are regular expressions and `ast`."""
MAX_HEADER_CHARS: Final = 1024
"""A JSON body without name and arguments so far in is read as a whole."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes one tool call or, in some formats, several in one block."""

    start: str
    end: str
    """Empty: the block lasts to the end of the answer, and `parse` reads it."""
    parse: Callable[[str], list[ToolCall]] | None = None
    """Reads a whole body; raises ValueError where it is no call. None: the body is JSON,
    `{"name": ..., "arguments": {...}}`."""


def tool_call(fields: Any) -> ToolCall:
    """From a call as JSON or mlx-lm's parsers have it.

    Raises:
        ValueError: it is none, or its arguments are no JSON object.
    """
    if not isinstance(fields, dict):
        raise ValueError("a call is an object")
    name, id = fields.get("name"), fields.get("id")
    arguments = fields.get("arguments", fields.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}", strict=False)
    if arguments is None:
        arguments = {}
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("a call has a name and an object of arguments")
    if not (isinstance(id, str) and id):
        id = new_id()
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_unicode(text):
        text = json.dumps(arguments, allow_nan=False)
    if not _is_unicode(name + id):
        raise ValueError("a name is text")
    return ToolCall(id, name, text)


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which nothing can encode."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _parse_json(body: str) -> list[ToolCall]:
    try:
        found = json.loads(body, strict=False)
        return [tool_call(fields) for fields in (found if isinstance(found, list) else [found])]
    except RecursionError as error:
        raise ValueError("nested too deep") from error


_HEADER = re.compile(
    r"""\s*\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)"""
)
_IN_STRING = re.compile(r'["\\]')


class CallBlock:
    """One block, from its start marker on, fed in pieces."""

    def __init__(self, format: CallFormat, opening: str, *, parallel: bool) -> None:
        """`opening`: the start marker and what goes with it if this is no call after all."""
        self._end = format.end
        self._parse = format.parse or _parse_json
        self._is_json = format.parse is None
        self._parallel = parallel
        self._outside = re.compile(f'["{{}}[\\]{re.escape(format.end[:1])}]')
        self._read = self._header if self._is_json else self._body
        self._window = ""
        """Text not yet dealt with."""
        self._pieces = [opening]
        self._collected = 0
        """Characters in the pieces after the first."""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.called = False
        """A whole call came out."""
        self.ended = False
        self.refused = ""
        """Of a block that has ended: what is no call."""
        self.rest = ""
        """Of a block that has ended: the text after it."""

    def feed(self, text: str) -> list[Part]:
        self._window += text
        parts: list[Part] = []
        while self._read(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The answer ends here."""
        parts: list[Part] = []
        if self._read == self._arguments:  # they just end; what is held back may be an end marker
            if self._window:
                parts.append(Part("arguments", self._window))
        else:
            body = "".join([*self._pieces[1:], self._window])
            # Other parsers than JSON's would take half a call for a whole one.
            self._close(parts, body, "", whole=self._is_json or not self._end)
        self.ended = True
        return parts

    def _header(self, parts: list[Part]) -> bool:
        """Until the arguments begin; the name is in `parts` then."""
        end = self._window.find(self._end)
        limit = MAX_HEADER_CHARS if end < 0 else min(end, MAX_HEADER_CHARS)
        if match := _HEADER.match(self._window, 0, limit):
            parts.append(Part("call", match[1], new_id()))
            self._window = self._window[match.end() :]
            self._read = self._arguments
        elif end >= 0 or len(self._window) >= MAX_HEADER_CHARS:
            self._read = self._body
        else:
            return False
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        """Until their last brace, or an end marker that is in no string."""
        window, at, whole = self._window, 0, False
        while at < len(window):
            if self._escaped:
                self._escaped, at = False, at + 1
                continue
            match = (_IN_STRING if self._in_string else self._outside).search(window, at)
            if match is None:
                at = len(window)
                break
            at, character = match.start(), match[0]
            if self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif self._end.startswith(window[at : at + len(self._end)]):
                whole = len(window) >= at + len(self._end)
                break
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                whole = self._depth == 0
            at += 1
            if whole:
                break
        if at:
            parts.append(Part("arguments", window[:at]))
        self._window = window[at:]
        if whole:
            self.called = True
            self._pieces = [""]
            self._read = self._body
        return whole

    def _body(self, parts: list[Part]) -> bool:
        """Until the end marker; after streamed arguments, what is left of the object."""
        found = self._window.find(self._end) if self._end else -1
        size = self._collected + (len(self._window) if found < 0 else found)
        if size >= MAX_BODY_CHARS + len(self._end) or (found >= 0 and size > MAX_BODY_CHARS):
            text = "".join([*self._pieces[1:], self._window])
            self.refused = self._pieces[0] + text[:MAX_BODY_CHARS]
            self.rest = text[MAX_BODY_CHARS:]
            self.ended = True
        elif found >= 0:
            self._pieces.append(self._window[:found])
            self.rest = self._window[found + len(self._end) :]
            self._close(parts, "".join(self._pieces[1:]), self._end, whole=True)
            self.ended = True
        else:
            keep = max(0, len(self._window) - max(0, len(self._end) - 1))
            self._pieces.append(self._window[:keep])
            self._collected += keep
            self._window = self._window[keep:]
        return False

    def _close(self, parts: list[Part], body: str, end: str, *, whole: bool) -> None:
        if self.called:  # the arguments went out before; one brace is left, and often forgotten
            if body.strip() not in ("", "}"):
                self.refused = body + end
            return
        try:
            if not whole:
                raise ValueError("cut off")
            calls = self._parse(body.strip())
        except ValueError:
            self.refused = self._pieces[0] + body + end
            return
        for call in calls if self._parallel else calls[:1]:
            parts += [Part("call", call.name, call.id), Part("arguments", call.arguments)]
            self.called = True
