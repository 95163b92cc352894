"""GGUF models through llama.cpp's C API: continuous batching over one KV cache.

One context holds `parallel` sequences in one pool of KV cells (`kv_unified`). Cells are not
reserved for answers, because most clients send no limit: a sequence starts when its prompt and a
little more fit, and when the pool runs out the youngest goes back to the queue, keeping its
sampler and its text, to be prefilled again with what it had generated.

On the CPU a sequence that has ended stays parked in its cells until they are needed: whoever takes
freed cells has its keys out of order, which rounds its sums differently (see `_make_context`).
"""

from __future__ import annotations

import codecs
import ctypes
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import llama_cpp
import psutil

from ..chat_template import ChatTemplate, own_template
from ..config import KV_TOKENS, EngineSettings
from ..errors import GenerationFailed, ModelLoadFailed
from ..generation import SamplingParams
from ..gguf_header import read_header
from . import (
    BackendBroken,
    Memory,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
)

GROWTH_CELLS: Final = 64
"""Cells beyond its tokens that a sequence must find free to start: with fewer it would soon be
preempted again, and every preemption costs a prefill."""

DEFAULT_SEED: Final = 0xFFFFFFFF
"""llama.cpp's LLAMA_DEFAULT_SEED: draw one."""

_NO_SLOT: Final = 1
_BAD_BATCH: Final = -1

_GGML_TYPE_BF16: Final = 30
_LOG_INFO: Final = 2
_LOG_ERROR: Final = 4

# llama.cpp has one log per process. Its lines say why a load or a step failed, and how large its
# buffers are, which the C API does not tell. ctypes needs the callback kept alive.
_log: Final[deque[tuple[int, str]]] = deque(maxlen=1000)


def _keep(level: int, text: bytes, _: object) -> None:
    if _LOG_INFO <= level <= _LOG_ERROR:
        _log.append((level, text.decode("utf-8", "replace").strip()))


_log_callback: Final = llama_cpp.llama_log_callback(_keep)


