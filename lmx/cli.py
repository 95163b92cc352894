"""The commands of `lmx` that ask the running server. `lmx.__main__` has their arguments."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import yaml

from .client import LONG_SECONDS, Admin, connect
from .config import DEFAULT_FILE, HOME, LOCAL, Config, load_config
from .errors import ConfigError, LMXError, Unreachable
from .launchd import PLIST, SERVICE
from .steps import wait
from .terminal import (
    ERR,
    OUT,
    bar,
    count,
    interruptible,
    plain,
    say,
    say_json,
    size,
    span,
    table,
    working,
)

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 60.0
"""The configuration's grace of 20 s, and what ends a runner by force."""
BUSY: Final = {"loading", "draining", "unloading"}


def ps(options: argparse.Namespace) -> int:
    models = connect(options).get("/admin/models")["models"]
    models = [model for model in models if model["loaded"] or model["state"] in BUSY]
    if options.json:
        return say_json({"models": models})
    rows = []
    for model in models:
        loaded = model["loaded"]
        row = [model["id"], model["state"], model["format"], size(model["size_bytes"])]
        if loaded:
            row[2] = loaded["format"]
            row += [
                size(loaded["memory"]["measured"]),
                f"{loaded['active']}",
                f"{loaded['tokens_per_second']:.1f}",
                f"{loaded['context_length']}",
                _time_left(model),
                " ".join(loaded["features"]),
            ]
        rows.append(row)
    table("id state format >size >memory >active >tok/s >context left features", rows)
    for model in models:
        for problem in (model["loaded"] or {}).get("problems", []):
            say(f"{model['id']}: {problem}", style="yellow")
    return 0


def _time_left(model: dict[str, Any]) -> str:
    left = model["loaded"]["expires_in_seconds"]
    if model["pinned"]:
        return "pinned"
    return "-" if left is None else span(max(0.0, left))


def ls(options: argparse.Namespace) -> int:
    answer = connect(options).get("/admin/models")
    if options.json:
        return say_json(answer)
    rows = [
        [
            model["id"],
            model["format"],
            model["quantization"] or "-",
            count(model["parameters"]),
            size(model["size_bytes"]),
            f"{model['context_length'] or '-'}",
            model["state"] if model["loadable"] or model["state"] != "available" else "broken",
        ]
        for model in answer["models"]
    ]
    table("id format quantization >parameters >size >context state", rows)
    for model in answer["models"]:
        if model["error"] and model["state"] != "downloading":
            say(f"{model['id']}: {model['error']}", style="yellow")
    return 0


def load(options: argparse.Namespace) -> int:
    admin = connect(options)
    body = {"model": options.model, "ttl_seconds": options.ttl}
    left = f"the server goes on; lmx unload {options.model} ends the load"
    started = time.monotonic()
    with working(f"loading {options.model}", left):
        model = admin.post("/admin/model/load", body, LONG_SECONDS)
    if options.json:
        return say_json(model)
    loaded = model["loaded"]
    say(
        f"{model['id']}: ready after {time.monotonic() - started:.1f} s, "
        f"{size(loaded['memory']['measured'])}, context {loaded['context_length']}, "
        f"{loaded['engine']}"
    )
    for problem in filter(None, [loaded["fallback_reason"], *loaded["problems"]]):
        say(f"  {problem}", style="yellow")
    return 0


def unload(options: argparse.Namespace) -> int:
    if bool(options.model) == options.all:
        raise ConfigError("unload: what? MODEL, or --all")
    admin = connect(options)
    models = admin.get("/admin/models")["models"] if options.all else []
    ids = [model["id"] for model in models if model["loaded"] or model["state"] in BUSY]
    answers = []
    for id in [options.model] if options.model else ids:
        with working(f"unloading {id}", "the server goes on"):
            body = {"model": id, "force": options.force}
            answers.append(admin.post("/admin/model/unload", body, LONG_SECONDS))
        if not options.json:
            say(f"{answers[-1]['id']}: unloaded")
    return say_json({"models": answers}) if options.json else 0


