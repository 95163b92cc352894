from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from lmx.answer import Answer
from lmx.backends import BackendBroken
from lmx.config import EngineSettings
from lmx.errors import GenerationFailed
from lmx.generation import EmbeddingRequest, GenerationRequest, SamplingParams
from lmx.messages import (
    Accepted,
    AnyCommand,
    AnyEvent,
    Cancel,
    Delta,
    Embed,
    Embedded,
    Failed,
    Finished,
    FrameReader,
    Generate,
    Grant,
    Load,
    Loaded,
    Refused,
    Report,
    Stop,
    decode_events,
    encode_command,
)
from lmx.runner import GPUTurn, Runner, read_commands

from .asking import chat, content
from .fake_runner import COMMAND
from .fakes import FakeBackend

Say = Callable[[AnyCommand], None]
TIMEOUT = 20


class Heard:
    """The events a runner has sent, by request."""

    def __init__(self) -> None:
        self._queue: Queue[AnyEvent] = Queue()
        self.messages: list[list[AnyEvent]] = []

    def put(self, events: list[AnyEvent]) -> None:
        self.messages.append(events)
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


def generate(id: int, text: str, **params: Any) -> Generate:
    return Generate(id, chat(text, **params))


def finish_of(events: list[AnyEvent]) -> tuple[str | None, int]:
    """How the first answer has ended, and after how many tokens."""
    [last] = [e for e in events if isinstance(e, Delta) and e.finish and e.index == 0]
    return last.finish, last.tokens


def test_a_request_is_accepted_streamed_and_finished(tmp_path: Path) -> None:
    """Accepted comes first, then the text in pieces, then exactly one Finished with the count."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(7, "one two three"))
        events = heard.until(Finished, 7)
    assert events[0] == Accepted(7, 3)
    texts = [content([e]) for e in events if isinstance(e, Delta)]
    assert texts == ["one ", "two ", "three ", ""] and finish_of(events) == ("stop", 4)
    assert events[-1] == Finished(7, 4)


@pytest.mark.parametrize(
    ("seconds", "messages"),
    [(0.0, ["one ", "two ", "three ", ""]), (math.inf, ["one ", "two three "])],
)
def test_what_comes_within_a_frame_goes_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, messages: list[str]
) -> None:
    """Neither an answer's first text nor its end waits for a later step."""
    monkeypatch.setattr("lmx.runner.FRAME_SECONDS", seconds)
    with running(tmp_path) as (say, heard, _, _):
        say(generate(7, "one two three"))
        heard.until(Finished, 7)
    told = [message for message in heard.messages if any(isinstance(e, Delta) for e in message)]
    assert [content(message) for message in told] == messages


def test_nothing_overtakes_text_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before a report, and before the end of its request when that is cancelled."""
    monkeypatch.setattr("lmx.runner.FRAME_SECONDS", math.inf)
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, _, _):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        say(Grant(0))
        while not isinstance(heard.next(), Delta):
            say(Grant(0))
        say(Cancel(1))
        *_, last, finished = heard.until(Finished, 1)
    assert isinstance(last, Delta) and isinstance(finished, Finished)
    assert last.tokens == finished.completion_tokens


def test_no_text_waits_for_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held goes out before a request starts, whose first step may be a long one."""

    def held(event: AnyEvent) -> bool:
        return isinstance(event, Delta) and event.id == 1 and event.tokens > 1

    monkeypatch.setattr("lmx.runner.FRAME_SECONDS", math.inf)
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, _, _):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        for id in range(2, 100):
            say(generate(id, "b"))
            heard.until(Finished, id)
            if any(message and all(map(held, message)) for message in heard.messages):
                break
        else:
            raise AssertionError("what was held came with the other's")
        say(Cancel(1))
        heard.until(Finished, 1)


