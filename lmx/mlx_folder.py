"""An MLX model folder, checked without MLX: what cannot or must not be loaded is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from .errors import ModelLoadFailed


def check_folder(path: Path) -> None:
    """
    Raises:
        ModelLoadFailed: config, index or weights are missing, malformed or ask for code to be run.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadFailed(f"{path / 'config.json'}: not a JSON object")
    # `auto_map` names code too, but many sound models carry it (DeepSeek, Kimi, MiniMax) and
    # nothing here follows it: mlx-lm has its own model classes.
    if "model_file" in config:
        raise ModelLoadFailed(
            f"{path / 'config.json'}: model_file wants code from the model folder to be run, "
            "which LMX never does"
        )
    weights = set(path.glob("model*.safetensors"))  # the pattern mlx-lm loads
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadFailed(f"{index}: {type(error).__name__}: {error}") from error
        missing = sorted(name for name in shards if path / name not in weights)
        if missing:
            raise ModelLoadFailed(f"{path / missing[0]}: missing, but named in {index.name}")
    if not weights:
        raise ModelLoadFailed(f"{path}: no model*.safetensors file")
    for file in sorted(weights):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header's length and offsets against the file's size.

    Format: https://huggingface.co/docs/safetensors (8-byte little-endian length, JSON, data).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        end = max(
            (t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"),
            default=0,
        )
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but its header describes {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadFailed(f"{file}: {error}") from error