def get(options: argparse.Namespace) -> int:
    admin = connect(options)
    if options.repo is None:
        answer = admin.get("/admin/downloads")
        return say_json(answer) if options.json else _downloads(answer["downloads"])
    repo, _, quant = options.repo.removeprefix("https://huggingface.co/").partition("@")
    if options.cancel:
        jobs = admin.get("/admin/downloads")["downloads"]
        ids = [job["id"] for job in jobs if job["model"].lower() == repo.lower()]
        if not ids:
            raise LMXError(f"{repo} is not being downloaded")
        job = admin.post(f"/admin/downloads/{ids[0]}/cancel", {}, LONG_SECONDS)
        return say_json(job) if options.json else _downloads([job])
    body = {"model": repo, "revision": options.revision, "quant": options.quant or quant or None}
    left = f"the server goes on: lmx get {repo} shows it again, with --cancel it is given up"
    with working(f"asking for {repo}", left):
        job = admin.post("/admin/model/download", body, LONG_SECONDS)
    with interruptible(left), bar() as progress:
        task = progress.add_task(job["model"], total=None, rate="")
        for now in admin.events(f"/admin/downloads/{job['id']}/events"):
            done, total = now["downloaded_bytes"], now["total_bytes"]
            progress.update(task, completed=done, total=total, rate=_rate(now))
            job = now
    if options.json:
        say_json(job)
    if job["state"] == "downloading":
        raise Unreachable(f"the server has stopped; it goes on with {repo} when it runs again")
    if job["state"] == "failed":
        raise LMXError(f"{job['error']}\nWhat has come is kept: the same command goes on there.")
    if not options.json:
        _downloads([job])
    return 0 if job["state"] == "completed" else 1


def _downloads(jobs: list[dict[str, Any]]) -> int:
    for job in jobs:
        done = f"{size(job['downloaded_bytes'])} of {size(job['total_bytes'])}"
        said = f": {job['error']}" if job["error"] else ""
        say(f"{job['model']}: {job['state']}, {done} {_rate(job)}".rstrip() + said)
    return 0


def _rate(job: dict[str, Any]) -> str:
    eta = job["eta_seconds"]
    return "" if eta is None else f"{size(job['bytes_per_second'])}/s, {span(eta)} left"


def verify(options: argparse.Namespace) -> int:
    with working(f"hashing {options.model}"):
        answer = connect(options).post(
            "/admin/model/verify", {"model": options.model}, LONG_SECONDS
        )
    if options.json:
        say_json(answer)
    elif answer["verified"]:
        say(f"{answer['model']}: as the hub has it at {answer['revision']}")
    else:
        for fault in answer["faults"]:
            say(f"{fault['path']}: {fault['actual']} instead of {fault['expected']}")
    return 0 if answer["verified"] else 1


def rm(options: argparse.Namespace) -> int:
    admin = connect(options)
    model = admin.get(f"/admin/models/{options.model}")
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError("rm: nobody can be asked here; -y deletes without")
        what = f"Delete {model['id']}, {size(model['size_bytes'])} in {model['path']}? [y/N] "
        if input(plain(what)).strip().lower() not in ("y", "yes"):
            return 1
    answer = admin.post("/admin/model/delete", {"model": model["id"]}, LONG_SECONDS)
    return say_json(answer) if options.json else say(f"{answer['id']}: deleted")


def pin(options: argparse.Namespace) -> int:
    body = {"model": options.model, "pinned": not options.off}
    model = connect(options).post("/admin/model/pin", body)
    now = "pinned" if model["pinned"] else "not pinned"
    return say_json(model) if options.json else say(f"{model['id']}: {now}")


def logs(options: argparse.Namespace) -> int:
    path = f"/admin/logs?lines={options.lines}&follow={'true' if options.follow else 'false'}"
    with closing(connect(options).lines(path)) as lines:
        for line in lines:
            text = msgspec.json.encode({"line": line}).decode() if options.json else plain(line)
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
    return 0


def config(options: argparse.Namespace) -> int:
    path = options.config or DEFAULT_FILE.expanduser()
    error = line = None
    changed: dict[str, Any] = {}
    try:
        found = load_config(options.config)
        changed = dict(_differing(msgspec.to_builtins(found), msgspec.to_builtins(Config())))
    except ConfigError as wrong:
        error, line = str(wrong), _line(path, str(wrong))
    if options.json:
        say_json({"path": str(path), "error": error, "line": line, "changed": changed})
    elif error:
        raise ConfigError(f"line {line}: {error}" if line else error)
    else:
        say(f"{path}: {'good' if path.exists() else 'not there, so the defaults hold'}")
        for name, value in changed.items():
            say(f"  {name}: {msgspec.json.encode(value).decode()}")
    return 2 if error else 0


