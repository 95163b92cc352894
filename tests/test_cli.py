"""The command line against servers on real sockets: fakes where a model would only be slow."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lmx.__main__ import main, parser
from lmx.generation import Chat, GenerationRequest, Part
from lmx.terminal import plain

from . import fake_models, models
from .commanding import LMX, Lmx, listening, over, terminal
from .fake_hub import FakeHub, Fault, fake_hub
from .fake_models import HELLO, says
from .fake_world import World
from .serving import TIMEOUT, Serving, serving

README = Path(__file__).parents[1] / "README.md"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def world() -> World:
    world = World()
    world.add("a", parameters=135_000_000)
    world.add("b", quantization="q4")
    return world


@pytest.fixture
def lmx(world: World, tmp_path: Path) -> Iterator[Lmx]:
    with over(world, tmp_path) as lmx:
        yield lmx


def test_a_model_is_loaded_and_unloaded(lmx: Lmx) -> None:
    """What ps says follows load, pin and unload; the time left is what load was given."""
    assert lmx("load", "A", "--ttl", "60").startswith("a: ready after")
    assert "ragged: token 3 differs" in lmx.out
    lmx("ps")
    assert re.search(r"^a +ready +gguf .* 4096 +(60|59) s +batch draft prefix", lmx.out, re.M)
    assert "b" not in lmx.out.split()
    assert lmx("pin", "a") == "a: pinned\n"
    assert "pinned" in lmx("ps")
    assert lmx("pin", "a", "--off") == "a: not pinned\n"
    lmx("load", "b")
    assert lmx("unload", "a") == "a: unloaded\n"
    assert lmx("unload", "--all") == "b: unloaded\n"
    assert lmx("ps", "--json") == {"models": []}


def test_json_is_the_admin_answer(lmx: Lmx) -> None:
    """--json prints what /admin says, and nothing else."""
    assert lmx("load", "a", "--json")["loaded"]["engine"] == "fake 1.0"
    assert lmx("pin", "a", "--json")["pinned"]
    assert [model["id"] for model in lmx("ps", "--json")["models"]] == ["a"]
    assert [model["id"] for model in lmx("ls", "--json")["models"]] == ["a", "b"]
    assert lmx("unload", "a", "--json")["models"][0]["state"] == "available"
    assert lmx("get", "--json") == {"downloads": []}
    assert lmx("server", "status", "--json")["running"]


def test_what_cannot_be_loaded_is_listed_with_the_reason(lmx: Lmx, world: World) -> None:
    """And its name, which comes from outside, cannot steer the terminal."""
    world.add("bad\x1b[2J", error="config.json: not JSON")
    lmx("ls")
    assert re.search(r"^bad\[2J +gguf .* broken *$", lmx.out, re.M)
    assert "bad[2J: config.json: not JSON" in lmx.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["load", "none"], 1, "none"),
        (["verify", "a"], 1, "not downloaded by LMX"),
        (["get", "org/m", "--cancel"], 1, "not being downloaded"),
        (["unload"], 2, "MODEL"),
        (["unload", "a", "--all"], 2, "MODEL"),
        (["rm", "a"], 2, "-y"),
        (["load", "a", "--ttl", "soon"], 2, "soon"),
        (["load", "a", "--gpu", "max", "--yes"], 0, ""),
        (["load", "a", "--gpu", "off"], 2, "off"),
        (["load", "a", "--identifier", "x"], 2, "aliases"),
        (["load", "a", "-c", "4096"], 2, "context_length"),
        (["server", "stop", "--port", "1"], 0, ""),
    ],
    ids=str,
)
def test_exit_codes(
    lmx: Lmx, arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal of the server is 1, a command that makes no sense 2; both say why."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    if arguments[0] == "server":
        lmx.url = NOWHERE
    lmx(*arguments)
    assert (lmx.code, message in lmx.err) == (code, True)


@pytest.mark.parametrize("command", [["ps"], ["chat", "a", "hi"], ["logs"], ["server", "status"]])
def test_no_server_is_exit_code_3(command: list[str]) -> None:
    """Whatever the command; the message names the address."""
    lmx = Lmx(NOWHERE)
    lmx(*command)
    assert lmx.code == 3 and ("127.0.0.1:1" in lmx.err or "port 1" in lmx.out)


@pytest.mark.parametrize("url", ["127.0.0.1:1234", "http://a:b"])
def test_a_bad_url_is_exit_code_2(url: str) -> None:
    """It is the flag that is wrong, not a server that is missing."""
    lmx = Lmx(url)
    lmx("ps")
    assert (lmx.code, url in lmx.err) == (2, True)


def test_the_admin_key(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the flag, else from the environment, else from the configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with over(world, tmp_path, admin_key="schlüssel") as lmx:
        lmx("ps")
        assert lmx.code == 1 and "X-Admin-Key" in lmx.err
        lmx("ps", "--admin-key", "schlüssel")
        assert lmx.code == 0
        (tmp_path / ".opta-lmx").mkdir()
        (tmp_path / ".opta-lmx" / "config.yaml").write_text("admin_key: schlüssel\n")
        lmx("ps")
        assert lmx.code == 0
        monkeypatch.setenv("LMX_ADMIN_KEY", "wrong")
        lmx("ps")
        assert lmx.code == 1


async def lm_studio(scope: Any, receive: Any, send: Any) -> None:
    """Says 200 and an error to every path it does not know."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    body = b'{"error":"Unexpected endpoint or method. (GET /admin/models)"}'
    await send({"type": "http.response.body", "body": body})


