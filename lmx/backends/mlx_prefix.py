"""KV caches of past prompts and answers, in memory and on disk, for one MLX model."""

from __future__ import annotations

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
        if settings.prefix_disk_bytes and self._most:
            folder = Path(settings.prefix_disk_dir)
            self._disk = PrefixFolder(folder, name, settings.prefix_disk_bytes)

    @property
    def bytes(self) -> int:
        return self._tree.bytes

    def clear(self) -> None:
        self._tree.clear()

    def evict(self, most: int) -> None:
        self._tree.evict(min(most, self._most))

    def known(self, tokens: list[int]) -> int:
        """How many of the first are in memory, all but the last at most."""
        return min(self._tree.known(tokens), len(tokens) - 1) if self.on else 0

    def find(self, tokens: list[int], room: int) -> tuple[Cache, int]:
        """A new cache with as many of the first tokens as are known, and their number: at most all
        but the last. What is on disk is read if `room` bytes hold it."""
        most = len(tokens) - 1 if self.on else 0
        found = self._tree.find(tokens, most, stateful=not self.whole)
        if self.on and self._disk and self._read(tokens, most, found.length, room):
            found = self._tree.find(tokens, most, stateful=not self.whole)
        return restored(self._network, found.pieces, found.state), found.length

    def keep(self, tokens: list[int], cache: Cache, padding: int, room: int) -> None:
        """What the cache, a sequence's own, holds of these tokens behind so much padding; unless
        that is more than `room` bytes."""
        if not self.on:
            return
        known = self._tree.known(tokens)
        if self._kv_cache.bytes(len(tokens) - known) > min(room, self._most):
            return
        here = None if self.whole else state(cache)
        new = piece(cache, padding + known, padding + len(tokens))
        self._tree.put(tokens, known, new, here)
        self.evict(room)

    def _read(self, tokens: list[int], most: int, known: int, room: int) -> bool:
        assert self._disk
        stored = self._disk.find(tokens, most, more_than=known, stateful=not self.whole)
        if stored is None:
            return False
        path, held = stored
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
        """To disk, as far as that is wanted: what was used last first."""
        if not self.on or not self._disk:
            return
        for tokens, pieces, here in self._tree.paths():
            lengths = [p[0][0].shape[2] if p else 0 for p in pieces]
            cache = restored(self._network, list(zip(pieces, lengths, strict=True)), here)
            self._disk.add(tokens, partial(_write, cache))


def _write(cache: Cache, path: Path) -> None:
    with path.open("wb") as file:
        save_prompt_cache(file, cache)
