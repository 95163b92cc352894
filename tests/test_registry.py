from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from lmx.config import Config, EngineSettings
from lmx.errors import LMXError, ModelLoadFailed, ModelNotFound, QueueFull, RunnerDied
from lmx.generation import ChatMessage, SamplingParams
from lmx.inference import InferenceQueue
from lmx.messages import Delta
from lmx.registry import Lease, Registry, find_models, open_registry

from .fake_runner import COMMAND


def put(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")
    return root


def mlx(name: str) -> tuple[str, str]:
    return f"{name}/config.json", f"{name}/model.safetensors"


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (mlx("mlx-community/Qwen2-VL-7B-Instruct-4bit"), ["qwen2-vl-7b-instruct"]),
        (mlx("lmstudio-community/Qwen3.8-27B-MLX-8bit"), ["qwen3.8-27b-mlx"]),
        (mlx("jedisct1/Ornith-1.0-35B-MLX-oQ8"), ["ornith-1.0-35b-mlx-oq8"]),
        (mlx("mlx-community/MiniMax-M3-4bit"), ["minimax-m3"]),
        (
            ["lmstudio-community/X-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"],
            ["meta-llama-3.1-8b-instruct"],
        ),
        (["a/b/SmolLM2-135M-Instruct.Q4_1.gguf"], ["smollm2-135m-instruct"]),
        (["a/b/x-IQ4_XS.gguf", "a/b/mmproj-x-f16.gguf"], ["x"]),
        (["a/b/x-Q8_0-00001-of-00002.gguf", "a/b/x-Q8_0-00002-of-00002.gguf"], ["x"]),
        (["a/b/x-Q4_K_M.gguf", "a/b/x-Q8_0.gguf"], ["x", "x@q8_0"]),
        ([*mlx("p/m-4bit"), *mlx("p/m-8bit")], ["m", "m@8bit"]),
        ([*mlx("p/m-4bit"), "a/m-GGUF/m-Q4_K_M.gguf"], ["m", "m@q4_k_m"]),
        (
            [*mlx("p/m-4bit"), *mlx("q/m-4bit"), *mlx("r/m-4bit")],
            ["m", "m@4bit", "r/m-4bit/m-4bit"],
        ),
    ],
    ids=str,
)
def test_ids_follow_lm_studio(tmp_path: Path, files: list[str], ids: list[str]) -> None:
    """Lower case, no quantization, `-mlx` kept; a clash adds the quantization; MLX comes first."""
    assert sorted(m.id for m in find_models(put(tmp_path, *files))) == sorted(ids)


@pytest.mark.parametrize(
    "files",
    [
        ["a/b/config.json"],
        ["a/b/model.safetensors"],
        ["a/b/readme.md", "a/x.gguf", ".cache/b/x.gguf", "a/.b/x.gguf"],
        ["a/b/downloading_x.gguf.part"],
    ],
    ids=str,
)
def test_what_is_no_model_is_not_listed(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model, a file in the wrong place or a partial download is not offered."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_models(put(tmp_path, *files)) == []


def test_the_embedded_model_stands_in_for_an_empty_folder(tmp_path: Path) -> None:
    """With no models of one's own there is SmolLM2, to be converted to MLX beside the folder."""
    [model] = find_models(tmp_path / "models")
    assert (model.id, model.format) == ("smollm2-135m-instruct", "mlx")
    assert model.convert_from is not None and model.convert_from.suffix == ".gguf"
    assert model.path.parent == tmp_path / "embedded"
    [own] = find_models(put(tmp_path / "models", *mlx("a/own")))
    assert own.id == "own"


@asynccontextmanager
async def registry(root: Path, config: Config | None = None) -> AsyncIterator[Registry]:
    config = config or Config(
        models_dir=str(root), engine=EngineSettings(context_length=100_000_000)
    )
    with anyio.fail_after(60):
        async with open_registry(config, InferenceQueue(config), command=COMMAND) as opened:
            yield opened


async def ask(registry: Registry, lease: Lease, text: str) -> str:
    queue = InferenceQueue(Config())
    message = ChatMessage("user", text)
    async with queue.generate(lease.runner, [message], SamplingParams()) as generation:
        return "".join(
            [e.text async for events in generation for e in events if isinstance(e, Delta)]
        )


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["m", "M", "pub/M-4bit", "PUB/m-4BIT", "M-4bit", "pub/m"])
async def test_names_of_a_model(tmp_path: Path, name: str) -> None:
    """Id, publisher/repo and repo, in any case, are the same model."""
    async with registry(put(tmp_path, *mlx("pub/M-4bit"), *mlx("pub/other"))) as models:
        assert (await models.resolve(name)).id == "m"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name", ["", "m2", "pub", "pub/", "../m", "/etc/passwd", "m\0", "x" * 9999]
)
async def test_an_unknown_name_is_nobodys(tmp_path: Path, name: str) -> None:
    """Never another model's answer; the error lists what there is and stays short."""
    async with registry(put(tmp_path, *mlx("pub/m"))) as models:
        with pytest.raises(ModelNotFound, match=r"Available models: m\.$") as caught:
            await models.resolve(name)
        assert len(caught.value.message) < 400 and caught.value.param == "model"


