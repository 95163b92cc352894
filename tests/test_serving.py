"""The program over a real socket, with real models, spoken to by the official client."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError

from . import models
from .serving import Serving, serving

pytestmark = pytest.mark.anyio

QUESTIONS = [
    "Name the largest planet.",
    "What is water made of?",
    "What is Python?",
    "Hello",
]
MLX, GGUF = "smollm2-135m-instruct", "smollm2-135m-instruct@q4_1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """SmolLM2 as MLX and as GGUF, a random tiny model, and one that is broken."""
    home = tmp_path_factory.mktemp("home")
    publisher = home / ".opta-lmx" / "models" / "test"
    publisher.mkdir(parents=True)
    folder = publisher / "SmolLM2-135M-Instruct"
    shutil.copytree(models.smollm2_mlx(), folder, copy_function=os.link)
    (publisher / "SmolLM2-135M-Instruct-GGUF").mkdir()
    shutil.copy(models.smollm2_gguf(), publisher / "SmolLM2-135M-Instruct-GGUF")
    models.tiny_mlx(publisher / "tiny")
    shutil.copytree(publisher / "tiny", publisher / "broken")
    (publisher / "broken" / "model.safetensors").write_bytes(b"no weights")
    with serving(home) as running:
        yield running


@pytest.fixture
async def client(server: Serving) -> AsyncIterator[AsyncOpenAI]:
    async with server.client() as client:
        yield client


async def answer(client: AsyncOpenAI, model: str, question: str, max_tokens: int = 12) -> str:
    completion = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=max_tokens,
    )
    assert completion.usage is not None
    assert 1 <= completion.usage.completion_tokens <= max_tokens
    return completion.choices[0].message.content or ""


async def stream(client: AsyncOpenAI, model: str, question: str, max_tokens: int = 12) -> str:
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    return "".join(c.choices[0].delta.content or "" for c in chunks[:-1])


async def test_the_models_are_listed(client: AsyncOpenAI) -> None:
    """The official client lists and retrieves what lies on disk."""
    listed = {model.id async for model in client.models.list()}
    assert listed == {MLX, GGUF, "tiny"}  # not the broken one
    assert (await client.models.retrieve("test/tiny")).id == "tiny"


@pytest.mark.parametrize("model", [MLX, GGUF])
async def test_sixteen_streams_at_once(client: AsyncOpenAI, model: str) -> None:
    """Each of sixteen simultaneous streams gets the answer that its question gets alone."""
    alone = {q: await answer(client, model, q) for q in QUESTIONS}
    assert "largest planet in our solar system" in alone[QUESTIONS[0]]
    together: list[tuple[str, str]] = []

    async def one(question: str) -> None:
        together.append((question, await stream(client, model, question)))

    async with anyio.create_task_group() as tasks:
        for question in QUESTIONS * 4:
            tasks.start_soon(one, question)
    assert len(together) == 16
    for question, text in together:
        # The beginnings have no near-ties, which the engines may decide either way in a batch.
        assert text[:12] == alone[question][:12]


async def test_mlx_and_gguf_agree(client: AsyncOpenAI) -> None:
    """The same weights in both formats begin their answers alike."""
    for question in QUESTIONS:
        texts = [await answer(client, model, question, 5) for model in (MLX, GGUF)]
        assert texts[0] == texts[1]


async def endless(
    http: httpx2.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """A stream, and the next when it ends: a text that repeats itself is guessed ahead and may be
    at the context's end before a busy machine has done the rest."""
    while True:
        async with http.stream("POST", url, json=body) as response:
            async for piece in response.aiter_raw():
                yield piece


@pytest.mark.parametrize("model", [MLX, GGUF])
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_frees_its_row(
    server: Serving, client: AsyncOpenAI, model: str, streamed: bool
) -> None:
    """Its sequence is gone from the batch while another goes on undisturbed."""
    await answer(client, model, "Hello", 1)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count to one thousand."}],
        "stream": streamed,
        "logit_bias": {"0": -100, "2": -100},
    }
    url, left = f"{server.url}/v1/chat/completions", anyio.Event()
    async with anyio.create_task_group() as tasks, httpx2.AsyncClient(timeout=60) as http:

        async def leave() -> None:
            with anyio.CancelScope() as scope:
                tasks.start_soon(leave_when_two, scope)
                async with http.stream("POST", url, json=body) as response:
                    async for _ in response.aiter_raw():
                        pass
            left.set()

        async def leave_when_two(scope: anyio.CancelScope) -> None:
            while await anyio.to_thread.run_sync(server.active, model) < 2:
                pass
            scope.cancel()

        async with aclosing(endless(http, url, {**body, "stream": True})) as pieces:
            assert b"data:" in await anext(pieces)
            tasks.start_soon(leave)
            while not left.is_set():
                await anext(pieces)
            with anyio.fail_after(20):
                while await anyio.to_thread.run_sync(server.active, model) > 1:
                    await anext(pieces)
            assert b"data:" in await anext(pieces)
    with anyio.fail_after(20):
        while await anyio.to_thread.run_sync(server.active, model):
            pass


