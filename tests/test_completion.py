"""Completion: what may stand where, and in a real shell."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmx import completion
from lmx.__main__ import parser

from .commanding import LMX, over, terminal
from .fake_world import World


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["unl"], ["unload"]),
        (["un"], ["unload", "uninstall"]),
        (["load", ""], ["qwen3@4bit", "tiny"]),
        (["load", "qw"], ["qwen3@4bit"]),
        (["load", "--t"], ["--ttl"]),
        (["load", "--ttl", ""], []),
        (["load", "a", "--gpu", "m"], ["max"]),
        (["server", "sta"], ["status", "start"]),
        (["bench", "--roun"], ["--rounds"]),
        (["convert", ""], []),
        (["nonsense", ""], []),
        (["chat", "--j"], ["--json"]),
    ],
    ids=str,
)
def test_completion(typed: list[str], expected: list[str]) -> None:
    """Commands, flags, their values, and the ids of models where one is wanted."""
    assert completion.words(typed, parser, lambda: ["qwen3@4bit", "tiny"]) == expected


def test_bash_completes(tmp_path: Path) -> None:
    """In bash itself, which takes what is behind a @ or : for a word of its own."""
    world = World()
    world.add("qwen3@4bit")
    world.add("qwen3@8bit")
    world.add("org:x1")
    with over(world, tmp_path) as lmx:
        (tmp_path / ".opta-lmx").mkdir()
        port = lmx.url.rpartition(":")[2]
        (tmp_path / ".opta-lmx" / "config.yaml").write_text(f"port: {port}\n")
        program = f'if [ $1 = completion ]; then {" ".join(LMX)} "$@"; else echo "<$@>"; fi'
        script = f"lmx() {{ {program}; }}\n{completion.SCRIPTS['bash']}"
        (tmp_path / "script").write_text(script)
        shell = ["bash", "--norc", "--noprofile", "-i"]
        with terminal(shell, HOME=str(tmp_path)) as person:
            person.type(f". {tmp_path}/script\n")
            person.type("lmx unl\tq\t4\t--f\t\n")
            person.until("<unload qwen3@4bit --force>")
            person.type("lmx load org:\t\n")
            person.until("<load org:x1>")
