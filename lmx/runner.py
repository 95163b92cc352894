"""One model's process, `python -m lmx.runner`: started by the server, which talks to its pipes.

Who runs where: the main thread loads the model, steps it and frees it, and is the only one to
touch it; a reader thread takes commands off the pipe; two worker threads render and tokenize
prompts, which for a long one takes seconds. Whoever has events writes them under a lock.

The process ends when it is told to, when the server is gone (end of its stdin), or when the engine
breaks: then it dies with a traceback and the server fails its requests.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from . import backends
from .answer import Answer
from .backends import (
    Backend,
    Drafted,
    Prefilled,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
    VectorEvent,
)
from .config import EngineSettings
from .errors import UNLOADED, GenerationFailed, LMXError, ModelUnloaded
from .messages import (
    Accepted,
    AnyCommand,
    AnyEvent,
    Cancel,
    Delta,
    Embed,
    Embedded,
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
from .prompt import Preparer
from .selftest import check

Loader = Callable[[Path, str, EngineSettings, int], Backend]

FRAME_SECONDS = 0.025
"""Text that comes faster goes out together: nobody sees more than 40 pieces a second, and being
woken costs server and client many times what a token does. vLLM and SGLang call it the stream
interval and count it in tokens."""

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


@dataclass(slots=True)
class _Request:
    id: int
    sequences: list[tuple[Sequence, Answer]]
    dimensions: int | None = None
    """Of embeddings, if not as many as the model makes."""
    running: dict[int, Answer] = field(default_factory=dict)
    """By the sequence's uid."""
    tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    """Of all its prompts."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def end(self, uid: int) -> None:
        answer = self.running.pop(uid)
        self.tokens += answer.tokens
        self.reasoning_tokens += answer.reasoning_tokens

    def finished(self, *, cancelled: bool = False) -> Finished:
        return Finished(
            self.id,
            self.tokens,
            self.reasoning_tokens,
            self.cached_tokens,
            self.drafted_tokens,
            self.accepted_tokens,
            cancelled,
        )


class Runner:
    """The step loop and what feeds it. `run` belongs to the main thread; the rest says to whom."""

    def __init__(
        self, backend: Backend, turn: GPUTurn, send: Callable[[list[AnyEvent]], None]
    ) -> None:
        self._backend = backend
        self._turn = turn
        self._send = send
        self._preparer = Preparer(backend)
        self._inbox: SimpleQueue[_Request | Cancel | Grant | Stop] = SimpleQueue()
        self._uids = count()
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._preparing: set[int] = set()
        """Requests on their way from the reader to the step loop."""
        self._cancelled: set[int] = set()
        """Those of them that nobody wants any more."""
        self._requests: dict[int, _Request] = {}
        self._running: dict[int, _Request] = {}
        """By the uid of each of its sequences that the backend has."""
        self._held: list[AnyEvent] = []
        """Text that goes out with a later step's."""
        self._told = -math.inf
        """When a step's went out last."""

    def read(self, commands: Iterator[AnyCommand]) -> None:
        """Reader thread: take commands until they end, and with them the runner."""
        try:
            for command in commands:
                match command:
                    case Generate() | Embed():
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

    def _prepare(self, command: Generate | Embed) -> None:
        """Worker thread: from a request to its sequences in the inbox, or to a refusal."""
        try:
            if command.id in self._cancelled:
                return self._drop(command.id, Finished(command.id, cancelled=True))
            sequences = self._preparer.sequences(command.request, self._uids)
        except LMXError as error:
            return self._drop(command.id, Refused(command.id, Error.of(error)))
        except Exception as error:
            # Nobody reads this thread's exceptions, and the client must get its answer.
            traceback.print_exc()
            failure = GenerationFailed(f"The prompt could not be prepared: {error!r}")
            return self._drop(command.id, Refused(command.id, Error.of(failure)))
        prompts = {id(sequence.prompt): sequence.prompt for sequence, _ in sequences}
        self._send([Accepted(command.id, sum(map(len, prompts.values())))])
        wanted = command.request.dimensions if isinstance(command, Embed) else None
        self._inbox.put(_Request(command.id, sequences, wanted))

    def _drop(self, id: int, event: AnyEvent) -> None:
        self._preparing.discard(id)
        self._cancelled.discard(id)
        self._send([event])

    def run(self) -> None:
        """Main thread: step until told to stop.

        Raises:
            BackendBroken: the engine cannot go on; the process must end.
        """
        while self._take_commands():
            if self._running:
                start = time.monotonic()
                with self._turn:
                    stepped = self._backend.step()
                self._held += [event for step in stepped for event in self._events(step)]
                now = time.monotonic()
                next_step = now + (now - start)
                if next_step > self._told + FRAME_SECONDS or not all(map(_can_wait, self._held)):
                    # Sent even when empty: the server's watchdog counts steps.
                    self._tell([])
                    self._told = now
        stopping = Error.of(ModelUnloaded(UNLOADED))
        self._tell([Failed(id, stopping) for id in self._requests])
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _tell(self, events: list[AnyEvent]) -> None:
        """Behind all that was held."""
        self._send(self._held + events)
        self._held = []

    def _take_commands(self) -> bool:
        """Obey all that is in the inbox; with nothing to step, wait for more. False: stop."""
        while not (self._running and self._inbox.empty()):
            match self._inbox.get():
                case Stop():
                    return False
                case Cancel(id):
                    self._cancel(id)
                case Grant(kv_bytes):
                    m = self._backend.grant(kv_bytes)
                    report = Report(m.engine_bytes, m.kv_bytes, m.kv_used_bytes, m.padding)
                    self._tell([report])
                case _Request() as request:
                    self._start(request)
        return True

    def _start(self, request: _Request) -> None:
        if request.id in self._cancelled:
            return self._drop(request.id, request.finished(cancelled=True))
        self._preparing.discard(request.id)
        if self._held:  # the next step may have a long prompt
            self._tell([])
        self._requests[request.id] = request
        for sequence, answer in request.sequences:
            request.running[sequence.uid] = answer
            self._running[sequence.uid] = request
            self._backend.add(sequence)
        request.sequences.clear()

    def _cancel(self, id: int) -> None:
        if request := self._requests.get(id):
            self._end(request)
            self._tell([request.finished(cancelled=True)])
        elif id in self._preparing:
            self._cancelled.add(id)

    def _end(self, request: _Request) -> None:
        """Take what is left of it out of the backend."""
        for uid in list(request.running):
            self._backend.remove(uid)
            self._leave(request, uid)
        del self._requests[request.id]

    def _leave(self, request: _Request, uid: int) -> None:
        request.end(uid)
        del self._running[uid]

    def _events(self, step: StepEvent) -> list[AnyEvent]:
        request = self._running.get(step.uid)
        if request is None:
            return []  # in the same step another answer of its request has failed
        answer = request.running[step.uid]
        events: list[AnyEvent] = []
        match step:
            case SequenceFailed(_, error):
                return self._fail(request, error)
            case Prefilled(_, cached_tokens):
                request.cached_tokens += cached_tokens
            case Drafted(_, drafted, accepted):
                request.drafted_tokens += drafted
                request.accepted_tokens += accepted
            case VectorEvent(uid, vector):
                self._leave(request, uid)
                if request.dimensions:
                    vector = vector[: request.dimensions]
                    length = math.hypot(*vector) or 1.0
                    vector = [value / length for value in vector]
                events.append(Embedded(request.id, answer.index, array("f", vector).tobytes()))
            case TokenEvent() if answer.error:
                return self._fail(request, answer.error)
            case TokenEvent(uid):
                parts, finish = answer.take(step)
                logprobs = answer.take_logprobs()
                if parts or logprobs or finish:
                    events.append(
                        Delta(request.id, answer.index, parts, answer.tokens, logprobs, finish)
                    )
                if finish:
                    if step.finish is None:
                        self._backend.remove(uid)
                    self._leave(request, uid)
        if not request.running:
            del self._requests[request.id]
            events.append(request.finished())
        return events

    def _fail(self, request: _Request, error: LMXError) -> list[AnyEvent]:
        self._end(request)
        return [Failed(request.id, Error.of(error))]


def _can_wait(event: AnyEvent) -> bool:
    """It is text between an answer's first and its end."""
    return isinstance(event, Delta) and event.tokens > 1 and event.finish is None


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
    # A terminal's signals reach the whole process group; the server decides when a runner stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

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
    turn = GPUTurn(command.turn)
    if command.features is None:
        features, problems = check(backend, turn)
    else:
        features, problems = backend.features.intersection(command.features), []
    backend.use(features)
    runner = Runner(backend, turn, send)
    signal.signal(signal.SIGTERM, lambda signum, frame: runner.stop())

    def read() -> None:
        runner.read(commands)
        # The server is gone or wants us gone. Should the engine hang, nobody else would end us.
        threading.Event().wait(ORPHAN_EXIT_SECONDS)
        os._exit(1)

    threading.Thread(target=read, name="reader", daemon=True).start()
    context, parallel, engine = backend.context_length, backend.parallel, backend.engine
    send([Loaded(context, parallel, engine, sorted(features), problems)])
    runner.run()
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
