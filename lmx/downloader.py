"""Downloads from the hub, as jobs that outlive the process. Event loop only."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple
from urllib.parse import quote

import anyio
from anyio import CapacityLimiter
from anyio.abc import TaskGroup

from . import hub
from .config import Config
from .errors import (
    Conflict,
    DiskFull,
    DownloadFailed,
    HubUnreachable,
    InvalidRequest,
    JobNotFound,
    LMXError,
)
from .staging import CHUNK_BYTES, Part, Record, Staging, read_records

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Asked = tuple[str | None, list[str], str | None]
"""Revision, files and quantization, as in the request."""

_ATTEMPTS: Final = 8
"""In a row that bring nothing new; with the pauses between them, some four minutes."""
_LONGEST_PAUSE_SECONDS: Final = 120.0
_RATE_SECONDS: Final = 5


@dataclass(frozen=True, slots=True)
class FileStatus:
    path: str
    size_bytes: int
    downloaded_bytes: int
    state: str  # `completed`, or that of the job


@dataclass(frozen=True, slots=True)
class JobStatus:
    id: str
    model: str
    revision: str
    state: str  # `downloading`, `completed`, `failed` or `cancelled`
    total_bytes: int
    downloaded_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    files: list[FileStatus]
    error: str | None
    started_at: float  # Unix seconds
    completed_at: float | None


class Job:
    """The download of a repo. There is one for each, and its id is made of the repo's name."""

    def __init__(self, staging: Staging, asked: Asked | None = None) -> None:
        self.asked = asked
        self.id = f"job_{hashlib.sha256(staging.manifest.repo.lower().encode()).hexdigest()[:10]}"
        self.staging = staging
        self.record = staging.record
        self.files = staging.manifest.files
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()
        self._downloaded = {path: entry.size for path, entry in self.files.items() if entry.sha256}
        self._received: dict[int, int] = {}
        """Bytes by second."""

    def advance(self, path: str, position: int, received: int = 0) -> None:
        self._downloaded[path] = position
        second = int(time.monotonic())
        self._received = {s: n for s, n in self._received.items() if s > second - _RATE_SECONDS}
        self._received[second] = self._received.get(second, 0) + received

    def status(self) -> JobStatus:
        record, since = self.record, time.monotonic() - _RATE_SECONDS
        recent = sum(n for second, n in self._received.items() if second > since)
        rate = 0.0 if self.ended.is_set() else recent / _RATE_SECONDS
        total = sum(entry.size for entry in self.files.values())
        done = self._downloaded
        return JobStatus(
            id=self.id,
            model=record.manifest.repo,
            revision=record.manifest.commit,
            state=record.state,
            total_bytes=total,
            downloaded_bytes=sum(done.values()),
            bytes_per_second=rate,
            eta_seconds=(total - sum(done.values())) / rate if rate else None,
            files=[
                FileStatus(p, e.size, done.get(p, 0), "completed" if e.sha256 else record.state)
                for p, e in self.files.items()
            ],
            error=record.error,
            started_at=record.started_at,
            completed_at=record.completed_at,
        )


