from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx import inventory
from lmx.errors import (
    Conflict,
    DiskFull,
    DownloadFailed,
    GatedRepo,
    HubUnreachable,
    InvalidRequest,
    JobNotFound,
    LMXError,
    RepoNotFound,
)

from .downloading import CHOSEN, FILES, REPO, SMALL, WEIGHTS, Setup, chosen, setup_in, until
from .fake_hub import TOKEN, FakeHub, Fault, fake_hub

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub({REPO: FILES}) as hub:
        yield hub


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    with setup_in(tmp_path, monkeypatch) as setup:
        yield setup


async def test_a_download(setup: Setup) -> None:
    """What is chosen comes into the models folder with a manifest; the registry is told once."""
    job = await setup.download()
    status = job.status()
    assert (status.model, status.state, status.error) == (REPO, "completed", None)
    assert status.revision == next(iter(setup.hub.commits[REPO]))
    assert status.total_bytes == status.downloaded_bytes == sum(map(len, chosen(FILES).values()))
    assert {(f.path, f.state) for f in status.files} == {(path, "completed") for path in CHOSEN}
    assert status.completed_at and status.started_at <= status.completed_at
    assert (status.bytes_per_second, status.eta_seconds) == (0, None)
    assert msgspec.json.decode(msgspec.json.encode(status))["id"] == job.id
    assert setup.files() == chosen(FILES) and setup.is_clean and setup.finished == 1
    manifest = inventory.read(setup.model)
    assert manifest and (manifest.repo, manifest.commit) == (REPO, status.revision)
    assert manifest.files["config.json"].sha256 == hashlib.sha256(FILES["config.json"]).hexdigest()
    assert (manifest.files["config.json"].expected or "").startswith("git-sha1:")
    assert inventory.changed(setup.model, manifest) == set()
    inventory.check_unchanged(setup.model)


async def test_what_is_there_is_not_fetched_again(setup: Setup) -> None:
    """The same download once more is complete at once."""
    await setup.download()
    setup.hub.requests.clear()
    job = await setup.download()
    assert job.record.state == "completed" and job.status().downloaded_bytes > 300_000
    assert [request.path for request in setup.hub.requests] == ["/api/models/org/m"]


async def test_the_token_stays_with_the_hub(setup: Setup) -> None:
    """The host that the hub redirects to gets no Authorization header."""
    await setup.download()
    tokens = {(request.is_cdn, request.authorization) for request in setup.hub.requests}
    assert tokens == {(False, f"Bearer {TOKEN}"), (True, None)}


PASSING: dict[str, tuple[list[Fault], list[str | None]]] = {
    "dropped": ([Fault(drop=200_000)], [None, "bytes=200000-"]),
    "dropped twice": (
        [Fault(drop=200_000), Fault(drop=50_000)],
        [None, "bytes=200000-", "bytes=250000-"],
    ),
    "one byte at a time": (
        [Fault(drop=1)] * 20,
        [None, *(f"bytes={n}-" for n in range(1, 21))],
    ),
    "dropped without a length": ([Fault(drop=200_000, unsized=True)], [None, "bytes=200000-"]),
    "no length": ([Fault(unsized=True)], [None]),
    "429 and when to retry": ([Fault(status=429, headers={"Retry-After": "0"})] * 3, [None]),
    "503": ([Fault(status=503, headers={"Retry-After": "soon"}), Fault(status=500)], [None]),
    "500 on the way": (
        [Fault(drop=9), Fault(status=500), Fault(drop=9)],
        [None, "bytes=9-", "bytes=18-"],
    ),
    "no ranges": ([Fault(drop=9), Fault(ignore_range=True)], [None, "bytes=9-"]),
    "no ranges, dropped": (
        [Fault(drop=9), Fault(ignore_range=True, drop=20)],
        [None, "bytes=9-", "bytes=20-"],
    ),
    "416": ([Fault(drop=9), Fault(status=416)], [None, None]),
}


@pytest.mark.parametrize(("faults", "ranges"), PASSING.values(), ids=PASSING)
async def test_a_fault_that_passes(
    setup: Setup, faults: list[Fault], ranges: list[str | None]
) -> None:
    """The request is repeated, for what is missing only, until the file is there."""
    setup.hub.misbehave(WEIGHTS, faults)
    job = await setup.download()
    assert (job.record.state, job.record.error) == ("completed", None)
    assert setup.files() == chosen(FILES)
    assert [request.range for request in setup.hub.fetched(WEIGHTS)] == ranges


any_fault = st.builds(
    Fault,
    status=st.sampled_from([None, None, None, 408, 416, 429, 500]),
    headers=st.just({"Retry-After": "0"}),
    drop=st.integers(0, 300_000),
    ignore_range=st.booleans(),
    unsized=st.booleans(),
)


