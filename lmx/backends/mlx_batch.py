"""The rows that decode together, on mlx-lm's models and KV caches: one forward pass and one sync a
step, whatever their lengths and parameters.

A step computes the next token of every row while the one before is read, so a row that ends has
been computed once in vain. A row joins with the first token of its answer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from . import Sequence
from .mlx_cache import Cache, extract, is_whole, keep_rows, make_room, merge, part, ragged
from .mlx_sampling import Drawing, Report, Sampler, draw

SHORT_CELLS: Final = 256
"""Rows up to this length share a group whatever padding that takes: mlx-lm's caches grow by it."""
MAX_PADDING: Final = 0.25


@dataclass(slots=True, eq=False)
class Row:
    """A sequence with what it needs to be put back after the batch was lost."""

    sequence: Sequence
    sampler: Sampler
    answer: list[int] = field(default_factory=list)
    drawing: Drawing | None = None
    """Once it is in the batch."""
    cells: int = 0
    """Tokens in its KV cache."""
    read: bool = False
    """Its next input has not been reported yet: it was drawn in the step before."""
    announced: bool = False
    """Its `Prefilled` was sent."""

    def draw(self) -> Drawing:
        """Make it draw on from where it is."""
        s = self.sequence
        self.drawing = Drawing(self.sampler, s.params, s.prompt, self.answer, s.constraint)
        self.read = False
        return self.drawing

    @property
    def uid(self) -> int:
        return self.sequence.uid

    @property
    def length(self) -> int:
        return len(self.sequence.prompt) + len(self.answer)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.prompt + self.answer


Drawn = tuple[Row, int, tuple[Report, int] | None]
"""A row's token, and how to look up its log-probabilities."""


@dataclass(slots=True)
class _Group:
    rows: list[Row]
    cache: Cache
    """Merged, unless there is one row only: mlx-lm is faster with a cache that has no padding."""

    def __post_init__(self) -> None:
        make_room(self.cache, 1)

    @property
    def lengths(self) -> list[int]:
        return [row.cells for row in self.rows]

    def add(self, rows: list[Row], cache: Cache) -> None:
        """Rows and their merged cache."""
        if len(self.rows) == 1:
            self.cache = make_room(merge([self.cache]), 1)
        for mine, theirs in zip(self.cache, cache, strict=True):
            mine.extend(theirs)
        make_room(self.cache, 1)
        self.rows += rows

    def keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.rows):
            return
        if len(rows) == 1:
            self.cache = make_room(extract(self.cache, rows[0]), 1)
        else:
            lengths = self.lengths
            unused = max(lengths) - max(lengths[n] for n in rows)
            keep_rows(self.cache, rows, unused)
        self.rows = [self.rows[n] for n in rows]


def fit(lengths: Collection[int]) -> bool:
    """Whether rows of these lengths may be padded to the longest."""
    longest = max(lengths)
    return longest <= SHORT_CELLS or sum(lengths) >= (1 - MAX_PADDING) * len(lengths) * longest


def place(groups: list[list[int]], length: int, *, split: bool) -> int:
    """Add the length to the group where it takes the least padding, or to a new one; which."""
    fitting = [n for n, g in enumerate(groups) if not split or fit([*g, length])]
    if not fitting:
        groups.append([length])
        return len(groups) - 1
    best = min(fitting, key=lambda n: abs(max(groups[n]) - length))
    groups[best].append(length)
    return best


