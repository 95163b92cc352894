"""MLX models on mlx-lm's code: what waits, what is prefilled, what decodes, and the prefix cache.

The process's main thread loads, steps and frees the model: MLX streams and compiled functions
belong to a thread. A step prefills a slice of a prompt, then decodes a token for every row.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..config import EngineSettings
from ..errors import GenerationFailed, InsufficientMemory
from ..generation import SamplingParams
from ..kv_cache import whole_steps
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
from .lookup import Lookup, Pays
from .mlx_batch import Batch, Drawn, Row, place
from .mlx_cache import can_merge
from .mlx_draft import DraftModel
from .mlx_head import Head
from .mlx_model import ENGINE, MLXModel
from .mlx_prefill import Prompt, choose, draw_first, prefill, prefill_together, stops, tail
from .mlx_prefix import Prefixes
from .mlx_sampling import Sampler
from .prefix_tree import common

GROWTH_TOKENS: Final = 64
"""What a sequence must find free beyond its tokens to join others: with less it would soon have to
leave again, and every return costs a prefill."""

SHARED_TOKENS: Final = 64
"""A prompt that shares so many unknown tokens with another waits until that one has them."""


class MLXBackend:
    dimensions = 0

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        mx.set_cache_limit(settings.mlx_cache_bytes)
        if settings.wired_bytes:
            mx.set_wired_limit(settings.wired_bytes)
        model = MLXModel(path, settings)
        self._network, self._head = model.network, Head(model.network)
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
        self._owing = False
        """The last step has decoded nothing."""
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
        prompt = next((p for p in self._prompts if row in p.rows), None)
        if prompt is None:
            self._keep_answer(row)
            self._batch.leave([row])
        elif row is not prompt.row:
            prompt.followers.remove(row)
        elif prompt.followers:
            prompt.row = prompt.followers.pop(0)
        else:
            self._end(prompt)
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
        size = self._kv_size()
        self._prefixes.evict(self._kv_bytes - size)
        self._kv_peak = max(self._kv_peak, size + self._prefixes.bytes)
        events, self._failed = self._failed, []
        context = max((prompt.done for prompt in self._prompts), default=0)
        budget = self._rate.slice_tokens(context, decoding=bool(self._batch.rows))
        while self._prompts and budget >= SLICE_TOKENS[0] and not self._owing:
            budget -= self._prefill(budget, events)
        # First tokens go out before the next ones are computed; those are put off only once.
        began = any(isinstance(event, TokenEvent) for event in events)
        self._owing = began and not self._owing
        if self._batch.rows and not self._owing:
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

    def _fits(self, more: Iterable[Row] = (), growth: int = 1) -> bool:
        """Whether the grant allows it, if need be without what the draft model has read."""
        fits = self._kv_size(more, growth) <= self._kv_bytes
        if not fits and self._draft and self._draft.kv_bytes:
            self._draft.forget()
            fits = self._kv_size(more, growth) <= self._kv_bytes
        return fits

    def _give_way(self) -> None:
        """Before the KV cache outgrows its grant, the youngest goes back to the queue."""
        while self._rows and not self._fits():
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

    @property
    def _room(self) -> int:
        """What the rows' KV caches leave to past prompts."""
        return self._kv_bytes - self._kv_size()

    def grant(self, kv_bytes: int) -> Memory:
        kept, before = self._kv_size(growth=0), self._prefixes.bytes
        if self._draft and kept > kv_bytes:
            before += self._draft.kv_bytes
            self._draft.forget()
            kept = self._kv_size(growth=0)
        if self._rows:
            # Nobody makes way for the oldest: with less it could only fail in mid-answer.
            oldest = next(iter(self._rows.values())).sequence
            end = self._kv_cache.bytes(len(oldest.prompt) + oldest.max_tokens)
            kept = max(kept, min(self._kv_bytes, end))
        self._kv_bytes = max(kv_bytes, kept)
        padding, self._padding = self._padding, 0.0
        used, self._kv_peak = max(self._kv_peak, self._prefixes.bytes), 0
        self._prefixes.evict(self._room)
        if self._prefixes.bytes < before:
            mx.clear_cache()  # what was given back must be free for others, and not for reuse here
        held: int = max(mx.get_active_memory() + mx.get_cache_memory(), mx.get_peak_memory())
        mx.reset_peak_memory()
        return Memory(held, self._kv_bytes, used, padding)

    # Prompts.

    def _admit(self) -> None:
        """Let those that wait begin, in order of arrival, as far as rows and memory go."""
        while self._waiting and len(self._rows) < self.parallel:
            row = self._waiting[0]
            if not self._fits([row], GROWTH_TOKENS):
                if self._rows:
                    return
                if not self._fits([row]):
                    self._waiting.popleft()
                    self._fail_for_memory(row, self._kv_size([row]))
                    continue
            self._waiting.popleft()
            self._rows[row.uid] = row
            self._queue(row)

    def _queue(self, row: Row) -> None:
        last = self._prompts[-1] if self._prompts else None
        same = last and last.row.sequence.prompt is row.sequence.prompt
        if last and same and not (last.row.answer or row.answer):
            last.followers.append(row)
            return
        self._prompts.append(Prompt(row))
        self._wait(self._prompts[-1])

    def _wait(self, prompt: Prompt) -> None:
        """For the one before it that has most to compute of what both begin with."""
        prompt.behind, tokens = None, prompt.row.tokens
        prompt.done = self._prefixes.known(tokens)
        # Past what they share, others still have it where it can be cut off, and else never again.
        for other in self._prompts[: self._prompts.index(prompt)] if self._prefixes.on else ():
            least = prompt.shared if prompt.behind else prompt.done + SHARED_TOKENS - 1
            theirs = other.row.tokens[:-1]
            if theirs[: least + 1] != tokens[: least + 1]:
                continue
            shared = common(array("i", theirs), tokens, 0, len(tokens) - 1)
            if shared > least and other.done < shared:
                prompt.behind, prompt.shared = other, shared
            elif shared > least and self._prefixes.whole and other.cache:
                self._prefixes.keep(theirs[:shared], other.cache, 0, self._room)
                prompt.behind, prompt.done = None, self._prefixes.known(tokens)

    def _prefill(self, budget: int, events: list[StepEvent]) -> int:
        """At most so many tokens of one prompt, or of several short ones; what that has cost."""
        ready = [prompt for prompt in self._prompts if prompt.behind is None]
        chosen = choose(ready, budget, passed=self._passed, whole=self._prefixes.whole)
        self._passed = ready[0] not in chosen
        try:
            for prompt in chosen:
                if prompt.cache is None:
                    self._begin(prompt, alone=len(chosen) == 1)
            if len(chosen) * max(prompt.left for prompt in chosen) > budget:
                chosen = chosen[:1]  # what was known of one has been evicted
            start, before = time.perf_counter(), chosen[0].done
            count, logits = self._compute(chosen, budget)
            context = (before + chosen[0].done) / 2
            self._rate.measured(count, time.perf_counter() - start, context)
            for prompt in chosen:
                self._keep_prompt(prompt)
            ended = [n for n, prompt in enumerate(chosen) if not prompt.left]
            rows = [(row, n) for n in ended for row in chosen[n].rows]
            drawn = draw_first(rows, logits) if rows else []
        except Exception as error:
            _raise_if_broken(error)
            for prompt in chosen:
                self._end(prompt)
                self._fail(prompt.rows, error, events)
            return budget
        for n in ended:
            self._end(chosen[n])
            self._announce(chosen[n], events)
        finished = self._take(drawn, events)
        for row in finished:
            self._forget(row)
        newcomers = [(row, chosen[n].cache or []) for row, n in rows if row not in finished]
        if newcomers:
            self._batch.join(newcomers)
        # A forward pass costs something however short it is.
        return max(count, SLICE_TOKENS[0])

    def _begin(self, prompt: Prompt, *, alone: bool) -> None:
        """With the longest prefix that is known, and at most all tokens but the last."""
        # Merged with others it is copied anyway, and so much faster the smaller it is.
        cells = whole_steps(prompt.row.length) if alone else 0
        found = self._prefixes.find(prompt.row.tokens, self._room, cells=cells)
        prompt.cache, prompt.cached = found
        prompt.done = prompt.cached
        control = None if self._prefixes.whole else self.vocabulary.control
        prompt.stops = stops(prompt, control)

    def _compute(self, chosen: list[Prompt], budget: int) -> tuple[int, mx.array]:
        """The next tokens of these prompts: how many, and logits of what follows [prompts,
        vocabulary], to be used where a prompt has ended."""
        parts, left = [], tail(chosen)
        for prompt in chosen:
            waited = [p.shared for p in self._prompts if p.behind is prompt]
            last = prompt.row.length - left
            ends = [end for end in (prompt.stops[0], last, *waited) if end > prompt.done]
            stop = min(prompt.done + budget, *ends)
            parts.append(prompt.row.tokens[prompt.done : stop])
            prompt.done = stop
        caches = [prompt.cache or [] for prompt in chosen]
        if len(chosen) == 1:
            logits = prefill(self._head, caches[0], parts[0])
        else:
            caches, logits = prefill_together(self._head, caches, parts)
            for prompt, cache in zip(chosen, caches, strict=True):
                prompt.cache = cache
        return sum(map(len, parts)), logits

    def _announce(self, prompt: Prompt, events: list[StepEvent]) -> None:
        for row in prompt.rows:
            row.cells = prompt.done
            if not row.announced:
                row.announced = True
                events.append(Prefilled(row.uid, prompt.cached if row is prompt.row else 0))

    def _end(self, prompt: Prompt) -> None:
        self._prompts.remove(prompt)
        for other in self._prompts:
            if other.behind is prompt:
                self._wait(other)

    def _keep_prompt(self, prompt: Prompt) -> None:
        waiting = [p for p in self._prompts if p.behind is prompt and p.shared <= prompt.done]
        stopped = bool(prompt.stops) and prompt.done == prompt.stops[0]
        prompt.stops = prompt.stops[stopped:]
        if (stopped and (self._prefixes.whole or prompt.left)) or waiting:
            self._prefixes.keep(prompt.row.tokens[: prompt.done], prompt.cache or [], 0, self._room)
        for other in waiting:
            self._wait(other)

    def _keep_answer(self, row: Row) -> None:
        # Guessing may have left more in the cache than the answer has; a state must be exact.
        if self._prefixes.on and (self._prefixes.whole or row.cells <= row.length):
            tokens = row.tokens[: row.cells]
            self._prefixes.keep(tokens, *self._batch.cache(row), self._room)

    # Decoding.

    def _decode(self, events: list[StepEvent]) -> None:
        start = time.perf_counter()
        try:
            drawn = self._guess(events) or self._step(start)
        except Exception as error:
            _raise_if_broken(error)
            self._recover(error, events)
            return
        finished = self._take(drawn, events)
        for row in finished:
            self._keep_answer(row)
            self._forget(row)
        if finished:
            self._batch.leave(finished)

    def _take(self, drawn: list[Drawn], events: list[StepEvent]) -> list[Row]:
        """Report tokens; the rows that end with theirs."""
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
            logprobs = report and report[0][report[1], row.sequence.params.logprobs or 0]
            events.append(TokenEvent(row.uid, token, finish, logprobs))
            if finish:
                finished.append(row)
        return finished

    def _step(self, start: float) -> list[Drawn]:
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
        most = min(self._settings.draft_tokens, self._pays.length)
        most = min(most, row.sequence.max_tokens - len(row.answer) - 1)
        more = self._draft.missing_bytes(row.length + most) if self._draft else 0
        if self._kv_size(growth=most + 1) + more > self._kv_bytes:
            return []
        guess = self._propose(row, most)
        if not guess:
            self._guessed = self._draft is not None  # it was reading: no plain step
            return []
        tokens = self._batch.verify(guess)
        self._guessed = True
        self._pays.guessed(time.perf_counter() - start, len(guess), len(tokens))
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
        if self._draft:
            self._draft.forget()
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
        del self._batch, self._network, self._head, self._prefixes, self._draft
        gc.collect()
        mx.clear_cache()


def _raise_if_broken(error: Exception) -> None:
    if "[METAL]" in str(error):
        raise BackendBroken(str(error)) from error
