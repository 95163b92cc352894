"""Embedding models through MLX: BERT and its like here, decoders through mlx-lm's code.

The process's main thread loads, steps and frees the model, as with all of MLX. A decoder's inputs
are padded on the right, where causal attention does not see it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from tokenizers import Tokenizer

from ..config import KV_TOKENS, EngineSettings
from ..embedders import BERT, Pooling, mlx_pooling
from ..errors import GenerationFailed, ModelLoadFailed
from ..mlx_folder import Folder, read_folder
from . import (
    BackendBroken,
    Feature,
    Memory,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    Template,
    VectorEvent,
    Vocabulary,
)
from .mlx_bert import load_bert

CACHE_BYTES: Final = 64 * 2**20
"""Every batch has its own shape: more freed buffers would only pile up (to 460 MB, for MiniLM)."""


LOOK_AHEAD: Final = 2048
"""Inputs of which those like the first in length make up a batch."""


class MLXEmbedding:
    tool_parser: str | None = None
    chat_template: Template | None = None
    features: frozenset[Feature] = frozenset()

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        mx.set_cache_limit(min(settings.mlx_cache_bytes, CACHE_BYTES))
        if settings.wired_bytes:
            mx.set_wired_limit(settings.wired_bytes)
        folder = read_folder(path)
        self._pooling = mlx_pooling(path, folder.config)
        self._tokenizer = _tokenizer(path)
        self._end: int | None = None
        """What an input must end with, whether the tokenizer adds it or not."""
        self._model: Model
        try:
            if folder.config["model_type"] in BERT:
                self._model, own = load_bert(path, folder.config)
            else:
                self._model, own = _load_decoder(path, folder)
                end = folder.config.get("eos_token_id")
                end = end[0] if isinstance(end, list) else end
                self._end = end if self._pooling.kind == "last" else None
            size = int(folder.config["vocab_size"])
            self.dimensions = int(folder.config["hidden_size"])
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            # Everything a malformed config or weight file was seen to raise.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelLoadFailed(f"{path}: {reason:.500}") from error
        self.vocabulary = _vocabulary(self._tokenizer)
        if len(self.vocabulary.tokens) > size:
            raise ModelLoadFailed(f"{path}: the tokenizer has tokens the model has no weights for")
        self.context_length = min(settings.context_length or KV_TOKENS, own)
        self.parallel = settings.parallel
        self.engine = f"mlx {version('mlx')}"
        self._rate = PrefillRate(settings.prefill_slice_seconds)
        self._waiting: dict[int, Sequence] = {}
        """By uid, in order of arrival."""

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=raw).ids
        if raw and self._end is not None and ids[-1:] != [self._end]:
            ids.append(self._end)
        return ids

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.uid] = sequence

    def remove(self, uid: int) -> None:
        self._waiting.pop(uid, None)

    def step(self) -> list[StepEvent]:
        """Embed the oldest input, with those next to it in length."""
        if not (batch := self._next_batch()):
            return []
        uids = [sequence.uid for sequence in batch]
        start = time.perf_counter()
        try:
            vectors = self._embed([sequence.prompt for sequence in batch])
        except (RuntimeError, ValueError, MemoryError) as error:
            if "[METAL]" in str(error):
                raise BackendBroken(str(error)) from error
            failure = GenerationFailed(f"The engine failed: {error}")
            return [SequenceFailed(uid, failure) for uid in uids]
        padded = len(batch) * max(len(sequence.prompt) for sequence in batch)
        self._rate.measured(padded, time.perf_counter() - start)
        return [VectorEvent(uid, vector) for uid, vector in zip(uids, vectors, strict=True)]

    def _next_batch(self) -> list[Sequence]:
        if not self._waiting:
            return []
        first = list(islice(self._waiting.values(), LOOK_AHEAD))
        length = len(first[0].prompt)
        batch: list[Sequence] = []
        longest = 0
        budget = self._rate.slice_tokens(decoding=True)
        for sequence in sorted(first, key=lambda s: abs(len(s.prompt) - length)):
            longest = max(longest, len(sequence.prompt))
            if batch and (len(batch) + 1) * longest > budget:
                break
            batch.append(sequence)
        for sequence in batch:
            del self._waiting[sequence.uid]
        return batch

    def _embed(self, inputs: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, inputs))
        tokens = mx.array([tokens + [0] * (longest - len(tokens)) for tokens in inputs])
        lengths = mx.array([len(tokens) for tokens in inputs])
        hidden = self._model(tokens, lengths).astype(mx.float32)
        vectors: Any = _pooled(hidden, lengths, self._pooling).tolist()
        return list(vectors)

    def grant(self, kv_bytes: int) -> Memory:
        held: int = mx.get_active_memory() + mx.get_cache_memory()
        held = max(held, mx.get_peak_memory())
        mx.reset_peak_memory()
        return Memory(held, 0, 0)  # there is no KV cache

    def use(self, features: frozenset[Feature]) -> None:
        pass

    def close(self) -> None:
        self._waiting.clear()
        del self._model
        gc.collect()
        mx.clear_cache()


def _pooled(hidden: mx.array, lengths: mx.array, pooling: Pooling) -> mx.array:
    """hidden: (inputs, tokens, size); the result: (inputs, size)."""
    lengths = lengths[:, None]
    inside = (mx.arange(hidden.shape[1]) < lengths)[..., None]
    if pooling.kind == "cls":
        vectors = hidden[:, 0]
    elif pooling.kind == "last":
        vectors = mx.take_along_axis(hidden, lengths[..., None] - 1, axis=1)[:, 0]
    elif pooling.kind == "max":
        vectors = mx.where(inside, hidden, -mx.inf).max(axis=1)
    else:
        vectors = mx.where(inside, hidden, 0).sum(axis=1) / lengths
    if pooling.normalize:
        vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the class of everything that the library raises
        raise ModelLoadFailed(f"{file}: {error}") from error
    # MiniLM's would cut at 128 tokens, and fill up to as many.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    names = {id: token.encode() for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary(
        tokens=[names.get(id, b"") for id in range(max(names, default=-1) + 1)],
        control=frozenset(id for id, token in added.items() if token.special),
        end=frozenset(),
    )


Model = Callable[[mx.array, mx.array], mx.array]
"""From tokens, one row an input, and their numbers to the hidden states."""


def _load_decoder(path: Path, folder: Folder) -> tuple[Model, int]:
    """The model without its head, and the longest input."""
    from mlx_lm.utils import _get_classes, load_model  # seconds, which BERT need not wait

    def classes(config: dict[str, Any]) -> tuple[type[Any], type[Any]]:
        model_class, args_class = _get_classes(config)

        class Headless(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                """Embedders are often published without the head and its `model.`."""
                if not any(name.startswith("model.") for name in weights):
                    weights = {f"model.{name}": weight for name, weight in weights.items()}
                if hasattr(super(), "sanitize"):
                    weights = super().sanitize(weights)
                if "lm_head" in self:
                    return weights
                return {n: w for n, w in weights.items() if not n.startswith("lm_head.")}

        return Headless, args_class

    tied = {"tie_word_embeddings": True}  # so no head is made
    model, _ = load_model(path, model_config=tied, get_model_classes=classes)
    inner = model.model
    return lambda tokens, lengths: inner(tokens), folder.context_length or KV_TOKENS
