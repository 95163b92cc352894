from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from lmx.backends import BackendBroken
from lmx.config import EngineSettings
from lmx.generation import ChatMessage, SamplingParams
from lmx.messages import (
    Accepted,
    AnyCommand,
    AnyEvent,
    Cancel,
    Delta,
    Failed,
    Finished,
    Generate,
    Refused,
    Stop,
    encode_command,
)
from lmx.runner import GPUTurn, Runner, read_commands

from .fakes import FakeBackend

Say = Callable[[AnyCommand], None]
TIMEOUT = 20


class Heard:
    """The events a runner has sent, by request."""

    def __init__(self) -> None:
        self._queue: Queue[AnyEvent] = Queue()

    def put(self, events: list[AnyEvent]) -> None:
        for event in events:
            self._queue.put(event)

    def next(self) -> AnyEvent:
        return self._queue.get(timeout=TIMEOUT)

    def until(self, kind: type[AnyEvent], id: int) -> list[AnyEvent]:
        """All events up to and with the first of this kind for this request."""
        seen: list[AnyEvent] = []
        while not (seen and isinstance(seen[-1], kind) and getattr(seen[-1], "id", None) == id):
            seen.append(self.next())
        return seen


@contextmanager
def running(
    tmp_path: Path, settings: EngineSettings | None = None
) -> Iterator[tuple[Say, Heard, FakeBackend, threading.Thread]]:
    backend = FakeBackend(tmp_path, settings or EngineSettings())
    heard = Heard()
    runner = Runner(backend, GPUTurn(str(tmp_path / "turn")), heard.put)
    read_end, write_end = os.pipe()
    commands = os.fdopen(read_end, "rb", buffering=0)
    reader = threading.Thread(target=runner.read, args=(read_commands(commands.fileno()),))
    stepper = threading.Thread(target=runner.run)
    reader.start()
    stepper.start()

    def say(command: AnyCommand) -> None:
        os.write(write_end, encode_command(command))

    try:
        yield say, heard, backend, stepper
    finally:
        os.close(write_end)  # the end of the commands stops the runner
        reader.join(TIMEOUT)
        stepper.join(TIMEOUT)
        commands.close()
        assert not stepper.is_alive()


def generate(id: int, text: str, **params: object) -> Generate:
    return Generate(id, [ChatMessage("user", text)], SamplingParams(**params))  # type: ignore[arg-type]


def text_of(events: list[AnyEvent], id: int) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.id == id)


def test_a_request_is_accepted_streamed_and_finished(tmp_path: Path) -> None:
    """Accepted comes first, then the text in pieces, then exactly one Finished with the count."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(7, "one two three"))
        events = heard.until(Finished, 7)
    assert events[0] == Accepted(7, 3, 0)
    assert [e.text for e in events if isinstance(e, Delta)] == ["one ", "two ", "three "]
    assert events[-1] == Finished(7, "stop", 4)


@pytest.mark.parametrize(
    ("params", "text", "finished"),
    [
        ({"max_tokens": 2}, "one two ", Finished(1, "length", 2)),
        ({"stop": ("o t",)}, "one tw", Finished(1, "stop", 3)),
        ({"stop": ("thr",)}, "one two ", Finished(1, "stop", 3)),
        ({"stop": ("absent", "three x")}, "one two three ", Finished(1, "stop", 4)),
    ],
    ids=["max_tokens", "stop across tokens", "stop inside a token", "stop that never completes"],
)
def test_an_answer_ends_where_the_request_says(
    tmp_path: Path, params: dict[str, object], text: str, finished: Finished
) -> None:
    """max_tokens and stop strings end the sequence; no part of a stop string gets out."""
    with running(tmp_path) as (say, heard, backend, _):
        say(generate(1, "one two three", **params))
        events = heard.until(Finished, 1)
        assert (text_of(events, 1), events[-1]) == (text, finished)
        assert backend.uids == []


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (generate(1, "w " * 64), "ContextLengthExceeded", "messages"),
        (generate(1, "x" * 20 * 65), "ContextLengthExceeded", "messages"),
        (generate(1, "  "), "InvalidRequest", "messages"),
        (generate(1, "a", logit_bias={1000: 1.0}), "InvalidRequest", "logit_bias"),
    ],
    ids=["too long", "hopelessly long", "empty", "logit_bias outside the vocabulary"],
)
def test_a_bad_prompt_is_refused(tmp_path: Path, request_: Generate, code: str, param: str) -> None:
    """A refusal is the only event of its request, and the runner goes on."""
    with running(tmp_path) as (say, heard, _, _):
        say(request_)
        [refused] = heard.until(Refused, 1)
        assert isinstance(refused, Refused)
        assert (refused.error.name, refused.error.param) == (code, param)
        say(generate(2, "fine"))
        assert text_of(heard.until(Finished, 2), 2) == "fine "


def test_the_longest_prompt_that_fits_is_accepted(tmp_path: Path) -> None:
    """A prompt one token short of the context gets one token of answer."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(1, "w " * 63))
        assert heard.until(Finished, 1)[-1] == Finished(1, "length", 1)


