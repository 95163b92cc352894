"""One model's process, as the server sees it. Event loop only; never blocks."""

from __future__ import annotations

import asyncio
import ctypes.util
import logging
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import chain
from typing import Any, Final

import anyio
from anyio.abc import ByteReceiveStream, Process, TaskStatus

from .config import Config
from .errors import (
    UNLOADED,
    LMXError,
    ModelLoadFailed,
    ModelUnloaded,
    RunnerDied,
)
from .generation import EmbeddingRequest, FinishReason, GenerationRequest, Part
from .messages import (
    Accepted,
    AnyCommand,
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
    LoadFailed,
    Refused,
    Report,
    Stop,
    decode_events,
    encode_command,
)

logger = logging.getLogger(__name__)

RUNNER_COMMAND: Final = (sys.executable, "-m", "lmx.runner")

STOP_SECONDS: Final = 10.0
"""From asking a runner to stop to SIGTERM."""
TERMINATE_SECONDS: Final = 30.0
"""From SIGTERM to SIGKILL. Killing a process that holds wired GPU memory can strand that memory
until the next boot (oMLX #2184), so it is the last resort."""
RETRY_AFTER_SECONDS: Final = 2
PIPE_BYTES: Final = 65536
"""As many as one holds."""
STDERR_LINES_KEPT: Final = 20
STDERR_SECONDS: Final = 1.0
"""How long to wait for the last words of a process that has ended."""


GenerationEvent = Delta | Embedded | Finished


class Generation:
    """One accepted request's events, in order; iterate to get all that came since the last look."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.prompt_tokens = 0
        self.tokens: dict[int, int] = {}
        """Generated so far, by answer."""
        self.accepted_at: float | None = None
        self.first_token: float | None = None
        """When the first piece of an answer came: `time.monotonic()`, like the others."""
        self.ended_at: float | None = None
        self.finished: Finished | None = None
        self.finish: FinishReason | None = None
        """Of the answer that ended last."""
        self.hand_over: Callable[[list[GenerationEvent]], bool] | None = None
        """Takes what has come in the place of the reader that waits, or says that it cannot now: a
        third of what a token costs is to wake its reader."""
        self._events: list[GenerationEvent] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        """Waits for a change. A future costs half of what an event does, for each token."""

    def put(self, event: Accepted | GenerationEvent) -> None:
        """To be followed by `pass_on`, once for all events that have come together."""
        match event:
            case _ if self._error is not None:
                pass
            case Delta() if self._events and _join(self._events[-1], event):
                pass
            case Delta():
                self.first_token = self.first_token or time.monotonic()
                self._events.append(event)
            case Embedded() | Finished():
                self._events.append(event)
            case Accepted():
                self.prompt_tokens = event.prompt_tokens
                self.accepted_at = time.monotonic()

    def pass_on(self) -> None:
        if self._reader is None or self._reader.done():
            return
        try:
            if self.hand_over and self.hand_over(self._events):
                self._events = []
                return
        except Exception as error:  # is the reader's, like all that happens to its answer
            self._error, self._events = error, []
        self._reader.set_result(None)

    def end(self, event: Finished) -> None:
        if self._error is not None:
            return
        self.finished, self.ended_at = event, time.monotonic()
        if self._events and isinstance(last := self._events[-1], Delta):
            self.finish = last.finish
        self.put(event)

    def fail(self, error: LMXError) -> None:
        self._error = error
        self.hand_over = None
        self.pass_on()

    async def accepted(self) -> None:
        while self.accepted_at is None:
            await self._change()

    def _change(self) -> asyncio.Future[None]:
        if self._error is not None:
            raise self._error
        self._reader = asyncio.get_running_loop().create_future()
        return self._reader

    def __aiter__(self) -> AsyncIterator[list[GenerationEvent]]:
        return self

    async def __anext__(self) -> list[GenerationEvent]:
        while not self._events:
            if self.finished is not None:
                raise StopAsyncIteration
            await self._change()
        events, self._events = self._events, []
        return events


def _join(last: GenerationEvent, new: Delta) -> bool:
    """Add `new` to what the reader has not taken yet, if that is more of the same answer's text."""
    if not (isinstance(last, Delta) and last.parts and new.parts and last.index == new.index):
        return False
    *parts, old = last.parts
    part, *rest = new.parts
    if old.kind != part.kind or part.kind == "call" or last.logprobs or new.logprobs:
        return False
    last.parts = [*parts, Part(old.kind, old.text + part.text, old.id), *rest]
    last.tokens, last.finish = new.tokens, new.finish
    return True


