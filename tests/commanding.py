"""`lmx` commands against servers on real sockets, in this process or in a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lmx.__main__ import main

from .fake_world import World, app_over
from .serving import TIMEOUT

LMX = (sys.executable, "-m", "lmx")


@dataclass
class Lmx:
    """Runs `lmx ... --url URL` in this process."""

    url: str
    code: int = 0
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str) -> Any:
        """What it prints; decoded, if that is JSON."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                self.code = main([*arguments, "--url", self.url])
            except SystemExit as exit:  # argparse's way
                self.code = int(exit.code or 0)
        self.out, self.err = out.getvalue(), err.getvalue()
        return json.loads(self.out) if "--json" in arguments and self.out else self.out


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The application on a socket of its own; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT)
        listener.close()


@contextmanager
def over(world: World, folder: Path, **settings: Any) -> Iterator[Lmx]:
    with listening(app_over(world, folder, **settings)) as url:
        yield Lmx(url)


@dataclass
class Terminal:
    process: subprocess.Popen[bytes]
    _file: int

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def until(self, text: str) -> str:
        """All that is shown up to this text."""
        data = b""
        while text.encode() not in data:
            ready, _, _ = select.select([self._file], [], [], 30)
            try:
                data += os.read(self._file, 1) if ready else b""
            except OSError:  # it has ended
                ready = []
            assert ready, f"no {text!r} in {data.decode()!r}"
        return data.decode()

    def rest(self) -> tuple[int, str]:
        """The exit code, and what is shown before."""
        data = b""
        with contextlib.suppress(OSError):
            while piece := os.read(self._file, 1024):
                data += piece
        return self.process.wait(TIMEOUT), data.decode()


@contextmanager
def terminal(command: Sequence[str], **environment: str) -> Iterator[Terminal]:
    """A program in a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200", **environment},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait(TIMEOUT)
        os.close(ours)
