"""One answer in the making: from a backend's tokens to what the client is sent. No I/O."""

from __future__ import annotations

import codecs

from .backends import TokenEvent, Vocabulary
from .constraints import Constraint
from .errors import LMXError
from .generation import FinishReason, Part, TokenLogprob
from .output import OutputParser


class Answer:
    """Follows one sequence."""

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        output: OutputParser,
        constraint: Constraint | None = None,
    ) -> None:
        self.index = index
        """Which of its request's answers."""
        self.tokens = 0
        self.reasoning_tokens = 0
        self._vocabulary = vocabulary
        self._output = output
        self._constraint = constraint
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def error(self) -> LMXError | None:
        """Its grammar has failed: there can be no more tokens."""
        return self._constraint.error if self._constraint else None

    def take(self, event: TokenEvent) -> tuple[list[Part], FinishReason | None]:
        """What the token adds, and how the answer ends if it ends here, which it may do although
        the backend goes on."""
        self.tokens += 1
        output = self._output
        reasoning = output.reasoning
        data = self._text(event)
        text = self._utf8.decode(data or b"", final=event.finish is not None)
        parts = output.feed(text, None if data is None else self._logprob(event))
        self.reasoning_tokens += reasoning or output.reasoning
        finish: FinishReason | None = event.finish
        if finish is not None:
            parts += output.finish()
        if output.stopped:
            finish = "stop"
        if finish == "stop" and output.called:
            finish = "tool_calls"
        return parts, finish

    def take_logprobs(self) -> list[TokenLogprob]:
        return self._output.take_logprobs()

    def _text(self, event: TokenEvent) -> bytes | None:
        """None: it is not for the client's eyes."""
        token = event.token
        if event.finish == "stop" or token >= len(self._vocabulary.tokens):
            return None
        text = self._vocabulary.tokens[token]
        if token in self._vocabulary.control and not self._output.shows(text.decode()):
            return None
        return text

    def _logprob(self, event: TokenEvent) -> TokenLogprob | None:
        if event.logprobs is None:
            return None
        known = self._vocabulary.tokens
        top = [(known[id], logprob) for id, logprob in event.logprobs.top if id < len(known)]
        return TokenLogprob(known[event.token], event.logprobs.logprob, top)
