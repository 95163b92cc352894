from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Before llama.cpp is imported: its idle threads would spin while other tests' runners work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# A slow machine is no failure.
settings.register_profile("lmx", deadline=None)
settings.load_profile("lmx")
