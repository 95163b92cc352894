"""The launchd daemon: `lmx install`, `uninstall` and `status`.

Everything is checked first. What then changes is a list of steps, to be shown or to be run. The
reasons are in com.opta.lmx.plist, launchd.plist(5), launchctl(1) and newsyslog.conf(5).
"""

from __future__ import annotations

import argparse
import grp
import json
import os
import plistlib
import pwd
import re
import shutil
import socket
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from xml.parsers.expat import ExpatError

from .config import HOME, LOCAL, Config, load_config
from .daemon_plist import exit_timeout, faults, filled
from .errors import ConfigError, InstallFailed
from .steps import (
    COMMAND_SECONDS,
    MACHINE,
    ROOT,
    Machine,
    Step,
    call,
    carry_out,
    command,
    file,
    folder,
    os_errors,
    remove,
    say,
    wait,
)

SERVICE: Final = "system/com.opta.lmx"
PLIST: Final = Path("/Library/LaunchDaemons/com.opta.lmx.plist")
NEWSYSLOG: Final = Path("/etc/newsyslog.d/opta-lmx.conf")
LOGS: Final = Path("/var/log/opta-lmx")
UNREADABLE: Final = ("Desktop", "Documents", "Downloads")
"""Folders of a home that macOS keeps from daemons."""


def _boot_out(before: dict[str, Any]) -> Step:
    """launchctl may return before the daemon has ended, and until then a bootstrap fails with
    "5: Input/output error"."""
    seconds = int(before.get("ExitTimeOut", 0)) + COMMAND_SECONDS

    def run() -> None:
        if _print() is not None:
            said = call("launchctl", "bootout", SERVICE, seconds=seconds).stderr.strip()
            late = InstallFailed(f"The daemon does not end. {said}")
            wait(lambda: _print() is None, seconds, late)

    return Step(f"run launchctl bootout {SERVICE}, if it is loaded, and wait for its end", run)


def _answer(url: str, seconds: float) -> Step:
    late = InstallFailed(
        f"The daemon is installed, but does not answer at {url} after {seconds:.0f} s. "
        f"See {LOGS}/stderr.log and `lmx status`."
    )

    def run() -> None:
        wait(lambda: _health(url), seconds, late)

    return Step(f"wait until {url}/health answers", run)


def _print() -> dict[str, str] | None:
    """What launchd says of the daemon, None if it is not loaded. The form is not documented."""
    if shutil.which("launchctl") is None:
        return None
    done = call("launchctl", "print", SERVICE)
    found = re.findall(r"^\s*(state|pid|last exit code) = (.+)$", done.stdout, re.MULTILINE)
    return None if done.returncode else dict(reversed(found))  # the first of each


def _health(url: str) -> dict[str, Any] | None:
    """What the server at `url` says of itself, None where there is none."""
    import httpx2  # too slow for command lines that do not ask

    try:
        answer = httpx2.get(f"{url}/health", timeout=2, trust_env=False).json()
    except (httpx2.HTTPError, ValueError):
        return None
    # LM Studio answers 200 on any path.
    return answer if isinstance(answer, dict) and "version" in answer else None


def _is_taken(url: str) -> bool:
    address = urlsplit(url)
    assert address.hostname and address.port
    try:
        socket.create_connection((address.hostname, address.port), timeout=2).close()
    except OSError:
        return False
    return True


def _installed(machine: Machine) -> dict[str, Any]:
    """The plist that is there, empty if there is none or it is broken."""
    try:
        plist = plistlib.loads(machine.at(PLIST).read_bytes())
    except (FileNotFoundError, ValueError, ExpatError):
        return {}
    return plist if isinstance(plist, dict) else {}


def _config_of(plist: dict[str, Any]) -> Path | None:
    arguments = plist.get("ProgramArguments", [])
    return Path(arguments[-1]) if arguments[-2:-1] == ["--config"] else None


