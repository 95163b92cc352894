"""GGUF models through llama.cpp's C API: continuous batching over one KV cache.

One context holds `parallel` sequences in one pool of KV cells (`kv_unified`). Cells are not
reserved for answers, because most clients send no limit: a sequence starts when its prompt and a
little more fit, and when the pool runs out the youngest goes back to the queue, keeping its
sampler and its text, to be prefilled again with what it had generated.

On the CPU a sequence that has ended stays parked in its cells until they are needed: whoever takes
freed cells has its keys out of order, which rounds its sums differently (see `_make_context`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import llama_cpp
import numpy as np

from ..chat_template import ChatTemplate, own_template
from ..config import KV_TOKENS, EngineSettings
from ..errors import GenerationFailed, ModelLoadFailed
from ..gguf_header import read_header
from . import (
    BackendBroken,
    Logprobs,
    Memory,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
    llama,
)
from .gguf_sampling import forbid, new_sampler, reporter

GROWTH_CELLS: Final = 64
"""Cells beyond its tokens that a sequence must find free to start: with fewer it would soon be
preempted again, and every preemption costs a prefill."""

_GGML_TYPE_BF16: Final = 30


@dataclass(slots=True, eq=False)
class _Shared:
    """Cells that several sequences have in common: those of a prompt with several answers."""

    cells: int


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence. `tokens[:cached]` are in the KV cache under `seq_id`; with one token pending it
    decodes, with more it prefills."""

    sequence: Sequence
    tokens: list[int]
    end: int
    """Length of prompt and longest answer."""
    sampler: Any
    seq_id: int = -1
    cached: int = 0
    shared: _Shared | None = None
    leader: _Row | None = None
    """While it waits for a copy of that one's cache, which is being given the same prompt."""

    @property
    def uid(self) -> int:
        return self.sequence.uid

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def claim(self) -> int:
        claim = min(len(self.tokens) + GROWTH_CELLS, self.end)
        return claim - len(self.tokens) if self.leader else claim

    @property
    def own_cells(self) -> int:
        return self.cached - (self.shared.cells if self.shared else 0)


