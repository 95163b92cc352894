from __future__ import annotations

import os

import pytest

# Before llama.cpp is imported: its idle threads would spin while other tests' runners work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
