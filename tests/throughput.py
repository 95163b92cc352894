"""Tokens per second of OpenAI servers: one stream, then N together; several servers in turn.

    python -m tests.throughput URL=MODEL [URL=MODEL ...] [--streams 16] [--tokens 96] [--rounds 3]
                               [--equal]

Measuring servers in turn, round by round, makes their ratio hold on a machine whose speed drifts.
With --equal: how many of N greedy answers are the same alone and together.
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


async def ask(client: httpx2.AsyncClient, model: str, topic: str, limit: int) -> tuple[int, str]:
    """The number of tokens and the text of a greedy answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a long story about {topic}."}],
        "temperature": 0,
        "max_tokens": limit,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    count, text = 0, ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                if usage := chunk.get("usage"):
                    count = usage["completion_tokens"]
    return count, text


async def together(url: str, model: str, topics: list[str], limit: int) -> tuple[int, list[str]]:
    """The number of tokens and the texts of answers that are asked for at the same time."""
    answers = [(0, "")] * len(topics)

    async def one(number: int, topic: str) -> None:
        answers[number] = await ask(client, model, topic, limit)

    async with (
        httpx2.AsyncClient(base_url=url, timeout=600) as client,
        anyio.create_task_group() as tasks,
    ):
        for number, topic in enumerate(topics):
            tasks.start_soon(one, number, topic)
    return sum(count for count, _ in answers), [text for _, text in answers]


async def rate(url: str, model: str, streams: int, limit: int) -> float:
    """Tokens per second of `streams` requests started together, prefill included."""
    # The random number in every prompt keeps a prefix cache from having seen it.
    topics = [f"{word} ({random.random():.6f})" for word in TOPICS.split()]
    started = time.perf_counter()
    total, _ = await together(url, model, (topics * streams)[:streams], limit)
    return total / (time.perf_counter() - started)


async def equal(url: str, model: str, streams: int, limit: int) -> int:
    topics = (TOPICS.split() * streams)[:streams]
    alone = [(await together(url, model, [topic], limit))[1][0] for topic in topics]
    _, texts = await together(url, model, topics, limit)
    return sum(a == b for a, b in zip(alone, texts, strict=True))


async def measure(options: argparse.Namespace) -> None:
    servers = [server.rsplit("=", 1) for server in options.servers]
    alone: dict[str, list[float]] = {url: [] for url, _ in servers}
    many: dict[str, list[float]] = {url: [] for url, _ in servers}
    for url, model in servers:
        await rate(url, model, 1, 4)  # loads the model
        if options.equal:
            same = await equal(url, model, options.streams, options.tokens)
            sys.stdout.write(f"{url} {model}: {same} of {options.streams} answers are equal\n")
    if options.equal:
        return
    for _ in range(options.rounds):
        for url, model in servers:
            alone[url].append(await rate(url, model, 1, options.tokens))
            many[url].append(await rate(url, model, options.streams, options.tokens))
    first = servers[0][0]
    for url, model in servers:
        one, all_of_them = statistics.median(alone[url]), statistics.median(many[url])
        ratios = [a / b for a, b in zip(many[first], many[url], strict=True)]
        sys.stdout.write(
            f"{url} {model}: alone {one:.1f} tok/s, {options.streams} streams {all_of_them:.1f} "
            f"tok/s ({all_of_them / one:.2f}x); the first server's rate with {options.streams} "
            f"streams is {statistics.median(ratios):.2f} of it "
            f"({min(ratios):.2f}-{max(ratios):.2f})\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", metavar="URL=MODEL")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--equal", action="store_true")
    anyio.run(measure, parser.parse_args())
