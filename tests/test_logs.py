"""What the log says, where it goes, and what must never be in it."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from lmx import logs
from lmx.config import Config
from lmx.errors import ConfigError
from lmx.logs import LINES_KEPT, JSONLines, OneLine, Ring

from .fake_models import GOOD, Server
from .watching import Live, app_of, asked, config_of, live

SECONDS = r"\d+\.\d+"


def record(message: str, **fields: Any) -> logging.LogRecord:
    values = {"name": "lmx.x", "levelname": "INFO", "msg": "%s", "args": (message,)}
    return logging.makeLogRecord(values | fields)


@given(st.text(st.characters(exclude_categories=[])))
def test_a_record_is_one_line(message: str) -> None:
    """No name or error from outside begins a line of its own or speaks to the terminal."""
    for formatter in (OneLine("%(message)s"), JSONLines()):
        assert not re.search(r"[\0-\x1f\x7f-\x9f]", formatter.format(record(message)))
    assert json.loads(JSONLines().format(record(message)))["message"] == message


def test_text_keeps_the_lines_of_a_traceback() -> None:
    """Only what is not ours is made harmless; the traceback can be read."""
    line = record("no model a\n2026 INFO x\x1b[2J")
    line.exc_text = "Traceback:\n  x"
    expected = "no model a\\n2026 INFO x\\x1b[2J\nTraceback:\n  x"
    assert OneLine("%(message)s").format(line) == expected


def test_json_has_an_exception_in_one_string() -> None:
    """Every line is one object, with UTC and milliseconds."""
    try:
        raise ValueError("bug")
    except ValueError:
        failed = record("it failed", exc_info=sys.exc_info(), created=1e9 + 0.25, msecs=250.0)
    found = json.loads(JSONLines().format(failed))
    assert found.pop("exception").endswith("\nValueError: bug")
    assert found == {
        "ts": "2001-09-09T01:46:40.250Z",
        "level": "info",
        "logger": "lmx.x",
        "message": "it failed",
    }


CHAT = "req-1 127.0.0.1 POST /v1/chat/completions"
TIMES = f"total={SECONDS} queue={SECONDS} prefill={SECONDS} decode={SECONDS}"


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        (
            "POST",
            "/v1/chat/completions",
            asked("FAST", "a b c"),
            f"{CHAT} fast 200 stop {TIMES} "
            "prompt=3 cached=0 tokens=4 reasoning=0 drafted=2 accepted=1",
        ),
        (
            "POST",
            "/v1/chat/completions",
            asked("plain", "a b c", stream=True, max_tokens=2),
            f"{CHAT} plain 200 length {TIMES} "
            "prompt=3 cached=0 tokens=2 reasoning=0 drafted=0 accepted=0",
        ),
        (
            "POST",
            "/v1/chat/completions",
            asked("plain", "FAIL"),
            f"{CHAT} plain 500 error code=generation_failed total={SECONDS} queue={SECONDS} "
            "prompt=1 tokens=0",
        ),
        (
            "POST",
            "/v1/chat/completions",
            asked("no\nbody", "a"),
            f"{CHAT} - 404 error code=model_not_found total={SECONDS}",
        ),
        ("GET", "/v1/models", None, f"req-1 127.0.0.1 GET /v1/models - 200 - total={SECONDS}"),
        (
            "GET",
            "/v1/a b%0a?key=secret",
            None,
            "req-1 127.0.0.1 GET /v1/a%20b%0A - 404 error code=unknown_url total=.*",
        ),
        ("GET", "/admin/status", None, None),
        ("GET", "/health", None, None),
        ("GET", "/metrics", None, None),
        (
            "POST",
            "/admin/model/unload",
            {"model": "broken"},
            f"req-1 127.0.0.1 POST /admin/model/unload - 200 - total={SECONDS}",
        ),
    ],
)
def test_a_request_is_one_line(
    requests: TestClient,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    body: Any,
    expected: str | None,
) -> None:
    """Who, what, how it ended, how long each part took and what it came to; what programs ask every
    few seconds is not worth a line."""
    caplog.set_level(logging.INFO, logger="lmx")
    requests.request(method, path, json=body, headers={"X-Request-Id": "req-1"})
    lines = [r.getMessage() for r in caplog.records if r.name == "lmx.requests"]
    assert len(lines) == (expected is not None), lines
    assert all(re.fullmatch(expected or "", line) for line in lines), lines


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Any:
    app = app_of(config_of(tmp_path_factory.mktemp("home")))
    with TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1)) as client:
        yield client


def test_json_has_the_same_fields(requests: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """A request's line as an object, with numbers as numbers."""
    caplog.set_level(logging.INFO, logger="lmx")
    requests.post("/v1/chat/completions", json=asked("plain", "a b"))
    [line] = [r for r in caplog.records if r.name == "lmx.requests"]
    found = json.loads(JSONLines().format(line))
    assert (found["model"], found["status"], found["finish"]) == ("plain", 200, "stop")
    assert (found["prompt"], found["tokens"], found["code"]) == (2, 3, None)
    assert found["total"] >= found["queue"] + found["decode"] >= 0


