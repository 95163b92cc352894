"""What was computed for the prompts of the past, by their tokens: a radix tree. No I/O, no engine.

Prompts that begin alike share what they begin with, however they branch. All work is linear in the
prompt's length, and compared is in C.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

P = TypeVar("P")
S = TypeVar("S")

_SLICE: Final = 512
"""Tokens compared at a time: what a prompt that diverges early costs at least."""


@dataclass(slots=True)
class Found(Generic[P, S]):
    length: int
    pieces: list[tuple[P, int]]
    """Each with how many of its first tokens belong to the prefix: all, but of the last."""
    state: S | None
    """At exactly `length`."""


@dataclass(slots=True, eq=False)
class _State(Generic[S]):
    value: S


@dataclass(slots=True, eq=False)
class _Node(Generic[P, S]):
    tokens: array[int]
    piece: P
    parent: _Node[P, S] | None
    state: _State[S] | None = None
    """At the end of its tokens."""
    children: dict[int, _Node[P, S]] = field(default_factory=dict)
    """By their first token."""


class PrefixTree(Generic[P, S]):
    """A `P` was computed for a run of tokens, the KV of that run; an `S` is valid at exactly one
    position, as for recurrent layers and sliding windows."""

    def __init__(
        self,
        cut: Callable[[P, int, int], P],
        size: Callable[[P], int],
        state_size: Callable[[S], int],
    ) -> None:
        """`cut(piece, start, end)` is the part for the tokens start..end of the piece's own, and
        does not keep the piece alive. Sizes are in bytes and never change."""
        self.bytes = 0
        self._cut = cut
        self._size = size
        self._state_size = state_size
        self._roots: dict[int, _Node[P, S]] = {}
        self._recency: OrderedDict[_Node[P, S] | _State[S], _Node[P, S]] = OrderedDict()
        """Least recently used first, with the node concerned. A node comes after all below it, so
        that the first node is always a leaf."""

    def find(self, tokens: list[int], most: int, *, stateful: bool) -> Found[P, S]:
        """The longest prefix known, of at most `most` tokens; with `stateful` among those that end
        in a state. It counts as used."""
        path, length, end = self._longest(tokens, most, stateful)
        pieces = [(node.piece, len(node.tokens)) for node in path]
        state = None
        if path:
            pieces[-1] = path[-1].piece, length - (end - len(path[-1].tokens))
            state = path[-1].state if end == length else None
            self._touch(path[-1], state)
        return Found(length, pieces, state.value if state else None)

    def known(self, tokens: list[int], most: int = sys.maxsize, *, stateful: bool = False) -> int:
        """The length of what `find` would find. It does not count as used."""
        return self._longest(tokens, most, stateful)[1]

    def put(self, tokens: list[int], start: int, piece: P, state: S | None = None) -> None:
        """Keep what was computed for `tokens[start:]`, all before being known, and the state at
        their end. What is known already stays as it is; a state is replaced."""
        path, length = self._walk(tokens, len(tokens))
        if start > length:
            raise ValueError(f"tokens up to {start} are not known, only up to {length}")
        node = path[-1] if path else None
        beyond = sum(len(n.tokens) for n in path) - length
        if start < length < len(tokens):
            piece = self._cut(piece, length - start, len(tokens) - start)
        if node and beyond and (length < len(tokens) or state is not None):
            node = self._split(node, len(node.tokens) - beyond)
        if length < len(tokens):
            new = _Node[P, S](array("i", tokens[length:]), piece, node)
            self._children(node)[tokens[length]] = node = new
            self.bytes += self._size(piece)
        if node and state is not None:
            self._drop_state(node)
            node.state = _State(state)
            self.bytes += self._state_size(state)
        if node:
            self._touch(node, node.state if state is not None else None)

    def evict(self, most: int) -> None:
        """Until there are at most `most` bytes: the least recently used leaf, with its state, or a
        state that prompts pass by."""
        while self.bytes > most and self._recency:
            key, node = next(iter(self._recency.items()))
            self._drop_state(node)
            if key is node:
                del self._recency[node]
                del self._children(node.parent)[node.tokens[0]]
                self.bytes -= self._size(node.piece)

    def paths(self) -> Iterator[tuple[list[int], list[P], S | None]]:
        """Tokens, pieces and last state of every leaf, most recently used first."""
        for key, leaf in reversed(list(self._recency.items())):
            if key is leaf and not leaf.children:
                path = list(_upwards(leaf))[::-1]
                tokens = [token for node in path for token in node.tokens]
                state = leaf.state.value if leaf.state else None
                yield tokens, [node.piece for node in path], state

    def clear(self) -> None:
        self.evict(-1)  # node by node: they refer to each other, and would wait for the collector

    def _children(self, node: _Node[P, S] | None) -> dict[int, _Node[P, S]]:
        return node.children if node else self._roots

    def _longest(
        self, tokens: list[int], most: int, stateful: bool
    ) -> tuple[list[_Node[P, S]], int, int]:
        """The nodes of the longest prefix known, its length, and where the last node ends."""
        path, length = self._walk(tokens, most)
        end = sum(len(node.tokens) for node in path)
        while stateful and path and (end > length or path[-1].state is None):
            end -= len(path.pop().tokens)
            length = end
        return path, length, end

    def _walk(self, tokens: list[int], most: int) -> tuple[list[_Node[P, S]], int]:
        """The nodes along the prompt, of which the last may match in part, and what matches."""
        path: list[_Node[P, S]] = []
        length, most = 0, min(most, len(tokens))
        children = self._roots
        while length < most and (node := children.get(tokens[length])):
            path.append(node)
            same = common(node.tokens, tokens, length, most)
            length += same
            if same < len(node.tokens):
                break
            children = node.children
        return path, length

    def _touch(self, node: _Node[P, S], state: _State[S] | None) -> None:
        self._recency[node] = node
        self._recency.move_to_end(node)
        if state:
            self._recency[state] = node
            self._recency.move_to_end(state)
        for above in _upwards(node.parent):
            self._recency[above] = above
            self._recency.move_to_end(above)

    def _split(self, node: _Node[P, S], at: int) -> _Node[P, S]:
        """The new node above it, with its first `at` tokens; to be touched."""
        whole, length = node.piece, len(node.tokens)
        # Cutting may fail for want of memory, and must leave the tree as it was.
        first, rest = self._cut(whole, 0, at), self._cut(whole, at, length)
        upper = _Node[P, S](node.tokens[:at], first, node.parent)
        self._children(node.parent)[node.tokens[0]] = upper
        upper.children[node.tokens[at]] = node
        node.tokens, node.piece = node.tokens[at:], rest
        node.parent = upper
        self.bytes += self._size(upper.piece) + self._size(node.piece) - self._size(whole)
        return upper

    def _drop_state(self, node: _Node[P, S]) -> None:
        if node.state:
            self.bytes -= self._state_size(node.state.value)
            del self._recency[node.state]
            node.state = None


def _upwards(node: _Node[P, S] | None) -> Iterator[_Node[P, S]]:
    while node:
        yield node
        node = node.parent


def common(stored: array[int], tokens: list[int], at: int, most: int) -> int:
    """How many of the stored tokens the prompt has from `at` on, before `most` (its length, if not
    less)."""
    count = min(len(stored), most - at)
    for start in range(0, count, _SLICE):
        end = min(start + _SLICE, count)
        here, there = stored[start:end], array("i", tokens[at + start : at + end])
        if here != there:
            return start + next(
                i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b
            )
    return count
