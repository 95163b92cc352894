"""What a model says, in OpenAI's words: each step as pieces of a stream, all pieces as a whole."""

from __future__ import annotations

import math
from collections import defaultdict
from heapq import nlargest
from itertools import chain
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from . import chat_schema as chat
from .completions_schema import Completion, CompletionChoice, CompletionLogprobs
from .generation import Chat, GenerationRequest, Part, TokenLogprob
from .messages import Delta

IMPOSSIBLE: Final = -9999.0
"""OpenAI's logprob of what is out of the question; JSON has no infinity."""


class ChatPieces:
    """A chat's answers: each step as choices of chunks, all of those as choices of the answer."""

    chunk = chat.ChatCompletionChunk
    answer = chat.ChatCompletion
    prefix = "chatcmpl"

    def __init__(self, request: GenerationRequest) -> None:
        may_call = isinstance(request.prompt, Chat) and bool(request.prompt.callable)
        self._n = request.n
        self._logprobs = request.params.logprobs is not None
        self._may_call = may_call
        self._silent = set(range(request.n)) if may_call else set()
        """Answers of which nothing but reasoning has come yet, and whose content is null."""
        self._calls = [-1] * request.n

    def start(self) -> list[chat.ChunkChoice]:
        """In the order of the answers: OpenAI's own client takes the first to come as the first."""
        # A message of calls alone has no content, and a client that has got "" cannot undo it.
        delta = chat.ChoiceDelta(role="assistant", content=None if self._may_call else "")
        # Empty, because the same client counts those twice that come with an answer's first chunk.
        logprobs = chat.ChoiceLogprobs(content=[]) if self._logprobs else None
        return [chat.ChunkChoice(index=i, delta=delta, logprobs=logprobs) for i in range(self._n)]

    def of(self, delta: Delta) -> list[chat.ChunkChoice]:
        choices = []
        content = [_content_logprob(token) for token in delta.logprobs]
        for part in delta.parts:
            logprobs = None
            if content and part.kind == "content":
                logprobs, content = chat.ChoiceLogprobs(content=content), []
            piece = self._piece(part, delta.index)
            choices.append(chat.ChunkChoice(index=delta.index, delta=piece, logprobs=logprobs))
        if content or delta.finish is not None:
            silent = content or delta.index in self._silent
            end = chat.ChunkChoice(
                index=delta.index,
                delta=chat.ChoiceDelta(content="" if silent else UNSET),
                logprobs=chat.ChoiceLogprobs(content=content) if content else None,
                finish_reason=delta.finish,
            )
            choices.append(end)
        return choices

    def _piece(self, part: Part, index: int) -> chat.ChoiceDelta:
        if part.kind == "reasoning":
            return chat.ChoiceDelta(reasoning_content=part.text)
        self._silent.discard(index)
        if part.kind == "content":
            return chat.ChoiceDelta(content=part.text)
        if part.kind == "arguments":
            function = chat.FunctionPiece(arguments=part.text)
            return chat.ChoiceDelta(
                tool_calls=[chat.CalledTool(index=self._calls[index], function=function)]
            )
        self._calls[index] += 1
        function = chat.FunctionPiece(name=part.text, arguments="")
        call = chat.CalledTool(
            index=self._calls[index], id=part.id, type="function", function=function
        )
        return chat.ChoiceDelta(tool_calls=[call])

    def choices(self, answers: list[list[chat.ChunkChoice]]) -> list[chat.Choice]:
        return [_chat_choice(pieces) for pieces in answers]


