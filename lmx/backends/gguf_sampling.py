"""How GGUF rows are sampled: llama.cpp's own samplers, and what they have no part for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..generation import SamplingParams
from . import Logprobs

DEFAULT_SEED: Final = 0xFFFFFFFF
"""llama.cpp's LLAMA_DEFAULT_SEED: draw one."""

Logits = npt.NDArray[np.float32]


def new_sampler(params: SamplingParams, prompt: list[int], vocabulary: int, context: int) -> Any:
    """A chain in the order of the fields of SamplingParams; sizes are in tokens."""
    # llama.cpp's default is without performance counters.
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    def penalties(repetition: float, frequency: float, presence: float) -> Any:
        # The window is as long as the context: all tokens count.
        return llama_cpp.llama_sampler_init_penalties(
            vocabulary, context, repetition, frequency, presence
        )

    if biases := params.logit_bias:
        array = (llama_cpp.llama_logit_bias * len(biases))(*biases.items())
        add(llama_cpp.llama_sampler_init_logit_bias(vocabulary, len(biases), array))
    if params.repetition_penalty != 1:
        sampler = penalties(params.repetition_penalty, 0, 0)
        for token in prompt:
            llama_cpp.llama_sampler_accept(sampler, token)
        add(sampler)
    if params.presence_penalty or params.frequency_penalty:
        add(penalties(1, params.frequency_penalty, params.presence_penalty))
    if params.temperature == 0:
        add(llama_cpp.llama_sampler_init_greedy())
        return chain
    if params.top_k > 0:
        add(llama_cpp.llama_sampler_init_top_k(min(params.top_k, vocabulary)))
    if params.top_p < 1:
        add(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        add(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
    add(llama_cpp.llama_sampler_init_temp(params.temperature))
    # Folds any integer into 32 bits, and never onto DEFAULT_SEED.
    seed = DEFAULT_SEED if params.seed is None else params.seed % DEFAULT_SEED
    add(llama_cpp.llama_sampler_init_dist(seed))
    return chain


def forbid(logits: Logits, mask: bytes) -> None:
    """Leave only what the mask allows."""
    bits = np.frombuffer(mask, dtype=np.uint8)
    logits[np.unpackbits(bits, count=len(logits), bitorder="little") == 0] = -np.inf


def reporter(logits: Logits, k: int) -> Callable[[int], Logprobs]:
    """From the token that will be drawn to its report, with the k likeliest."""
    highest = logits.max()
    logprobs = logits - (highest + np.log(np.exp(logits - highest).sum()))
    likeliest = np.argpartition(-logprobs, k)[:k].tolist() if k else []
    top = sorted(((i, float(logprobs[i])) for i in likeliest), key=lambda pair: -pair[1])
    return lambda token: Logprobs(float(logprobs[token]), top)
