"""Tokens per second of OpenAI servers: one stream, then N together; several servers in turn.

    python -m tests.throughput URL=MODEL [URL=MODEL ...] [--streams 16] [--tokens 96] [--rounds 3]

Measuring servers in turn, round by round, makes their ratio hold on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

import anyio
import httpx2

TOPICS = "rivers bridges owls bread clocks maps rain violins glass tea kites salt wool ice ink sand"


async def tokens(client: httpx2.AsyncClient, model: str, topic: str, limit: int) -> int:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a long story about {topic}."}],
        "temperature": 0,
        "max_tokens": limit,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    count = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage")
                count = usage["completion_tokens"] if usage else count
    return count


# The random number in every prompt keeps a prefix cache from having seen it.
async def rate(url: str, model: str, streams: int, limit: int) -> float:
    """Tokens per second of `streams` requests started together, prefill included."""
    total = 0

    async def one(topic: str) -> None:
        nonlocal total
        count = await tokens(client, model, topic, limit)
        total += count

    topics = [f"{word} ({random.random():.4f})" for word in TOPICS.split()]
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for number in range(streams):
                tasks.start_soon(one, topics[number % len(topics)])
        return total / (time.perf_counter() - started)


async def measure(options: argparse.Namespace) -> None:
    servers = [server.rsplit("=", 1) for server in options.servers]
    alone: dict[str, list[float]] = {url: [] for url, _ in servers}
    together: dict[str, list[float]] = {url: [] for url, _ in servers}
    for url, model in servers:
        await rate(url, model, 1, 4)  # loads the model
    for _ in range(options.rounds):
        for url, model in servers:
            alone[url].append(await rate(url, model, 1, options.tokens))
            together[url].append(await rate(url, model, options.streams, options.tokens))
    first = servers[0][0]
    for url, model in servers:
        one, many = statistics.median(alone[url]), statistics.median(together[url])
        ratios = [a / b for a, b in zip(together[first], together[url], strict=True)]
        sys.stdout.write(
            f"{url} {model}: alone {one:.1f} tok/s, {options.streams} streams {many:.1f} tok/s "
            f"({many / one:.2f}x); the first server's rate with {options.streams} streams is "
            f"{statistics.median(ratios):.2f} of it ({min(ratios):.2f}-{max(ratios):.2f})\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", metavar="URL=MODEL")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    anyio.run(measure, parser.parse_args())
