"""What a grammar costs: its own stream, and the others in the batch.

    python -m tests.constraint_cost URL=MODEL [URL=MODEL ...] [--tokens 160] [--rounds 8]

Time per token from the first token to the last; free and constrained in turn, so that their ratio
holds on a machine whose speed drifts. Alone: one stream without a grammar, one with. Among others:
seven free streams beside an eighth that is free, then beside one with a grammar.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

import anyio
import httpx2

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "kind": {"enum": ["river", "lake", "sea", "ocean"]},
        "length_km": {"type": "number", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    },
    "required": ["name", "kind", "length_km", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 40}
FORMAT = {"type": "json_schema", "json_schema": {"name": "waters", "schema": SCHEMA}}
# Both kinds of stream have to go on to max_tokens: neither may draw an end token.
ENDLESS = {"0": -100, "2": -100}


async def seconds_per_token(client: httpx2.AsyncClient, body: dict[str, Any]) -> float:
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    last = time.perf_counter()
                    first = first or last
                if usage := chunk.get("usage"):
                    tokens = usage["completion_tokens"]
    return (last - first) / (tokens - 1)


def request(model: str, tokens: int, *, constrained: bool) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [
            {"role": "user", "content": f"List rivers and lakes as JSON. ({random.random():.6f})"}
        ],
        "temperature": 0,
        "max_tokens": tokens,
        "logit_bias": ENDLESS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | {"response_format": FORMAT} if constrained else body


async def together(
    client: httpx2.AsyncClient, model: str, tokens: int, kinds: list[bool]
) -> list[float]:
    times = [0.0] * len(kinds)

    async def one(number: int, constrained: bool) -> None:
        body = request(model, tokens, constrained=constrained)
        times[number] = await seconds_per_token(client, body)

    async with anyio.create_task_group() as tasks:
        for number, constrained in enumerate(kinds):
            tasks.start_soon(one, number, constrained)
    return times


async def measure(url: str, model: str, tokens: int, rounds: int) -> None:
    own: list[float] = []
    others: list[float] = []
    free_ms: list[float] = []
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        await together(client, model, 8, [False, True])  # loads the model, compiles the grammar
        for turn in range(rounds):
            in_turn = [False, True] if turn % 2 else [True, False]
            alone = {kind: (await together(client, model, tokens, [kind]))[0] for kind in in_turn}
            own.append(alone[True] / alone[False])
            free_ms.append(alone[False] * 1000)
            beside = {}
            for kind in in_turn:
                times = await together(client, model, tokens, [False] * 7 + [kind])
                beside[kind] = statistics.mean(times[:7])
            others.append(beside[True] / beside[False])
    sys.stdout.write(
        f"{url} {model}: {statistics.median(free_ms):.1f} ms a token alone without a grammar; "
        f"with one {ratio(own)} of it; seven others beside one {ratio(others)} of beside none\n"
    )


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


async def main(options: argparse.Namespace) -> None:
    for server in options.servers:
        url, model = server.rsplit("=", 1)
        await measure(url, model, options.tokens, options.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", metavar="URL=MODEL")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=8)
    anyio.run(main, parser.parse_args())