class Batch:
    def __init__(self, model: Any, *, split: bool) -> None:
        """`split` keeps rows of different length in groups; without, they are padded."""
        self._model = model
        self._split = split
        self._whole = is_whole(make_prompt_cache(model))
        self._groups: list[_Group] = []
        self.rows: list[Row] = []
        """Group by group."""
        self._inputs = mx.array([], dtype=mx.uint32)
        self._reports: list[tuple[Report, int] | None] = []

    @property
    def groups(self) -> list[list[Row]]:
        return [group.rows for group in self._groups]

    def padding(self) -> float:
        """The share of the cells that holds nothing."""
        lengths = [group.lengths for group in self._groups]
        cells = sum(len(group) * max(group) for group in lengths)
        return 1 - sum(map(sum, lengths)) / cells if cells else 0.0

    def join(self, newcomers: list[tuple[Row, Cache]]) -> None:
        """Rows whose cache holds all their tokens but the last, which was reported."""
        lengths = [group.lengths for group in self._groups]
        joining: list[list[tuple[Row, Cache]]] = [[] for _ in lengths]
        for row, cache in newcomers:
            at = place(lengths, row.cells, split=self._split)
            joining += [[]] * (at == len(joining))
            joining[at] = [*joining[at], (row, cache)]
        for at, new in enumerate(joining):
            rows, caches = [row for row, _ in new], [cache for _, cache in new]
            if at >= len(self._groups):
                self._groups.append(_Group(rows, merge(caches) if len(rows) > 1 else caches[0]))
            elif rows:
                self._groups[at].add(rows, merge(caches))
        self._unite()
        self._reorder([row for row, _ in newcomers])

    def _unite(self) -> None:
        """Rows of different groups have grown, and lengths that differed once are alike now."""
        for one, other in combinations(list(self._groups), 2):
            united = self._groups.count(one) and self._groups.count(other)
            if united and self._split and fit(one.lengths + other.lengths):
                one.add(other.rows, other.cache if len(other.rows) > 1 else merge([other.cache]))
                self._groups.remove(other)

    def leave(self, gone: Collection[Row]) -> None:
        for group in self._groups:
            keep = [n for n, row in enumerate(group.rows) if row not in gone]
            if keep:
                group.keep(keep)
            else:
                group.rows = []
        self._groups = [group for group in self._groups if group.rows]
        self._reorder([])

    def _reorder(self, newcomers: list[Row]) -> None:
        """After the groups have changed."""
        rows = [row for group in self._groups for row in group.rows]
        before = {row: n for n, row in enumerate([*self.rows, *newcomers])}
        new = mx.array([row.tokens[-1] for row in newcomers], dtype=mx.uint32)
        inputs = mx.concatenate([self._inputs, new])
        reports = [*self._reports, *([None] * len(newcomers))]
        order = [before[row] for row in rows]
        self.rows = rows
        self._inputs = inputs[mx.array(order, dtype=mx.uint32)]
        # Queued before the next step, which reads them.
        mx.async_eval(self._inputs)  # type: ignore[no-untyped-call]
        self._reports = [reports[n] for n in order]

    def cache(self, row: Row) -> tuple[Cache, int]:
        """A row's part, to be read and not changed, and how many cells of padding come before."""
        group = next(group for group in self._groups if row in group.rows)
        if len(group.rows) == 1:
            return group.cache, 0
        at = group.rows.index(row)
        if self._whole:
            return part(group.cache, at), max(group.lengths) - row.cells
        return extract(group.cache, at), 0

    def step(self) -> list[Drawn]:
        """Compute a token for every row; those of the step before, with how to look up their
        log-probabilities."""
        inputs, reports = self._inputs, self._reports
        if len(self._groups) == 1:
            cache = self._groups[0].cache
        else:
            cache = ragged([g.cache for g in self._groups], [len(g.rows) for g in self._groups])
        logits = self._model(inputs[:, None], cache=cache)[:, -1, :]
        drawings = [row.drawing for row in self.rows if row.drawing]
        self._inputs, self._reports, unread = draw(logits, drawings, inputs)
        mx.async_eval(self._inputs, unread)  # type: ignore[no-untyped-call]
        tokens: Any = inputs.tolist()
        drawn: list[Drawn] = []
        for row, token, report in zip(self.rows, tokens, reports, strict=True):
            row.cells += 1
            if row.read:
                drawn.append((row, token, report))
            row.read = True
        return drawn

    @property
    def alone(self) -> Row | None:
        """The only row, if it can be guessed for: its cache can be cut, and how it draws depends
        on nothing but the logits."""
        if len(self.rows) != 1 or not self._whole:
            return None
        [row] = self.rows
        return row if row.read and row.drawing and row.drawing.free else None

    def peek(self) -> int:
        """The only row's next input."""
        token: int = self._inputs.item()  # type: ignore[assignment]
        return token

    def verify(self, guess: list[int]) -> list[int]:
        """The only row's next tokens: its input, and what follows of the guess for as long as the
        model draws the same.

        Drawing from the model at every place and keeping what agrees is exact for any way to draw:
        a token of the answer is always one drawn from the logits of the tokens before it.
        """
        [row] = self.rows
        [group] = self._groups
        tokens = [self.peek(), *guess]
        logits = self._model(mx.array([tokens]), cache=group.cache)[0]
        assert row.drawing
        drawn: Any = row.drawing.sampler.each(logits).tolist()
        right = 0
        while right < len(guess) and drawn[right] == guess[right]:
            right += 1
        for layer in group.cache:
            layer.trim(len(guess) - right)
        row.cells += right + 1
        row.drawing.sampler.drawn += right + 1
        self._inputs = mx.array(drawn[right : right + 1], dtype=mx.uint32)
        return tokens[: right + 1]
