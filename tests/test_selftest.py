"""The test at load: a feature that changes what a model says is found and switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import pytest

from lmx.backends import (
    Backend,
    BackendBroken,
    Feature,
    Logprobs,
    SequenceFailed,
    StepEvent,
    TokenEvent,
)
from lmx.config import EngineSettings
from lmx.errors import GenerationFailed
from lmx.selftest import ANSWER_TOKENS, STEPS, TIE, check

from .fakes import FakeBackend

ALL: frozenset[Feature] = frozenset(["batch", "ragged", "prefix", "draft"])
Fault = Callable[[TokenEvent], list[StepEvent]]


class Faulty(FakeBackend):
    """Has a fault wherever `feature` is in use; None: wherever none is."""

    def __init__(
        self, feature: Feature | None = None, fault: Fault | None = None, gap: float = 2 * TIE
    ) -> None:
        super().__init__(Path("fast"), EngineSettings())
        self._feature = feature
        self._fault = fault
        self._gap = gap
        self.used: list[frozenset[Feature]] = []
        self.steps = 0

    def use(self, features: frozenset[Feature]) -> None:
        super().use(features)
        self.used.append(features)

    def step(self) -> list[StepEvent]:
        self.steps += 1
        return [new for event in super().step() for new in self._change(event)]

    def _change(self, event: StepEvent) -> list[StepEvent]:
        if not isinstance(event, TokenEvent):
            return [event]
        here = not self.features if self._feature is None else self._feature in self.features
        if self._fault and here:
            events = self._fault(event)
            if any(isinstance(e, SequenceFailed) or getattr(e, "finish", None) for e in events):
                self.remove(event.uid)
            return events
        reported = event.logprobs and Logprobs(-1.0, [(event.token, -1.0), (0, -1.0 - self._gap)])
        return [TokenEvent(event.uid, event.token, event.finish, reported)]


def another(event: TokenEvent) -> list[StepEvent]:
    return [TokenEvent(event.uid, 7, event.finish)]


def fewer(event: TokenEvent) -> list[StepEvent]:
    return [TokenEvent(event.uid, event.token, "stop")]


def unknown(event: TokenEvent) -> list[StepEvent]:
    return [TokenEvent(event.uid, 1000, event.finish, event.logprobs)]


def fails(event: TokenEvent) -> list[StepEvent]:
    return [SequenceFailed(event.uid, GenerationFailed("no kernel for it"))]


def raises(event: TokenEvent) -> list[StepEvent]:
    raise NotImplementedError("merge")


def breaks(event: TokenEvent) -> list[StepEvent]:
    raise BackendBroken("[METAL] Command buffer execution failed")


def says_nothing(event: TokenEvent) -> list[StepEvent]:
    return []


def test_all_is_well() -> None:
    """All features together give the answers that none gives, in a bounded number of steps."""
    backend = Faulty()
    assert check(backend) == (ALL, [])
    assert backend.used == [frozenset(), ALL]
    assert backend.steps < 10 * (ANSWER_TOKENS + 1) and backend.uids == []


def test_the_culprit_is_looked_for() -> None:
    """Each feature is tested with those before it that have passed."""
    backend = Faulty("ragged", another)
    check(backend)
    assert [sorted(features) for features in backend.used[2:]] == [
        ["batch"],
        ["batch", "ragged"],
        ["batch", "prefix"],
        ["batch", "draft", "prefix"],
    ]


@pytest.mark.parametrize("feature", sorted(ALL))
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (another, "tokens came '"),
        (fewer, "tokens came 1 tokens, not 6"),
        (unknown, "GenerationFailed: token 1000 is not in the vocabulary"),
        (fails, "GenerationFailed: no kernel for it"),
        (raises, "NotImplementedError: merge"),
    ],
)
def test_a_faulty_feature_is_off(feature: Feature, fault: Fault, problem: str) -> None:
    """The others stay on, except padding's absence without batches, and one line says why."""
    backend = Faulty(feature, fault)
    features, problems = check(backend)
    assert features == ALL - {feature} - ({"ragged"} if feature == "batch" else set())
    [line] = problems
    assert line.startswith(f"{feature}: ") and problem in line
    assert backend.uids == []


@pytest.mark.parametrize(("gap", "off"), [(TIE, False), (TIE + 0.01, True)])
def test_a_tie_is_no_difference(gap: float, off: bool) -> None:
    """Where the two likeliest tokens are as close as rounding moves them, either will do."""
    features, problems = check(Faulty("prefix", another, gap))
    assert ("prefix" not in features, bool(problems)) == (off, off)


def test_a_model_that_cannot_answer_at_all() -> None:
    """Without an answer to compare with, nothing is used."""
    assert check(Faulty(None, fails)) == (frozenset(), ["GenerationFailed: no kernel for it"])


def test_an_answer_that_never_comes() -> None:
    """A run is given up after many steps."""
    features, [line] = check(Faulty("draft", says_nothing))
    assert "draft" not in features and line.endswith(f"no answer in {STEPS} steps")


def test_a_broken_engine() -> None:
    """Is no reason to go on without a feature: the process must be replaced."""
    with pytest.raises(BackendBroken):
        check(Faulty("batch", breaks))


@pytest.mark.parametrize("name", ["embeds", "plain"])
def test_nothing_to_test(name: str) -> None:
    """A model that embeds, and one without such features, take no step."""
    backend = FakeBackend(Path(name), EngineSettings())
    assert check(backend) == (frozenset(), []) and backend.added == []


class Turn(AbstractContextManager[None]):
    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def test_others_get_their_turns() -> None:
    """Between any two steps another model may use the GPU."""
    backend, turn = Faulty(), Turn()
    check(backend, turn)
    assert turn.taken == backend.steps


def test_a_fake_is_a_backend() -> None:
    """What tests use in an engine's place has the protocol's members."""
    backend: Backend = FakeBackend(Path("fast"), EngineSettings())
    assert backend.features == ALL
