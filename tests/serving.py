"""The whole program, as a user starts it, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import httpx2
from openai import AsyncOpenAI

TIMEOUT = 120


@dataclass
class Serving:
    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=TIMEOUT)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx2.post(self.url + path, json=body, timeout=TIMEOUT)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", timeout=TIMEOUT, max_retries=0)

    def active(self, model: str) -> int:
        """Rows and waiting requests of a model, as /health counts them."""
        status = {m["id"]: m for m in self.get("/health").json()["models"]}
        return int(status[model]["active"])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)


@contextmanager
def serving(
    home: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    killed: bool = False,
) -> Iterator[Serving]:
    """`python -m lmx` with its home folder at `home`; it must end with exit code 0, unless the test
    kills it."""
    with subprocess.Popen(
        [sys.executable, "-m", "lmx", "--port", "0", *arguments],
        env={
            **os.environ,
            "HOME": str(home),
            "PYTHONWARNINGS": "error::ResourceWarning",
            **(environment or {}),
        },
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        log: list[str] = []
        urls: Queue[str] = Queue()

        def read() -> None:
            assert process.stderr
            for line in process.stderr:
                log.append(line)
                if found := re.search(r"serving on (http://\S+)", line):
                    urls.put(found[1])
            urls.put("")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            url = urls.get(timeout=TIMEOUT)
            assert url, f"it did not start: {''.join(log)}"
            yield Serving(process, url, log)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == (-signal.SIGKILL if killed else 0), "".join(log)
        finally:
            process.kill()
            process.wait(TIMEOUT)
            reader.join(TIMEOUT)
