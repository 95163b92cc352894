"""What `lmx bench` measures: rounds of scenarios, and their figures."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import pairwise
from random import Random
from typing import Final

import msgspec

from .bench_client import Exchange, Message, Target

WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
).split()
"""Each one token to most models."""
TOPICS: Final = "rivers bridges owls bread clocks maps rain violins glass tea kites salt".split()

BESIDE: Final = 4
"""Streams that run while something else comes."""
TURNS: Final = 4
SHORT_ANSWER: Final = 16
BEHIND_SECONDS: Final = 0.05
"""From a long prompt to the short one behind it: enough for them to arrive in this order."""
SHARED_WORDS: Final = 100
"""After so many a diverging prompt goes its own way."""
SAMPLE_SECONDS: Final = 0.5
"""From one look at the padding to the next: LMX's runners report it about every second."""
MIXED: Final = (30, 300, 3000)
"""Tokens of a prompt, about."""
TEMPLATE_TOKENS: Final = 25
"""What a chat template adds to a prompt, about."""

Figures = dict[str, float]


class Round(msgspec.Struct, frozen=True):
    scenario: str
    seed: str
    """Of one round in one run. All targets have it, and so the same prompts."""
    streams: int
    tokens: int
    long_tokens: int


class Session:
    """The exchanges of a round."""

    def __init__(self, target: Target, round: Round) -> None:
        self.round = round
        self.target = target
        self.exchanges: list[Exchange] = []
        self._random = Random(round.seed)
        self._tasks: dict[Exchange, asyncio.Task[None]] = {}

    def words(self, count: int) -> str:
        """A text that no prefix cache has seen."""
        return f"{self._random.random():.6f} {' '.join(self._random.choices(WORDS, k=count))}"

    def ask(self, prompt: str | list[Message], tokens: int) -> Exchange:
        """It is under way; see `ended`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        exchange = Exchange(messages, tokens)
        task = asyncio.create_task(self.target.ask(exchange))
        task.add_done_callback(lambda _: exchange.running.set())
        self._tasks[exchange] = task
        self.exchanges.append(exchange)
        return exchange

    def story(self, tokens: int) -> Exchange:
        topic = f"{self._random.choice(TOPICS)} ({self._random.random():.6f})"
        return self.ask(f"Write a long story about {topic}.", tokens)

    async def ended(self, *exchanges: Exchange) -> list[Exchange]:
        await asyncio.gather(*(self._tasks[exchange] for exchange in exchanges))
        return [*exchanges]

    async def running(self) -> list[Exchange]:
        """Streams that have all begun to answer."""
        beside = [self.story(3 * self.round.tokens) for _ in range(BESIDE)]
        for exchange in beside:
            await exchange.running.wait()
        return beside

    async def hang_up(self, exchange: Exchange) -> None:
        task = self._tasks[exchange]
        await (asyncio.wait([task]) if task.cancel() else task)


def spread(name: str, values: list[float]) -> Figures:
    if len(values) < 2:
        return {name: values[0]} if values else {}
    parts = statistics.quantiles(values, n=20, method="inclusive")
    return {f"{name}_p50": parts[9], f"{name}_p95": parts[18]}


def largest_gap(exchanges: Iterable[Exchange], since: float = 0.0) -> float:
    """Milliseconds between two pieces of the same stream, the second after `since`."""
    gaps = (b - a for e in exchanges for a, b in pairwise(e.arrivals) if b > since)
    return max(gaps, default=0.0) * 1000


def summary(exchanges: list[Exchange], **groups: list[Exchange]) -> Figures:
    """Times to the first token by group, where there are some; time per token is of those after
    an answer's first."""
    tokens = sum(e.tokens for e in exchanges)
    seconds = max(e.arrivals[-1] for e in exchanges) - min(e.sent for e in exchanges)
    figures = {"tokens_per_second": tokens / seconds}
    if uncounted := sum(not e.counted for e in exchanges):
        figures["answers_counted_in_pieces"] = uncounted
    for name, group in (groups or {"": exchanges}).items():
        figures |= spread(
            f"ttft_ms {name}".strip(), [(e.arrivals[0] - e.sent) * 1000 for e in group]
        )
    each = [(e.arrivals[-1] - e.arrivals[0]) / (e.tokens - 1) for e in exchanges if e.tokens > 1]
    return {
        **figures,
        **spread("token_ms", [seconds * 1000 for seconds in each]),
        "largest_gap_ms": largest_gap(exchanges),
        "prompt_tokens": sum(e.prompt_tokens for e in exchanges),
        "cached_tokens": sum(e.cached_tokens for e in exchanges),
    }


async def alone(session: Session) -> Figures:
    """One stream."""
    return summary(await session.ended(session.story(session.round.tokens)))


async def streams(session: Session) -> Figures:
    """Streams that start together."""
    asked = [session.story(session.round.tokens) for _ in range(session.round.streams)]
    return summary(await session.ended(*asked))


