from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.errors import ModelLoadFailed
from lmx.gguf_header import TENSOR_TYPES, Header, TensorInfo, read_header
from tests.models import smollm2_gguf, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.number": 7,
    "a.float": 0.5,
    "a.switch": True,
    "some.texts": ["ä", "", "b c"],
    "some.numbers": [1, -2, 3],
}
TENSORS = {
    "first": ("F16", (2, 3), bytes(range(12))),
    "second": ("Q4_0", (2, 64), bytes(72)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "small.gguf", METADATA, TENSORS)
    return tmp_path / "small.gguf"


def test_reads_what_was_written(path: Path) -> None:
    """Metadata of every type comes back, and each tensor's place is where its data lies."""
    header = read_header(path)
    assert header.metadata == METADATA
    assert header.tensors.keys() == TENSORS.keys()
    for name, (kind, shape, data) in TENSORS.items():
        info = header.tensors[name]
        assert (info.type, info.shape, info.size_bytes) == (kind, shape, len(data))
        assert path.read_bytes()[info.offset :][: len(data)] == data


def test_arrays_can_be_skipped(path: Path) -> None:
    """Without arrays their values are None and everything else is the same."""
    whole, brief = read_header(path), read_header(path, arrays=False)
    assert brief.tensors == whole.tensors
    assert brief.metadata == METADATA | {"some.texts": None, "some.numbers": None}


def test_real_file() -> None:
    """SmolLM2's header is read whole, and its last tensor ends where the file does."""
    header = read_header(smollm2_gguf())
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152
    assert header.tensors["token_embd.weight"] == TensorInfo(
        "Q8_0", (49152, 576), 1785664, 49152 * 576 // 32 * 34
    )
    ends = [info.offset + info.size_bytes for info in header.tensors.values()]
    assert max(ends) == smollm2_gguf().stat().st_size


def test_tensor_types_are_those_of_ggml() -> None:
    """The table of block sizes equals the one in the installed ggml."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for number, (name, block, size_bytes) in TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode().upper() == name
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, size_bytes)


def replace(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cut short"),
        (lambda data: data[:100], "cut short"),
        (lambda data: data[:-40], "second does not lie within it"),
        (replace(b"GGUF", b"GGML"), "begin with GGUF"),
        (replace(struct.pack("<I", 3), struct.pack("<I", 1)), "version 1"),
        (replace(struct.pack("<I", 3), struct.pack(">I", 3)), "version 50331648"),
        (replace(struct.pack("<Q", 2), struct.pack("<Q", 1 << 60)), "not a usable"),
        (replace(struct.pack("<Q", 6), struct.pack("<Q", 1 << 60)), "not a usable"),
        (replace(b"a.number", b"a.switch"), "a.switch occurs twice"),
        (replace(string("second"), string("first\0")), None),
        (replace(struct.pack("<IQ", 8, 3), struct.pack("<IQ", 8, 1 << 62)), "cut short"),
        (replace(struct.pack("<IQ", 8, 3), struct.pack("<IQ", 9, 3)), "unknown metadata type 9"),
        (replace(struct.pack("<IQ", 5, 3), struct.pack("<IQ", 5, 1 << 62)), "cut short"),
        (replace(string("first"), struct.pack("<Q", 1 << 63) + b"first"), "cut short"),
        (replace(struct.pack("<IQQ", 2, 3, 2), struct.pack("<IQQ", 9, 3, 2)), "9 dimensions"),
        (replace(struct.pack("<IQQ", 2, 3, 2), struct.pack("<IQQ", 2, 0, 2)), "first of type F16"),
        (replace(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 63, 2)), "second of type Q4_0"),
        (replace(struct.pack("<QQ", 64, 2), struct.pack("<QQ", 64, 1 << 60)), "does not lie"),
        (replace(struct.pack("<IQ", 2, 32), struct.pack("<IQ", 2, 33)), "does not lie"),
        (replace(struct.pack("<IQ", 2, 32), struct.pack("<IQ", 99, 32)), None),
    ],
)
def test_malformed(path: Path, change: Callable[[bytes], bytes], message: str | None) -> None:
    """Each way of being malformed is named; what is merely unknown is not malformed."""
    path.write_bytes(change(path.read_bytes()))
    if message is None:
        assert len(read_header(path).tensors) == 2
        return
    with pytest.raises(ModelLoadFailed, match=f"small.gguf.*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.alignment": 24}, {}, "alignment 24"),
        ({"general.alignment": 0}, {}, "alignment 0"),
        ({"general.alignment": "32"}, {}, "no uint32"),
        ({}, {"x": ("F32", (1, 1, 1, 1, 1), b"")}, "5 dimensions"),
    ],
)
def test_inconsistent(
    tmp_path: Path, metadata: dict[str, object], tensors: dict[str, object], message: str
) -> None:
    """An impossible alignment or shape is an error."""
    write_gguf(tmp_path / "x.gguf", metadata, tensors)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadFailed, match=message):
        read_header(tmp_path / "x.gguf")


def test_unreadable(tmp_path: Path) -> None:
    """A missing file and a folder are load failures too."""
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelLoadFailed, match="cannot read"):
            read_header(path)


def test_large_file_with_damaged_length(path: Path) -> None:
    """A length that fits in a large file is still refused when no header is so long."""
    path.write_bytes(replace(string("ä"), struct.pack("<Q", 1 << 33))(path.read_bytes()))
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(ModelLoadFailed, match="larger than 64 MiB"):
        read_header(path)


def test_typed_access(path: Path) -> None:
    """`get` gives a value of the asked type, the default, or an error that names the key."""
    header = read_header(path)
    assert header.get("a.number", int) == 7
    assert header.get("missing", int, 3) == 3
    with pytest.raises(ModelLoadFailed, match=r"small.gguf: it lacks missing"):
        header.get("missing", int)
    with pytest.raises(ModelLoadFailed, match=r"a.switch is True, not int"):
        header.get("a.switch", int)


def read_or_fail(path: Path) -> Header | None:
    try:
        return read_header(path)
    except ModelLoadFailed:
        return None


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4), data=st.data()
)
@settings(fuzz, max_examples=500)
def test_fuzz_small(tmp_path: Path, flips: list[tuple[float, int]], data: st.DataObject) -> None:
    """Whatever bytes change and wherever the file ends, the answer is a header or an error."""
    path = tmp_path / "small.gguf"
    write_gguf(path, METADATA, TENSORS)
    content = bytearray(path.read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_fail(path)


@given(place=st.integers(0, 1785663), change=st.integers(1, 255))
@settings(fuzz, max_examples=25)
def test_fuzz_real(tmp_path_factory: pytest.TempPathFactory, place: int, change: int) -> None:
    """So it is with a real header of 1.8 MB, its vocabulary included."""
    path = tmp_path_factory.getbasetemp() / "real.gguf"
    with smollm2_gguf().open("rb") as file:
        content = bytearray(file.read(1785664))
    content[place] ^= change
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(smollm2_gguf().stat().st_size)
    read_or_fail(path)
