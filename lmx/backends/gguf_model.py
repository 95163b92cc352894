"""Loading a GGUF model that generates: its weights, one context, vocabulary and template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import llama_cpp

from ..chat_template import ChatTemplate, own_template
from ..config import KV_TOKENS, EngineSettings
from ..errors import ModelLoadFailed
from ..gguf_header import read_header
from . import llama

MOVED_BYTES: Final = 2**28
"""The largest cache whose cells are kept in order, which sometimes takes as much again and holds up
everything for a tenth of a second."""

_GGML_TYPE_BF16: Final = 30


class GGUFModel:
    def __init__(self, path: Path, settings: EngineSettings, ids: int) -> None:
        """`ids`: sequences in the KV cache for each that runs, where an id costs nothing.

        Raises:
            ModelLoadFailed: names the file and the reason.
        """
        header = read_header(path, arrays=False)  # llama.cpp may abort on a malformed file
        self.context: Any = None
        self._model = llama.load_model(path)
        try:
            self._make_context(settings, ids)
            self._read_vocabulary(
                own_template(settings) or header.metadata.get("tokenizer.chat_template")
            )
        except ModelLoadFailed as error:
            self.close()
            raise ModelLoadFailed(f"{path}: {error.message}") from None
        self.engine_bytes = llama.buffer_bytes(self._model)
        self.cell_bytes = llama.cell_bytes(self.cells)
        gpu: bool = llama_cpp.llama_supports_gpu_offload()
        spare = llama_cpp.llama_n_seq_max(self.context) > self.seq_ids
        small = self.cells * self.cell_bytes <= MOVED_BYTES
        self.ordered: bool = self.by_cell and spare and small and not gpu
        stat = path.stat()
        self.name = f"{path.resolve()}\n{stat.st_size} {stat.st_mtime_ns} {llama.ENGINE} {gpu}"
        """Its path, and below what changes when its KV cache means or looks something else."""

    def _make_context(self, settings: EngineSettings, ids: int) -> None:
        if llama_cpp.llama_model_has_encoder(self._model) or llama_cpp.llama_model_is_diffusion(
            self._model
        ):
            raise ModelLoadFailed("not a decoder-only model, and no other kind is supported")
        trained: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self.context_length = min(settings.context_length or KV_TOKENS, trained)
        params = llama_cpp.llama_context_default_params()
        # A batch is no larger than the context, and takes a token of each sequence.
        params.n_ctx = max(self.context_length, settings.parallel)
        self.by_cell = llama.by_cell(self._model)
        most: int = llama_cpp.llama_max_parallel_sequences()
        self.seq_ids = settings.parallel
        if self.by_cell:
            self.seq_ids = max(settings.parallel, min(ids * settings.parallel, most - 1))
        params.n_seq_max = min(self.seq_ids + 1, most)
        params.n_outputs_max = max(params.n_seq_max, 1 + settings.draft_tokens)
        params.n_outputs_max_per_seq = 1 + settings.draft_tokens
        params.kv_unified = True
        params.swa_full = False
        params.n_threads = params.n_threads_batch = llama.threads()
        if not llama_cpp.llama_supports_gpu_offload():
            # The same answer alone and in a batch. On the CPU a row's result depends on the rest of
            # the batch in two flash attention kernels only: the one for a single row, which splits
            # the cells among the threads, and the tiled one for 64 rows or more. Both demand K and
            # V of one type, float16 or float32. With bfloat16 K neither is chosen, and rows are
            # bit-equal if a sequence's cells lie in the order of its tokens: otherwise it sums in
            # another order (and rounding the activations to 8 bits makes much of the least
            # difference). Decoding costs nothing; prefill is 6 % slower for 330 tokens, 40 % for
            # 3900.
            # On a GPU the number of rows selects the matrix kernels as well: nothing to win.
            params.type_k = _GGML_TYPE_BF16
        self.context = llama_cpp.llama_init_from_model(self._model, params)
        if not self.context:
            raise ModelLoadFailed(f"no context of {self.context_length} tokens: {llama.errors()}")
        memory = llama_cpp.llama_get_memory(self.context)
        pooling = llama_cpp.llama_pooling_type(self.context)
        if not memory or pooling != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            raise ModelLoadFailed("an embedding model, which generates no text")
        self.cells: int = llama_cpp.llama_n_ctx(self.context)

    def _read_vocabulary(self, template: object) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama.read_vocabulary(self._vocab)
        special = (llama_cpp.llama_vocab_bos(self._vocab), llama_cpp.llama_vocab_eos(self._vocab))
        texts = (
            llama_cpp.llama_vocab_get_text(self._vocab, id) if id >= 0 else b"" for id in special
        )
        bos, eos = (text.decode("utf-8", "replace") for text in texts)
        add_bos = bool(bos) and llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._bos = (special[0], bos) if add_bos else None
        self.chat_template: ChatTemplate | None = None
        if isinstance(template, str):
            self.chat_template = ChatTemplate(template, bos_token=bos, eos_token=eos)

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        # Not `add_special`, which would also add an end token where the vocabulary says so.
        tokens = [self._bos[0]] if self._bos and not text.startswith(self._bos[1]) else []
        return tokens + llama.tokenize(self._vocab, text, add_special=False)

    def close(self) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self._model)
        self.context = self._model = None
