"""The tree of past prompts: what it finds is what a list of all prefixes would, and it keeps its
budget."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmx.backends.prefix_tree import Found, PrefixTree

Piece = tuple[int, ...]
STATE = 3
"""Bytes of every state here; a piece has one a token, and is its tokens."""

PROMPTS = st.lists(st.integers(0, 2), max_size=7)


def new_tree() -> PrefixTree[Piece, str]:
    return PrefixTree(lambda piece, start, end: piece[start:end], len, lambda state: STATE)


def keep(tree: PrefixTree[Piece, str], tokens: list[int], state: str | None = None) -> None:
    known = tree.known(tokens)
    tree.put(tokens, known, tuple(tokens[known:]), state)


def text(found: Found[Piece, str]) -> list[int]:
    """The tokens that the pieces found are for."""
    return [token for piece, count in found.pieces for token in piece[:count]]


class Naive(RuleBasedStateMachine):
    """Next to the tree, the set of all prefixes it must know, and of all states."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = new_tree()
        self.prefixes: set[Piece] = set()
        self.states: dict[Piece, str] = {}

    def longest(self, tokens: list[int], most: int, among: set[Piece]) -> int:
        ends = range(1, min(most, len(tokens)) + 1)
        return max((end for end in ends if tuple(tokens[:end]) in among), default=0)

    @rule(tokens=PROMPTS, back=st.integers(0, 7), state=st.none() | st.text("xyz", min_size=1))
    def put(self, tokens: list[int], back: int, state: str | None) -> None:
        start = max(0, self.tree.known(tokens) - back)
        self.tree.put(tokens, start, tuple(tokens[start:]), state)
        self.prefixes |= {tuple(tokens[:end]) for end in range(1, len(tokens) + 1)}
        if tokens and state is not None:
            self.states[tuple(tokens)] = state

    @rule(tokens=PROMPTS, most=st.integers(0, 8))
    def find(self, tokens: list[int], most: int) -> None:
        assert self.tree.known(tokens) == self.longest(tokens, 99, self.prefixes)
        for stateful, among in ((False, self.prefixes), (True, set(self.states))):
            found = self.tree.find(tokens, most, stateful=stateful)
            assert found.length == self.longest(tokens, most, among)
            assert text(found) == tokens[: found.length]
            assert found.state == self.states.get(tuple(tokens[: found.length]))

    @rule(tokens=PROMPTS, room=st.integers(0, 12))
    def evict(self, tokens: list[int], room: int) -> None:
        """What was put last survives wherever there is room for it."""
        keep(self.tree, tokens, "last")
        most = len(tokens) + STATE + room
        self.tree.evict(most)
        assert self.tree.bytes <= most
        assert self.tree.find(tokens, 99, stateful=bool(tokens)).length == len(tokens)
        self.prefixes = {p for p in self.prefixes if self.tree.known(list(p)) == len(p)}
        self.prefixes |= {tuple(tokens[:end]) for end in range(1, len(tokens) + 1)}
        self.states = {
            p: state
            for p, state in {**self.states, tuple(tokens): "last"}.items()
            if p and self.tree.find(list(p), 99, stateful=True).length == len(p)
        }

    @rule()
    def clear(self) -> None:
        self.tree.clear()
        self.prefixes.clear()
        self.states.clear()

    @invariant()
    def bytes_are_counted(self) -> None:
        assert self.tree.bytes == len(self.prefixes) + STATE * len(self.states)

    @invariant()
    def every_prefix_is_on_a_path(self) -> None:
        paths = list(self.tree.paths())
        seen = {tuple(tokens[:end]) for tokens, _, _ in paths for end in range(1, len(tokens) + 1)}
        assert seen == self.prefixes
        for tokens, pieces, state in paths:
            assert [token for piece in pieces for token in piece] == tokens
            assert state == self.states.get(tuple(tokens))


TestNaive = Naive.TestCase


def test_what_comes_before_must_be_known() -> None:
    """A piece whose beginning is nowhere is refused: nothing could ever be computed from it."""
    tree = new_tree()
    keep(tree, [1, 2])
    with pytest.raises(ValueError, match="up to 3 are not known, only up to 2"):
        tree.put([1, 2, 3, 4], 3, (4,))


def test_the_least_recently_used_goes_first() -> None:
    """A hit makes recent, a mere question does not; a beginning outlives what goes on from it."""
    tree = new_tree()
    for tokens in ([1, 1], [2, 2], [3, 3], [1, 5]):
        keep(tree, tokens)
    tree.find([2, 2, 9], 3, stateful=False)
    assert tree.known([3, 3]) == 2
    gone = []
    while tree.bytes:
        before = [tokens for tokens, _, _ in tree.paths()]
        tree.evict(tree.bytes - 1)
        after = [tokens for tokens, _, _ in tree.paths()]
        gone += [tokens for tokens in before if tokens not in after]
    assert gone == [[1, 1], [3, 3], [1, 5], [1], [2, 2]]


def test_a_state_that_prompts_pass_by_goes_alone() -> None:
    """The state of a place where nobody stops any more goes before the tokens beyond it."""
    tree = new_tree()
    keep(tree, [1, 1], "early")
    keep(tree, [1, 1, 2, 2], "late")
    tree.evict(tree.bytes - 1)
    assert tree.find([1, 1, 2], 3, stateful=True).length == 0
    found = tree.find([1, 1, 2, 2, 3], 5, stateful=True)
    assert (found.length, found.state, tree.bytes) == (4, "late", 4 + STATE)


def test_paths_begin_with_the_one_used_last() -> None:
    """So that what is written to disk first is worth most."""
    tree = new_tree()
    for tokens in ([1, 1], [1, 2], [3]):
        keep(tree, tokens)
    tree.find([1, 1], 2, stateful=False)
    assert [tokens for tokens, _, _ in tree.paths()] == [[1, 1], [3], [1, 2]]


@pytest.mark.parametrize("at", [0, 1, 511, 512, 513, 1700, 2000])
def test_long_prompts(at: int) -> None:
    """Where two long prompts part is found to the token, and the shared part is kept once."""
    tree = new_tree()
    one = list(range(2000))
    other = one[:at] + [-token for token in range(at + 1, 2001)]
    keep(tree, one)
    assert tree.known(other) == at
    keep(tree, other)
    assert tree.bytes == 4000 - at
    for tokens in (one, other):
        assert text(tree.find(tokens, 1999, stateful=False)) == tokens[:1999]
