"""OpenAI's endpoints: models and chat completions. Each handler reads, asks, and shapes an answer.

Nothing here handles errors: `lmx.app` gives every one of them its response.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypedDict

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import __version__, registry, schema
from .config import Config
from .errors import GenerationFailed
from .generation import Usage
from .inference import InferenceQueue
from .messages import Delta, Finished
from .schema import ChatCompletionRequest, ChoiceDelta, ChunkChoice
from .streaming import DONE, EventStream, encode_event, unless_disconnected

BODY_SECONDS: Final = 30.0
"""A request's body must have arrived by then; uvicorn would wait for ever."""


class State(TypedDict):
    """What lives as long as the server; `request.state` in every handler."""

    config: Config
    registry: registry.Registry
    queue: InferenceQueue


class WireResponse(JSONResponse):
    """JSON of wire dataclasses."""

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


async def health(request: Request[State]) -> Response:
    state = request.state
    return WireResponse(
        {
            "status": "ok",
            "version": __version__,
            "models": state["registry"].status(),
            "queue": {
                "outstanding": state["queue"].outstanding,
                "size": state["config"].queue_size,
            },
        }
    )


async def list_models(request: Request[State]) -> Response:
    models = await request.state["registry"].models()
    return WireResponse(schema.ModelList(data=[_model(model) for model in models]))


async def retrieve_model(request: Request[State]) -> Response:
    model = await request.state["registry"].resolve(request.path_params["id"])
    return WireResponse(_model(model))


def _model(model: registry.Model) -> schema.Model:
    return schema.Model(id=model.id, created=model.created, owned_by=model.publisher)


async def chat_completions(request: Request[State]) -> Response:
    wanted = schema.decode_chat_completion_request(await read_body(request))
    if wanted.stream:
        chunks = _chunks(request.state, wanted, include_usage=wanted.include_usage)
        return EventStream(_events(chunks))
    chunks = _chunks(request.state, wanted, include_usage=True)
    return WireResponse(await unless_disconnected(request.receive, partial(_fold, chunks)))


async def read_body(request: Request[State]) -> bytes:
    """The body, within the limits of time and size.

    Starlette's own `max_body_size` answers in plain text, so the size is counted here.

    Raises:
        HTTPException: 408, 413 or 415.
        ClientDisconnect: the client left before it had sent everything.
    """
    limit = request.state["config"].max_body_bytes
    # The rest of a refused body is still on its way: the connection is of no more use.
    close = {"Connection": "close"}
    too_large = HTTPException(413, f"The request body is larger than {limit} bytes.", close)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        # Decompressing would undo the limit.
        raise HTTPException(
            415, "Content-Encoding is not supported: send the body as it is.", close
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for data in request.stream():
                body += data
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        late = f"The request body did not arrive within {BODY_SECONDS:.0f} s."
        raise HTTPException(408, late, close) from None
    return bytes(body)


async def _chunks(
    state: State, wanted: ChatCompletionRequest, *, include_usage: bool
) -> AsyncGenerator[list[schema.ChatCompletionChunk]]:
    """The answer in OpenAI's chunks, as many at a time as have come since the last look.

    The first comes with the first event of the model, not when the request is accepted: until then
    a failure still gets an HTTP status, which clients retry.
    """
    messages = wanted.to_messages()
    params = wanted.to_sampling(state["config"].sampling)
    async with (
        state["registry"].lease(wanted.model) as lease,
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
