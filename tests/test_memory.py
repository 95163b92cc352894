"""What a model will take, what still fits, and who has to go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.catalog import Model
from lmx.config import KV_TOKENS, EngineSettings, MemoryLimits
from lmx.kv_cache import KVCacheSize
from lmx.memory import Claim, Meter, System, estimate, returned, room, size, victims

GB = 2**30


def model(**fields: Any) -> Model:
    values: dict[str, Any] = {
        "id": "m",
        "path": Path("/m"),
        "format": "mlx",
        "publisher": "p",
        "repo": "m",
        "quantization": None,
        "created": 0,
        "size_bytes": 10 * GB,
        "context_length": 131072,
        "kv_cache": KVCacheSize(((1000, None),)),
    }
    return Model(**values | fields)


@pytest.mark.parametrize(
    ("own", "wanted", "tokens"),
    [
        (131072, None, KV_TOKENS),
        (131072, 65536, 65536),
        (4096, None, 4096),
        (4096, 65536, 4096),
        (None, None, KV_TOKENS),
        (None, 1024, 1024),
    ],
)
@pytest.mark.parametrize("format", ["mlx", "gguf"])
def test_the_kv_cache_of_one_context_is_reserved(
    format: str, own: int | None, wanted: int | None, tokens: int
) -> None:
    """The configured one, or the model's own up to a bound."""
    settings = EngineSettings(context_length=wanted)
    assert estimate(model(format=format, context_length=own), settings).kv == tokens * 1000


def test_a_draft_model_counts() -> None:
    """Its weights, and its KV cache for as long a context, once: it guesses for one sequence."""
    settings = EngineSettings(context_length=1000)
    small = KVCacheSize(((10, None),))
    draft = model(size_bytes=GB, kv_cache=small)
    alone, both = estimate(model(), settings), estimate(model(), settings, draft=draft)
    assert (both.weights, both.kv) == (alone.weights + GB, alone.kv + small.bytes(1000))


def test_what_was_learnt_replaces_the_guess() -> None:
    """The working memory of the last load counts, but never less than the process itself."""
    settings = EngineSettings()
    guessed = estimate(model(), settings)
    assert guessed.total == guessed.weights + guessed.kv + guessed.working
    assert estimate(model(), settings, 3 * GB).working == 3 * GB
    assert 0 < estimate(model(), settings, 0).working <= guessed.working
    assert estimate(model(format="gguf"), settings, 1).working > 1


def test_mlx_keeps_freed_buffers() -> None:
    """What MLX may keep for reuse counts, up to what it can ever free."""
    little, much = (EngineSettings(mlx_cache_bytes=n) for n in (0, 100 * GB))
    difference = estimate(model(), much).working - estimate(model(), little).working
    assert difference == KV_TOKENS * 1000 + 10 * GB // 20


sizes = st.integers(0, 1000)


@given(
    sizes, sizes, st.none() | sizes.filter(bool), st.none() | sizes.filter(bool), st.lists(sizes)
)
def test_no_bound_is_passed(
    total: int, used: int, working_set: int | None, own: int | None, models: list[int]
) -> None:
    """Whatever is free, taking it passes none of the three limits."""
    claims = [Claim(private=n // 2, bytes=n) for n in models]
    result = room(MemoryLimits(limit_bytes=own), System(total, used), working_set, claims)
    all_models = sum(models) + result.free
    others = max(0, used - sum(n // 2 for n in models))
    assert all_models + others <= total * 0.9
    assert working_set is None or all_models <= working_set
    assert own is None or all_models <= own
    assert result.limit == result.free + sum(models)


@given(sizes, st.lists(sizes, max_size=8))
def test_victims_suffice_and_none_is_superfluous(need: int, idle: list[int]) -> None:
    """Together they take what is needed; without any one of them they would not."""
    chosen = victims(need, idle, lambda taken: taken)
    if sum(idle) >= need:
        assert sum(chosen) >= need
        assert not chosen or sum(chosen) - min(chosen) < need
    else:
        assert chosen == idle


def test_the_oldest_goes_first() -> None:
    """Among models of one size the least recently used goes."""
    idle = [("a", 5), ("b", 5), ("c", 5)]
    assert victims(8, idle, lambda model: model[1]) == idle[:2]


def test_the_meter_reads_this_machine() -> None:
    """Plausible figures: this process is a part of what is used, and that of what there is."""
    meter = Meter()
    system, process = meter.system(), meter.process(os.getpid())
    assert 0 < process.private <= process.resident < system.used < system.total
    assert meter.process(2**22 + 1) == (0, 0)
    assert meter.pressure() >= 1


def test_the_meter_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the kernel's own figure counts, which has what Metal holds; RSS leaves that out."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("lmx.memory.phys_footprint", {7: 5 * GB}.__getitem__)
    monkeypatch.setattr("lmx.memory.sysctl", {"kern.memorystatus_vm_pressure_level": 4}.__getitem__)
    meter = Meter()
    assert meter.process(7) == (5 * GB, 5 * GB)
    assert meter.pressure() == 4
    assert meter.metal_working_set() is None  # there is no Metal here, which is no reason to fail


@pytest.mark.anyio
@pytest.mark.parametrize(("limits", "missing"), [([100, 450, 501], 0), ([100], 900)])
async def test_memory_that_comes_back_late(
    limits: list[int], missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may take a while to count it as free; what stays away is told."""
    monkeypatch.setattr("lmx.memory.POLL_SECONDS", 0.0001)
    monkeypatch.setattr("lmx.memory.RETURN_SECONDS", 0.001)

    def limit() -> int:
        return limits.pop(0) if len(limits) > 1 else limits[0]

    assert await returned(limit, 1000, 998) == missing


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1536, "2 KB"), (-5 * 2**20, "-5 MB"), (3 * GB, "3.00 GB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    """Bytes in a unit that suits them."""
    assert size(count) == text
