"""What Prometheus gets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from starlette.testclient import TestClient

from lmx.app import create_app
from lmx.config import Config
from lmx.errors import ModelLoadFailed
from lmx.inference import InferenceQueue
from lmx.metrics import Histogram

from .fake_world import World, limited, registry_over
from .watching import app_of, asked, config_of

Values = dict[tuple[str, ...], float]
"""By name, and `label=value` in order."""

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
NAMES = {
    "build_info": ("gauge", {"version"}),
    "num_requests_running": ("gauge", {"model_name"}),
    "num_requests_waiting": ("gauge", {"model_name"}),
    "kv_cache_usage_perc": ("gauge", {"model_name"}),
    "model_memory_bytes": ("gauge", {"model_name", "kind"}),
    "memory_bytes": ("gauge", {"kind"}),
    "memory_pressure": ("gauge", set()),
    "queue_requests": ("gauge", set()),
    "queue_size": ("gauge", set()),
    "downloads": ("gauge", set()),
    "model_loads": ("counter", {"model_name"}),
    "model_load_failures": ("counter", {"model_name"}),
    "model_unloads": ("counter", {"model_name"}),
    "model_evictions": ("counter", {"model_name"}),
    "runner_deaths": ("counter", {"model_name"}),
    "request_success": ("counter", {"model_name", "finished_reason"}),
    "request_errors": ("counter", {"model_name", "code"}),
    "prompt_tokens": ("counter", {"model_name"}),
    "generation_tokens": ("counter", {"model_name"}),
    "prefix_cache_queries": ("counter", {"model_name"}),
    "prefix_cache_hits": ("counter", {"model_name"}),
    "spec_decode_num_draft_tokens": ("counter", {"model_name"}),
    "spec_decode_num_accepted_tokens": ("counter", {"model_name"}),
    "e2e_request_latency_seconds": ("histogram", {"model_name"}),
    "request_queue_time_seconds": ("histogram", {"model_name"}),
    "request_prefill_time_seconds": ("histogram", {"model_name"}),
    "request_decode_time_seconds": ("histogram", {"model_name"}),
    "time_to_first_token_seconds": ("histogram", {"model_name"}),
    "request_time_per_output_token_seconds": ("histogram", {"model_name"}),
    "request_prompt_tokens": ("histogram", {"model_name"}),
    "request_generation_tokens": ("histogram", {"model_name"}),
}


def parsed(answer: httpx2.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    openmetrics = "openmetrics" in answer.headers["content-type"]
    return list((read_openmetrics if openmetrics else read_text)(answer.text))


def scrape(client: TestClient, headers: dict[str, str] | None = None) -> Values:
    return {
        (sample.name.removeprefix("lmx_"), *(f"{k}={v}" for k, v in sample.labels.items())): (
            sample.value
        )
        for family in parsed(client.get("/metrics", headers=headers))
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """After the requests that `ask` makes."""
    config = config_of(tmp_path_factory.mktemp("home"), engine={"context_length": 16})
    with TestClient(app_of(config), base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        ask(client)
        yield client


def ask(client: TestClient) -> None:
    for body, status in (
        (asked("fast", "one two three"), 200),
        (asked("fast", "one two three four", max_tokens=2, stream=True), 200),
        (asked("PLAIN", "five six"), 200),
        (asked("plain", "FAIL x"), 500),
        (asked("plain", "FAIL x", stream=True), 500),
        (asked("plain", "many words " * 9), 400),
        (asked("broken", "x"), 500),
        (asked("nobody\n\"'{}", "x"), 404),
        ({"model": "plain"}, 400),
    ):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
    assert client.get("/v1/nowhere").status_code == 404


@pytest.mark.parametrize("headers", [{}, OPENMETRICS], ids=["text", "openmetrics"])
def test_requests_are_counted(client: TestClient, headers: dict[str, str]) -> None:
    """What Prometheus' own parser reads is exactly what was asked, in both formats."""
    found = scrape(client, headers)
    fast, plain = "model_name=fast", "model_name=plain"
    expected: Values = {
        ("request_success_total", fast, "finished_reason=stop"): 1,
        ("request_success_total", fast, "finished_reason=length"): 1,
        ("request_success_total", plain, "finished_reason=stop"): 1,
        ("request_errors_total", plain, "code=generation_failed"): 2,
        ("request_errors_total", plain, "code=context_length_exceeded"): 1,
        ("request_errors_total", "model_name=broken", "code=model_load_failed"): 1,
        ("request_errors_total", "model_name=", "code=model_not_found"): 1,
        ("request_errors_total", "model_name=", "code=missing_required_parameter"): 1,
        ("request_errors_total", "model_name=", "code=unknown_url"): 1,
        ("prompt_tokens_total", fast): 3 + 4,
        ("prompt_tokens_total", plain): 2 + 2 + 2,
        ("generation_tokens_total", fast): 4 + 2,
        ("generation_tokens_total", plain): 3,
        ("prefix_cache_queries_total", fast): 3 + 4,
        ("prefix_cache_hits_total", fast): 3,
        ("spec_decode_num_draft_tokens_total", fast): 2 + 2,
        ("spec_decode_num_accepted_tokens_total", fast): 1 + 1,
        ("time_to_first_token_seconds_count", fast): 2,
        ("time_to_first_token_seconds_count", plain): 1,
        ("e2e_request_latency_seconds_count", plain): 3,
        ("request_generation_tokens_sum", fast): 6,
        ("request_prompt_tokens_bucket", fast, "le=2.0"): 0,
        ("request_prompt_tokens_bucket", fast, "le=5.0"): 2,
        ("request_prompt_tokens_bucket", fast, "le=+Inf"): 2,
        ("model_loads_total", fast): 1,
        ("model_load_failures_total", "model_name=broken"): 1,
        ("num_requests_running", fast): 0,
        ("num_requests_waiting", fast): 0,
        ("queue_requests",): 0,
    }
    expected = {(name, *sorted(labels)): value for (name, *labels), value in expected.items()}
    assert {key: found.get(key) for key in expected} == expected
    errors = [value for key, value in found.items() if key[0] == "request_errors_total"]
    assert sum(errors) == 7
    phases = ("request_queue_time", "request_prefill_time", "request_decode_time")
    parts = [found[f"{phase}_seconds_sum", fast] for phase in phases]
    ttft, e2e = (
        found[f"{name}_seconds_sum", fast]
        for name in ("time_to_first_token", "e2e_request_latency")
    )
    assert ttft == pytest.approx(parts[0] + parts[1]) and sum(parts) <= e2e


