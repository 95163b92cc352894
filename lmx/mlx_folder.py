"""An MLX model folder, read without MLX: what cannot or must not be loaded is named."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import ModelLoadFailed

MAX_JSON_BYTES: Final = 100_000_000
"""The safetensors library's limit for a header; bounds what a damaged file allocates."""
DAMAGE: Final = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                 RecursionError, struct.error)  # fmt: skip
"""What reading a file, or JSON of another shape than expected, raises."""

_CONTEXT: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class Folder:
    config: dict[str, Any]
    weight_bytes: int
    parameters: int
    """Elements of the weights, as many as before they were quantized."""
    element_bytes: int
    """Of an activation, and so of the KV cache: 2 or 4."""

    @property
    def context_length(self) -> int | None:
        inner = self.config.get("text_config")
        values = inner | self.config if isinstance(inner, dict) else self.config
        return next((values[name] for name in _CONTEXT if type(values.get(name)) is int), None)

    @property
    def quantization(self) -> str | None:
        """As in names of repositories, such as `4bit`."""
        settings = self.config.get("quantization")
        bits = settings.get("bits") if isinstance(settings, dict) else None
        return f"{bits}bit" if type(bits) is int else None


def read_folder(path: Path, root: Path | None = None) -> Folder:
    """
    Raises:
        ModelLoadFailed: config, index or weights are missing, malformed, links to outside of
            `root`, or ask for code to be run.
    """
    file = path / "config.json"
    if not isinstance(config := read_json(file), dict):
        raise ModelLoadFailed(f"{file}: not a JSON object")
    # `auto_map` names code too, but many sound models carry it (DeepSeek, Kimi, MiniMax) and
    # nothing here follows it: mlx-lm has its own model classes.
    if "model_file" in config:
        raise ModelLoadFailed(f"{file}: model_file wants code to be run, which LMX never does")
    weights = set(path.glob("model*.safetensors"))  # the pattern mlx-lm loads
    index = path / "model.safetensors.index.json"
    if os.path.exists(index):
        try:
            shards = set(read_json(index)["weight_map"].values())
            missing = sorted(name for name in shards if path / name not in weights)
        except DAMAGE as error:
            raise ModelLoadFailed(f"{index}: {type(error).__name__}: {error}") from error
        if missing:
            raise ModelLoadFailed(f"{path / missing[0]}: missing, but named in {index.name}")
    if not weights:
        raise ModelLoadFailed(f"{path}: no model*.safetensors file")
    tensors: dict[str, tuple[str, int]] = {}
    size = 0
    for file in sorted(weights):
        try:
            if root and not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
                raise ValueError(f"a link to outside of {root}")
            size += _read_safetensors(file, tensors)
        except DAMAGE as error:
            raise ModelLoadFailed(f"{file}: {error}") from error
    parameters = sum(_elements(name, tensors, config.get("quantization")) for name in tensors)
    width = {"F32": 1, "F16": -1, "BF16": -1}
    wide = sum(width.get(kind, 0) * n for kind, n in tensors.values()) > 0
    return Folder(config, size, parameters, 4 if wide else 2)


def read_json(file: Path) -> Any:
    try:
        if not file.is_file() or file.stat().st_size > MAX_JSON_BYTES:  # a pipe would block
            raise ValueError("missing, or no file of a sensible size")
        return json.loads(file.read_bytes())
    except DAMAGE as error:
        raise ModelLoadFailed(f"{file}: {error}") from error


def _read_safetensors(file: Path, tensors: dict[str, tuple[str, int]]) -> int:
    """Put type and number of elements of each tensor into `tensors`; the bytes of all.

    Format: https://huggingface.co/docs/safetensors (8-byte little-endian length, JSON, data).
    """
    if not file.is_file():
        raise ValueError("not a file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError("the header is longer than the file, or than any real one")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = int(max((t["data_offsets"][1] for t in header.values()), default=0))
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, but its header describes {8 + length + end}")
    tensors |= {n: (str(t["dtype"]), int(math.prod(t["shape"]))) for n, t in header.items()}
    return end


def _elements(name: str, tensors: dict[str, tuple[str, int]], quantization: Any) -> int:
    """As many as before quantization, which packs weights and adds scales and biases."""
    kind, elements = tensors[name]
    layer, _, part = name.rpartition(".")
    if f"{layer}.scales" not in tensors:
        return elements
    if part in ("scales", "biases"):
        return 0
    common = quantization if isinstance(quantization, dict) else {}
    own = common.get(layer)
    bits = (own if isinstance(own, dict) else common).get("bits")
    return elements * 32 // bits if kind == "U32" and isinstance(bits, int) and bits else elements
