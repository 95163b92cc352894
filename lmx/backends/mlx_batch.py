"""mlx-lm's continuous batching with a decode step of our own.

mlx-lm's step normalizes and keeps the whole distribution of every row, samples row by row unless
all rows share one sampler, and asks for each row's grammar mask one after another with a sync each.
Ours draws all rows together (`mlx_sampling.draw`), computes masks while the model runs, and keeps
only what somebody asked for. In its batches `samplers` holds a `Drawing` a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
    greedy_sampler,
)
from mlx_lm.models.cache import make_prompt_cache

from .mlx_sampling import Drawing, Report, draw


class _Batch(GenerationBatch):  # type: ignore[misc]
    _next_tokens: mx.array
    _next_logprobs: list[tuple[Report, int] | None]

    def _step(self) -> tuple[list[int], list[tuple[Report, int] | None]]:
        """One token for every row; returns those of the step before, which are ready."""
        inputs, reports = self._next_tokens, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, reports
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        self._next_tokens, self._next_logprobs, unread = draw(logits, self.samplers, inputs)
        mx.async_eval(self._next_tokens, unread)  # type: ignore[no-untyped-call]
        tokens: Any = inputs.tolist()
        for cached, token in zip(self.tokens, tokens, strict=True):
            cached.append(token)
        return tokens, reports

    def extract_cache(self, idx: int) -> list[Any]:
        return []  # asked for whenever a row ends, and used by nobody


class _Prompts(PromptProcessingBatch):  # type: ignore[misc]
    uids: list[int]
    prompt_cache: list[Any]
    tokens: list[list[int]]
    samplers: list[Drawing]
    logits_processors: list[Any]
    stop_sequences: list[StopSequences]
    max_tokens: list[int]

    def generate(self, tokens: list[list[int]]) -> _Batch:
        """From here on rows decode; those that share a prompt get their copies of its cache."""
        if any(len(t) > 1 for t in tokens):
            self.prompt([t[:-1] for t in tokens])
        keep = list(range(len(self.uids)))
        for i, leader in enumerate(list(self.samplers)):
            for uid, follower, max_tokens in leader.followers:
                keep.append(i)
                self.uids.append(uid)
                self.samplers.append(follower)
                self.max_tokens.append(max_tokens)
            leader.followers = []
        if len(keep) > len(tokens):
            for cache in self.prompt_cache:
                cache.filter(keep)
        batch = _Batch(
            self.model,
            self.uids,
            mx.array([tokens[i][-1] for i in keep]),
            self.prompt_cache,
            [list(self.tokens[i]) for i in keep],
            self.samplers,
            self.fallback_sampler,
            [()] * len(keep),
            [self.stop_sequences[i] for i in keep],
            self.max_tokens,
        )
        self.uids, self.prompt_cache, self.tokens, self.samplers = [], [], [], []
        self.logits_processors, self.stop_sequences, self.max_tokens = [], [], []
        return batch


class Batches(BatchGenerator):  # type: ignore[misc]
    """`insert` takes `Drawing`s for samplers."""

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._prompt_batch = _Prompts.empty(model, self.sampler, self.prefill_step_size)
        self._generation_batch = _Batch.empty(model, self.sampler)

    def new_uid(self) -> int:
        """For a follower, which comes into being when its leader's prompt is done."""
        self._uid_count += 1
        uid: int = self._uid_count - 1
        return uid


class OneAtATime:
    """What is used here of `Batches`, for a KV cache that mlx-lm cannot merge: llama4's, say.

    It merges even the cache of a single sequence. Here the whole prompt is prefilled in one step,
    which holds up nobody else.
    """

    def __init__(self, model: Any, stop_tokens: list[list[int]], prefill_step_size: int) -> None:
        self._model = model
        self._stop = StopSequences(stop_tokens)
        self._prefill_tokens = prefill_step_size
        self.prefill_step_size = prefill_step_size  # set like that of `Batches`, and not used
        self._uid = 0
        self._new: tuple[list[int], int, Drawing] | None = None
        self._batch: _Batch | None = None

    def insert(
        self, prompts: list[list[int]], max_tokens: list[int], samplers: list[Drawing]
    ) -> list[int]:
        self._uid += 1
        self._new = prompts[0], max_tokens[0], samplers[0]
        return [self._uid]

    def next(self) -> tuple[list[Any], list[Any]]:
        if self._new:
            self._batch = self._prefill(*self._new)
            self._new = None
            return [SimpleNamespace(uid=self._uid, end_of_prompt=True)], []
        return [], self._batch.next() if self._batch else []

    def _prefill(self, prompt: list[int], max_tokens: int, drawing: Drawing) -> _Batch:
        cache = make_prompt_cache(self._model)
        for at in range(0, len(prompt) - 1, self._prefill_tokens):
            part = prompt[at : min(at + self._prefill_tokens, len(prompt) - 1)]
            self._model(mx.array([part]), cache=cache)
            mx.eval([c.state for c in cache])
        return _Batch(
            self._model,
            [self._uid],
            mx.array(prompt[-1:]),
            cache,
            [[]],
            [drawing],
            greedy_sampler,
            [()],
            [self._stop],
            [max_tokens],
        )

    @contextmanager
    def stats(self) -> Iterator[Any]:
        yield SimpleNamespace(prompt_tokens=0, prompt_time=0.0)

    def remove(self, uids: list[int]) -> None:
        self._new = self._batch = None  # and with it the KV cache

    def close(self) -> None:
        self.remove([])
