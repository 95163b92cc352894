"""A changed configuration comes into effect while the server runs. Event loop only.

The file is looked at once a second, and read when two looks have found the same change: an editor
may have emptied it and not have written yet, and an empty file means the defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
from msgspec import structs

from . import logs
from .config import Config
from .errors import ConfigError
from .inference import InferenceQueue
from .registry import Registry

logger = logging.getLogger(__name__)

NEED_RESTART: Final = frozenset(
    [
        *("host", "port", "state_file", "shutdown_grace_seconds"),
        *("log_file", "log_file_bytes", "log_format"),
        *("preload", "restore"),  # which have a meaning at start only
    ]
)
FINDS_MODELS: Final = frozenset(["models_dir", "model_roots", "models"])
"""What the models on disk are looked for by: `models` names backends."""

Stamp = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    changed: list[str]
    """Settings that hold from now on."""
    need_restart: list[str]
    """Settings that have changed in the file and are not used yet."""
    need_load: list[str]
    """Models in memory that keep other engine settings until they are loaded again."""


async def _a_second() -> None:
    await anyio.sleep(1)


class ConfigFile:
    """The file and what the command line says over it, as the server knows them.

    Made before the configuration is first read, so that no change after that is missed.
    """

    def __init__(
        self,
        path: Path | None,
        read: Callable[[], Config],
        *,
        next_look: Callable[[], Awaitable[None]] = _a_second,
    ) -> None:
        """`path` None: `read` knows no file."""
        self.read = read
        self.error: str | None = None
        """Why what the file says is not in effect."""
        self.need_restart: list[str] = []
        self._path = path
        self._next_look = next_look
        self._handled = self._stamp()
        """Of the file that was last read, whether it was good or not."""
        self._existed = self._handled is not None
        self._asked = False
        self._lock = anyio.Lock()

    def ask(self) -> None:
        """Read it at the next look, changed or not. Any thread, or a signal handler."""
        self._asked = True

    async def watch(self, registry: Registry, queue: InferenceQueue) -> None:
        last = self._handled
        while True:
            await self._next_look()
            now = await anyio.to_thread.run_sync(self._stamp, abandon_on_cancel=True)
            settled, last = now == last, now
            if self._asked or (settled and now != self._handled):
                self._asked = False
                with suppress(ConfigError):  # it is logged and shown
                    await self.reload(registry, queue)

    async def reload(self, registry: Registry, queue: InferenceQueue) -> Reloaded:
        """
        Raises:
            ConfigError: the file is gone or broken; everything stays as it is.
        """
        async with self._lock:
            try:
                new = await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True)
            except ConfigError as error:
                if self.error != str(error):
                    logger.error("the configuration stays as it is: %s", error)
                self.error = str(error)
                raise
            reloaded = apply(registry, queue, new)
            self.error, self.need_restart = None, reloaded.need_restart
        logger.info("the configuration is read: %s", ", ".join(reloaded.changed) or "as before")
        if reloaded.need_restart:
            logger.warning("used after a restart only: %s", ", ".join(reloaded.need_restart))
        if reloaded.need_load:
            logger.warning("used with their next load only: %s", ", ".join(reloaded.need_load))
        return reloaded

    def _read(self) -> Config:
        self._handled = self._stamp()
        # Without its default file the program takes the defaults: not what a deletion asks for.
        if self._handled is None and self._existed:
            raise ConfigError(f"{self._path} is gone")
        self._existed = self._handled is not None
        return self.read()

    def _stamp(self) -> Stamp | None:
        """Differs when the file has been written or replaced; None: there is none."""
        try:
            stat = None if self._path is None else self._path.stat()
        except OSError:
            return None
        return stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def apply(registry: Registry, queue: InferenceQueue, new: Config) -> Reloaded:
    """Bring into effect what can change while the server runs."""
    old, values = registry.config, structs.asdict(new)
    differing = [name for name, value in values.items() if value != getattr(old, name)]
    waiting = [name for name in differing if name in NEED_RESTART]
    config = structs.replace(new, **{name: getattr(old, name) for name in waiting})
    registry.config = config
    queue.size = config.queue_size
    if "log_level" in differing:
        logs.set_level(config)
    if not FINDS_MODELS.isdisjoint(differing):
        registry.rescan()
    need_load = []
    for slot in registry.slots.values():
        if slot.runner is not None:
            slot.runner.config = config
        if slot.engine is not None and slot.engine != config.engine_for(slot.model.id):
            need_load.append(slot.model.id)
    return Reloaded(
        changed=[name for name in differing if name not in waiting],
        need_restart=waiting,
        need_load=need_load,
    )
