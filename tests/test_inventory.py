from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from lmx import inventory
from lmx.errors import ModelCorrupt
from lmx.inventory import NAME, Digest, Entry, Manifest, changed, check_unchanged, read, verify

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a manifest, all of it verified."""
    files = {}
    for path, data in FILES.items():
        (tmp_path / path).write_bytes(data)
        mtime_ns = (tmp_path / path).stat().st_mtime_ns
        files[path] = Entry(len(data), f"sha256:{sha256(data)}", sha256(data), mtime_ns)
    inventory.write(tmp_path, Manifest("org/name", "c" * 40, files))
    return tmp_path


def flip(file: Path) -> None:
    """Change a byte; size and mtime stay."""
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def entries(folder: Path) -> dict[str, Entry]:
    manifest = read(folder)
    assert manifest
    return manifest.files


@pytest.mark.parametrize(
    ("expected", "matches"),
    [
        # git hash-object
        ("git-sha1:ce013625030ba8dba906f756967f9e9ca394464a", True),
        ("git-sha1:ce013625030ba8dba906f756967f9e9ca394464b", False),
        ("sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", True),
        ("sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be04", False),
    ],
)
def test_digest(expected: str, matches: bool) -> None:
    """Bytes that come in pieces have git's hash, or SHA-256, as the hub tells; SHA-256 always."""
    digest = Digest(6, expected)
    for piece in (b"he", b"", bytearray(b"llo\n")):
        digest.update(piece)
    assert (str(digest) == expected) is matches
    assert digest.sha256.hexdigest() == sha256(b"hello\n")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    """What LMX has not downloaded passes the check before a load, and cannot be verified."""
    check_unchanged(tmp_path)
    assert read(tmp_path) is None
    with pytest.raises(ModelCorrupt, match=r"no \.lmx\.json"):
        verify(tmp_path, None, Event())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"repo": "a/b", "commit": "main", "files": {}}'],
    ids=repr,
)
def test_a_damaged_manifest(folder: Path, content: bytes) -> None:
    """A manifest that cannot be read is an error that names it, never `no manifest`."""
    (folder / NAME).write_bytes(content)
    with pytest.raises(ModelCorrupt, match=r"\.lmx\.json"):
        check_unchanged(folder)


def test_writing_is_atomic(folder: Path) -> None:
    """While the new manifest is not wholly on disk, the old one is there."""
    before = read(folder)
    (folder / f"{NAME}.tmp").mkdir()
    with pytest.raises(OSError):
        inventory.write(folder, Manifest("a/b", "d" * 40, {}))
    assert read(folder) == before


def test_what_has_changed(folder: Path) -> None:
    """Size, mtime and absence count; content is not looked at."""
    manifest = read(folder)
    assert manifest and changed(folder, manifest) == set()
    flip(folder / "config.json")
    assert changed(folder, manifest) == set()
    os.utime(folder / "config.json", ns=(1, 1))
    (folder / "model.safetensors").write_bytes(b"short")
    assert changed(folder, manifest) == set(FILES)
    (folder / "config.json").unlink()
    assert changed(folder, manifest) == set(FILES)


def test_a_load_reads_only_what_has_changed(folder: Path) -> None:
    """A touched file is hashed once more, and known from then on; others are not even opened."""
    flip(folder / "model.safetensors")
    os.utime(folder / "config.json", ns=(1, 1))
    check_unchanged(folder)
    assert entries(folder)["config.json"].mtime_ns == 1


def test_another_models_files_do_not_count(folder: Path) -> None:
    """Two quantizations share a folder: that one was deleted by hand does not harm the other."""
    (folder / "config.json").unlink()
    check_unchanged(folder, lambda file: file.name != "config.json")
    with pytest.raises(ModelCorrupt, match="missing"):
        check_unchanged(folder, lambda file: file.name == "config.json")


def test_a_changed_file_is_refused(folder: Path) -> None:
    """Every load fails, and says which file and both hashes, until the file is right again."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(b"other")
    for _ in range(2):
        with pytest.raises(ModelCorrupt) as error:
            check_unchanged(folder)
        for part in (str(weights), sha256(data), sha256(b"other")):
            assert part in error.value.message
    weights.write_bytes(data)
    check_unchanged(folder)


def test_verify_finds_what_size_and_time_do_not_show(folder: Path) -> None:
    """Bit rot is found, and from then on refused at every load."""
    assert verify(folder, None, Event()) == []
    flip(folder / "config.json")
    (folder / "model.safetensors").unlink()
    flipped = (folder / "config.json").read_bytes()
    assert verify(folder, None, Event()) == [
        ("config.json", sha256(b"{}"), sha256(flipped)),
        ("model.safetensors", sha256(FILES["model.safetensors"]), "missing"),
    ]
    assert [entry.mtime_ns for entry in entries(folder).values()] == [0, 0]
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        check_unchanged(folder)


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    """It is a fault like any other, with the reason."""
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    [(path, _, actual)] = verify(folder, None, Event())
    assert path == "config.json" and "directory" in actual


def test_verify_can_be_stopped(folder: Path) -> None:
    """A cancelled verification says nothing about the files it has not read to the end."""
    before = read(folder)
    flip(folder / "config.json")
    cancelled = Event()
    cancelled.set()
    assert verify(folder, None, cancelled) == []
    assert read(folder) == before


def test_verifying_forgets_no_download(folder: Path) -> None:
    """A manifest that a download writes while files are hashed is not overwritten with the old."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with ThreadPoolExecutor() as pool:
        verifying = pool.submit(verify, folder, ["config.json"], Event())
        with (folder / "config.json").open("wb") as writer:  # opens once it is being read
            new = Manifest("org/name", "d" * 40, {"config.json": Entry(1, None, sha256(b"x"), 5)})
            inventory.write(folder, new)
            writer.write(b"x")
        assert len(verifying.result(10)) == 1
    assert read(folder) == new
