"""Guessing ahead without a second model: what a text repeats, and whether guessing pays. No I/O.

The idea is prompt lookup decoding's: https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LENGTHS: Final = (3, 2)
"""Of the endings looked up, the longest first: the longer, the likelier it goes on the same."""

WEIGHT: Final = 1 / 8
"""Of the newest measurement in an average."""
TRIES: Final = 4
"""Guesses before they are judged."""
PAUSE: Final = (16, 1024)
"""Tokens from one try that failed to the next; doubled each time."""
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


@dataclass(slots=True)
class _Rate:
    """Seconds and tokens of a step: an average in which later ones weigh more."""

    seconds: float = 0.0
    tokens: float = 0.0
    steps: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.steps += 1
        weight = max(WEIGHT, 1 / self.steps)
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)


class Pays:
    """Whether guessing makes this model faster here, from what steps have taken."""

    def __init__(self) -> None:
        self._plain = _Rate()
        self._guessed = _Rate()
        self._stale = STALE - TRIES
        """Guesses since the last plain step; at first a few are enough to want one."""
        self._wait = 0
        """Plain steps until it is tried again."""
        self._pause = PAUSE[0]

    @property
    def worth(self) -> bool:
        return self._wait == 0

    def plain(self, seconds: float) -> None:
        """A step without a guess has made one token, for whatever reason."""
        self._plain.add(seconds, 1)
        self._stale = 0
        self._wait = max(0, self._wait - 1)

    def guessed(self, seconds: float, tokens: int) -> None:
        """A step with a guess, guessing included, has made so many tokens."""
        plain, guessed = self._plain, self._guessed
        guessed.add(seconds, tokens)
        self._stale += 1
        if self._stale >= STALE:
            self._wait = 1
        elif plain.steps and guessed.steps >= TRIES:
            if guessed.seconds < guessed.tokens * plain.seconds:
                self._pause = PAUSE[0]
            else:
                self._wait, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
                self._guessed = _Rate()