async def prefix(session: Session) -> Figures:
    """A system prompt of 1,500 words for all: one request after the other, then all together."""
    system = {"role": "system", "content": f"You know this: {session.words(1500)}."}

    def ask() -> Exchange:
        question = {"role": "user", "content": f"What is {session.words(5)}?"}
        return session.ask([system, question], SHORT_ANSWER)

    after = [(await session.ended(ask()))[0] for _ in range(BESIDE)]
    together = await session.ended(*(ask() for _ in range(session.round.streams)))
    return summary(after + together, first=after[:1], next=after[1:], together=together)


async def turns(session: Session) -> Figures:
    """A chat whose first message has 600 words."""
    messages: list[Message] = []
    for turn in range(TURNS):
        text = "And what else?" if turn else f"Here are my notes: {session.words(600)}."
        messages = [*messages, {"role": "user", "content": text}]
        [answer] = await session.ended(session.ask(messages, session.round.tokens))
        messages = [*messages, {"role": "assistant", "content": answer.text}]
    return summary(session.exchanges, first=session.exchanges[:1], next=session.exchanges[1:])


async def fairness(session: Session) -> Figures:
    """While four streams run, a prompt of 600 words comes, and right behind it a short one."""
    beside = await session.running()
    long = session.ask(f"Tell me about this: {session.words(600)}.", SHORT_ANSWER)
    await asyncio.sleep(BEHIND_SECONDS)
    short = session.ask(f"Who is number {session.words(1)}?", SHORT_ANSWER)
    figures = summary(await session.ended(*beside, long, short), long=[long], short=[short])
    return {**figures, "largest_gap_ms": largest_gap(beside, long.sent)}


async def mixed(session: Session) -> Figures:
    """Prompts of 30, 300 and 3,000 tokens together."""
    groups = {
        f"of {length}": [
            session.ask(f"Go on: {session.words(length - TEMPLATE_TOKENS)}", session.round.tokens)
            for _ in range(max(1, session.round.streams // 8))
        ]
        for length in MIXED
    }
    answers = asyncio.create_task(session.ended(*session.exchanges))
    known: list[float] = []
    while not answers.done():
        await asyncio.wait([answers], timeout=SAMPLE_SECONDS)
        if (padding := await session.target.padding()) is None:
            break
        known.append(padding)
    figures = summary(await answers, **groups)
    return {**figures, "padding": max(known)} if known else figures


async def diverge(session: Session) -> Figures:
    """While four streams run, a very long prompt comes that parts early from a cached one; and
    another time, one that has nothing in common with any."""
    length = session.round.long_tokens
    start = session.words(SHARED_WORDS)
    await session.ended(session.ask(f"{start} {session.words(length)}", 1))
    figures: Figures = {}
    for name, before in (("largest_gap_ms", start), ("largest_gap_ms unrelated", "")):
        beside = await session.running()
        long = session.ask(f"{before} {session.words(length)}", 1)
        await session.ended(*beside)
        await session.hang_up(long)
        figures[name] = largest_gap(beside, long.sent)
    return figures


async def parity(session: Session) -> Figures:
    """How many answers differ when they are asked for once more, and once more all together."""
    tokens, count = session.round.tokens, session.round.streams
    alone = [(await session.ended(session.story(tokens)))[0] for _ in range(count)]
    again = [(await session.ended(session.ask(e.messages, tokens)))[0] for e in alone]
    together = await session.ended(*(session.ask(e.messages, tokens) for e in alone))
    return {
        "answers": count,
        "differ_again": sum(a.text != b.text for a, b in zip(alone, again, strict=True)),
        "differ_together": sum(a.text != b.text for a, b in zip(alone, together, strict=True)),
        "prompt_tokens": sum(e.prompt_tokens for e in again + together),
        "cached_tokens": sum(e.cached_tokens for e in again + together),
    }


async def load(session: Session) -> Figures:
    await session.ended(session.story(4))
    return {}


SCENARIOS: Final[dict[str, Callable[[Session], Awaitable[Figures]]]] = {
    scenario.__name__: scenario
    for scenario in (alone, streams, prefix, turns, fairness, mixed, diverge, parity, load)
}


async def measure(target: Target, round: Round) -> Figures:
    """
    Raises:
        LMXError: an exchange has failed, and with it the round.
    """
    session = Session(target, round)
    before, started = target.spent(), time.process_time()
    figures = await SCENARIOS[round.scenario](session)
    client, after = time.process_time() - started, target.spent()
    if before and after:
        microsecond = 1e-6 * sum(exchange.tokens for exchange in session.exchanges)
        if after[0]:
            figures["server_us_per_token"] = (after[0] - before[0]) / microsecond
            figures["client_us_per_token"] = client / microsecond
        figures["engine_us_per_token"] = (after[1] - before[1]) / microsecond
        figures["memory_mb"] = after[2] / 1e6
    return figures
