"""GGUF embedding models through llama.cpp's C API: several inputs in one batch, pooled there."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any, Final

import llama_cpp

from ..config import KV_TOKENS, EngineSettings
from ..embedders import ENCODERS, check_gguf
from ..errors import GenerationFailed, ModelLoadFailed
from ..gguf_header import Header, read_header
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
    llama,
)

ENCODER_INPUTS: Final = 64
"""In one batch. Encoders keep nothing of an input, so more cost no memory."""

EXACT_TOKENS: Final = 2048
"""Flash attention on the CPU rounds to 16 bits, and not the same alone and in a batch. Without it
memory grows with the square of the context: 240 MB for this one, 4.5 GB for 8192 tokens."""


class GGUFEmbedding:
    tool_parser: str | None = None
    chat_template: Template | None = None
    features: frozenset[Feature] = frozenset()

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        header = read_header(path, arrays=False)  # llama.cpp may abort on a malformed file
        check_gguf(path, header.metadata)
        self._model = llama.load_model(path)
        trained: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self.context_length = min(settings.context_length or KV_TOKENS, trained)
        params = self._params(header, settings.parallel)
        self._context = None
        if not llama_cpp.llama_model_has_encoder(self._model):  # T5's kind
            self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise ModelLoadFailed(
                f"{path}: llama.cpp makes no embeddings with it: {llama.errors()}"
            )
        self._engine_bytes = llama.buffer_bytes(self._model)
        self._cache: Any = llama_cpp.llama_get_memory(self._context)
        self.dimensions: int = llama_cpp.llama_model_n_embd_out(self._model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama.read_vocabulary(self._vocab)
        self.parallel: int = params.n_seq_max
        self.engine = llama.ENGINE
        self._batch = llama_cpp.llama_batch_init(self.context_length, 0, 1)
        self._waiting: dict[int, Sequence] = {}
        """By uid, in order of arrival."""
        self._rate = PrefillRate(settings.prefill_slice_seconds)

    def _params(self, header: Header, parallel: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.embeddings = params.kv_unified = True
        params.n_ctx = params.n_batch = self.context_length
        params.n_threads = params.n_threads_batch = llama.threads()
        if self.context_length <= EXACT_TOKENS and not llama_cpp.llama_supports_gpu_offload():
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        architecture = header.get("general.architecture", str)
        encoder = architecture in ENCODERS
        params.n_seq_max = ENCODER_INPUTS if encoder else parallel
        mean, last = llama_cpp.LLAMA_POOLING_TYPE_MEAN, llama_cpp.LLAMA_POOLING_TYPE_LAST
        pooling = header.metadata.get(f"{architecture}.pooling_type") or (mean if encoder else last)
        params.pooling_type = pooling
        if encoder or pooling != last:
            params.n_ubatch = self.context_length  # a whole input is attended to and pooled at once
        return params

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        return llama.tokenize(self._vocab, text, add_special=raw)

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.uid] = sequence

    def remove(self, uid: int) -> None:
        self._waiting.pop(uid, None)

    def step(self) -> list[StepEvent]:
        """Embed the oldest inputs."""
        budget = min(self._rate.slice_tokens(decoding=True), self.context_length)
        batch: list[Sequence] = []
        tokens = 0
        for sequence in islice(self._waiting.values(), self.parallel):
            tokens += len(sequence.prompt)
            if batch and tokens > budget:
                break
            batch.append(sequence)
        for sequence in batch:
            del self._waiting[sequence.uid]
        return self._embed(batch) if batch else []

    def _embed(self, batch: list[Sequence]) -> list[StepEvent]:
        native, i = self._batch, 0
        for seq_id, sequence in enumerate(batch):
            for position, token in enumerate(sequence.prompt):
                native.token[i], native.pos[i], native.logits[i] = token, position, 1
                native.n_seq_id[i], native.seq_id[i][0] = 1, seq_id
                i += 1
        native.n_tokens = i
        if self._cache:
            llama_cpp.llama_memory_clear(self._cache, False)
        llama.log.clear()
        start = time.perf_counter()
        code: int = llama_cpp.llama_decode(self._context, native)  # encodes, for an encoder
        if code not in (0, llama.NO_SLOT, llama.BAD_BATCH):
            raise BackendBroken(f"llama_decode returned {code}: {llama.errors()}")
        if code:
            failure = GenerationFailed(f"llama.cpp failed: {llama.errors()}")
            return [SequenceFailed(sequence.uid, failure) for sequence in batch]
        vectors = [self._vector(seq_id) for seq_id in range(len(batch))]
        self._rate.measured(i, time.perf_counter() - start)
        return [VectorEvent(s.uid, vector) for s, vector in zip(batch, vectors, strict=True)]

    def _vector(self, seq_id: int) -> list[float]:
        values = llama_cpp.llama_get_embeddings_seq(self._context, seq_id)[: self.dimensions]
        length = math.hypot(*values) or 1.0
        return [value / length for value in values]

    def grant(self, kv_bytes: int) -> Memory:
        # llama.cpp has taken all it will ever take when it made the context.
        return Memory(self._engine_bytes, kv_bytes, kv_bytes)

    def use(self, features: frozenset[Feature]) -> None:
        pass

    def close(self) -> None:
        self._waiting.clear()
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
