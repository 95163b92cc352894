"""The doctor: each finding with what to do, from what a test says the machine is like."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from lmx import doctor, inventory
from lmx.__main__ import main
from lmx.config import Config, HubSettings
from lmx.inventory import Entry, Manifest
from lmx.memory import System

GB = 2**30


@pytest.mark.parametrize(
    ("used", "pressure", "state", "word"),
    [
        (100, 1, "ok", "350"),
        (480, 1, "warn", "0 B more"),
        (100, 2, "warn", "pressure is at 2"),
        (100, 4, "fail", "pressure is at 4"),
    ],
)
def test_memory(used: int, pressure: int, state: str, word: str) -> None:
    """Full is a warning, critical pressure a failure; the numbers are told."""
    check = doctor.memory_left(Config(), System(500 * GB, used * GB), None, pressure)
    assert (check.state, word in check.found) == (state, True)
    assert bool(check.todo) == (state != "ok")


@pytest.mark.parametrize(("working_set", "state"), [(461, "ok"), (384, "warn"), (None, "fail")])
def test_metal(working_set: int | None, state: str) -> None:
    """Below the share of memory that LMX would use, the command that raises it is told."""
    settings = {"iogpu.wired_limit_mb": 2}
    working = working_set and working_set * GB
    check = doctor.metal(Config(), 512 * GB, working, settings.__getitem__)
    assert check.state == state
    if working_set:
        assert "iogpu.wired_limit_mb=2" in check.found
    if state == "warn":
        assert check.todo.endswith(f"sudo sysctl iogpu.wired_limit_mb={int(0.9 * 512 * 1024)}")


@pytest.mark.parametrize(
    ("accounted", "state"), [(420, "ok"), (400, "ok"), (5, "warn")], ids=["all", "kernel", "lost"]
)
def test_stranded_memory(accounted: int, state: str) -> None:
    """Wired memory that is nobody's, beyond what the kernel has, asks for a reboot."""
    check = doctor.stranded(512 * GB, 424 * GB, accounted * GB)
    assert check.state == state
    assert ("419.00 GB" in check.found and "reboot" in check.todo) == (state == "warn")


@pytest.mark.parametrize(
    ("modules", "seconds", "state", "word"),
    [
        ("json", 60, "ok", "msgspec 0."),
        ("no_such_engine", 60, "fail", "no_such_engine"),
        ("os; os.abort()", 60, "fail", "exit code -6"),
        ("time; time.sleep(100)", 0.3, "fail", "is not imported"),
    ],
)
def test_engine(modules: str, seconds: float, state: str, word: str) -> None:
    """An engine that is missing, crashes or hangs is found so, and the doctor goes on."""
    check = doctor.engine("E", modules, ["msgspec"], seconds)
    assert (check.state, word in check.found) == (state, True)
    assert check.todo.endswith("pip install msgspec") == (state == "fail")


def test_openblas() -> None:
    """Missing, it is a warning with the package's name."""
    assert doctor.openblas("libopenblas.so.0").state == "ok"
    assert "apt install" in doctor.openblas(None).todo


@pytest.fixture
def lm_studio() -> Iterator[int]:
    """A server that is not LMX; its port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error":"Unexpected endpoint or method. (GET /health)"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_port_that_another_has(lm_studio: int) -> None:
    """The process is named; so is the way out."""
    check = doctor.port(Config(port=lm_studio), None)
    assert check.state == "fail" and "lms server stop" in check.todo
    assert f"process {os.getpid()}" in check.found
    assert doctor.port(Config(), f"http://127.0.0.1:{lm_studio}").state == "fail"


def test_a_free_port() -> None:
    """It is good, since LMX may simply not run; an address that is not this machine's is bad."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert doctor.port(Config(port=port), None).state == "ok"
    assert doctor.port(Config(port=port, host="192.0.2.1"), None).state == "fail"


def test_folders(tmp_path: Path) -> None:
    """Which are there, and whether there is room for downloads."""
    (tmp_path / "more").mkdir()
    roots = (str(tmp_path / "more"), str(tmp_path / "gone"))
    config = Config(models_dir=str(tmp_path / "models"), model_roots=roots)
    [own, more] = doctor.folders(config)
    assert (own.state, more.state) == ("ok", "ok") and str(tmp_path / "more") in more.found
    full = msgspec.structs.replace(config, hub=HubSettings(reserve_bytes=2**60))
    assert next(iter(doctor.folders(full))).state == "warn"
    (tmp_path / "file").touch()
    unwritable = msgspec.structs.replace(config, models_dir=str(tmp_path / "file" / "models"))
    assert next(iter(doctor.folders(unwritable))).state == "fail"


@pytest.mark.parametrize(
    ("content", "state", "word"),
    [
        (None, "ok", "not there yet"),
        ("{}", "ok", ""),
        ('{"starting":{"a":1}}', "ok", ""),
        ('{"starting":{"a":3}}', "warn", "a"),
        ("{", "warn", "state.json"),
    ],
)
def test_state_file(content: str | None, state: str, word: str, tmp_path: Path) -> None:
    """Damage, and loads that have taken the server down, are told."""
    path = tmp_path / "state.json"
    if content is not None:
        path.write_text(content)
    check = doctor.state_file(Config(state_file=str(path)))
    assert (check.state, word in check.found) == (state, True)


def test_downloads(tmp_path: Path) -> None:
    """A file that has changed since it was verified is named, and so is a damaged manifest."""
    for name in ("good", "bad", "broken"):
        folder = tmp_path / "org" / name
        folder.mkdir(parents=True)
        (folder / "w").write_bytes(b"1234")
        mtime = os.stat(folder / "w").st_mtime_ns
        manifest = Manifest(f"org/{name}", "0" * 40, {"w": Entry(4, None, "x", mtime)})
        inventory.write(folder, manifest)
    (tmp_path / "org" / "bad" / "w").write_bytes(b"12345")
    (tmp_path / "org" / "broken" / inventory.NAME).write_text("{")
    found = {check.found: check for check in doctor.downloads(Config(models_dir=str(tmp_path)))}
    told = {check.state: check for check in found.values()}
    assert "org/bad" in told["warn"].found and told["warn"].todo == "lmx verify org/bad"
    assert "org/broken" in told["fail"].todo
    assert told["ok"].found.startswith("1 ")


def test_all_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the machine as it is: engines have versions; a bad configuration is one failure of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".opta-lmx").mkdir()
    (tmp_path / ".opta-lmx" / "config.yaml").write_text("prot: 1\n")
    options = argparse.Namespace(config=None, url=None, json=True)
    checks = {check.name: check for check in doctor.checks(options)}
    assert checks["configuration"].state == "fail" and "prot" in checks["configuration"].found
    assert checks["MLX"].found.startswith("mlx 0.") and "mlx-lm" in checks["MLX"].found
    assert checks["llama.cpp"].state == "ok"
    assert psutil.virtual_memory().total > 0 and ("Metal" in checks) == (sys.platform == "darwin")
    monkeypatch.setattr(doctor, "ENGINES", ())
    assert main(["doctor", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert main(["doctor"]) == 1
    assert "fail  configuration: " in capsys.readouterr().out