@pytest.mark.parametrize("model", [MLX, GGUF])
async def test_a_prompt_beyond_the_context(client: AsyncOpenAI, model: str) -> None:
    """A streaming request too is refused by status, before any header, with both numbers."""
    with pytest.raises(BadRequestError, match=r"8192 tokens.*90\d\d") as caught:
        await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "word " * 9000}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


async def test_an_unknown_model(client: AsyncOpenAI) -> None:
    """404 model_not_found, and the message lists what there is."""
    with pytest.raises(NotFoundError, match=r"tiny") as caught:
        await answer(client, "gpt-5", "Hi")
    assert caught.value.code == "model_not_found"


async def test_a_broken_model_says_which_file(client: AsyncOpenAI) -> None:
    """The load's failure is a 500 that names the file, and other models go on."""
    with pytest.raises(InternalServerError, match=r"broken/model\.safetensors") as caught:
        await answer(client, "broken", "Hi")
    assert caught.value.code == "model_load_failed"
    assert await answer(client, "tiny", "Hi", 3)


async def test_a_killed_runner_fails_its_stream_and_is_replaced(
    server: Serving, client: AsyncOpenAI
) -> None:
    """kill -9 of the model's process: a clear in-band error, and the next request answers."""
    response = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        logit_bias={"0": -100, "2": -100},
        stream=True,
    )
    chunks = aiter(response)
    await anext(chunks)
    [pid] = [m["pid"] for m in server.get("/health").json()["models"] if m["id"] == "tiny"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(APIError, match="signal 9") as caught:
        while True:
            await anext(chunks)
    assert caught.value.code == "runner_died"
    assert await answer(client, "tiny", "Hi", 3)


def ctrl_c_twice(server: Serving) -> int:
    server.process.send_signal(signal.SIGINT)
    while True:  # until it has stopped listening
        try:
            server.get("/health")
        except httpx2.TransportError:
            break
    server.process.send_signal(signal.SIGINT)
    return server.process.wait(60)


@pytest.mark.parametrize(
    ("stop", "grace"),
    [(Serving.stop, 0.5), (ctrl_c_twice, 1000)],
    ids=["SIGTERM", "Ctrl-C twice"],
)
async def test_stopping_under_load_ends_with_0(
    tmp_path: Path, stop: Callable[[Serving], int], grace: float
) -> None:
    """Running streams get a last event within the grace period, and the exit code is 0."""
    models.tiny_mlx(tmp_path / ".opta-lmx" / "models" / "test" / "tiny")
    config = tmp_path / "config.yaml"
    config.write_text(f"shutdown_grace_seconds: {grace}\n")
    with serving(tmp_path, "--config", str(config)) as server:
        ended: list[str] = []

        async def one() -> None:
            with pytest.raises(APIError) as caught:
                async for _ in await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "Hi"}],
                    logit_bias={"0": -100, "2": -100},
                    max_tokens=-1,
                    stream=True,
                ):
                    started.set()
            ended.append(str(caught.value.code))

        async with server.client() as client, anyio.create_task_group() as tasks:
            started = anyio.Event()
            for _ in range(4):
                tasks.start_soon(one)
            await started.wait()
            assert await anyio.to_thread.run_sync(stop, server) == 0
        assert ended == ["server_stopping"] * 4


async def test_the_embedded_model_is_served_without_any_setup(tmp_path: Path) -> None:
    """With no models folder, the first request converts SmolLM2 to MLX, and MLX answers."""
    with serving(tmp_path) as server:
        async with server.client() as client:
            [model] = [model.id async for model in client.models.list()]
            assert "Paris" in await answer(client, model, "What is the capital of France?")
            [status] = server.get("/health").json()["models"]
            assert status["format"] == "mlx"
