"""What an engine must do, and the choice of one. Importing this imports no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from ..config import EngineSettings
from ..embedders import gguf_embeds, mlx_embeds
from ..errors import LMXError
from ..generation import SamplingParams
from ..gguf_header import read_header
from ..mlx_folder import read_folder

FIRST_SLICE_TOKENS: Final = 256
SLICE_TOKENS: Final = (32, 2048)
"""Bounds of one slice of prefill; beyond the upper one neither engine computes faster."""
CONTEXT_TOKENS: Final = 4096
"""Where attention is thought to take as long as all else, until measured."""
IDLE_SLICE_SECONDS: Final = 1.0
"""A slice while nothing decodes: what a new request or a cancellation waits for at most."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokens: list[bytes]
    """What each token id stands for; of a control token, its name."""
    control: frozenset[int]
    """Tokens that are no text: an answer shows them only where they mean something."""
    end: frozenset[int]
    """Tokens that end an answer."""


class Constraint(Protocol):
    """Which tokens may come next. Used by one thread at a time."""

    def restart(self, answer: list[int]) -> None:
        """Be where it is after these tokens."""

    def accept(self, token: int) -> None:
        """Move on by a token that was drawn."""

    def mask(self) -> bytes | None:
        """A bit for each token of the vocabulary, lowest first in each byte, set if it may come
        next, in whole 32-bit words. None: any may."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request as the backend sees it: `prompt` is never empty, `max_tokens` at least 1, and both
    together fit in the context. Sequences that share the `prompt` object and come one after another
    are prefilled once, where their cache can be copied."""

    uid: int
    prompt: list[int]
    max_tokens: int
    params: SamplingParams
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of a drawn token, from the model's own distribution."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and theirs, likeliest first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of a sequence. With `finish` set the sequence has left the batch."""

    uid: int
    token: int
    finish: Literal["stop", "length"] | None = None
    """`stop`: the token is one of the vocabulary's end tokens; stop strings are found outside the
    backend, in text."""
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class VectorEvent:
    """An input's embedding, from a backend that embeds; the sequence has left it."""

    uid: int
    vector: list[float]
    """A unit vector, where the model was trained for that."""


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The engine failed on this sequence, which is gone from the batch; the others go on."""

    uid: int
    error: LMXError


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A sequence's prompt is in the KV cache; its tokens follow. Once per sequence, and before its
    first token."""

    uid: int
    cached_tokens: int
    """Of the prompt, those whose KV cache was there already: at most all but the last."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """Tokens were guessed ahead for a sequence. Those that the model drew as well follow as
    `TokenEvent`s like any other."""

    uid: int
    tokens: int
    accepted: int


StepEvent = Prefilled | Drafted | TokenEvent | VectorEvent | SequenceFailed

Feature = Literal["batch", "ragged", "prefix", "draft"]
"""What makes a backend faster and must not change what it says: several sequences together; those
of different lengths without padding; KV caches of past prompts; guessing ahead."""


@dataclass(frozen=True, slots=True)
class Memory:
    engine_bytes: int
    """The most the engine has held since the last question, KV cache included."""
    kv_bytes: int
    """What the KV cache may take."""
    kv_used_bytes: int
    """The most it has taken since the last question, past prompts included."""
    padding: float = 0.0
    """The largest share of a batch's KV cells that held nothing, since the last question."""


class BackendBroken(Exception):
    """The engine cannot be trusted any more (a Metal error): the process must be replaced."""


