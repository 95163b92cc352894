"""GGUF models through llama.cpp's C API: continuous batching over one KV cache.

One context holds `parallel` sequences in one pool of KV cells (`kv_unified`). Cells are not
reserved for answers, because most clients send no limit: a sequence starts when its prompt and a
little more fit, and when the pool runs out the youngest goes back to the queue, keeping its
sampler and its text, to be prefilled again with what it had generated.

A sequence that has ended stays parked in its cells until they are needed, and whoever begins with
the same tokens shares them. A prompt that begins like another one which is being prefilled waits
for that part of it.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final, Literal

import llama_cpp
import numpy as np

from ..config import EngineSettings
from ..errors import GenerationFailed, ModelLoadFailed
from ..prefix_folder import PrefixFolder
from . import (
    Drafted,
    Feature,
    Memory,
    Prefilled,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
    llama,
)
from .borders import borders
from .gguf_cells import Cells, common
from .gguf_draft import DraftModel, Repeats
from .gguf_model import GGUFModel
from .gguf_rows import Prefix, Row
from .gguf_sampling import forbid, new_sampler, reporter
from .gguf_snapshots import Snapshots
from .lookup import Pays

IDS: Final = 4
"""Sequences in the KV cache for each that runs, where an id costs nothing."""

SNAPSHOT_BYTES: Final = 2**28
"""Where the settings leave it open, as these are outside of what llama.cpp has reserved."""

WAIT_TOKENS: Final = 32
"""A prompt waits for another's prefill if that saves it at least so many."""


