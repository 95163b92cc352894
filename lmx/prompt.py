"""From a request to the sequences that answer it. Worker threads: a long prompt takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from .answer import Answer
from .backends import Backend, Sequence
from .constraints import Calls, Compiled, Constraints
from .dialect import read_dialect
from .errors import ContextLengthExceeded, InvalidRequest
from .generation import Chat, EmbeddingRequest, GenerationRequest, SamplingParams
from .output import OutputParser


class Preparer:
    """Knows how one model wants to be asked. Any thread, several at a time too."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._vocabulary = backend.vocabulary
        self._embeds = backend.dimensions > 0
        self._longest_token = max(map(len, backend.vocabulary.tokens), default=1) or 1
        source = backend.chat_template.source if backend.chat_template else None
        self._dialect = read_dialect(source, backend.vocabulary, backend.tool_parser)
        self._constraints = Constraints(backend.vocabulary, backend.tokenize)

    def sequences(
        self, request: GenerationRequest | EmbeddingRequest, uids: Iterator[int]
    ) -> list[tuple[Sequence, Answer]]:
        """
        Raises:
            InvalidRequest: the model cannot be asked so.
            ContextLengthExceeded: a prompt leaves no room for an answer.
        """
        if isinstance(request, EmbeddingRequest):
            return self._inputs(request, uids)
        self._check_known(request.params.logit_bias, "logit_bias")
        if isinstance(request.prompt, Chat):
            return self._chat(request, request.prompt, uids)
        compiled = self._constraints.compile(request.grammar, None, reasoning=None, thinking=False)
        made: list[tuple[Sequence, Answer]] = []
        for prompt in request.prompt:
            tokens = self._tokens(prompt, "prompt")
            for nth in range(request.n):
                output = OutputParser(request.params.stop)
                params = _seeded(request.params, nth)
                made.append(self._answer(next(uids), len(made), tokens, params, compiled, output))
        return made

    def _chat(
        self, request: GenerationRequest, chat: Chat, uids: Iterator[int]
    ) -> list[tuple[Sequence, Answer]]:
        template, dialect = self._backend.chat_template, self._dialect
        if template is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot chat.", param="messages"
            )
        text = dialect.render(template, chat)
        prompt = self._tokens(text, "messages", raw=False)
        form = dialect.format_for(chat)
        reasoning = dialect.reasoning
        thinking = reasoning is not None and text.rstrip().endswith(reasoning[0])
        calls = None
        if form and form.parse is None:
            tools = [tool for tool in chat.tools if tool.name in chat.callable]
            calls = Calls(form.start, form.end, tools, chat.required, chat.parallel)
        free = reasoning  # what the grammar has no say in
        if dialect.opening:
            free = ("", dialect.opening)
        compiled = self._constraints.compile(
            request.grammar, calls, reasoning=free, thinking=thinking or bool(dialect.opening)
        )
        made: list[tuple[Sequence, Answer]] = []
        for index in range(request.n):
            output = OutputParser(
                request.params.stop,
                reasoning=reasoning,
                thinking=thinking,
                inline=chat.inline_reasoning,
                calls=form,
                parallel=chat.parallel,
                structural=dialect.structural,
            )
            params = _seeded(request.params, index)
            made.append(self._answer(next(uids), index, prompt, params, compiled, output))
        return made

    def _answer(
        self,
        uid: int,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        compiled: Compiled | None,
        output: OutputParser,
    ) -> tuple[Sequence, Answer]:
        room = self._backend.context_length - len(prompt)
        constraint = compiled.new() if compiled else None
        max_tokens = min(params.max_tokens or room, room)
        return (
            Sequence(uid, prompt, max_tokens, params, constraint),
            Answer(index, self._vocabulary, output, constraint),
        )

    def _inputs(
        self, request: EmbeddingRequest, uids: Iterator[int]
    ) -> list[tuple[Sequence, Answer]]:
        params, width = SamplingParams(), self._backend.dimensions
        if request.dimensions and request.dimensions > width:
            raise InvalidRequest(
                f"This model's embeddings have {width} dimensions, not {request.dimensions}.",
                param="dimensions",
            )
        return [
            (
                Sequence(next(uids), self._tokens(text, "input"), 1, params),
                Answer(index, self._vocabulary, OutputParser(())),
            )
            for index, text in enumerate(request.inputs)
        ]

    def _tokens(self, text: str | list[int], param: str, *, raw: bool = True) -> list[int]:
        # An answer needs a token of room; an embedding has none.
        most = self._backend.context_length - (not self._embeds)
        if isinstance(text, str):
            # Encoders have one token for a whole word they do not know, and none for spaces.
            at_least = 0 if self._embeds else len(text) // self._longest_token
            if at_least > most:
                # Known without tokenizing it, which would take seconds for megabytes.
                raise self._too_long(f"at least {at_least}", param)
            tokens = self._backend.tokenize(text, raw=raw)
        else:
            tokens = text
            self._check_known(tokens, param)
        if not tokens:
            raise InvalidRequest("The prompt is empty.", param=param)
        if len(tokens) > most:
            raise self._too_long(str(len(tokens)), param)
        return tokens

    def _too_long(self, tokens: str, param: str) -> ContextLengthExceeded:
        room = "" if self._embeds else " and the answer needs at least one"
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._backend.context_length} tokens, "
            f"but the {'input' if self._embeds else 'prompt'} has {tokens}{room}.",
            param=param,
        )

    def _check_known(self, tokens: Iterable[int], param: str) -> None:
        size = len(self._vocabulary.tokens)
        for token in tokens:
            if not 0 <= token < size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of {size}.", param=param
                )


def _seeded(params: SamplingParams, nth: int) -> SamplingParams:
    """With the same seed, all answers to a prompt would be the same."""
    return params if params.seed is None else replace(params, seed=params.seed + nth)
