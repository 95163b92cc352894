"""mlx-lm's KV caches: of one sequence, of several, of several that differ much in length.

mlx-lm keeps a batch as one block padded to the longest row. Here rows are kept in groups of about
equal length, and a forward pass over several groups sees `Ragged` caches: its matrix products are
of all rows together, only attention is computed group by group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    BatchKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ..kv_cache import whole_steps

Cache = list[Any]
"""By layer: of one sequence as `make_prompt_cache` makes it, or merged of several."""
Piece = list[tuple[mx.array, mx.array]]
"""K and V [1, heads, tokens, size] of a run of tokens, of each layer that keeps every token."""
State = list[Any]
"""The caches of the other layers (recurrent, sliding windows), good at one position only."""


def _leaves(cache: Iterable[Any]) -> Iterator[Any]:
    for layer in cache:
        if isinstance(layer, CacheList):
            yield from _leaves(layer.caches)
        else:
            yield layer


def can_merge(cache: Cache) -> bool:
    return all(hasattr(leaf, "merge") for leaf in _leaves(cache))


def can_save(cache: Cache) -> bool:
    """mlx-lm finds only its own classes again."""
    return all(type(leaf).__module__ == mlx_lm_cache.__name__ for leaf in _leaves(cache))


def is_whole(cache: Cache) -> bool:
    """Every layer keeps every token: the cache can be cut at any."""
    return all(type(leaf) is KVCache for leaf in _leaves(cache))


def evaluate(cache: Cache) -> None:
    mx.eval([leaf.state for leaf in _leaves(cache)])


def piece(cache: Cache, start: int, end: int) -> Piece:
    """What a sequence's cache holds of these tokens."""
    kept = (leaf for leaf in _leaves(cache) if type(leaf) is KVCache)
    return cut([(leaf.keys, leaf.values) for leaf in kept] if end > start else [], start, end)


def cut(piece: Piece, start: int, end: int) -> Piece:
    # Evaluated, or it would keep alive what it was cut from: the cache of a whole batch.
    part = [tuple(mx.contiguous(a[:, :, start:end]) for a in pair) for pair in piece]
    mx.eval(part)
    return part  # type: ignore[return-value]


def piece_bytes(piece: Piece) -> int:
    return sum(k.nbytes + v.nbytes for k, v in piece)


def state(cache: Cache) -> State:
    """A copy, which the sequence's going on does not change."""
    copies = [_copy(leaf) for leaf in _leaves(cache) if type(leaf) is not KVCache]
    evaluate(copies)
    return copies


def _copy(leaf: Any) -> Any:
    new = copy.copy(leaf)
    if (
        type(leaf) is RotatingKVCache
        and not leaf.keep
        and leaf.size()
        and leaf.keys.shape[2] > leaf.max_size
    ):
        # A slice of a prompt is there whole until the next token comes.
        new.keys, new.values = (a[:, :, -leaf.max_size :] for a in (leaf.keys, leaf.values))
        new._idx = leaf.max_size
    new.state = tree_map(lambda x: mx.contiguous(x) if isinstance(x, mx.array) else x, new.state)
    return new


def state_bytes(state: State) -> int:
    return sum(leaf.nbytes for leaf in state)


def restored(
    model: Any, pieces: Sequence[tuple[Piece, int]], state: State | None, cells: int = 0
) -> Cache:
    """A sequence's cache from the first so many tokens of each piece, and the state behind them;
    with room for so many tokens in all, in one copy."""
    cache: Cache = make_prompt_cache(model)
    states = iter(state or ())
    number = 0
    for leaf in _leaves(cache):
        if type(leaf) is not KVCache:
            if state is not None:
                leaf.state = _copy(next(states)).state
            continue
        parts = [[a[:, :, :n] for a in piece[number]] for piece, n in pieces if n]
        if parts:
            leaf.offset = sum(n for _, n in pieces)
            leaf.keys = _joined([keys for keys, _ in parts], cells - leaf.offset)
            leaf.values = _joined([values for _, values in parts], cells - leaf.offset)
        number += 1
    return cache


def _joined(parts: list[mx.array], room: int) -> mx.array:
    rows, heads, _, size = parts[0].shape
    return mx.concatenate([*parts, mx.zeros((rows, heads, max(0, room), size), parts[0].dtype)], 2)


def merge(caches: list[Cache]) -> Cache:
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def extract(cache: Cache, row: int) -> Cache:
    """A copy of one row of a merged cache."""
    return [layer.extract(row) for layer in cache]


def make_room(cache: Cache, tokens: int, *, exactly: bool = False) -> Cache:
    """For so many more, if need be in whole steps. mlx-lm grows a cache by a step, which from any
    other size is more than was counted."""
    for leaf in _leaves(cache):
        if type(leaf) not in (KVCache, BatchKVCache) or leaf.keys is None:
            continue
        cells, needed = leaf.keys.shape[2], leaf.size() + tokens
        if needed > cells:
            spare = (needed if exactly else whole_steps(needed)) - cells
            width = [(0, 0), (0, 0), (0, spare), (0, 0)]
            leaf.keys, leaf.values = mx.pad(leaf.keys, width), mx.pad(leaf.values, width)
    return cache