def test_another_server_is_not_taken_for_lmx() -> None:
    """LM Studio answers any path with status 200."""
    with listening(lm_studio) as url:
        lmx = Lmx(url)
        lmx("ls")
    assert lmx.code == 1 and "is not LMX" in lmx.err and "Unexpected endpoint" in lmx.err


@pytest.fixture
def talking() -> Iterator[tuple[fake_models.Server, Lmx]]:
    server = fake_models.Server()
    with listening(server.app) as url:
        yield server, Lmx(url)


def said(server: fake_models.Server) -> list[str | None]:
    """The messages of the last request."""
    asked = server.queue.asked[-1]
    assert isinstance(asked, GenerationRequest) and isinstance(asked.prompt, Chat)
    return [message.content for message in asked.prompt.messages]


def test_chat_answers_one_question(
    talking: tuple[fake_models.Server, Lmx], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line or stdin: the answer alone on stdout, the speed on stderr."""
    server, lmx = talking
    server.queue.steps = [[says(Part("reasoning", "hm"))], *HELLO]
    assert lmx("chat", "parrot", "hi") == "Hello, wörld!\n"
    assert "6 tokens" in lmx.err and "tok/s" in lmx.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\na pipe"))
    answer = lmx("chat", "parrot", "--json")
    assert (answer["content"], answer["reasoning"]) == ("Hello, wörld!", "hm")
    assert answer["usage"]["completion_tokens"] == 6
    assert said(server) == ["from\na pipe"]
    lmx("chat", "nobody", "hi")
    assert lmx.code == 1 and "nobody" in lmx.err


def test_a_conversation(talking: tuple[fake_models.Server, Lmx]) -> None:
    """Each question goes with what was said before; Ctrl-C ends an answer, Ctrl-D the talk."""
    server, lmx = talking
    with terminal([*LMX, "chat", "parrot", "--url", lmx.url]) as person:
        person.until("> ")
        server.queue.steps = [[says("Hel\x1b[2J")], anyio.Event()]
        person.type("one\n")
        assert "\x1b[2J" not in person.until("Hel")
        person.process.send_signal(signal.SIGINT)
        person.until("> ")
        server.queue.steps = HELLO
        person.type("two\n")
        person.until("Hello, wörld!")
        person.until("tok/s")
        person.until("> ")
        person.type("\x04")
        assert person.rest()[0] == 0
    assert said(server) == ["one", "Hel\x1b[2J", "two"]


SMOLLM = "smollm2-135m-instruct"
REPO = "org/SmolLM2-135M-Instruct-GGUF"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The whole program, with the real model as GGUF and a hub whose repo holds the same file."""
    home = tmp_path_factory.mktemp("home")
    folder = home / ".opta-lmx" / "models" / "test" / "SmolLM2-135M-Instruct-GGUF"
    folder.mkdir(parents=True)
    shutil.copy(models.smollm2_gguf(), folder)
    (home / "config.yaml").write_text(SETTINGS)
    files = {"m-q8_0.gguf": models.smollm2_gguf().read_bytes(), "config.json": b"{}"}
    with fake_hub({"org/m": files}) as hub:
        HUBS.append(hub)
        config = ["--config", str(home / "config.yaml")]
        with serving(home, *config, environment={"HF_ENDPOINT": hub.endpoint}) as server:
            yield server


HUBS: list[FakeHub] = []
SETTINGS = """
hub: {reserve_bytes: 0}
sampling: {temperature: 0}
engine: {context_length: 96}
"""


def test_chat_with_a_real_model(real: Serving) -> None:
    """The model is loaded, answers, and is then in memory."""
    lmx = Lmx(real.url)
    assert "largest planet" in lmx("chat", SMOLLM, "Name the largest planet.")
    [model] = lmx("ps", "--json")["models"]
    assert (model["id"], model["loaded"]["format"]) == (SMOLLM, "gguf")


def test_logs(real: Serving) -> None:
    """The last lines; with -f, those that come while one looks, until Ctrl-C."""
    lmx = Lmx(real.url)
    lmx("chat", SMOLLM, "Hi")
    assert "/v1/chat/completions" in lmx("logs")
    lines = [json.loads(line)["line"] for line in json_lines(lmx, "logs", "-n", "1000")]
    assert any("/v1/chat/completions" in line for line in lines)
    command = [*LMX, "logs", "-f", "-n", "1", "--url", real.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        lmx("load", "nobody-has-this")
        # A request is logged when it has ended, which the one before may have only now.
        assert any("/admin/model/load" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130


def json_lines(lmx: Lmx, *arguments: str) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*arguments, "--json", "--url", lmx.url]) == 0
    return out.getvalue().splitlines()


def test_get_shows_progress_and_can_be_left(real: Serving) -> None:
    """Ctrl-C leaves the download to the server and says how to go on; rm then deletes it."""
    lmx, [hub] = Lmx(real.url), HUBS
    hub.misbehave("org/m/m-q8_0.gguf", [Fault(stall=50_000_000)])
    with terminal([*LMX, "get", "org/m@q8_0", "--url", real.url], TERM="xterm") as person:
        person.until("org/m")
        assert hub.stalled.wait(TIMEOUT)
        person.until("%")
        person.process.send_signal(signal.SIGINT)
        code, said = person.rest()
        assert code == 130 and "lmx get org/m" in said and "--cancel" in said
    assert lmx("get").startswith("org/m: downloading")
    assert re.search(r"^org/m .* downloading *$", lmx("ls"), re.M)
    hub.released.set()
    assert lmx("get", "org/m").startswith("org/m: completed")
    assert lmx("verify", "org/m").startswith("m: as the hub has it")
    with terminal([*LMX, "rm", "m", "--url", real.url]) as person:
        person.until("[y/N] ")
        person.type("n\n")
        assert person.rest()[0] == 1
    assert lmx("rm", "m", "-y") == "m: deleted\n"
    assert lmx("rm", "m", "-y") == "" and lmx.code == 1


def test_a_download_that_fails_or_is_given_up(real: Serving) -> None:
    """The reason is on stderr and the exit code 1; with --cancel nothing is left."""
    lmx, [hub] = Lmx(real.url), HUBS
    hub.misbehave("org/m/m-q8_0.gguf", [Fault(flip=70_000_000)])
    lmx("get", "org/m", "--json")
    assert lmx.code == 1 and "m-q8_0.gguf" in lmx.err
    assert json.loads(lmx.out)["state"] == "failed"
    assert lmx("get", "org/m", "--cancel").startswith("org/m: ")
    lmx("get", "org/none")
    assert lmx.code == 1 and "org/none" in lmx.err


def test_server_start_and_stop(tmp_path: Path) -> None:
    """It runs in the background, as LM Studio's, and its log is in LMX's folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, "HOME": str(tmp_path)}

    def server(action: str) -> tuple[int, str]:
        command = [*LMX, "server", action, "--port", port]
        # A pipe to the output would stay open as long as the server.
        done = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT)
        return done.returncode, (done.stdout + done.stderr).decode()

    running = (0, f"The server is running on port {port}.\n")
    assert [server(action) for action in ("start", "start", "status")] == [running] * 3
    assert "serving on" in (tmp_path / ".opta-lmx" / "server.log").read_text()
    stopped = f"The server is not running on port {port}.\n"
    assert [server(action) for action in ("stop", "status")] == [(0, stopped), (3, stopped)]
    (tmp_path / ".opta-lmx" / "config.yaml").write_text("prot: 1\n")
    assert server("start")[0] == 2


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, "good\n"),
        ("port: 4321\nengine:\n  parallel: 8\n", 0, "  port: 4321\n  engine.parallel: 8\n"),
        ("admin_key: secret\n", 0, '  admin_key: "***"\n'),
        ("models:\n  m: {pinned: true}\n", 0, '  models: {"m":{'),
        ("host: x\nprot: 1\n", 2, "line 2: "),
        ("engine:\n  parallel: many\n", 2, "line 2: "),
        ("models:\n  m:\n    engine:\n      paralel: 1\n", 2, "line 2: "),
        ("a: [\n", 2, "line 2"),
    ],
)
def test_config_check(text: str, code: int, said: str, tmp_path: Path) -> None:
    """What differs from the defaults, or what is wrong and in which line."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main(["config", "check", "--config", str(path)]) == code
    assert said in out.getvalue() and str(path) in out.getvalue()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["config", "check", "--config", str(path), "--json"]) == code
    assert (json.loads(out.getvalue())["error"] is None) == (code == 0)


