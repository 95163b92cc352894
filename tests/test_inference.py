from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path

import anyio
import pytest

from lmx.config import Config, EngineSettings
from lmx.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    LMXError,
    ModelLoadFailed,
    ModelUnloaded,
    QueueFull,
    RunnerDied,
    ServerStopping,
)
from lmx.generation import Part, TokenLogprob
from lmx.inference import InferenceQueue
from lmx.messages import Delta, Finished, Load
from lmx.runner_process import Generation, GenerationEvent, Runner, runner_environment

from .asking import chat, content, delta
from .fake_runner import COMMAND

pytestmark = pytest.mark.anyio

LONG = EngineSettings(context_length=100_000_000)


def make(tmp_path: Path, name: str = "model", config: Config | None = None) -> Runner:
    config = config or Config(engine=LONG)
    load = Load(str(tmp_path / name), "mlx", config.engine, 0, None, str(tmp_path / "turn"))
    return Runner(load, config, command=COMMAND)


@asynccontextmanager
async def started(tmp_path: Path, config: Config | None = None) -> AsyncIterator[Runner]:
    runner = make(tmp_path, config=config)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(runner.run)
            yield runner
            await runner.stop()


async def text_of(generation: Generation) -> str:
    return content([e async for events in generation for e in events])


async def until_idle(runner: Runner) -> None:
    while runner.active:
        await anyio.wait_all_tasks_blocked()


async def test_a_generation_streams_what_the_runner_says(tmp_path: Path) -> None:
    """Accepted with its counts, the text in order, one Finished at the very end."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        assert runner.loaded is not None and runner.loaded.engine == "fake 1.0"
        async with queue.generate(runner, chat("a b c")) as generation:
            assert generation.prompt_tokens == 3
            events = [event async for batch in generation for event in batch]
        assert content(events) == "a b c "
        assert [e for e in events if isinstance(e, Finished)] == [events[-1]]
        assert runner.active == 0


async def test_many_generations_at_once(tmp_path: Path) -> None:
    """Forty requests on sixteen rows: each gets its own answer."""
    queue = InferenceQueue(Config())
    answers: dict[int, str] = {}
    async with started(tmp_path) as runner:

        async def one(number: int) -> None:
            words = f"{number} " * 5
            async with queue.generate(runner, chat(words)) as generation:
                answers[number] = await text_of(generation)

        async with anyio.create_task_group() as tasks:
            for number in range(40):
                tasks.start_soon(one, number)
    assert answers == {number: f"{number} " * 5 for number in range(40)}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("FAIL", GenerationFailed),
        ("KILL", RunnerDied),
        ("RAISE", RunnerDied),
        ("BROKEN", RunnerDied),
    ],
)
async def test_a_failure_reaches_its_request(
    tmp_path: Path, text: str, error: type[LMXError]
) -> None:
    """Whatever happens in the runner, the waiting request gets an error and not silence."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        with pytest.raises(error):
            async with queue.generate(runner, chat(text)) as generation:
                await text_of(generation)
        assert runner.active == 0


async def test_a_dead_runner_says_how_it_died(tmp_path: Path) -> None:
    """The error names the signal or exit code, and new requests are refused at once."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        async with queue.generate(runner, chat("FOREVER a")) as generation:
            batches = aiter(generation)
            await anext(batches)
            assert runner.pid is not None
            os.kill(runner.pid, signal.SIGKILL)
            with pytest.raises(RunnerDied, match="signal 9"):
                while True:
                    await anext(batches)
        with pytest.raises(RunnerDied, match="signal 9"):
            async with queue.generate(runner, chat("a")):
                raise AssertionError("accepted by a dead runner")


async def test_a_refused_prompt_raises_on_entering(tmp_path: Path) -> None:
    """The refusal comes before anything could have been sent to the client."""
    queue = InferenceQueue(Config())
    async with started(tmp_path, Config(engine=EngineSettings(context_length=16))) as runner:
        with pytest.raises(ContextLengthExceeded, match=r"16 tokens.*has 20"):
            async with queue.generate(runner, chat("w " * 20)):
                raise AssertionError("accepted")
        assert runner.active == 0


async def test_leaving_a_generation_cancels_it(tmp_path: Path) -> None:
    """A client that goes away frees its row; nobody has to read its events."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        async with queue.generate(runner, chat("FOREVER a")) as generation:
            await anext(aiter(generation))
        with anyio.fail_after(10):
            while runner.active:
                await anyio.lowlevel.checkpoint()
        async with queue.generate(runner, chat("still here")) as generation:
            assert await text_of(generation) == "still here "


