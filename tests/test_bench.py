"""`lmx bench`: its client against servers of all sorts, its figures, and the command itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lmx.__main__ import main
from lmx.bench import BY_NAME, DEFAULT, ratios, table
from lmx.bench_client import Exchange, ResponseReader, Server
from lmx.bench_scenarios import SCENARIOS, Figures, Round, Session, largest_gap, spread, summary
from lmx.errors import GenerationFailed

from . import models
from .serving import TIMEOUT, serving

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (CHUNKED + chunks(b"data: a\n\n", b"data: b\n\n"), [b"a", b"b"]),
        (CHUNKED + chunks(b"data: a\n\ndata: b\n\n"), [b"a", b"b"]),
        (CHUNKED + chunks(b"da", b"ta: a\n", b"\ndata: b\n\n"), [b"a", b"b"]),
        (CHUNKED + b"9;ext=1\r\ndata: a\n\n\r\n0\r\n\r\n", [b"a"]),
        (HEAD + b"\r\n: hello\r\n\r\nevent: x\r\ndata:a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (HEAD + b"Content-Length: 9\r\n\r\ndata: a\n\n", [b"a"]),
        (b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\ndata: a\n\n", [b"a"]),
        (b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\noops", [b"oops"]),
        (
            b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"oo", b"ps"),
            [b"oops"],
        ),
        (b"HTTP/1.1 500 No\r\n\r\n", [b""]),
    ],
)
def test_reader_finds_the_events(response: bytes, expected: list[bytes], size: int) -> None:
    """However the bytes are cut, each event's data is found once, and the end."""
    reader, found = ResponseReader(), []
    for start in range(0, len(response), size):
        found += [] if reader.ended else reader.feed(response[start : start + size])
    if not reader.ended:
        found += reader.feed(b"")
    assert (found, reader.ended) == (expected, True)


@pytest.mark.parametrize("response", [b"", b"SSH-2.0\r\n\r\n", CHUNKED + b"many\r\ndata\r\n"])
def test_reader_refuses_what_is_not_http(response: bytes) -> None:
    """Something else on the port is an error, not an endless wait."""
    reader = ResponseReader()
    with pytest.raises(ValueError):
        reader.feed(response)
        reader.feed(b"")


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str | None, finish: str | None = None, key: str = "content") -> bytes:
    return event(choices=[{"index": 0, "delta": {key: content}, "finish_reason": finish}])


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}])
STOP = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
USAGE = event(choices=[], usage=COUNTS)
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def answering(*pieces: bytes) -> AsyncIterator[tuple[Server, list[float]]]:
    """A server that sends these pieces, one packet each, and hangs up; and when it sent each."""
    times: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [line[16:] for line in head.split(b"\r\n") if line[:15] == b"Content-Length:"]
        await reader.readexactly(int(length))
        for piece in pieces:
            times.append(time.monotonic())
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield Server(f"http://127.0.0.1:{port}/v1", "m"), times


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pieces", "content", "arrivals", "cached"),
    [
        ([HEAD + b"\r\n", ROLE, text("a"), text("b"), STOP, USAGE, DONE], "ab", 2, 5),
        ([HEAD + b"\r\n", text(""), text(None), text("a", "length"), USAGE, DONE], "a", 1, 5),
        ([HEAD + b"\r\n" + text("a") + text("b") + STOP + USAGE], "ab", 2, 5),
        ([CHUNKED, chunks(text("a")[:9], text("a")[9:] + STOP, USAGE + DONE)], "a", 1, 5),
        ([HEAD + b"\r\n: keepalive 1/9\n\n", text("a", key="reasoning_content"), text("b"), STOP,
          event(choices=None, usage={"prompt_tokens": 7, "completion_tokens": 3})], "ab", 2, 0),
        ([HEAD + b"\r\n", event(choices=[{"delta": {"content": "a"}}], usage=COUNTS),
          event(choices=[{"delta": {}, "finish_reason": "stop"}], usage=COUNTS)], "a", 1, 5),
        ([HEAD + b"\r\n", STOP, USAGE, DONE], "", 1, 5),
    ],
    ids=["usual", "empty", "at once", "chunked", "comments", "usage often", "silent"],
)  # fmt: skip
async def test_client_reads_any_server(
    pieces: list[bytes], content: str, arrivals: int, cached: int
) -> None:
    """Tokens are what the server counts, times are when text comes, after it was asked for."""
    exchange = Exchange([{"role": "user", "content": "hi"}], 3)
    async with answering(*pieces) as (server, times):
        await server.ask(exchange)
    counts = (exchange.text, len(exchange.arrivals), exchange.tokens, exchange.cached_tokens)
    assert counts == (content, arrivals, 3, cached)
    moments = [exchange.sent, times[0], *exchange.arrivals, time.monotonic()]
    assert moments == sorted(moments)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (
            [b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nno memory"],
            "HTTP status 503: no memory",
        ),
        ([HEAD + b"\r\n", ROLE, event(error={"message": "runner died"})], "runner died"),
        ([HEAD + b"\r\n", text("a")], "before the answer"),
        ([CHUNKED, b"ff\r\n" + text("a")], "before the answer"),
        ([HEAD + b"\r\n", b"data: {]\n\n"], "malformed"),
        ([], "no HTTP response"),
    ],
)
async def test_a_failed_answer_is_an_error(pieces: list[bytes], message: str) -> None:
    """No figure comes from an answer that did not come whole; what the server said is shown."""
    async with answering(*pieces) as (server, _):
        with pytest.raises(GenerationFailed, match=message) as error:
            await server.ask(Exchange([], 3))
    assert "http://127.0.0.1" in error.value.message


