"""A GGUF file's metadata and tensor list, read with nothing but the standard library.

MLX and llama.cpp can abort the process on a malformed file; this reader answers every one of them
with `ModelLoadFailed`. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, TypeVar

from .errors import ModelLoadFailed

T = TypeVar("T")

# Tensor types by number: name, elements per block, bytes per block (ggml.h, `enum ggml_type`).
TENSOR_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

# Metadata value types by number, as `struct` codes.
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_UINT32: Final = 4
_STRING: Final = 8
_ARRAY: Final = 9

_MAX_HEADER_BYTES: Final = 64 * 1024**2
"""Four times the header of a vocabulary of 260 000 tokens; bounds what a damaged file allocates."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    type: str
    """Such as `Q4_0`; `type 99` for one not in TENSOR_TYPES."""
    shape: tuple[int, ...]
    """Rows first, as in numpy; the file lists the fastest dimension first."""
    offset: int
    """From the beginning of the file."""
    size_bytes: int
    """0 for an unknown type."""


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata value, or the default where there is none.

        Raises:
            ModelLoadFailed: it is missing and there is no default, or it is not of this type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(f"it lacks {key}")
        if type(value) is not kind:
            self.fail(f"{key} is {value!r:.40}, not {kind.__name__}")
        return value

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self.path}: {reason}")


def read_header(path: Path, *, arrays: bool = True) -> Header:
    """Read the header of `path`. Without `arrays`, array values are skipped and become None: for
    a listing, as a vocabulary is most of a header (SmolLM2's: 40 ms instead of 65).

    Raises:
        ModelLoadFailed: no such file, not GGUF 2 or 3, cut short, or inconsistent.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _Reader(path, file).header(arrays)
    except OSError as error:
        raise ModelLoadFailed(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self.path}: not a usable GGUF file: {reason}")

    def header(self, arrays: bool) -> Header:
        if self.take(4) != b"GGUF":
            self.fail("it does not begin with GGUF")
        if (version := self.number("<I")) not in (2, 3):
            self.fail(f"version {version}")
        tensor_count, metadata_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key, kind = self.string(), self.number("<I")
            if key in metadata:
                self.fail(f"{key} occurs twice")
            if key == "general.alignment" and kind != _UINT32:
                self.fail(f"{key} is no uint32")
            metadata[key] = self.value(kind, arrays)
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            if (name := self.string()) in infos:
                self.fail(f"tensor {name} occurs twice")
            if not 1 <= (dimensions := self.number("<I")) <= 4:
                self.fail(f"tensor {name} has {dimensions} dimensions")
            shape = tuple(self.number("<Q") for _ in range(dimensions))
            infos[name] = shape[::-1], self.number("<I"), self.number("<Q")
        alignment = metadata.get("general.alignment", 32)
        if alignment.bit_count() != 1:
            self.fail(f"alignment {alignment}")
        data = -(-self.position // alignment) * alignment
        tensors = {n: self.tensor(n, *info, data, alignment) for n, info in infos.items()}
        return Header(self.path, metadata, tensors)

    def tensor(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int
    ) -> TensorInfo:
        type_name, block, block_bytes = TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        size_bytes = math.prod(shape) // block * block_bytes
        if 0 in shape or shape[-1] % block:
            self.fail(f"tensor {name} of type {type_name} has shape {shape}")
        if offset % alignment or data + offset + size_bytes > self.size:
            self.fail(f"tensor {name} does not lie within it")
        return TensorInfo(type_name, shape, data + offset, size_bytes)

    def take(self, count: int) -> bytes:
        # Checked before reading, so that a huge count in the file allocates nothing.
        self.position += count
        if self.position > min(self.size, _MAX_HEADER_BYTES):
            self.fail("its header is cut short, or larger than 64 MiB")
        if len(data := self.file.read(count)) < count:
            self.fail("it shrank while it was read")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string_bytes(self) -> bytes:
        return self.take(int.from_bytes(self.take(8), "little"))

    def string(self) -> str:
        return self.string_bytes().decode("utf-8", "replace")

    def value(self, kind: int, arrays: bool) -> Any:
        if kind == _ARRAY:
            return self.array(self.number("<I"), self.number("<Q"), arrays)
        return self.string() if kind == _STRING else self.number(self.code(kind))

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def array(self, kind: int, count: int, keep: bool) -> list[Any] | None:
        if kind == _STRING and keep:
            return [self.string() for _ in range(count)]
        if kind == _STRING:
            for _ in range(count):
                self.string_bytes()
            return None
        code = self.code(kind)
        data = self.take(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code[1]}", data)) if keep else None
