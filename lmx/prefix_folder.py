"""KV caches of past prompts on disk, to be found by the tokens they are for.

Each has two files: what the engine has written, and the tokens with the SHA-256 of both. Their
names tell the model. Several processes may use a folder: a file comes by rename, and one that has
vanished was not worth keeping. Blocking: for a thread that may wait.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from .backends.prefix_tree import common

logger = logging.getLogger(__name__)

_FILE: Final = re.compile(r"([0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{32})\.(prefix|tokens|new\d+)")
"""Nothing else in the folder is touched. `new`: being written, by the process with this id."""
_DIGEST_BYTES: Final = 32


class PrefixFolder:
    def __init__(self, folder: Path, model: str, budget: int) -> None:
        """Of the prefixes in the folder, `model`'s are looked at. Its first line is its path, and
        the lines after it change when what is kept of it can no longer be used: that is deleted.
        All models' files together take at most `budget` bytes, and while one is written, that one
        more."""
        self._folder = folder
        self._budget = budget
        own = _name(model.partition("\n")[0])
        self._model = f"{own}-{_name(model)}"
        self._stored: dict[str, tuple[array[int], bytes]] = {}
        """Tokens, and the SHA-256 of these and the file."""
        for stem in self._files():
            if stem.startswith(self._model):
                self._read(stem)
            elif stem.startswith(own):
                self._delete(stem)
        self._evict(budget)

    def find(
        self, tokens: list[int], most: int, *, more_than: int = 0, stateful: bool = False
    ) -> tuple[Path, list[int]] | None:
        """The file that saves most of a prompt, and the tokens it is for, which may go on
        differently; it is what was written. It must have more than `more_than` of the prompt's
        first `most` tokens, as nothing else is worth reading it; half of its own must be among
        them, and with `stateful` all. It may vanish before it is opened."""
        most = min(most, len(tokens))
        useful = []
        for stem, (stored, _) in self._stored.items():
            length, shared = len(stored), common(stored, tokens, 0, most)
            if shared > more_than and shared >= (length if stateful else length / 2):
                useful.append((shared, -length, stem))
        for _, _, stem in sorted(useful, reverse=True):
            if self._intact(stem):
                return self._path(stem), self._stored[stem][0].tolist()
            self._delete(stem)
        return None

    def add(self, tokens: list[int], write: Callable[[Path], None]) -> None:
        """Keep what `write` writes to the file it is given, unless it is there already. If the disk
        does not take it, it is not kept."""
        held = array("i", tokens)
        stem = f"{self._model}-{hashlib.sha256(held).hexdigest()[:32]}"
        path, new = self._path(stem), self._path(stem, f"new{os.getpid()}")
        try:
            if stem in self._stored and path.exists():
                return os.utime(path)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create(new)
            write(new)
            sha256 = _sha256(new, held)
            about = sha256 + held.tobytes()
            size = new.stat().st_size + len(about)
            if size <= self._budget:
                self._evict(self._budget - size, spare=stem)
                new.replace(path)
                _create(new, about)
                new.replace(self._path(stem, "tokens"))
                self._stored[stem] = held, sha256
        except OSError as error:
            logger.warning("A prefix is not kept on disk: %s", error)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def _path(self, stem: str, suffix: str = "prefix") -> Path:
        return self._folder / f"{stem}.{suffix}"

    def _files(self) -> dict[str, tuple[int, int]]:
        """When each was used and its bytes, by the stem of its files' names."""
        found: dict[str, tuple[int, int]] = {}
        with suppress(OSError):  # a folder that cannot be read holds nothing
            for file in os.scandir(self._folder):
                if match := _FILE.fullmatch(file.name):
                    used, size = found.get(match[1], (0, 0))
                    with suppress(FileNotFoundError):
                        stat = file.stat(follow_symlinks=False)
                        found[match[1]] = max(used, stat.st_mtime_ns), size + stat.st_size
        return found

    def _read(self, stem: str) -> None:
        try:
            about = self._path(stem, "tokens").read_bytes()
            tokens = array("i", about[_DIGEST_BYTES:])
            self._stored[stem] = tokens, about[:_DIGEST_BYTES]
        except FileNotFoundError:
            pass  # it is being written
        except ValueError:
            self._delete(stem)

    def _intact(self, stem: str) -> bool:
        """Whether it is what was written. If so, it counts as used."""
        tokens, sha256 = self._stored[stem]
        with suppress(OSError):  # gone, or nothing that can be read
            if _sha256(self._path(stem), tokens) == sha256:
                os.utime(self._path(stem))
                return True
            logger.warning("%s is damaged and deleted", self._path(stem))
        return False

    def _evict(self, most: int, spare: str = "") -> None:
        """Delete those used longest ago, until the others take at most so many bytes."""
        files = self._files()
        files.pop(spare, None)
        total = sum(size for _, size in files.values())
        for stem in sorted(files, key=files.__getitem__):
            if total <= most:
                break
            self._delete(stem)
            total -= files[stem][1]

    def _delete(self, stem: str) -> None:
        self._stored.pop(stem, None)
        for path in self._folder.glob(f"{stem}.*"):
            path.unlink(missing_ok=True)


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _create(path: Path, data: bytes = b"") -> None:
    """Before anybody writes to it, so that nobody else can read it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def _sha256(path: Path, tokens: array[int]) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(tokens)).digest()
