"""Constrained decoding: which tokens may come next, so that an answer is what was asked for.

llguidance does it, for every engine. Around its grammars lie stretches where any token may come: a
model's reasoning, and text in which it may call a tool.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal

from llguidance import LLMatcher, LLTokenizer

from . import grammars
from .backends import Vocabulary
from .errors import GenerationFailed, InvalidRequest, LMXError
from .generation import Grammar, Tool
from .grammars import COMPILE_SECONDS
from .grammars import Calls as Calls

MAX_CACHED: Final = 64
MAX_MARKERS: Final = 8
NEWLINES: Final = 2
"""How many may stand between reasoning and what follows it."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one request asks for; each of its answers takes a `new` constraint."""

    vocabulary: Vocabulary
    tokenizer: LLTokenizer
    newlines: dict[int, int]
    """Tokens that are newlines only, and how many."""
    matcher: LLMatcher
    in_text: bool
    """The matcher is for a call, from behind its start marker, in text that is free."""
    start: bytes
    end: bytes
    parallel: bool
    reasoning: tuple[bytes, bytes] | None
    opening: int | None
    """The token that begins reasoning where the answer could begin."""
    thinking: bool
    any_but_end: bytes
    """The mask while it reasons, where something must follow."""
    only_end: bytes
    """The mask when all is said."""

    def new(self) -> Constraint:
        return Constraint(self)


class Constraint:
    """`lmx.backends.Constraint` of one answer."""

    def __init__(self, compiled: Compiled) -> None:
        self._of = compiled
        self.restart([])

    def restart(self, answer: list[int]) -> None:
        self.error: LMXError | None = None
        """Set when the answer cannot go on as it was asked for."""
        self._state: Literal["thinking", "begin", "gap", "matched", "text", "call", "loose", "over"]
        self._state = "thinking" if self._of.thinking else "text" if self._of.in_text else "begin"
        self._matcher = self._of.matcher.deep_copy()
        self._tail = b""  # of the text: a marker may have begun in it
        # All of the text, while it may still turn out to begin with reasoning.
        self._head = b"" if self._of.reasoning and not self._of.thinking else None
        self._newlines = NEWLINES
        for token in answer:
            self.accept(token)

    def mask(self) -> bytes | None:
        of = self._of
        if self._state == "thinking" and not of.in_text:
            return of.any_but_end
        if self.error or self._state in ("thinking", "text", "loose"):
            return None
        if self._state == "over":
            return of.only_end
        # llguidance's has a bit more, for its own end-of-sequence.
        mask = self._matcher.compute_bitmask()[: len(of.only_end)]
        if self._matcher.is_error():
            self._fail()
            return None
        if self._state == "begin" and of.opening is not None:
            return _with(mask, [of.opening])
        if self._state == "gap":
            return _with(mask, (i for i, n in of.newlines.items() if n <= self._newlines))
        return mask

    def accept(self, token: int) -> None:
        of = self._of
        tokens = of.vocabulary.tokens
        data = tokens[token] if token < len(tokens) else b""  # logits may be padded
        if self.error or self._state == "over":
            return
        if token in of.vocabulary.end:
            self._state = "over"
        elif self._state == "thinking":
            self._think(data)
        elif self._state == "text":
            self._write(data)
        elif self._state == "loose":
            self._pass(data)
        elif self._state == "begin" and token == of.opening:
            self._state, self._tail = "thinking", data
        elif self._state == "gap" and of.newlines.get(token, NEWLINES + 1) <= self._newlines:
            self._newlines -= of.newlines[token]
        else:
            self._match([token])

    def _match(self, tokens: list[int]) -> None:
        if self._state != "call":
            self._state = "matched"
        if not self._matcher.consume_tokens(tokens):
            self._fail()
        elif self._state == "call" and self._matcher.is_accepting():
            self._end_call()

    def _think(self, data: bytes) -> None:
        assert self._of.reasoning is not None
        rest = self._behind(self._of.reasoning[1], data)
        if rest is None:
            return
        if self._of.in_text:
            self._state = "text"
            self._write(rest)
        else:
            self._state = "gap"
            if rest := rest.lstrip():
                self._match(self._of.tokenizer.tokenize_bytes(rest))

    def _write(self, data: bytes) -> None:
        of = self._of
        if self._head is not None and of.reasoning is not None:
            opening, self._head = of.reasoning[0], (self._head + data).lstrip()
            if self._head.startswith(opening):
                rest, self._head = self._head[len(opening) :], None
                self._state, self._tail = "thinking", b""
                return self._think(rest)
            if not opening.startswith(self._head):
                self._head = None
        call = self._behind(of.start, data)
        if call is not None:
            self._state, self._matcher = "call", of.matcher.deep_copy()
            tokens = of.tokenizer.tokenize_bytes(call)
            if self._matcher.try_consume_tokens(tokens) < len(tokens):
                self._state = "loose"  # one token held the marker and what no call begins with
                self._pass(call)

    def _pass(self, data: bytes) -> None:
        if self._behind(self._of.end, data) is not None:
            self._end_call()

    def _end_call(self) -> None:
        self._state = "text" if self._of.parallel else "over"

    def _behind(self, marker: bytes, data: bytes) -> bytes | None:
        """What stands behind the marker, if `data` completes it."""
        text = self._tail + data
        _, found, rest = text.partition(marker)
        self._tail = b"" if found else text[max(0, len(text) - len(marker) + 1) :]
        return rest if found else None

    def _fail(self) -> None:
        why = grammars.one_line(self._matcher.get_error())
        self.error = GenerationFailed(f"The answer cannot go on as it was asked for: {why}")


