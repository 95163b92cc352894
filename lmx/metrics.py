"""GET /metrics, for Prometheus. Names are vLLM's where the meaning is the same, with `lmx_` for
`vllm:` (https://docs.vllm.ai/en/stable/usage/metrics/).

Requests are counted when they end; all else is read when it is asked for. Labels are models that
exist and words of our own, so no client can make the number of series grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import Any, Final, NamedTuple, cast

import anyio
from starlette.requests import Request
from starlette.responses import Response

from . import __version__, admin_api
from .admin_api import Status
from .endpoint import State
from .records import RequestRecord
from .slot import Slot

MODEL: Final = ("model_name",)
SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKENS: Final = tuple(float(a * 10**n) for n in range(6) for a in (1, 2, 5))

COUNTERS: Final = {
    "request_success": ((*MODEL, "finished_reason"), "Requests that ended without an error."),
    "request_errors": ((*MODEL, "code"), "Requests that ended with an error."),
    "prompt_tokens": (MODEL, "Tokens of prompts."),
    "generation_tokens": (MODEL, "Tokens generated, those of requests cut short included."),
    "prefix_cache_queries": (MODEL, "Tokens of prompts looked for in the KV caches of past ones."),
    "prefix_cache_hits": (MODEL, "Tokens found there."),
    "spec_decode_num_draft_tokens": (MODEL, "Tokens guessed ahead."),
    "spec_decode_num_accepted_tokens": (MODEL, "Guesses that were right."),
}
HISTOGRAMS: Final[dict[str, tuple[str, Callable[[RequestRecord], float | None]]]] = {
    "e2e_request_latency_seconds": ("From arrival to end.", lambda r: r.seconds),
    "request_queue_time_seconds": ("Waiting, loading, tokenizing.", lambda r: r.queue_seconds),
    "request_prefill_time_seconds": ("From there to the first token.", lambda r: r.prefill_seconds),
    "request_decode_time_seconds": (
        "From the first token to the last.",
        lambda r: r.decode_seconds,
    ),
    "time_to_first_token_seconds": ("From arrival to the first token.", lambda r: r.ttft_seconds),
    "request_time_per_output_token_seconds": ("A request's mean.", lambda r: r.seconds_per_token),
    "request_prompt_tokens": ("Of a request.", lambda r: r.prompt_tokens),
    "request_generation_tokens": ("Of a request's answers.", lambda r: r.completion_tokens),
}
OF_SLOTS: Final = {
    "model_loads": "Loads that succeeded.",
    "model_load_failures": "Loads that failed.",
    "model_unloads": "Models unloaded, for whatever reason.",
    "model_evictions": "Of these, the ones that made room or relieved the system's memory.",
    "runner_deaths": "Processes of loaded models that died, or were ended because they hung.",
}


class Sample(NamedTuple):
    suffix: str
    labels: dict[str, str]
    value: float


class Family(NamedTuple):
    name: str
    type: str
    help: str
    samples: list[Sample]


Labels = tuple[str, ...]


def _family(name: str, type: str, labels: Labels, help: str, values: Mapping[Any, float]) -> Family:
    suffix = "_total" if type == "counter" else ""
    samples = [Sample(suffix, dict(zip(labels, k, strict=True)), v) for k, v in values.items()]
    return Family(name, type, help, samples)


class Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, labels: dict[str, str]) -> Iterator[Sample]:
        totals = list(accumulate(self._counts))
        for bound, total in zip([*map(str, self._bounds), "+Inf"], totals, strict=True):
            yield Sample("_bucket", labels | {"le": bound}, total)
        yield Sample("_count", labels, totals[-1])
        yield Sample("_sum", labels, self._sum)


class Metrics:
    """What the requests that have ended come to."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._histograms: dict[str, dict[str, Histogram]] = defaultdict(dict)
        """By name and model."""

    def count(self, record: RequestRecord) -> None:
        model, generation = record.model or "", record.generation
        if record.code is not None:
            self._counters["request_errors"][model, record.code] += 1
        if generation is None:
            return
        if record.code is None and record.finish is not None:
            self._counters["request_success"][model, record.finish] += 1
        numbers = {
            "prompt_tokens": generation.prompt_tokens,
            "generation_tokens": record.completion_tokens or 0,
        }
        if (finished := generation.finished) is not None:
            numbers |= {
                "prefix_cache_queries": generation.prompt_tokens,
                "prefix_cache_hits": finished.cached_tokens,
                "spec_decode_num_draft_tokens": finished.drafted_tokens,
                "spec_decode_num_accepted_tokens": finished.accepted_tokens,
            }
        for name, number in numbers.items():
            self._counters[name][model,] += number
        for name, (_, measure) in HISTOGRAMS.items():
            if (value := measure(record)) is not None:
                bounds = SECONDS if name.endswith("seconds") else TOKENS
                self._histograms[name].setdefault(model, Histogram(bounds)).observe(value)

    def families(self) -> Iterator[Family]:
        for name, (labels, help) in COUNTERS.items():
            yield _family(name, "counter", labels, help, self._counters[name])
        for name, (help, _) in HISTOGRAMS.items():
            found = self._histograms[name].items()
            samples = [s for model, h in found for s in h.samples({"model_name": model})]
            yield Family(name, "histogram", help, samples)