def _errors() -> str:
    lines = dict.fromkeys(text for level, text in _log if level == _LOG_ERROR)
    return "; ".join(lines) or "no reason given"


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence. `tokens[:cached]` are in the KV cache under `seq_id`; with one token pending it
    decodes, with more it prefills."""

    uid: int
    tokens: list[int]
    end: int
    """Length of prompt and longest answer."""
    sampler: Any
    text: codecs.IncrementalDecoder
    seq_id: int = -1
    cached: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def claim(self) -> int:
        return min(len(self.tokens) + GROWTH_CELLS, self.end)


class GGUFBackend:
    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        header = read_header(path, arrays=False)  # llama.cpp may abort on a malformed file
        llama_cpp.llama_log_set(_log_callback, None)
        llama_cpp.llama_backend_init()
        _log.clear()
        self._context = None
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ModelLoadFailed(f"{path}: {_errors()}")
        self._kv_bytes = kv_bytes
        self.parallel = settings.parallel
        self.engine = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        try:
            self._make_context(settings)
            self._read_vocabulary(
                own_template(settings) or header.metadata.get("tokenizer.chat_template")
            )
        except ModelLoadFailed as error:
            self._free_native()
            raise ModelLoadFailed(f"{path}: {error.message}") from None
        sizes = (re.search(r"buffer size =\s*([\d.]+) MiB", text) for _, text in _log)
        self._engine_bytes: int = max(
            int(sum(float(size[1]) for size in sizes if size) * 2**20),
            llama_cpp.llama_model_size(self._model),
        )

        self._batch_tokens: int = llama_cpp.llama_n_batch(self._context)
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        for i in range(self._batch_tokens):
            self._batch.n_seq_id[i] = 1
        self._batch_seq_ids = [self._batch.seq_id[i] for i in range(self._batch_tokens)]
        self._piece = ctypes.create_string_buffer(256)

        # Both in order of arrival, and everything running came before everything waiting.
        self._running: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._parked: deque[tuple[int, int]] = deque()
        """seq_id and number of cells of sequences that have ended, oldest first."""
        self._free_seq_ids = list(range(self._seq_ids))
        self._rate = PrefillRate(settings.prefill_slice_seconds)

    def _make_context(self, settings: EngineSettings) -> None:
        if llama_cpp.llama_model_has_encoder(self._model) or llama_cpp.llama_model_is_diffusion(
            self._model
        ):
            raise ModelLoadFailed("not a decoder-only model, and no other kind is supported")
        trained: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self.context_length = min(settings.context_length or KV_TOKENS, trained)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context_length
        # Parked sequences need ids, which are for nothing only where memory is by the cell.
        self._parks = not (
            llama_cpp.llama_supports_gpu_offload()
            or llama_cpp.llama_model_is_recurrent(self._model)
            or llama_cpp.llama_model_is_hybrid(self._model)
            or llama_cpp.llama_model_n_swa(self._model) > 0
        )
        most: int = llama_cpp.llama_max_parallel_sequences()
        ids = min(2 * settings.parallel, most) if self._parks else settings.parallel
        params.n_seq_max = params.n_outputs_max = self._seq_ids = ids
        params.kv_unified = True
        params.swa_full = False
        params.n_threads = params.n_threads_batch = _threads()
        if not llama_cpp.llama_supports_gpu_offload():
            # The same answer alone and in a batch. On the CPU a row's result depends on the rest of
            # the batch in two flash attention kernels only: the one for a single row, which splits
            # the cells among the threads, and the tiled one for 64 rows or more. Both demand K and
            # V of one type, float16 or float32. With bfloat16 K neither is chosen, and rows are
            # bit-equal until a sequence gets cells that another had before (sums then run in
            # another order, and rounding the activations to 8 bits makes much of the least
            # difference). Decoding costs nothing; prefill is 6 % slower for 330 tokens, 40 % for
            # 3900.
            # On a GPU the number of rows selects the matrix kernels as well: nothing to win.
            params.type_k = _GGML_TYPE_BF16
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelLoadFailed(f"no context of {self.context_length} tokens: {_errors()}")
        self._cache: Any = llama_cpp.llama_get_memory(self._context)
        pooling = llama_cpp.llama_pooling_type(self._context)
        if not self._cache or pooling != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            raise ModelLoadFailed("an embedding model, which generates no text")
        self._cells: int = llama_cpp.llama_n_ctx(self._context)

    def _read_vocabulary(self, template: object) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        texts: list[bytes] = [
            llama_cpp.llama_vocab_get_text(self._vocab, i) for i in range(self.vocabulary_size)
        ]
        # A token's text in the vocabulary is at least as long as the bytes it stands for.
        self.longest_token = max(map(len, texts))
        ids = (llama_cpp.llama_vocab_bos(self._vocab), llama_cpp.llama_vocab_eos(self._vocab))
        bos, eos = (texts[i].decode("utf-8", "replace") if i >= 0 else "" for i in ids)
        add_bos = bool(bos) and llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._bos = (ids[0], bos) if add_bos else None
        self.chat_template: ChatTemplate | None = None
        if isinstance(template, str):
            self.chat_template = ChatTemplate(template, bos_token=bos, eos_token=eos)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        # Not `add_special`, which would also add an end token where the vocabulary says so.
        tokens = [self._bos[0]] if self._bos and not text.startswith(self._bos[1]) else []
        size = len(data) + 2
        while True:
            buffer = (ctypes.c_int32 * size)()
            count: int = llama_cpp.llama_tokenize(
                self._vocab, data, len(data), buffer, size, False, True
            )
            if count >= 0:
                return tokens + buffer[:count]
            size = -count

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(
            _Row(
                sequence.uid,
                list(sequence.prompt),
                len(sequence.prompt) + sequence.max_tokens,
                self._sampler(sequence.params, sequence.prompt),
                codecs.getincrementaldecoder("utf-8")("replace"),
            )
        )

    def remove(self, uid: int) -> None:
        for row in [*self._running, *self._waiting]:
            if row.uid == uid:
                self._release(row)

    def step(self) -> list[StepEvent]:
        events: list[StepEvent] = []
        self._admit()
        decoding = self._decode_step(events)
        self._prefill_slice(events, decoding)
        return events

    def grant(self, kv_bytes: int) -> Memory:
        # llama.cpp has taken all it will ever take when it made the context.
        return Memory(self._engine_bytes, self._kv_bytes, self._kv_bytes)

    def close(self) -> None:
        for row in [*self._running, *self._waiting]:
            self._release(row)
        llama_cpp.llama_batch_free(self._batch)
        self._free_native()

    def _free_native(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    # Which sequences run.

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.parallel:
            claims = sum(row.claim for row in self._running)
            if self._running and claims + self._waiting[0].claim > self._cells:
                return
            if not self._free_seq_ids:
                self._drop_oldest_parked()
            row = self._waiting.popleft()
            row.seq_id = self._free_seq_ids.pop()
            self._running.append(row)

    def _free_cells(self, wanted: int) -> int:
        """Free cells, after dropping as many parked sequences as it takes to have `wanted`."""
        while True:
            used = sum(row.cached for row in self._running) + sum(n for _, n in self._parked)
            if self._cells - used >= wanted or not self._parked:
                return self._cells - used
            self._drop_oldest_parked()

    def _drop_oldest_parked(self) -> None:
        seq_id, _ = self._parked.popleft()
        llama_cpp.llama_memory_seq_rm(self._cache, seq_id, -1, -1)
        self._free_seq_ids.append(seq_id)

    def _leave(self, row: _Row) -> None:
        """Take a sequence out of the running ones, its cells parked."""
        self._running.remove(row)
        self._parked.append((row.seq_id, row.cached))
        row.seq_id, row.cached = -1, 0
        while self._parked and not (self._parks and self._running):
            self._drop_oldest_parked()
        if not self._running:
            # From the first cell on, the same requests get the same answers again.
            llama_cpp.llama_memory_clear(self._cache, False)

    def _preempt_youngest(self) -> None:
        row = self._running[-1]
        self._leave(row)
        self._waiting.appendleft(row)

    def _release(self, row: _Row) -> None:
        if row.seq_id >= 0:
            self._leave(row)
        else:
            self._waiting.remove(row)
        llama_cpp.llama_sampler_free(row.sampler)

    def _fail(self, row: _Row, events: list[StepEvent]) -> None:
        self._release(row)
        events.append(SequenceFailed(row.uid, GenerationFailed(f"llama.cpp failed: {_errors()}")))

    # The two halves of a step are two calls of llama.cpp: prefill is then timed by itself.

    def _decode_step(self, events: list[StepEvent]) -> bool:
        """Decode a token for each prefilled sequence; whether there were any."""
        while batch := [(row, 1) for row in self._running if row.pending == 1]:
            if len(batch) > self._free_cells(len(batch)):
                self._preempt_youngest()
                continue
            code = self._decode(batch)
            if code == 0:
                self._sample(batch, events)
                return True
            # The cells counted here are not all there is: sliding windows have their own.
            if code == _NO_SLOT and self._parked:
                self._drop_oldest_parked()
                continue
            if code == _NO_SLOT and len(self._running) > 1:
                self._preempt_youngest()
                continue
            for row, _ in batch:
                self._fail(row, events)
        return False

    def _prefill_slice(self, events: list[StepEvent], decoding: bool) -> None:
        slice_tokens = self._rate.slice_tokens(decoding=decoding)
        wanted = sum(row.pending for row in self._running if row.pending > 1)
        room = min(slice_tokens, self._batch_tokens, wanted)
        room = min(room, self._free_cells(room))
        batch: list[tuple[_Row, int]] = []
        for row in self._running:
            # With one token pending and none cached it is a prompt of one token: it decodes.
            if room > 0 and row.pending > 1:
                batch.append((row, min(row.pending, room)))
                room -= batch[-1][1]
        if not batch:
            if any(row.pending > 1 for row in self._running):
                self._preempt_youngest()
            return
        start = time.perf_counter()
        while code := self._decode(batch):
            row, count = batch[0]
            if code == _NO_SLOT and self._parked:
                self._drop_oldest_parked()
            elif len(batch) > 1:
                batch = batch[:1]
            elif code == _NO_SLOT and count > 1:
                batch = [(row, count // 2)]
            elif code == _NO_SLOT and len(self._running) > 1:
                self._preempt_youngest()
                return
            else:
                self._fail(row, events)
                return
        llama_cpp.llama_synchronize(self._context)
        self._rate.measured(sum(count for _, count in batch), time.perf_counter() - start)
        self._sample(batch, events)

    def _decode(self, batch: list[tuple[_Row, int]]) -> int:
        """Compute so many tokens of each row; 0, _NO_SLOT or _BAD_BATCH, which change nothing."""
        native = self._batch
        tokens, positions, outputs = native.token, native.pos, native.logits
        i = 0
        for row, count in batch:
            for position in range(row.cached, row.cached + count):
                tokens[i] = row.tokens[position]
                positions[i] = position
                self._batch_seq_ids[i][0] = row.seq_id
                outputs[i] = 0
                i += 1
            outputs[i - 1] = count == row.pending
        native.n_tokens = i
        _log.clear()
        code: int = llama_cpp.llama_decode(self._context, native)
        if code not in (0, _NO_SLOT, _BAD_BATCH):
            raise BackendBroken(f"llama_decode returned {code}: {_errors()}")
        if code == 0:
            for row, count in batch:
                row.cached += count
        return code

    def _sample(self, batch: list[tuple[_Row, int]], events: list[StepEvent]) -> None:
        """The next token of every row of the batch just computed that has no token pending."""
        index = -1
        for row, count in batch:
            index += count
            if row.pending:
                continue
            # This also makes the sampler accept the token.
            token = llama_cpp.llama_sampler_sample(row.sampler, self._context, index)
            row.tokens.append(token)
            finish: Literal["stop", "length"] | None = None
            data = b""
            if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                finish = "stop"
            else:
                data = self._token_bytes(token)
                if len(row.tokens) == row.end:
                    finish = "length"
            text = row.text.decode(data, final=finish is not None)
            if finish:
                self._release(row)
            events.append(TokenEvent(row.uid, text, finish))

    def _token_bytes(self, token: int) -> bytes:
        """Control tokens have none; the space before a first word is kept."""
        while True:
            size = len(self._piece)
            count: int = llama_cpp.llama_token_to_piece(
                self._vocab, token, self._piece, size, 0, False
            )
            if count >= 0:
                data: bytes = self._piece.raw[:count]
                return data
            self._piece = ctypes.create_string_buffer(-count)

    def _sampler(self, params: SamplingParams, prompt: list[int]) -> Any:
        """llama.cpp's own samplers, in the order of the fields of SamplingParams."""
        # llama.cpp's default is without performance counters.
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            llama_cpp.llama_sampler_chain_add(chain, sampler)

        def penalties(repetition: float, frequency: float, presence: float) -> Any:
            # The window is as long as the context: all tokens count.
            return llama_cpp.llama_sampler_init_penalties(
                self.vocabulary_size, self.context_length, repetition, frequency, presence
            )

        if biases := params.logit_bias:
            array = (llama_cpp.llama_logit_bias * len(biases))(*biases.items())
            add(llama_cpp.llama_sampler_init_logit_bias(self.vocabulary_size, len(biases), array))
        if params.repetition_penalty != 1:
            sampler = penalties(params.repetition_penalty, 0, 0)
            for token in prompt:
                llama_cpp.llama_sampler_accept(sampler, token)
            add(sampler)
        if params.presence_penalty or params.frequency_penalty:
            add(penalties(1, params.frequency_penalty, params.presence_penalty))
        if params.temperature == 0:
            add(llama_cpp.llama_sampler_init_greedy())
            return chain
        if params.top_k > 0:
            add(llama_cpp.llama_sampler_init_top_k(min(params.top_k, self.vocabulary_size)))
        if params.top_p < 1:
            add(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            add(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
        add(llama_cpp.llama_sampler_init_temp(params.temperature))
        # Folds any integer into 32 bits, and never onto DEFAULT_SEED.
        seed = DEFAULT_SEED if params.seed is None else params.seed % DEFAULT_SEED
        add(llama_cpp.llama_sampler_init_dist(seed))
        return chain


def _threads() -> int:
    """Two threads on one core only hinder each other."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        return min(cores, len(os.sched_getaffinity(0)))
    return cores
