"""The command line: arguments, and the way to what each command runs, imported only then."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import __version__
from .config import DEFAULT_FILE, Config, load_config
from .errors import ConfigError, LMXError, Unreachable

EPILOG: Final = """\
All from ps to chat ask a running server, and so do status and doctor. They take
  --url URL          default: this machine's, on the configuration's port
  --admin-key KEY    default: LMX_ADMIN_KEY of the environment, or the configuration's admin_key
  --json             print JSON

exit codes: 0 done, 1 an error or "no", 2 a bad flag or configuration, 3 no server answers,
            130 Ctrl-C
"""
GLOBAL_FLAGS: Final = {"-h", "--help", "-V", "--version"}
LMS_LOAD: Final = {
    "--identifier": "set `aliases` in the configuration",
    "-c --context-length": "set `models: MODEL: engine: context_length` in the configuration",
    "--parallel": "set `models: MODEL: engine: parallel` in the configuration",
}
"""Flags of LM Studio's `lms load` that are settings here."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in GLOBAL_FLAGS):
        arguments = ["serve", *arguments]
    options = parser(arguments[0]).parse_args(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _say(str(error), 2)
    except LMXError as error:
        return _say(error.message, 3 if isinstance(error, Unreachable) else 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lmx ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed
        return 1


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "serve":
            from .reload import ConfigFile
            from .serve import serve

            path = options.config or DEFAULT_FILE.expanduser()
            return serve(ConfigFile(path, partial(_config, options)))
        case "bench":
            from .bench import bench

            bench(options)
            return 0
        case "convert":
            from .convert import convert

            convert(options.source, options.target)
            return _say(f"wrote {options.target}", 0)
        case "doctor":
            from .doctor import doctor

            return doctor(options)
        case "install" | "uninstall" | "status":
            from . import launchd

            run: Callable[[argparse.Namespace], int] = getattr(launchd, options.command)
            return run(options)
        case "completion":
            from .completion import completion

            return completion(options, parser)
        case _:
            from .cli import COMMANDS

            return COMMANDS[options.command](options)


def _say(message: str, code: int) -> int:
    (sys.stderr if code else sys.stdout).write(f"lmx: {message}\n")
    return code


def _config(options: argparse.Namespace) -> Config:
    flags = ("host", "port", "models_dir", "log_level")
    given: dict[str, Any] = {
        name: value for name in flags if (value := getattr(options, name)) is not None
    }
    config = load_config(options.config, given)
    if options.models_dir is not None and not Path(options.models_dir).expanduser().is_dir():
        raise ConfigError(f"--models-dir {options.models_dir}: no such folder")
    return config


class Command(argparse.ArgumentParser):
    """Its help is short: the usage has the positional arguments already."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section(None)
        formatter.add_arguments(self._optionals._group_actions)
        formatter.end_section()
        return formatter.format_help().replace("\n\n", "\n")


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Of all commands; with the arguments of `only` this one, where asking for them takes long."""
    format = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26)
    top = argparse.ArgumentParser(
        prog="lmx",
        description="Serve local LLMs over the OpenAI API.",
        epilog=EPILOG,
        formatter_class=format,
        allow_abbrev=False,
    )
    top.add_argument("-V", "--version", action="version", version=f"lmx {__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=Command
    )
    common = Command(add_help=False)
    common.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    client = Command(add_help=False)
    client.add_argument("--url", help=argparse.SUPPRESS)
    client.add_argument("--admin-key", help=argparse.SUPPRESS)
    client.add_argument("--json", action="store_true", help=argparse.SUPPRESS)

    def add(name: str, help: str, *parents: Command) -> Command:
        return commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            parents=[common, *parents],
            add_help=False,
            formatter_class=format,
            allow_abbrev=False,
        )

    serve = add("serve", "serve the models on disk (the default command)")
    serve.add_argument(
        "--config", type=Path, metavar="PATH", help=f"YAML file (default: {DEFAULT_FILE})"
    )
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: 1234)")
    serve.add_argument(
        "--models-dir",
        metavar="DIR",
        help="folder of publisher/repo/ model folders (default: ~/.opta-lmx/models)",
    )
    serve.add_argument("--log-level", metavar="L", help="debug, info (default), warning or error")

    add("ps", "list the models in memory", client)
    add("ls", "list the models on disk and the downloads that run", client)
    load = add("load", "load a model and keep it in memory", client)
    load.add_argument("model", metavar="MODEL")
    load.add_argument(
        "--ttl",
        type=float,
        metavar="SECONDS",
        help="unload it after so long without work (default: never)",
    )
    # What LM Studio's `lms load` has besides.
    load.add_argument("-y", "--yes", "--exact", action="store_true", help=argparse.SUPPRESS)
    load.add_argument("--gpu", choices=["max", "auto", "1", "1.0"], help=argparse.SUPPRESS)
    for flags, instead in LMS_LOAD.items():
        load.add_argument(*flags.split(), type=_refused(instead), help=argparse.SUPPRESS)
    unload = add("unload", "unload a model when nobody uses it", client)
    unload.add_argument("model", metavar="MODEL", nargs="?")
    unload.add_argument("-a", "--all", action="store_true", help="all models")
    unload.add_argument("--force", action="store_true", help="fail the requests that use it")
    get = add("get", "download a model from Hugging Face, or list the downloads", client)
    get.add_argument("repo", metavar="ORG/REPO", nargs="?")
    get.add_argument(
        "--quant", metavar="Q", help="of a GGUF repo, such as q4_k_m; ORG/REPO@Q is the same"
    )
    get.add_argument("--revision", metavar="R", help="branch, tag or commit (default: main)")
    get.add_argument("--cancel", action="store_true", help="stop it and remove what has come")
    get.add_argument("-y", "--yes", action="store_true", help=argparse.SUPPRESS)  # as in lms
    verify = add("verify", "hash a downloaded model's files again", client)
    verify.add_argument("model", metavar="MODEL")
    rm = add("rm", "unload a model and delete its files, in LMX's own folder only", client)
    rm.add_argument("model", metavar="MODEL")
    rm.add_argument("-y", "--yes", action="store_true", help="do not ask")
    pin = add("pin", "never unload a model but by hand", client)
    pin.add_argument("model", metavar="MODEL")
    pin.add_argument("--off", action="store_true", help="take the pin off")
    logs = add("logs", "print the server's log", client)
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    logs.add_argument(
        "-n", type=int, default=200, metavar="N", dest="lines", help="last lines (default: 200)"
    )
    server = add("server", "see, start in the background, or stop the server", client)
    server.add_argument("action", choices=["status", "start", "stop"])
    server.add_argument("--port", type=int, help="instead of the configuration's")
    server.add_argument("--bind", metavar="HOST", help="for start: the --host of lmx serve")
    chat = add("chat", "talk to a model, or ask it one question, by stdin too", client)
    chat.add_argument("model", metavar="MODEL")
    chat.add_argument("prompt", metavar="PROMPT", nargs="?")
    config = add("config", "check a configuration and print what differs from the defaults")
    config.add_argument("action", choices=["check"])
    config.add_argument(
        "--config", type=Path, metavar="PATH", help=f"YAML file (default: {DEFAULT_FILE})"
    )
    config.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    doctor = add("doctor", "look for what is wrong with this machine and say what to do", client)
    doctor.add_argument(
        "--config", type=Path, metavar="PATH", help=f"YAML file (default: {DEFAULT_FILE})"
    )

    bench = add("bench", "measure how fast a server or an engine is")
    if only in (None, "bench"):
        from .bench import add_arguments

        add_arguments(bench)
    convert = add("convert", "make an MLX folder from a llama GGUF file")
    convert.add_argument("source", type=Path, metavar="FILE.gguf")
    convert.add_argument("target", type=Path, metavar="OUT")
    install = add("install", "install LMX as a launchd daemon")
    uninstall = add("uninstall", "stop the launchd daemon and remove it")
    if only in (None, "install", "uninstall"):
        from .launchd import add_arguments as add_install
        from .launchd import add_dry_run

        add_install(install)
        add_dry_run(uninstall)
    add("status", "tell whether the daemon is installed, runs and answers", client)
    completion = add("completion", "print a shell's completion script; how to use it is in it")
    completion.add_argument(
        "shell", choices=["bash", "zsh", "fish", "words"], metavar="{bash,zsh,fish}"
    )
    completion.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return top


def _refused(instead: str) -> Callable[[str], str]:
    def refuse(value: str) -> str:
        raise argparse.ArgumentTypeError(f"not a flag here: {instead}")

    return refuse


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