class Runner:
    """The server's handle of one model's process: loaded, busy, dead."""

    def __init__(
        self,
        load: Load,
        config: Config,
        *,
        command: tuple[str, ...] = RUNNER_COMMAND,
    ) -> None:
        self.loaded: Loaded | None = None
        self.report = Report(0, load.kv_bytes, 0)
        """What it takes, as of its last word; no grant that is still on its way is left out."""
        self.kv_used = 0
        """The most of all reports since somebody has set it to 0."""
        self.generated = 0
        """Tokens since the start."""
        self.exit: str | None = None
        """Why the process takes no more requests; None while it does."""
        self.ended = anyio.Event()
        """The process is gone, and with it its memory."""
        self.config = config
        """May be replaced while running."""
        self._load = load
        self._command = command
        self._next_id = 0
        self._generations: dict[int, Generation] = {}
        self._grants: deque[tuple[int, anyio.Event]] = deque()
        """Those the runner has not answered yet."""
        self._process: Process | None = None
        self._stopped = False
        self._last_step = time.monotonic()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
        self._outbox, self._to_write = anyio.create_memory_object_stream[AnyCommand](math.inf)

    @property
    def ready(self) -> bool:
        """Takes requests: its model is loaded and its process lives."""
        return self.loaded is not None and self.exit is None

    @property
    def active(self) -> int:
        """Requests this runner has not finished, those waiting for a row in the batch included."""
        return len(self._generations)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def submit(self, request: GenerationRequest | EmbeddingRequest) -> Generation:
        self._next_id += 1
        generation = Generation(self._next_id)
        if self.exit is not None:
            raise RunnerDied(self.exit, retry_after=RETRY_AFTER_SECONDS)
        if not self._generations:
            self._last_step = time.monotonic()
        self._generations[generation.id] = generation
        if isinstance(request, EmbeddingRequest):
            self._outbox.send_nowait(Embed(generation.id, request))
        else:
            self._outbox.send_nowait(Generate(generation.id, request))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Make the runner forget a request; it stays counted until the runner confirms."""
        if generation.id in self._generations and self.exit is None:
            self._outbox.send_nowait(Cancel(generation.id))

    @property
    def granting(self) -> bool:
        return bool(self._grants)

    def grant(self, kv_bytes: int) -> anyio.Event:
        """Let its KV cache take so much; the event comes with the runner's report.

        A larger grant counts at once, a smaller one when the runner has agreed.
        """
        answered = anyio.Event()
        if self.exit is None:
            self.report.kv_bytes = max(kv_bytes, self.report.kv_bytes)
            self._grants.append((kv_bytes, answered))
            self._outbox.send_nowait(Grant(kv_bytes))
        else:
            answered.set()
        return answered

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The process's whole life. Started once the model is loaded; returns when it has ended.

        Raises:
            ModelLoadFailed: before it is started, when the model does not load.
        """
        environment = await anyio.to_thread.run_sync(runner_environment)
        output, its_end = os.pipe()
        try:
            process = await anyio.open_process(
                self._command, stdout=its_end, stderr=subprocess.PIPE, env=environment
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(its_end)
        self._process = process
        assert process.stderr
        error: LMXError | None = None
        try:
            async with anyio.create_task_group() as tasks:
                stderr_read = anyio.Event()
                tasks.start_soon(self._log_stderr, process.stderr, stderr_read)
                tasks.start_soon(self._write_commands, process)
                tasks.start_soon(self._watch, process)
                self._outbox.send_nowait(self._load)
                error = await self._read_events(output, task_status)
                if error is None:
                    # Its output has ended, so it is ending by itself, or too broken to.
                    with anyio.move_on_after(STOP_SECONDS):
                        await process.wait()
                await self._end(process, ask_first=False)
                with anyio.move_on_after(STDERR_SECONDS):
                    await stderr_read.wait()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(process)
                await process.aclose()
            self._fail_all(self._exit_message(process.returncode))
            self._outbox.close()
            self._to_write.close()
            self.ended.set()
        if self.loaded is None:
            raise error or ModelLoadFailed(f"{self._load.path}: {self.exit}")

    def _fail_all(self, reason: str) -> None:
        if self.exit is None:
            self.exit = reason
        cls, why = (ModelUnloaded, UNLOADED) if self._stopped else (RunnerDied, self.exit)
        for generation in self._generations.values():
            generation.fail(cls(why, retry_after=RETRY_AFTER_SECONDS))
        self._generations.clear()
        while self._grants:
            self._grants.popleft()[1].set()

    async def _read_events(self, pipe: int, task_status: TaskStatus[None]) -> LMXError | None:
        """Until the output ends by itself; or an error because of which the process must end.

        A callback reads: by asyncio's streams and a task, each step's tokens would go twice more
        around the event loop.
        """
        loop = asyncio.get_running_loop()
        loading: asyncio.Future[None] = loop.create_future()
        ended: asyncio.Future[LMXError | None] = loop.create_future()
        frames = FrameReader()

        def read() -> None:
            changed: dict[Generation, None] = {}
            try:
                data = os.read(pipe, PIPE_BYTES)
                self._last_step = time.monotonic()
                for event in chain.from_iterable(map(decode_events, frames.feed(data))):
                    match event:
                        case Loaded():
                            self.loaded = event
                            loading.set_result(None)
                        case LoadFailed(error):
                            ended.set_result(error.exception())
                        case Report():
                            self._answered(event)
                        case _:
                            if generation := self._receive(event):
                                changed[generation] = None
                if not data:
                    ended.set_result(None)
            except Exception as error:  # the loop would log it and go on
                ended.set_exception(error)
            if ended.done():
                loop.remove_reader(pipe)
            for generation in changed:
                generation.pass_on()

        seconds = self.config.load_timeout_seconds
        loop.add_reader(pipe, read)
        try:
            first: list[asyncio.Future[Any]] = [loading, ended]
            await asyncio.wait(first, timeout=seconds, return_when="FIRST_COMPLETED")
            if loading.done():
                task_status.started()
            elif not ended.done():
                return ModelLoadFailed(f"{self._load.path}: not loaded after {seconds:.0f} s")
            return await ended
        except ValueError as error:  # msgspec's errors are
            self._fail_all(f"The model's process does not speak as a runner: {error}")
            return RunnerDied(f"{self._load.path}: {self.exit}")
        finally:
            loop.remove_reader(pipe)
            os.close(pipe)

    def _receive(self, event: Accepted | Refused | GenerationEvent | Failed) -> Generation | None:
        """The request it belongs to, if somebody still waits for that."""
        last = isinstance(event, Finished | Refused | Failed)
        find = self._generations.pop if last else self._generations.get
        if (generation := find(event.id, None)) is None:
            return None
        match event:
            case Delta(_, index, _, tokens):
                self.generated += tokens - generation.tokens.get(index, 0)
                generation.tokens[index] = tokens
                generation.put(event)
            case Finished(_, tokens):
                self.generated += tokens - sum(generation.tokens.values())
                generation.end(event)
            case Accepted() | Embedded():
                generation.put(event)
            case Refused(_, error) | Failed(_, error):
                generation.fail(error.exception())
        return generation

    def _answered(self, report: Report) -> None:
        if self._grants:  # none, once the watchdog has given it up
            self._grants.popleft()[1].set()
        on_its_way = (kv_bytes for kv_bytes, _ in self._grants)
        report.kv_bytes = max(report.kv_bytes, *on_its_way, 0)
        self._reported(report)

    def _reported(self, report: Report) -> None:
        self.report = report
        self.kv_used = max(self.kv_used, report.kv_used_bytes)

    async def _write_commands(self, process: Process) -> None:
        assert process.stdin
        try:
            async for command in self._to_write:
                await process.stdin.send(encode_command(command))
        except anyio.BrokenResourceError:
            pass  # the process is ending: its end is noticed on its output

    async def _log_stderr(self, stderr: ByteReceiveStream, done: anyio.Event) -> None:
        rest = b""
        async for data in stderr:
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-65536:]
            for line in lines:
                text = line.decode(errors="replace")
                self._stderr.append(text)
                logger.info("%s: %s", self._load.path, text)
        if rest:
            self._stderr.append(rest.decode(errors="replace"))
        done.set()

    async def _watch(self, process: Process) -> None:
        """End a wedged engine: it has requests, but took no step for too long."""
        while True:
            limit = self.config.step_timeout_seconds
            await anyio.sleep(min(1.0, limit / 4))
            silent = time.monotonic() - self._last_step
            if self._generations and self.loaded and silent > limit:
                logger.error("%s: no step for %.0f s, ending its runner", self._load.path, silent)
                self._fail_all(f"The model took no step for {silent:.0f} s and was restarted.")
                await self._end(process, ask_first=False)

    async def stop(self) -> None:
        """Ask the process to free its model and end, and wait until it has."""
        self._stopped = True
        if self._process is not None and not self.ended.is_set():
            with anyio.CancelScope(shield=True):
                await self._end(self._process)
                await self.ended.wait()

    async def _end(self, process: Process, *, ask_first: bool = True) -> None:
        """Ask, then SIGTERM, then SIGKILL."""
        if ask_first and self.loaded and process.returncode is None:
            self._outbox.send_nowait(Stop())
            with anyio.move_on_after(STOP_SECONDS):
                await process.wait()
        for signal, seconds in ((process.terminate, TERMINATE_SECONDS), (process.kill, math.inf)):
            if process.returncode is not None:
                return
            try:
                signal()
            except ProcessLookupError:
                pass  # it has ended in the meantime; wait() collects it
            with anyio.move_on_after(seconds):
                await process.wait()

    def _exit_message(self, code: int | None) -> str:
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        last = f" Its last words: {self._stderr[-1]}" if code and self._stderr else ""
        return f"The model's process ended ({how}).{last}"


def runner_environment(
    find_library: Callable[[str], str | None] = ctypes.util.find_library,
) -> dict[str, str]:
    """The environment of a runner. Runs a subprocess: not for the event loop.

    On Linux, MLX's CPU build brings the reference BLAS, some 30 times slower than OpenBLAS, which
    takes its place when loaded first; and llama.cpp's OpenMP threads, waiting for one another,
    burn the time of whoever else wants the cores. macOS has Accelerate and Metal.
    """
    # A runner loads what is on disk: no library may fetch anything in its place.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        if "LD_PRELOAD" not in environment and (library := find_library("openblas")):
            environment["LD_PRELOAD"] = library
            logger.info("preloading %s in the runner", library)
    return environment
