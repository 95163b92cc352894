from __future__ import annotations

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
