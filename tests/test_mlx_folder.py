"""What the headers of an MLX model's weights tell; what is refused is in test_catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmx.errors import ModelLoadFailed
from lmx.mlx_folder import read_folder

from .folders import Tensors, mlx_folder, safetensors_file

QUANTIZED = {"a.weight": ("U32", (8, 8), 256), "a.biases": ("F16", (8, 1), 16)}
SCALES = {"a.scales": ("F16", (8, 1), 16)}


@pytest.mark.parametrize(
    ("quantization", "tensors", "parameters"),
    [
        (None, {"a.weight": ("F16", (3, 5), 30)}, 15),
        (None, {"a.weight": ("F16", (), 2)}, 1),
        ({"bits": 4}, QUANTIZED | SCALES, 512),
        ({"bits": 6}, QUANTIZED | SCALES, 341),
        ({"bits": 4, "a": {"bits": 8}}, QUANTIZED | SCALES, 256),
        ({"bits": 4, "a": False}, QUANTIZED | SCALES, 512),
        ({"bits": 4}, QUANTIZED | SCALES | {"a.bias": ("F16", (8,), 16)}, 520),
        ({"bits": 4}, QUANTIZED | SCALES | {"b.biases": ("F16", (8,), 16)}, 520),
        (None, QUANTIZED | SCALES, 64),
        ([], QUANTIZED | SCALES, 64),
        ({"bits": "4"}, QUANTIZED | SCALES, 64),
    ],
)
def test_parameters(tmp_path: Path, quantization: Any, tensors: Tensors, parameters: int) -> None:
    """As many as before quantization; scales and biases that it has added do not count."""
    folder = mlx_folder(tmp_path / "m", quantization=quantization)
    safetensors_file(folder / "model.safetensors", tensors)
    assert read_folder(folder).parameters == parameters


def test_sizes_are_of_all_files(tmp_path: Path) -> None:
    """Shards add up, though a layer's scales may be in another one; other files do not count."""
    folder = mlx_folder(tmp_path / "m", quantization={"bits": 4})
    safetensors_file(folder / "model.safetensors", QUANTIZED)
    safetensors_file(folder / "model-2.safetensors", SCALES)
    safetensors_file(folder / "adapters.safetensors", QUANTIZED)
    read = read_folder(folder)
    assert (read.weight_bytes, read.parameters) == (256 + 16 + 16, 512)


@pytest.mark.parametrize(
    ("kinds", "element_bytes"),
    [
        ([("F32", 4)], 4),
        ([("BF16", 4), ("F32", 3)], 2),
        ([("F16", 3), ("F32", 4)], 4),
        ([("U32", 9), ("BF16", 1)], 2),
        ([("U8", 9)], 2),
    ],
    ids=str,
)
def test_element_bytes(tmp_path: Path, kinds: list[tuple[str, int]], element_bytes: int) -> None:
    """Of most floating-point elements: some layers keep a few in float32."""
    folder = mlx_folder(tmp_path / "m")
    tensors = {kind: (kind, (count,), 4 * count) for kind, count in kinds}
    safetensors_file(folder / "model.safetensors", tensors)
    assert read_folder(folder).element_bytes == element_bytes


def test_weights_must_lie_in_the_root(tmp_path: Path) -> None:
    """A link out of it is refused, a link within it is followed."""
    folder = mlx_folder(tmp_path / "root" / "m")
    (folder / "model.safetensors").rename(tmp_path / "root" / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "root" / "blob")
    assert read_folder(folder, tmp_path / "root").parameters == 64
    assert read_folder(folder).parameters == 64
    with pytest.raises(ModelLoadFailed, match=r"model\.safetensors: a link to outside of .*/m$"):
        read_folder(folder, folder)
