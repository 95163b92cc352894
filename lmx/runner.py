"""One model's process, `python -m lmx.runner`: started by the server, which talks to its pipes.

Who runs where: the main thread loads the model, steps it and frees it, and is the only one to
touch it; a reader thread takes commands off the pipe; two worker threads render and tokenize
prompts, which for a long one takes seconds. Whoever has events writes them under a lock.

The process ends when it is told to, when the server is gone (end of its stdin), or when the engine
breaks: then it dies with a traceback and the server fails its requests.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from . import backends
from .backends import Backend, Sequence, SequenceFailed, StepEvent
from .config import EngineSettings
from .errors import (
    UNLOADED,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    LMXError,
    ModelUnloaded,
)
from .messages import (
    Accepted,
    AnyCommand,
    AnyEvent,
    Cancel,
    Delta,
    Error,
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
    decode_command,
    encode_events,
)
from .output import OutputParser

Loader = Callable[[Path, str, EngineSettings, int], Backend]

ORPHAN_EXIT_SECONDS = 60.0
"""A runner whose server is gone and whose engine hangs gives its memory back after this long."""


class GPUTurn:
    """At most one runner submits GPU work at a time; held for one step.

    flock frees itself when its holder dies, but it is not fair: who unlocks and locks again at once
    usually wins. So a turn is taken in two locks: whoever waits for the GPU holds the queue's, and
    the one that has just had its turn finds it taken.
    """

    def __init__(self, path: str) -> None:
        self._gpu = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._queue = os.open(f"{path}.queue", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._queue, fcntl.LOCK_EX)
        fcntl.flock(self._gpu, fcntl.LOCK_EX)
        fcntl.flock(self._queue, fcntl.LOCK_UN)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        fcntl.flock(self._gpu, fcntl.LOCK_UN)


@dataclass(frozen=True, slots=True)
class _Add:
    sequence: Sequence


@dataclass(slots=True)
class _Running:
    output: OutputParser
    tokens: int = 0


class Runner:
    """The step loop and what feeds it. `run` belongs to the main thread; the rest says to whom."""

    def __init__(
        self, backend: Backend, turn: GPUTurn, send: Callable[[list[AnyEvent]], None]
    ) -> None:
        self._backend = backend
        self._turn = turn
        self._send = send
        self._inbox: SimpleQueue[_Add | Cancel | Grant | Stop] = SimpleQueue()
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._preparing: set[int] = set()
        """Requests on their way from the reader to the step loop."""
        self._cancelled: set[int] = set()
        """Those of them that nobody wants any more."""
        self._running: dict[int, _Running] = {}

    def read(self, commands: Iterator[AnyCommand]) -> None:
        """Reader thread: take commands until they end, and with them the runner."""
        try:
            for command in commands:
                match command:
                    case Generate():
                        self._preparing.add(command.id)
                        self._workers.submit(self._prepare, command)
                    case Cancel() | Grant() | Stop():
                        self._inbox.put(command)
                    case Load():
                        raise ValueError("a runner loads once")
        finally:
            self.stop()

    def stop(self) -> None:
        """Any thread, or a signal handler."""
        self._inbox.put(Stop())

    def _prepare(self, request: Generate) -> None:
        """Worker thread: from messages to a sequence in the inbox, or to a refusal."""
        try:
            if request.id in self._cancelled:
                return self._drop(request.id, Finished(request.id, "cancelled", 0))
            sequence = self._sequence(request)
        except LMXError as error:
            return self._drop(request.id, Refused(request.id, Error.of(error)))
        except Exception as error:
            # Nobody reads this thread's exceptions, and the client must get its answer.
            traceback.print_exc()
            failure = GenerationFailed(f"The prompt could not be prepared: {error!r}")
            return self._drop(request.id, Refused(request.id, Error.of(failure)))
        self._send([Accepted(request.id, len(sequence.prompt), 0)])
        self._inbox.put(_Add(sequence))

    def _drop(self, id: int, event: AnyEvent) -> None:
        self._preparing.discard(id)
        self._cancelled.discard(id)
        self._send([event])

    def _sequence(self, request: Generate) -> Sequence:
        template = self._backend.chat_template
        if template is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot chat.", param="messages"
            )
        text = template.render(request.messages)
        at_least = len(text) // self._backend.longest_token
        if at_least > self._backend.context_length:
            # Known without tokenizing it, which would take seconds for megabytes.
            raise self._too_long(f"at least {at_least}")
        prompt = self._backend.tokenize(text)
        if not prompt:
            raise InvalidRequest("The prompt is empty.", param="messages")
        room = self._backend.context_length - len(prompt)
        if room < 1:
            raise self._too_long(str(len(prompt)))
        for token in request.params.logit_bias:
            if not 0 <= token < self._backend.vocabulary_size:
                raise InvalidRequest(
                    f"Token {token} is outside this model's vocabulary of "
                    f"{self._backend.vocabulary_size}.",
                    param="logit_bias",
                )
        max_tokens = min(request.params.max_tokens or room, room)
        return Sequence(request.id, prompt, max_tokens, request.params)

    def _too_long(self, tokens: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._backend.context_length} tokens, "
            f"but the prompt has {tokens} and the answer needs at least one.",
            param="messages",
        )

    def run(self) -> None:
        """Main thread: step until told to stop.

        Raises:
            BackendBroken: the engine cannot go on; the process must end.
        """
        while self._take_commands():
            if self._running:
                with self._turn:
                    stepped = self._backend.step()
                # Sent even when empty: the server's watchdog counts steps.
                self._send([event for step in stepped for event in self._events(step)])
        stopping = Error.of(ModelUnloaded(UNLOADED))
        self._send([Failed(id, stopping) for id in self._running])
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _take_commands(self) -> bool:
        """Obey all that is in the inbox; with nothing to step, wait for more. False: stop."""
        while not (self._running and self._inbox.empty()):
            match self._inbox.get():
                case Stop():
                    return False
                case Cancel(id):
                    self._cancel(id)
                case Grant(kv_bytes):
                    memory = self._backend.grant(kv_bytes)
                    report = Report(memory.engine_bytes, memory.kv_bytes, memory.kv_used_bytes)
                    self._send([report])
                case _Add(sequence):
                    self._start(sequence)
        return True

    def _start(self, sequence: Sequence) -> None:
        if sequence.uid in self._cancelled:
            return self._drop(sequence.uid, Finished(sequence.uid, "cancelled", 0))
        self._preparing.discard(sequence.uid)
        self._running[sequence.uid] = _Running(OutputParser(sequence.params.stop))
        self._backend.add(sequence)

    def _cancel(self, id: int) -> None:
        if running := self._running.pop(id, None):
            self._backend.remove(id)
            self._send([Finished(id, "cancelled", running.tokens)])
        elif id in self._preparing:
            self._cancelled.add(id)

    def _events(self, step: StepEvent) -> list[AnyEvent]:
        if isinstance(step, SequenceFailed):
            del self._running[step.uid]
            return [Failed(step.uid, Error.of(step.error))]
        running = self._running[step.uid]
        running.tokens += 1
        text = running.output.feed(step.text)
        finish = step.finish
        if finish is not None:
            text += running.output.finish()
        if running.output.stopped:
            if finish is None:
                self._backend.remove(step.uid)
            finish = "stop"
        events: list[AnyEvent] = []
        if text:
            events.append(Delta(step.uid, text, running.tokens))
        if finish is not None:
            del self._running[step.uid]
            events.append(Finished(step.uid, finish, running.tokens))
        return events


def read_commands(pipe: int) -> Iterator[AnyCommand]:
    """The commands that come through the pipe, until its other end is closed."""
    frames = FrameReader()
    # The pipe's own read: a buffered one would wait for more than a frame.
    while data := os.read(pipe, 65536):
        yield from map(decode_command, frames.feed(data))


def main(load: Loader = backends.load) -> int:
    # From here on fd 1 is fd 2, so that a library's print cannot get between two frames.
    commands = read_commands(os.dup(0))
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # A terminal's Ctrl-C reaches the whole process group; the server decides when a runner stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    lock = threading.Lock()

    def send(batch: list[AnyEvent]) -> None:
        data = memoryview(encode_events(batch))
        with lock:
            while data:
                data = data[events.write(data) :]

    command = next(commands, None)
    if command is None:
        return 0  # the server went away
    if not isinstance(command, Load):
        raise ValueError(f"expected Load, got {type(command).__name__}")
    try:
        backend = load(Path(command.path), command.format, command.settings, command.kv_bytes)
    except LMXError as error:
        send([LoadFailed(Error.of(error))])
        return 1
    runner = Runner(backend, GPUTurn(command.turn), send)
    signal.signal(signal.SIGTERM, lambda signum, frame: runner.stop())

    def read() -> None:
        runner.read(commands)
        # The server is gone or wants us gone. Should the engine hang, nobody else would end us.
        threading.Event().wait(ORPHAN_EXIT_SECONDS)
        os._exit(1)

    threading.Thread(target=read, name="reader", daemon=True).start()
    send([Loaded(backend.context_length, backend.parallel, backend.engine)])
    runner.run()
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