class Downloads:
    """All jobs. `finished` is called when a model has come into place."""

    def __init__(
        self,
        config: Callable[[], Config],
        tasks: TaskGroup,
        finished: Callable[[], None],
        *,
        endpoint: str | None = None,
        timeout_seconds: float = 30.0,
        pause_seconds: float = 1.0,
    ) -> None:
        self._config = config
        self._tasks = tasks
        self._finished = finished
        self._endpoint = endpoint
        self._timeout = timeout_seconds
        """For a connection, and for each next piece of an answer."""
        self._pause = pause_seconds
        """After a failed request; doubled after each that brings nothing new either."""
        self._jobs: dict[str, Job] = {}
        self._starting = anyio.Lock()

    @property
    def jobs(self) -> list[Job]:
        """The newest first."""
        return sorted(self._jobs.values(), key=lambda job: -job.record.started_at)

    def get(self, id: str) -> Job:
        if id not in self._jobs:
            raise JobNotFound(f"no download job {id!r:.100}")
        return self._jobs[id]

    async def start(
        self,
        repo: str,
        *,
        revision: str | None = None,
        files: Sequence[str] | None = None,
        quant: str | None = None,
    ) -> Job:
        """Start to download, go on where it has failed, or join the job that runs for the repo.

        Raises:
            Conflict: the job that runs is for something else of the repo.
            LMXError: the hub, the choice of files or the disk stands against it.
        """
        async with self._starting:
            asked = (revision, list(files or ()), quant)
            for job in self._jobs.values():
                if job.record.manifest.repo.lower() == repo.lower() and not job.ended.is_set():
                    if any(asked) and asked != job.asked:
                        raise Conflict(
                            f"{repo} is being downloaded: wait for it, or cancel {job.id}"
                        )
                    return job
            config = self._config()
            if config.hub.offline:
                raise HubUnreachable("hub.offline is set, so the hub is not asked")
            manifest = await self._ask(partial(hub.resolve, repo, revision, files, quant))
            for path, entry in manifest.files.items():
                if entry.expected is None and not config.hub.allow_unverified:
                    raise InvalidRequest(f"no hash for {path}: see hub.allow_unverified")
            staging = Staging(self._models_dir(), Record(manifest, time.time()))
            if not await on_disk(staging.adopt):
                await on_disk(staging.prepare, config.hub.reserve_bytes)
            return self._add(staging, asked)

    async def resume(self) -> None:
        """Go on with what was running when the process ended; what had failed is listed only."""
        for record in await on_disk(read_records, self._models_dir()):
            if self._config().hub.offline and record.state == "downloading":
                record.state, record.error = "failed", "hub.offline is set"
            self._add(Staging(self._models_dir(), record))

    async def cancel(self, id: str) -> Job:
        """Stop the job and remove its files; what is completed stays as it is."""
        job = self.get(id)
        if not job.ended.is_set():
            job.scope.cancel()
            await job.ended.wait()
        async with self._starting:
            if job.record.state == "failed" and self._jobs[id] is job:
                await on_disk(job.staging.discard)
        return job

    def _models_dir(self) -> Path:
        return Path(self._config().models_dir).expanduser()

    async def _ask(self, question: Callable[[str | None, float], T]) -> T:
        """Ask the hub in a thread, which may take longer than anyone waits for it."""
        try:
            with anyio.fail_after(2 * self._timeout):
                return await anyio.to_thread.run_sync(
                    question, self._endpoint, self._timeout, abandon_on_cancel=True
                )
        except TimeoutError as error:
            raise HubUnreachable("the hub does not answer in time") from error

    def _add(self, staging: Staging, asked: Asked | None = None) -> Job:
        job = Job(staging, asked)
        self._jobs[job.id] = job
        if staging.record.state == "downloading":
            self._tasks.start_soon(self._run, job)
        else:
            job.ended.set()
        return job

    async def _run(self, job: Job) -> None:
        try:
            with job.scope:
                try:
                    await self._transfer(job)
                # Even a bug in here must end this job and not the server.
                except* Exception as group:
                    await self._fail(job, group.exceptions[0])
            if job.scope.cancelled_caught:
                await on_disk(job.staging.discard)
        finally:
            job.ended.set()

    async def _fail(self, job: Job, error: Exception) -> None:
        known = isinstance(error, LMXError)
        job.record.state = "failed"
        job.record.error = str(error) if known else f"{type(error).__name__}: {error}"
        logger.error("%s: %s", job.record.manifest.repo, error, exc_info=None if known else error)
        try:
            await on_disk(job.staging.save)
        except LMXError as unsaved:
            logger.error("%s: %s", job.record.manifest.repo, unsaved)

    async def _transfer(self, job: Job) -> None:
        settings, manifest = self._config().hub, job.record.manifest
        await on_disk(job.staging.prepare, settings.reserve_bytes)  # again, unless it was resumed
        client, endpoint = await self._ask(hub.client)
        url = f"{endpoint}/{manifest.repo}/resolve/{manifest.commit}"
        limit = CapacityLimiter(settings.parallel_files)
        async with client, anyio.create_task_group() as tasks:
            for path in sorted(await on_disk(job.staging.missing)):
                tasks.start_soon(self._fetch, job, path, client, f"{url}/{quote(path)}", limit)
        with anyio.CancelScope(shield=True):
            await on_disk(job.staging.place)
        self._finished()

    async def _fetch(
        self, job: Job, path: str, client: httpx2.AsyncClient, url: str, limit: CapacityLimiter
    ) -> None:
        async with limit:
            part = await on_disk(Part, job.staging.path, path, job.files[path])
            try:
                while await on_disk(part.rehash):
                    job.advance(path, part.position)
                await self._fetch_rest(job, part, client, url)
                await on_disk(part.finish)
            finally:
                part.file.close()
                job.advance(path, part.position)
            await on_disk(job.staging.save)

    async def _fetch_rest(self, job: Job, part: Part, client: httpx2.AsyncClient, url: str) -> None:
        import httpx2

        best, failures = part.position, 0
        while part.position < part.entry.size:
            try:
                await _receive(job, part, client, url)
            except (httpx2.TransportError, HubUnreachable) as error:
                failures = 0 if part.position > best else failures + 1
                best = max(best, part.position)
                if failures == _ATTEMPTS:
                    reason = str(error) or type(error).__name__
                    raise DownloadFailed(f"{part.path}: given up: {reason}") from error
                pause = self._pause * 2**failures
                if isinstance(error, HubUnreachable) and error.retry_after is not None:
                    pause = error.retry_after
                await anyio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))


