"""`lmx doctor`: what on this machine is wrong or might go wrong, and what to do about it."""

from __future__ import annotations

import argparse
import ctypes.util
import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import psutil

from . import inventory, memory
from .bench_client import listener
from .client import Admin
from .config import DEFAULT_FILE, Config, load_config
from .errors import ConfigError, LMXError, ModelCorrupt
from .memory import Meter, System, size
from .model_roots import roots
from .runner_process import runner_environment
from .state import Remembered
from .terminal import OUT, plain, say_json

STRANDED_SHARE: Final = 0.1
"""Of all memory: the kernel itself wires less."""
ENGINES: Final = (
    ("MLX", "mlx.core, mlx_lm", ["mlx", "mlx-lm"]),
    ("llama.cpp", "llama_cpp", ["llama-cpp-python"]),
)
"""Name, modules, the packages that have them."""


class Check(NamedTuple):
    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    todo: str = ""


def doctor(options: argparse.Namespace) -> int:
    """1 if a check has failed."""
    found = []
    for check in checks(options):
        found.append(check)
        if not options.json:
            style = {"ok": "green", "warn": "yellow", "fail": "red"}[check.state]
            OUT.out(f"{check.state:4}", style=style, end="  ", highlight=False)
            todo = f"\n      -> {check.todo}" if check.todo else ""
            OUT.out(plain(f"{check.name}: {check.found}{todo}"), highlight=False)
    failed = any(check.state == "fail" for check in found)
    if options.json:
        say_json({"ok": not failed, "checks": [check._asdict() for check in found]})
    return int(failed)


def checks(options: argparse.Namespace) -> Iterator[Check]:
    path = options.config or DEFAULT_FILE.expanduser()
    try:
        config = load_config(options.config)
        yield Check("configuration", "ok", f"{path}" if path.exists() else "the defaults")
    except ConfigError as error:
        config = Config()
        yield Check("configuration", "fail", str(error), "The rest is checked with the defaults.")
    yield port(config, options.url)
    meter = Meter()
    system, working_set = meter.system(), meter.metal_working_set()
    yield memory_left(config, system, working_set, meter.pressure())
    if sys.platform == "darwin":
        yield metal(config, system.total, working_set, memory.sysctl)
        footprints = sum(map(memory.phys_footprint, psutil.pids()))  # of others' only as root
        yield stranded(system.total, psutil.virtual_memory().wired, footprints)
    for row in ENGINES:
        yield engine(*row)
    if sys.platform == "linux":
        yield openblas(ctypes.util.find_library("openblas"))
    yield from folders(config)
    yield state_file(config)
    yield from downloads(config)


def port(config: Config, url: str | None) -> Check:
    """Good if LMX itself has it, or nobody."""
    asked = url or config.url
    try:
        health = Admin(asked).get("/health")
        return Check("port", "ok", f"LMX {health['version']} answers at {asked}")
    except (LMXError, LookupError) as error:
        if url:
            return Check("port", "fail", str(error))
    where = f"port {config.port} of {config.host}"
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return Check("port", "fail", f"{where}: {error}", "Set another host or port.")
        process = listener(config.port)
        who = f"{process.name()}, process {process.pid}" if process else "another user's process"
        todo = "If that is LM Studio: lms server stop. Or set another port."
        return Check("port", "fail", f"{where} is taken by {who}", todo)
    return Check("port", "ok", f"{where} is free: LMX does not run")


def memory_left(config: Config, system: System, working_set: int | None, pressure: int) -> Check:
    room = memory.room(config.memory, system, working_set, [])
    found = (
        f"{size(system.used)} of {size(system.total)} are in use, {size(max(0, room.free))} more "
        f"may be ({room.rule})"
    )
    todo = "End what needs much of it, or unload models."
    if pressure >= memory.WARNING:
        found += f"; the system's memory pressure is at {pressure} of {memory.CRITICAL}"
        return Check("memory", "fail" if pressure >= memory.CRITICAL else "warn", found, todo)
    return Check("memory", "warn", found, todo) if room.free <= 0 else Check("memory", "ok", found)