def keep_rows(cache: Cache, rows: list[int], unused: int) -> None:
    """Take the other rows out, and the first `unused` cells, which only they have used."""
    for leaf in _leaves(cache):
        if type(leaf) is BatchKVCache and leaf.keys is not None:
            # mlx-lm's own gathers by index, which on a CPU takes 20 times as long as to copy, and
            # waits for the step under way.
            leaf.keys = _taken(leaf.keys[:, :, unused:], rows)
            leaf.values = _taken(leaf.values[:, :, unused:], rows)
            leaf.offset = leaf.offset[rows]
            leaf.left_padding = leaf.left_padding[rows] - unused
            leaf._idx -= unused
        else:
            leaf.filter(rows)


def _taken(array: mx.array, rows: list[int]) -> mx.array:
    starts = [n for n, row in enumerate(rows) if not n or row != rows[n - 1] + 1]
    runs = zip(starts, [*starts[1:], len(rows)], strict=True)
    return mx.concatenate([array[rows[a] : rows[b - 1] + 1] for a, b in runs])


def part(cache: Cache, row: int) -> Cache:
    """One row of a merged cache, padding included, of a model whose layers keep every token."""
    return [_part(layer, row) for layer in cache]


def _part(layer: Any, row: int) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*part(layer.caches, row))
    alone = KVCache()
    alone.keys, alone.values = layer.keys[row : row + 1], layer.values[row : row + 1]
    return alone


class Parts(list[Any]):
    """Arrays of the groups of one ragged batch, in their order."""


class _RaggedKV:
    """One layer of several groups, for a step of one token a row."""

    def __init__(self, layers: Sequence[Any], sizes: Sequence[int]) -> None:
        self._layers = layers
        self._ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        self.offset = mx.concatenate([_per_row(layer.offset) for layer in layers])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        pairs = zip(mx.split(keys, self._ends[:-1]), mx.split(values, self._ends[:-1]), strict=True)
        fetched = [
            layer.update_and_fetch(k, v) for layer, (k, v) in zip(self._layers, pairs, strict=True)
        ]
        return Parts(k for k, _ in fetched), Parts(v for _, v in fetched)

    def make_mask(self, *args: Any, **kwargs: Any) -> Parts:
        return Parts(layer.make_mask(*args, **kwargs) for layer in self._layers)


class _RaggedState:
    """The same of mlx-lm's ArraysCache."""

    lengths = left_padding = None

    def __init__(self, layers: Sequence[Any], sizes: Sequence[int]) -> None:
        self._layers = layers
        self._sizes = sizes

    def __getitem__(self, index: int) -> mx.array | None:
        parts = [layer[index] for layer in self._layers]
        known = next((part for part in parts if part is not None), None)
        if known is None:  # prompts of one token, all of them
            return None
        for n, part in enumerate(parts):
            if part is None:
                parts[n] = mx.zeros((self._sizes[n], *known.shape[1:]), known.dtype)
        return mx.concatenate(parts)

    def __setitem__(self, index: int, value: mx.array) -> None:
        ends = [sum(self._sizes[: n + 1]) for n in range(len(self._sizes) - 1)]
        for layer, part in zip(self._layers, mx.split(value, ends), strict=True):
            layer[index] = part

    def make_mask(self, length: int) -> None:
        return None

    def advance(self, tokens: int) -> None:
        pass


def _per_row(offset: mx.array | int) -> mx.array:
    return mx.array([offset]) if isinstance(offset, int) else offset


def ragged(groups: Sequence[Cache], sizes: Sequence[int]) -> Cache:
    """The caches of groups of so many rows as one, for a step."""
    return [_ragged(layers, sizes) for layers in zip(*groups, strict=True)]


def _ragged(layers: Sequence[Any], sizes: Sequence[int]) -> Any:
    if isinstance(layers[0], CacheList):
        return CacheList(*ragged([layer.caches for layer in layers], sizes))
    if hasattr(layers[0], "update_and_fetch"):
        return _RaggedKV(layers, sizes)
    return _RaggedState(layers, sizes)


_attention: Callable[..., mx.array] = base.scaled_dot_product_attention


def _ragged_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: Any = None,
) -> mx.array:
    if not isinstance(keys, Parts):
        return _attention(queries, keys, values, cache, scale, mask, sinks)
    masks = mask if isinstance(mask, Parts) else [mask] * len(keys)
    outputs, start = [], 0
    for k, v, m in zip(keys, values, masks, strict=True):
        rows = queries[start : start + k.shape[0]]
        outputs.append(_attention(rows, k, v, None, scale, m, sinks))
        start += k.shape[0]
    return mx.concatenate(outputs)


# mlx-lm's models take this function from here when they are imported, which `load_model` does.
# Those that attend by other means cannot run ragged; the test at load finds that out.
base.scaled_dot_product_attention = _ragged_attention
