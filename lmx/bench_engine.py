"""`lmx bench --engine`: a backend in a process of its own, without any server around it.

It takes a `Start` on its stdin, then a `Round` a line, and answers each with a line of figures or
with a string that says what went wrong.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

import msgspec
import psutil

from .backends import Backend, Prefilled, SequenceFailed, StepEvent, TokenEvent, load
from .bench import Start
from .bench_client import Exchange, spent
from .bench_scenarios import Round, measure
from .errors import LMXError
from .generation import Chat, ChatMessage, GenerationRequest, SamplingParams
from .prompt import Preparer


class Engine:
    """Steps the backend between the turns of the event loop, in its thread."""

    def __init__(self, backend: Backend, kv_bytes: int) -> None:
        self._backend = backend
        self._kv_bytes = kv_bytes
        self._preparer = Preparer(backend)
        self._uids = count()
        self._running: dict[int, tuple[Exchange, list[int], asyncio.Future[None]]] = {}
        """With the answer's tokens, and what tells of its end."""
        self._stepping: asyncio.Task[None] | None = None

    async def ask(self, exchange: Exchange) -> None:
        chat = Chat([ChatMessage(m["role"], m["content"]) for m in exchange.messages])
        params = SamplingParams(temperature=0, max_tokens=exchange.max_tokens)
        request = GenerationRequest(chat, params)
        exchange.sent = time.monotonic()
        # In a thread as in a runner, where a long prompt must not hold up the steps.
        [(sequence, _)] = await asyncio.to_thread(self._preparer.sequences, request, self._uids)
        tokens: list[int] = []
        ended = asyncio.get_running_loop().create_future()
        self._running[sequence.uid] = exchange, tokens, ended
        self._backend.add(sequence)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            await ended
        finally:
            if self._running.pop(sequence.uid, None):
                self._backend.remove(sequence.uid)
        vocabulary = self._backend.vocabulary
        silent = vocabulary.control | vocabulary.end
        text = b"".join(vocabulary.tokens[token] for token in tokens if token not in silent)
        exchange.text = text.decode(errors="replace")
        exchange.tokens, exchange.prompt_tokens = len(tokens), len(sequence.prompt)

    async def _step(self) -> None:
        try:
            while self._running:
                events = self._backend.step()
                now = time.monotonic()
                for event in events:
                    self._take(event, now)
                await asyncio.sleep(0)
        except Exception as error:  # whoever waits for an answer gets it
            for _, _, ended in self._running.values():
                ended.set_exception(error)

    def _take(self, event: StepEvent, now: float) -> None:
        if event.uid not in self._running:
            return  # somebody has hung up
        exchange, tokens, ended = self._running[event.uid]
        match event:
            case Prefilled(_, cached_tokens):
                exchange.cached_tokens = cached_tokens
            case TokenEvent(uid, token, finish):
                tokens.append(token)
                exchange.arrivals.append(now)
                exchange.running.set()
                if finish:
                    del self._running[uid]
                    ended.set_result(None)
            case SequenceFailed(uid, error):
                del self._running[uid]
                ended.set_exception(error)

    async def padding(self) -> float | None:
        return self._backend.grant(self._kv_bytes).padding

    def spent(self) -> tuple[float, float, int] | None:
        own, below, memory = spent(psutil.Process())
        return 0.0, own + below, memory


async def serve(start: Start, answer: int) -> None:
    """Until stdin ends."""
    backend = load(Path(start.path), start.format, start.settings, start.kv_bytes)
    engine = Engine(backend, start.kv_bytes)
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        figures = await measure(engine, msgspec.json.decode(line, type=Round))
        os.write(answer, msgspec.json.encode(figures) + b"\n")
    backend.close()


def main() -> int:
    answer = os.dup(1)
    os.dup2(2, 1)  # so that no library's print gets between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the other process's
    try:
        asyncio.run(serve(msgspec.json.decode(sys.stdin.buffer.readline(), type=Start), answer))
    except LMXError as error:
        os.write(answer, msgspec.json.encode(error.message) + b"\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