def test_names(client: TestClient) -> None:
    """Each metric has the type, the labels and the help it is documented with."""
    families = parsed(client.get("/metrics", headers=OPENMETRICS))
    assert all(family.documentation for family in families)
    assert {
        family.name.removeprefix("lmx_"): (
            family.type,
            {label for s in family.samples for label in s.labels} - {"le"},
        )
        for family in families
    } == NAMES


def test_no_client_can_make_labels(client: TestClient) -> None:
    """Names of models are those of models that exist; a hundred unknown ones add no series."""
    before = scrape(client).keys()
    for n in range(100):
        client.post("/v1/chat/completions", json=asked(f"model-{n}", "x"))
        client.get(f"/v1/models/{n}")
    assert scrape(client).keys() == before
    names = {part for key in before for part in key if part.startswith("model_name=")}
    assert names == {f"model_name={name}" for name in ("plain", "fast", "broken", "")}


def test_models_and_memory(tmp_path: Path) -> None:
    """Loads, evictions, failures and deaths by model; memory as it is now."""
    world = World()
    for name in "abc":
        world.add(name)
    world.failures["c"] = ModelLoadFailed("not weights")
    config = Config(
        models_dir=str(tmp_path),
        state_file=str(tmp_path / "state.json"),
        memory=limited(400),
    )
    app = create_app(config, InferenceQueue(config), open_registry=registry_over(world))
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        for name in "abac":
            client.post("/admin/model/load", json={"model": name})
        found = scrape(client)
    assert found["model_loads_total", "model_name=a"] == 2
    assert found["model_evictions_total", "model_name=a"] == 2
    assert found["model_load_failures_total", "model_name=c"] == 1
    assert found["memory_bytes", "kind=total"] == world.total


@given(st.lists(st.floats(0, 1e9)), st.lists(st.floats(0, 1e9), unique=True).map(sorted))
def test_a_bucket_has_all_up_to_its_bound(values: list[float], bounds: list[float]) -> None:
    """Buckets are cumulative and closed above, as Prometheus defines them."""
    histogram = Histogram(tuple(bounds))
    for value in values:
        histogram.observe(value)
    *buckets, count, total = histogram.samples({})
    assert [bucket.value for bucket in buckets] == [
        sum(value <= bound for value in values) for bound in [*bounds, math.inf]
    ]
    assert (count.value, total.value) == (len(values), sum(values))


@pytest.mark.parametrize(
    ("key", "peer", "headers", "status"),
    [
        (None, "192.168.1.7", {}, 200),
        (None, "8.8.8.8", {}, 403),
        (None, "127.0.0.1", {"Origin": "https://evil.com"}, 403),
        ("s3cret", "127.0.0.1", {}, 401),
        ("s3cret", "8.8.8.8", {"Authorization": "Bearer s3cret"}, 200),
        ("s3cret", "8.8.8.8", {"Authorization": "Bearer s3cre"}, 401),
        ("s3cret", "8.8.8.8", {"Authorization": "Basic s3cret"}, 401),
        ("s3cret", "8.8.8.8", {"X-Admin-Key": "s3cret", "Authorization": "Bearer other"}, 200),
    ],
)
def test_who_may_scrape(
    tmp_path: Path, key: str | None, peer: str, headers: dict[str, str], status: int
) -> None:
    """Whoever may use /admin; the key may come as the bearer token that Prometheus can send."""
    config = Config(admin_key=key, models_dir=str(tmp_path), state_file=str(tmp_path / "s.json"))
    app = create_app(config, InferenceQueue(config), open_registry=registry_over(World()))
    with TestClient(app, base_url="http://localhost", client=(peer, 1)) as client:
        assert client.get("/metrics", headers=headers).status_code == status