class PrefillRate:
    """Sizes the slices of prefill by time: what a token takes grows with those before it, by
    attention. Both parts of that are learnt from each slice (normalized least mean squares)."""

    def __init__(self, slice_seconds: float) -> None:
        self._seconds = slice_seconds
        self._first = slice_seconds / FIRST_SLICE_TOKENS
        """Seconds that a prompt's first token takes."""
        self._growth = 0.0
        """By so much longer takes each next one."""

    def slice_tokens(self, context: int = 0, *, decoding: bool) -> int:
        """Tokens behind `context` others that running streams should wait for; more while there
        are none."""
        seconds = self._seconds if decoding else max(self._seconds, IDLE_SLICE_SECONDS)
        low, high = SLICE_TOKENS
        each = self._first + self._growth * context
        # seconds = each n + growth n^2 / 2
        tokens = 2 * seconds / (each + math.sqrt(each**2 + 2 * self._growth * seconds))
        return max(low, min(high, int(tokens)))

    def measured(self, tokens: int, seconds: float, context: float = 0.0) -> None:
        """What a slice has really taken, with so many tokens before each of its own on average; a
        very short one measures overhead and is ignored."""
        if tokens < SLICE_TOKENS[0]:
            return
        expected = self._first + self._growth * context
        error = seconds / tokens - expected
        # Too long a slice is felt, so its lesson counts twice; but one outlier is no rule.
        error = min(error, expected) if error > 0 else error / 2
        x = context / CONTEXT_TOKENS
        error /= 1 + x**2
        self._first = max(self._first / 2, self._first + error)
        self._growth = max(0.0, self._growth + error * x / CONTEXT_TOKENS)


class Template(Protocol):
    source: str | None
    """The template itself, which tells how the model writes tool calls and reasoning; None where it
    is code."""

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt up to where the assistant's answer begins. Any thread.

        Raises:
            InvalidRequest: these messages cannot be rendered.
        """


class Backend(Protocol):
    """A loaded model. One thread makes it and calls everything except what is marked otherwise."""

    context_length: int
    """Tokens of prompt and answer together."""
    vocabulary: Vocabulary
    dimensions: int
    """Of the vectors of a model that embeds: its sequences never generate, and end in a
    `VectorEvent` each. 0: it generates."""
    parallel: int
    """Sequences decoded together; more may be added, they wait in order."""
    engine: str
    features: frozenset[Feature]
    """In use."""

    @property
    def chat_template(self) -> Template | None: ...

    tool_parser: str | None
    """The parser of mlx-lm's that the model's files name."""

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        """Token ids of a rendered prompt; control tokens in the text count as such. Any thread.

        A `raw` text comes from a client and gets the tokens that every input of the model begins
        with, and for embedding ends with.
        """

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it starts in a later `step`."""

    def remove(self, uid: int) -> None:
        """Forget a sequence, wherever it stands; unknown ones are ignored. No event follows."""

    def step(self) -> list[StepEvent]:
        """One decode step for every running sequence and at most one slice of prefill.

        Raises:
            BackendBroken: nothing of this backend may be used any more.
        """

    def grant(self, kv_bytes: int) -> Memory:
        """Let the KV cache take so much from now on, or what it takes already if that is more.

        Sequences that do not fit wait; one that does not fit alone fails.
        """

    def use(self, features: frozenset[Feature]) -> None:
        """Use these features and no others, starting with nothing cached. No sequence is there."""

    def close(self) -> None:
        """Free the model, after keeping on disk what prefixes the settings say."""


def load(path: Path, format: str, settings: EngineSettings, kv_bytes: int) -> Backend:
    """Load the model at `path` on the calling thread; `kv_bytes` is its first grant.

    Raises:
        ModelLoadFailed: which file, and why.
    """
    if format == "gguf":
        if gguf_embeds(path, read_header(path, arrays=False).metadata):
            from .gguf_embedding import GGUFEmbedding

            return GGUFEmbedding(path, settings)
        from .gguf import GGUFBackend

        return GGUFBackend(path, settings, kv_bytes)
    if mlx_embeds(path, read_folder(path).config):
        from .mlx_embedding import MLXEmbedding

        return MLXEmbedding(path, settings)
    from .mlx import MLXBackend

    return MLXBackend(path, settings, kv_bytes)
