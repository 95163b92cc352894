"""What a downloaded model's folder must hold: its manifest, its files. Blocking: for threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event, RLock
from typing import Annotated, Final

import msgspec

from .errors import ModelCorrupt

Commit = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")]
NAME: Final = ".lmx.json"
LOCK: Final = RLock()  # held from reading a manifest to writing it back
Fault = tuple[str, str, str]  # path, SHA-256 expected, actual one or `missing`


class Entry(msgspec.Struct):
    size: Annotated[int, msgspec.Meta(ge=0)]
    expected: str | None  # the hub's: sha256:<hex> of LFS and Xet files, git-sha1:<hex> of others
    sha256: str | None = None  # ours; None: never verified
    mtime_ns: int = 0  # when it was verified; 0: to be hashed again


class Manifest(msgspec.Struct):
    repo: str
    commit: Commit
    files: dict[str, Entry]


class Digest:
    """Hashes a file as it comes; git's hash of one is sha1(b"blob <size>\\0" + data)."""

    def __init__(self, size: int, expected: str | None) -> None:
        git = expected is not None and expected.startswith("git-sha1:")
        self.sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else None

    def update(self, data: bytes | bytearray) -> None:
        for digest in filter(None, (self.sha256, self._git)):
            digest.update(data)

    def __str__(self) -> str:
        name, digest = ("git-sha1", self._git) if self._git else ("sha256", self.sha256)
        return f"{name}:{digest.hexdigest()}"


def read(folder: Path) -> Manifest | None:
    """None: not downloaded by LMX. ModelCorrupt: the manifest is damaged."""
    try:
        return msgspec.json.decode((folder / NAME).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{folder / NAME}: {error}") from error


def write(folder: Path, content: msgspec.Struct, name: str = NAME) -> None:
    """A crash leaves the old file or the new one."""
    with LOCK:
        with (folder / f"{name}.tmp").open("wb") as file:
            file.write(msgspec.json.encode(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{name}.tmp", folder / name)


def changed(folder: Path, manifest: Manifest) -> set[str]:
    """Paths that are missing, or by size and mtime not as they were when verified."""
    paths = set(manifest.files)
    for path, entry in manifest.files.items():
        with suppress(OSError):
            stat = os.stat(folder / path)
            if (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns):
                paths.remove(path)
    return paths


def verify(folder: Path, paths: Iterable[str] | None, cancelled: Event) -> list[Fault]:
    """Hash these files of the manifest again (None: all). When cancelled: the faults so far."""
    if (manifest := read(folder)) is None:
        raise ModelCorrupt(f"{folder}: no {NAME}, so no hashes: it was not downloaded by LMX")
    found: dict[str, tuple[int, Fault]] = {}
    for path in manifest.files if paths is None else paths:
        digest, expected, mtime = hashlib.sha256(), manifest.files[path].sha256 or "", 0
        try:
            with (folder / path).open("rb", buffering=0) as file:
                mtime = os.fstat(file.fileno()).st_mtime_ns  # before: a write meanwhile shows
                while not cancelled.is_set() and (data := file.read(8 * 1024**2)):
                    digest.update(data)
            actual = digest.hexdigest()
        except OSError as error:
            actual = "missing" if isinstance(error, FileNotFoundError) else str(error)
        if cancelled.is_set():
            break
        found[path] = mtime if actual == expected else 0, (path, expected, actual)
    with LOCK:
        current = read(folder) or manifest  # a download may have come into place meanwhile
        for path, (mtime, _) in found.items():
            if current.files.get(path) == manifest.files[path]:
                current.files[path].mtime_ns = mtime
        if current != manifest:
            write(folder, current)
    return [fault for _, fault in found.values() if fault[1] != fault[2]]


def check_unchanged(
    folder: Path,
    owns: Callable[[Path], bool] = lambda file: True,
    cancelled: Event | None = None,
) -> None:
    """Hash again what is not as it was when verified, and raise ModelCorrupt if it is bad."""
    if manifest := read(folder):
        paths = {path for path in changed(folder, manifest) if owns(folder / path)}
        for path, expected, actual in verify(folder, paths, cancelled or Event()) if paths else ():
            raise ModelCorrupt(f"{folder / path}: SHA-256 should be {expected}, but is {actual}")
