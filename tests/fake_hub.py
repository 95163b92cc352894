"""A Hugging Face hub on loopback, which does everything wrong that it is told to.

`python -m tests.fake_hub FOLDER --port N` serves a folder of org/repo/files; use it as HF_ENDPOINT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]
TOKEN = "hf_fake"
"""The token that opens gated repos."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer to a request for a file."""

    status: int | None = None  # this, and no file
    headers: Mapping[str, str] = field(default_factory=dict)  # instead of the right ones
    page: bytes | None = None  # this, with status 200
    flip: int | None = None  # the byte at this offset of the file is another
    short: int | None = None  # only so many bytes, and Content-Length says so
    drop: int | None = None  # the connection closes after so many bytes
    stall: int | None = None  # after so many bytes the rest waits for `released`
    ignore_range: bool = False
    unsized: bool = False  # there is no Content-Length


@dataclass
class Request:
    path: str
    """As org/repo/path for a file, from either server; else as in the URL."""
    range: str | None
    authorization: str | None
    is_cdn: bool
    sent: int | None = None
    """Bytes of the file; None: the answer was something else."""


class FakeHub:
    def __init__(self, repos: Mapping[str, Files]) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        """By repo and commit; the last commit is main."""
        self.gated: set[str] = set()
        self.edit_listing: Callable[[dict[str, Any]], None] = lambda listing: None
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.endpoint = self.cdn = ""
        self._faults: dict[str, Iterator[Fault]] = {}
        for repo, files in repos.items():
            self.push(repo, files)

    def push(self, repo: str, files: Files) -> str:
        """Make a commit of these files, which is main from now on."""
        contents = sorted((path, hashlib.sha256(data).digest()) for path, data in files.items())
        commit = hashlib.sha1(repr((repo, contents)).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        return commit

    def misbehave(self, path: str, faults: Iterable[Fault]) -> None:
        """The next answers for org/repo/path have these faults; later ones have none."""
        self._faults[path] = iter(faults)

    def fault(self, path: str) -> Fault:
        return next(self._faults.get(path, iter(())), Fault())

    def fetched(self, path: str) -> list[Request]:
        """The requests that were answered with bytes of org/repo/path."""
        return [r for r in self.requests if r.path == path and r.sent is not None]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf", ".model"))


def listing(repo: str, commit: str, files: Files, gated: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = [
        {"rfilename": ".gitattributes", "size": 0, "blobId": "0" * 40}
    ]
    for path, data in files.items():
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        siblings.append({"rfilename": path, "size": len(data), "blobId": git})
        if is_lfs(path):
            siblings[-1]["blobId"] = "f" * 40
            sha256 = hashlib.sha256(data).hexdigest()
            siblings[-1]["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    gate = "manual" if gated else False
    return {"id": repo, "sha": commit, "gated": gate, "siblings": siblings}


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, hub: FakeHub, port: int, is_cdn: bool) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self.is_cdn = is_cdn


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers["Authorization"]
        request = Request(path, self.headers["Range"], authorization, self.server.is_cdn)
        hub.requests.append(request)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.answer_api(parts, authorization)
            return
        if parts[:3] == ["api", "resolve-cache", "models"]:
            parts = parts[3:]
        if self.server.is_cdn or parts != path.strip("/").split("/"):
            repo, commit, file = "/".join(parts[:2]), parts[2], "/".join(parts[3:])
            request.path = f"{repo}/{file}"
            self.send_file(request, hub.commits[repo][commit][file])
            return
        if parts[2:3] != ["resolve"]:
            self.send(404, {})
            return
        repo, commit, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        request.path = f"{repo}/{file}"
        if refusal := self.refusal(repo, authorization):
            self.send(403 if refusal == "GatedRepo" else 404, {"X-Error-Code": refusal})
        elif file not in hub.commits[repo].get(commit, {}):
            self.send(404, {"X-Error-Code": "EntryNotFound"})
        else:
            target = f"{repo}/{commit}/{file}"
            location = (
                f"{hub.cdn}/{target}" if is_lfs(file) else f"/api/resolve-cache/models/{target}"
            )
            self.send(302 if is_lfs(file) else 307, {"Location": location, "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def refusal(self, repo: str, authorization: str | None) -> str | None:
        hub = self.server.hub
        if repo not in hub.commits:
            return "RepoNotFound"
        closed = repo in hub.gated and authorization != f"Bearer {TOKEN}"
        return "GatedRepo" if closed else None

    def answer_api(self, parts: list[str], authorization: str | None) -> None:
        """/api/models/ORG/REPO, .../revision/REVISION or .../auth-check."""
        hub, repo = self.server.hub, "/".join(parts[2:4])
        commits = hub.commits.get(repo, {})
        revision = parts[5] if parts[4:5] == ["revision"] else "main"
        commit = list(commits)[-1] if revision == "main" and commits else revision
        refusal = self.refusal(repo, authorization)
        if refusal == "RepoNotFound":
            self.send(404, {"X-Error-Code": refusal})
        elif parts[4:] == ["auth-check"]:
            self.send(403 if refusal else 200, {"X-Error-Code": refusal} if refusal else {})
        elif commit not in commits:
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            body = listing(repo, commit, commits[commit], repo in hub.gated)
            hub.edit_listing(body)
            self.send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.begin(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True

    def send_file(self, request: Request, data: bytes) -> None:
        hub, fault = self.server.hub, self.server.hub.fault(request.path)
        if fault.status is not None or fault.page is not None:
            self.send(fault.status or 200, fault.headers, fault.page or b"")
            return
        size, start = len(data), 0
        if request.range and not fault.ignore_range:
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
        if start >= size and size:
            self.send(416, {"Content-Range": f"bytes */{size}"})
            return
        if fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        body = memoryview(data)[start:][: fault.short]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(len(body))
        partial = request.range and not fault.ignore_range
        if partial:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        headers |= fault.headers
        if fault.unsized:
            del headers["Content-Length"]
        self.begin(206 if partial else 200, headers)
        if self.command == "HEAD":
            return
        request.sent = 0
        try:
            for end in (fault.stall, fault.drop, len(body)):
                while end is not None and request.sent < min(end, len(body)):
                    piece = body[request.sent : min(end, request.sent + 65536)]
                    self.wfile.write(piece)
                    request.sent += len(piece)
                if end is not None and end == fault.stall:
                    hub.stalled.set()
                    hub.released.wait(60)
                elif end is not None and end == fault.drop:
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has left


@contextmanager
def fake_hub(repos: Mapping[str, Files], port: int = 0) -> Iterator[FakeHub]:
    """Serves `repos`, by org/repo and path: the hub, and a second server for what LFS has."""
    hub = FakeHub(repos)
    servers = [_Server(hub, port, False), _Server(hub, 0, True)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    repos: dict[str, dict[str, bytes]] = {}
    for file in sorted(arguments.folder.glob("*/*/**/*")):
        if file.is_file():
            org, repo, *path = file.relative_to(arguments.folder).parts
            repos.setdefault(f"{org}/{repo}", {})["/".join(path)] = file.read_bytes()
    with fake_hub(repos, arguments.port) as hub:
        sys.stdout.write(f"HF_ENDPOINT={hub.endpoint}\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
