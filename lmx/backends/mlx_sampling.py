"""How MLX rows are sampled: one call for all rows with equal parameters, no sync, no history."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ..generation import SamplingParams
from . import Constraint, Logprobs


class Sampler:
    """Draws one token id a row: top_k, then top_p, then min_p, then temperature.

    Unseeded rows with equal parameters share one object, which makes them one batched call. A
    seeded row has its own, with a key derived from seed and position alone, so that neither its
    neighbours nor a rebuilt batch change its draws.
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None = None
    ) -> None:
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._min_p = min_p
        self._seed = seed
        self.drawn = 0

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [rows, vocabulary] to token ids [rows]."""
        if self._temperature == 0:
            return mx.argmax(logits, axis=-1)
        ids = None
        if self._top_k or self._top_p < 1:
            ids = likeliest(logits, self._top_k)
            logits = mx.take_along_axis(logits, ids, axis=-1)
            probabilities = mx.softmax(logits.astype(mx.float32), axis=-1)
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            logits = mx.where(before < self._top_p, logits, -mx.inf)
        if self._min_p > 0:
            floor = mx.max(logits, axis=-1, keepdims=True) + mx.log(mx.array(self._min_p))
            logits = mx.where(logits < floor, -mx.inf, logits)
        drawn = mx.random.categorical(
            logits.astype(mx.float32) * (1 / self._temperature), key=self._key()
        )
        if ids is None:
            return drawn
        return mx.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]

    def each(self, logits: mx.array) -> mx.array:
        """Of one row's next places [places, vocabulary]: as if they were drawn one by one, without
        counting them as drawn."""
        if self._seed is None:
            return self(logits)
        before = self.drawn
        drawn = [self(logits[i : i + 1]) for i in range(logits.shape[0])]
        self.drawn = before
        return mx.concatenate(drawn)

    def _key(self) -> mx.array | None:
        if self._seed is None:
            return None
        self.drawn += 1
        # The golden-ratio step of splitmix64 keeps neighbouring seeds and positions apart.
        key: mx.array = mx.random.key((self._seed + self.drawn * 0x9E3779B97F4A7C15) % 2**64)
        return key


def likeliest(logits: mx.array, k: int) -> mx.array:
    """Ids of the k likeliest tokens of each row, likeliest first; of all of them where k is 0.

    Sorted, because a seeded draw picks by position: unsorted, the last bit of a logit could move
    every candidate.
    """
    if not 0 < k < logits.shape[-1]:
        return mx.argsort(-logits, axis=-1)
    ids = mx.argpartition(-logits, kth=k - 1, axis=-1)[..., :k]
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


def adjusts(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


class Adjustments:
    """Logit bias and penalties of one row, kept up to date on the device: no sync, no history."""

    def __init__(self, params: SamplingParams, prompt: list[int], answer: list[int]) -> None:
        self._params = params
        self._prompt = prompt
        self._answer = answer[:]
        self._state: tuple[mx.array, mx.array, mx.array] | None = None
        """[vocabulary] each: bias, whether in the prompt, how often in the answer."""

    def __call__(self, token: mx.array, logits: mx.array) -> mx.array:
        """`logits` [1, vocabulary] follow this step's input `token` [1]."""
        params = self._params
        if self._state is None:
            bias, in_prompt, counts = self._start(logits.shape[-1])
        else:
            bias, in_prompt, counts = self._state
            counts = counts.at[token].add(1)
        self._state = bias, in_prompt, counts
        logits = logits.astype(mx.float32) + bias
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(mx.logical_or(in_prompt, counts > 0), penalized, logits)
        return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)

    def _start(self, vocabulary: int) -> tuple[mx.array, mx.array, mx.array]:
        def total(values: dict[int, float]) -> mx.array:
            tokens = mx.array(list(values), dtype=mx.int32)
            return mx.zeros(vocabulary).at[tokens].add(mx.array(list(values.values())))

        return (
            total(self._params.logit_bias),
            total(dict.fromkeys(self._prompt, 1.0)) > 0,
            total(dict(Counter(self._answer))),
        )


