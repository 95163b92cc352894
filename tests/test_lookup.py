"""Guessing from what a text repeats, and only as long as that makes it faster."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.backends.lookup import PAUSE, STALE, TRIES, Lookup, Pays


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


def steps(pays: Pays, count: int, *, plain: float, guess: float, tokens: int) -> str:
    """What each of so many steps was, `p` or `g`, when a plain one takes `plain` seconds and one
    with a guess `guess` for so many tokens."""
    done = ""
    for _ in range(count):
        if pays.worth:
            pays.guessed(guess, tokens)
            done += "g"
        else:
            pays.plain(plain)
            done += "p"
    return done


def test_guessing_that_wins_goes_on() -> None:
    """The first tries come at once, then one plain step to compare with, and one now and then."""
    done = steps(Pays(), 3 * STALE, plain=1.0, guess=2.0, tokens=3)
    assert done.startswith("g" * TRIES + "p" + "g" * STALE + "p" + "g" * STALE + "p")


@pytest.mark.parametrize("tokens", [1, 2], ids=["nothing was right", "as fast as without"])
def test_guessing_that_loses_stops(tokens: int) -> None:
    """It is tried again after pauses that grow up to a bound."""
    done = steps(Pays(), 20_000, plain=1.0, guess=2.0, tokens=tokens)
    pauses = [len(pause) for pause in done.split("g") if pause]
    growing = [PAUSE[0] * 2**i for i in range(20) if PAUSE[0] * 2**i < PAUSE[1]]
    assert pauses[1 : len(growing) + 3] == [*growing, PAUSE[1], PAUSE[1]]


def test_a_text_that_begins_to_repeat() -> None:
    """After a try that wins the pauses are short again."""
    pays = Pays()
    steps(pays, 200, plain=1.0, guess=2.0, tokens=1)
    assert "g" * STALE in steps(pays, 1000, plain=1.0, guess=2.0, tokens=5)
    done = steps(pays, 300, plain=1.0, guess=2.0, tokens=1).lstrip("g")
    assert done.index("g") == PAUSE[0]


def test_one_slow_step_decides_nothing() -> None:
    """A guess that the machine held up once does not end what wins otherwise."""
    pays = Pays()
    steps(pays, 20, plain=1.0, guess=1.5, tokens=3)
    pays.guessed(5.0, 3)
    assert pays.worth


def test_plain_steps_without_a_guess_count() -> None:
    """Where the text offers nothing to guess, the steps tell what plain ones take."""
    pays = Pays()
    for _ in range(10):
        pays.plain(1.0)
    assert "p" not in steps(pays, STALE - 1, plain=1.0, guess=2.0, tokens=3)