@pytest.mark.anyio
async def test_a_model_is_loaded_once_for_all(tmp_path: Path) -> None:
    """Twenty first requests at once share one load, and a later one finds it loaded."""
    pids = set()
    async with registry(put(tmp_path, *mlx("p/m"))) as models:
        assert models.status() == []

        async def use() -> None:
            async with models.lease("m") as lease:
                assert await ask(models, lease, "a b") == "a b "
                pids.add(lease.runner.pid)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(use)
        await use()
        assert len(pids) == 1
        [status] = models.status()
        assert (status["id"], status["state"], status["active"]) == ("m", "ready", 0)
    [pid] = pids
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.anyio
async def test_a_request_that_leaves_does_not_stop_the_load(tmp_path: Path) -> None:
    """The load goes on for the others who wait for it."""
    async with registry(put(tmp_path, *mlx("p/m"))) as models:
        async with anyio.create_task_group() as tasks:

            async def impatient() -> None:
                async with models.lease("m"):
                    raise AssertionError("not cancelled")

            tasks.start_soon(impatient)
            while not models.status():
                await anyio.lowlevel.checkpoint()
            assert models.status()[0]["state"] == "loading"
            tasks.cancel_scope.cancel()
        async with models.lease("m") as lease:
            assert await ask(models, lease, "a") == "a "


@pytest.mark.anyio
async def test_a_model_that_does_not_load_fails_its_requests_only(tmp_path: Path) -> None:
    """The reason reaches every request, between the tries too, and another model works."""
    async with registry(put(tmp_path, *mlx("p/broken"), *mlx("p/m"))) as models:
        for _ in range(5):
            with pytest.raises(ModelLoadFailed, match="not weights"):
                async with models.lease("broken"):
                    raise AssertionError("loaded")
        async with models.lease("m") as lease:
            assert await ask(models, lease, "a") == "a "
        assert {s["id"]: s["state"] for s in models.status()} == {"broken": "failed", "m": "ready"}


@pytest.mark.anyio
async def test_a_killed_runner_is_replaced(tmp_path: Path) -> None:
    """The next request after a death loads the model again and answers."""
    async with registry(put(tmp_path, *mlx("p/m"))) as models:
        async with models.lease("m") as lease:
            assert lease.runner.pid is not None
            first = lease.runner.pid
            os.kill(first, signal.SIGKILL)
            await lease.runner.ended.wait()
        async with models.lease("m") as lease:
            assert lease.runner.pid != first
            assert await ask(models, lease, "a") == "a "


@pytest.mark.anyio
async def test_a_model_that_keeps_dying_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """Deaths in a row are answered with 503 and Retry-After instead of endless loading."""
    async with registry(put(tmp_path, *mlx("p/m"))) as models:
        errors: list[LMXError] = []
        for _ in range(3):
            with pytest.raises(RunnerDied) as caught:
                async with models.lease("m") as lease:
                    await ask(models, lease, "KILL")
            errors.append(caught.value)
        assert "signal 9" in errors[0].message and "signal 9" in errors[1].message
        assert "2 times in a row" in errors[2].message and errors[2].retry_after


@pytest.mark.anyio
async def test_leases_are_places_in_the_queue(tmp_path: Path) -> None:
    """Waiting for a load counts as waiting."""
    config = Config(models_dir=str(put(tmp_path, *mlx("p/m"))), queue_size=1)
    async with registry(tmp_path, config) as models, models.lease("m"):
        with pytest.raises(QueueFull):
            async with models.lease("m"):
                raise AssertionError("a second place")