def metal(
    config: Config, total: int, working_set: int | None, sysctl: Callable[[str], int]
) -> Check:
    if working_set is None:
        return Check("Metal", "fail", "MLX does not see the GPU", "See what is said of MLX.")
    wanted, name = int(config.memory.limit_fraction * total), "iogpu.wired_limit_mb"
    found = f"all processes may use {size(working_set)} of {size(total)} ({name}={sysctl(name)})"
    if working_set >= wanted:
        return Check("Metal", "ok", found)
    todo = f"For more, until the next boot: sudo sysctl {name}={wanted >> 20}"
    return Check("Metal", "warn", found, todo)


def stranded(total: int, wired: int, accounted: int) -> Check:
    """What a killed GPU process had can stay wired until the next boot (oMLX #2184)."""
    lost = wired - accounted
    if lost <= STRANDED_SHARE * total:
        return Check("wired memory", "ok", size(wired))
    found = f"{size(lost)} of {size(wired)} belong to no process that may be looked into"
    todo = "As root (sudo lmx doctor) all may be. What is still nobody's only a reboot gives back."
    return Check("wired memory", "warn", found, todo)


def engine(name: str, modules: str, packages: list[str], seconds: float = 120) -> Check:
    """Imports `modules` as a runner would; the first time that compiles thousands of files."""
    told = ", ".join(f"{package!r}, version({package!r})" for package in packages)
    code = f"from importlib.metadata import version; import {modules}; print({told})"
    command = [sys.executable, "-c", code]
    todo = f"{sys.executable} -m pip install {' '.join(packages)}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=runner_environment()
        )
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"is not imported after {seconds:.0f} s", todo)
    if done.returncode == 0:
        return Check(name, "ok", done.stdout.strip())
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(name, "fail", f"cannot be imported: {said}", todo)


def openblas(library: str | None) -> Check:
    if library:
        return Check("OpenBLAS", "ok", library)
    todo = "apt install libopenblas0-pthread: MLX's CPU build is some ten times faster with it."
    return Check("OpenBLAS", "warn", "is not there", todo)


def folders(config: Config) -> Iterator[Check]:
    for root in roots(config):
        there = root.path
        while not there.exists() and there != there.parent:
            there = there.parent
        if not os.access(there, os.R_OK | os.X_OK | (os.W_OK if root.own else 0)):
            may = "written" if root.own else "read"
            todo = f"Give it to whom LMX runs as: sudo chown -R USER {there}"
            yield Check("folder", "fail", f"{there} cannot be {may}", todo)
        elif root.own:
            free = shutil.disk_usage(there).free
            found = f"{root.path}: {size(free)} are free on its disk"
            todo = "" if free > config.hub.reserve_bytes else "Too little for downloads: free some."
            yield Check("folder", "warn" if todo else "ok", found, todo)
        elif root.path.exists():
            yield Check("folder", "ok", f"{root.path}")


def state_file(config: Config) -> Check:
    path = Path(config.state_file).expanduser()
    try:
        remembered = msgspec.json.decode(path.read_bytes(), type=Remembered)
    except FileNotFoundError:
        return Check("state", "ok", f"{path} is not there yet")
    except (OSError, msgspec.MsgspecError) as error:
        return Check("state", "warn", f"{path}: {error}", "Delete it; the server makes a new one.")
    crashed = [id for id, times in remembered.starting.items() if times > 1]
    if not crashed:
        return Check("state", "ok", f"{path}")
    found = f"the server has ended while it loaded, at start, {', '.join(crashed)}"
    return Check("state", "warn", found, "See its log; take the model out of preload.")


def downloads(config: Config) -> Iterator[Check]:
    """By size and time of their files; the hashes are for `lmx verify`."""
    whole = 0
    for file in sorted(roots(config)[0].path.glob(f"*/*/{inventory.NAME}")):
        repo = "/".join(file.parent.parts[-2:])
        try:
            manifest = inventory.read(file.parent)
            changed = sorted(inventory.changed(file.parent, manifest)) if manifest else []
        except ModelCorrupt as error:
            yield Check("model", "fail", error.message, f"lmx rm {repo}; lmx get {repo}")
            continue
        whole += not changed
        if changed:
            found = f"{repo}: changed since the download: {', '.join(changed)}"
            yield Check("model", "warn", found, f"lmx verify {repo}")
    yield Check("models", "ok", f"{whole} are as they were downloaded")
