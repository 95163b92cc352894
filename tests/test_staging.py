from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lmx import inventory
from lmx.errors import InvalidRequest
from lmx.staging import CHUNK_BYTES

from .downloading import CHOSEN, FILES, REPO, SMALL, WEIGHTS, Setup, chosen, setup_in, until
from .fake_hub import Fault

pytestmark = pytest.mark.anyio


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    with setup_in(tmp_path, monkeypatch) as setup:
        yield setup


async def test_a_staged_file_that_was_touched_is_hashed_again(setup: Setup) -> None:
    """A verified file is trusted by size and time only; a changed one is found out, and fetched."""
    setup.settings["parallel_files"] = 1
    setup.hub.misbehave(f"{REPO}/tokenizer.json", [Fault(status=404)])
    await setup.download()
    (setup.staging / "config.json").write_bytes(FILES["config.json"][::-1])
    os.utime(setup.staging / "model.safetensors", ns=(1, 1))
    setup.hub.requests.clear()
    job = await setup.download()
    assert "config.json: expected git-sha1:" in (job.record.error or "")
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES) and not setup.hub.fetched(WEIGHTS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_a_full_disk(setup: Setup) -> None:
    """The job fails and says so; what is there is kept for when there is room."""
    setup.hub.misbehave(WEIGHTS, [Fault(status=404)])
    await setup.download()
    part = setup.staging / "model.safetensors.part"
    part.unlink(missing_ok=True)
    part.symlink_to("/dev/full")
    job = await setup.download()
    assert job.record.state == "failed" and "the disk is full" in (job.record.error or "")
    assert not setup.model.exists()
    part.unlink()
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES)


async def test_going_on_after_a_stop(setup: Setup) -> None:
    """What ran when the server stopped goes on when it starts, from the byte where it was."""
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        while job.status().downloaded_bytes < 1000:
            await anyio.lowlevel.checkpoint()
    async with setup.run() as downloads:
        await downloads.resume()
        [resumed] = downloads.jobs
        assert resumed.id == job.id
        await resumed.ended.wait()
        assert resumed.record.state == "completed"
    assert [r.range for r in setup.hub.fetched(WEIGHTS)] == [None, "bytes=1000-"]
    assert setup.files() == chosen(FILES) and setup.is_clean


async def test_stopped_while_coming_into_place(setup: Setup) -> None:
    """What was in place already, and what is still staged, is not fetched again."""
    setup.hub.misbehave(f"{REPO}/tokenizer.json", [Fault(status=404)])
    setup.settings["parallel_files"] = 1
    await setup.download()
    file = setup.staging / ".job.json"
    file.write_text(file.read_text().replace('"failed"', '"downloading"'))
    setup.model.mkdir(parents=True)
    (setup.staging / "config.json").rename(setup.model / "config.json")
    setup.hub.requests.clear()
    async with setup.run() as downloads:
        await downloads.resume()
        await downloads.jobs[0].ended.wait()
        assert downloads.jobs[0].record.state == "completed"
    assert not setup.hub.fetched(SMALL) and not setup.hub.fetched(WEIGHTS)
    assert setup.files() == chosen(FILES) and setup.is_clean
    inventory.check_unchanged(setup.model)