def now(status: Status, slots: Iterable[Slot], downloads: Counter[str]) -> Iterator[Family]:
    """What is so at this moment."""
    loaded, used = status.models, [slot for slot in slots if slot.counts or slot.waiting]
    for name, help in OF_SLOTS.items():
        counts = {(slot.model.id,): slot.counts[name] for slot in used}
        yield _family(name, "counter", MODEL, help, counts)
    rows = {(id,): min(model.active, model.parallel) for id, model in loaded.items()}
    waiting = {(slot.model.id,): slot.waiting for slot in used}
    for id, model in loaded.items():
        waiting[id,] = waiting.get((id,), 0) + model.active - rows[id,]
    kv = {(id,): m.memory.kv_used / max(1, m.memory.kv_granted) for id, m in loaded.items()}
    by_model = {
        (id, kind): number
        for id, model in loaded.items()
        for kind, number in asdict(model.memory).items()
    }
    memory = {(k,): v for k, v in asdict(status.memory).items() if k not in ("rule", "pressure")}
    pressure, queue = status.memory.pressure, status.queue
    for name, labels, help, values in (
        ("build_info", ("version",), "Always 1.", {(__version__,): 1}),
        ("num_requests_running", MODEL, "Requests in the batch.", rows),
        ("num_requests_waiting", MODEL, "Requests waiting for a load or a row.", waiting),
        ("kv_cache_usage_perc", MODEL, "Used of what is granted: 1 is all.", kv),
        ("model_memory_bytes", (*MODEL, "kind"), "As in /admin/models.", by_model),
        ("memory_bytes", ("kind",), "As in /admin/status.", memory),
        ("memory_pressure", (), "macOS's level: 1 normal, 2 warning, 4 critical.", {(): pressure}),
        ("queue_requests", (), "Requests outstanding.", {(): queue.outstanding}),
        ("queue_size", (), "One more than these is refused.", {(): queue.size}),
        ("downloads", ("state",), "Since the start.", {(k,): n for k, n in downloads.items()}),
    ):
        yield _family(name, "gauge", labels, help, values)


class StateWithMetrics(State):
    metrics: Metrics


async def metrics(request: Request[State]) -> Response:
    """Metrics in Prometheus' text format, or as OpenMetrics where that is accepted."""
    state = cast(StateWithMetrics, request.state)
    status = await admin_api.status(request)
    downloads = Counter(job.record.state for job in state["downloads"].jobs)
    slots = state["registry"].slots.values()
    found = [*state["metrics"].families(), *now(status, slots, downloads)]
    accept = request.headers.get("accept", "")
    text, content_type = await anyio.to_thread.run_sync(encode, found, accept)
    return Response(text, headers={"content-type": content_type})


def encode(families: Iterable[Family], accept: str) -> tuple[bytes, str]:
    """The body and its type. Not for the event loop: the import takes long."""
    from prometheus_client import CollectorRegistry, Metric, exposition
    from prometheus_client.openmetrics import exposition as openmetrics
    from prometheus_client.registry import Collector

    class Collected(Collector):
        def collect(self) -> Iterator[Metric]:
            for name, type, help, samples in families:
                metric = Metric(f"lmx_{name}", help, type)
                for suffix, labels, value in samples:
                    metric.add_sample(f"lmx_{name}{suffix}", labels, value)
                yield metric

    registry = CollectorRegistry()
    registry.register(Collected())
    if "application/openmetrics-text" in accept:
        text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4
