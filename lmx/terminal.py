"""What the commands print: plain text where nobody looks, never what would steer the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# Where nobody looks, a line is as long as it is.
OUT: Final = Console(markup=False, width=None if sys.stdout.isatty() else 10_000)
ERR: Final = Console(markup=False, stderr=True)


def plain(text: str) -> str:
    """What models and names of files say must not steer the terminal."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def say(text: str, style: str | None = None) -> int:
    OUT.out(plain(text), style=style, highlight=False)
    return 0


def say_json(answer: Any) -> int:
    text = msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
    sys.stdout.write(f"{text}\n")
    return 0


def table(columns: str, rows: Iterable[Sequence[str]]) -> None:
    """`>` before a column's name: numbers. Where they are too wide, the last one wraps first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = columns.split()
    for name in names:
        side: Literal["left", "right"] = "right" if name[0] == ">" else "left"
        table.add_column(name.lstrip(">"), justify=side, overflow="fold", no_wrap=name != names[-1])
    for row in rows:
        table.add_row(*map(plain, row))
    OUT.print(table)


@contextmanager
def interruptible(left: str | None) -> Iterator[None]:
    """`left`: what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        if left:
            ERR.out(f"\nlmx: {left}", highlight=False)
        raise


@contextmanager
def working(what: str, left: str | None = None) -> Iterator[None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal)
    with interruptible(left), progress:
        progress.add_task(plain(what))
        yield


def bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
    )
    return Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal)


def size(count: float) -> str:
    """As macOS and the hub count: a GB is 10^9 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def count(number: int | None) -> str:
    if not number:
        return "-"
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