async def test_a_failed_job_waits_to_be_started(setup: Setup) -> None:
    """After a restart it is listed with its error, and not tried again by itself."""
    setup.hub.misbehave(WEIGHTS, [Fault(status=404)])
    await setup.download()
    setup.hub.requests.clear()
    async with setup.run() as downloads:
        await downloads.resume()
        [job] = downloads.jobs
        assert job.status().state == "failed" and "404" in (job.status().error or "")
        await downloads.cancel(job.id)
    assert setup.hub.requests == [] and setup.is_clean


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"manifest": {"repo": "../x"}}', "other", "path"]
)
async def test_a_damaged_record(
    setup: Setup, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and left alone, and starting the download by hand begins anew."""
    setup.hub.misbehave(WEIGHTS, [Fault(status=404)])
    await setup.download()
    file = setup.staging / ".job.json"
    record = json.loads(file.read_text())
    if damage == "path":
        record["manifest"]["files"]["../../x"] = record["manifest"]["files"].pop("config.json")
    if damage == "other":
        record["manifest"]["repo"] = "org/other"
    file.write_text(json.dumps(record) if damage in ("path", "other") else damage)
    before = setup.files(setup.models)
    async with setup.run() as downloads:
        await downloads.resume()
        assert downloads.jobs == [] and setup.files(setup.models) == before
    assert damage == "other" or "damaged" in caplog.text
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES) and setup.is_clean


async def test_a_second_quantization(setup: Setup) -> None:
    """It joins the first in the folder and in the manifest; patterns may bring anything else."""
    quants = {"m-Q4_K_M.gguf": b"four", "q8/m-Q8_0.gguf": b"eight", "mmproj.gguf": b"pictures"}
    setup.hub.push(REPO, quants)
    for choice in ({}, {"quant": "q8_0"}, {"files": ["mm*"]}):
        assert (await setup.download(**choice)).record.state == "completed"
    assert setup.files() == quants and setup.is_clean and setup.finished == 3
    manifest = inventory.read(setup.model)
    assert manifest and manifest.files.keys() == quants.keys()
    assert [len(setup.hub.fetched(f"{REPO}/{path}")) for path in quants] == [1, 1, 1]


async def test_remains_of_another_choice(setup: Setup) -> None:
    """What a failed job has left of other files, or of another version, goes."""
    setup.hub.push(REPO, {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight"})
    for path, fault in (("m-Q8_0.gguf", Fault(drop=2)), ("m-Q4_K_M.gguf", Fault(drop=3))):
        setup.hub.misbehave(f"{REPO}/{path}", [fault, Fault(status=404)])
        await setup.download(quant=path[2:-5])
        assert setup.files(setup.staging) == {f"{path}.part": b"four"[:3] if "4" in path else b"ei"}
    setup.hub.push(REPO, {"m-Q4_K_M.gguf": b"FOUR"})
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == {"m-Q4_K_M.gguf": b"FOUR"}


async def test_a_file_that_changes_after_its_verification(setup: Setup) -> None:
    """What is changed in the staging folder meanwhile does not come into the models folder."""
    setup.settings["parallel_files"] = 1
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        (setup.staging / "config.json").write_bytes(b"{}")
        setup.hub.released.set()
        await job.ended.wait()
        assert "config.json was changed" in (job.record.error or "") and not setup.model.exists()


async def test_config_comes_into_place_last(setup: Setup) -> None:
    """Where a file cannot be put, the model does not look complete; nothing is fetched again."""
    (setup.model / "tokenizer.json").mkdir(parents=True)
    job = await setup.download()
    assert "the disk refuses" in (job.record.error or "")
    assert setup.files().keys() == {"model.safetensors"}
    (setup.model / "tokenizer.json").rmdir()
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await job.ended.wait()
    assert setup.files() == chosen(FILES) and setup.is_clean
    assert [len(setup.hub.fetched(f"{REPO}/{path}")) for path in CHOSEN] == [1, 1, 1]


async def test_a_new_version(setup: Setup) -> None:
    """Only what has changed is fetched; shards that the new version lacks go; other files stay."""
    shards = {"model-1.safetensors": b"same", "model-2.safetensors": b"old"}
    setup.hub.push(REPO, {"config.json": b"{}", "m-Q4_K_M.gguf": b"gguf", **shards})
    await setup.download()
    await setup.download(quant="Q4_K_M")
    (setup.model / "notes.txt").write_text("mine")
    new = {"config.json": b"{1}", "model-1.safetensors": b"same", "model-3.safetensors": b"new"}
    commit = setup.hub.push(REPO, new)
    setup.hub.requests.clear()
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == new | {"m-Q4_K_M.gguf": b"gguf", "notes.txt": b"mine"}
    assert not setup.hub.fetched(f"{REPO}/model-1.safetensors")
    manifest = inventory.read(setup.model)
    assert manifest and manifest.commit == commit
    assert manifest.files.keys() == new.keys() | {"m-Q4_K_M.gguf"}
    inventory.check_unchanged(setup.model)


@pytest.mark.parametrize("manifest", ["right", "damaged", "hostile", "missing"])
async def test_a_corrupt_model_is_repaired(setup: Setup, manifest: str) -> None:
    """Downloading again fetches what is not as it should be, whatever became of the manifest."""
    await setup.download()
    (setup.models / "victim.txt").write_text("not ours")
    (setup.model / "config.json").write_bytes(b"x")
    file = setup.model / inventory.NAME
    if manifest == "damaged":
        file.write_bytes(b"{")
    if manifest == "hostile":
        content = json.loads(file.read_text())
        content["commit"] = "0" * 40
        content["files"]["../../victim.txt"] = content["files"]["config.json"]
        file.write_text(json.dumps(content))
    if manifest == "missing":
        file.unlink()
    setup.hub.requests.clear()
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES) and setup.is_clean
    assert len(setup.hub.fetched(WEIGHTS)) == (manifest != "right")
    assert (setup.models / "victim.txt").exists()
    inventory.check_unchanged(setup.model)


async def test_files_without_a_hash(setup: Setup) -> None:
    """They are refused unless the configuration takes them, and then belong to one commit only."""

    def edit(listing: dict[str, Any]) -> None:
        for file in listing["siblings"]:
            file.pop("blobId")

    setup.hub.edit_listing = edit
    async with setup.run() as downloads:
        with pytest.raises(InvalidRequest, match=r"config\.json: see hub\.allow_unverified"):
            await downloads.start(REPO)
    setup.settings["allow_unverified"] = True
    await setup.download()
    assert setup.files() == chosen(FILES)
    setup.hub.push(REPO, FILES | {"tokenizer.json": b"{}"})
    await setup.download()
    assert setup.files()["tokenizer.json"] == b"{}"


SERVER = """
import sys
from pathlib import Path
import anyio
from lmx.config import Config, HubSettings
from lmx.downloader import Downloads

async def main(endpoint, models):
    config = Config(models_dir=models, hub=HubSettings(reserve_bytes=0))
    async with anyio.create_task_group() as tasks:
        downloads = Downloads(lambda: config, tasks, lambda: None, endpoint=endpoint)
        await downloads.resume()
        job = downloads.jobs[0] if downloads.jobs else await downloads.start("org/m")
        while not job.ended.is_set():
            sys.stdout.write(f"{job.status().downloaded_bytes}\\n")
            sys.stdout.flush()
            await anyio.sleep(0.02)
        sys.stdout.write(job.record.state)

anyio.run(main, *sys.argv[1:])
"""


def test_killed_in_the_middle(setup: Setup) -> None:
    """After kill -9 a new process goes on with what was written; nothing of it comes twice."""
    weights = random.Random(1).randbytes(3 * CHUNK_BYTES)
    received = 2 * CHUNK_BYTES + 1000
    setup.hub.push(REPO, FILES | {"model.safetensors": weights})
    setup.hub.misbehave(WEIGHTS, [Fault(stall=received)])
    command = [sys.executable, "-c", SERVER, setup.hub.endpoint, str(setup.models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if int(line) >= received + 25:  # the small files too
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL and not setup.model.exists()
    written = (setup.staging / "model.safetensors.part").stat().st_size
    assert CHUNK_BYTES <= written <= received
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("completed") and done.stderr == ""
    assert setup.files() == chosen(FILES | {"model.safetensors": weights}) and setup.is_clean
    assert [r.range for r in setup.hub.fetched(WEIGHTS)] == [None, f"bytes={written}-"]
    assert len(setup.hub.fetched(SMALL)) == 1