class Drawing:
    """How one row draws its tokens."""

    def __init__(
        self,
        sampler: Sampler,
        params: SamplingParams,
        prompt: list[int],
        answer: list[int],
        constraint: Constraint | None,
    ) -> None:
        sampler.drawn = len(answer)
        if constraint:
            constraint.restart(answer)
        self.sampler = sampler
        self.logprobs = params.logprobs
        self._constraint = constraint
        self._adjustments = Adjustments(params, prompt, answer) if adjusts(params) else None
        self._started = False

    @property
    def constrained(self) -> bool:
        return self._constraint is not None

    @property
    def free(self) -> bool:
        """What it draws depends on nothing but the logits, and nobody asks for those."""
        return not (self.constrained or self.adjusted) and self.logprobs is None

    @property
    def adjusted(self) -> bool:
        return self._adjustments is not None

    def adjust(self, token: mx.array, logits: mx.array) -> mx.array:
        return self._adjustments(token, logits) if self._adjustments else logits

    def mask(self, token: int) -> bytes | None:
        """What may follow this step's input."""
        if not self._constraint:
            return None
        if self._started:
            self._constraint.accept(token)
        self._started = True  # the first input belongs to the prompt, or was restarted from
        return self._constraint.mask()


class Report:
    """Log-probabilities of one step, for the rows that asked; lazy until read."""

    def __init__(self, logits: mx.array, ids: mx.array, k: int) -> None:
        """`logits` [rows, vocabulary] are the model's own, `ids` [rows] were drawn."""
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        top = likeliest(logprobs, k) if k else ids[:, None]
        self.arrays = (
            mx.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0],
            top,
            mx.take_along_axis(logprobs, top, axis=-1),
        )

    def __getitem__(self, at: tuple[int, int]) -> Logprobs:
        """Of a row, so many of the likeliest."""
        row, k = at
        drawn, ids, logprobs = self._lists
        return Logprobs(drawn[row], list(zip(ids[row], logprobs[row], strict=True))[:k])

    @cached_property
    def _lists(self) -> list[Any]:
        return [array.tolist() for array in self.arrays]


def draw(
    logits: mx.array, rows: list[Drawing], inputs: mx.array
) -> tuple[mx.array, list[tuple[Report, int] | None], list[mx.array]]:
    """The next token of each row [rows], lazy; where its logprobs are reported; and the arrays of
    these reports, to be evaluated along.

    `logits` [rows, vocabulary] follow `inputs` [rows]. `inputs` come from the step before, so
    waiting for them, which a grammar must, does not wait for this step.
    """
    masks: list[bytes | None] = [None] * len(rows)
    if any(row.constrained for row in rows):
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        tokens: Any = inputs.tolist()
        masks = [row.mask(token) for row, token in zip(rows, tokens, strict=True)]
    own = logits
    if any(row.adjusted for row in rows):
        each = ((row, slice(i, i + 1)) for i, row in enumerate(rows))
        logits = mx.concatenate([row.adjust(inputs[i], logits[i]) for row, i in each])

    groups: dict[tuple[int, bool], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((id(row.sampler), masks[i] is not None), []).append(i)
    parts = []
    for (_, masked), group in groups.items():
        part = logits if len(groups) == 1 else logits[mx.array(group)]
        if masked:
            allowed = _allowed([masks[i] or b"" for i in group], logits.shape[-1])
            part = mx.where(allowed, part, -mx.inf)
        parts.append(rows[group[0]].sampler(part))
    ids = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    if len(parts) > 1:
        order = [i for group in groups.values() for i in group]
        ids = ids[mx.array(np.argsort(order))]

    reports: list[tuple[Report, int] | None] = [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.logprobs is not None]
    if not asking:
        return ids, reports, []
    k = max(row.logprobs or 0 for row in rows)
    which = mx.array(asking)
    report = Report(own[which], ids[which], k)
    for at, i in enumerate(asking):
        reports[i] = report, at
    return ids, reports, list(report.arrays)


def _allowed(masks: list[bytes], vocabulary: int) -> mx.array:
    """Bit masks as booleans [rows, vocabulary]. Logits may be padded beyond the tokenizer."""
    bits = np.frombuffer(b"".join(masks), dtype=np.uint8).reshape(len(masks), -1)
    allowed = np.zeros((len(masks), vocabulary), dtype=bool)
    known = min(vocabulary, bits.shape[1] * 8)
    allowed[:, :known] = np.unpackbits(bits, axis=1, count=known, bitorder="little")
    return mx.array(allowed)