def test_requests_share_the_steps(tmp_path: Path) -> None:
    """While one answer has no end, another starts and completes."""
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, _, _):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        say(generate(2, "b c"))
        assert text_of(heard.until(Finished, 2), 2) == "b c "
        say(Cancel(1))
        [*_, last] = heard.until(Finished, 1)
        assert isinstance(last, Finished) and last.reason == "cancelled"


def test_a_cancelled_request_leaves_the_batch(tmp_path: Path) -> None:
    """Cancelling says Finished once, frees the row, and a second cancel is ignored."""
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, backend, _):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        say(Cancel(1))
        say(Cancel(1))
        say(Cancel(99))
        heard.until(Finished, 1)
        say(generate(2, "next"))
        events = heard.until(Finished, 2)
        assert not [e for e in events if getattr(e, "id", None) == 1]
        assert backend.uids == []


def test_a_request_cancelled_before_it_starts_never_runs(tmp_path: Path) -> None:
    """Between reader and step loop nothing is lost: one terminal event, whoever comes first."""
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, backend, _):
        for id in range(1, 200):
            say(generate(id, "FOREVER a"))
            say(Cancel(id))
        for id in range(1, 200):
            say(generate(id + 1000, "x"))
        ended: list[int] = []
        while len(ended) < 398:
            event = heard.next()
            if isinstance(event, Finished):
                ended.append(event.id)
        assert len(set(ended)) == 398
        assert backend.uids == []


def test_one_failed_sequence_does_not_touch_the_others(tmp_path: Path) -> None:
    """SequenceFailed ends its own request with the error's class and message."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(1, "FAIL"))
        say(generate(2, "a b c"))
        failed = next(e for e in heard.until(Failed, 1) if isinstance(e, Failed))
        assert (failed.error.name, failed.error.message) == ("GenerationFailed", "it failed")
        heard.until(Finished, 2)


def test_stopping_fails_what_runs(tmp_path: Path) -> None:
    """After Stop every running request has its terminal event and the loop has ended."""
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, _, thread):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        say(Stop())
        [*_, failed] = heard.until(Failed, 1)
        assert isinstance(failed, Failed) and failed.error.name == "ModelUnloaded"
        thread.join(TIMEOUT)


def test_a_broken_engine_ends_the_loop(tmp_path: Path) -> None:
    """BackendBroken is not survived: the process must be replaced."""
    backend = FakeBackend(tmp_path, EngineSettings())
    runner = Runner(backend, GPUTurn(str(tmp_path / "turn")), lambda events: None)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as commands:
        reader = threading.Thread(target=runner.read, args=(read_commands(commands.fileno()),))
        reader.start()
        os.write(write_end, encode_command(generate(1, "BROKEN")))
        with pytest.raises(BackendBroken):
            runner.run()
        os.close(write_end)
        reader.join(TIMEOUT)


def test_gpu_turns_alternate(tmp_path: Path) -> None:
    """Whoever waits for the GPU gets it next, although the other wants it again at once."""
    path = str(tmp_path / "turn")
    order: list[str] = []
    both = threading.Barrier(2)

    def take(name: str) -> None:
        turn = GPUTurn(path)  # flock excludes open files, so threads serve as well as processes
        both.wait(TIMEOUT)
        for _ in range(200):
            with turn:
                order.append(name)
                time.sleep(0.001)  # a step's work: without any, the other need not even wake up

    threads = [threading.Thread(target=take, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(order) == 400
    # Not one after the other: while both want it, neither runs away with it.
    first_done = min(399 - order[::-1].index(name) for name in "ab")
    assert min(order[: first_done + 1].count(name) for name in "ab") > 50
