"""`lmx bench`: how fast a server answers, beside another or beside the engine without a server."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import statistics
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from random import SystemRandom
from typing import Any, Final

import msgspec
import psutil

from .bench_client import REQUEST_SECONDS, Server
from .bench_scenarios import Figures, Round, measure
from .config import EngineSettings, load_config
from .errors import ConfigError, GenerationFailed
from .runner_process import runner_environment

DEFAULT: Final = ("alone", "streams", "prefix", "turns", "fairness", "mixed")
BY_NAME: Final = ("diverge", "parity")
SUMMED: Final = {"answers", "differ_again", "differ_together"}
"""Figures of all rounds; of others, the table shows the median round's."""
PACKAGES: Final = ("opta-lmx", "mlx", "mlx-lm", "llama-cpp-python")
EXIT_SECONDS: Final = 30.0
ROUND_SECONDS: Final = 4 * REQUEST_SECONDS

Run = Callable[[Round], Awaitable[Figures]]


class Start(msgspec.Struct, frozen=True):
    """The first line to the engine's process."""

    path: str
    format: str
    settings: EngineSettings
    kv_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", help="a server that speaks OpenAI's API, such as http://127.0.0.1:1234")
    add("--model", metavar="M", help="what the server calls the model")
    add("--vs", metavar="URL", help="another server, measured in turn with the first")
    add("--vs-model", metavar="M", help="what that one calls the model (default: the same)")
    add("--engine", type=Path, metavar="PATH", help="a model, run without any server")
    add("--config", type=Path, metavar="PATH", help="for --engine (default: as `lmx serve`)")
    add("--scenario", nargs="+", choices=[*DEFAULT, *BY_NAME], default=DEFAULT, metavar="NAME",
        help=f"{', '.join(DEFAULT)} (all these by default), {', '.join(BY_NAME)}")  # fmt: skip
    for flag, default, what in (
        ("--streams", 16, "how many at once"),
        ("--tokens", 96, "length of an answer"),
        ("--rounds", 3, "how often each scenario runs"),
        ("--long-tokens", 40_000, "length of the prompts of `diverge`"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    add("--json", action="store_true", help="print one JSON object with each round's figures")


def bench(options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: these options make no sense.
        LMXError: a server or the engine has failed.
    """
    if bool(options.url) != bool(options.model) or not (options.url or options.engine):
        raise ConfigError("bench: whom to measure? --url URL and --model M, --engine PATH, or both")
    if options.vs and not options.url:
        raise ConfigError("bench: --vs URL wants a --url to compare with")
    if min(options.streams, options.tokens, options.rounds, options.long_tokens) < 1:
        raise ConfigError("bench: numbers are positive")
    report = asyncio.run(_report(options))
    text = msgspec.json.encode(report).decode() if options.json else "\n".join(table(report))
    sys.stdout.write(f"{text}\n")


async def _report(options: argparse.Namespace) -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    sizes = (options.streams, options.tokens, options.long_tokens)
    names: list[str] = []
    runs: list[Run] = []
    scenarios: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        stack.callback(_progress, "")
        others = options.vs_model or options.model
        for url, model in ((options.url, options.model), (options.vs, others)):
            if url:
                names.append(f"{url} {model}")
                runs.append(partial(measure, Server(url, model)))
        if options.engine:
            start = _start(options)
            names.append(f"engine {start.path}")
            runs.append(await stack.enter_async_context(_engine(start)))
        targets = dict(zip("ABC", names, strict=False))
        seed = SystemRandom().random()
        for run in runs:
            await run(Round("load", f"{seed}", *sizes))
        for scenario in options.scenario:
            rounds: dict[str, list[Figures]] = {letter: [] for letter in targets}
            for number in range(options.rounds):
                round = Round(scenario, f"{seed} {scenario} {number}", *sizes)
                for letter, run in [*zip(targets, runs, strict=True)][:: -1 if number % 2 else 1]:
                    _progress(f"{scenario} {number + 1} of {options.rounds}: {targets[letter]}")
                    rounds[letter].append(await run(round))
            scenarios[scenario] = {"rounds": rounds, "ratios": ratios(rounds)}
    return {
        "date": started,
        "command": shlex.join(["lmx", *sys.argv[1:]]),
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
        "machine": {
            "cpu": _cpu(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "os": platform.platform(),
        },
        "targets": targets,
        "scenarios": scenarios,
    }


def _start(options: argparse.Namespace) -> Start:
    path: Path = options.engine
    if not path.exists():
        raise ConfigError(f"--engine {path}: no such file or folder")
    settings = load_config(options.config).engine_for(options.model or "")
    available = psutil.virtual_memory().available
    return Start(str(path), "mlx" if path.is_dir() else "gguf", settings, available // 2)


@asynccontextmanager
async def _engine(start: Start) -> AsyncIterator[Run]:
    """A process of its own, as a runner is: neither threads nor memory mix with the client's."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lmx.bench_engine"),
        stdin=PIPE,
        stdout=PIPE,
        env=await asyncio.to_thread(runner_environment),
    )
    assert process.stdin
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        yield partial(_engine_round, process)
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(EXIT_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _engine_round(process: Process, round: Round) -> Figures:
    assert process.stdin and process.stdout
    process.stdin.write(msgspec.json.encode(round) + b"\n")
    try:
        async with asyncio.timeout(ROUND_SECONDS):
            line = await process.stdout.readline()
    except TimeoutError:
        raise GenerationFailed(f"engine: no answer in {ROUND_SECONDS:.0f} s") from None
    figures = msgspec.json.decode(line, type=Figures | str) if line else "its process has ended"
    if isinstance(figures, str):
        raise GenerationFailed(f"engine: {figures}")
    return figures


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text[: os.get_terminal_size(2).columns - 1]}")
        sys.stderr.flush()


def _cpu() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def ratios(rounds: dict[str, list[Figures]]) -> dict[str, dict[str, list[float]]]:
    """Of the first target to each other one, by figure: median, least and largest of the rounds'
    ratios."""
    (first, ours), *others = rounds.items()
    found: dict[str, dict[str, list[float]]] = {}
    for other, theirs in others:
        column = found[f"{first}/{other}"] = {}
        for name in ours[0]:
            pairs = [(a[name], b.get(name)) for a, b in zip(ours, theirs, strict=True) if name in a]
            if each := [a / b for a, b in pairs if b]:
                column[name] = [statistics.median(each), min(each), max(each)]
    return found


def table(report: dict[str, Any]) -> list[str]:
    machine, versions = report["machine"], report["versions"]
    about = [f"{package} {version}" for package, version in versions.items()]
    about += [machine["cpu"], f"{machine['cores']} cores", machine["os"]]
    lines = [f"{report['date']}: {', '.join(about)}", report["command"]]
    lines += [f"{letter}: {name}" for letter, name in report["targets"].items()]
    rows: list[list[str]] = []
    for scenario, found in report["scenarios"].items():
        rows.append([scenario, *found["rounds"], *found["ratios"]])
        all_figures = (figures for rounds in found["rounds"].values() for figures in rounds)
        for name in dict.fromkeys(name for figures in all_figures for name in figures):
            values = [_value(name, rounds) for rounds in found["rounds"].values()]
            compared = [_ratio(column.get(name)) for column in found["ratios"].values()]
            rows.append([f"  {name.replace('_', ' ')}", *values, *compared])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines


def _value(name: str, rounds: list[Figures]) -> str:
    values = [figures[name] for figures in rounds if name in figures]
    if not values:
        return "-"
    value = float(sum(values) if name in SUMMED else statistics.median(values))
    return f"{value:,.0f}" if value >= 1000 or value.is_integer() else f"{value:.3g}"


def _ratio(ratio: list[float] | None) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio) if ratio else "-"