class GGUFBackend:
    dimensions = 0
    tool_parser: str | None = None

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        self._model = GGUFModel(path, settings, IDS)
        self._kv_bytes = kv_bytes
        self._engine_bytes = self._model.engine_bytes
        self._parallel = self.parallel = settings.parallel
        self.engine = llama.ENGINE
        self.context_length = self._model.context_length
        self.vocabulary = self._model.vocabulary
        self.chat_template = self._model.chat_template
        self.tokenize = self._model.tokenize
        self._context = self._model.context
        self._batch = llama.Batch(self._context)
        cells, budget = self._model.cells, settings.prefix_cache_bytes
        keep = budget // self._model.cell_bytes if budget else cells
        ids, ordered = self._model.seq_ids, self._model.ordered
        self._cells = Cells(self._context, cells, ids, keep, ordered=ordered)
        self._by_cell = self._model.by_cell

        self._snapshots = Snapshots(self._context, SNAPSHOT_BYTES if budget is None else budget)
        able: set[Feature] = {"batch", "ragged"}
        if budget != 0:
            able.add("prefix")
        self._disk: PrefixFolder | None = None
        self._disk_bytes = settings.prefix_disk_bytes
        if budget != 0 and self._by_cell and self._disk_bytes:
            folder = Path(settings.prefix_disk_dir).expanduser()
            self._disk = PrefixFolder(folder, self._model.name, self._disk_bytes)
        self._draft_tokens = settings.draft_tokens if self._by_cell else 0
        self._guesses: Repeats | DraftModel = Repeats()
        if self._draft_tokens:
            able.add("draft")
            if settings.draft_model:
                try:
                    self._guesses = DraftModel(
                        Path(settings.draft_model), self.vocabulary, self.context_length
                    )
                except ModelLoadFailed:
                    self._free()
                    raise
                self._engine_bytes += self._guesses.engine_bytes
        self._able = self.features = frozenset(able)
        self._pays = Pays()

        # Both in order of arrival, and everything running came before everything waiting.
        self._running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._rate = PrefillRate(settings.prefill_slice_seconds)
        self._overtaken = False
        """The last slice of prefill passed by the sequence that came first."""

    def add(self, sequence: Sequence) -> None:
        prompt = sequence.prompt
        vocabulary = len(self.vocabulary.tokens)
        others = [*self._running, *self._waiting]
        keeps = "prefix" in self.features and not self._by_cell
        self._waiting.append(
            Row(
                sequence,
                list(prompt),
                len(prompt) + sequence.max_tokens,
                new_sampler(sequence.params, prompt, vocabulary, self.context_length),
                np.array(prompt, np.int32),
                all(row.sequence.prompt is not prompt for row in others),
                borders(prompt, self.vocabulary.control) if keeps else [],
            )
        )

    def remove(self, uid: int) -> None:
        for row in [*self._running, *self._waiting]:
            if row.uid == uid:
                self._release(row)

    def step(self) -> list[StepEvent]:
        events: list[StepEvent] = []
        self._admit()
        decoding = self._speculate(events) or self._decode_step(events)
        self._prefill_slice(events, decoding)
        return events

    def grant(self, kv_bytes: int) -> Memory:
        # llama.cpp has taken all it will ever take when it made the context.
        return Memory(self._engine_bytes + self._snapshots.bytes, self._kv_bytes, self._kv_bytes)

    def use(self, features: frozenset[Feature]) -> None:
        self.features = features & self._able
        self.parallel = self._parallel if "batch" in features else 1
        self._cells.drop_parked()
        self._snapshots.clear()
        self._pays = Pays()

    def close(self) -> None:
        for row in [*self._waiting, *reversed(self._running)]:  # those that wait for others first
            self._release(row)
        if self._disk and "prefix" in self.features:
            self._spill(self._disk)
        self._free()

    def _spill(self, disk: PrefixFolder) -> None:
        """Write what was used last, as far as the budget goes, and that last."""
        chosen, left = [], self._disk_bytes
        for seq_id, ids in reversed(self._cells.parked.items()):
            if (size := llama.state_bytes(self._context, seq_id)) <= left:
                chosen.append((seq_id, ids))
                left -= size
        for seq_id, ids in reversed(chosen):
            disk.add(ids.tolist(), partial(llama.save, self._context, seq_id, ids))

    def _free(self) -> None:
        self._guesses.close()
        self._batch.free()
        self._model.close()

    # Which sequences run.

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.parallel:
            row = self._waiting[0]
            prefix = self._find(row)
            if self._running:
                held = self._cells.held(other.seq_id for other in self._running)
                held += sum(other.needs for other in self._running)
                ready = prefix.length if prefix.running else 0
                if held + row.claim - ready > self._cells.size:
                    return
            self._waiting.popleft()
            row.seq_id = self._cells.take()
            # It may be the one that the prefix had.
            self._begin(row, self._find(row) if row.seq_id == prefix.seq_id else prefix)
            self._running.append(row)

    def _find(self, row: Row) -> Prefix:
        """The longest that another sequence has, or will have if that is worth waiting for."""
        most = len(row.tokens) - 1
        ids = row.ids[:most]
        cached, coming, gain = Prefix(), Prefix(), WAIT_TOKENS
        if "prefix" in self.features and self._by_cell:
            cached.seq_id, cached.length = self._cells.find(ids)
        elif "prefix" in self.features:
            cached.length, cached.state = self._snapshots.find(row.tokens, most)
        for other in takewhile(lambda other: other is not row, self._running):
            twin = other.sequence.prompt is row.sequence.prompt
            if not twin and "prefix" not in self.features:
                continue
            length = common(ids, other.ids)
            if length > max(other.cached, coming.length):
                coming = Prefix(length, other.seq_id, True, other)
                gain = 1 if twin else WAIT_TOKENS
            ready = min(length, other.cached)
            if ready >= cached.length and (self._by_cell or ready == other.cached):
                cached = Prefix(ready, other.seq_id, True)
        return coming if coming.length - cached.length >= gain else cached

    def _begin(self, row: Row, prefix: Prefix) -> None:
        row.leader, row.share = prefix.leader, prefix.length
        if not row.leader:
            self._take(row, prefix)
            self._restore(row)

    def _take(self, row: Row, prefix: Prefix) -> None:
        """Let it begin with another sequence's cache."""
        row.leader, row.cached = None, prefix.length
        if prefix.state:
            if self._snapshots.restore(row.seq_id, prefix.state):
                self._cells.grow(row.seq_id, prefix.length)
            else:
                self._cells.cut(row.seq_id, 0)  # a part of it may be there
                row.cached = 0
        elif prefix.length:
            self._cells.copy(prefix.seq_id, row.seq_id, prefix.length)
        if row.hit is None:
            row.hit = row.cached

    def _restore(self, row: Row) -> None:
        """Let it begin with what the disk has, if that is more and nobody has to wait for it."""
        if not self._disk or "prefix" not in self.features:
            return
        if any(other.announced for other in self._running):
            return
        most = len(row.tokens) - 1
        found = self._disk.find(row.tokens, most, more_than=row.cached + WAIT_TOKENS)
        path, tokens = found or (Path(), [])
        held = self._cells.held(other.seq_id for other in self._running if other is not row)
        if tokens and held + len(tokens) <= self._cells.size:
            self._cells.cut(row.seq_id, 0)
            row.cached = 0
            self._cells.room(len(tokens))
            if llama.restore(self._context, path, row.seq_id, len(tokens)):
                self._cells.grow(row.seq_id, len(tokens))
                row.cached = common(row.ids[:most], np.array(tokens, np.int32))
            self._cells.cut(row.seq_id, row.cached)
            row.hit = row.cached

    def _leave(self, row: Row) -> None:
        """Take a sequence out of the running ones, and keep what it has as a prefix."""
        self._running.remove(row)
        keeps, tokens = "prefix" in self.features, row.tokens[: row.cached]
        if keeps and self._by_cell:
            self._cells.park(row.seq_id, tokens)
        else:
            if keeps and row.announced:
                self._snapshots.keep(row.seq_id, tokens)
            self._cells.release(row.seq_id)
        row.seq_id, row.cached, row.leader = -1, 0, None
        for other in self._running:
            # A leader that has just lost its own may begin with more than another waits for.
            if (leader := other.leader) and (leader is row or leader.cached >= other.share):
                self._begin(other, self._find(other))

    def _preempt_youngest(self) -> None:
        row = self._running[-1]
        self._leave(row)
        row.ids = np.array(row.tokens, np.int32)
        self._waiting.appendleft(row)

    def _release(self, row: Row) -> None:
        if row.seq_id >= 0:
            self._leave(row)
        else:
            self._waiting.remove(row)
        llama_cpp.llama_sampler_free(row.sampler)

    def _fail(self, row: Row, events: list[StepEvent]) -> None:
        self._release(row)
        events.append(
            SequenceFailed(row.uid, GenerationFailed(f"llama.cpp failed: {llama.errors()}"))
        )

    # The two halves of a step are two calls of llama.cpp: prefill is then timed by itself.

    def _decode_step(self, events: list[StepEvent]) -> bool:
        """Decode a token for each prefilled sequence; whether there were any."""
        while batch := [(row, 1) for row in self._running if row.pending == 1 and not row.leader]:
            if len(batch) > self._cells.room(len(batch)):
                self._preempt_youngest()
                continue
            start = time.perf_counter()
            code = self._decode(batch)
            if code == 0:
                self._sample(batch, events)
                if len(batch) == 1:
                    self._pays.plain(time.perf_counter() - start)
                return True
            # The cells counted here are not all there is: sliding windows have their own.
            if code == llama.NO_SLOT and self._cells.parked:
                self._cells.drop_oldest()
                continue
            if code == llama.NO_SLOT and len(self._running) > 1:
                self._preempt_youngest()
                continue
            for row, _ in batch:
                self._fail(row, events)
        return False

    def _speculate(self, events: list[StepEvent]) -> bool:
        """Decode several tokens for a sequence that runs alone; False if they cannot be guessed."""
        if not ("draft" in self.features and len(self._running) == 1 and self._pays.worth):
            return False
        row = self._running[0]
        if self._waiting or not row.announced or row.pending > 1:
            return False
        start = time.perf_counter()
        most = min(self._draft_tokens, self._pays.length, row.end - len(row.tokens) - 1)
        most = min(most, self._cells.room(1 + most) - 1)
        guess = self._guesses.propose(row.tokens, most) if most > 0 else []
        if not guess or self._decode([(row, 1)], guess):
            return False
        drawn: list[StepEvent] = []
        finished, accepted = False, 0
        # Drawn one by one from what the model makes of all that was right so far, so every token is
        # what it would have been without a guess, a random one as well.
        for place, guessed in enumerate([*guess, -1]):
            finished = self._draw(row, place, drawn)
            if row.tokens[-1] != guessed:
                break
            accepted += 1
            if finished:
                break
        row.cached += accepted
        self._cells.cut(row.seq_id, row.cached)
        events += [Drafted(row.uid, len(guess), accepted), *drawn]
        if finished:
            self._release(row)
        self._pays.guessed(time.perf_counter() - start, len(guess), len(drawn))
        return True

    def _prefill_slice(self, events: list[StepEvent], decoding: bool) -> None:
        # With one token pending and none cached it is a prompt of one token: it decodes.
        prefilling = [row for row in self._running if row.pending > 1 and not row.leader]
        context = max((row.cached for row in prefilling), default=0)
        slice_tokens = self._rate.slice_tokens(context, decoding=decoding)
        wanted = sum(row.pending for row in prefilling)
        room = min(slice_tokens, self._batch.size, wanted)
        room = min(room, self._cells.room(room))
        batch = self._slice(prefilling, room)
        if not batch:
            if prefilling:
                self._preempt_youngest()
            return
        start = time.perf_counter()
        while code := self._decode(batch):
            row, count = batch[0]
            if code == llama.NO_SLOT and self._cells.parked:
                self._cells.drop_oldest()
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
        tokens = sum(count for _, count in batch)
        contexts = sum(count * (row.cached - count / 2) for row, count in batch)
        self._rate.measured(tokens, time.perf_counter() - start, contexts / tokens)
        for row, _ in batch:
            if row.cached in row.borders:
                self._snapshots.keep(row.seq_id, row.tokens[: row.cached])
        self._sample(batch, events)
        for row in self._running:
            if (leader := row.leader) and leader.cached == row.share:
                self._take(row, Prefix(row.share, leader.seq_id))

    def _slice(self, prefilling: list[Row], room: int) -> list[tuple[Row, int]]:
        """How many tokens of which prompts come next: those that fit in whole, or up to where
        another waits for them, shortest first, and every other time the one that came first,
        whatever its length."""
        ends = {row: len(row.tokens) for row in prefilling}
        for other in self._running:
            if other.leader in ends:
                ends[other.leader] = min(ends[other.leader], other.share)
        order = prefilling
        if not self._overtaken:
            order = sorted(prefilling, key=lambda row: min(ends[row] - row.cached, room + 1))
        batch: list[tuple[Row, int]] = []
        for row in order:
            stops = [border for border in row.borders if border > row.cached]
            if count := min(min([ends[row], *stops]) - row.cached, room):
                batch.append((row, count))
                room -= count
        self._overtaken = bool(batch) and prefilling[0] is not batch[0][0]
        return batch

    def _decode(self, batch: list[tuple[Row, int]], guess: list[int] | None = None) -> int:
        """Compute so many tokens of each row, and of a single row what is guessed to follow; 0, or
        NO_SLOT or BAD_BATCH, which change nothing."""
        self._batch.clear()
        guess = guess or []
        for row, count in batch:
            tokens = row.tokens[row.cached : row.cached + count] + guess
            self._batch.add(row.seq_id, row.cached, tokens)
            if count == row.pending:
                self._batch.want(1 + len(guess))
        code = self._batch.decode()
        if code == 0:
            for row, count in batch:
                self._cells.grow(row.seq_id, count + len(guess))
                row.cached += count
        return code

    def _sample(self, batch: list[tuple[Row, int]], events: list[StepEvent]) -> None:
        """The next token of every row of the batch just computed that has no token pending."""
        place = -1
        for row, count in batch:
            place += count
            if not row.pending and self._draw(row, place, events):
                self._release(row)

    def _draw(self, row: Row, place: int, events: list[StepEvent]) -> bool:
        """The next token, from the logits at this place of the batch; whether it was the last."""
        if not row.announced:
            row.announced = True
            events.append(Prefilled(row.uid, (row.hit or 0) if row.first else 0))
        constraint, k = row.sequence.constraint, row.sequence.params.logprobs
        mask, report = constraint and constraint.mask(), None
        if mask or k is not None:
            pointer = llama_cpp.llama_get_logits_ith(self._context, place)
            logits = np.ctypeslib.as_array(pointer, (len(self.vocabulary.tokens),))
            report = None if k is None else reporter(logits, k)
            if mask:
                forbid(logits, mask)
        # This also makes the sampler accept the token.
        token = llama_cpp.llama_sampler_sample(row.sampler, self._context, place)
        row.tokens.append(token)
        finish: Literal["stop", "length"] | None = None
        if token in self.vocabulary.end:
            finish = "stop"
        elif len(row.tokens) == row.end:
            finish = "length"
        if constraint:
            constraint.accept(token)
        events.append(TokenEvent(row.uid, token, finish, report and report(token)))
        return finish is not None