@pytest.mark.anyio
async def test_who_waits_for_a_failed_stream_is_told() -> None:
    """Streams that fail before their first token count as running: the scenario goes on to fail."""

    class Failing:
        async def ask(self, exchange: Exchange) -> None:
            raise GenerationFailed("no")

        async def padding(self) -> float | None:
            return None

        def spent(self) -> tuple[float, float, int] | None:
            return None

    session = Session(Failing(), Round("fairness", "", streams=1, tokens=1, long_tokens=1))
    with pytest.raises(GenerationFailed):
        await asyncio.wait_for(SCENARIOS["fairness"](session), TIMEOUT)


@pytest.mark.anyio
async def test_a_server_that_counts_nothing() -> None:
    """Pieces of text pass for tokens, and the figures say so."""
    asked = Exchange([], 3)
    async with answering(HEAD + b"\r\n", text("a"), text("b"), STOP, DONE) as (server, _):
        await server.ask(asked)
    assert (asked.tokens, summary([asked])["answers_counted_in_pieces"]) == (2, 1)


def exchange(*arrivals: float, tokens: int, sent: float = 0.0) -> Exchange:
    return Exchange([], 9, sent, list(arrivals), prompt_tokens=4, tokens=tokens, cached_tokens=1)


def test_summary() -> None:
    """Tokens a second are of all together; time per token begins after an answer's first."""
    one = exchange(1.0, 2.0, 5.0, tokens=5)
    two = exchange(2.0, 4.0, tokens=3, sent=1.0)
    assert summary([one], first=[one], none=[]) == {
        "tokens_per_second": 1.0,
        "ttft_ms first": 1000.0,
        "token_ms": 1000.0,
        "largest_gap_ms": 3000.0,
        "prompt_tokens": 4,
        "cached_tokens": 1,
    }
    both = summary([one, two])
    assert (both["tokens_per_second"], both["ttft_ms_p50"], both["cached_tokens"]) == (1.6, 1e3, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {}),
        ([3.0], {"t": 3.0}),
        ([3.0, 1.0], {"t_p50": 2.0, "t_p95": 2.9}),
        ([float(n) for n in range(101)], {"t_p50": 50.0, "t_p95": 95.0}),
    ],
)
def test_spread(values: list[float], expected: Figures) -> None:
    """Median and 95th percentile, interpolated as numpy does; a single value is itself."""
    assert spread("t", values) == pytest.approx(expected)


