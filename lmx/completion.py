"""Completion for shells. Their scripts ask the program itself, which knows its own parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Final

from .errors import ConfigError, LMXError

WORDS: Final = "words"
"""Not a shell: `completion words LOAD qwen` prints what the last word may be."""

SCRIPTS: Final = {
    "bash": """\
# In ~/.bashrc: eval "$(lmx completion bash)"
_lmx() {
    # Bash breaks words at : and @, which ids of models have: $2 is what it will replace.
    local words line="${COMP_LINE:0:COMP_POINT}"
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local whole="${words[${#words[@]}-1]}"
    local IFS=$'\\n' found
    COMPREPLY=()
    for found in $(lmx completion words "${words[@]:1}" 2>/dev/null); do
        COMPREPLY+=("${found#"${whole%"$2"}"}")
    done
}
complete -o bashdefault -o default -F _lmx lmx
""",
    "zsh": """\
# In ~/.zshrc, behind compinit: eval "$(lmx completion zsh)"
_lmx() {
    local -a found
    found=("${(@f)$(lmx completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _lmx lmx
""",
    "fish": """\
# In ~/.config/fish/config.fish: lmx completion fish | source
complete -c lmx -a '(lmx completion words (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}


def completion(
    options: argparse.Namespace, parser: Callable[[str], argparse.ArgumentParser]
) -> int:
    if options.shell == WORDS:
        found = words(options.words, parser, _models)
        sys.stdout.writelines(f"{word}\n" for word in found)
    else:
        sys.stdout.write(SCRIPTS[options.shell])
    return 0


def words(
    typed: Sequence[str],
    parser: Callable[[str], argparse.ArgumentParser],
    models: Callable[[], list[str]],
) -> list[str]:
    """What the last of the words typed behind `lmx` may become; none where a file is wanted."""
    *before, last = typed or [""]
    actions = parser(before[0] if before else "")._actions
    [commands] = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    if before:
        if before[0] not in commands.choices:
            return []
        actions = commands.choices[before[0]]._actions
    flags = {flag: action for action in actions for flag in action.option_strings}
    wants = flags.get(before[-1]) if before else None
    if wants is not None and wants.nargs != 0:  # the flag's value
        found = list(wants.choices or ())
    elif last.startswith("-"):
        found = [flag for flag in flags if flag.startswith("--")]
    else:
        found = []
        for action in actions:
            if not action.option_strings:
                found += models() if action.metavar == "MODEL" else list(action.choices or ())
    return [word for word in found if word.startswith(last)]


def _models() -> list[str]:
    from .client import connect

    anywhere = argparse.Namespace(url=None, admin_key=None)
    try:
        return [model["id"] for model in connect(anywhere).get("/admin/models")["models"]]
    except (LMXError, ConfigError):
        return []
