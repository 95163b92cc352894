"""Prefixes for models whose memory cannot be cut: whole states of sequences, kept outside of it.

Recurrent layers and sliding windows know one position only, so a state is good for prompts that
have all of its tokens.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp

from .prefix_tree import PrefixTree

State = ctypes.Array[ctypes.c_uint8]


class Snapshots:
    def __init__(self, context: Any, budget: int) -> None:
        """`budget`: bytes."""
        self._context = context
        self._budget = budget
        # What is kept for a run of tokens is their number; all else is in the states.
        self._tree: PrefixTree[int, State] = PrefixTree(
            lambda _, start, end: end - start, lambda tokens: 4 * tokens, len
        )

    @property
    def bytes(self) -> int:
        return self._tree.bytes

    def find(self, tokens: list[int], most: int) -> tuple[int, State | None]:
        """The longest prefix of at most `most` tokens, and its state."""
        found = self._tree.find(tokens, most, stateful=True)
        return found.length, found.state

    def keep(self, seq_id: int, tokens: list[int]) -> None:
        """The state of a sequence that has just these tokens, unless it is known."""
        if self.find(tokens, len(tokens))[0] == len(tokens):
            return
        size: int = llama_cpp.llama_state_seq_get_size(self._context, seq_id)
        if size > self._budget:
            return
        state = (ctypes.c_uint8 * size)()
        if llama_cpp.llama_state_seq_get_data(self._context, state, size, seq_id):
            self._tree.put(tokens, 0, len(tokens), state)
            self._tree.evict(self._budget)

    def restore(self, seq_id: int, state: State) -> bool:
        """Into an empty sequence, which is empty still if it fails."""
        read: int = llama_cpp.llama_state_seq_set_data(self._context, state, len(state), seq_id)
        return read > 0

    def clear(self) -> None:
        self._tree.clear()