@pytest.mark.parametrize(
    ("command", "banned"),
    [
        ("main(['ps', '--url', 'http://127.0.0.1:1', '--admin-key', 'x'])",
         {"uvicorn", "starlette", "mlx", "anyio", "yaml"} - {"anyio", "yaml"}),
        ("import lmx.serve", {"rich", "httpx2", "lmx.cli", "lmx.bench", "lmx.launchd"}),
    ],
    ids=["ps", "serve"],
)  # fmt: skip
def test_a_command_imports_only_what_it_needs(command: str, banned: set[str]) -> None:
    """Both start fast: what one prints with, the other does not load."""
    code = f"import sys; from lmx.__main__ import main; {command}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert banned & set(done.stdout.split()) == set()


def test_a_closed_pipe_is_no_traceback(lmx: Lmx) -> None:
    """`lmx ls --json | head -1` ends quietly."""
    command = [*LMX, "ls", "--json", "--url", lmx.url]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=TIMEOUT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_what_models_say_does_not_steer_the_terminal() -> None:
    """Control characters are dropped, line breaks and tabs stay."""
    assert plain("a\x1b[31m\x07\x9b2J\r\n\tb\x7fä") == "a[31m2J\n\tbä"


def helps() -> Iterator[str]:
    """What `lmx --help` and each `lmx COMMAND --help` print."""
    top = parser()
    yield top.format_help()
    [commands] = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for command in commands.choices.values():
        yield command.format_help()


def section() -> str:
    """README's list of them; print it anew with `python -m tests.test_cli`."""
    return "<!-- help -->\n```\n" + "\n".join(helps()) + "```\n<!-- end -->\n"


def test_readme_has_the_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, as the program prints it 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    assert section() in README.read_text()


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    sys.stdout.write(section())