def _may_change(options: argparse.Namespace, machine: Machine) -> None:
    if not options.dry_run and shutil.which("launchctl") is None:
        raise InstallFailed("No launchctl here: the daemon is for macOS. Elsewhere: lmx serve")
    if not options.dry_run and machine.uid != 0:
        raise InstallFailed(f"Only root can do this: sudo {machine.program} {options.command} ...")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `install`; of them, `uninstall` has only --dry-run."""
    parser.add_argument("--user", help="account to run as (default: who runs sudo)")
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="default: the account's ~/.opta-lmx/config.yaml"
    )
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the steps, change nothing")


@os_errors()
def install(options: argparse.Namespace, machine: Machine = MACHINE) -> int:
    """Installs the daemon and starts it; over an installed one it is an upgrade."""
    _may_change(options, machine)
    before = _installed(machine)
    name = options.user or before.get("UserName") or os.environ.get("SUDO_USER")
    if not name or name == "root":
        raise ConfigError("Name the account to run as, not root: --user NAME")
    try:
        account = pwd.getpwnam(name)
        group = grp.getgrgid(account.pw_gid).gr_name
    except KeyError as error:
        raise ConfigError(f"--user {name}: {error.args[0]}") from None
    home = Path(account.pw_dir)
    data = home / HOME.name
    path = options.config or (name == before.get("UserName") and _config_of(before))
    path = path.absolute() if path else data / "config.yaml"
    for place in (machine.program, path):
        if any(place.is_relative_to(home / folder) for folder in UNREADABLE):
            raise InstallFailed(f"macOS lets no daemon read {place}: move it elsewhere")
    if not machine.at(home).is_dir():
        raise InstallFailed(f"{name} has no home folder {home}")
    user = (f"{name}:{group}", account.pw_uid, account.pw_gid)
    steps = [
        command("sudo", "-n", "-H", "-u", name, "--", str(machine.program), "--version"),
        folder(machine, LOGS, (f"{name}:wheel", account.pw_uid, 0)),
        folder(machine, data, user),
    ]
    if machine.at(path).exists():
        config = load_config(machine.at(path))
    elif path.parent != data and not machine.at(path.parent).is_dir():
        raise ConfigError(f"--config {path}: no such folder")
    else:
        config = Config(host="0.0.0.0", log_file=f"{LOGS}/lmx.log")
        text = f"host: {config.host}\nlog_file: {config.log_file}\n"
        steps.append(file(machine, path, text, user, 0o600))
    url = config.url
    if config.port == 0:
        raise ConfigError(f"{path}: port: a daemon needs one of its own")
    if _print() is None and _is_taken(url):
        raise InstallFailed(
            f"Port {config.port} is taken, by LM Studio or an lmx started by hand perhaps: stop "
            f"that, or set another port in {path}"
        )
    plist = filled(name, home, data, machine.program, path, exit_timeout(config))
    if wrong := faults(plist, PLIST.stem):
        raise InstallFailed(f"No plist can be made of this: {'; '.join(wrong)}")
    # 1 MB each, the last five; N: nobody to tell.
    rotate = [f"{LOGS}/{log}.log {name}:wheel 640 5 1024 * N\n" for log in ("stdout", "stderr")]
    steps += [
        file(machine, NEWSYSLOG, "".join(rotate), ROOT, 0o644),
        file(machine, PLIST, plist.decode(), ROOT, 0o644),
        _boot_out(before),
        command("launchctl", "enable", SERVICE),
        command("launchctl", "bootstrap", "system", str(PLIST)),
        _answer(url, machine.answer_seconds),
    ]
    carry_out(steps, dry_run=options.dry_run)
    if config.host not in LOCAL:
        say(
            f"lmx listens on {config.host}:{config.port}: whoever reaches this machine may use its "
            "models"
            + ("." if config.admin_key else ", and private networks /admin too, without a key.")
            + f" For this machine only, set host: 127.0.0.1 in {path}."
        )
    say(f"Configuration: {path}. Logs: {LOGS}.")
    return 0


@os_errors()
def uninstall(options: argparse.Namespace, machine: Machine = MACHINE) -> int:
    """Ends the daemon and removes it. Models, configuration and logs stay."""
    _may_change(options, machine)
    before = _installed(machine)
    steps = [_boot_out(before), remove(machine, PLIST), remove(machine, NEWSYSLOG)]
    carry_out(steps, dry_run=options.dry_run)
    say(f"Left as they are: {before.get('WorkingDirectory', '~/.opta-lmx')} and {LOGS}.")
    return 0


def status(options: argparse.Namespace, machine: Machine = MACHINE) -> int:
    """0 if the server answers, else 3."""
    plist, job = _installed(machine), _print()
    path = _config_of(plist)
    url = options.url or load_config(path and machine.at(path)).url
    health = _health(url)
    version = health and health["version"]
    if options.json:
        found = {"installed": bool(plist), "launchd": job, "url": url, "version": version}
        say(json.dumps(found))
    else:
        said = ", ".join(f"{key} {value}" for key, value in (job or {}).items())
        say(
            f"launchd: {said or ('not loaded' if plist else 'not installed')}",
            f"server: {f'{version} at {url}' if health else f'no answer at {url}'}",
        )
    return 0 if health else 3