async def _receive(job: Job, part: Part, client: httpx2.AsyncClient, url: str) -> None:
    """Ask once for what is missing of a file. What has come is kept, however it ends.

    Raises:
        HubUnreachable, httpx2.TransportError: asking again makes sense.
    """
    asked = {"Range": f"bytes={part.position}-"} if part.position else {}
    async with client.stream("GET", url, headers=asked) as response:
        status, headers, size = response.status_code, response.headers, part.entry.size
        if status in (408, 416, 429) or status >= 500:
            if status == 416:
                await on_disk(part.restart)
            after = headers.get("Retry-After", "")
            after_seconds = int(after) if after.isdecimal() else None
            raise HubUnreachable(f"HTTP {status}", retry_after=after_seconds)
        if status not in (200, 206):
            reason = headers.get("X-Error-Message", response.reason_phrase)
            raise DownloadFailed(f"{part.path}: the hub answers {status} {reason}")
        begin = part.position if status == 206 else 0
        found = headers.get("Content-Range")
        if status == 206 and found != f"bytes {begin}-{size - 1}/{size}":
            raise DownloadFailed(f"{part.path}: asked for the bytes from {begin}, got {found}")
        found = headers.get("Content-Length")
        if found not in (None, str(size - begin)):
            raise DownloadFailed(f"{part.path}: {found} bytes come, not {size - begin} as listed")
        if begin < part.position:
            await on_disk(part.restart)
        buffer = bytearray()
        try:
            async for data in response.aiter_raw():
                buffer += data
                job.advance(part.path, part.position + len(buffer), len(data))
                if len(buffer) >= CHUNK_BYTES:
                    full, buffer = buffer, bytearray()
                    await on_disk(part.append, full)
        finally:
            with anyio.CancelScope(shield=True):
                await on_disk(part.append, buffer)
    if part.position < size:
        raise HubUnreachable("the answer ended early")


async def on_disk(work: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Do it in a thread; an OSError is the disk's."""
    try:
        return await anyio.to_thread.run_sync(work, *arguments)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full, what has come is kept: {error}") from error
        raise DownloadFailed(f"the disk refuses: {error}") from error
