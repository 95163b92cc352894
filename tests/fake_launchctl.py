"""Stands in for launchctl and launchd, as far as `lmx install` uses them: the daemon really runs,
with its paths below $FAKE_LAUNCHD/root, where its plist is."""

from __future__ import annotations

import os
import plistlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil

STATE = Path(os.environ["FAKE_LAUNCHD"])
PID = STATE / "pid"
"""There while the daemon is loaded."""


def below(path: str) -> str:
    inside = f"{STATE}/root{path}"
    return inside if Path(inside).exists() else path


def running() -> int | None:
    if not PID.exists():
        return None
    pid = int(PID.read_text())
    try:
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return pid
    except psutil.NoSuchProcess:
        pass
    PID.unlink()
    return None


def bootstrap(path: str) -> int:
    if running() or (STATE / "refuse").exists():
        sys.stderr.write("Bootstrap failed: 5: Input/output error\n")
        return 5
    job = plistlib.loads(Path(below(path)).read_bytes())
    environment = job["EnvironmentVariables"]
    with open(f"{STATE}/root{job['StandardErrorPath']}", "a") as stderr:
        daemon = subprocess.Popen(
            [below(argument) for argument in job["ProgramArguments"]],
            cwd=below(job["WorkingDirectory"]),
            env=environment | {"HOME": below(environment["HOME"])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    PID.write_text(str(daemon.pid))
    return 0


def main(command: str, *arguments: str) -> int:
    with open(STATE / "calls", "a") as calls:
        calls.write(" ".join([command, *arguments]) + "\n")
    pid = running()
    match command:
        case "bootstrap":
            return bootstrap(arguments[1])
        case "print" if pid is None:
            sys.stderr.write('Could not find service "com.opta.lmx" in domain for system\n')
            return 113
        case "print":
            sys.stdout.write(
                f"{arguments[0]} = {{\n\tactive count = 1\n\tstate = running\n\n\tpid = {pid}\n"
                "\tlast exit code = (never exited)\n\tendpoints = {\n\t\tpid = 1\n\t}\n}\n"
            )
        case "bootout" if pid is not None:
            os.kill(pid, signal.SIGTERM)
            sys.stderr.write("Boot-out failed: 36: Operation now in progress\n")
            return 36
        case "bootout":
            sys.stderr.write("Boot-out failed: 3: No such process\n")
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
