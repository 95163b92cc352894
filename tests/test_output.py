"""Stop strings: what is emitted, what is held back, and that the cutting does not matter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.output import OutputParser


def one_shot(text: str, stop: tuple[str, ...]) -> str:
    """The definition: the text before the earliest place where a stop string begins."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    parser = OutputParser(stop)
    text = "".join([parser.feed(piece) for piece in pieces])
    return text + parser.finish(), parser.stopped


texts = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple)


@given(text=texts, stop=stops, cuts=st.lists(st.integers(0, 40)))
def test_pieces_equal_one_shot(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    """However the text is cut, the result is the text before the first stop string."""
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    expected = one_shot(text, stop)
    assert run(pieces, stop) == (expected, expected != text)


@given(text=texts, stop=stops)
def test_nothing_is_held_back_in_vain(text: str, stop: tuple[str, ...]) -> None:
    """After each character everything is out except what may still become a stop string."""
    parser = OutputParser(stop)
    out = ""
    for end in range(1, len(text) + 1):
        out += parser.feed(text[end - 1])
        held = text[len(out) : end]
        assert parser.stopped or not held or any(s.startswith(held) for s in stop)


@given(text=texts, stop=stops, more=texts)
def test_nothing_follows_a_stop(text: str, stop: tuple[str, ...], more: str) -> None:
    """Once stopped, feed and finish return nothing, whatever comes."""
    parser = OutputParser(stop)
    parser.feed(text)
    if parser.stopped:
        assert (parser.feed(more), parser.finish(), parser.stopped) == ("", "", True)


@pytest.mark.parametrize(
    ("stop", "pieces", "emitted", "rest", "stopped"),
    [
        pytest.param((), ["ab", "", "c"], ["ab", "", "c"], "", False, id="no-stops"),
        pytest.param(("",), ["ab"], ["ab"], "", False, id="empty-stop-is-ignored"),
        pytest.param(("END",), ["xE", "N", "Dy"], ["x", "", ""], "", True, id="across-pieces"),
        pytest.param(("END",), ["xE", "Nx"], ["x", "ENx"], "", False, id="begun-in-vain"),
        pytest.param(("END",), ["xEN"], ["x"], "EN", False, id="unfinished-at-the-end"),
        pytest.param(("END",), ["aENDbEND"], ["a"], "", True, id="first-of-two"),
        pytest.param(("END",), ["EEN", "END"], ["E", "EN"], "", True, id="restarts-inside-itself"),
        pytest.param(("ab", "bc"), ["xa", "bc"], ["x", ""], "", True, id="overlapping"),
        pytest.param(("abc", "ab"), ["xab", "c"], ["x", ""], "", True, id="one-begins-the-other"),
        pytest.param(("abcd", "c"), ["abc", "d"], ["", ""], "", True, id="earlier-one-finishes"),
        pytest.param(("abcd", "c"), ["abc", "x"], ["", "ab"], "", True, id="earlier-one-fails"),
        pytest.param(("abcd", "c"), ["abc"], [""], "ab", True, id="earlier-one-never-ends"),
        pytest.param(("é\n\n",), ["é\n", "\n"], ["", ""], "", True, id="not-ascii"),
    ],
)
def test_pieces(
    stop: tuple[str, ...], pieces: list[str], emitted: list[str], rest: str, stopped: bool
) -> None:
    """Each piece releases exactly the text that no stop string can begin in any more."""
    parser = OutputParser(stop)
    assert [parser.feed(piece) for piece in pieces] == emitted
    assert (parser.finish(), parser.stopped) == (rest, stopped)