@settings(max_examples=25)
@given(faults=st.lists(any_fault, max_size=7))
def test_any_faults_that_pass(hub: FakeHub, faults: list[Fault]) -> None:
    """Whatever goes wrong fewer times than it is tried, the files are right in the end."""
    hub.misbehave(WEIGHTS, faults)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(hub, Path(folder))
        assert anyio.run(setup.download).record.state == "completed"
        assert setup.files() == chosen(FILES) and setup.is_clean


DROPPED = Fault(drop=5)
STAYING: dict[str, tuple[Iterable[Fault], str]] = {
    "500": (repeat(Fault(status=500)), r"^model\.safetensors: given up: HTTP 500$"),
    "429": (repeat(Fault(status=429)), r"^model\.safetensors: given up: HTTP 429$"),
    "nothing comes": (repeat(Fault(drop=0)), r"^model\.safetensors: given up: .*without"),
    "nothing more comes": (repeat(Fault(ignore_range=True, drop=5)), "given up: .*without"),
    "nothing comes without a length": (repeat(Fault(drop=0, unsized=True)), "up: .* ended early$"),
    "416": ([DROPPED, *[Fault(status=416), DROPPED] * 9], "given up"),
    "404": ([Fault(status=404)], r"^model\.safetensors: the hub answers 404 Not Found$"),
    "403": (
        [Fault(status=403, headers={"X-Error-Message": "Ask the authors."})],
        "the hub answers 403 Ask the authors.",
    ),
    "a page": ([Fault(page=b"<html>")], "6 bytes come, not 300000 as listed"),
    "a page later": ([DROPPED, Fault(page=b"<html>")], "6 bytes come, not 300000 as listed"),
    "short": ([Fault(short=1000)], "1000 bytes come, not 300000 as listed"),
    "another range": (
        [DROPPED, Fault(headers={"Content-Range": "bytes 4-299999/300000"})],
        "asked for the bytes from 5, got bytes 4-299999/300000",
    ),
    "another size": (
        [DROPPED, Fault(headers={"Content-Range": "bytes 5-299999/400000"})],
        "asked for the bytes from 5, got bytes 5-299999/400000",
    ),
    "no range": ([DROPPED, Fault(headers={"Content-Range": ""})], "asked for the bytes from 5"),
}


@pytest.mark.parametrize(("faults", "reason"), STAYING.values(), ids=STAYING)
async def test_a_fault_that_stays(setup: Setup, faults: Iterable[Fault], reason: str) -> None:
    """The job fails with the reason; nothing comes into the models folder, what is good stays."""
    setup.hub.misbehave(WEIGHTS, faults)
    job = await setup.download()
    assert job.record.state == "failed" and setup.finished == 0
    assert re.search(reason, job.record.error or "")
    assert not setup.model.exists()
    part = setup.files(setup.staging).get("model.safetensors.part", b"")
    assert FILES["model.safetensors"].startswith(part)
    setup.hub.misbehave(WEIGHTS, [])
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES) and setup.is_clean


async def test_more_than_listed(setup: Setup) -> None:
    """Bytes beyond the listed size are not written."""
    data = FILES["model.safetensors"]

    def edit(listing: dict[str, Any]) -> None:
        for file in listing["siblings"]:
            if file["rfilename"] == "model.safetensors":
                file["size"] = 1000

    setup.hub.edit_listing = edit
    setup.hub.misbehave(WEIGHTS, [Fault(unsized=True)])
    job = await setup.download()
    assert "more than the 1000 bytes" in (job.record.error or "")
    assert (setup.staging / "model.safetensors.part").stat().st_size == 0 < len(data)


@pytest.mark.parametrize(("path", "offset"), [(WEIGHTS, 299_999), (SMALL, 0)])
async def test_a_flipped_bit(setup: Setup, path: str, offset: int) -> None:
    """A wrong hash fails the job and names file and hashes; only that file is fetched again."""
    name = path.removeprefix("org/m/")
    setup.hub.misbehave(path, [Fault(flip=offset)])
    job = await setup.download()
    [expected] = [entry.expected for p, entry in job.files.items() if p == name]
    assert job.record.state == "failed" and not setup.model.exists()
    assert f"{name}: expected {expected}, actual " in (job.record.error or "")
    assert name not in setup.files(setup.staging)
    assert f"{name}.part" not in setup.files(setup.staging)
    good = {p: data for p, data in setup.files(setup.staging).items() if not p.endswith(".part")}
    setup.hub.requests.clear()
    assert (await setup.download()).record.state == "completed"
    assert setup.files() == chosen(FILES)
    assert setup.hub.fetched(path) and not any(setup.hub.fetched(f"{REPO}/{p}") for p in good)


