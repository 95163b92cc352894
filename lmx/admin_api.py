"""The admin API: models, downloads, status, configuration."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from . import __version__, inventory
from .catalog import Model
from .config import Config, Section
from .downloader import JobStatus
from .endpoint import State
from .errors import ConfigError, Conflict, InvalidRequest
from .logs import LINES_KEPT
from .registry import Registry
from .reload import Reloaded
from .slot import Slot
from .streaming import EventStream, encode_event

PROGRESS_SECONDS: Final = 0.5


class ModelName(Section, frozen=True):
    model: str


class LoadModel(Section, frozen=True):
    model: str
    ttl_seconds: Annotated[float, Meta(gt=0)] | None = None
    """Unload after so long without work. null: never, except to make room."""


class UnloadModel(Section, frozen=True):
    model: str
    force: bool = False
    """Fail the requests that use it instead of waiting for them."""


class PinModel(Section, frozen=True):
    model: str
    pinned: bool = True


class DownloadModel(Section, frozen=True):
    model: str
    """`org/repo` on Hugging Face."""
    revision: str | None = None
    files: list[str] | None = None
    """Patterns of file names; null: chosen by format."""
    quant: str | None = None
    """Of a GGUF repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOfModel:
    """Bytes."""

    weights: int
    kv_reserved: int
    kv_granted: int
    kv_used: int
    working: int
    reserved: int
    """Weights, reserved KV cache and working memory: what no other model can have."""
    estimated_loaded: int
    """What it was expected to take right after the load."""
    measured_loaded: int
    """What it took then."""
    measured: int
    """What it takes now."""
    measured_peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    path: str
    format: str
    fallback_reason: str | None
    """Why GGUF weights were loaded in place of the MLX ones."""
    engine: str
    pid: int | None
    context_length: int
    parallel: int
    """Requests decoded together; 1 where the model cannot batch."""
    features: list[str]
    """What is in use of `batch`, `ragged`, `prefix` and `draft`."""
    problems: list[str]
    """What the others got wrong when this model was first loaded."""
    padding: float
    """The largest share of the batch's KV cache that held nothing in the last second."""
    active: int
    tokens_per_second: float
    tokens_generated: int
    explicit: bool
    expires_in_seconds: float | None
    memory: MemoryOfModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminModel:
    id: str
    state: str
    """available, downloading, loading, ready, draining, unloading or failed."""
    kind: str
    format: str
    path: str
    publisher: str
    repo: str
    architecture: str | None
    quantization: str | None
    parameters: int | None
    size_bytes: int
    context_length: int | None
    loadable: bool
    error: str | None
    """Why it cannot be loaded, or why the last load failed."""
    fallback: str | None
    """The GGUF weights of the same model, which take over when MLX cannot load it."""
    removable: bool
    aliases: list[str]
    pinned: bool
    ttl_seconds: float | None
    loaded: LoadedModel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminModels:
    models: list[AdminModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    downloads: list[JobStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFault:
    path: str
    expected: str
    actual: str
    """Its SHA-256, or `missing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    model: str
    revision: str
    verified: bool
    files: int
    faults: list[FileFault]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    id: str
    deleted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStatus:
    """Bytes. `free` is what may still be loaded without unloading anything."""

    total: int
    used: int
    limit: int
    rule: str
    """Which bound makes the limit."""
    models: int
    others: int
    free: int
    pressure: int
    """macOS's level: 1 normal, 2 warning, 4 critical."""
    server: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatus:
    outstanding: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    version: str
    pid: int
    uptime_seconds: float
    memory: MemoryStatus
    queue: QueueStatus
    tokens_per_second: float
    models: dict[str, LoadedModel]
    config_error: str | None
    """Why the configuration file as it is now is not in effect."""
    need_restart: list[str]
    """Settings that have changed in the file and are not used yet."""


async def list_models(request: Request[State]) -> AdminModels:
    """All models on disk, loadable or not, and what is being downloaded."""
    registry = request.state["registry"]
    found = await registry.models()
    # What is in memory is listed though its files may be gone.
    gone = [s.model for s in registry.slots.values() if s.runner and s.model not in found]
    models = [_model(registry, model) for model in [*found, *gone]]
    jobs = [job for job in request.state["downloads"].jobs if not job.ended.is_set()]
    return AdminModels(models=models + [_downloading(registry, job.status()) for job in jobs])


async def retrieve_model(request: Request[State]) -> AdminModel:
    """One model."""
    registry = request.state["registry"]
    return _model(registry, await registry.resolve(request.path_params["id"]))


async def load(request: Request[State], body: LoadModel) -> AdminModel:
    """Load a model, or find it loaded; answers when it is ready."""
    registry = request.state["registry"]
    slot = await registry.load(body.model, ttl=body.ttl_seconds)
    return _model(registry, slot.model)


async def unload(request: Request[State], body: UnloadModel) -> AdminModel:
    """Unload a model once nobody uses it, or by force; answers when its memory is free."""
    registry = request.state["registry"]
    slot = await registry.unload(body.model, force=body.force)
    return _model(registry, slot.model)


async def pin(request: Request[State], body: PinModel) -> AdminModel:
    """Keep a model in memory whatever else is asked for, until it is unpinned or LMX restarted."""
    registry = request.state["registry"]
    slot = registry.slot(await registry.resolve(body.model))
    slot.pinned = body.pinned
    return _model(registry, slot.model)


async def delete(request: Request[State], body: ModelName) -> Deleted:
    """Unload a model and remove its files, if they are in LMX's own folder."""
    return Deleted(id=(await request.state["registry"].delete(body.model)).id)


async def verify(request: Request[State], body: ModelName) -> Verification:
    """Hash a downloaded model's files again and compare them with the hub's hashes."""
    model = await request.state["registry"].resolve(body.model)
    manifest = await anyio.to_thread.run_sync(inventory.read, model.folder)
    if manifest is None:
        raise Conflict(f"{model.id} was not downloaded by LMX: there are no hashes to compare.")
    cancelled = threading.Event()
    try:
        faults = await anyio.to_thread.run_sync(
            inventory.verify, model.folder, None, cancelled, abandon_on_cancel=True
        )
    finally:
        cancelled.set()
    return Verification(
        model=model.id,
        revision=manifest.commit,
        verified=not faults,
        files=len(manifest.files),
        faults=[FileFault(path=p, expected=e, actual=a) for p, e, a in faults],
    )


async def download(request: Request[State], body: DownloadModel) -> JobStatus:
    """Start to download a model from Hugging Face, or join the download that runs."""
    job = await request.state["downloads"].start(
        body.model, revision=body.revision, files=body.files, quant=body.quant
    )
    return job.status()


async def list_downloads(request: Request[State]) -> Jobs:
    """All downloads since the start, newest first."""
    return Jobs(downloads=[job.status() for job in request.state["downloads"].jobs])


async def retrieve_download(request: Request[State]) -> JobStatus:
    """One download, file by file."""
    return request.state["downloads"].get(request.path_params["id"]).status()


async def cancel_download(request: Request[State]) -> JobStatus:
    """Stop a download and remove what it has fetched."""
    downloads = request.state["downloads"]
    job = downloads.get(request.path_params["id"])
    await downloads.cancel(job.id)
    return job.status()


async def download_events(request: Request[State]) -> Response:
    """A download's status twice a second as server-sent events, until it has ended."""
    job = request.state["downloads"].get(request.path_params["id"])
    queue = request.state["queue"]

    async def events() -> AsyncGenerator[bytes]:
        while not (job.ended.is_set() or queue.stopping):
            yield encode_event(job.status())
            with anyio.move_on_after(PROGRESS_SECONDS):
                await job.ended.wait()
        yield encode_event(job.status())

    return EventStream(events())


async def status(request: Request[State]) -> Status:
    """Memory by model, the queue, rates."""
    registry, queue = request.state["registry"], request.state["queue"]
    room, system, server = registry.guard.room(), registry.guard.meter.system(), os.getpid()
    loaded = {s.model.id: m for s in registry.slots.values() if (m := _loaded(registry, s))}
    return Status(
        version=__version__,
        pid=server,
        uptime_seconds=time.time() - request.state["started"],
        memory=MemoryStatus(
            total=system.total,
            used=system.used,
            limit=room.limit,
            rule=room.rule,
            models=room.models,
            others=room.others,
            free=room.free,
            pressure=registry.guard.pressure,
            server=registry.guard.meter.process(server).resident,
        ),
        queue=QueueStatus(outstanding=queue.outstanding, size=queue.size),
        tokens_per_second=sum(model.tokens_per_second for model in loaded.values()),
        models=loaded,
        config_error=request.state["config_file"].error,
        need_restart=request.state["config_file"].need_restart,
    )


class LogQuery(Section, frozen=True):
    lines: Annotated[int, Meta(ge=0, le=LINES_KEPT)] = 200
    follow: bool = False
    """Go on with new lines as they come."""


class TextStream(EventStream):
    media_type = "text/plain"


async def logs(request: Request[State]) -> Response:
    """The last `lines` of the log as text; with `follow=true`, then new ones as they come."""
    try:
        query = msgspec.convert(dict(request.query_params), LogQuery, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from error
    queue = request.state["queue"]
    text = request.state["log"].tail(query.lines, lambda: queue.stopping or not query.follow)
    return TextStream(text, keep_alive_seconds=math.inf)


async def show_config(request: Request[State]) -> Annotated[dict[str, Any], Config]:
    """The configuration in effect; the admin key is not shown."""
    config = request.state["registry"].config
    values: dict[str, Any] = msgspec.to_builtins(config)
    return values | {"admin_key": config.admin_key and "***"}


async def reload_config(request: Request[State]) -> Reloaded:
    """Read the configuration file again; a bad one changes nothing."""
    state = request.state
    try:
        return await state["config_file"].reload(state["registry"], state["queue"])
    except ConfigError as error:
        raise InvalidRequest(f"Nothing is changed: {error}") from error


def _model(registry: Registry, model: Model) -> AdminModel:
    slot = registry.slots.get(str(model.path)) or Slot(model)
    error = slot.error.message if slot.error else model.error
    return AdminModel(
        id=model.id,
        state=slot.state,
        kind=model.kind,
        format=model.format,
        path=str(model.path),
        publisher=model.publisher,
        repo=model.repo,
        architecture=model.architecture,
        quantization=model.quantization,
        parameters=model.parameters,
        size_bytes=model.size_bytes,
        context_length=model.context_length,
        loadable=model.usable,
        error=error,
        fallback=str(model.fallback.path) if model.fallback else None,
        removable=model.removable,
        aliases=[alias for alias, name in registry.config.aliases.items() if name == model.id],
        pinned=slot.is_pinned(registry.config),
        ttl_seconds=slot.ttl_seconds(registry.config),
        loaded=_loaded(registry, slot),
    )


def _downloading(registry: Registry, job: JobStatus) -> AdminModel:
    publisher, _, repo = job.model.partition("/")
    is_gguf = any(file.path.endswith(".gguf") for file in job.files)
    model = Model(
        id=job.model,
        path=Path(registry.config.models_dir).expanduser() / job.model,
        format="gguf" if is_gguf else "mlx",
        publisher=publisher,
        repo=repo,
        quantization=None,
        created=int(job.started_at),
        size_bytes=job.total_bytes,
        error="It is being downloaded.",
    )
    return replace(_model(registry, model), state="downloading")


def _loaded(registry: Registry, slot: Slot) -> LoadedModel | None:
    runner, estimate = slot.runner, slot.estimate
    if runner is None or runner.loaded is None or estimate is None:
        return None
    ttl = None if slot.leases else slot.ttl_seconds(registry.config)
    return LoadedModel(
        path=str(slot.using.path),
        format=slot.using.format,
        fallback_reason=slot.fallback_reason,
        engine=runner.loaded.engine,
        pid=runner.pid,
        context_length=runner.loaded.context_length,
        parallel=runner.loaded.parallel,
        features=runner.loaded.features,
        problems=slot.problems,
        padding=runner.report.padding,
        active=runner.active,
        tokens_per_second=slot.rate(),
        tokens_generated=runner.generated,
        explicit=slot.explicit,
        expires_in_seconds=None if ttl is None else slot.last_used + ttl - anyio.current_time(),
        memory=MemoryOfModel(
            weights=estimate.weights,
            kv_reserved=estimate.kv,
            kv_granted=runner.report.kv_bytes,
            kv_used=runner.report.kv_used_bytes,
            working=estimate.working,
            reserved=estimate.total,
            estimated_loaded=estimate.loaded,
            measured_loaded=slot.loaded_bytes,
            measured=slot.measure(registry.guard.meter),
            measured_peak=slot.peak_bytes,
        ),
    )