def _chat_choice(pieces: list[chat.ChunkChoice]) -> chat.Choice:
    content = [p.delta.content for p in pieces if isinstance(p.delta.content, str)]
    reasoning = [p.delta.reasoning_content for p in pieces if p.delta.reasoning_content]
    calls: list[tuple[chat.CalledTool, list[str]]] = []
    for call in chain.from_iterable(p.delta.tool_calls or () for p in pieces):
        if call.id is not UNSET:
            calls.append((call, []))
        calls[-1][1].append(call.function.arguments)
    tool_calls = [
        chat.CalledTool(
            id=call.id,
            type="function",
            function=chat.FunctionPiece(name=call.function.name, arguments="".join(arguments)),
        )
        for call, arguments in calls
    ]
    logprobs = [token for p in pieces if p.logprobs for token in p.logprobs.content]
    return chat.Choice(
        index=pieces[0].index,
        message=chat.ChatCompletionMessage(
            content="".join(content) if content else None,
            reasoning_content="".join(reasoning) or UNSET,
            tool_calls=tool_calls or UNSET,
        ),
        logprobs=chat.ChoiceLogprobs(content=logprobs) if pieces[0].logprobs else None,
        finish_reason=pieces[-1].finish_reason,
    )


def _content_logprob(token: TokenLogprob) -> chat.ContentLogprob:
    drawn, *top = (
        chat.TopLogprob(token=token_text(text), logprob=_finite(logprob), bytes=list(text))
        for text, logprob in ((token.token, token.logprob), *token.top)
    )
    return chat.ContentLogprob(
        token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top
    )


def token_text(token: bytes) -> str:
    r"""As OpenAI writes it: what is no whole character, as in `bytes:\xe2\x82`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + token.decode(errors="backslashreplace")


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


class TextPieces:
    """A completion's answers. Of `each` to a prompt, the client gets the likeliest `n`."""

    chunk = Completion
    answer = Completion
    prefix = "cmpl"

    def __init__(self, *, n: int, each: int, logprobs: bool) -> None:
        self._n = n
        self._each = each
        self._with_logprobs = logprobs
        self._offsets: dict[int, int] = defaultdict(int)

    def start(self) -> list[CompletionChoice]:
        return []

    def of(self, delta: Delta) -> list[CompletionChoice]:
        choices = []
        text = "".join(part.text for part in delta.parts)
        if text or delta.logprobs:
            logprobs = self._logprobs(delta) if delta.logprobs else None
            choices.append(CompletionChoice(text=text, index=delta.index, logprobs=logprobs))
        if delta.finish is not None:
            end = CompletionChoice(text="", index=delta.index, finish_reason=delta.finish)
            choices.append(end)
        return choices

    def _logprobs(self, delta: Delta) -> CompletionLogprobs:
        offsets = []
        for token in delta.logprobs:
            offsets.append(self._offsets[delta.index])
            # Characters that begin in it: the other bytes of UTF-8 are 10......
            self._offsets[delta.index] += sum(byte & 0xC0 != 0x80 for byte in token.token)
        tops = [[*token.top, (token.token, token.logprob)] for token in delta.logprobs]
        return CompletionLogprobs(
            tokens=[token_text(token.token) for token in delta.logprobs],
            token_logprobs=[_finite(token.logprob) for token in delta.logprobs],
            top_logprobs=[{token_text(text): _finite(p) for text, p in top} for top in tops],
            text_offset=offsets,
        )

    def choices(self, answers: list[list[CompletionChoice]]) -> list[CompletionChoice]:
        choices = [_text_choice(pieces) for pieces in answers]
        if self._each > self._n:
            choices = [
                choice
                for i in range(0, len(choices), self._each)
                for choice in nlargest(self._n, choices[i : i + self._each], _mean_logprob)
            ]
        return [
            replace(choice, index=i, logprobs=choice.logprobs if self._with_logprobs else None)
            for i, choice in enumerate(choices)
        ]


def _text_choice(pieces: list[CompletionChoice]) -> CompletionChoice:
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return CompletionChoice(
        text="".join(piece.text for piece in pieces),
        index=pieces[0].index,
        logprobs=CompletionLogprobs(
            tokens=[token for some in logprobs for token in some.tokens],
            token_logprobs=[p for some in logprobs for p in some.token_logprobs],
            top_logprobs=[top for some in logprobs for top in some.top_logprobs],
            text_offset=[offset for some in logprobs for offset in some.text_offset],
        ),
        finish_reason=pieces[-1].finish_reason,
    )


def _mean_logprob(choice: CompletionChoice) -> float:
    logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
