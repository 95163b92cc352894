from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette

from lmx.__main__ import main
from lmx.config import Config
from lmx.inference import InferenceQueue
from lmx.serve import Server

from . import models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["serve", "extra"], "extra"),
        (["dance"], "dance"),
        (["--port", "many"], "many"),
        (["--port", "70000"], "port"),
        (["--log-level", "loud"], "log_level"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--models-dir", "/no/such/folder"], "/no/such/folder"),
        (["convert", "only-one"], "OUT"),
    ],
    ids=str,
)
def test_bad_arguments_are_exit_code_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One clear message on stderr that names what is wrong."""
    try:
        code: object = main(arguments)
    except SystemExit as exit:  # argparse's way
        code = exit.code
    assert code == 2
    assert message in capfd.readouterr().err


def test_a_bad_config_is_exit_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file and the setting are named."""
    config = tmp_path / "config.yaml"
    config.write_text("prot: 1234\n")
    assert main(["--config", str(config)]) == 2
    error = capfd.readouterr().err
    assert str(config) in error and "prot" in error


def test_a_taken_port_is_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    """The message says which port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    error = capfd.readouterr().err
    assert f"127.0.0.1:{port}" in error and "--port" in error


def test_convert(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`lmx convert` writes a folder and says so; what cannot be converted is exit code 1."""
    source = models.tiny_gguf(tmp_path / "gguf")
    target = tmp_path / "out"
    assert main(["convert", str(source), str(target)]) == 0
    assert str(target) in capfd.readouterr().out
    assert (target / "config.json").exists()
    assert main(["convert", str(tmp_path / "none.gguf"), str(tmp_path / "x")]) == 1
    assert "none.gguf" in capfd.readouterr().err


def test_an_application_that_ends_takes_the_server_with_it() -> None:
    """Should a bug end what lives as long as the application, the server stops, and says failed."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bug)
            yield

    async def bug() -> None:
        while not server.started:
            await anyio.lowlevel.checkpoint()
        raise RuntimeError("a bug")

    config = uvicorn.Config(Starlette(lifespan=lifespan), port=0, lifespan="on", log_config=None)
    server = Server(config, InferenceQueue(Config()), 0)
    server.run()
    assert server.broken


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    """The program introduces itself without loading an engine."""
    for flag, word in (("--help", "convert"), ("--version", "lmx ")):
        with pytest.raises(SystemExit) as exit:
            main([flag])
        assert exit.value.code == 0
        assert word in capfd.readouterr().out


def test_the_server_imports_no_engine() -> None:
    """Start-up time and crashes: MLX, llama.cpp and transformers stay in the runners."""
    code = (
        "import sys, lmx.serve\n"
        "engines = {'mlx', 'mlx_lm', 'transformers', 'tokenizers', 'llama_cpp', 'numpy',"
        " 'huggingface_hub'}\n"
        "sys.exit(' '.join(engines & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
