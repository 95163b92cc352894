"""How MLX rows are sampled: one call for all rows with equal parameters, no sync, no history."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx

from ..generation import SamplingParams


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

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [rows, vocabulary] to token ids [rows]."""
        if self._temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        ids = None
        if self._top_k or self._top_p < 1:
            ids = self._likeliest(logprobs)
            logprobs = mx.take_along_axis(logprobs, ids, axis=-1)
            probabilities = mx.softmax(logprobs.astype(mx.float32), axis=-1)
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            logprobs = mx.where(before < self._top_p, logprobs, -mx.inf)
        if self._min_p > 0:
            likeliest = mx.max(logprobs, axis=-1, keepdims=True)
            floor = likeliest + mx.log(mx.array(self._min_p))
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        drawn = mx.random.categorical(
            logprobs.astype(mx.float32) * (1 / self._temperature), key=self._key()
        )
        if ids is None:
            return drawn
        return mx.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]

    def _likeliest(self, logprobs: mx.array) -> mx.array:
        """Ids of the top_k tokens, likeliest first; of all of them where top_k is off.

        Sorted, because a seeded draw picks by position: unsorted, the last bit of a logit could
        move every candidate.
        """
        vocabulary = logprobs.shape[-1]
        if not 0 < self._top_k < vocabulary:
            return mx.argsort(-logprobs, axis=-1)
        ids = mx.argpartition(-logprobs, kth=self._top_k - 1, axis=-1)[..., : self._top_k]
        order = mx.argsort(-mx.take_along_axis(logprobs, ids, axis=-1), axis=-1)
        return mx.take_along_axis(ids, order, axis=-1)

    def _key(self) -> mx.array | None:
        if self._seed is None:
            return None
        self.drawn += 1
        # The golden-ratio step of splitmix64 keeps neighbouring seeds and positions apart.
        key: mx.array = mx.random.key((self._seed + self.drawn * 0x9E3779B97F4A7C15) % 2**64)
        return key


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

    def __call__(self, history: mx.array, logits: mx.array) -> mx.array:
        """`history` [tokens] ends with this step's input, `logits` [1, vocabulary] follow it."""
        params = self._params
        if self._state is None:
            bias, in_prompt, counts = self._start(logits.shape[-1])
        else:
            bias, in_prompt, counts = self._state
            counts = counts.at[history[-1:]].add(1)
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
