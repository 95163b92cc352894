"""ruff and mypy, so that one command checks everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "lmx", "tests"], ["ruff", "format", "--check", "lmx", "tests"], ["mypy"]],
    ids=" ".join,
)
def test_style(command: list[str]) -> None:
    """Source and tests are linted, formatted and strictly typed."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_small() -> None:
    """One concern per file: a file of the package above 500 lines has two."""
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in (ROOT / "lmx").rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}