def _differing(values: dict[str, Any], default: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        usual = default.get(name)
        if isinstance(value, dict) and usual:
            yield from _differing(value, usual, f"{prefix}{name}.")
        elif value != usual:
            yield f"{prefix}{name}", "***" if name == "admin_key" else value


def _line(path: Path, error: str) -> int | None:
    """Where the setting is that `load_config` complains of."""
    names = re.findall(r"in models\.(.+?): ", error)
    keys = ["models", *names] if names else []
    keys += [key for at in re.findall(r"at `\$\.([\w.]+)", error) for key in at.split(".")]
    keys += re.findall(r"unknown field `(.+?)`", error)
    line = None
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # the message itself has the line
    for key in keys:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else []:
            if name.value == key:
                line, node = name.start_mark.line + 1, value
                break
    return line


def server(options: argparse.Namespace) -> int:
    """As LM Studio's `lms server`."""
    if options.port and not options.url:
        options.url = f"http://127.0.0.1:{options.port}"
    admin = connect(options)
    pid = _pid(admin)
    if options.action != "status" and urlsplit(admin.url).hostname not in LOCAL:
        raise ConfigError(f"server {options.action}: {admin.url} is another machine")
    if options.action == "start" and pid is None:
        pid = _start(options, admin)
    elif options.action == "stop" and pid is not None:
        _stop(admin, pid)
        pid = None
    port = urlsplit(admin.url).port
    if options.json:
        say_json({"running": pid is not None, "port": port})
    else:
        say(f"The server is {'running' if pid else 'not running'} on port {port}.")
    return 3 if options.action == "status" and pid is None else 0


def _pid(admin: Admin) -> int | None:
    try:
        return int(admin.get("/admin/status")["pid"])
    except Unreachable:
        return None


def _start(options: argparse.Namespace, admin: Admin) -> int:
    if PLIST.exists():
        raise LMXError(f"LMX is installed as a daemon: sudo launchctl kickstart {SERVICE}")
    command = [sys.executable, "-m", "lmx", "serve"]
    command += ["--port", f"{options.port}"] if options.port else []
    command += ["--host", options.bind] if options.bind else []
    log = HOME.expanduser() / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _pid(admin) == process.pid:
            process.returncode = 0  # it is to outlive this process: no warning that it runs
            return process.pid
        time.sleep(0.1)
    process.terminate()
    process.wait(STOP_SECONDS)
    raise LMXError(f"the server does not start: {log.read_text(errors='replace').strip()}")


def _stop(admin: Admin, pid: int) -> None:
    if PLIST.exists():
        raise LMXError(f"launchd would start it again: sudo launchctl bootout {SERVICE}")
    os.kill(pid, signal.SIGTERM)
    late = LMXError(f"the server, process {pid}, does not end")
    wait(lambda: _pid(admin) != pid, STOP_SECONDS, late)


def chat(options: argparse.Namespace) -> int:
    admin = connect(options)
    if options.prompt is not None or not sys.stdin.isatty():
        question = sys.stdin.read() if options.prompt is None else options.prompt
        answer = _ask(admin, options, [{"role": "user", "content": question}])
        return say_json(answer) if options.json else 0
    import readline  # noqa: F401  # it gives `input` its editing and its history

    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ")
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("")
            continue
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _ask(admin, options, messages)
        except Unreachable:
            raise
        except LMXError as error:
            ERR.out(error.message, style="red", highlight=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer["content"]})


def _ask(
    admin: Admin, options: argparse.Namespace, messages: list[dict[str, str]]
) -> dict[str, Any]:
    """Prints the answer as it comes, and how fast that was. In a conversation, Ctrl-C ends it."""
    body = {
        "model": options.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    told = {"content": "", "reasoning": ""}
    usage: dict[str, Any] = {}
    arrivals = [started := time.monotonic()]
    waiting = ERR.status("waiting for the model")
    waiting.start()
    try:
        with closing(admin.events("/v1/chat/completions", body)) as events:
            for event in events:
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    delta = choice["delta"]
                    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
                    for kind, text in (("reasoning", reasoning), ("content", delta.get("content"))):
                        if text:
                            arrivals.append(time.monotonic())
                            waiting.stop()
                            _show(kind, text, told, options.json)
    except KeyboardInterrupt:
        if options.prompt is not None or not sys.stdin.isatty():
            raise
    finally:
        waiting.stop()
    tokens = usage.get("completion_tokens", 0)
    seconds = arrivals[-1] - arrivals[min(1, len(arrivals) - 1)]
    rate = (tokens - 1) / seconds if tokens > 1 and seconds else None
    first = arrivals[1] - started if len(arrivals) > 1 else None
    if not options.json:
        OUT.out("")
        if rate is not None:
            ERR.out(
                f"{tokens} tokens, {rate:.1f} tok/s, the first after {first:.2f} s", style="dim"
            )
    return told | {"usage": usage, "tokens_per_second": rate, "ttft_seconds": first}


def _show(kind: str, text: str, told: dict[str, str], silent: bool) -> None:
    begins_answer = kind == "content" and told["reasoning"] and not told["content"]
    told[kind] += text
    if kind == "content" or OUT.is_terminal:  # who pipes it wants the answer
        if not silent:
            style = "dim" if kind == "reasoning" else None
            gap = "\n\n" if begins_answer and OUT.is_terminal else ""
            OUT.out(gap + plain(text), style=style, end="", highlight=False)


COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    function.__name__: function
    for function in (ps, ls, load, unload, get, verify, rm, pin, logs, config, server, chat)
}
