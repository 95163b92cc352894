"""Changes to a machine, each of which can be shown before it is made."""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from .errors import InstallFailed, LMXError

COMMAND_SECONDS: Final = 60
POLL_SECONDS: Final = 0.2

Owner = tuple[str, int, int]
"""As `ls -l` names it, uid, gid."""
ROOT: Final = ("root:wheel", 0, 0)


@dataclass(frozen=True)
class Machine:
    """What to install on; tests have a folder for it."""

    root: Path = Path("/")
    uid: int = os.geteuid()
    chown: Callable[[int, int, int], None] = os.fchown
    program: Path = field(default_factory=lambda: Path(sys.executable).with_name("lmx"))
    answer_seconds: float = 60
    """How long a started daemon may take to answer."""

    def at(self, path: Path) -> Path:
        return self.root / path.relative_to("/")


MACHINE: Final = Machine()


class Step(NamedTuple):
    text: str
    """What it does; details in further lines."""
    run: Callable[[], None]


def folder(machine: Machine, path: Path, owner: Owner) -> Step:
    place = machine.at(path)

    def run() -> None:
        place.mkdir(0o750, exist_ok=True)
        if place.is_symlink():
            return  # root must not give away what an account points it to
        descriptor = os.open(place, os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            machine.chown(descriptor, *owner[1:])
        finally:
            os.close(descriptor)

    return Step(f"folder {path} ({owner[0]} 0750)", run)


def file(machine: Machine, path: Path, content: str, owner: Owner, mode: int) -> Step:
    place = machine.at(path)

    def run() -> None:
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", delete=False) as new:
            new.write(content)
            os.fchmod(new.fileno(), mode)
            machine.chown(new.fileno(), *owner[1:])
        os.replace(new.name, place)

    old = place.read_text().splitlines() if place.exists() else []
    changes = [*difflib.unified_diff(old, content.splitlines(), lineterm="", n=0)][3:]
    head = f"file {path} ({owner[0]} {mode:04o})"
    return Step("\n    ".join([head, *(changes or ["as it is"])]), run)


def remove(machine: Machine, path: Path) -> Step:
    return Step(f"remove {path}", lambda: machine.at(path).unlink(missing_ok=True))


def command(*arguments: str) -> Step:
    text = shlex.join(arguments)

    def run() -> None:
        done = call(*arguments)
        if done.returncode:
            raise InstallFailed(f"{text}: {(done.stderr or done.stdout).strip()}")

    return Step(f"run {text}", run)


def call(*arguments: str, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments,
            cwd="/",  # the account may not enter this one
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise InstallFailed(f"{shlex.join(arguments)} takes over {seconds:.0f} s") from None


def wait(done: Callable[[], object], seconds: float, failed: LMXError) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise failed
        time.sleep(POLL_SECONDS)


def carry_out(steps: list[Step], *, dry_run: bool) -> None:
    for step in steps:
        say(step.text if dry_run else step.text.partition("\n")[0])
        if not dry_run:
            step.run()


@contextmanager
def os_errors() -> Iterator[None]:
    """Makes them errors of the installation."""
    try:
        yield
    except OSError as error:
        raise InstallFailed(str(error)) from error


def say(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