class Constraints:
    """Compiles for one loaded model. Any thread."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self._vocabulary = vocabulary
        self._encode = encode
        self._lock = threading.Lock()
        self._tokenizers: dict[frozenset[int], LLTokenizer] = {}
        self._compilation = lru_cache(MAX_CACHED)(partial(grammars.compilation, vocabulary.end))
        newlines = {b"\n" * n: n for n in range(1, NEWLINES + 1)}
        self._newlines = {
            i: newlines[token] for i, token in enumerate(vocabulary.tokens) if token in newlines
        }
        self._only_end = _with(bytes((len(vocabulary.tokens) + 31) // 32 * 4), vocabulary.end)
        others = (1 << len(vocabulary.tokens)) - 1 ^ int.from_bytes(self._only_end, "little")
        self._any_but_end = others.to_bytes(len(self._only_end), "little")
        # It searches the whole vocabulary, and a model has few sets of markers.
        self._special = lru_cache(MAX_MARKERS)(partial(_special, vocabulary))

    def compile(
        self,
        grammar: Grammar | None,
        calls: Calls | None,
        *,
        reasoning: tuple[str, str] | None,
        thinking: bool,
    ) -> Compiled | None:
        """What keeps an answer to these; None where nothing does. `reasoning` stands between these
        two markers, and the prompt ends in it if `thinking`.

        Raises:
            InvalidRequest: not a grammar or schema, or not one that can be enforced.
            QueueFull: too many others are being compiled.
        """
        calls = calls if calls and calls.tools else None
        if grammar is None and calls is None:
            return None
        markers = (calls.start, calls.end) if calls else ()
        special = self._special((*markers, *(reasoning or ())))
        tokenizer = self._tokenizer(frozenset(special.values()) | self._vocabulary.control)
        in_text = grammar is None and calls is not None and not calls.required
        if calls:
            matcher = self._calls(tokenizer, calls, grammar, special, in_text)
        else:
            assert grammar
            matcher = self._compiled(tokenizer, [grammars.answer(grammar)], grammar.param)
        opening = (i for name, i in special.items() if reasoning and reasoning[0].startswith(name))
        return Compiled(
            vocabulary=self._vocabulary,
            tokenizer=tokenizer,
            newlines=self._newlines,
            matcher=matcher,
            in_text=in_text,
            start=calls.start.encode() if calls else b"",
            end=calls.end.encode() if calls else b"",
            parallel=calls is not None and calls.parallel,
            reasoning=(reasoning[0].encode(), reasoning[1].encode()) if reasoning else None,
            opening=next(opening, None),
            thinking=thinking and reasoning is not None,
            any_but_end=self._any_but_end,
            only_end=self._only_end,
        )

    def _tokenizer(self, special: frozenset[int]) -> LLTokenizer:
        with self._lock:
            if special not in self._tokenizers:
                tokens = _Tokens(self._vocabulary, special, self._encode)
                self._tokenizers[special] = tokens.tokenizer
            return self._tokenizers[special]

    def _calls(
        self,
        tokenizer: LLTokenizer,
        calls: Calls,
        grammar: Grammar | None,
        special: dict[str, int],
        in_text: bool,
    ) -> LLMatcher:
        if len(calls.tools) > grammars.MAX_TOOLS:
            raise grammars.refused(f"more than {grammars.MAX_TOOLS} tools", "tools")
        whole = grammars.answer(grammar) if grammar and not calls.required else None
        main = {"lark_grammar": grammars.calls_lark(calls, special, in_text, bool(whole))}

        def compiled() -> LLMatcher:
            parts = [{"name": f"t{i}", "json_schema": s} for i, s in enumerate(schemas)]
            parts += [whole | {"name": "answer"}] if whole else []
            return self._compiled(tokenizer, [main, *parts], "tools")

        params = [f"tools[{i}].function.parameters" for i in range(len(calls.tools))]
        schemas = [grammars.arguments(tool, p) for tool, p in zip(calls.tools, params, strict=True)]
        try:
            return compiled()
        except InvalidRequest:
            deadline = time.monotonic() + COMPILE_SECONDS
            for i, tool in enumerate(calls.tools):
                if time.monotonic() > deadline:
                    raise
                schemas[i] = self._enforceable(tokenizer, tool, schemas[i], params[i])
            if whole and grammar:
                self._compiled(tokenizer, [whole], grammar.param)
            return compiled()

    def _enforceable(
        self, tokenizer: LLTokenizer, tool: Tool, schema: dict[str, Any], param: str
    ) -> dict[str, Any]:
        """The tool's schema, or of one that is not strict as much as can be enforced."""
        lenient = {"x-guidance": grammars.JSON_OPTIONS | {"lenient": True}}
        for each in (schema, schema | lenient):
            try:
                self._compiled(tokenizer, [{"json_schema": each}], param)
                return each
            except InvalidRequest as error:
                if tool.strict:
                    why = f"tool {tool.name[:64]!r}: {error.message.partition(': ')[2]}"
                    raise grammars.refused(why, param) from None
        return grammars.ANY_OBJECT

    def _compiled(self, tokenizer: LLTokenizer, parts: list[Any], param: str) -> LLMatcher:
        result = self._compilation(tokenizer, json.dumps({"grammars": parts}))()
        if isinstance(result, str):
            raise grammars.refused(result, param)
        return result


