"""What the fingerprint of a loaded model depends on."""

from __future__ import annotations

import os
from pathlib import Path

from lmx.catalog import Model
from lmx.config import EngineSettings
from lmx.loading import inspect

from .folders import mlx_folder


def folder(path: Path) -> Model:
    mlx_folder(path)
    return Model(path.name, path, "mlx", "pub", path.name, None, 0)


def test_the_fingerprint_of_a_model(tmp_path: Path) -> None:
    """Its files, its draft model's and the settings make a difference; a GGUF file beside does
    not."""
    model, draft = folder(tmp_path / "m"), folder(tmp_path / "d")
    settings = EngineSettings()
    first = inspect([model], settings)
    (model.path / "other.gguf").touch()
    assert inspect([model], settings) == first
    prints = {first, inspect([model], EngineSettings(parallel=2))}
    for model_or_draft in (draft, model):
        prints.add(inspect([model, draft], settings))
        os.utime(model_or_draft.path / "config.json", ns=(0, 1))
    prints.add(inspect([model, draft], settings))
    assert len(prints) == 5