async def test_a_wrong_hash_in_the_listing(setup: Setup) -> None:
    """The listing is what counts: content that is not as listed is never taken."""

    def edit(listing: dict[str, Any]) -> None:
        for file in listing["siblings"]:
            if "lfs" in file:
                file["lfs"]["sha256"] = "0" * 64

    setup.hub.edit_listing = edit
    for _ in range(2):
        assert f"expected sha256:{'0' * 64}" in ((await setup.download()).record.error or "")
    assert not setup.model.exists()


async def test_a_hub_that_hangs(setup: Setup) -> None:
    """When nothing comes for too long, what is missing is asked for again."""
    setup.timeout_seconds = 1.0
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    assert (await setup.download()).record.state == "completed"
    assert [r.range for r in setup.hub.fetched(WEIGHTS)] == [None, "bytes=1000-"]


async def test_a_repo_that_moves_on(setup: Setup) -> None:
    """All files are of the commit that was main when the download began."""
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    setup.settings["parallel_files"] = 1
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        setup.hub.push(REPO, {path: b"new" for path in FILES})
        setup.hub.released.set()
        await job.ended.wait()
    assert setup.files() == chosen(FILES)


@pytest.mark.parametrize(
    ("settings", "repo", "error", "message"),
    [
        (
            {"reserve_bytes": 10**18},
            REPO,
            DiskFull,
            r"needs 300025 bytes more in .*, but \d+ are free",
        ),
        ({"offline": True}, REPO, HubUnreachable, r"hub\.offline"),
        ({}, "org/other", RepoNotFound, "no repo org/other"),
        ({}, "../m", InvalidRequest, "org/name"),
    ],
)
async def test_a_download_that_does_not_start(
    setup: Setup, settings: dict[str, Any], repo: str, error: type[LMXError], message: str
) -> None:
    """The one who asks gets the reason; no job and no file remains."""
    setup.settings |= settings
    async with setup.run() as downloads:
        with pytest.raises(error, match=message):
            await downloads.start(repo)
        assert downloads.jobs == []
    assert not any(setup.models.rglob("*"))


