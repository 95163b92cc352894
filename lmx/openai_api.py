"""OpenAI's endpoints: models and chat completions. Each handler reads, asks, and shapes an answer.

Nothing here handles errors: `lmx.app` gives every one of them its response.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from . import __version__, catalog, schema
from .endpoint import State, WireResponse
from .errors import GenerationFailed
from .generation import Usage
from .messages import Delta, Finished
from .schema import ChatCompletionRequest, ChoiceDelta, ChunkChoice
from .streaming import DONE, EventStream, encode_event, unless_disconnected


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
    request: Request[State], body: schema.ChatCompletionRequest
) -> Annotated[Response, schema.ChatCompletion]:
    """Answer a conversation; with `stream`, in server-sent events."""
    if body.stream:
        chunks = _chunks(request.state, body, include_usage=body.include_usage)
        return EventStream(_events(chunks))
    chunks = _chunks(request.state, body, include_usage=True)
    return WireResponse(await unless_disconnected(request.receive, partial(_fold, chunks)))


async def _chunks(
    state: State, wanted: ChatCompletionRequest, *, include_usage: bool
) -> AsyncGenerator[list[schema.ChatCompletionChunk]]:
    """The answer in OpenAI's chunks, as many at a time as have come since the last look.

    The first comes with the first event of the model, not when the request is accepted: until then
    a failure still gets an HTTP status, which clients retry.
    """
    messages = wanted.to_messages()
    registry = state["registry"]
    model = await registry.resolve(wanted.model)
    params = wanted.to_sampling(registry.config.sampling_for(model.id))
    async with (
        registry.lease(model, wanted.ttl) as lease,
        state["queue"].generate(lease.runner, messages, params) as generation,
    ):
        engine = lease.runner.loaded.engine if lease.runner.loaded else lease.model.format
        chunk = partial(
            schema.ChatCompletionChunk,
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=lease.model.id,
            system_fingerprint=f"lmx {__version__}, {engine}",
            service_tier=msgspec.UNSET if wanted.service_tier is None else "default",
            usage=None if include_usage else msgspec.UNSET,
        )
        start = ChoiceDelta(role="assistant", content="")
        chunks = [chunk(choices=[ChunkChoice(delta=start)])]
        async for events in generation:
            text = "".join(event.text for event in events if isinstance(event, Delta))
            if text:
                chunks.append(chunk(choices=[ChunkChoice(delta=ChoiceDelta(content=text))]))
            if isinstance(last := events[-1], Finished):
                if last.reason == "cancelled":
                    raise GenerationFailed("The generation was cancelled.")
                end = ChunkChoice(delta=ChoiceDelta(), finish_reason=last.reason)
                chunks.append(chunk(choices=[end]))
                if include_usage:
                    usage = Usage(
                        generation.prompt_tokens, last.completion_tokens, generation.cached_tokens
                    )
                    chunks.append(chunk(choices=[], usage=schema.CompletionUsage.of(usage)))
            if chunks:
                yield chunks
                chunks = []


async def _events(
    chunks: AsyncGenerator[list[schema.ChatCompletionChunk]],
) -> AsyncGenerator[bytes]:
    async with aclosing(chunks):
        async for some in chunks:
            yield b"".join(map(encode_event, some))
    yield DONE


async def _fold(
    chunks: AsyncGenerator[list[schema.ChatCompletionChunk]],
) -> schema.ChatCompletion:
    """The whole answer. Made of the stream's chunks, so that the two cannot differ."""
    text: list[str] = []
    finish_reason = None
    async with aclosing(chunks):
        async for some in chunks:
            for chunk in some:
                for choice in chunk.choices:
                    text.append(choice.delta.content or "")
                    finish_reason = choice.finish_reason
    message = schema.ChatCompletionMessage(content="".join(text))
    return schema.ChatCompletion(
        id=chunk.id,
        created=chunk.created,
        model=chunk.model,
        choices=[schema.Choice(message=message, finish_reason=finish_reason)],
        usage=chunk.usage,
        service_tier=chunk.service_tier,
        system_fingerprint=chunk.system_fingerprint,
    )
