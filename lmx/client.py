"""The client of the admin API, and of the chat, that the command line uses. Blocking."""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx2
import msgspec

from .config import load_config
from .errors import ConfigError, LMXError, Unreachable

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 60.0
LONG_SECONDS: Final = 3600.0
"""A load that waits for memory, the hashes of hundreds of gigabytes, a long prompt."""


class Admin:
    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers: dict[bytes, bytes] = {} if key is None else {b"X-Admin-Key": key.encode()}

    def get(self, path: str) -> Any:
        """
        Raises:
            LMXError: what the server says against it.
            Unreachable: it says nothing.
        """
        return self._whole("GET", path, None, ANSWER_SECONDS)

    def post(self, path: str, body: Any, seconds: float = ANSWER_SECONDS) -> Any:
        return self._whole("POST", path, body, seconds)

    def events(self, path: str, body: Any = None) -> Generator[Any]:
        """The data of server-sent events; of a POST, if there is a body."""
        with self._answer("POST" if body else "GET", path, body, LONG_SECONDS) as answer:
            for line in _lines(answer):
                if line.startswith(b"data:") and line != b"data: [DONE]":
                    event = msgspec.json.decode(line[5:])
                    if set(event) == {"error"}:
                        raise _refusal(line[5:])
                    yield event

    def lines(self, path: str) -> Generator[str]:
        """Of plain text; waits for each next one as long as it takes."""
        with self._answer("GET", path, None, None) as answer:
            yield from (line.decode(errors="replace") for line in _lines(answer))

    def _whole(self, method: str, path: str, body: Any, seconds: float) -> Any:
        with self._answer(method, path, body, seconds) as answer:
            data = answer.read()
        try:
            decoded = msgspec.json.decode(data)
        except ValueError:
            decoded = None
        # LM Studio answers a path that it does not know with status 200 and an error.
        if not isinstance(decoded, dict) or set(decoded) == {"error"}:
            raise LMXError(f"{self.url} is not LMX: it says {data[:200].decode(errors='replace')}")
        return decoded

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Any, seconds: float | None
    ) -> Iterator[httpx2.Response]:
        try:
            with httpx2.stream(
                method,
                self.url + path,
                json=body,
                headers=self._headers,
                timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS),
                trust_env=False,  # no proxy leads to this machine
            ) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.read())
                yield answer
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ConfigError(f"--url {self.url}: {error}") from error
        except httpx2.RequestError as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"no server at {self.url}: {why} (lmx serve starts one)") from error


def connect(options: argparse.Namespace) -> Admin:
    """As --url and --admin-key say, else the environment and the configuration."""
    url, key = options.url, options.admin_key or os.environ.get("LMX_ADMIN_KEY")
    if url is None or key is None:
        config = load_config(None)
        url, key = url or config.url, key or config.admin_key
    return Admin(url, key)


def _lines(answer: httpx2.Response) -> Iterator[bytes]:
    """httpx2's own also breaks at the line separators that JSON allows in strings."""
    rest = b""
    for data in answer.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _refusal(data: bytes) -> LMXError:
    try:
        error = msgspec.json.decode(data)["error"]
        return LMXError(error if isinstance(error, str) else error["message"])
    except (ValueError, LookupError, TypeError):
        return LMXError(f"the server says {data[:200].decode(errors='replace')!r}")