@pytest.mark.parametrize("text", ["XYZZY plugh", "FAIL XYZZY", "XYZZY " * 100], ids=len)
@pytest.mark.parametrize("stream", [False, True])
def test_no_prompt_is_logged(
    requests: TestClient, caplog: pytest.LogCaptureFixture, text: str, stream: bool
) -> None:
    """Not even at the lowest level, not even of what fails."""
    caplog.set_level(logging.DEBUG)
    requests.post("/v1/chat/completions", json=asked("plain", text, stream=stream))
    requests.post("/v1/completions", json={"model": "plain", "prompt": text})
    requests.post("/v1/chat/completions", json={"messages": text, "XYZZY": text})
    assert "lmx.requests" in {r.name for r in caplog.records}
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("lmx", "uvicorn"))]
    assert not [line for line in ours if "XYZZY" in line]


def test_a_bug_in_a_stream_is_in_its_line(
    server: Server, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The status has gone out by then; the error code tells."""
    caplog.set_level(logging.INFO, logger="lmx")
    server.queue.steps = [*server.queue.steps[:2], ValueError("bug")]
    client.post("/v1/chat/completions", json=GOOD | {"stream": True})
    [line] = [r.getMessage() for r in caplog.records if r.name == "lmx.requests"]
    assert " parrot 200 error code=internal_error " in line


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """Its request is cancelled, with status 499, and what it had got is counted."""
    caplog.set_level(logging.INFO, logger="lmx")
    async with live(tmp_path, engine={"context_length": 100_000_000}) as server:

        async def stay() -> None:
            body = asked("plain", "FOREVER x", stream=stream)
            await server.client.post("/v1/chat/completions", json=body)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stay)
            while not await tokens(server):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        while not (lines := [m for m in caplog.messages if " POST " in m]):
            await anyio.lowlevel.checkpoint()
    [line] = lines
    assert re.search(rf" plain 499 cancelled {TIMES} prompt=2 tokens=[1-9]\d*$", line)


async def tokens(server: Live) -> int:
    models = (await server.client.get("/admin/status")).json()["models"]
    return sum(model["tokens_generated"] for model in models.values())


LOG_CODE = """
import logging, sys
from pathlib import Path
from lmx import logs
from lmx.config import load_config
logs.setup(load_config(Path(sys.argv[1])))
for n in range(int(sys.argv[2])):
    logging.getLogger("lmx.x").info("line %d", n)
logging.getLogger("lmx.x").debug("unseen")
logging.getLogger("uvicorn.error").info("unseen")
logging.getLogger("lmx.x").warning("bad \\udcff ü")
"""


def log(folder: Path, lines: int, **settings: Any) -> list[str]:
    """What a program with these settings writes to stderr."""
    (folder / "config.yaml").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", LOG_CODE, folder / "config.yaml", str(lines)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "unseen" not in done.stderr
    return done.stderr.splitlines()


TEXT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) lmx\.x: .*"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("to_file", [False, True])
def test_where_the_log_goes(tmp_path: Path, form: str, to_file: bool) -> None:
    """To stderr; or to a file, whose folder is made, and of that only warnings to stderr too."""
    path = tmp_path / "new" / "lmx.log"
    found = log(tmp_path, 2, log_format=form, **({"log_file": str(path)} if to_file else {}))
    if to_file:
        assert len(found) == 1 and "bad" in found[0]
        found = path.read_text().splitlines()
    assert len(found) == 3
    for line in found:
        if form == "text":
            assert re.fullmatch(TEXT, line)
        else:
            assert {"ts", "level", "logger", "message"} == json.loads(line).keys()


def test_the_file_is_rotated(tmp_path: Path) -> None:
    """It and five older ones stay below the size; no line is torn, and the newest are there."""
    path = tmp_path / "lmx.log"
    log(tmp_path, 1000, log_file=str(path), log_file_bytes=4096)
    files = [path, *(tmp_path / f"lmx.log.{n}" for n in range(1, 6))]
    assert sorted(tmp_path.glob("lmx.log*")) == sorted(files)
    assert all(file.stat().st_size <= 4096 for file in files)
    lines = [line for file in reversed(files) for line in file.read_text().splitlines()]
    assert all(re.fullmatch(TEXT, line) for line in lines)
    numbers = [int(line.split()[-1]) for line in lines[:-1]]
    assert numbers == list(range(1000 - len(numbers), 1000))


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The program does not start, and says which setting is wrong."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log_file .*/file/lmx\.log: "):
        logs.setup(Config(log_file=str(tmp_path / "file" / "lmx.log")))


def ring(count: int) -> Ring:
    found = Ring(OneLine("%(message)s"))
    for n in range(count):
        found.handle(record(f"line {n}"))
    return found


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("there", "lines", "expected"),
    [(0, 5, []), (3, 0, []), (3, 2, [1, 2]), (3, 5, [0, 1, 2]), (1500, 1000, [*range(500, 1500)])],
)
async def test_the_last_lines(there: int, lines: int, expected: list[int]) -> None:
    """As many as asked for, if there are, and at most a thousand."""
    pieces = [piece async for piece in ring(there).tail(lines, lambda: True)]
    assert b"".join(pieces).decode() == "".join(f"line {n}\n" for n in expected)


@pytest.mark.anyio
async def test_who_follows_too_slowly_misses_lines() -> None:
    """No more is kept for a slow reader than for all, and it is told what it has missed."""
    kept = ring(1)
    pieces = kept.tail(10, lambda: False)
    assert await anext(pieces) == b"line 0\n"
    kept.handle(record("two\\nlines", exc_text="x" * 100_000))
    first, long = (await anext(pieces)).decode().splitlines()
    assert (first, long) == ("two\\nlines", "x" * logs.LINE_CHARACTERS)
    for n in range(LINES_KEPT + 7):
        kept.handle(record(f"line {n}"))
    note, *rest = (await anext(pieces)).decode().splitlines()
    assert note == "... 7 lines are left out: they came faster than read"
    assert (len(rest), rest[0], rest[-1]) == (LINES_KEPT, "line 7", f"line {LINES_KEPT + 6}")
    await pieces.aclose()


@pytest.mark.anyio
async def test_logs_over_http(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last lines as text; with follow also what comes then, until the server stops."""
    caplog.set_level(logging.INFO, logger="lmx")
    async with live(tmp_path) as server:
        for id in ("one", "two"):
            await server.client.get("/v1/models", headers={"X-Request-Id": id})
        answer = await server.client.get("/admin/logs?lines=1")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        [line] = answer.text.splitlines()
        assert "INFO lmx.requests: two 127.0.0.1 GET /v1/models" in line
        async with server.client.stream("GET", "/admin/logs?lines=0&follow=true") as log:
            await server.client.get("/v1/models", headers={"X-Request-Id": "three"})
            lines = log.aiter_lines()
            assert " three 127.0.0.1 " in await anext(lines)
            server.server.should_exit = True
            async for _ in lines:
                pass


@pytest.mark.parametrize("query", ["lines=-1", "lines=1001", "lines=x", "follow=2", "lnes=1"])
def test_a_wrong_query(requests: TestClient, query: str) -> None:
    """It is refused and not guessed."""
    assert requests.get(f"/admin/logs?{query}").status_code == 400
