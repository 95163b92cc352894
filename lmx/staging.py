"""What of a download is on disk, until it comes into the models folder. Blocking: for threads."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Final

import msgspec

from . import hub, inventory
from .errors import DiskFull, DownloadFailed, InvalidRequest, ModelCorrupt
from .inventory import Digest, Entry, Manifest, changed

logger = logging.getLogger(__name__)

_FOLDER: Final = ".downloads"
_RECORD: Final = ".job.json"
CHUNK_BYTES: Final = 4 * 1024**2


class Record(msgspec.Struct):
    """The job that these files belong to."""

    manifest: Manifest
    started_at: float
    """Unix seconds."""
    completed_at: float | None = None
    state: str = "downloading"
    """Or `completed`, `failed`, `cancelled`."""
    error: str | None = None


def read_records(models_dir: Path) -> list[Record]:
    """Of all downloads that are not completed."""
    found = [(file, _read_record(file)) for file in models_dir.glob(f"{_FOLDER}/*/{_RECORD}")]
    return [r for file, r in found if r and Staging(models_dir, r).path == file.parent]


def _read_record(file: Path) -> Record | None:
    try:
        record = msgspec.json.decode(file.read_bytes(), type=Record)
        hub.check_repo(record.manifest.repo)
        hub.check_paths(record.manifest.files)
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InvalidRequest) as error:
        logger.warning("%s is damaged and left alone: %s", file, error)
        return None


class Staging:
    """The folder `.downloads/<org>--<repo>`: a record, and files that are `<path>.part` until their
    hash is right. So nothing half-done is where models are looked for.
    """

    def __init__(self, models_dir: Path, record: Record) -> None:
        self.record = record
        self.manifest = record.manifest
        self.path = models_dir / _FOLDER / record.manifest.repo.replace("/", "--")
        self._models_dir = models_dir
        self._model = models_dir / record.manifest.repo

    def save(self) -> None:
        inventory.write(self.path, self.record, _RECORD)

    def missing(self, known: Manifest | None = None) -> set[str]:
        """Files that are neither here nor in the models folder as they were verified."""
        known = known or self.manifest
        return changed(self.path, known) & changed(self._model, known)

    def adopt(self) -> bool:
        """Take over what was verified before. Returns: whether all of it is in place already."""
        installed = _installed(self._model)
        for known in (installed, self._staged()):
            for path in _common(self.manifest, known) - self.missing(known):
                self.manifest.files[path] = known.files[path]
        if installed.commit != self.manifest.commit or changed(self._model, self.manifest):
            return False
        self._complete()
        return True

    def _complete(self) -> None:
        self.record.state, self.record.completed_at = "completed", time.time()

    def prepare(self, reserve_bytes: int) -> None:
        """Drop what does not belong to the job, and see that the rest of it has room."""
        root = os.path.realpath(self._models_dir)
        for folder in (self.path, self._model):
            if not Path(os.path.realpath(folder)).is_relative_to(root):
                raise DownloadFailed(f"{folder} is a link to outside of {self._models_dir}")
        kept = _common(self.manifest, self._staged()) | {_RECORD}
        for file in self.path.rglob("*"):
            path = file.relative_to(self.path).as_posix().removesuffix(".part")
            if path not in kept and not file.is_dir():
                file.unlink()
        missing = self.missing()
        parts = [self.path / f"{path}{end}" for path in missing for end in ("", ".part")]
        needed = sum(self.manifest.files[path].size for path in missing)
        needed -= sum(part.stat().st_size for part in parts if part.exists())
        self._models_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._models_dir).free
        if free < needed + reserve_bytes:
            raise DiskFull(
                f"{self.manifest.repo} needs {needed} bytes more in {self._models_dir}, but {free} "
                f"are free, of which hub.reserve_bytes keeps {reserve_bytes}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.save()

    def place(self) -> None:
        """Bring the files into the models folder."""
        for path in self.missing():
            raise DownloadFailed(f"{path} was changed before all of {self.manifest.repo} was there")
        if not self._model.exists():
            self._model.parent.mkdir(parents=True, exist_ok=True)
            inventory.write(self.path, self.manifest)
            self.path.rename(self._model)
            (self._model / _RECORD).unlink()
            self._complete()
            return
        with inventory.LOCK:
            old = _installed(self._model)
            for path in sorted(self.manifest.files, key="config.json".__eq__):
                if (self.path / path).exists():
                    (self._model / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self.path / path, self._model / path)
            new = self.manifest.files
            if old.commit != self.manifest.commit and any(p.endswith(".safetensors") for p in new):
                # Of an MLX model nothing old may stay: mlx-lm would load left-over shards too.
                for path in [p for p in old.files if not (p in new or p.endswith(".gguf"))]:
                    (self._model / path).unlink(missing_ok=True)
                    del old.files[path]
            merged = Manifest(self.manifest.repo, self.manifest.commit, old.files | new)
            inventory.write(self._model, merged)
        shutil.rmtree(self.path)
        self._complete()

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.record.state = "cancelled"

    def _staged(self) -> Manifest:
        record = _read_record(self.path / _RECORD)
        return record.manifest if record else Manifest("", "", {})


def _installed(folder: Path) -> Manifest:
    try:
        manifest = inventory.read(folder) or Manifest("", "", {})
        hub.check_paths(manifest.files)
        return manifest
    except (ModelCorrupt, InvalidRequest):  # which the download cures
        return Manifest("", "", {})


def _common(one: Manifest, other: Manifest) -> set[str]:
    """Files that are the same in both, by what the hub says of them."""
    return {
        path
        for path, entry in one.files.items()
        if (same := other.files.get(path))
        and (same.size, same.expected) == (entry.size, entry.expected)
        and (entry.expected or one.commit == other.commit)
    }


class Part:
    """A file on its way: on disk and hashed up to `position`. Blocking."""

    def __init__(self, folder: Path, path: str, entry: Entry) -> None:
        self.path, self.entry, self.position = path, entry, 0
        self._whole, self._part = folder / path, folder / f"{path}.part"
        self._part.parent.mkdir(parents=True, exist_ok=True)
        if self._whole.exists():  # but nobody vouches for it
            self._whole.replace(self._part)
        self._part.touch()
        self.file = self._part.open("r+b", buffering=0)
        self._found = self._part.stat().st_size
        self._digest = Digest(entry.size, entry.expected)

    def rehash(self) -> bool:
        """Hash some more of what was on disk already. False: that was all."""
        data = self.file.read(min(CHUNK_BYTES, self._found - self.position))
        self._add(data)
        return bool(data)

    def append(self, data: bytearray) -> None:
        if self.position + len(data) > self.entry.size:
            raise DownloadFailed(f"{self.path}: more than the {self.entry.size} bytes listed came")
        written = 0
        while written < len(data):
            written += self.file.write(memoryview(data)[written:])
        self._add(data)

    def _add(self, data: bytes | bytearray) -> None:
        self._digest.update(data)
        self.position += len(data)

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.position, self._digest = 0, Digest(self.entry.size, self.entry.expected)

    def finish(self) -> None:
        """Raises ModelCorrupt, and the file is gone, if it is not what was expected."""
        if self.entry.expected not in (None, actual := str(self._digest)):
            self.restart()
            self._part.unlink()
            raise ModelCorrupt(f"{self.path}: expected {self.entry.expected}, actual {actual}")
        os.fsync(self.file.fileno())
        self.entry.sha256 = self._digest.sha256.hexdigest()
        self.entry.mtime_ns = os.fstat(self.file.fileno()).st_mtime_ns
        self._part.replace(self._whole)
