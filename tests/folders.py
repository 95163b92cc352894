"""Minimal model files, and scans of them, for tests that run no model."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmx.catalog import find_models
from lmx.config import Config, ModelSettings

from .models import write_gguf

Tensors = Mapping[str, tuple[str, tuple[int, ...], int]]
"""By name: the type as safetensors calls it, the shape, the number of bytes."""

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
TENSORS: Tensors = {"model.norm.weight": ("F16", (64,), 128)}


def mlx_folder(path: Path, **config: Any) -> Path:
    """A valid MLX folder of a two-layer llama with one small tensor."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    safetensors_file(path / "model.safetensors", TENSORS)
    return path


def gguf_file(path: Path, **metadata: Any) -> Path:
    """A valid GGUF file of a two-layer llama; `metadata` has `__` in place of the dots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.context_length": 2048,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    write_gguf(path, values, {"output_norm.weight": ("F32", (64,), bytes(256))})
    return path


def safetensors_file(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(end))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and nothing of this machine's settings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def config(root: Path, *roots: str | Path, **models: ModelSettings) -> Config:
    return Config(models_dir=str(root), model_roots=tuple(map(str, roots)), models=models)


def put(root: Path, *names: str) -> Path:
    """A GGUF file for each name with that suffix, an MLX folder for each other."""
    for name in names:
        gguf_file(root / name) if name.endswith(".gguf") else mlx_folder(root / name)
    return root


def ids(root: Path, *roots: str | Path) -> list[str]:
    return [model.id for model in find_models(config(root, *roots))]