class _Tokens:
    """A vocabulary as llguidance wants it (its TokenizerWrapper): 0xFF begins a special token."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        special: frozenset[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = min(vocabulary.end)
        self.special_token_ids = sorted(special)
        self.tokens = [
            # No text has the byte 0xFF, so a token of it is never needed.
            b"\xff" + (token or b"%d" % i) if i in special else b"" if b"\xff" in token else token
            for i, token in enumerate(vocabulary.tokens)
        ]
        self._encode = encode
        self.tokenizer = LLTokenizer(
            self,  # type: ignore[arg-type]  # what its own wrapper has
            eos_token=sorted(vocabulary.end),
            slices=LLTokenizer.json_slices(),
        )

    def __call__(self, text: str) -> list[int]:
        """Tokens of text that must come: the model's own, unless its tokenizer changes the text,
        as SentencePiece's does with a space before it."""
        ids = self._encode(text)
        same = b"".join([self.tokens[i] for i in ids]) == text.encode()
        return ids if same else self.tokenizer.greedy_tokenize(text)


def _special(vocabulary: Vocabulary, markers: tuple[str, ...]) -> dict[str, int]:
    """Tokens that are a marker or a control token in one. Where a marker is text to others, as
    Qwen's `<tool_call>` is, it still must not come up within a string."""
    tokens = vocabulary.tokens
    found = {text: tokens.index(text.encode()) for text in markers if text.encode() in tokens}
    names = {tokens[i].decode("utf-8", "replace"): i for i in vocabulary.control}
    return found | {n: i for n, i in names.items() if n and any(n in text for text in markers)}


def _with(mask: bytes, tokens: Iterable[int]) -> bytes:
    bits = bytearray(mask)
    for token in tokens:
        bits[token >> 3] |= 1 << (token & 7)
    return bytes(bits)
