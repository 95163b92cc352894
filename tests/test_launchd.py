"""The launchd daemon, on a folder in place of a Mac's disk and with a launchctl of our own. None of
this has run on a Mac."""

from __future__ import annotations

import grp
import json
import os
import plistlib
import pwd
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lmx.config import Config, load_config
from lmx.daemon_plist import exit_timeout, faults, filled
from lmx.errors import ConfigError, InstallFailed
from lmx.launchd import install, status, uninstall
from lmx.runner_process import STOP_SECONDS, TERMINATE_SECONDS
from lmx.serve import SHUTDOWN_MARGIN_SECONDS
from lmx.steps import Machine

PLIST = Path(__file__).parents[1] / "com.opta.lmx.plist"
INSTALLED = Path("/Library/LaunchDaemons/com.opta.lmx.plist")
HOME = Path(pwd.getpwnam("nobody").pw_dir)
DATA = HOME / ".opta-lmx"


@dataclass
class Mac:
    state: Path
    owners: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By inode: what root would have made of them."""

    def __post_init__(self) -> None:
        self.machine = Machine(self.state / "root", uid=0, chown=self._chown)

    def _chown(self, descriptor: int, uid: int, gid: int) -> None:
        self.owners[os.fstat(descriptor).st_ino] = uid, gid

    def at(self, path: str | Path) -> Path:
        return self.machine.at(Path(path))

    def look(self, path: str | Path) -> tuple[str, tuple[int, int]]:
        """Permissions and owner."""
        found = self.at(path).stat()
        return f"{found.st_mode & 0o7777:o}", self.owners[found.st_ino]

    def configure(self, text: str) -> Path:
        self.at(DATA).mkdir(exist_ok=True)
        self.at(DATA / "config.yaml").write_text(text)
        return DATA / "config.yaml"

    def calls(self) -> list[str]:
        """What launchctl was called with since the last look, without the questions."""
        calls = self.state / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.write_text("")
        return [line for line in lines if not line.startswith("print")]

    def files(self) -> list[Path]:
        return sorted(self.machine.root.rglob("*"))


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    for folder in ("Library/LaunchDaemons", "etc/newsyslog.d", "var/log", str(HOME)[1:]):
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
    commands = tmp_path / "bin"
    commands.mkdir()
    launchctl = Path(__file__).with_name("fake_launchctl.py")
    for name, script in (
        ("launchctl", f'exec {sys.executable} {launchctl} "$@"'),
        ("sudo", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LAUNCHD", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody's"))
    monkeypatch.delenv("SUDO_USER", raising=False)
    yield Mac(tmp_path)
    pid = tmp_path / "pid"
    if pid.exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def options(command: str, **given: Any) -> Namespace:
    values = {"user": None, "config": None, "dry_run": False, "url": None, "json": False}
    return Namespace(command=command, **(values | given))


def test_life_of_a_daemon(mac: Mac, port: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Installed it serves; installed again it is a new process of the same account; uninstalled it
    is gone, and what it wrote is still there."""
    mac.configure(f"port: {port}\nmodel_roots: []\n")

    def found() -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        code = status(options("status", json=True), mac.machine)
        return code, json.loads(capfd.readouterr().out)

    assert install(options("install", user="nobody"), mac.machine) == 0
    assert mac.calls() == ["enable system/com.opta.lmx", f"bootstrap system {INSTALLED}"]
    code, first = found()
    assert (code, first["installed"], first["url"]) == (0, True, f"http://127.0.0.1:{port}")
    assert first["launchd"]["state"] == "running"

    assert install(options("install"), mac.machine) == 0
    assert [call.split()[0] for call in mac.calls()] == ["bootout", "enable", "bootstrap"]
    assert plistlib.loads(mac.at(INSTALLED).read_bytes())["UserName"] == "nobody"
    code, second = found()
    assert (code, second["version"]) == (0, first["version"])
    assert second["launchd"]["pid"] not in ("1", first["launchd"]["pid"])

    assert uninstall(options("uninstall"), mac.machine) == 0
    assert mac.calls() == ["bootout system/com.opta.lmx"]
    assert str(DATA) in capfd.readouterr().out
    assert not mac.at(INSTALLED).exists() and not any(mac.at("/etc/newsyslog.d").iterdir())
    assert mac.at(DATA / "config.yaml").exists() and mac.at("/var/log/opta-lmx").exists()
    assert status(options("status", url=first["url"]), mac.machine) == 3
    assert "not installed" in capfd.readouterr().out
    assert uninstall(options("uninstall"), mac.machine) == 0


