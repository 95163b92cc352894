"""Guessing from what a text repeats, and only as long as that makes it faster."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.backends.lookup import LENGTH, PAUSE, STALE, Lookup, Pays


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], [9, 8, 7, 1]),
        ([5, 2, 3, 9, 8, 7, 1, 2, 3], [9, 8, 7, 1]),
        ([1, 2, 3, 4, 1, 2, 3, 5, 0, 1, 2, 3], [5, 0, 1, 2]),
        ([1, 2, 3, 4, 9, 2, 3, 5, 0, 1, 2, 3], [4, 9, 2, 3]),
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([7, 7, 7], [7, 7, 7, 7]),
        ([3, 1, 3], []),
    ],
    ids=[
        "nothing",
        "too short",
        "nothing repeats",
        "three tokens repeat",
        "two tokens repeat",
        "the latest occurrence",
        "the longer ending",
        "a cycle goes on",
        "one token again and again",
        "one token repeats",
    ],
)
def test_the_continuation_of_the_latest_occurrence(text: list[int], guess: list[int]) -> None:
    """The text's last tokens, as many of them as possible, tell what came after them before."""
    assert Lookup(text).propose(4) == guess


@given(text=st.lists(st.integers(0, 3), max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_however_the_text_came(text: list[int], cuts: list[int]) -> None:
    """Whether it came at once or in pieces is all one."""
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    grown = Lookup(text[: ends[0]])
    for start, end in pairwise(ends):
        grown.extend(text[start:end])
    assert grown.propose(5) == Lookup(text).propose(5)


def steps(pays: Pays, count: int, *, plain: float, guess: float, right: bool) -> str:
    """What each of so many steps was, `p` or `g`: a plain one takes `plain` seconds, one with a
    guess `guess`, and all or nothing of it is right."""
    done = ""
    for _ in range(count):
        if pays.worth:
            pays.guessed(guess, pays.length, 1 + pays.length * right)
            done += "g"
        else:
            pays.plain(plain)
            done += "p"
    return done


def test_guessing_that_wins_goes_on() -> None:
    """Of plain steps there is one to compare with, and one now and then."""
    done = steps(Pays(), 3 * STALE, plain=1.0, guess=2.0, right=True)
    assert done.startswith("p" + "g" * STALE + "p" + "g" * STALE + "p")


def test_guesses_grow_while_they_are_right() -> None:
    """One that is all right is followed by one twice as long, one that is not by a short one."""
    pays, lengths = Pays(), []
    pays.plain(1.0)
    for wrong in (0, 0, 0, 1, 0):
        lengths.append(pays.length)
        pays.guessed(1.5, pays.length, 1 + pays.length - wrong)
    assert lengths == [LENGTH, 2 * LENGTH, 4 * LENGTH, 8 * LENGTH, LENGTH]


@pytest.mark.parametrize(("right", "guess"), [(False, 1.5), (True, 1.0 + LENGTH)])
def test_guessing_that_loses_stops(right: bool, guess: float) -> None:
    """What was wrong, or no faster than without, is tried again after pauses that grow."""
    pays, pause = Pays(), 0
    pauses: list[int] = []
    while len(pauses) < 8:
        if pays.worth:
            pays.guessed(guess, LENGTH, 1 + LENGTH * right)
            pauses.append(pause)
            pause = 0
        else:
            pays.plain(1.0)
            pause += 1
    assert pauses == [1, 4, 8, 16, 32, 64, 64, PAUSE[1]]


def test_a_text_that_begins_to_repeat() -> None:
    """A try that wins makes the pauses short again."""
    pays = Pays()
    steps(pays, 2000, plain=1.0, guess=2.0, right=False)
    assert "g" * STALE in steps(pays, 1000, plain=1.0, guess=2.0, right=True)
    done = steps(pays, 300, plain=1.0, guess=2.0, right=False)
    assert done.split("g")[1] == "p" * PAUSE[0]
