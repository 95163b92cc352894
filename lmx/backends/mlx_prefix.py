"""KV caches of past prompts and answers, in memory and on disk, for one MLX model."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from ..config import EngineSettings
from ..kv_cache import KVCacheSize
from ..prefix_folder import PrefixFolder
from .mlx_cache import (
    Cache,
    Piece,
    State,
    can_save,
    cut,
    evaluate,
    is_whole,
    piece,
    piece_bytes,
    restored,
    state,
    state_bytes,
)
from .prefix_tree import PrefixTree

logger = logging.getLogger(__name__)


class Prefixes:
    """What is not `on` keeps nothing and knows nothing."""

    def __init__(
        self, network: Any, name: str, kv_cache: KVCacheSize, settings: EngineSettings
    ) -> None:
        self.on = True
        self.whole = is_whole(make_prompt_cache(network))
        """A cache can be cut anywhere; otherwise only what was kept is there to begin with."""
        self._network = network
        self._kv_cache = kv_cache
        self._tree = PrefixTree[Piece, State](cut, piece_bytes, state_bytes)
        most = settings.prefix_cache_bytes
        self._most = sys.maxsize if most is None else most
        self._disk: PrefixFolder | None = None
        self._disk_bytes = settings.prefix_disk_bytes
        if self._disk_bytes and self._most and can_save(make_prompt_cache(network)):
            folder = Path(settings.prefix_disk_dir)
            self._disk = PrefixFolder(folder, name, self._disk_bytes)

    @property
    def bytes(self) -> int:
        return self._tree.bytes

    def clear(self) -> None:
        self._tree.clear()

    def evict(self, most: int) -> None:
        self._tree.evict(min(most, self._most))

    def known(self, tokens: list[int]) -> int:
        """How many of the first are in memory, all but the last at most."""
        most = len(tokens) - 1 if self.on else 0
        return self._tree.known(tokens, most, stateful=not self.whole)

    def find(self, tokens: list[int], room: int, *, cells: int = 0) -> tuple[Cache, int]:
        """A new cache with as many of the first tokens as are known, at most all but the last, and
        room for `cells` in all; their number. What is on disk is read if `room` bytes hold it."""
        most = len(tokens) - 1 if self.on else 0
        found = self._tree.find(tokens, most, stateful=not self.whole)
        if self.on and self._disk and self._read(tokens, most, found.length, room):
            found = self._tree.find(tokens, most, stateful=not self.whole)
        return restored(self._network, found.pieces, found.state, cells), found.length

    def keep(self, tokens: list[int], cache: Cache, padding: int, room: int) -> None:
        """What the cache, a sequence's own, holds of these tokens behind so much padding; unless
        that is more than `room` bytes."""
        known = self._tree.known(tokens)
        if not (self.on and self._holds(len(tokens) - known, room)):
            return
        try:
            here = None if self.whole else state(cache)
            new = piece(cache, padding + known, padding + len(tokens))
            self._tree.put(tokens, known, new, here)
        except Exception as error:
            if "[METAL]" in str(error):
                raise
            logger.warning("A prefix is not kept: %s", error)  # the answer does not need it
        self.evict(room)

    def _holds(self, tokens: int, room: int) -> bool:
        return self._kv_cache.bytes(tokens) <= min(room, self._most)

    def _read(self, tokens: list[int], most: int, known: int, room: int) -> bool:
        assert self._disk
        stored = self._disk.find(tokens, most, more_than=known, stateful=not self.whole)
        if stored is None:
            return False
        path, held = stored
        if not self._holds(len(held), room):
            return False
        try:
            # MLX tells the format by the end of the name that the file says it has.
            with open(".safetensors", "rb", opener=lambda _, flags: os.open(path, flags)) as file:
                cache = load_prompt_cache(file)
                evaluate(cache)
        except FileNotFoundError:
            return False
        self.keep(held, cache, 0, room)
        return True

    def save(self) -> None:
        """To disk, as far as that is wanted: of what was used last as much as fits."""
        if not self.on or not self._disk:
            return
        left, chosen = self._disk_bytes, []
        for tokens, pieces, here in self._tree.paths():
            size = sum(map(piece_bytes, pieces)) + state_bytes(here or [])
            if size <= left:
                left -= size
                chosen.append((tokens, pieces, here))
        while chosen:  # the last first: of two files the folder gives up the one written earlier
            tokens, pieces, here = chosen.pop()
            self._disk.add(tokens, partial(self._write, pieces, here))

    def _write(self, pieces: list[Piece], here: State | None, path: Path) -> None:
        lengths = [p[0][0].shape[2] if p else 0 for p in pieces]
        cache = restored(self._network, list(zip(pieces, lengths, strict=True)), here)
        with path.open("wb") as file:
            save_prompt_cache(file, cache)
