"""The program and its models, as an operator sees them: download, memory, load and unload."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from . import soak
from .fake_hub import Fault, fake_hub
from .models import smollm2_gguf, smollm2_mlx
from .serving import TIMEOUT, Serving, serving

MB = 2**20
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
ID = "smollm2-135m-instruct"


def chat(server: Serving, model: str, **fields: Any) -> httpx2.Response:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=TIMEOUT)


def progress(server: Serving, id: str) -> Iterator[dict[str, Any]]:
    """What a download's event stream says, to its end."""
    url = f"{server.url}/admin/downloads/{id}/events"
    with httpx2.stream("GET", url, timeout=TIMEOUT) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_download_killed_resumed_verified_loaded(tmp_path: Path) -> None:
    """The real model comes over HTTP; a kill -9 in the middle costs nothing, and then it chats."""
    name = smollm2_gguf().name
    whole = smollm2_gguf().read_bytes()
    with fake_hub({REPO: {name: whole, "config.json": b"{}"}}) as hub:
        hub.misbehave(f"{REPO}/{name}", [Fault(stall=48 * MB)])
        environment = {"HF_ENDPOINT": hub.endpoint}
        with serving(tmp_path, environment=environment, killed=True) as server:
            job = server.post("/admin/model/download", {"model": REPO})
            again = server.post("/admin/model/download", {"model": REPO})
            assert job["state"] == "downloading" and again["id"] == job["id"]
            assert hub.stalled.wait(TIMEOUT)
            for status in progress(server, job["id"]):
                if status["downloaded_bytes"] > 44 * MB:
                    break
            listed = server.get("/admin/models").json()
            assert [m["id"] for m in listed["models"] if m["state"] == "downloading"] == [REPO]
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(TIMEOUT)
        hub.released.set()
        with serving(tmp_path, environment=environment) as server:
            *_, last = progress(server, job["id"])
            assert (last["state"], last["downloaded_bytes"]) == ("completed", last["total_bytes"])
            _, second = hub.fetched(f"{REPO}/{name}")
            assert second.range is not None and second.sent is not None
            kept = int(second.range.removeprefix("bytes=").removesuffix("-"))
            assert kept > 40 * MB and kept + second.sent == len(whole)
            verified = server.post("/admin/model/verify", {"model": ID})
            assert verified["verified"] and verified["files"] == len(last["files"])
            assert chat(server, ID).json()["choices"][0]["message"]["content"]
            file = tmp_path / ".opta-lmx" / "models" / REPO / name
            assert server.post("/admin/model/delete", {"model": ID})["deleted"]
            assert not file.parent.exists()
            assert chat(server, REPO).status_code == 404


def test_one_flipped_byte(tmp_path: Path) -> None:
    """From the hub: refused, nothing to load. On the disk, later: found before the next load."""
    name = smollm2_gguf().name
    path = f"{REPO}/{name}"
    with fake_hub({REPO: {name: smollm2_gguf().read_bytes()}}) as hub:
        hub.misbehave(path, [Fault(flip=70 * MB)])
        with serving(tmp_path, environment={"HF_ENDPOINT": hub.endpoint}) as server:
            job = server.post("/admin/model/download", {"model": REPO})
            *_, last = progress(server, job["id"])
            assert last["state"] == "failed" and name in last["error"]
            assert server.get("/v1/models").json()["data"][0]["id"] == ID  # the embedded one
            models = server.get("/admin/models").json()["models"]
            assert [model["repo"] for model in models] == ["SmolLM2-135M-Instruct"]
            server.post("/admin/model/download", {"model": REPO})
            *_, last = progress(server, job["id"])
            assert last["state"] == "completed"
            assert chat(server, REPO).status_code == 200
            server.post("/admin/model/unload", {"model": REPO})

            file = tmp_path / ".opta-lmx" / "models" / path
            with file.open("r+b") as stream:
                stream.seek(80 * MB)
                byte = stream.read(1)[0]
                stream.seek(80 * MB)
                stream.write(bytes([byte ^ 1]))
            answer = chat(server, REPO)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_corrupt")
            assert name in answer.json()["error"]["message"]
            faults = server.post("/admin/model/verify", {"model": REPO})["faults"]
            assert [fault["path"] for fault in faults] == [name]


@pytest.mark.parametrize("format", ["mlx", "gguf"])
def test_the_estimate_is_close(tmp_path: Path, format: str) -> None:
    """Within 15 % of what the process really takes: after the load, and with a full KV cache."""
    soak.put_models(tmp_path, format)
    with serving(tmp_path, "--config", str(soak.write_config(tmp_path))) as server:
        loaded = server.post("/admin/model/load", {"model": "one"})["loaded"]
        resident = psutil.Process(loaded["pid"]).memory_info().rss
        expected = loaded["memory"]["estimated_loaded"]
        assert expected == pytest.approx(resident, rel=0.15)
        chat(server, "one", max_tokens=None, messages=[{"role": "user", "content": "one " * 990}])
        resident = psutil.Process(loaded["pid"]).memory_info().rss
        assert loaded["memory"]["reserved"] == pytest.approx(resident, rel=0.15)


def test_three_models_where_one_and_a_half_fit(tmp_path: Path) -> None:
    """Eight clients use them in turn: no error, none unloaded in use, never above the limit."""
    print(soak.soak(tmp_path, "gguf", requests=6))  # noqa: T201


def test_load_and_unload_ten_times(tmp_path: Path) -> None:
    """The runner's memory is all gone each time, and the server's own does not grow."""
    soak.put_models(tmp_path, "gguf")
    with serving(tmp_path, "--config", str(soak.write_config(tmp_path))) as server:
        sizes = []
        for _ in range(10):
            pid = server.post("/admin/model/load", {"model": "one"})["loaded"]["pid"]
            chat(server, "one", max_tokens=2)
            server.post("/admin/model/unload", {"model": "one"})
            assert not psutil.pid_exists(pid)
            taken, own, processes = soak.memory(server)
            assert (taken, processes) == (0, 0)
            sizes.append(own)
        assert max(sizes) - sizes[0] < 5 * MB, [size // 1024 for size in sizes]


def test_gguf_takes_over(tmp_path: Path) -> None:
    """An MLX folder whose architecture nobody knows, and the same model as GGUF: it answers."""
    publisher = tmp_path / ".opta-lmx" / "models" / "test"
    shutil.copytree(smollm2_mlx(), publisher / "SmolLM2-135M-Instruct", copy_function=os.link)
    config = publisher / "SmolLM2-135M-Instruct" / "config.json"
    known = json.loads(config.read_text())
    config.unlink()  # not the original, which it is a hard link to
    config.write_text(json.dumps(known | {"model_type": "xlstm"}))
    (publisher / "SmolLM2-135M-Instruct-GGUF").mkdir()
    shutil.copy(smollm2_gguf(), publisher / "SmolLM2-135M-Instruct-GGUF")
    with serving(tmp_path) as server:
        answer = chat(server, ID).json()
        assert answer["model"] == ID
        assert answer["choices"][0]["message"]["content"]
        model = server.get(f"/admin/models/{ID}").json()
        assert (model["format"], model["loaded"]["format"]) == ("mlx", "gguf")
        assert "xlstm" in model["loaded"]["fallback_reason"]