@pytest.fixture
def old(mac: Mac) -> Iterator[None]:
    """An old daemon is loaded, so that nobody asks who has the default port."""
    with subprocess.Popen(["sleep", "600"]) as process:
        (mac.state / "pid").write_text(str(process.pid))
        yield
        process.kill()
        (mac.state / "pid").unlink(missing_ok=True)


def test_what_is_written(mac: Mac, old: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file has its owner and mode, and is for the account that called sudo. The configuration
    listens on the network. What launchctl refuses is told in its own words."""
    monkeypatch.setenv("SUDO_USER", "nobody")
    (mac.state / "refuse").touch()
    with pytest.raises(InstallFailed, match=r"bootstrap.*Bootstrap failed: 5: Input/output"):
        install(options("install"), mac.machine)
    account = pwd.getpwnam("nobody")
    own = (account.pw_uid, account.pw_gid)
    assert {
        str(path): mac.look(path)
        for path in (
            "/var/log/opta-lmx",
            DATA,
            DATA / "config.yaml",
            "/etc/newsyslog.d/opta-lmx.conf",
            INSTALLED,
        )
    } == {
        "/var/log/opta-lmx": ("750", (account.pw_uid, 0)),
        str(DATA): ("750", own),
        str(DATA / "config.yaml"): ("600", own),
        "/etc/newsyslog.d/opta-lmx.conf": ("644", (0, 0)),
        str(INSTALLED): ("644", (0, 0)),
    }
    config = load_config(mac.at(DATA / "config.yaml"))
    assert config == Config(host="0.0.0.0", log_file="/var/log/opta-lmx/lmx.log")
    plist = mac.at(INSTALLED).read_bytes()
    assert faults(plist, "com.opta.lmx") == []
    assert plistlib.loads(plist)["EnvironmentVariables"]["HOME"] == str(HOME)
    for line in mac.at("/etc/newsyslog.d/opta-lmx.conf").read_text().splitlines():
        assert re.fullmatch(
            r"/var/log/opta-lmx/std(out|err)\.log nobody:wheel 640 5 1024 \* N", line
        )
    assert [path for path in mac.files() if path.name.startswith(".") and path.is_file()] == []


def test_dry_run(mac: Mac, old: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Every step is printed, in the order of its doing, with what a file will hold and what a
    changed one will lose; nothing is done, and nobody need be root."""
    mac.at(INSTALLED).write_text("<plist/>\n")
    files = mac.files()
    anyone = replace(mac.machine, uid=501)
    assert install(options("install", user="nobody", dry_run=True), anyone) == 0
    assert (mac.files(), mac.calls()) == (files, [])
    output = capfd.readouterr().out
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    expected = (
        f"run sudo -n -H -u nobody -- {mac.machine.program} --version",
        "folder /var/log/opta-lmx (nobody:wheel 0750)",
        f"folder {DATA} (nobody:{group} 0750)",
        f"file {DATA}/config.yaml (nobody:{group} 0600)",
        "    +host: 0.0.0.0",
        "file /etc/newsyslog.d/opta-lmx.conf (root:wheel 0644)",
        f"file {INSTALLED} (root:wheel 0644)",
        "    -<plist/>",
        "    +\t<string>nobody</string>",
        "run launchctl bootout system/com.opta.lmx, if it is loaded, and wait for its end",
        "run launchctl enable system/com.opta.lmx",
        f"run launchctl bootstrap system {INSTALLED}",
        "wait until http://127.0.0.1:1234/health answers",
    )
    assert [line for line in output.splitlines() if line in expected] == [*expected]
    assert "whoever reaches this machine" in output

    assert uninstall(options("uninstall", dry_run=True), anyone) == 0
    assert f"remove {INSTALLED}\n" in capfd.readouterr().out
    assert (mac.files(), mac.calls()) == (files, [])


def test_dry_run_without_launchctl(
    mac: Mac, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The steps can be read anywhere; carried out they need launchd, and status does without it."""
    mac.configure(f"port: {port}\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert install(options("install", user="nobody", dry_run=True), mac.machine) == 0
    output = capfd.readouterr().out
    assert "bootstrap" in output and "whoever reaches this machine" not in output
    for change in (install, uninstall):
        with pytest.raises(InstallFailed, match="No launchctl here"):
            change(options("install", user="nobody"), mac.machine)
    assert status(options("status", url=f"http://127.0.0.1:{port}"), mac.machine) == 3
    assert f"no answer at http://127.0.0.1:{port}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("port: 1", {"user": None}, "--user NAME"),
        ("port: 1", {"user": "root"}, "not root"),
        ("port: 1", {"user": "no-such-account"}, "no-such-account"),
        ("port: 1", {"config": Path("/nowhere/lmx.yaml")}, "/nowhere/lmx.yaml"),
        ("port: 1", {"config": HOME / "Documents" / "lmx.yaml"}, "Documents/lmx.yaml"),
        ("prot: 1", {}, "prot"),
        ("port: 0", {}, "port"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_first(
    mac: Mac, text: str, given: dict[str, Any], message: str
) -> None:
    """Before anything is changed, and the message names it."""
    mac.configure(text)
    files = mac.files()
    with pytest.raises((ConfigError, InstallFailed), match=message):
        install(options("install", **{"user": "nobody", **given}), mac.machine)
    assert (mac.files(), mac.calls()) == (files, [])


def test_it_needs_root(mac: Mac) -> None:
    """The message is the command line to use."""
    for change in (install, uninstall):
        with pytest.raises(InstallFailed, match=f"sudo {mac.machine.program}"):
            change(options("install", user="nobody"), replace(mac.machine, uid=501))


def test_a_taken_port(mac: Mac) -> None:
    """Who has the port keeps it, and nothing is installed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mac.configure(f"port: {port}\n")
        with pytest.raises(InstallFailed, match=f"Port {port} is taken"):
            install(options("install", user="nobody"), mac.machine)
    assert not mac.at(INSTALLED).exists()


def test_a_program_that_the_account_cannot_run(mac: Mac, port: int) -> None:
    """It is tried as that account before anything is changed."""
    mac.configure(f"port: {port}\n")
    machine = replace(mac.machine, program=Path("/no/such/lmx"))
    with pytest.raises(InstallFailed, match="/no/such/lmx"):
        install(options("install", user="nobody"), machine)
    assert not mac.at("/var/log/opta-lmx").exists()


def test_a_daemon_that_does_not_answer(mac: Mac, port: int) -> None:
    """The wait ends, and says where to look."""
    mac.configure(f"port: {port}\n")
    machine = replace(mac.machine, answer_seconds=0)
    with pytest.raises(InstallFailed, match=f"{port} after 0 s.*/var/log/opta-lmx"):
        install(options("install", user="nobody"), machine)


def test_a_link_in_place_of_the_folder(mac: Mac, port: int) -> None:
    """Root gives nobody what lies at the end of the account's own link."""
    elsewhere = mac.machine.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(f"port: {port}\n")
    mac.at(DATA).symlink_to(elsewhere)
    with pytest.raises(InstallFailed, match="does not answer"):
        install(options("install", user="nobody"), replace(mac.machine, answer_seconds=0))
    assert elsewhere.stat().st_ino not in mac.owners


def test_the_plist_at_the_top() -> None:
    """It is what install writes for its account and places, and has no fault."""
    home, program = Path("/Users/opta"), Path("/opt/opta-lmx/bin/lmx")
    data = home / ".opta-lmx"
    written = filled("opta", home, data, program, data / "config.yaml", exit_timeout(Config()))
    assert plistlib.loads(written) == plistlib.loads(PLIST.read_bytes())
    assert faults(PLIST.read_bytes(), PLIST.stem) == []


@pytest.mark.parametrize("grace", [0, 0.5, 20, 3600.2])
def test_launchd_waits_for_the_server(grace: float) -> None:
    """It kills later than the server's own last resort, and than a runner's."""
    seconds = exit_timeout(Config(shutdown_grace_seconds=grace))
    assert seconds > grace + SHUTDOWN_MARGIN_SECONDS + STOP_SECONDS + TERMINATE_SECONDS


def key(name: str, value: str) -> str:
    return rf"<key>{name}</key>\s*{value}"


@pytest.mark.parametrize(
    ("pattern", "replacement", "fault"),
    [
        ("</array>", "</list>", "not a plist"),
        (key("ExitTimeOut", "<integer>70"), "<key>ExitTimeOut</key><integer>1.5", "not a plist"),
        ("<dict>.*</dict>", "<array/>", "not a dictionary"),
        ("<key>Umask</key>", "<key>UserName</key>", "UserName twice"),
        ("<key>HOME</key>", "<key>PATH</key>", "PATH twice"),
        ("<key>Umask</key>", "<key>SoftResourceLimits</key>", "SoftResourceLimits is not known"),
        (key("Umask", "<string>027</string>"), "", "Umask is no str"),
        (key("Umask", "<string>027</string>"), "<key>Umask</key><integer>23</integer>", "Umask"),
        ("<string>027<", "<string>27<", "Umask is not octal"),
        (key("RunAtLoad", "<true/>"), "<key>RunAtLoad</key><integer>1</integer>", "RunAtLoad"),
        (key("ThrottleInterval", "<integer>10</integer>"), "<key>ThrottleInterval</key><true/>",
         "ThrottleInterval"),
        ("<integer>70<", "<integer>0<", "ExitTimeOut of 0"),
        ("<string>1</string>", "<integer>1</integer>", "strings"),
        ("<string>--config</string>", "<true/>", "strings"),
        ("<array>.*</array>", "<array/>", "strings"),
        ("<string>com.opta.lmx<", "<string>com.opta<", "Label"),
        ("<string>opta<", "<string>root<", "UserName is root"),
        ("/Users/opta/.opta-lmx<", "~/.opta-lmx<", "nothing expands"),
        ("/Users/opta<", "$HOME<", "nothing expands"),
        ("<string>/opt/opta-lmx/bin/lmx<", "<string>lmx<", "'lmx' is no absolute path"),
        ("/Users/opta/.opta-lmx/config.yaml", "config.yaml", "'config.yaml' is no absolute path"),
        (":/bin:", ":bin:", "'bin' is no absolute path"),
        ("<string>/Users/opta</string>", "<string>opta</string>", "'opta' is no absolute path"),
        ("/var/log/opta-lmx/stderr.log", "stderr.log", "'stderr.log' is no absolute path"),
    ],
    ids=lambda text: text[-40:],
)  # fmt: skip
def test_lint(pattern: str, replacement: str, fault: str) -> None:
    """Each fault that is planted is found, and is the only one."""
    text = re.sub("<!--.*?-->", "", PLIST.read_text(), flags=re.DOTALL)
    text, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
    assert count == 1
    [found, *more] = faults(text.encode(), PLIST.stem)
    assert fault in found
    assert more == [] or found.endswith(("twice", "is not known"))  # in place of another


@pytest.mark.parametrize(
    ("soft", "hard", "expected"), [(256, 512, 512), (256, 2000, 1000), (1500, 2000, 1500)]
)
def test_file_limit(soft: int, hard: int, expected: int) -> None:
    """The server raises launchd's 256 as far as it may, and lowers no limit."""
    code = (
        "import resource\n"
        "from lmx import serve\n"
        "serve.OPEN_FILES = 1000  # for machines that allow no more than their own\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "serve.raise_file_limit()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([str(expected), str(hard)], "")
