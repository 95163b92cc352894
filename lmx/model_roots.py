"""Where models lie: LMX's own folder, LM Studio's, Hugging Face's cache. Blocking.

A scan must survive whatever is there: what cannot be read is skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config
from .errors import ModelLoadFailed
from .mlx_folder import read_json

logger = logging.getLogger(__name__)


class Root(NamedTuple):
    path: Path
    own: bool = False
    """LMX's."""
    hub: bool = False
    """Laid out as Hugging Face's cache, else as publisher/repo/files."""


def roots(config: Config) -> list[Root]:
    """LMX's own comes first."""
    found = [Root(Path(os.path.expanduser(config.models_dir)), own=True)]
    for name in config.model_roots:
        if name == "lmstudio":
            home = _lm_studio_home()
            moved = _read_object(home / "settings.json").get("downloadsFolder")
            found.append(Root(Path(moved) if isinstance(moved, str) else home / "models"))
        elif name == "huggingface":
            hub = os.path.join(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
            hub = os.environ.get("HF_HUB_CACHE") or hub
            found.append(Root(Path(os.path.expanduser(hub)), hub=True))
        else:
            found.append(Root(Path(os.path.expanduser(name))))
    return found


def lm_studio_index() -> dict[str, str]:
    """Its ids by the real path of a GGUF file or an MLX folder. Without a usable index: nothing."""
    index = {}
    models = _read_object(_lm_studio_home() / ".internal/model-index-cache.json").get("models")
    for entry in models if isinstance(models, list) else []:
        try:
            file, id = entry["entryPoint"]["absPath"], entry["defaultIdentifier"]
            path = file if file.endswith(".gguf") else entry["containingDirAbsolutePath"]
            if id and id.isprintable():
                index[os.path.realpath(path)] = id
        except (LookupError, TypeError, ValueError, AttributeError):
            continue
    return index


def repositories(root: Root) -> Iterator[tuple[Path, str, str]]:
    """Folder of the files, publisher, name."""
    for outer in entries(root.path, root):
        if not root.hub:
            yield from ((inner, outer.name, inner.name) for inner in entries(outer, root))
        elif outer.name.startswith("models--"):
            publisher, _, repo = outer.name.removeprefix("models--").rpartition("--")
            snapshots = {path.name: path for path in entries(outer / "snapshots", root)}
            current = snapshots.get(_read_line(outer / "refs" / "main"))
            newest = max(snapshots.values(), key=_modified, default=None)
            if folder := current or newest:
                yield folder, publisher or "huggingface", repo


def entries(folder: Path, root: Root) -> list[Path]:
    """In a fixed order; no dot-files, and no links that lead out of the root."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        _warn_once(f"{folder} is skipped: {error}")
        return []
    found = []
    for name in names:
        path = folder / name
        real = os.path.realpath(path) if os.path.islink(path) else None
        if name.startswith("."):
            continue
        if name.encode(errors="ignore").decode() != name:
            _warn_once(f"{path!r} is skipped: its name is not UTF-8")
        elif real and not Path(real).is_relative_to(os.path.realpath(root.path)):
            _warn_once(f"{path} is skipped: a link to outside of {root.path}")
        else:
            found.append(path)
    return found


@lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _modified(path: Path) -> float:
    with suppress(OSError):
        return os.path.getmtime(path)
    return 0.0


def _lm_studio_home() -> Path:
    """By LM Studio's own rule (lmstudio-js, findLMStudioHome.ts)."""
    pointed = _read_line(Path(os.path.expanduser("~/.lmstudio-home-pointer")))
    old = os.path.expanduser("~/.cache/lm-studio")
    return Path(pointed or (old if os.path.isdir(old) else os.path.expanduser("~/.lmstudio")))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ModelLoadFailed:
        return {}
    return content if isinstance(content, dict) else {}


def _read_line(path: Path) -> str:
    with suppress(OSError, ValueError):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return ""
