"""What a runner is told to load: settings that name files, and what they and the files come to."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import anyio
import msgspec
from msgspec.structs import replace

from . import __version__, inventory
from .catalog import Model
from .config import EngineSettings
from .errors import ModelLoadFailed

logger = logging.getLogger(__name__)

ENGINES: Final = {"mlx": ("mlx", "mlx-lm"), "gguf": ("llama-cpp-python",)}


def draft_for(model: Model, draft: Model) -> Model:
    """The weights of `draft` that can guess for those of `model`.

    Raises:
        ModelLoadFailed: there are none.
    """
    if draft.format != model.format and draft.fallback is not None:
        draft = draft.fallback
    why = draft.error
    if draft.path == model.path:
        why = "a model cannot guess for itself"
    elif (draft.format, draft.kind) != (model.format, model.kind):
        why = f"{draft.id} is {draft.format}, {draft.kind}, and not {model.format}, {model.kind}"
    if why is not None:
        raise ModelLoadFailed(f"draft_model of {model.id}: {why}")
    return draft


def with_paths(engine: EngineSettings, draft: Model | None) -> EngineSettings:
    """For a runner, which knows no ids and no home folder."""
    return replace(
        engine,
        draft_model=None if draft is None else str(draft.path),
        prefix_disk_dir=str(Path(engine.prefix_disk_dir).expanduser()),
    )


def inspect(
    models: Sequence[Model], settings: EngineSettings, given_up: threading.Event | None = None
) -> str:
    """A fingerprint of what is loaded, which differs where the test at load could come out
    otherwise: other files of the model or of its draft model, settings, or versions. Blocking.

    Raises:
        ModelCorrupt: files are not what was verified.
        OSError
    """
    files = []
    for model in models:
        inventory.check_unchanged(model.folder, model.owns, given_up or threading.Event())
        paths = sorted(filter(model.owns, model.folder.rglob("*")))
        stats = ((str(path), path.stat()) for path in paths if path.is_file())
        files += [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    engine = ENGINES[models[0].format]
    versions = [found.version for name in engine for found in distributions(name=name)]
    facts = msgspec.json.encode([__version__, versions, settings, files])
    return hashlib.sha256(facts).hexdigest()


async def convert(source: Path, target: Path) -> None:
    """Make the embedded model's MLX folder, which takes seconds and once."""
    logger.info("converting %s to %s", source, target)
    command = [sys.executable, "-m", "lmx", "convert", str(source), str(target)]
    done = await anyio.run_process(command, check=False, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        raise ModelLoadFailed(f"{source}: conversion failed: {said}")
