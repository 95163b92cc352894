"""The memory guard: what is loaded never takes more than the limit. Event loop only.

Loads claim their memory one at a time, in the order they came: first idle models go, least recently
used first, then those in use take no new work until they are idle, because somebody has always work
for a busy one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Final, Protocol

import anyio

from . import memory
from .config import Config
from .errors import InsufficientMemory, NeverFits
from .memory import Estimate, Meter, Room
from .slot import Slot

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 1.0
GRANT_SECONDS: Final = 2.0
"""How long a load waits for busy runners to answer: longer than one slice of prefill."""
RETRY_AFTER_SECONDS: Final = 5


class Models(Protocol):
    """What the guard needs of the registry."""

    config: Config
    slots: dict[str, Slot]

    def begin_unload(self, slot: Slot, why: str, *, evicting: bool = False) -> None: ...

    def keep(self, slot: Slot) -> None: ...

    async def change(self) -> None:
        """Wait for the next change of a state or of who uses a model."""


class Guard:
    def __init__(self, models: Models, meter: Meter) -> None:
        self.meter = meter
        self.pressure = 1
        self.working_set: int | None = None
        self._models = models
        self._admission = anyio.Lock()
        self._wanted = 0
        """What the load needs that waits for others to leave."""

    async def start(self) -> None:
        self.working_set = await anyio.to_thread.run_sync(self.meter.metal_working_set)

    def admit(self) -> None:
        """
        Raises:
            InsufficientMemory: no request is taken now.
        """
        if self.pressure >= memory.CRITICAL:
            raise InsufficientMemory(
                "The system is short of memory: no new work until it has recovered.",
                retry_after=RETRY_AFTER_SECONDS,
            )

    @property
    def _slots(self) -> Collection[Slot]:
        return self._models.slots.values()

    @property
    def _unpinned(self) -> list[Slot]:
        return [slot for slot in self._slots if not slot.is_pinned(self._models.config)]

    def room(self, *, grants: bool = False) -> Room:
        """
        Raises:
            OSError: the system does not tell.
        """
        claims = [slot.claim(self.meter, grants=grants) for slot in self._slots]
        limits = self._models.config.memory
        return memory.room(limits, self.meter.system(), self.working_set, claims)

    def limit(self) -> int:
        """What the models may take; 0 if the system does not tell."""
        try:
            return self.room().limit
        except OSError:
            return 0

    def _idle(self) -> list[Slot]:
        """What may be unloaded, least recently used first."""
        return sorted((s for s in self._unpinned if s.idle), key=lambda slot: slot.last_used)

    async def make_room(self, slot: Slot, need: Estimate) -> None:
        """Claim what the model needs, unloading others if that helps: idle ones first.

        Raises:
            InsufficientMemory: it never fits, or what is in use did not become idle in time.
        """
        if self._admission.locked() and need.total <= self._left_over():
            slot.estimate = need  # it takes nothing from the load that waits
            return
        async with self._admission:
            leaving: set[Slot] = set()
            self._wanted = need.total
            try:
                with anyio.move_on_after(self._models.config.memory.wait_seconds):
                    while (room := self.room(grants=True)).free < need.total:
                        if not slot.waiting:
                            raise InsufficientMemory("Nobody waits for this model any more.")
                        await self._take_grants_back()
                        if (room := self.room(grants=True)).free >= need.total:
                            break
                        leaving |= self._ask_others_to_leave(slot, need, room)
                        with anyio.move_on_after(WATCH_SECONDS):
                            await self._models.change()
                    slot.estimate = need  # from here on it is taken
                    return
            finally:
                self._wanted = 0
                if slot.estimate is None:
                    for other in leaving:
                        self._models.keep(other)
            raise InsufficientMemory(
                f"{memory.refusal(slot.model.id, need, room)} The models in use did not become "
                f"idle within {self._models.config.memory.wait_seconds:.0f} s.",
                retry_after=RETRY_AFTER_SECONDS,
            )

    async def _take_grants_back(self) -> None:
        with anyio.move_on_after(GRANT_SECONDS):
            # Twice: a report has the most since the last one, and the first what was given back.
            for _ in range(2):
                for answered in [
                    slot.runner.grant(slot.estimate.kv)
                    for slot in self._slots
                    if slot.estimate and slot.ready and slot.runner
                ]:
                    await answered.wait()

    def _taken(self, slot: Slot) -> int:
        return slot.claim(self.meter, grants=True).bytes

    def _left_over(self) -> int:
        """What is free and not needed by the load that waits, with what comes when others leave."""
        coming = sum(self._taken(slot) for slot in self._slots if slot.leaving)
        return self.room(grants=True).free - max(0, self._wanted - coming)

    def _ask_others_to_leave(self, slot: Slot, need: Estimate, room: Room) -> set[Slot]:
        """Those asked now."""
        others = [other for other in self._unpinned if other is not slot]
        missing = need.total - room.free
        coming = sum(self._taken(other) for other in others if other.leaving)
        if any(slot.state == "unloading" for slot in self._slots):
            return set()  # what it had counts as somebody else's until the system has it back
        # What the KV caches of pinned models take beyond the estimate ends with their requests.
        pinned = [s for s in self._slots if s.estimate and s not in others and s is not slot]
        grown = sum(self._taken(s) - s.estimate.total for s in pinned if s.estimate)
        if sum(map(self._taken, others)) + grown < missing:
            raise NeverFits(
                f"{memory.refusal(slot.model.id, need, room)} Unloading everything that is not "
                "pinned would not be enough."
            )
        missing -= coming
        leaving = memory.victims(missing, self._idle(), self._taken)
        missing -= sum(map(self._taken, leaving))
        # Somebody has always work for a busy model: it must stop taking more, or others starve.
        busy = [s for s in others if s.ready and s.leases and not s.waiting]
        leaving += memory.victims(missing, sorted(busy, key=lambda s: s.last_used), self._taken)
        for other in leaving:
            self._models.begin_unload(other, f"{slot.model.id} needs memory", evicting=True)
        return set(leaving)

    async def watch(self) -> None:
        """Every second: idle models go, and the KV caches get what memory is free."""
        while True:
            await anyio.sleep(WATCH_SECONDS)
            try:
                self.look()
            except OSError as error:
                logger.error("memory cannot be read: %s", error)

    def look(self) -> None:
        """
        Raises:
            OSError: the system does not tell.
        """
        self.pressure = self.meter.pressure()
        for slot in self._slots:
            slot.count()
        now = anyio.current_time()
        for slot in self._idle():
            ttl = slot.ttl_seconds(self._models.config) or math.inf
            if now - slot.last_used >= ttl:
                self._models.begin_unload(slot, f"idle for {ttl:.0f} s")
        short = self.pressure >= memory.WARNING or self.room().free < 0
        if short and (idle := self._idle()):
            self._models.begin_unload(idle[0], "memory is short", evicting=True)
        self._grant(short)

    def share(self) -> None:
        """Grant what is free now, and not with the next look."""
        try:
            self._grant(short=False)
        except OSError as error:
            logger.error("memory cannot be read: %s", error)

    def _grant(self, short: bool) -> None:
        """Let the KV caches of MLX share what is free, unless a load is about to claim it; and ask
        all runners for their report."""
        if self._admission.locked():
            return
        free = self.room(grants=True).free
        ready = [slot for slot in self._slots if slot.ready]
        mlx = [slot for slot in ready if (slot.using.format, slot.using.kind) == ("mlx", "chat")]
        granted = sum(
            s.runner.report.kv_bytes - s.estimate.kv for s in mlx if s.runner and s.estimate
        )
        for slot in ready:
            assert slot.runner and slot.estimate
            if slot.runner.granting:
                continue
            kv = slot.estimate.kv
            if slot in mlx and not short:
                # The same for all; what one has more than that must come back first.
                fair = kv + (free + granted) // len(mlx)
                kv = max(kv, min(fair, slot.runner.report.kv_bytes + max(0, free) // len(mlx)))
            slot.runner.grant(kv)
