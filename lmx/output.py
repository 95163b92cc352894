"""What a model writes, on its way to the client: text in, `Part`s out. No engine, no I/O.

The runner keeps one parser per answer. Text goes out as soon as no marker and no stop string can
begin in it, so how the text was cut into pieces never shows in the result.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from .generation import Part, TokenLogprob
from .tool_calls import CallBlock, CallFormat

WHITESPACE: Final = " \t\r\n"
MAX_GAP_CHARS: Final = 64
"""Whitespace that is held back because a marker may follow; a marker behind more keeps the rest."""

_ANY = re.compile("")


class OutputParser:
    """Tells reasoning, content and tool calls apart, and ends the answer before a stop string.

    Of several stop strings and markers the one that begins first counts. Reasoning opens only where
    the answer or, behind a structural marker, a message begins; calls begin only in content.
    """

    def __init__(
        self,
        stop: tuple[str, ...],
        *,
        reasoning: tuple[str, str] | None = None,
        thinking: bool = False,
        inline: bool = False,
        calls: CallFormat | None = None,
        parallel: bool = True,
        structural: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            reasoning: the markers around it.
            thinking: the prompt ends behind the opening marker.
            inline: leave reasoning in the content, markers included.
            parallel: False: the answer ends with the first call.
            structural: markers that say nothing by themselves and are left out.
        """
        stop = tuple(s for s in stop if s)  # an empty one would be found everywhere
        self._open, self._close = reasoning or ("", "")
        self._inline = inline
        self._calls = calls
        self._parallel = parallel
        marks = (*structural, *((calls.start,) if calls else ()))
        self._names = "\0".join([*marks, self._open, self._close, calls.end if calls else ""])
        self._content_needles = _Needles(stop), _Needles(marks)
        closing = (self._close,) if reasoning else ()
        self._reasoning_needles = _Needles(stop if inline else ()), _Needles(closing)

        self._held = ""
        """Fed but neither gone out nor dropped."""
        self._literal = 0
        """So much of it, from its start, holds no markers."""
        self._fed = 0
        """Characters so far."""
        self._tokens: deque[tuple[int, TokenLogprob]] = deque()
        """Those whose text is held, and where in all text fed it starts."""
        self._released: list[TokenLogprob] = []
        self._block: CallBlock | None = None
        self.stopped = False
        """Nothing follows, and generation may end: a stop string was found, or the one allowed call
        is complete."""
        self.called = False
        """A whole call came out."""
        self.reasoning = False
        """It is reasoning now."""
        self._step: Callable[[list[Part], bool], bool]
        """Deals with the held text as far as it can; True: another step has more to do."""
        self._suspect: Callable[[str], object]
        """Whether the step must see this text; other text just goes out."""
        if reasoning and thinking:
            self._enter_reasoning()
        else:
            self._enter_message()

    def shows(self, name: str) -> bool:
        """Whether the control token of this name is text now."""
        return self._block is not None or name in self._names

    def feed(self, text: str, logprob: TokenLogprob | None = None) -> list[Part]:
        """What may go out now. `text` is empty for a token that ends within a character."""
        if self.stopped:
            return []
        if logprob is not None:
            self._tokens.append((self._fed, logprob))
        self._fed += len(text)
        if not self._held and text and self._suspect(text) is None:
            if self._tokens:
                self._settle(self._kind == "content")
            return [Part(self._kind, text)]
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        """What is still held back, at the end of generation: what had only begun stays text."""
        return [] if self.stopped else self._run(final=True)

    def take_logprobs(self) -> list[TokenLogprob]:
        """Of tokens whose text has all gone out as content since the last look."""
        taken, self._released = self._released, []
        return taken

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._step(parts, final):
            pass
        return parts

    # The steps.

    def _start(self, parts: list[Part], final: bool) -> bool:
        """Where reasoning may open."""
        text = self._held.lstrip(WHITESPACE)
        gap = len(self._held) - len(text)
        if gap <= MAX_GAP_CHARS and text.startswith(self._open):
            if self._inline:
                self._literal = gap + len(self._open)
            else:
                self._drop(gap + len(self._open))
            self._enter_reasoning()
        elif gap <= MAX_GAP_CHARS and self._open.startswith(text) and not final:
            return False
        else:
            self._enter_content()
        return True

    def _gap(self, parts: list[Part], final: bool) -> bool:
        """In whitespace that is dropped: behind reasoning's markers or a call."""
        self._drop(len(self._held) - len(self._held.lstrip(WHITESPACE)))
        if not self._held:
            return False
        if self.reasoning:
            self._enter(self._text, "reasoning", _suspicious(*self._reasoning_needles, gap=True))
        else:
            self._enter_content()
        return True

    def _text(self, parts: list[Part], final: bool) -> bool:
        """In content or reasoning, up to a stop string or a marker."""
        held = self._held
        stops, marks = self._reasoning_needles if self.reasoning else self._content_needles
        stop, mark = stops.search(held, 0), marks.search(held, self._literal)
        found = min(filter(None, (stop, mark)), key=re.Match.span, default=None)
        begun = len(held)
        if not final:
            begun = min(stops.begun(held, 0), marks.begun(held, self._literal))
        if found is None or begun < found.start():
            self._emit(parts, begun if final else self._before_gap(begun))
            return False
        if found is mark:
            self._pass(parts, found[0], *found.span())
            return True
        self._emit(parts, found.start())
        self._stop()
        return False

    def _pass(self, parts: list[Part], mark: str, start: int, end: int) -> None:
        """A marker in the held text."""
        if self.reasoning and self._inline:
            self._literal = end
            self.reasoning = False
            self._enter_content()
        elif self.reasoning:
            start = self._before_gap(start)
            self._emit(parts, start)
            self._drop(end - start)
            self.reasoning = False
            self._enter(self._gap)
        elif self._calls and mark == self._calls.start:
            start = self._before_gap(start)
            self._emit(parts, start)
            opening, self._held = self._held[: end - start], self._held[end - start :]
            self._block = CallBlock(self._calls, opening, parallel=self._parallel)
            self._enter(self._call)
        else:
            self._emit(parts, start)
            self._drop(end - start)
            self._enter_message()

    def _call(self, parts: list[Part], final: bool) -> bool:
        block = self._block
        assert block is not None
        parts += block.feed(self._held)
        self._held = ""
        if final and not block.ended:
            parts += block.finish()
        if not block.ended:
            return False
        self._block = None
        self.called = self.called or block.called
        if block.called and not self._parallel:
            self._stop()
            return False
        self._held, self._literal = block.refused + block.rest, len(block.refused)
        self._drop(0)
        if block.refused:
            self._enter_content()
        else:
            self._enter(self._gap)
        return True

    # What the steps are made of.

    def _enter(
        self,
        step: Callable[[list[Part], bool], bool],
        kind: Literal["content", "reasoning"] = "content",
        suspect: re.Pattern[str] = _ANY,
    ) -> None:
        self._step, self._kind, self._suspect = step, kind, suspect.search

    def _enter_message(self) -> None:
        if self._open:
            self._enter(self._start)
        else:
            self._enter_content()

    def _enter_content(self) -> None:
        suspect = _suspicious(*self._content_needles, gap=self._calls is not None)
        self._enter(self._text, "content", suspect)

    def _enter_reasoning(self) -> None:
        self.reasoning = True
        if self._inline:
            self._enter(self._text, "content", _suspicious(*self._reasoning_needles, gap=False))
        else:
            self._enter(self._gap)

    def _before_gap(self, at: int) -> int:
        """Where the whitespace before `at` begins, if it is dropped when a marker follows there."""
        if self._kind == "content" and (self.reasoning or self._calls is None):
            return at
        bare = len(self._held[:at].rstrip(WHITESPACE))
        return max(bare, at - MAX_GAP_CHARS, min(at, self._literal))

    def _emit(self, parts: list[Part], length: int) -> None:
        if length:
            parts.append(Part(self._kind, self._held[:length]))
            self._advance(length, released=self._kind == "content")

    def _drop(self, length: int) -> None:
        self._advance(length, released=False)

    def _advance(self, length: int, *, released: bool) -> None:
        self._held = self._held[length:]
        self._literal = max(0, self._literal - length)
        self._settle(released)

    def _settle(self, released: bool) -> None:
        """Done with all text before what is held. A token that goes on there has to wait: it may
        show a part of a stop string."""
        at = self._fed - len(self._held)
        while self._tokens and self._tokens[0][0] < at:
            end = self._tokens[1][0] if len(self._tokens) > 1 else self._fed
            if end > at:
                return
            _, token = self._tokens.popleft()
            if released:
                self._released.append(token)

    def _stop(self) -> None:
        self.stopped = True
        self._held = ""
        self._tokens.clear()


class _Needles:
    """Strings to look for in text that comes in pieces."""

    def __init__(self, needles: tuple[str, ...]) -> None:
        self._needles = needles
        # Of two that begin at the same place the shorter one is whole first.
        ordered = sorted(needles, key=len)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) if needles else "(?!)")
        self.firsts = {needle[0] for needle in needles}

    def search(self, text: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def begun(self, text: str, start: int) -> int:
        """Where the longest unfinished one begins; the text's length if none has."""
        first = len(text)
        for needle in self._needles:
            at = text.find(needle[0], max(start, len(text) - len(needle) + 1))
            while 0 <= at < first and not needle.startswith(text[at:]):
                at = text.find(needle[0], at + 1)
            if at >= 0:
                first = min(first, at)
        return first


def _suspicious(*needles: _Needles, gap: bool) -> re.Pattern[str]:
    """What text holds in which a needle begins or, with `gap`, which ends in whitespace."""
    firsts = sorted(set().union(*(n.firsts for n in needles)))
    patterns = [rf"[{WHITESPACE}]\Z"] if gap else []
    if firsts:
        patterns.append(f"[{''.join(map(re.escape, firsts))}]")
    return re.compile("|".join(patterns) or "(?!)")
