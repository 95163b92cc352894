"""Guessing ahead without a second model: what a text repeats, and whether guessing pays. No I/O.

The idea is prompt lookup decoding's: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from typing import Final

LENGTHS: Final = (3, 2)
"""Of the endings looked up, the longest first: the longer, the likelier it goes on the same."""

WEIGHT: Final = 1 / 8
"""Of the newest measurement in the average."""
LENGTH: Final = 2
"""Tokens of a first guess; twice as many after each that was all right."""
PAUSE: Final = (4, 64)
"""Plain steps from a guess that has lost time to the next; twice as many if that loses too."""
STALE: Final = 128
"""Guesses after which it is measured again what a plain step takes: it grows with the context."""


class Lookup:
    """Of one text: where else its end occurs."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = list(tokens)
        # What ends the text is not in here yet: it would find itself.
        self._after: dict[int, dict[tuple[int, ...], int]] = {}
        """Of each length: where the text goes on after its latest occurrence."""
        for n in LENGTHS:
            runs = zip(*(tokens[i:] for i in range(n)), strict=False)
            self._after[n] = dict(zip(runs, range(n, len(tokens)), strict=False))

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for n, after in self._after.items():
                if n <= end:
                    after[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """How the text goes on if it does what it did before; nothing, if its end is new."""
        text, end = self._tokens, len(self._tokens)
        for n, after in self._after.items():
            start = after.get(tuple(text[-n:]))
            if start is not None:
                # What runs into the text's end repeats from there on.
                return [text[start + i % (end - start)] for i in range(most)]
        return []


class Pays:
    """Whether guessing makes this model faster here, from what steps have taken. What a guess that
    goes wrong costs is kept small: it is short, and the next one is put off."""

    def __init__(self) -> None:
        self._plain = 0.0
        """Seconds of a plain step, on average."""
        self._stale = STALE
        """Guesses since the last plain step."""
        self._wait = 0
        """Plain steps until it is tried again."""
        self._pause = PAUSE[0]
        self._length = LENGTH

    @property
    def worth(self) -> bool:
        return self._wait == 0 and self._stale < STALE

    @property
    def length(self) -> int:
        """Tokens to guess at most."""
        return self._length

    def plain(self, seconds: float) -> None:
        """A step without a guess has made one token, for whatever reason."""
        self._plain += (WEIGHT if self._plain else 1) * (seconds - self._plain)
        self._stale = 0
        self._wait = max(0, self._wait - 1)

    def guessed(self, seconds: float, guess: int, tokens: int) -> None:
        """A step with a guess of so many tokens, guessing included, has made `tokens` in all."""
        self._stale += 1
        self._length = 2 * self._length if tokens > guess else LENGTH
        if seconds < tokens * self._plain:
            self._pause = PAUSE[0]
        else:
            self._wait, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
