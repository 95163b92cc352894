"""Answers to generated JSON schemas and tools from a running server, checked by jsonschema.

    python -m tests.schema_answers URL=MODEL [URL=MODEL ...] [--schemas 200] [--tokens 400]

Every second one is streamed, at temperature 1.5, many at a time. Prints how many were complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import jsonschema
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from . import schemas

AT_ONCE: Final = 16
BATCH: Final = 25


@dataclass
class Tally:
    complete: int = 0
    cut: int = 0
    """Ended by max_tokens, so that there is nothing to validate."""
    wrong: list[tuple[Any, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Asker:
    url: str
    model: str
    tokens: int
    more: dict[str, Any] = field(default_factory=dict)

    async def answers(self, wanted: list[Any], tally: Tally) -> None:
        """Ask for all of them and count what comes."""
        limit = anyio.CapacityLimiter(AT_ONCE)
        async with (
            AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", timeout=600) as client,
            anyio.create_task_group() as tasks,
        ):
            for number, schema in enumerate(wanted):
                tasks.start_soon(self._one, client, limit, schema, number % 2 == 1, tally)

    async def _one(
        self,
        client: AsyncOpenAI,
        limit: anyio.CapacityLimiter,
        schema: Any,
        stream: bool,
        tally: Tally,
    ) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        async with limit:
            text, finish = await ask(
                client,
                self.model,
                stream,
                response_format=form,
                max_tokens=self.tokens,
                **self.more,
            )
        if finish == "length":
            tally.cut += 1
            return
        try:
            jsonschema.validate(json.loads(text), schema)
            tally.complete += 1
        except (ValueError, jsonschema.ValidationError):
            tally.wrong.append((schema, text))


async def ask(client: AsyncOpenAI, model: str, stream: bool, **more: Any) -> tuple[str, str | None]:
    """An answer's text and how it ended."""
    create: Any = client.chat.completions.create
    common: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Fill in the form."}],
        "temperature": 1.5,
    }
    if not stream:
        [choice] = (await create(**common, **more)).choices
        return choice.message.content or "", choice.finish_reason
    text, finish = "", None
    async for chunk in await create(**common, **more, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


def run(asker: Asker, count: int) -> Tally:
    """So many generated schemas, and all the awkward ones."""
    tally = Tally()

    @settings(
        max_examples=-(-count // BATCH),
        deadline=None,
        phases=[Phase.generate],  # shrinking asks hundreds of times more
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(schemas.schemas, min_size=BATCH, max_size=BATCH))
    def some(wanted: list[Any]) -> None:
        anyio.run(asker.answers, wanted, tally)

    some()
    awkward = [schema for schema in schemas.AWKWARD.values() if isinstance(schema, dict)]
    anyio.run(asker.answers, awkward * 2, tally)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", metavar="URL=MODEL")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    for server in options.servers:
        url, model = server.rsplit("=", 1)
        tally = run(Asker(url, model, options.tokens), options.schemas)
        sys.stdout.write(
            f"{model}: {tally.complete} complete and valid, {tally.cut} cut off, "
            f"{len(tally.wrong)} wrong\n"
        )
        for schema, text in tally.wrong:
            sys.stdout.write(f"{json.dumps(schema)}\n  {text!r}\n")
