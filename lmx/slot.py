"""One model's place in memory: its state, who holds it, and what of the memory it claims.

The states:

    available -> loading -> ready -> draining -> unloading -> available

`failed` follows a load that failed or a runner that died; the next request loads it again, with
back-off. What is leased is never unloaded but by force; what drains takes no new leases.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final, Literal

import anyio

from .catalog import Model
from .config import Config, EngineSettings
from .errors import LMXError, RunnerDied
from .memory import Claim, Estimate, Meter, Process
from .messages import Report
from .runner_process import Runner

MAX_BACKOFF_SECONDS: Final = 60.0
RATE_SAMPLES: Final = 11

State = Literal["available", "loading", "ready", "draining", "unloading", "failed"]


class Attempt:
    """One load, and those who wait for it."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()
        self.error: LMXError | None = None


class Slot:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.state: State = "available"
        self.runner: Runner | None = None
        self.attempt: Attempt | None = None
        self.estimate: Estimate | None = None
        """What it claims of the memory; None: nothing."""
        self.leases = 0
        self.waiting = 0
        """Requests that will take a lease as soon as it is ready."""
        self.last_used = 0.0
        """Event-loop time."""
        self.ttl: float | None = None
        """Seconds; None: as configured, and for what was loaded by hand never."""
        self.explicit = False
        """Loaded by hand, not by a request."""
        self.pinned: bool | None = None
        """None: as configured."""
        self.using = model
        """What is loaded under this id: the model itself, or its fallback."""
        self.engine: EngineSettings | None = None
        """How it is loaded, as configured at that time."""
        self.fallback_reason: str | None = None
        """Why the model itself is not used."""
        self.error: LMXError | None = None
        """Why the last load failed."""
        self.problems: list[str] = []
        """Why the runner does without some `backends.Feature`s."""
        self.failures = 0
        """Failed loads and runner deaths in a row, without one answered request between them."""
        self.not_before = 0.0
        """Event-loop time before which it is not loaded again."""
        self.answered = 0
        self.evicting = False
        """Being unloaded because its memory is wanted."""
        self.counts: Counter[str] = Counter()
        """Of what has happened to it since the start, by the name of the metric."""
        self.loaded_bytes = 0
        """What the runner took when it was ready."""
        self.peak_bytes = 0
        self.working_bytes = 0
        """The most it has taken beside weights and KV cache. That holds as many past prompts as
        there is room for, so both must be of the same time: from one report to the next."""
        self._since_report = 0
        self._report: Report | None = None
        self._tokens: deque[tuple[float, int]] = deque(maxlen=RATE_SAMPLES)

    @property
    def ready(self) -> Runner | None:
        """Its runner, if that takes requests."""
        usable = self.state == "ready" and self.runner is not None and self.runner.ready
        return self.runner if usable else None

    @property
    def idle(self) -> bool:
        return self.ready is not None and not self.leases and not self.waiting

    @property
    def leaving(self) -> bool:
        return self.state in ("draining", "unloading")

    def is_pinned(self, config: Config) -> bool:
        return config.model(self.model.id).pinned if self.pinned is None else self.pinned

    def ttl_seconds(self, config: Config) -> float | None:
        """After so long without work it is unloaded."""
        if self.is_pinned(config):
            return None
        if self.ttl is not None or self.explicit:
            return self.ttl
        return config.model(self.model.id).ttl_seconds or config.ttl_seconds

    def start(self, model: Model, runner: Runner) -> None:
        self.using, self.runner = model, runner
        self.answered = self.loaded_bytes = self.peak_bytes = 0
        self.working_bytes = self._since_report = 0
        self._report = runner.report
        self._tokens.clear()

    def clear(self) -> None:
        """Its process has ended."""
        self.runner = self.estimate = self.engine = None

    def back_off(self, error: LMXError | None) -> None:
        """The first failure costs nothing: the next request loads the model at once."""
        self.error = error
        self.failures += 1
        delay = min(MAX_BACKOFF_SECONDS, 2.0 ** min(self.failures - 1, 10) - 1)
        self.not_before = anyio.current_time() + delay

    def refusal(self) -> LMXError | None:
        """Why it is not to be loaded right now."""
        wait = self.not_before - anyio.current_time()
        if wait <= 0:
            return None
        if self.error is not None:
            # A copy: one that is raised again keeps the frames of every request that had it.
            return type(self.error)(self.error.message, retry_after=int(wait) + 1)
        return RunnerDied(
            f"The model {self.model.id} has just died {self.failures} times in a row; "
            f"it is not loaded again for {wait:.0f} s.",
            retry_after=int(wait) + 1,
        )

    def process(self, meter: Meter) -> Process:
        pid = self.runner.pid if self.runner else None
        return Process(0, 0) if pid is None else meter.process(pid)

    def measure(self, meter: Meter) -> int:
        """Bytes it takes now."""
        return self._measure(self.process(meter))

    def _measure(self, process: Process) -> int:
        if self.runner is None:
            return 0
        report = self.runner.report
        if report is not self._report:
            self.working_bytes = self._working(self.runner)
            self._report, self._since_report, self.runner.kv_used = report, 0, 0
        self._since_report = max(self._since_report, process.resident)
        taken = max(process.resident, report.engine_bytes)
        self.peak_bytes = max(self.peak_bytes, taken)
        return taken

    def claim(self, meter: Meter, *, grants: bool) -> Claim:
        """With `grants`, what its KV cache may grow to counts as well; otherwise what it must."""
        promised = 0
        if self.estimate is not None:
            promised = self.estimate.total
            if self.runner is not None and grants:
                promised += max(0, self.runner.report.kv_bytes - self.estimate.kv)
        process = self.process(meter)
        return Claim(process.private, max(promised, self._measure(process)))

    def count(self) -> None:
        """Called every second, for `rate`."""
        if self.runner is not None:
            self._tokens.append((anyio.current_time(), self.runner.generated))

    def rate(self) -> float:
        """Tokens per second over the last ten."""
        if len(self._tokens) < 2:
            return 0.0
        (start, before), (end, after) = self._tokens[0], self._tokens[-1]
        return (after - before) / (end - start)

    def learnt(self, meter: Meter) -> int | None:
        """The working memory it has really had; None while it has not worked."""
        if not self.answered or self.runner is None:
            return None
        self.measure(meter)
        return self._working(self.runner)

    def _working(self, runner: Runner) -> int:
        weights = self.estimate.weights if self.estimate else 0
        taken = max(self._since_report, runner.report.engine_bytes)
        kv = max(runner.kv_used, runner.report.kv_used_bytes)
        return max(self.working_bytes, taken - weights - kv)
