"""Guessing ahead for a GGUF model: from what its text repeats, or by a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np

from ..errors import ModelLoadFailed
from ..gguf_header import read_header
from . import Vocabulary, llama
from .gguf_cells import common
from .lookup import Lookup

SAME_TOKENS: Final = 1000
"""At the beginning of two vocabularies, which are the same if these and their sizes are,"""
PADDING_TOKENS: Final = 128
"""but for so many that pad one of them, as between sizes of Qwen2.5; llama.cpp's own limit."""

CATCH_UP_TOKENS: Final = 256
"""Of the text before the one to guess, read at a time."""


class Repeats:
    """Guesses by a `Lookup` in the text that is asked about, while that grows."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._lookup = Lookup([])
        self._seen = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """`tokens` is the same list, grown, as long as it is the same text."""
        if tokens is self._tokens:
            self._lookup.extend(tokens[self._seen :])
        else:
            self._tokens, self._lookup = tokens, Lookup(tokens)
        self._seen = len(tokens)
        return self._lookup.propose(most)

    def close(self) -> None:
        pass


class DraftModel:
    """Guesses by a second model in the process, whose cache holds the text asked about last."""

    def __init__(self, path: Path, vocabulary: Vocabulary, context_length: int) -> None:
        """
        Raises:
            ModelLoadFailed: it cannot be loaded, or cannot guess for this vocabulary.
        """
        read_header(path, arrays=False)  # llama.cpp may abort on a malformed file
        self._model = llama.load_model(path)
        self._context: Any = None
        try:
            self._check(vocabulary)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = context_length
            params.n_outputs_max = 1
            params.n_threads = params.n_threads_batch = llama.threads()
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            if not self._context:
                raise ModelLoadFailed(f"no context of {context_length} tokens: {llama.errors()}")
        except ModelLoadFailed as error:
            llama_cpp.llama_model_free(self._model)
            raise ModelLoadFailed(f"draft model {path}: {error.message}") from None
        self.engine_bytes = llama.buffer_bytes(self._model)
        self._batch = llama.Batch(self._context)
        self._greedy = llama_cpp.llama_sampler_init_greedy()
        self._known = len(vocabulary.tokens)
        self._tokens: list[int] = []
        self._seen = 0
        """Of these tokens, those known to be in the cache."""
        self._cached: list[int] = []

    def _check(self, vocabulary: Vocabulary) -> None:
        if not llama.by_cell(self._model):
            raise ModelLoadFailed("its memory cannot take back tokens")
        own = llama.read_vocabulary(llama_cpp.llama_model_get_vocab(self._model))
        ours, theirs = len(vocabulary.tokens), len(own.tokens)
        if abs(ours - theirs) > PADDING_TOKENS:
            raise ModelLoadFailed(f"a vocabulary of {theirs} tokens, and the model's has {ours}")
        if own.tokens[:SAME_TOKENS] != vocabulary.tokens[:SAME_TOKENS]:
            raise ModelLoadFailed("its vocabulary has other tokens than the model's")

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Nothing while there is more to read than can be read in the time of a step. `tokens` is
        the same list, grown, as long as it is the same text."""
        known = self._seen if tokens is self._tokens else 0
        known += common(
            np.array(self._cached[known:], np.int32), np.array(tokens[known:], np.int32)
        )
        self._tokens, self._seen = tokens, min(known, len(tokens) - 1)
        del self._cached[self._seen :]
        cache = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(cache, 0, self._seen, -1)
        unread = tokens[self._seen :]
        if len(unread) > CATCH_UP_TOKENS:
            self._read(unread[:CATCH_UP_TOKENS])
            return []
        guess: list[int] = []
        while len(guess) < most and self._read(guess[-1:] or unread):
            token = llama_cpp.llama_sampler_sample(self._greedy, self._context, -1)
            if token >= self._known:
                break
            guess.append(token)
        return guess

    def _read(self, tokens: list[int]) -> bool:
        self._batch.clear()
        self._batch.add(0, len(self._cached), tokens)
        self._batch.want(1)
        if self._batch.decode():
            return False
        self._cached += tokens
        return True

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._greedy)
        self._batch.free()
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