@pytest.mark.parametrize(
    ("params", "text", "finished"),
    [
        ({"max_tokens": 2}, "one two ", ("length", 2)),
        ({"stop": ("o t",)}, "one tw", ("stop", 3)),
        ({"stop": ("thr",)}, "one two ", ("stop", 3)),
        ({"stop": ("absent", "three x")}, "one two three ", ("stop", 4)),
    ],
    ids=["max_tokens", "stop across tokens", "stop inside a token", "stop that never completes"],
)
def test_an_answer_ends_where_the_request_says(
    tmp_path: Path, params: dict[str, object], text: str, finished: tuple[str, int]
) -> None:
    """max_tokens and stop strings end the sequence; no part of a stop string gets out."""
    with running(tmp_path) as (say, heard, backend, _):
        say(generate(1, "one two three", **params))
        events = heard.until(Finished, 1)
        assert (content(events, 1), finish_of(events)) == (text, finished)
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
        assert content(heard.until(Finished, 2), 2) == "fine "


def test_the_longest_prompt_that_fits_is_accepted(tmp_path: Path) -> None:
    """A prompt one token short of the context gets one token of answer."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(1, "w " * 63))
        assert finish_of(heard.until(Finished, 1)) == ("length", 1)


def test_requests_share_the_steps(tmp_path: Path) -> None:
    """While one answer has no end, another starts and completes."""
    with running(tmp_path, EngineSettings(context_length=10_000_000)) as (say, heard, _, _):
        say(generate(1, "FOREVER a"))
        heard.until(Delta, 1)
        say(generate(2, "b c"))
        assert content(heard.until(Finished, 2), 2) == "b c "
        say(Cancel(1))
        [*_, last] = heard.until(Finished, 1)
        assert isinstance(last, Finished) and last.cancelled


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


def test_answers_to_one_prompt(tmp_path: Path) -> None:
    """n answers have an index each and seeds of their own; the prompt counts once."""
    with running(tmp_path) as (say, heard, backend, _):
        say(Generate(1, chat("one two", n=3, seed=7)))
        events = heard.until(Finished, 1)
        assert events[0] == Accepted(1, 2)
        assert [content(events, 1, index) for index in range(4)] == ["one two "] * 3 + [""]
        assert events[-1] == Finished(1, 9)
        assert [s.params.seed for s in backend.added] == [7, 8, 9]
        assert len({id(s.prompt) for s in backend.added}) == 1


def test_several_prompts(tmp_path: Path) -> None:
    """Text and token ids, n answers each, numbered by prompt."""
    with running(tmp_path) as (say, heard, backend, _):
        [a] = backend.tokenize("a")
        request = GenerationRequest(["b c", [a]], SamplingParams(seed=7), n=2)
        say(Generate(1, request))
        events = heard.until(Finished, 1)
        assert events[0] == Accepted(1, 3)
        assert [content(events, 1, i) for i in range(4)] == ["b c ", "b c ", "a ", "a "]
        assert [s.params.seed for s in backend.added] == [7, 8, 7, 8]


@pytest.mark.parametrize("token", [-1, 1000])
def test_a_prompt_of_unknown_tokens(tmp_path: Path, token: int) -> None:
    """Token ids outside the vocabulary are refused."""
    with running(tmp_path) as (say, heard, _, _):
        say(Generate(1, GenerationRequest([[token]], SamplingParams())))
        [refused] = heard.until(Refused, 1)
        assert isinstance(refused, Refused) and refused.error.param == "prompt"


def test_a_failed_answer_fails_its_request(tmp_path: Path) -> None:
    """All answers of the request go together, with one terminal event."""
    with running(tmp_path) as (say, heard, backend, _):
        say(Generate(1, chat("FAIL", n=3)))
        heard.until(Failed, 1)
        say(generate(2, "fine"))
        assert not [e for e in heard.until(Finished, 2) if getattr(e, "id", None) == 1]
        assert backend.uids == []


def test_logprobs_go_out_with_their_text(tmp_path: Path) -> None:
    """One entry a token of the content, as bytes, with the likeliest tokens asked for."""
    with running(tmp_path) as (say, heard, _, _):
        say(generate(1, "one two three", logprobs=2, stop=("thr",)))
        events = heard.until(Finished, 1)
    entries = [entry for e in events if isinstance(e, Delta) for entry in e.logprobs]
    assert [entry.token for entry in entries] == [b"one ", b"two "]
    assert entries[0].top == [(b"one ", -0.5), (b"<end>", -1.0)]


def test_embeddings(tmp_path: Path) -> None:
    """A model that embeds answers each input with its vector, in whatever order it likes."""
    folder = tmp_path / "embeds"
    folder.mkdir()
    with running(folder) as (say, heard, backend, _):
        [a, b] = backend.tokenize("a b")
        say(Embed(1, EmbeddingRequest(["a b", [b]])))
        events = heard.until(Finished, 1)
        assert events[0] == Accepted(1, 3) and events[-1] == Finished(1)
        vectors = {
            e.index: array("f", e.vector).tolist() for e in events if isinstance(e, Embedded)
        }
        assert vectors == {0: [a, b], 1: [b]}
        for bad in ("", "x " * 65):
            say(Embed(2, EmbeddingRequest(["fine", bad])))
            [refused] = heard.until(Refused, 2)
            assert isinstance(refused, Refused) and refused.error.param == "input"


def test_what_was_cached_and_guessed_is_counted(tmp_path: Path) -> None:
    """Cached tokens add up over a request's prompts, guesses over its answers; a prompt with
    several answers is prefilled once. A cancelled request's count as well."""
    folder = tmp_path / "fast"
    folder.mkdir()
    with running(folder, EngineSettings(context_length=10_000_000)) as (say, heard, _, _):
        say(generate(1, "one two three"))
        assert heard.until(Finished, 1)[-1] == Finished(1, 4, drafted_tokens=2, accepted_tokens=1)
        request = GenerationRequest(["one two four", "one six", "new"], SamplingParams(), n=2)
        say(Generate(2, request))
        assert heard.until(Finished, 2)[-1] == Finished(2, 18, cached_tokens=3)
        say(generate(3, "FOREVER one"))
        heard.until(Delta, 3)
        say(Cancel(3))
        [*_, last] = heard.until(Finished, 3)
        assert isinstance(last, Finished) and last.cancelled
        assert (last.drafted_tokens, last.accepted_tokens) == (2, 1)


