"""From a prompt to a row: which prompts are read next, and the forward passes that read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import mlx.core as mx

from .borders import borders
from .mlx_batch import SHORT_CELLS, Drawn, Row, fit
from .mlx_cache import Cache, evaluate, extract, make_room, merge
from .mlx_head import Head
from .mlx_sampling import draw

PREFILL_ROWS: Final = 8
"""Short prompts prefilled together."""

LAST_TOKENS: Final = 256
"""At the end of prompts, read in one pass. What no logits are wanted of does without most of the
last layer (MLX is lazy), which for more tokens costs more than another pass."""
TAIL_TOKENS: Final = 8
"""What is left of longer prompts for such a pass. There a state is kept: the same prompt again must
have something to read."""
KEPT_TOKENS: Final = 64
"""A prompt with less to compute is not worth a state."""


@dataclass(slots=True, eq=False)
class Prompt:
    """A row before it joins."""

    row: Row
    followers: list[Row] = field(default_factory=list)
    """Rows with the same prompt, which begin with copies of its cache."""
    cache: Cache | None = None
    """None: not begun."""
    done: int = 0
    """Tokens in the cache, or that the prefix cache was seen to have."""
    cached: int = 0
    """Those of them that came from there."""
    stops: list[int] = field(default_factory=list)
    """Where it will be kept as a prefix; the last is its end."""
    behind: Prompt | None = None
    """It waits until that one has computed what both begin with,"""
    shared: int = 0
    """so many tokens."""

    @property
    def rows(self) -> list[Row]:
        return [self.row, *self.followers]

    @property
    def left(self) -> int:
        return self.row.length - self.done


def choose(ready: list[Prompt], budget: int, *, passed: bool, whole: bool) -> list[Prompt]:
    """Of those that wait for nothing, oldest first: the shortest, or the oldest if it was `passed`
    last time; with others that are short too. `whole`: caches need not be kept on the way."""
    oldest = ready[0]
    first, *others = sorted(ready, key=lambda p: (passed and p is not oldest, p.left))
    chosen = [first]
    for prompt in others[: PREFILL_ROWS - 1]:
        several = [*chosen, prompt]
        too_much = len(several) * max(p.left for p in several) > budget
        stops = not whole and prompt.row.length > SHORT_CELLS
        unlike = min(p.left for p in several) <= tail(several)
        if too_much or stops or unlike or not fit([p.row.length for p in several]):
            break
        chosen = several
    return chosen


def tail(chosen: list[Prompt]) -> int:
    """Tokens to leave of each for another pass; 0 if one pass may take them to their ends."""
    longest = max(prompt.left for prompt in chosen)
    return 0 if len(chosen) * longest <= LAST_TOKENS else TAIL_TOKENS


def stops(prompt: Prompt, control: frozenset[int] | None) -> list[int]:
    """Where what it has computed is kept: behind its last token, or where a cache cannot be cut and
    the `control` tokens tell messages, where these begin and near its end."""
    end = prompt.row.length
    if control is None:
        return [end]
    first = prompt.done + SHORT_CELLS  # a state is large, and little prefilled soon
    inner = [at for at in borders(prompt.row.tokens, control) if first <= at < end]
    if prompt.left > KEPT_TOKENS and not (inner and inner[-1] >= end - TAIL_TOKENS):
        inner.append(end - TAIL_TOKENS)
    return [*inner, end]


def prefill(head: Head, cache: Cache, tokens: list[int]) -> mx.array:
    """Logits [1, vocabulary] of what follows, lazy."""
    logits = head(mx.array([tokens]), make_room(cache, len(tokens)), [len(tokens) - 1])
    evaluate(cache)
    return logits


def prefill_together(
    head: Head, caches: list[Cache], prompts: list[list[int]]
) -> tuple[list[Cache], mx.array]:
    """Their caches with the prompts, which differ in length, added; logits as of `prefill`."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    merged = make_room(merge(caches), longest, exactly=True)
    if any(padding):
        for layer in merged:
            layer.prepare(lengths=lengths, right_padding=padding)
    padded = [p + [0] * n for p, n in zip(prompts, padding, strict=True)]
    logits = head(mx.array(padded), merged, [length - 1 for length in lengths])
    if any(padding):
        for layer in merged:
            layer.finalize()
    evaluate(merged)
    return [extract(merged, n) for n in range(len(caches))], logits


def draw_first(rows: list[tuple[Row, int]], logits: mx.array) -> list[Drawn]:
    """What follows the prompts of these rows, each by its row of the logits [_, vocabulary]."""
    inputs = mx.array([row.tokens[-1] for row, _ in rows], dtype=mx.uint32)
    of_rows = logits[mx.array([n for _, n in rows])]
    drawn, reports, unread = draw(of_rows, [row.draw() for row, _ in rows], inputs)
    mx.eval(drawn, unread)
    tokens: Any = drawn.tolist()
    return list(zip((row for row, _ in rows), tokens, reports, strict=True))