async def test_gated_and_out_of_reach(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without access or without a hub nothing starts; the model that is there stays good."""
    await setup.download()
    setup.hub.push(REPO, FILES | {"config.json": b"{}"})
    setup.hub.gated.add(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    async with setup.run() as downloads:
        with pytest.raises(GatedRepo):
            await downloads.start(REPO)
    setup.hub.endpoint = "http://127.0.0.1:9"
    async with setup.run() as downloads:
        with pytest.raises(HubUnreachable, match=r"127\.0\.0\.1:9"):
            await downloads.start(REPO)
    inventory.check_unchanged(setup.model)
    assert setup.files() == chosen(FILES)


async def test_a_hub_that_does_not_answer(setup: Setup) -> None:
    """The one who asks does not wait for ever."""
    setup.timeout_seconds = 0.2
    setup.hub.edit_listing = lambda listing: listing.update(id=setup.hub.released.wait(30))
    async with setup.run() as downloads:
        with pytest.raises(HubUnreachable, match=r"Timeout|in time"):
            await downloads.start(REPO)


async def test_a_place_that_cannot_be_written(setup: Setup) -> None:
    """A models folder that cannot be made is an error, not a crash."""
    setup.models.parent.joinpath("models").write_bytes(b"a file")
    async with setup.run() as downloads:
        with pytest.raises(DownloadFailed, match="disk refuses"):
            await downloads.start(REPO)


async def test_one_job_for_a_repo(setup: Setup) -> None:
    """Who asks for what is on its way joins; another repo has its own job, unmoved by a cancel."""
    setup.hub.push("org/n", FILES)
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    setup.hub.misbehave("org/n/model.safetensors", [Fault(stall=1000)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        assert await downloads.start("ORG/M") is job is downloads.get(job.id)
        other = await downloads.start("org/n")
        assert downloads.jobs == [other, job] and other.id != job.id
        assert (await downloads.cancel(job.id)) is job
        assert job.status().state == "cancelled" and not setup.staging.exists()
        setup.hub.released.set()
        await other.ended.wait()
        assert other.status().state == "completed"
        with pytest.raises(JobNotFound):
            downloads.get("job_0")
    assert not setup.model.exists() and (setup.models / "org/n/config.json").exists()


async def test_another_choice_does_not_join(setup: Setup) -> None:
    """Who wants other files than those on their way is told so, instead of never getting them."""
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO, files=["config.json", "*.safetensors"])
        assert await downloads.start(REPO, files=["config.json", "*.safetensors"]) is job
        for choice in ({"quant": "Q4_0"}, {"revision": "main"}, {"files": ["*.json"]}):
            with pytest.raises(Conflict, match=job.id):
                await downloads.start(REPO, **choice)


async def test_offline_after_a_restart(setup: Setup) -> None:
    """What was running is listed and can be cancelled, and asks nobody."""
    setup.hub.misbehave(WEIGHTS, [Fault(stall=1000)])
    async with setup.run() as downloads:
        await downloads.start(REPO)
        await until(setup.hub.stalled)
    setup.settings["offline"] = True
    asked = len(setup.hub.requests)
    async with setup.run() as downloads:
        await downloads.resume()
        [job] = downloads.jobs
        assert (job.status().state, job.status().error) == ("failed", "hub.offline is set")
        await downloads.cancel(job.id)
    assert setup.is_clean and len(setup.hub.requests) == asked


@pytest.mark.parametrize("link", ["org", ".downloads/org--m"])
async def test_a_link_to_elsewhere(setup: Setup, tmp_path: Path, link: str) -> None:
    """Nothing is written or deleted outside the models folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (setup.models / link).parent.mkdir(parents=True)
    (setup.models / link).symlink_to(outside)
    async with setup.run() as downloads:
        with pytest.raises(DownloadFailed, match="link to outside"):
            await downloads.start(REPO)
    assert [file.name for file in outside.iterdir()] == ["precious"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://[::1", "notaurl"])
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    """A bad HF_ENDPOINT, which huggingface_hub reads when imported, is an error like others."""
    code = """
from lmx import errors, hub
try:
    hub.resolve("a/b", None, None, None, None, 5)
except errors.HubUnreachable as error:
    print(error.message)
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout and not done.stderr


async def test_two_starts_at_once(setup: Setup) -> None:
    """Both get the same job, and every file comes once."""
    async with setup.run() as downloads:
        jobs = []

        async def start() -> None:
            jobs.append(await downloads.start(REPO))

        async with anyio.create_task_group() as both:
            both.start_soon(start)
            both.start_soon(start)
        await jobs[0].ended.wait()
        assert jobs[0].record.manifest is not None and jobs[0].id == jobs[1].id
    assert len(setup.hub.fetched(WEIGHTS)) == 1


async def test_cancelling_what_has_ended(setup: Setup) -> None:
    """A completed model stays; what a failed job has left goes."""
    setup.hub.push("org/n", FILES)
    setup.hub.misbehave("org/n/model.safetensors", [Fault(status=404)])
    async with setup.run() as downloads:
        for repo in (REPO, "org/n"):
            job = await downloads.start(repo)
            await job.ended.wait()
            await downloads.cancel(job.id)
        assert [job.record.state for job in downloads.jobs] == ["cancelled", "completed"]
    assert setup.files() == chosen(FILES) and setup.is_clean


async def test_progress(setup: Setup) -> None:
    """While files come, the status says how far each is, how fast, and how long it takes."""
    setup.settings["parallel_files"] = 1
    setup.hub.misbehave(WEIGHTS, [Fault(stall=100_000)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        while (status := job.status()).downloaded_bytes < 100_000:
            await anyio.lowlevel.checkpoint()
        assert (status.state, status.error, status.completed_at) == ("downloading", None, None)
        sizes = {file.path: file.downloaded_bytes for file in status.files}
        assert sizes["model.safetensors"] == 100_000 and status.total_bytes == 300_025
        assert status.bytes_per_second > 0 and status.eta_seconds and status.eta_seconds > 0
        asked = {request.path for request in setup.hub.requests if request.path in (SMALL, WEIGHTS)}
        assert WEIGHTS in asked
        setup.hub.released.set()
        await job.ended.wait()


async def test_as_many_at_a_time_as_configured(setup: Setup) -> None:
    """With one file at a time, no other is asked for while one is on its way."""
    setup.settings["parallel_files"] = 1
    setup.hub.misbehave(SMALL, [Fault(stall=0)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        assert {r.path for r in setup.hub.requests} == {"/api/models/org/m", SMALL}
        setup.hub.released.set()
        await job.ended.wait()


async def test_a_folder_that_vanishes(setup: Setup) -> None:
    """Somebody who clears the folder of downloads fails the job, and nothing else."""
    setup.settings["parallel_files"] = 1
    setup.hub.misbehave(SMALL, [Fault(stall=5)])
    async with setup.run() as downloads:
        job = await downloads.start(REPO)
        await until(setup.hub.stalled)
        shutil.rmtree(setup.staging.parent)
        setup.hub.released.set()
        await job.ended.wait()
        assert "the disk refuses" in (job.record.error or "") and not setup.model.exists()
        job = await downloads.start(REPO)
        await job.ended.wait()
    assert setup.files() == chosen(FILES)


async def test_a_bug_is_the_jobs_error(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged whole and fails the job; others can be started."""

    def finish() -> None:
        raise ZeroDivisionError("oh")

    setup.finish = finish  # type: ignore[method-assign]
    async with setup.run() as downloads:
        for _ in range(2):
            job = await downloads.start(REPO)
            await job.ended.wait()
    assert "ZeroDivisionError: oh" in caplog.text and "Traceback" in caplog.text
