"""MLX models on mlx-lm's code: what waits, what is prefilled, what decodes, and the prefix cache.

The process's main thread loads, steps and frees the model: MLX streams and compiled functions
belong to a thread. A step prefills a slice of a prompt, then decodes a token for every row.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..config import EngineSettings
from ..errors import GenerationFailed, InsufficientMemory
from ..generation import SamplingParams
from . import (
    SLICE_TOKENS,
    BackendBroken,
    Drafted,
    Feature,
    Memory,
    Prefilled,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
)
from .borders import borders
from .lookup import Lookup, Pays
from .mlx_batch import SHORT_CELLS, Batch, Drawn, Prompt, Row, fit, place, prefill, prefill_together
from .mlx_cache import Cache, can_merge
from .mlx_draft import DraftModel
from .mlx_model import ENGINE, MLXModel
from .mlx_prefix import Prefixes
from .mlx_sampling import Sampler

PREFILL_ROWS: Final = 8
"""Short prompts prefilled together."""

GROWTH_TOKENS: Final = 64
"""What a sequence must find free beyond its tokens to join others: with less it would soon have to
leave again, and every return costs a prefill."""

SHARED_TOKENS: Final = 64
"""A prompt that shares so many unknown tokens with another waits for that one's cache."""


class MLXBackend:
    dimensions = 0

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        mx.set_cache_limit(settings.mlx_cache_bytes)
        if settings.wired_bytes:
            mx.set_wired_limit(settings.wired_bytes)
        model = MLXModel(path, settings)
        self._network = model.network
        self._tokenizer = model.tokenizer
        self._kv_cache = model.kv_cache
        self.vocabulary = model.vocabulary
        self.chat_template = model.chat_template
        self.tool_parser = model.tool_parser
        self.context_length = model.context_length
        self.engine = ENGINE
        self._draft: DraftModel | None = None
        if settings.draft_model and settings.draft_tokens:
            self._draft = DraftModel(Path(settings.draft_model), settings, model.vocabulary)
        self._kv_bytes = kv_bytes
        self._kv_peak = 0
        """The most the KV cache has taken since the last report."""
        self._padding = 0.0
        self._settings = settings
        self._rate = PrefillRate(settings.prefill_slice_seconds)
        self._pays = Pays()
        self._samplers: dict[tuple[float, int, float, float], Sampler] = {}
        self._waiting: deque[Row] = deque()
        self._rows: dict[int, Row] = {}
        """Those that are prefilled or decode, by uid, in order of arrival."""
        self._prompts: list[Prompt] = []
        """Of the rows that are prefilled, in order of arrival."""
        self._passed = False
        """The oldest prompt has been passed by another."""
        self._lookup: tuple[Row, Lookup] | None = None
        self._guessed = False
        """The last step has; its successor has nothing to wait for."""
        self._failed: list[StepEvent] = []
        """To be told by the next step."""
        self._prefixes = Prefixes(self._network, model.name, self._kv_cache, settings)
        self._supported: set[Feature] = set()
        if settings.prefix_cache_bytes != 0:
            self._supported.add("prefix")
        if can_merge(make_prompt_cache(self._network)):
            self._supported |= {"batch", "ragged"}
        if self._prefixes.whole and settings.draft_tokens:
            self._supported.add("draft")
        self.use(frozenset(self._supported))

    def use(self, features: frozenset[Feature]) -> None:
        self.features = features & self._supported
        self.parallel = self._settings.parallel if "batch" in self.features else 1
        self._prefixes.on = "prefix" in self.features
        self._prefixes.clear()
        self._batch = self._new_batch()

    def _new_batch(self) -> Batch:
        return Batch(self._network, split="ragged" in self.features)

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=raw).ids
        return ids

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(Row(sequence, self._sampler(sequence.params)))

    def _sampler(self, params: SamplingParams) -> Sampler:
        """The sampler for these parameters. Rows that share the object are sampled in one call."""
        if params.temperature == 0:
            key = (0.0, 0, 1.0, 0.0)
        else:
            key = (params.temperature, params.top_k, params.top_p, params.min_p)
            if params.seed is not None:
                return Sampler(*key, seed=params.seed)
        return self._samplers.setdefault(key, Sampler(*key))

    def remove(self, uid: int) -> None:
        for row in self._waiting:
            if row.uid == uid:
                self._waiting.remove(row)
                return
        if uid in self._rows:
            self._withdraw(self._rows[uid])

    def _withdraw(self, row: Row) -> None:
        """Take out a row that is prefilled or decodes."""
        for prompt in self._prompts:
            if prompt.row is row and prompt.followers:
                prompt.row = prompt.followers.pop(0)
            elif prompt.row is row:
                self._prompts.remove(prompt)
            elif row in prompt.followers:
                prompt.followers.remove(row)
            else:
                continue
            break
        else:
            self._keep_answer(row)
            self._batch.leave([row])
        self._forget(row)

    def _forget(self, row: Row) -> None:
        del self._rows[row.uid]
        if self._lookup and self._lookup[0] is row:
            self._lookup = None
        if not self._rows:
            self._samplers.clear()

    def step(self) -> list[StepEvent]:
        self._give_way()
        self._admit()
        self._make_room()
        self._kv_peak = max(self._kv_peak, self._kv_size() + self._prefixes.bytes)
        events, self._failed = self._failed, []
        budget = self._slice_tokens()
        while self._prompts and budget > 0:
            budget -= self._prefill(budget, events)
        if self._batch.rows:
            self._padding = max(self._padding, self._batch.padding())
            self._decode(events)
        return events

    # Memory.

    def _kv_size(self, more: Iterable[Row] = (), growth: int = 1) -> int:
        """What the KV caches of all rows and of `more` take with `growth` more tokens each."""
        groups = [[row.length for row in group] for group in self._batch.groups]
        rows = [row for prompt in self._prompts for row in prompt.rows]
        for row in (*rows, *more):
            place(groups, row.length, split="ragged" in self.features)
        drafts = self._draft.kv_bytes if self._draft else 0
        return drafts + sum(
            len(lengths) * self._kv_cache.bytes(min(max(lengths) + growth, self.context_length))
            for lengths in groups
        )

    def _give_way(self) -> None:
        """Before the KV cache outgrows its grant, the youngest goes back to the queue."""
        while self._rows and self._kv_size() > self._kv_bytes:
            row = list(self._rows.values())[-1]
            alone = self._kv_size()
            self._withdraw(row)
            if self._rows:
                self._waiting.appendleft(row)
            else:
                self._fail_for_memory(row, alone)

    def _fail_for_memory(self, row: Row, needed: int) -> None:
        error = InsufficientMemory(
            f"The KV cache of {row.length + 1} tokens takes {needed / 2**30:.2f} GB, and the "
            f"memory limit leaves this model {self._kv_bytes / 2**30:.2f} GB for it."
        )
        self._failed.append(SequenceFailed(row.uid, error))

    def _make_room(self) -> None:
        """Past prompts get what the rows leave."""
        self._prefixes.evict(self._room)

    @property
    def _room(self) -> int:
        """What the rows' KV caches leave."""
        return self._kv_bytes - self._kv_size()

    def grant(self, kv_bytes: int) -> Memory:
        kept = self._kv_size(growth=0)
        if self._rows:
            # Nobody makes way for the oldest: with less it could only fail in mid-answer.
            oldest = next(iter(self._rows.values())).sequence
            end = self._kv_cache.bytes(len(oldest.prompt) + oldest.max_tokens)
            kept = max(kept, min(self._kv_bytes, end))
        self._kv_bytes = max(kv_bytes, kept)
        padding, self._padding = self._padding, 0.0
        used, self._kv_peak = max(self._kv_peak, self._prefixes.bytes), 0
        before = self._prefixes.bytes
        self._make_room()
        if self._prefixes.bytes < before:
            mx.clear_cache()  # what was given back must be free for others, and not for reuse here
        held: int = mx.get_active_memory() + mx.get_cache_memory()
        held = max(held, mx.get_peak_memory())
        mx.reset_peak_memory()
        return Memory(held, self._kv_bytes, used, padding)

    # Prompts.

    def _slice_tokens(self) -> int:
        return self._rate.slice_tokens(decoding=bool(self._batch.rows))

    def _admit(self) -> None:
        """Let those that wait begin, in order of arrival, as far as rows and memory go."""
        while self._waiting and len(self._rows) < self.parallel:
            row = self._waiting[0]
            if self._kv_size([row], GROWTH_TOKENS) > self._kv_bytes:
                if self._rows:
                    return
                if (needed := self._kv_size([row])) > self._kv_bytes:
                    self._waiting.popleft()
                    self._fail_for_memory(row, needed)
                    continue
            self._waiting.popleft()
            self._rows[row.uid] = row
            self._queue(row)

    def _queue(self, row: Row) -> None:
        last = self._prompts[-1] if self._prompts else None
        if last and last.row.sequence.prompt is row.sequence.prompt and not row.answer:
            last.followers.append(row)
            return
        prompt = Prompt(row)
        if self._prefixes.on:
            tokens = row.tokens
            prompt.done = self._prefixes.known(tokens)
            start = tokens[: prompt.done + SHARED_TOKENS]
            same = (p for p in self._prompts if p.row.tokens[: len(start)] == start)
            prompt.behind = next(same, None)
        self._prompts.append(prompt)

    def _prefill(self, budget: int, events: list[StepEvent]) -> int:
        """At most so many tokens of one prompt, or of several short ones; what that has cost."""
        chosen = self._choose(budget)
        try:
            for prompt in chosen:
                if prompt.cache is None:
                    self._begin(prompt)
            start = time.perf_counter()
            count = self._compute([prompt for prompt in chosen if prompt.left], budget)
            self._rate.measured(count, time.perf_counter() - start)
            for prompt in chosen:
                self._keep_prompt(prompt)
        except Exception as error:
            _raise_if_broken(error)
            for prompt in chosen:
                self._end(prompt)
                self._fail(prompt.rows, error, events)
            return budget
        newcomers: list[tuple[Row, Cache]] = []
        for prompt in chosen:
            if not prompt.left:
                self._end(prompt)
                newcomers += self._joining(prompt, events)
        self._batch.join(newcomers)
        # A forward pass costs something however short it is.
        return max(count, SLICE_TOKENS[0])

    def _choose(self, budget: int) -> list[Prompt]:
        """The shortest, with others that are short too; the oldest at least every other time."""
        ready = [prompt for prompt in self._prompts if prompt.behind is None]
        oldest = ready[0]
        first, *others = sorted(ready, key=lambda prompt: prompt.left)
        if self._passed:
            first, others = oldest, []
        chosen = [first]
        for prompt in others[: PREFILL_ROWS - 1]:
            several = [*chosen, prompt]
            too_much = len(several) * prompt.left > budget
            stops = not self._prefixes.whole and prompt.row.length > SHORT_CELLS
            if too_much or stops or not fit([p.row.length for p in several]):
                break
            chosen = several
        self._passed = oldest not in chosen
        return chosen

    def _begin(self, prompt: Prompt) -> None:
        """With the longest prefix that is known, and at most all tokens but the last."""
        tokens = prompt.row.tokens
        end = len(tokens) - 1
        prompt.cache, prompt.cached = self._prefixes.find(tokens, self._room)
        prompt.done = prompt.cached
        if end > prompt.done:
            prompt.stops = [end]
            if not self._prefixes.whole:
                inner = borders(tokens, self.vocabulary.control)
                first = prompt.done + SHORT_CELLS  # a state is large, and little prefilled soon
                prompt.stops = [at for at in inner if first <= at < end] + [end]

    def _compute(self, chosen: list[Prompt], budget: int) -> int:
        """The next tokens of these prompts; how many."""
        parts = []
        for prompt in chosen:
            stop = min(prompt.done + budget, prompt.stops[0])
            parts.append(prompt.row.tokens[prompt.done : stop])
            prompt.done = stop
        caches = [prompt.cache or [] for prompt in chosen]
        if len(chosen) > 1:
            for prompt, cache in zip(
                chosen, prefill_together(self._network, caches, parts), strict=True
            ):
                prompt.cache = cache
        elif chosen:
            prefill(self._network, caches[0], parts[0])
        return sum(map(len, parts))

    def _joining(self, prompt: Prompt, events: list[StepEvent]) -> list[tuple[Row, Cache]]:
        for row in prompt.rows:
            row.cells = prompt.done
            row.draw()
            if not row.announced:
                row.announced = True
                events.append(Prefilled(row.uid, prompt.cached if row is prompt.row else 0))
        return [(row, prompt.cache or []) for row in prompt.rows]

    def _end(self, prompt: Prompt) -> None:
        self._prompts.remove(prompt)
        for other in self._prompts:
            if other.behind is prompt:
                other.behind = None

    def _keep_prompt(self, prompt: Prompt) -> None:
        if prompt.stops and prompt.done == prompt.stops[0]:
            prompt.stops.pop(0)
            tokens = prompt.row.tokens[: prompt.done]
            self._prefixes.keep(tokens, prompt.cache or [], 0, self._room)

    def _keep_answer(self, row: Row) -> None:
        # Guessing may have left more in the cache than the answer has; a state must be exact.
        if self._prefixes.on and (self._prefixes.whole or row.cells == row.length):
            self._prefixes.keep(row.tokens, *self._batch.cache(row), self._room)

    # Decoding.

    def _decode(self, events: list[StepEvent]) -> None:
        try:
            drawn = self._guess(events) or self._step()
        except Exception as error:
            _raise_if_broken(error)
            self._recover(error, events)
            return
        finished: list[Row] = []
        for row, token, report in drawn:
            if row in finished:
                break  # guessed on beyond its end
            row.answer.append(token)
            if self._lookup and self._lookup[0] is row:
                self._lookup[1].extend([token])
            finish: Literal["stop", "length"] | None = None
            if token in self.vocabulary.end:
                finish = "stop"
            elif len(row.answer) == row.sequence.max_tokens:
                finish = "length"
            logprobs = None
            if report is not None:
                of_step, at = report
                logprobs = of_step[at, row.sequence.params.logprobs or 0]
            events.append(TokenEvent(row.uid, token, finish, logprobs))
            if finish:
                finished.append(row)
        for row in finished:
            self._keep_answer(row)
            self._forget(row)
        if finished:
            self._batch.leave(finished)

    def _step(self) -> list[Drawn]:
        start = time.perf_counter()
        drawn = self._batch.step()
        # What a step takes is seen in the next one, which waits for it.
        if len(self._batch.rows) == 1 and drawn and not self._guessed:
            self._pays.plain(time.perf_counter() - start)
        self._guessed = False
        return drawn

    def _guess(self, events: list[StepEvent]) -> list[Drawn]:
        """The tokens of a guess that the model confirms, and the one before; none without one."""
        row = self._batch.alone if "draft" in self.features else None
        if row is None or self._prompts or self._waiting or not self._pays.worth:
            return []
        start = time.perf_counter()
        most = row.sequence.max_tokens - len(row.answer) - 1
        guess = self._propose(row, min(most, self._settings.draft_tokens))
        if not guess:
            return []
        tokens = self._batch.verify(guess)
        self._guessed = True
        self._pays.guessed(time.perf_counter() - start, len(tokens))
        events.append(Drafted(row.uid, len(guess), len(tokens) - 1))
        return [(row, token, None) for token in tokens]

    def _propose(self, row: Row, most: int) -> list[int]:
        """What may follow the token that is being computed."""
        if self._draft:
            return self._draft.propose([*row.tokens, self._batch.peek()], most) if most else []
        if not self._lookup or self._lookup[0] is not row:
            self._lookup = row, Lookup(row.tokens)
        first, *guess = self._lookup[1].propose(most + 1) or [-1]
        # Only with something to win is it worth waiting for that token.
        return guess if guess and first == self._batch.peek() else []

    # Failures.

    def _recover(self, error: Exception, events: list[StepEvent]) -> None:
        """After a failed step nothing of the batch can be used. Rows in their first step are the
        suspects and fail; the others are prefilled again and go on where they were. Without a
        suspect all fail."""
        rows = self._batch.rows
        suspects = [row for row in rows if not row.read] or rows
        self._batch = self._new_batch()
        survivors = [row for row in rows if row not in suspects]
        for row in survivors:
            self._forget(row)
        self._waiting.extendleft(reversed(survivors))
        self._fail(suspects, error, events)

    def _fail(self, rows: list[Row], error: Exception, events: list[StepEvent]) -> None:
        reason = GenerationFailed(f"The engine failed: {error}")
        for row in rows:
            self._forget(row)
            events.append(SequenceFailed(row.uid, reason))
        mx.clear_cache()

    def close(self) -> None:
        self._rows.clear()
        self._waiting.clear()
        self._prompts.clear()
        self._prefixes.save()
        self._prefixes.clear()
        del self._batch, self._network, self._prefixes, self._draft
        gc.collect()
        mx.clear_cache()


def _raise_if_broken(error: Exception) -> None:
    if "[METAL]" in str(error):
        raise BackendBroken(str(error)) from error
