"""Whether what makes a model faster changes what it says: greedy answers, compared at load.

It must not, and engines have broken it for one architecture or another: what a sequence gets may
depend on its neighbours, on padding, on where its KV cache comes from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from .backends import Backend, BackendBroken, Feature, Sequence, SequenceFailed, TokenEvent
from .errors import GenerationFailed
from .generation import SamplingParams

# Even a small model is sure how these go on; where it is not, a difference would tell nothing.
LONG: Final = "The quick brown fox jumps over the lazy dog. " * 40
SHORT: Final = "1, 2, 3, 4, 5, 6, 7,"
WEEK: Final = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday,"

PROMPT_TOKENS: Final = 320
"""More than padding is put up with for (mlx_batch.SHORT_CELLS)."""
ANSWER_TOKENS: Final = 6
STEPS: Final = 1000
"""After more, an answer is not coming."""

TIE: Final = 0.5
"""Logits no further apart may change places by rounding alone: bfloat16 rounds those between 16 and
32, where the highest ones are, to multiples of 1/8, and other sums come out a few of these apart.
A wrong position, mask or state moves them by more."""

_Runs = list[list[int]]
"""One after another, of which prompts together."""
_ALONE: Final[_Runs] = [[0], [1], [2]]
_TOGETHER: Final[_Runs] = [[1, 2, 0]]
_AGAIN: Final[_Runs] = [[0], [1, 2, 0], [2, 0, 1]]
_TESTS: Final[dict[Feature, _Runs]] = {
    "batch": _TOGETHER,
    "ragged": _TOGETHER,
    "prefix": _AGAIN,
    "draft": [*_AGAIN, [2]],
}


def check(
    backend: Backend, turn: AbstractContextManager[None] | None = None
) -> tuple[frozenset[Feature], list[str]]:
    """Which of the backend's features leave its answers as they are, and why not the others. It
    uses any of them afterwards; `turn` is held for each step.

    Raises:
        BackendBroken: nothing of the backend may be used any more.
    """
    able, passed = backend.features, frozenset[Feature]()
    if backend.dimensions or not able:
        return able, []
    test = _Test(backend, turn or nullcontext())
    if failure := test.failure(passed, _ALONE):
        return passed, [failure]
    if not test.failure(able, _TESTS["draft"]):
        return able, []  # as nearly always
    problems = []
    for feature, runs in _TESTS.items():
        if feature not in able or (feature == "ragged" and "batch" not in passed):
            continue
        if failure := test.failure(passed | {feature}, runs):
            problems.append(f"{feature}: {failure}")
        else:
            passed |= {feature}
    return passed, problems


@dataclass(slots=True)
class _Answer:
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """How much likelier each token was than the next likeliest."""


class _Test:
    def __init__(self, backend: Backend, turn: AbstractContextManager[None]) -> None:
        self._backend = backend
        self._turn = turn
        self._uids = count()
        most = min(PROMPT_TOKENS, backend.context_length - ANSWER_TOKENS)
        long, short, week = (backend.tokenize(t, raw=True)[:most] for t in (LONG, SHORT, WEEK))
        # The last one begins like the first, and is short enough to be read with the second.
        self._prompts = [long, short, long[: most // 8] + week[: most // 2]]
        self._expected: dict[int, _Answer] = {}
        """Of each prompt, the first answer."""

    def failure(self, features: frozenset[Feature], runs: _Runs) -> str | None:
        """What goes wrong first with these features. The first call should have none."""
        answers: dict[int, _Answer] = {}
        try:
            self._backend.use(features)
            for run in runs:
                answers = {next(self._uids): _Answer() for _ in run}
                sequences = [
                    Sequence(
                        uid,
                        self._prompts[i],
                        ANSWER_TOKENS,
                        SamplingParams(temperature=0.0, logprobs=None if features else 2),
                    )
                    for i, uid in zip(run, answers, strict=True)
                ]
                self._generate(sequences, answers)
                for i, answer in zip(run, answers.values(), strict=True):
                    expected = self._expected.setdefault(i, answer)
                    if difference := self._difference(expected, answer.tokens):
                        return f"after a prompt of {len(self._prompts[i])} tokens {difference}"
        except BackendBroken:
            raise
        except Exception as error:  # whatever an engine raises for a model that it cannot do
            for uid in answers:
                self._backend.remove(uid)
            return f"{type(error).__name__}: {error}"
        return None

    def _generate(self, sequences: list[Sequence], answers: dict[int, _Answer]) -> None:
        """The last one comes when another has begun to decode."""
        for sequence in sequences[:-1]:
            self._backend.add(sequence)
        later, running = sequences[-1:], len(sequences)
        if running == 1:
            self._backend.add(later.pop())
        for _ in range(STEPS):
            with self._turn:
                events = self._backend.step()
            for event in events:
                if isinstance(event, SequenceFailed):
                    raise event.error
                if isinstance(event, TokenEvent):
                    if not 0 <= event.token < len(self._backend.vocabulary.tokens):
                        raise GenerationFailed(f"token {event.token} is not in the vocabulary")
                    answer = answers[event.uid]
                    answer.tokens.append(event.token)
                    if event.logprobs:
                        (_, first), (_, second) = event.logprobs.top
                        answer.gaps.append(first - second)
                    running -= event.finish is not None
                    if later:
                        self._backend.add(later.pop())
            if not running:
                return
        raise GenerationFailed(f"no answer in {STEPS} steps")

    def _difference(self, expected: _Answer, tokens: list[int]) -> str | None:
        known = self._backend.vocabulary.tokens
        triples = zip(expected.tokens, tokens, expected.gaps, strict=False)
        for token, other, gap in triples:
            if token != other:
                one, two = (known[id].decode("utf-8", "replace") for id in (token, other))
                return f"came {two!r}, not {one!r}, likelier by {gap:.1f}" if gap > TIE else None
        if len(tokens) != len(expected.tokens):
            return f"came {len(tokens)} tokens, not {len(expected.tokens)}"
        return None
