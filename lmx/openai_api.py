"""OpenAI's endpoints. Each handler reads, asks, and shapes an answer.

Nothing here handles errors: `lmx.app` gives every one of them its response.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import anyio
import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from . import __version__, catalog, schema
from .chat_schema import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from .completions_schema import (
    Completion,
    CompletionRequest,
    Embedding,
    EmbeddingList,
    EmbeddingsRequest,
    EmbeddingUsage,
)
from .endpoint import State, WireResponse
from .errors import GenerationFailed, InvalidRequest, UnsupportedParameter
from .generation import EmbeddingRequest, GenerationRequest, Usage
from .messages import Delta, Embedded, Finished
from .openai_answers import ChatPieces, TextPieces
from .registry import Lease, Registry
from .runner_process import Generation, GenerationEvent
from .streaming import DONE, EventStream, encode_event, encode_json, unless_disconnected

Chunk = ChatCompletionChunk | Completion
Look = tuple[Chunk, list[Any]]
"""What a chunk has beside choices, and the choices that go out now, one in each chunk; without any
it is the last one, with the usage."""
T = TypeVar("T")


async def health(request: Request[State]) -> dict[str, Any]:
    """Whether the server works."""
    registry, queue = request.state["registry"], request.state["queue"]
    return {
        "status": "ok",
        "version": __version__,
        "models": [
            {
                "id": slot.model.id,
                "format": slot.using.format,
                "state": slot.state,
                "active": slot.runner.active if slot.runner else 0,
                "pid": slot.runner.pid if slot.runner else None,
            }
            for slot in registry.slots.values()
        ],
        "queue": {"outstanding": queue.outstanding, "size": queue.size},
    }


async def list_models(request: Request[State]) -> schema.ModelList:
    """The models that can be used."""
    models = await request.state["registry"].models()
    return schema.ModelList(data=[_model(model) for model in models if model.usable])


async def retrieve_model(request: Request[State]) -> schema.Model:
    """One model."""
    return _model(await request.state["registry"].resolve(request.path_params["id"]))


def _model(model: catalog.Model) -> schema.Model:
    return schema.Model(id=model.id, created=model.created, owned_by=model.publisher)


async def chat_completions(
    request: Request[State], body: ChatCompletionRequest
) -> Annotated[Response, ChatCompletion]:
    """Answer a conversation; with `stream`, in server-sent events."""
    return await _answer(request, body)


async def completions(
    request: Request[State], body: CompletionRequest
) -> Annotated[Response, Completion]:
    """Go on with a text; with `stream`, in server-sent events."""
    return await _answer(request, body)


async def _answer(
    request: Request[State], body: ChatCompletionRequest | CompletionRequest
) -> Response:
    model = await _resolve(request, body.model, "chat")
    if body.draft_model is not None:
        await _check_draft(request.state["registry"], model, body.draft_model)
    wanted = body.to_request(request.state["registry"].config.sampling_for(model.id))
    if isinstance(body, ChatCompletionRequest):
        pieces: ChatPieces | TextPieces = ChatPieces(wanted)
    else:
        pieces = TextPieces(n=body.answers, each=wanted.n, logprobs=body.logprobs is not None)
    looks = partial(_looks, request.state, body, model, wanted, pieces)
    if body.stream:
        stream: EventStream
        stream = EventStream(looks(_Encoder(), lambda piece: stream.write_now(piece)), last=DONE)
        return stream
    fold = partial(_fold, looks(lambda *look: look), pieces)
    return WireResponse(await unless_disconnected(request.receive, fold))


async def _resolve(
    request: Request[State], name: str, kind: Literal["chat", "embedding"]
) -> catalog.Model:
    """
    Raises:
        InvalidRequest: it is of the other kind, which is told before it is loaded.
    """
    model = await request.state["registry"].resolve(name)
    if model.kind != kind:
        does = "makes embeddings and no text" if kind == "chat" else "makes text and no embeddings"
        raise InvalidRequest(f"The model '{model.id}' {does}.", param="model")
    request.state["record"].model = model.id
    return model


async def _check_draft(registry: Registry, model: catalog.Model, name: str) -> None:
    """
    Raises:
        UnsupportedParameter: not this one guesses for the model.
    """
    asked = await registry.resolve(name, "draft_model")
    configured = registry.config.engine_for(model.id).draft_model
    if configured is None or await registry.resolve(configured, "draft_model") != asked:
        raise UnsupportedParameter(
            f"The draft model of '{model.id}' is {configured or 'none'}, and no request can change "
            f"that: set 'draft_model' under models.{model.id}.engine in the configuration.",
            param="draft_model",
        )


async def _looks(
    state: State,
    body: schema.SampledRequest,
    model: catalog.Model,
    wanted: GenerationRequest,
    pieces: ChatPieces | TextPieces,
    shaped: Callable[[Chunk, list[Any]], T],
    write_now: Callable[[Callable[[], T]], bool] = lambda _: False,
) -> AsyncGenerator[T]:
    """The answers in OpenAI's pieces, as many at a time as have come since the last look; but what
    `write_now` has taken.

    The first ones come with the first event of the model, not when the request is accepted: until
    then a failure still gets an HTTP status, which clients retry.
    """
    include_usage = body.include_usage or not body.stream
    async with _generating(state, body.ttl, model, wanted) as (lease, generation):
        engine = lease.runner.loaded.engine if lease.runner.loaded else lease.model.format
        new: Callable[..., Chunk] = pieces.chunk
        chunk = new(
            id=f"{pieces.prefix}-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=lease.model.id,
            system_fingerprint=f"lmx {__version__}, {engine}",
            service_tier=_tier(body.service_tier),
            usage=None if include_usage else msgspec.UNSET,
            choices=[],
        )
        choices: list[Any] = [*pieces.start()]

        def of(events: list[GenerationEvent]) -> list[Any]:
            return [c for delta in events if isinstance(delta, Delta) for c in pieces.of(delta)]

        def hand_over(events: list[GenerationEvent]) -> bool:
            """All but the end, which may be an error."""
            only_text = all(isinstance(event, Delta) for event in events)
            return only_text and write_now(lambda: shaped(chunk, of(events)))

        async for events in generation:
            last = _finished(events)
            choices += of(events)
            if choices:
                yield shaped(chunk, choices)
                choices = []
            generation.hand_over = hand_over
            if last is not None and include_usage:
                usage = Usage(
                    generation.prompt_tokens,
                    last.completion_tokens,
                    last.cached_tokens,
                    last.reasoning_tokens,
                    last.drafted_tokens,
                    last.accepted_tokens,
                )
                draft = state["registry"].config.engine_for(model.id).draft_model
                stats = schema.Stats.of(usage, draft)
                used = schema.CompletionUsage.of(usage)
                yield shaped(replace(chunk, usage=used, stats=stats), [])


@asynccontextmanager
async def _generating(
    state: State,
    ttl: float | None,
    model: catalog.Model,
    wanted: GenerationRequest | EmbeddingRequest,
) -> AsyncIterator[tuple[Lease, Generation]]:
    """The model at work; how it goes is on the request's record, in a stream too."""
    try:
        async with (
            state["registry"].lease(model, ttl) as lease,
            state["queue"].generate(lease.runner, wanted) as generation,
        ):
            state["record"].generation = generation
            yield lease, generation
    except Exception as error:
        state["record"].fail(error)
        raise


