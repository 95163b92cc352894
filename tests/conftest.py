from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from ctypes.util import find_library

import pytest
from hypothesis import settings
from starlette.testclient import TestClient

from .fake_models import Server

# Before llama.cpp is imported: its idle threads would spin while other tests' runners work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Before MLX is: its CPU build on Linux then takes these matrix products, and not its own slow ones.
if library := find_library("openblas"):
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
# A shell ignores it for what it starts in the background, and so would every program started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app) as client:
        yield client


# A slow machine is no failure.
settings.register_profile("lmx", deadline=None)
settings.load_profile("lmx")
