"""The sequences of a GGUF model's batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from . import Sequence
from .gguf_snapshots import State
from .llama import Ids

GROWTH_CELLS: Final = 64
"""Cells beyond its tokens that a sequence must find free to start: with fewer it would soon be
preempted again, and every preemption costs a prefill."""


@dataclass(slots=True, eq=False)
class Row:
    """A sequence. `tokens[:cached]` are in the KV cache under `seq_id`; with one token pending it
    decodes, with more it prefills."""

    sequence: Sequence
    tokens: list[int]
    end: int
    """Length of prompt and longest answer."""
    sampler: Any
    ids: Ids
    """What prefixes are found by: the tokens it had when it was queued."""
    first: bool
    """The first of those that share its prompt, and the one that counts what of it was cached."""
    borders: list[int]
    """Lengths at which its state is kept for others."""
    seq_id: int = -1
    cached: int = 0
    hit: int | None = None
    """Tokens it found cached when it started."""
    announced: bool = False
    leader: Row | None = None
    """While it waits for `share` tokens of that one's cache, which is being prefilled."""
    share: int = 0

    @property
    def uid(self) -> int:
        return self.sequence.uid

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def claim(self) -> int:
        return min(len(self.tokens) + GROWTH_CELLS, self.end)

    @property
    def needs(self) -> int:
        """Of the claim, the cells still to be found."""
        return self.claim - (self.share if self.leader else self.cached)


@dataclass(slots=True)
class Prefix:
    """Where a sequence finds the beginning of its tokens."""

    length: int = 0
    seq_id: int = -1
    running: bool = False
    """Its cells count already, as those of a running sequence."""
    leader: Row | None = None
    """It will have the tokens, but has not computed them yet."""
    state: State | None = None
    """Of no sequence that is there."""
