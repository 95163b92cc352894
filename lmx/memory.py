"""What memory there is, what a model will take, and what still fits. Decides nothing by itself.

Every figure is in bytes. The limit is LMX's own arithmetic: neither MLX nor Metal refuses anything
before the system is in trouble (mlx: `set_memory_limit` is no cap).
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import anyio
import psutil

from .catalog import Model
from .config import KV_TOKENS, EngineSettings, MemoryLimits

logger = logging.getLogger(__name__)
T = TypeVar("T")

WARNING: Final = 2
CRITICAL: Final = 4
"""macOS's `kern.memorystatus_vm_pressure_level`; 1 is normal."""

POLL_SECONDS: Final = 0.05
RETURN_SECONDS: Final = 2.0
"""How long the system may take to count the memory of an ended process as free: macOS was seen to
take 0.3 s."""

RUNTIME: Final = {"mlx": 150 * 2**20, "gguf": 80 * 2**20}
"""A runner beside weights and KV cache: interpreter, libraries, tokenizer. Measured on Linux; the
next load of a model uses what its last one has really taken."""


class System(NamedTuple):
    total: int
    used: int
    """What is not available without swapping, compressed memory included."""


class Process(NamedTuple):
    private: int
    """Its part of `System.used`."""
    resident: int
    """With the pages of mapped files, which the system could drop but the model needs."""


class Meter:
    """What the operating system says. Microseconds, except `metal_working_set`."""

    def system(self) -> System:
        memory = psutil.virtual_memory()
        # psutil's `used` leaves out compressed pages on macOS.
        return System(memory.total, memory.total - memory.available)

    def process(self, pid: int) -> Process:
        """Nothing, if the process has ended."""
        if sys.platform == "darwin":
            footprint = phys_footprint(pid)
            return Process(footprint, footprint)
        try:
            memory = psutil.Process(pid).memory_info()
        except psutil.NoSuchProcess:
            return Process(0, 0)
        return Process(memory.rss - memory.shared, memory.rss)

    def pressure(self) -> int:
        return sysctl("kern.memorystatus_vm_pressure_level") if sys.platform == "darwin" else 1

    def metal_working_set(self) -> int | None:
        """What Metal lets all processes use together; not for the event loop.

        Asked of a process of its own: the server never imports MLX. `sudo sysctl
        iogpu.wired_limit_mb=N` raises it.
        """
        if sys.platform != "darwin":
            return None
        code = "import mlx.core as m; print(m.device_info()['max_recommended_working_set_size'])"
        try:
            told = subprocess.check_output([sys.executable, "-c", code], timeout=60)
            return int(told)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            logger.error("Metal does not tell its working set: %s", error)
            return None


def phys_footprint(pid: int) -> int:
    """What macOS charges a process for, Metal's buffers included, which RSS leaves out.

    `proc_pid_rusage` of flavour 0: a UUID of 16 bytes, then 64-bit numbers, of which
    `ri_phys_footprint` is the eighth (<sys/resource.h>).
    """
    numbers = (ctypes.c_uint64 * 12)()  # stays 0 for a process that has ended
    ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(pid, 0, numbers)
    return numbers[2 + 7]


def sysctl(name: str) -> int:
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    ctypes.CDLL(None).sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return value.value


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model will take."""

    weights: int
    kv: int
    """Of one context; less context, if more than KV_TOKENS and nobody has asked for it."""
    working: int
    """The process, activations, buffers that the engine keeps for reuse."""
    loaded: int
    """What it takes before its first request."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.working


def estimate(
    model: Model, settings: EngineSettings, learnt: int | None = None, draft: Model | None = None
) -> Estimate:
    """`learnt`: the working memory that the last load of this model has really had."""
    context = settings.context_length or min(model.context_length or KV_TOKENS, KV_TOKENS)
    context = min(context, model.context_length or context)
    # llama.cpp reserves windows and recurrent states for every sequence.
    sequences = settings.parallel if model.format == "gguf" else 1
    kv = model.kv_cache.bytes(context, sequences) if model.kv_cache else 0
    weights = model.size_bytes
    if draft is not None:  # it guesses for one sequence at a time
        kv += draft.kv_cache.bytes(context, 1) if draft.kv_cache else 0
        weights += draft.size_bytes
    runtime = RUNTIME[model.format]
    activations = weights // 20
    working = runtime + activations
    if model.format == "mlx":
        # What MLX frees it keeps for reuse: activations, and the KV cache whenever it grows.
        working += min(settings.mlx_cache_bytes, kv + activations)
        loaded = weights + runtime
    else:
        loaded = weights + kv + working
    return Estimate(weights, kv, max(runtime, working if learnt is None else learnt), loaded)


class Claim(NamedTuple):
    """One runner's part."""

    private: int
    bytes: int
    """What it takes now, or what it was promised, whichever is more."""


@dataclass(frozen=True, slots=True)
class Room:
    """What may still be loaded, and why no more."""

    free: int
    """Negative when the limit is already passed."""
    limit: int
    """What the models together may take."""
    models: int
    others: int
    """What the rest of the system uses."""
    rule: str

    def __str__(self) -> str:
        return (
            f"the models may take {size(self.limit)} ({self.rule}), {size(self.models)} are in use "
            f"or promised, and everything else on this machine uses {size(self.others)}"
        )


def room(
    limits: MemoryLimits, system: System, working_set: int | None, claims: Sequence[Claim]
) -> Room:
    """The narrowest of the three bounds: the fraction of all memory, Metal's, the user's own."""
    models = sum(claim.bytes for claim in claims)
    others = max(0, system.used - sum(claim.private for claim in claims))
    share = f"{limits.limit_fraction:.0%} of {size(system.total)} less what others use"
    bounds = [(int(limits.limit_fraction * system.total) - others, share)]
    if working_set:
        metal = f"Metal's working set of {size(working_set)}; sysctl iogpu.wired_limit_mb raises it"
        bounds.append((working_set, metal))
    if limits.limit_bytes is not None:
        bounds.append((limits.limit_bytes, "memory.limit_bytes"))
    limit, rule = min(bounds)
    return Room(limit - models, limit, models, others, rule)


async def returned(limit: Callable[[], int], before: int, private: int) -> int:
    """Wait until the memory of a process that has ended is free; bytes that are missing after all.

    As long as the system counts it as somebody's, it lowers the `limit` of the models. Half of it
    counts as all: others take some meanwhile.
    """
    for _ in range(int(RETURN_SECONDS / POLL_SECONDS)):
        if limit() >= before - private // 2:
            return 0
        await anyio.sleep(POLL_SECONDS)
    return before - limit()


def victims(need: int, idle: Sequence[T], taken: Callable[[T], int]) -> list[T]:
    """As few of `idle` (least recently used first) as together take `need`; all, if too little."""
    chosen: list[T] = []
    for candidate in idle:
        if sum(map(taken, chosen)) >= need:
            break
        chosen.append(candidate)
    for candidate in list(chosen):  # the last one may be so large that the first can stay
        if sum(map(taken, chosen)) - taken(candidate) >= need:
            chosen.remove(candidate)
    return chosen


def refusal(name: str, need: Estimate, room: Room) -> str:
    """Every number."""
    return (
        f"{name} does not fit in memory: it needs {size(need.total)} (weights "
        f"{size(need.weights)}, KV cache {size(need.kv)}, working memory {size(need.working)}), "
        f"but {room}."
    )


def size(count: float) -> str:
    """Bytes for a person, in the units of the field: GB is 1024^3 where memory is meant."""
    for unit in ("B", "KB", "MB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GB"