def _tier(asked: str | None) -> str | msgspec.UnsetType:
    if asked is None:
        return msgspec.UNSET
    return "default" if asked == "auto" else asked


def _finished(events: list[GenerationEvent]) -> Finished | None:
    """
    Raises:
        GenerationFailed: it was cancelled, so that the answer is no whole one.
    """
    last = events[-1]
    if not isinstance(last, Finished):
        return None
    if last.cancelled:
        raise GenerationFailed("The generation was cancelled.")
    return last


class _Encoder:
    """An event for each piece. What is the same in all is encoded once."""

    def __init__(self) -> None:
        self._before = self._after = b""

    def __call__(self, chunk: Chunk, choices: list[Any]) -> bytes:
        if not choices:
            return encode_event(chunk) if chunk.usage else b""
        if not self._before:
            # No string can hold this: its quotes would have backslashes.
            before, empty, after = encode_event(chunk).partition(b'"choices":[]')
            self._before, self._after = before + empty[:-1], empty[-1:] + after
        return b"".join([self._before + encode_json(c) + self._after for c in choices])


async def _fold(looks: AsyncGenerator[Look], pieces: ChatPieces | TextPieces) -> schema.Answer:
    """The whole answer. Made of the stream's pieces, so that the two cannot differ."""
    answers: dict[int, list[Any]] = defaultdict(list)
    async with aclosing(looks):
        async for look in looks:
            for choice in look[1]:
                answers[choice.index].append(choice)
    chunk, _ = look
    fields = {name: getattr(chunk, name) for name in schema.Answer.__struct_fields__}
    del fields["object"]
    fields["choices"] = pieces.choices([answers[i] for i in sorted(answers)])
    answer: Callable[..., schema.Answer] = pieces.answer
    return answer(**fields)


async def embeddings(
    request: Request[State], body: EmbeddingsRequest
) -> Annotated[Response, EmbeddingList]:
    """Turn texts into vectors."""
    model = await _resolve(request, body.model, "embedding")
    embed = partial(_embed, request.state, body, model, body.to_request())
    vectors, prompt_tokens = await unless_disconnected(request.receive, embed)
    answer = partial(_embedding_list, vectors, body.encoding_format == "base64", model.id)
    return await anyio.to_thread.run_sync(answer, prompt_tokens)


async def _embed(
    state: State, body: EmbeddingsRequest, model: catalog.Model, wanted: EmbeddingRequest
) -> tuple[list[bytes], int]:
    """The inputs' vectors and number of tokens."""
    vectors = [b""] * len(wanted.inputs)
    async with _generating(state, body.ttl, model, wanted) as (_, generation):
        async for events in generation:
            _finished(events)
            for event in events:
                if isinstance(event, Embedded):
                    vectors[event.index] = event.vector
        return vectors, generation.prompt_tokens


def _embedding_list(vectors: list[bytes], base64: bool, model: str, tokens: int) -> Response:
    """Takes a second for thousands of vectors: not for the event loop."""
    data = [
        Embedding(index=i, embedding=vector if base64 else array("f", vector).tolist())
        for i, vector in enumerate(vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return WireResponse(EmbeddingList(data=data, model=model, usage=usage))