@pytest.mark.parametrize(("since", "gap"), [(0.0, 3000.0), (3.0, 3000.0), (5.5, 1000.0), (9, 0)])
def test_largest_gap(since: float, gap: float) -> None:
    """A gap counts for a newcomer from whose arrival on it lasts, in each stream by itself."""
    streams = [exchange(1.0, 2.0, 5.0, 6.0, tokens=4), exchange(8.0, tokens=1)]
    assert largest_gap(streams, since) == gap


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([{"x": 1.0}], [{"x": 2.0}], {"x": [0.5, 0.5, 0.5]}),
        ([{"x": 1.0}, {"x": 9.0}, {"x": 4.0}], [{"x": 1.0}, {"x": 3.0}, {"x": 2.0}],
         {"x": [2.0, 1.0, 3.0]}),
        ([{"x": 1.0, "y": 1.0}], [{"x": 0.0}], {}),
    ],
)  # fmt: skip
def test_ratios(
    ours: list[Figures], theirs: list[Figures], expected: dict[str, list[float]]
) -> None:
    """Round against round, so that a machine whose speed drifts does not matter."""
    assert ratios({"A": ours, "B": theirs, "C": ours})["A/B"] == expected
    assert ratios({"A": ours}) == {}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("", 2, "--url"),
        ("--url http://127.0.0.1:1", 2, "--model"),
        ("--engine . --vs http://127.0.0.1:1", 2, "--vs"),
        ("--engine /no/such/model", 2, "/no/such/model"),
        ("--engine . --tokens 0", 2, "positive"),
        ("--engine . --scenario load", 2, "load"),
        ("--url http://127.0.0.1:1 --model m", 1, "http://127.0.0.1:1"),
    ],
)
def test_exit_codes(
    arguments: str, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What cannot be measured is named: 2 for a wrong command line, 1 for a server that fails."""
    try:
        ended: object = main(["bench", *arguments.split()])
    except SystemExit as exit:  # argparse's way
        ended = exit.code
    assert (ended, message in capfd.readouterr().err) == (code, True)


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    sizes = ("--streams", 3, "--tokens", 4, "--long-tokens", 300)
    command = [sys.executable, "-m", "lmx", "bench", *map(str, (*sizes, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a user with one tiny model, as GGUF."""
    home = tmp_path_factory.mktemp("home")
    folder = home / ".opta-lmx" / "models" / "test" / "tiny"
    models.tiny_gguf(folder, max_position_embeddings=8192)
    return home


def test_the_command_measures_a_server_beside_its_engine(home: Path) -> None:
    """Every scenario runs against both in turn, with the same prompts; the ratios hold both."""
    [model] = home.rglob("*.gguf")
    with serving(home) as running:
        id = running.get("/v1/models").json()["data"][0]["id"]
        urls = ("--url", running.url, "--model", id)
        them = (*urls, "--engine", model, "--rounds", 1)
        done = bench(*them, "--json", "--scenario", *DEFAULT, *BY_NAME)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["targets"] == {"A": f"{running.url} {id}", "B": f"engine {model}"}
    assert {"date", "command", "versions", "machine"} <= report.keys()
    for scenario in (*DEFAULT, *BY_NAME):
        found = report["scenarios"][scenario]
        [ours, theirs] = (found["rounds"][letter] for letter in "AB")
        assert len(ours) == len(theirs) == 1
        assert ours[0]["server_us_per_token"] >= 0 and "server_us_per_token" not in theirs[0]
        assert "largest_gap_ms" in found["ratios"]["A/B"] or scenario == "parity"
        if scenario != "diverge":
            assert [f["prompt_tokens"] for f in ours] == [f["prompt_tokens"] for f in theirs]
    assert "\n".join(table(report)).count("ttft ms") > 10


def test_the_command_shows_a_table(home: Path) -> None:
    """An engine alone is measured without a server; the table names machine, target and figures."""
    [model] = home.rglob("*.gguf")
    done = bench("--engine", model, "--rounds", 2, "--scenario", "alone", "parity")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens per second" in done.stdout and "answers" in done.stdout
    assert f"A: engine {model}" in done.stdout.splitlines()


def test_an_engine_that_does_not_load_is_exit_code_1(tmp_path: Path) -> None:
    """With the reason, as from `lmx serve`."""
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    done = bench("--engine", tmp_path / "bad.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert "bad.gguf" in done.stderr