async def test_text_waits_for_a_slow_reader_in_one_piece() -> None:
    """What arrives while the reader is busy comes with its next look, none lost, in order."""
    generation = Generation(1)
    for number in range(3):
        generation.put(delta(1, str(number), number, "length" if number == 2 else None))
    generation.end(Finished(1, 3))
    batches = [batch async for batch in generation]
    assert batches == [[delta(1, "012", 2, "length"), Finished(1, 3)]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (delta(1, "a", 1), Delta(1, 1, [Part("content", "b")], 1)),
        (delta(1, "a", 1), Delta(1, 0, [Part("reasoning", "b")], 2)),
        (delta(1, "a", 1), delta(1, "", 2, "stop")),
        (Delta(1, 0, [Part("call", "f", "1")], 1), Delta(1, 0, [Part("call", "g", "2")], 2)),
        (delta(1, "a", 1), Delta(1, 0, [Part("content", "b")], 2, [TokenLogprob(b"b", -1.0)])),
    ],
    ids=["another answer", "another kind", "the end", "two calls", "logprobs"],
)
async def test_what_does_not_belong_together_stays_apart(first: Delta, second: Delta) -> None:
    """Only text that goes on is joined, and what is said about each token keeps its token."""
    generation = Generation(1)
    for event in (deepcopy(first), second):
        generation.put(event)
    generation.end(Finished(1))
    assert [batch async for batch in generation] == [[first, second, Finished(1)]]


async def test_an_error_comes_after_the_events_before_it(tmp_path: Path) -> None:
    """Text that has arrived is delivered before the failure is."""
    generation = Generation(1)
    generation.put(delta(1, "a", 1))
    generation.fail(GenerationFailed("no"))
    batches = aiter(generation)
    assert await anext(batches) == [delta(1, "a", 1)]
    with pytest.raises(GenerationFailed):
        await anext(batches)


async def test_an_error_does_not_overtake_text_that_came_with_it(tmp_path: Path) -> None:
    """A reader that waits when both arrive at once gets the text first."""
    generation = Generation(1)
    seen: list[object] = []

    async def read() -> None:
        with pytest.raises(GenerationFailed):
            async for batch in generation:
                seen.extend(batch)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        generation.put(delta(1, "a", 1))
        generation.fail(GenerationFailed("no"))
    assert seen == [delta(1, "a", 1)]


@asynccontextmanager
async def reading(generation: Generation) -> AsyncIterator[list[object]]:
    """What a reader sees that waits until the block begins; the block must make it end."""
    seen: list[object] = []

    async def read() -> None:
        try:
            async for batch in generation:
                seen.append(batch)
        except Exception as error:
            seen.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        yield seen
        generation.end(Finished(1))
        generation.pass_on()


async def test_what_is_handed_over_the_reader_does_not_get() -> None:
    """All that came together goes in one piece, unless nobody takes it or the reader is busy."""
    generation = Generation(1)
    taken: list[GenerationEvent] = []

    def once(events: list[GenerationEvent]) -> bool:
        free = not taken
        taken.extend(events if free else ())
        return free

    generation.hand_over = once
    async with reading(generation) as seen:
        generation.put(delta(1, "a", 1))
        generation.put(delta(1, "b", 2))
        generation.pass_on()
        assert taken == [delta(1, "ab", 2)]
        generation.put(delta(1, "c", 3))  # not taken
        generation.pass_on()
        taken.clear()
        generation.put(delta(1, "d", 4))  # the reader was woken and has not looked yet
        generation.pass_on()
        assert taken == [] and seen == []
    assert seen == [[delta(1, "cd", 4), Finished(1)]]


async def test_who_cannot_take_text_fails_its_own_reader() -> None:
    """And no other: the process that said it goes on."""
    generation = Generation(1)

    def broken(events: list[GenerationEvent]) -> bool:
        raise ValueError("no")

    generation.hand_over = broken
    async with reading(generation) as seen:
        generation.put(delta(1, "a", 1))
        generation.pass_on()
    assert [repr(each) for each in seen] == ["ValueError('no')"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken", "broken/weights: not weights"), ("dies", "signal 9.*about to die")],
)
async def test_a_model_that_does_not_load(tmp_path: Path, name: str, message: str) -> None:
    """The reason is the backend's, or how the process died and its last words."""
    async with anyio.create_task_group() as tasks:
        with pytest.raises(ModelLoadFailed, match=message):
            await tasks.start(make(tmp_path, name).run)


@pytest.mark.parametrize(
    "said",
    ["'nonsense'", "'\\xff\\xff\\xff\\xff'", "'\\0\\0\\0\\1x'"],
    ids=["long", "huge", "no list"],
)
async def test_a_process_that_is_no_runner_is_ended(tmp_path: Path, said: str) -> None:
    """What it says is not understood, and that is an error of this model only."""
    code = f"import sys, threading; sys.stdout.write({said}); sys.stdout.flush(); sys.stdin.read()"
    load = Load(str(tmp_path), "mlx", EngineSettings(), 0, None, str(tmp_path / "turn"))
    runner = Runner(load, Config(load_timeout_seconds=5), command=(sys.executable, "-c", code))
    async with anyio.create_task_group() as tasks:
        with pytest.raises(LMXError, match=r"does not speak as a runner"):
            await tasks.start(runner.run)


