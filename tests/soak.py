"""Several models, one and a half of which fit in memory, used in turn by many clients.

    python -m tests.soak --seconds 120 --format gguf

Prints a table of memory samples and fails if a request fails or a sample passes the limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import psutil
import yaml

from .models import smollm2_gguf, smollm2_mlx
from .serving import TIMEOUT, Serving, serving

MB = 2**20
MODELS = ("one", "two", "three")
CLIENTS = 8
CONTEXT = 1024
PARALLEL = 8


class Sample(NamedTuple):
    seconds: float
    runners: int
    """Bytes, all of them together."""
    server: int
    alive: int


def put_models(home: Path, format: str) -> None:
    for name in MODELS:
        folder = home / ".opta-lmx" / "models" / "soak" / name
        if format == "mlx":
            shutil.copytree(smollm2_mlx(), folder, copy_function=os.link)
        else:
            folder.mkdir(parents=True)
            shutil.copy(smollm2_gguf(), folder / f"{name}.gguf")


def write_config(home: Path, **settings: Any) -> Path:
    file = home / "config.yaml"
    engine = {"context_length": CONTEXT, "parallel": PARALLEL, "mlx_cache_bytes": 32 * MB}
    file.write_text(yaml.safe_dump({"model_roots": [], "engine": engine} | settings))
    return file


def need(home: Path) -> int:
    """What one of the models claims, as the server itself says."""
    with serving(home, "--config", str(write_config(home))) as server:
        loaded = server.post("/admin/model/load", {"model": "one"})
        return int(loaded["loaded"]["memory"]["reserved"])


def memory(server: Serving) -> tuple[int, int, int]:
    """Of the server's children, of itself; and how many runners there are."""
    process = psutil.Process(server.process.pid)
    taken = runners = 0
    # Not their children: MLX's CPU build starts a compiler now and then, and between fork and exec
    # the new process shares, and is shown with, all memory of the runner.
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            taken += child.memory_info().rss
            runners += "lmx.runner" in child.cmdline()  # others look libraries up
    return taken, process.memory_info().rss, runners


@contextmanager
def sampled(server: Serving, every: float = 0.1) -> Iterator[list[Sample]]:
    """Memory as the operating system counts it, beside the work."""
    samples: list[Sample] = []
    done = threading.Event()
    start = time.monotonic()

    def sample() -> None:
        while not done.wait(every):
            samples.append(Sample(time.monotonic() - start, *memory(server)))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()


async def use_in_turn(server: Serving, *, requests: int, seconds: float) -> dict[str, int]:
    """Each client asks one model after the other, streaming every other time; answers by model."""
    answers = dict.fromkeys(MODELS, 0)
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        async with server.client() as sdk:
            turn = 0
            while turn < requests and (not seconds or time.monotonic() < end):
                name = MODELS[(number + turn) % len(MODELS)]
                turn += 1
                stream = await sdk.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": f"Count to {number + turn}."}],
                    max_tokens=16,
                    stream=True,
                )
                chunks = [chunk async for chunk in stream]
                assert chunks[-1].choices[0].finish_reason in ("stop", "length")
                assert chunks[0].model == name, "another model's answer"
                answers[name] += 1

    with anyio.fail_after(seconds + TIMEOUT * 3):
        async with anyio.create_task_group() as tasks:
            for number in range(CLIENTS):
                tasks.start_soon(client, number)
    return answers


def soak(home: Path, format: str, *, requests: int = 1_000_000, seconds: float = 0) -> str:
    """The table. With `requests`, so many by each client; with `seconds`, for so long."""
    put_models(home, format)
    limit = need(home) * 3 // 2
    config = write_config(home, memory={"limit_bytes": limit})
    with serving(home, "--config", str(config)) as server, sampled(server) as samples:
        answers = anyio.run(lambda: use_in_turn(server, requests=requests, seconds=seconds))
        loads = sum("is ready after" in line for line in server.log)
        failed = [line for line in server.log if " ERROR " in line or "Traceback" in line]
    assert not failed, failed
    highest = max(samples, key=lambda sample: sample.runners)
    assert highest.runners <= limit, f"{highest} is above the limit of {limit}"
    assert max(sample.alive for sample in samples) == 1, "two where one fits"
    rows = [f"limit {limit / MB:.0f} MB, {answers} answers, {loads} loads, {len(samples)} samples"]
    rows.append(f"{'seconds':>8} {'runners MB':>11} {'server MB':>10} {'runners':>10}")
    step = max(1, len(samples) // 24)
    for sample in [*samples[::step], highest]:
        mark = " highest" if sample is highest else ""
        rows.append(
            f"{sample.seconds:8.1f} {sample.runners / MB:11.1f} {sample.server / MB:10.1f} "
            f"{sample.alive:10}{mark}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--format", choices=("mlx", "gguf"), default="gguf")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        sys.stdout.write(soak(Path(home), options.format, seconds=options.seconds) + "\n")


if __name__ == "__main__":
    main()
