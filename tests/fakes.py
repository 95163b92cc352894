"""A backend without an engine: it answers with the prompt's own words, and misbehaves on demand."""

from __future__ import annotations

import os
import signal
import threading
from array import array
from pathlib import Path

from lmx.backends import (
    Backend,
    BackendBroken,
    Drafted,
    Feature,
    Logprobs,
    Memory,
    Prefilled,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
    VectorEvent,
    Vocabulary,
)
from lmx.backends.lookup import Pays
from lmx.backends.prefix_tree import common
from lmx.chat_template import ChatTemplate
from lmx.config import EngineSettings
from lmx.errors import GenerationFailed, ModelLoadFailed

VOCABULARY = 1000
END = 999
LONGEST = 998
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}"


class Always(Pays):
    """Guesses, and long ones, however long they take."""

    worth = True
    length = 32


class Only:
    """A constraint to these tokens in turn, then to the end token, for rows of llama.cpp."""

    def __init__(self, backend: Backend, tokens: list[int]) -> None:
        self._size = len(backend.vocabulary.tokens)
        self._tokens = [*tokens, min(backend.vocabulary.end)]

    def restart(self, answer: list[int]) -> None:
        raise AssertionError("llama.cpp's rows keep their state")

    def accept(self, token: int) -> None:
        assert token == self._tokens.pop(0)

    def mask(self) -> bytes | None:
        mask = bytearray(-(-self._size // 32) * 4)
        mask[self._tokens[0] // 8] |= 1 << self._tokens[0] % 8
        return bytes(mask)


class FakeBackend:
    """One word is one token, the space after it included. In a folder `embeds` it embeds: a vector
    is the tokens. The first word of a prompt may be an order:

    FOREVER repeats its second word until max_tokens; FAIL fails this sequence; RAISE raises in
    `step`; BROKEN says that the engine is; KILL kills the process; HANG never returns.

    In a folder `fast` it has all features: what earlier prompts began with is cached, and a lone
    sequence's first token has come with two guesses, of which one was right.
    """

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int = 0) -> None:
        if path.name == "broken":
            raise ModelLoadFailed(f"{path}/weights: not weights")
        if path.name == "dies":
            os.write(2, b"about to die\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "hangs":
            threading.Event().wait()
        os.write(1, b"a library that prints to stdout\n")
        self.context_length = settings.context_length or 64
        tokens = [b""] * VOCABULARY
        tokens[LONGEST], tokens[END] = b"x" * 20, b"<end>"
        self.vocabulary = Vocabulary(tokens, frozenset([END]), frozenset([END]))
        self.dimensions = 3 if path.name == "embeds" else 0
        self.tool_parser: str | None = None
        self.parallel = settings.parallel
        self.engine = "fake 1.0"
        self.features: frozenset[Feature] = frozenset()
        if path.name == "fast":
            self.features = frozenset(["batch", "ragged", "prefix", "draft"])
        self.chat_template: ChatTemplate | None = ChatTemplate(TEMPLATE)
        self._words: dict[str, int] = {}
        self._sequences: dict[int, tuple[Sequence, int]] = {}
        self._prompts: list[list[int]] = []
        """Cached."""
        self.added: list[Sequence] = []
        self.kv_bytes = kv_bytes
        self.closed = False

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        tokens = []
        for word in text.split():
            token = self._words.setdefault(word, len(self._words))
            self.vocabulary.tokens[token] = f"{word} ".encode()
            tokens.append(token)
        return tokens

    def add(self, sequence: Sequence) -> None:
        self.added.append(sequence)
        self._sequences[sequence.uid] = (sequence, 0)

    def remove(self, uid: int) -> None:
        self._sequences.pop(uid, None)

    @property
    def uids(self) -> list[int]:
        return list(self._sequences)

    def step(self) -> list[StepEvent]:
        names = {token: word for word, token in self._words.items()}
        events: list[StepEvent] = []
        for uid, (sequence, done) in list(self._sequences.items())[: self.parallel]:
            if self.dimensions:
                del self._sequences[uid]
                events.append(VectorEvent(uid, [float(token) for token in sequence.prompt[:3]]))
                continue
            if not done:
                events += self._prefilled(sequence)
            words = [names.get(token, "") for token in sequence.prompt]
            match words[0]:
                case "RAISE":
                    raise RuntimeError("an engine's bug")
                case "BROKEN":
                    raise BackendBroken("[METAL] Command buffer execution failed")
                case "KILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "HANG":
                    threading.Event().wait()
                case "FAIL":
                    del self._sequences[uid]
                    events.append(SequenceFailed(uid, GenerationFailed("it failed")))
                    continue
            forever = words[0] == "FOREVER"
            if not forever and done == len(words):
                del self._sequences[uid]
                events.append(TokenEvent(uid, END, "stop"))
                continue
            token = sequence.prompt[1 if forever else done]
            k = sequence.params.logprobs
            logprobs = None if k is None else Logprobs(-0.5, [(token, -0.5), (END, -1.0)][:k])
            self._sequences[uid] = (sequence, done + 1)
            if done + 1 == sequence.max_tokens:
                del self._sequences[uid]
                events.append(TokenEvent(uid, token, "length", logprobs))
            else:
                events.append(TokenEvent(uid, token, None, logprobs))
        return events

    def _prefilled(self, sequence: Sequence) -> list[StepEvent]:
        prompt, cached = sequence.prompt, 0
        if "prefix" in self.features and not any(prompt is known for known in self._prompts):
            most = len(prompt) - 1
            cached = max((common(array("i", p), prompt, 0, most) for p in self._prompts), default=0)
            self._prompts.append(prompt)
        events: list[StepEvent] = [Prefilled(sequence.uid, cached)]
        if "draft" in self.features and len(self._sequences) == 1:
            events.append(Drafted(sequence.uid, 2, 1))
        return events

    def grant(self, kv_bytes: int) -> Memory:
        self.kv_bytes = max(kv_bytes, 0)
        return Memory(0, self.kv_bytes, 0, 0.25)

    def use(self, features: frozenset[Feature]) -> None:
        assert not self._sequences
        self.features = features
        self._prompts.clear()

    def close(self) -> None:
        self.closed = True


def load(path: Path, format: str, settings: EngineSettings, kv_bytes: int) -> FakeBackend:
    return FakeBackend(path, settings, kv_bytes)
