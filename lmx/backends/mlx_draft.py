"""Guessing ahead for an MLX model by a smaller one."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Final

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..config import EngineSettings
from ..errors import ModelLoadFailed
from . import Vocabulary
from .mlx_cache import is_whole
from .mlx_head import Head
from .mlx_model import MLXModel
from .mlx_prefill import prefill
from .prefix_tree import common

CATCH_UP_TOKENS: Final = 256
"""Of the text before the one to guess, read at a time."""


class DraftModel:
    """Its KV cache holds the text that it was asked about last."""

    def __init__(self, path: Path, settings: EngineSettings, vocabulary: Vocabulary) -> None:
        """
        Raises:
            ModelLoadFailed: it cannot be loaded, or cannot guess for this vocabulary.
        """
        model = MLXModel(path, settings)
        if model.vocabulary.tokens != vocabulary.tokens:
            raise ModelLoadFailed(f"draft model {path}: it has another vocabulary")
        self._network, self._head = model.network, Head(model.network)
        self._kv_cache = model.kv_cache
        self._cache = make_prompt_cache(self._network)
        self._cached: list[int] = []
        self._most = 0
        """Tokens its cache has grown to: trimmed, it takes as much as before."""
        if not is_whole(self._cache):
            raise ModelLoadFailed(f"draft model {path}: its KV cache cannot take back tokens")

    @property
    def kv_bytes(self) -> int:
        return self._kv_cache.bytes(self._most)

    def missing_bytes(self, tokens: int) -> int:
        """What its KV cache would grow by for a text of so many."""
        return max(0, self._kv_cache.bytes(tokens) - self.kv_bytes)

    def forget(self) -> None:
        """What it has read, and give back the memory."""
        self._cache = make_prompt_cache(self._network)
        self._cached, self._most = [], 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """How the text goes on; nothing while there is too much of it to be read first."""
        same = common(array("i", self._cached), tokens, 0, len(tokens) - 1)
        for layer in self._cache:
            layer.trim(len(self._cached) - same)
        self._cached = tokens[:-1]
        unread = tokens[same:-1]
        read = len(tokens) + most - 1 if len(unread) <= CATCH_UP_TOKENS else same + CATCH_UP_TOKENS
        self._most = max(self._most, read)
        if len(unread) > CATCH_UP_TOKENS:
            self._cached = tokens[: same + CATCH_UP_TOKENS]
            prefill(self._head, self._cache, unread[:CATCH_UP_TOKENS])
            return []
        if unread:
            prefill(self._head, self._cache, unread)
        guess: list[int] = []
        token = mx.array(tokens[-1:])
        for _ in range(most):
            token = mx.argmax(self._network(token[None], cache=self._cache)[:, -1, :], axis=-1)
            guess.append(token.item())  # type: ignore[arg-type]
        self._cached = tokens + guess[:-1]
        return guess
