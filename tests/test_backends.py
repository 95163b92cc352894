from __future__ import annotations

from random import Random

import pytest

from lmx.backends import PrefillRate


def test_a_prefill_rate_sizes_the_next_slice() -> None:
    """Slices follow the measured rate within their bounds, and are longer while nobody waits."""
    rate = PrefillRate(0.25)
    assert rate.slice_tokens(decoding=True) == 256
    for _ in range(20):
        rate.measured(400, 1.0)
    assert rate.slice_tokens(decoding=True) == pytest.approx(100, abs=1)
    assert rate.slice_tokens(decoding=False) == pytest.approx(400, abs=2)
    rate.measured(8, 10.0)
    assert rate.slice_tokens(decoding=True) == pytest.approx(100, abs=1)
    for _ in range(20):
        rate.measured(1000, 0.001)
    assert rate.slice_tokens(decoding=True) == 2048
    for _ in range(60):
        rate.measured(32, 100.0)
    assert rate.slice_tokens(decoding=True) == 32


@pytest.mark.parametrize(
    ("first", "growth"), [(8e-5, 1e-7), (2e-3, 6e-8), (1e-4, 3e-9), (1e-3, 0.0)]
)
def test_slices_get_shorter_as_attention_takes_longer(first: float, growth: float) -> None:
    """A prompt of 40,000 tokens keeps the bound, but for a little while it is being learnt."""
    random = Random(1)
    rate = PrefillRate(0.25)
    taken = []
    context = 0
    while context < 40_000:
        tokens = rate.slice_tokens(context, decoding=True)
        average = context + tokens / 2
        seconds = tokens * (first + growth * average) * random.gauss(1, 0.05)
        rate.measured(tokens, seconds, average)
        taken.append(seconds)
        context += tokens
    assert max(taken[1:]) < 0.45
    assert sum(seconds > 0.3 for seconds in taken) <= 3
    assert sorted(taken)[len(taken) // 2] == pytest.approx(0.24, abs=0.04)


def test_one_slow_slice_is_no_rule() -> None:
    """Somebody else had the machine."""
    rate = PrefillRate(0.25)
    rate.measured(256, 60.0)
    assert rate.slice_tokens(decoding=True) == 128
