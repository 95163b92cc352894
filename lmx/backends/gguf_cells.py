"""Which sequence holds which cells of llama.cpp's KV cache, those that have ended included.

llama.cpp does not tell how many cells are free, and one cell can belong to several sequences. So
what each has is mirrored here, and every change to the cache but new tokens is made here.

On the CPU, how a sequence's sums are rounded depends on the order of its cells, and llama.cpp fills
the first cell that is free. So there cells are not freed one by one, but left dead, until the pool
is full to its end and everything in it moves together: new tokens always come behind all others.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import llama_cpp
import numpy as np

from . import BackendBroken
from .llama import Ids, errors

CHUNK: Final = 256
"""Cells taken from parked sequences at a time: taken one by one they would be as scattered."""
LEAST: Final = 16
"""Tokens worth keeping."""
MOVED: Final = 3 / 4
"""Of the pool, at most, when everything in it moves: it shall not move again soon."""


def common(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


@dataclass(slots=True, eq=False)
class _Span:
    """Neighbouring tokens' cells that the same sequences hold."""

    cells: int
    holders: int


class Cells:
    """The pool. A sequence's id is taken, grows with its tokens, and is parked or released."""

    def __init__(self, context: Any, size: int, ids: int, keep: int, *, ordered: bool) -> None:
        """`keep`: at most so many cells belong to parked sequences alone. `ordered`: every
        sequence's are to be in the order of its tokens; the id above `ids` is for the dead."""
        self.size = size
        self.used = 0
        self.dead = 0
        self.free_ids = list(range(ids))
        self._context = context
        self._cache = llama_cpp.llama_get_memory(context)
        self._grave = ids if ordered else None
        self._newest = (-1, 0)
        """Who has grown last, and from what length."""
        self._keep = keep
        self._spans: dict[int, list[_Span]] = {}
        """By the id of each sequence."""
        self.parked: OrderedDict[int, Ids] = OrderedDict()
        """Tokens of sequences that have ended, by id, least recently used first."""

    def take(self) -> int:
        if not self.free_ids:
            self.drop_oldest()
        seq_id = self.free_ids.pop()
        self._spans[seq_id] = []
        return seq_id

    def grow(self, seq_id: int, tokens: int) -> None:
        """llama.cpp has computed so many."""
        spans = self._spans[seq_id]
        self._newest = seq_id, sum(span.cells for span in spans)
        self.used += tokens
        if spans and spans[-1].holders == 1:
            spans[-1].cells += tokens
        else:
            spans.append(_Span(tokens, 1))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, begin with `length` tokens of the source's."""
        llama_cpp.llama_memory_seq_cp(self._cache, source, target, 0, length)
        self._newest = (-1, 0)  # what has grown last may be another's now as well
        spans = self._spans[source]
        self._spans[target] = spans[: self._split(spans, length)]
        for span in self._spans[target]:
            span.holders += 1

    def cut(self, seq_id: int, length: int) -> None:
        """Leave so many tokens."""
        newest, before = self._newest
        die = self._grave is not None and (seq_id != newest or length < before)
        if die:
            llama_cpp.llama_memory_seq_cp(self._cache, seq_id, self._grave, length, -1)
        llama_cpp.llama_memory_seq_rm(self._cache, seq_id, length, -1)
        spans = self._spans[seq_id]
        at = self._split(spans, length)
        for span in spans[at:]:
            span.holders -= 1
            if not span.holders:
                self.used -= span.cells
                self.dead += span.cells if die else 0
        del spans[at:]

    def _split(self, spans: list[_Span], length: int) -> int:
        """How many of the spans hold the first `length` tokens, after splitting one for it."""
        for at, span in enumerate(spans):
            if length <= 0:
                return at
            if length < span.cells:
                rest = _Span(span.cells - length, span.holders)
                span.cells = length
                for holder in self._spans.values():
                    if span in holder:
                        holder.insert(holder.index(span) + 1, rest)
                return at + 1
            length -= span.cells
        return len(spans)

    def release(self, seq_id: int) -> None:
        self.cut(seq_id, 0)
        self.parked.pop(seq_id, None)
        del self._spans[seq_id]
        self.free_ids.append(seq_id)
        if not self._spans:
            # From the first cell on, the same requests get the same answers again.
            llama_cpp.llama_memory_clear(self._cache, False)
            self.dead = 0

    def held(self, seq_ids: Iterable[int]) -> int:
        """Cells of these sequences together."""
        return sum(s.cells for s in {s for seq_id in seq_ids for s in self._spans[seq_id]})

    # Parked sequences.

    def park(self, seq_id: int, tokens: list[int]) -> None:
        """Keep a sequence that has ended, until its cells or its id are needed."""
        self._park(seq_id, np.array(tokens, np.int32))
        most = self._keep + self.held(self._spans.keys() - self.parked.keys())
        while self.used > most:
            self._shrink_oldest(self.used - most)

    def _park(self, seq_id: int, mine: Ids) -> None:
        """Unless it is not worth it, or another has the same; it replaces those it goes beyond."""
        if len(mine) < LEAST:
            return self.release(seq_id)
        for other, theirs in list(self.parked.items()):
            length = common(mine, theirs)
            if length == len(mine):
                self.parked.move_to_end(other)
                return self.release(seq_id)
            if length == len(theirs):
                self.release(other)
        self.parked[seq_id] = mine

    def find(self, tokens: Ids) -> tuple[int, int]:
        """The parked sequence that begins most like these tokens, and how many it has of them."""
        best = max(
            ((common(tokens, theirs), seq_id) for seq_id, theirs in self.parked.items()),
            default=(0, -1),
        )
        if best[0]:
            self.parked.move_to_end(best[1])
        return best[1], best[0]

    def room(self, wanted: int) -> int:
        """Free cells, after taking from parked sequences what it needs to have `wanted`."""
        while self.parked and self.size - self.used < wanted:
            self._shrink_oldest(max(CHUNK, wanted - (self.size - self.used)))
        if self.dead and self.size - self.used - self.dead < wanted:
            self._move_together()
        return self.size - self.used - self.dead

    def _move_together(self) -> None:
        while self.parked and self.used > MOVED * self.size:
            self._shrink_oldest(CHUNK)
        if not self.dead:
            return  # that was all, and it has been cleared
        llama_cpp.llama_memory_seq_rm(self._cache, self._grave, -1, -1)
        self.dead = 0
        # What is read back from a state lies without gaps, as it lay before.
        size: int = llama_cpp.llama_state_get_size(self._context)
        state = (ctypes.c_uint8 * size)()
        written: int = llama_cpp.llama_state_get_data(self._context, state, size)
        read: int = llama_cpp.llama_state_set_data(self._context, state, written)
        if not 0 < read == written:
            raise BackendBroken(f"the KV cache could not be moved: {errors()}")

    def _shrink_oldest(self, cells: int) -> None:
        seq_id, tokens = next(iter(self.parked.items()))
        length = len(tokens) - cells
        if length < LEAST:
            return self.release(seq_id)
        self.cut(seq_id, length)
        self.parked[seq_id] = tokens[:length]

    def drop_oldest(self) -> None:
        self.release(next(iter(self.parked)))

    def drop_parked(self) -> None:
        while self.parked:
            self.drop_oldest()
