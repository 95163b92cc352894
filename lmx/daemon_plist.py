"""com.opta.lmx.plist: filled in, and linted beyond what plistlib complains about."""

from __future__ import annotations

import math
import plistlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from .config import Config

NAME: Final = "com.opta.lmx.plist"
SPARE_SECONDS: Final = 5
"""From the server's own worst end to launchd's SIGKILL."""
KEYS: Final[dict[str, type]] = {
    "Label": str,
    "UserName": str,
    "ProgramArguments": list,
    "WorkingDirectory": str,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": bool,
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "Umask": str,
    "StandardOutPath": str,
    "StandardErrorPath": str,
}
"""All are needed, and no other: NumberOfFiles would set the limit of the whole machine."""


def exit_timeout(config: Config) -> int:
    """Seconds from SIGTERM to launchd's SIGKILL, which may strand wired GPU memory: longer than the
    server takes where an answer does not end and a runner heeds no SIGTERM."""
    from .runner_process import STOP_SECONDS, TERMINATE_SECONDS  # slow for other commands
    from .serve import SHUTDOWN_MARGIN_SECONDS

    own = config.shutdown_grace_seconds + SHUTDOWN_MARGIN_SECONDS + STOP_SECONDS + TERMINATE_SECONDS
    return math.ceil(own) + SPARE_SECONDS


def filled(user: str, home: Path, data: Path, program: Path, config: Path, timeout: int) -> bytes:
    """The plist with this machine's values."""
    package = Path(__file__).parent
    places = (package / NAME, package.parent / NAME)  # of a wheel, of a checkout
    plist = plistlib.loads(next(path for path in places if path.exists()).read_bytes())
    plist["EnvironmentVariables"] |= {
        "HOME": str(home),
        "PATH": f"{program.parent}:/usr/bin:/bin:/usr/sbin:/sbin",
    }
    plist |= {
        "UserName": user,
        "ProgramArguments": [str(program), "serve", "--config", str(config)],
        "WorkingDirectory": str(data),
        "ExitTimeOut": timeout,
    }
    return plistlib.dumps(plist, sort_keys=False)


def faults(plist: bytes, label: str) -> list[str]:
    """Why launchd would refuse the plist, ignore a part of it, or run something else."""
    try:
        values: Any = plistlib.loads(plist)
    except (ValueError, ExpatError) as error:
        return [f"not a plist: {error}"]
    if not isinstance(values, dict):
        return ["not a dictionary"]
    found = []
    for mapping in ElementTree.fromstring(plist).iter("dict"):
        keys = [key.text for key in mapping.iterfind("key")]
        found += [f"{key} twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    found += [f"{key} is not known" for key in values.keys() - KEYS]
    found += [
        f"{key} is no {kind.__name__}"
        for key, kind in KEYS.items()
        if type(values.get(key)) is not kind
    ]
    if found:
        return found
    environment = values["EnvironmentVariables"]
    texts = [*values["ProgramArguments"], *environment.values()]
    if not values["ProgramArguments"] or not all(isinstance(text, str) for text in texts):
        return ["ProgramArguments or EnvironmentVariables hold something else than strings"]
    texts += [text for text in values.values() if isinstance(text, str)]
    found += [f"{text}: nothing expands ~ or $" for text in texts if set("~$") & set(text)]
    arguments = values["ProgramArguments"]
    configs = [b for a, b in pairwise(arguments) if a == "--config"]
    directories = [environment.get("HOME", ""), *environment.get("PATH", "").split(":")]
    files = [values[key] for key in KEYS if key.endswith(("Path", "Directory"))]
    for path in (arguments[0], *configs, *directories, *files):
        if path[:1] not in "~$/":
            found.append(f"{path!r} is no absolute path")
    for is_wrong, fault in (
        (values["Label"] != label, f"Label is not {label}, as the file's name"),
        (values["UserName"] == "root", "UserName is root"),
        (not re.fullmatch("0[0-7]{2,3}", values["Umask"]), "Umask is not octal"),
        (values["ExitTimeOut"] <= 0, "ExitTimeOut of 0 never ends"),
    ):
        if is_wrong:
            found.append(fault)
    return found
