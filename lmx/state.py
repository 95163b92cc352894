"""What is remembered over a restart: one small file, written whole and by rename."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import anyio
import msgspec

logger = logging.getLogger(__name__)


class Tested(msgspec.Struct):
    """What the test at load has said of a model."""

    fingerprint: str
    """Of what was tested."""
    features: list[str]
    problems: list[str]


class Remembered(msgspec.Struct):
    loaded: list[str] = []
    """Ids of the models in memory."""
    explicit: list[str] = []
    """Those of them that were loaded by hand."""
    starting: dict[str, int] = {}
    """How often in a row the server has ended while loading a model at start, by id."""
    working: dict[str, int] = {}
    """Bytes of working memory that a model's last load has really had, by path."""
    tested: dict[str, Tested] = {}
    """By path."""


class StateFile:
    def __init__(self, path: str) -> None:
        self.remembered = Remembered()
        self._path = Path(path).expanduser()
        self._lock = anyio.Lock()

    async def read(self) -> None:
        """A file that is missing or damaged means nothing is remembered: it is no configuration."""
        try:
            data = await anyio.to_thread.run_sync(self._path.read_bytes)
            self.remembered = msgspec.json.decode(data, type=Remembered)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("%s is not used: %s", self._path, error)

    async def save(self) -> None:
        async with self._lock:
            try:
                data = msgspec.json.encode(self.remembered)
                await anyio.to_thread.run_sync(self._write, data)
            except OSError as error:
                logger.error("%s cannot be written: %s", self._path, error)

    def _write(self, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # it is there for the case that the machine goes down
        os.replace(new, self._path)