def test_a_grant_is_answered(tmp_path: Path) -> None:
    """The report has what the backend says, padding included."""
    with running(tmp_path) as (say, heard, _, _):
        say(Grant(5))
        assert heard.next() == Report(0, 5, 0, 0.25)


@pytest.mark.parametrize(
    ("known", "features"),
    [
        (None, ["batch", "draft", "prefix", "ragged"]),
        (["prefix", "batch", "of a later version"], ["batch", "prefix"]),
        ([], []),
    ],
    ids=["not tested yet", "some have passed before", "none has"],
)
def test_a_loaded_model_tells_its_features(
    tmp_path: Path, known: list[str] | None, features: list[str]
) -> None:
    """What the server remembers is used as it is; without that, the model is tested."""
    load = Load(str(tmp_path / "fast"), "mlx", EngineSettings(), 0, known, str(tmp_path / "turn"))
    done = subprocess.run(COMMAND, input=encode_command(load), stdout=subprocess.PIPE)
    first, *_ = FrameReader().feed(done.stdout)
    assert decode_events(first) == [Loaded(64, 16, "fake 1.0", features)]


def test_an_answer_whose_grammar_fails_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even an end token drawn after that makes an answer of it."""
    with running(tmp_path) as (say, heard, _, _):
        monkeypatch.setattr(Answer, "error", GenerationFailed("no way on"))
        say(generate(1, "one"))
        events = heard.until(Failed, 1)
        assert content(events) == ""