async def test_an_error_of_ours_while_reading_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the runner's task, and with that the server: nobody would get an answer any more."""

    def broken(self: Generation, event: object) -> None:
        raise AssertionError("broken")

    monkeypatch.setattr(Generation, "put", broken)
    runner = make(tmp_path)
    with anyio.fail_after(60), pytest.RaisesGroup(pytest.RaisesGroup(AssertionError)):
        async with anyio.create_task_group() as tasks:
            await tasks.start(runner.run)
            runner.submit(chat("a"))
    assert runner.ended.is_set()


async def test_grants_and_reports(tmp_path: Path) -> None:
    """A larger grant counts at once, a smaller one when the runner has agreed."""
    async with started(tmp_path) as runner:
        answered = runner.grant(1000)
        assert (runner.granting, runner.report.kv_bytes) == (True, 1000)
        await answered.wait()
        answered = runner.grant(10)
        assert runner.report.kv_bytes == 1000
        await answered.wait()
        assert (runner.granting, runner.report.kv_bytes) == (False, 10)


async def test_a_report_that_comes_too_late(tmp_path: Path) -> None:
    """One whose grant the watchdog has given up meanwhile is taken as it is."""
    code = (
        "import sys\nfrom lmx.messages import *\n"
        "sys.stdout.buffer.write(encode_events([Loaded(64, 1, 'x', []), Report(1, 2, 3)]))\n"
        "sys.stdout.flush()\nsys.stdin.read(1)"
    )
    load = Load(str(tmp_path), "mlx", EngineSettings(), 0, None, str(tmp_path / "turn"))
    runner = Runner(load, Config(), command=(sys.executable, "-c", code))
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(runner.run)
            await runner.ended.wait()
    assert runner.report.kv_used_bytes == 3


async def test_a_load_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The load timeout ends the process and says so."""
    runner = make(tmp_path, "hangs", Config(load_timeout_seconds=0.2))
    async with anyio.create_task_group() as tasks:
        with pytest.raises(ModelLoadFailed, match="not loaded after 0 s"):
            await tasks.start(runner.run)
    assert runner.pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(runner.pid, 0)


async def test_a_wedged_runner_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests but no step: they fail with the reason, and the process is killed in the end."""
    monkeypatch.setattr("lmx.runner_process.TERMINATE_SECONDS", 0.1)
    queue = InferenceQueue(Config())
    async with started(tmp_path, Config(engine=LONG, step_timeout_seconds=0.5)) as runner:
        with pytest.raises(RunnerDied, match="took no step"):
            async with queue.generate(runner, chat("HANG")) as generation:
                await text_of(generation)
        await runner.ended.wait()


async def test_stopping_a_runner_ends_its_process(tmp_path: Path) -> None:
    """A running request gets a clear error, and the process is gone."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        async with queue.generate(runner, chat("FOREVER a")) as generation:
            batches = aiter(generation)
            await anext(batches)
            await runner.stop()
            with pytest.raises(ModelUnloaded):
                while True:
                    await anext(batches)
        assert runner.exit == "The model's process ended (exit code 0)."


def test_the_queue_is_bounded() -> None:
    """One place too many is a 429 with a time to try again; a place given back counts."""
    queue = InferenceQueue(Config(queue_size=2))
    with queue.place(), queue.place():
        with pytest.raises(QueueFull) as caught, queue.place():
            raise AssertionError("a third place")
        assert caught.value.status == 429 and caught.value.retry_after
        assert queue.outstanding == 2
    with queue.place():
        assert queue.outstanding == 1


def test_a_stopping_queue_takes_nothing() -> None:
    """After refuse_new every new request is a 503."""
    queue = InferenceQueue(Config())
    queue.refuse_new()
    with pytest.raises(ServerStopping), queue.place():
        raise AssertionError("a place")


async def test_abort_fails_what_runs(tmp_path: Path) -> None:
    """At the end of the grace period every open request gets its last event."""
    queue = InferenceQueue(Config())
    async with started(tmp_path) as runner:
        async with queue.generate(runner, chat("FOREVER a")) as generation:
            batches = aiter(generation)
            await anext(batches)
            queue.abort()
            with pytest.raises(ServerStopping):
                while True:
                    await anext(batches)


def test_openblas_is_preloaded_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is installed, and never over a choice of the user's."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert runner_environment(lambda name: f"lib{name}.so.0")["LD_PRELOAD"] == "libopenblas.so.0"
    assert "LD_PRELOAD" not in runner_environment(lambda name: None)
    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    assert runner_environment(lambda name: f"lib{name}.so.0")["LD_PRELOAD"] == "mine.so"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "LD_PRELOAD" not in runner_environment(lambda name: f"lib{name}.so.0")