class GGUFBackend:
    dimensions = 0
    tool_parser: str | None = None

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        header = read_header(path, arrays=False)  # llama.cpp may abort on a malformed file
        self._context = None
        self._model = llama.load_model(path)
        self._kv_bytes = kv_bytes
        self.parallel = settings.parallel
        self.engine = llama.ENGINE
        try:
            self._make_context(settings)
            self._read_vocabulary(
                own_template(settings) or header.metadata.get("tokenizer.chat_template")
            )
        except ModelLoadFailed as error:
            self._free_native()
            raise ModelLoadFailed(f"{path}: {error.message}") from None
        self._engine_bytes = llama.buffer_bytes(self._model)

        self._batch_tokens: int = llama_cpp.llama_n_batch(self._context)
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        for i in range(self._batch_tokens):
            self._batch.n_seq_id[i] = 1
        self._batch_seq_ids = [self._batch.seq_id[i] for i in range(self._batch_tokens)]

        # Both in order of arrival, and everything running came before everything waiting.
        self._running: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._parked: deque[tuple[int, int, _Shared | None]] = deque()
        """seq_id and cells of sequences that have ended, oldest first."""
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
        params.n_threads = params.n_threads_batch = llama.threads()
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
            raise ModelLoadFailed(f"no context of {self.context_length} tokens: {llama.errors()}")
        self._cache: Any = llama_cpp.llama_get_memory(self._context)
        pooling = llama_cpp.llama_pooling_type(self._context)
        if not self._cache or pooling != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            raise ModelLoadFailed("an embedding model, which generates no text")
        self._cells: int = llama_cpp.llama_n_ctx(self._context)

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

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(
            _Row(
                sequence,
                list(sequence.prompt),
                len(sequence.prompt) + sequence.max_tokens,
                new_sampler(
                    sequence.params,
                    sequence.prompt,
                    len(self.vocabulary.tokens),
                    self.context_length,
                ),
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
        leader: _Row | None = None
        while self._waiting and len(self._running) < self.parallel:
            row = self._waiting[0]
            fresh = len(row.tokens) == len(row.sequence.prompt)
            follows = leader is not None and row.sequence.prompt is leader.sequence.prompt
            row.leader = leader if fresh and follows else None
            claims = sum(row.claim for row in self._running) - self._shared_twice()
            if self._running and claims + row.claim > self._cells:
                row.leader = None
                return
            if not self._free_seq_ids:
                self._drop_oldest_parked()
            self._waiting.popleft()
            row.seq_id = self._free_seq_ids.pop()
            self._running.append(row)
            if fresh and not row.leader:
                leader = row

    def _shared_twice(self) -> int:
        """Cells that the running rows' sizes count more often than they exist."""
        shared = [row.shared for row in self._running if row.shared]
        return sum(s.cells for s in shared) - sum(s.cells for s in set(shared))

    def _free_cells(self, wanted: int) -> int:
        """Free cells, after dropping as many parked sequences as it takes to have `wanted`."""
        while True:
            used = sum(row.own_cells for row in self._running)
            used += sum(cells for _, cells, _ in self._parked)
            shared = {row.shared for row in self._running} | {s for _, _, s in self._parked}
            used += sum(s.cells for s in shared if s)
            if self._cells - used >= wanted or not self._parked:
                return self._cells - used
            self._drop_oldest_parked()

    def _drop_oldest_parked(self) -> None:
        seq_id, _, _ = self._parked.popleft()
        llama_cpp.llama_memory_seq_rm(self._cache, seq_id, -1, -1)
        self._free_seq_ids.append(seq_id)

    def _leave(self, row: _Row) -> None:
        """Take a sequence out of the running ones, its cells parked."""
        self._running.remove(row)
        for other in self._running:
            if other.leader is row:
                other.leader = None
        self._parked.append((row.seq_id, row.own_cells, row.shared))
        row.seq_id, row.cached, row.shared, row.leader = -1, 0, None, None
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
        events.append(
            SequenceFailed(row.uid, GenerationFailed(f"llama.cpp failed: {llama.errors()}"))
        )

    # The two halves of a step are two calls of llama.cpp: prefill is then timed by itself.

    def _decode_step(self, events: list[StepEvent]) -> bool:
        """Decode a token for each prefilled sequence; whether there were any."""
        while batch := [(row, 1) for row in self._running if row.pending == 1 and not row.leader]:
            if len(batch) > self._free_cells(len(batch)):
                self._preempt_youngest()
                continue
            code = self._decode(batch)
            if code == 0:
                self._sample(batch, events)
                return True
            # The cells counted here are not all there is: sliding windows have their own.
            if code == llama.NO_SLOT and self._parked:
                self._drop_oldest_parked()
                continue
            if code == llama.NO_SLOT and len(self._running) > 1:
                self._preempt_youngest()
                continue
            for row, _ in batch:
                self._fail(row, events)
        return False

    def _prefill_slice(self, events: list[StepEvent], decoding: bool) -> None:
        slice_tokens = self._rate.slice_tokens(decoding=decoding)
        prefilling = [row for row in self._running if row.pending > 1 and not row.leader]
        wanted = sum(row.pending for row in prefilling)
        room = min(slice_tokens, self._batch_tokens, wanted)
        room = min(room, self._free_cells(room))
        batch: list[tuple[_Row, int]] = []
        # With one token pending and none cached it is a prompt of one token: it decodes.
        for row in prefilling:
            if room > 0:
                batch.append((row, min(row.pending, room)))
                room -= batch[-1][1]
        if not batch:
            if prefilling:
                self._preempt_youngest()
            return
        start = time.perf_counter()
        while code := self._decode(batch):
            row, count = batch[0]
            if code == llama.NO_SLOT and self._parked:
                self._drop_oldest_parked()
            elif len(batch) > 1:
                batch = batch[:1]
            elif code == llama.NO_SLOT and count > 1:
                batch = [(row, count // 2)]
            elif code == llama.NO_SLOT and len(self._running) > 1:
                self._preempt_youngest()
                return
            else:
                self._fail(row, events)
                return
        llama_cpp.llama_synchronize(self._context)
        self._rate.measured(sum(count for _, count in batch), time.perf_counter() - start)
        self._sample(batch, events)

    def _decode(self, batch: list[tuple[_Row, int]]) -> int:
        """Compute so many tokens of each row; 0, or NO_SLOT or BAD_BATCH, which change nothing."""
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
        llama.log.clear()
        code: int = llama_cpp.llama_decode(self._context, native)
        if code not in (0, llama.NO_SLOT, llama.BAD_BATCH):
            raise BackendBroken(f"llama_decode returned {code}: {llama.errors()}")
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
            rows = [row, *self._fork(row)]
            logprobs = self._constrain(rows, index)
            for row, reported in zip(rows, logprobs, strict=True):
                # This also makes the sampler accept the token.
                token = llama_cpp.llama_sampler_sample(row.sampler, self._context, index)
                row.tokens.append(token)
                finish: Literal["stop", "length"] | None = None
                if token in self.vocabulary.end:
                    finish = "stop"
                elif len(row.tokens) == row.end:
                    finish = "length"
                if constraint := row.sequence.constraint:
                    constraint.accept(token)
                if finish:
                    self._release(row)
                report = reported(token) if reported else None
                events.append(TokenEvent(row.uid, token, finish, report))

    def _fork(self, leader: _Row) -> list[_Row]:
        """The rows that have waited for this one's cache, each with its copy."""
        followers = [row for row in self._running if row.leader is leader]
        if followers:
            leader.shared = _Shared(leader.cached)
        for row in followers:
            llama_cpp.llama_memory_seq_cp(self._cache, leader.seq_id, row.seq_id, -1, -1)
            row.cached, row.shared, row.leader = leader.cached, leader.shared, None
        return followers

    def _constrain(self, rows: list[_Row], index: int) -> list[Callable[[int], Logprobs] | None]:
        """Leave in the logits of this place of the batch only what the rows' grammar allows; how
        to look up their logprobs, which are those before."""
        masks = [row.sequence.constraint and row.sequence.constraint.mask() for row in rows]
        asking = [row.sequence.params.logprobs for row in rows]
        if not any(masks) and all(k is None for k in asking):
            return [None] * len(rows)
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        logits = np.ctypeslib.as_array(pointer, (len(self.vocabulary.tokens),))
        reports = [None if k is None else reporter(logits, k) for k in asking]
        if masks[0]:  # the same for all: they have the same grammar, and nothing written yet
            forbid(logits, masks[0])
        return reports
