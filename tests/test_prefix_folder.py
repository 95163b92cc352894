"""Prefixes on disk: what is found is what was written, within the budget, whoever else is there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.prefix_folder import PrefixFolder

MODEL = "/models/a\n1"
BUDGET = 1_000_000


def holding(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def fail(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def keep_all(folder: Path, *prompts: list[int], size: int = 100) -> PrefixFolder:
    """The first one used longest ago."""
    prefixes = PrefixFolder(folder, MODEL, BUDGET)
    for age, tokens in enumerate(prompts, 1):
        before = set(folder.glob("*"))
        prefixes.add(tokens, holding(bytes(size)))
        for file in set(folder.glob("*")) - before:
            os.utime(file, (age, age))
    return prefixes


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ([1, 2, 3, 4, 5], {}, [1, 2, 3, 4]),
        ([1, 2, 3, 4], {}, [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], {"most": 3}, [1, 2, 3]),
        ([1, 2, 3, 9], {}, [1, 2, 3]),
        ([1, 2, 9, 9], {}, [1, 2, 3]),
        ([1, 2, 9, 9], {"stateful": True}, None),
        ([1, 2, 3, 9], {"stateful": True}, [1, 2, 3]),
        ([1, 2, 3, 4, 5], {"more_than": 3}, [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5], {"more_than": 4}, None),
        ([1, 9], {}, None),
        ([7, 7, 9], {}, [7, 7, 8, 8]),
        ([7, 9], {}, None),
        ([9], {}, None),
    ],
    ids=[
        "the longest",
        "all of the prompt",
        "the shortest that saves as much",
        "one that ends before they part",
        "one that goes on differently",
        "no state where they part",
        "a state at its end",
        "more than is known already",
        "no more than is known already",
        "a third of it is not worth reading",
        "a half of it is",
        "a quarter is not",
        "nothing like it",
    ],
)
def test_find(
    tmp_path: Path,
    reloaded: bool,
    prompt: list[int],
    options: dict[str, int],
    expected: list[int] | None,
) -> None:
    """The file that saves most of the prompt, in this process and in the next."""
    prefixes = keep_all(tmp_path, [1, 2, 3], [1, 2, 3, 4], [7, 7, 8, 8])
    if reloaded:
        prefixes = PrefixFolder(tmp_path, MODEL, BUDGET)
    found = prefixes.find(prompt, **{"most": len(prompt), **options})  # type: ignore[arg-type]
    assert (found[1] if found else None) == expected


def test_it_is_what_was_written(tmp_path: Path) -> None:
    """The file holds the bytes written, and nobody else may read it or see its folder."""
    folder = tmp_path / "new" / "prefixes"
    prefixes = PrefixFolder(folder, MODEL, BUDGET)
    assert not folder.exists()
    prefixes.add([1, 2], holding(b"kv"))
    found = prefixes.find([1, 2], 2)
    assert found and found[0].read_bytes() == b"kv"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("suffix", ["prefix", "tokens"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "delete"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_damage(
    tmp_path: Path,
    suffix: str,
    damage: str,
    reloaded: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is not as it was written is deleted and passed over for the next best, whether tokens
    or data are concerned; what has vanished is passed over without a word."""
    prefixes = keep_all(tmp_path, [1, 2, 3])
    [_] = tmp_path.glob("*.prefix")
    before = set(tmp_path.iterdir())
    prefixes.add([1, 2, 3, 4], holding(b"x" * 100))
    [file] = (file for file in set(tmp_path.iterdir()) - before if file.suffix == f".{suffix}")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-4] ^= 8
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    if reloaded:
        prefixes = PrefixFolder(tmp_path, MODEL, BUDGET)
    elif suffix == "tokens":
        return  # read only once
    found = prefixes.find([1, 2, 3, 4, 5], 5)
    assert found and found[1] == [1, 2, 3]
    if suffix == "prefix":
        assert set(tmp_path.iterdir()) == before
    assert len(caplog.messages) == (suffix == "prefix" and damage != "delete")


def test_another_version_of_the_model(tmp_path: Path) -> None:
    """What an older version of the same model has left is deleted, other models' is not found."""
    keep_all(tmp_path, [1, 2])
    other = PrefixFolder(tmp_path, "/models/b\n1", BUDGET)
    assert other.find([1, 2], 2) is None and len(list(tmp_path.iterdir())) == 2
    assert PrefixFolder(tmp_path, "/models/a\n2", BUDGET).find([1, 2], 2) is None
    assert list(tmp_path.iterdir()) == []


def test_those_used_longest_ago_go(tmp_path: Path) -> None:
    """A smaller budget at the next start, or a new prefix, costs the oldest; a hit is a use."""
    prefixes = keep_all(tmp_path, [1], [2], [3])
    assert prefixes.find([1], 1)
    each = held(tmp_path) // 3
    prefixes = PrefixFolder(tmp_path, MODEL, 3 * each - 1)
    assert [bool(prefixes.find([token], 1)) for token in (1, 2, 3)] == [True, False, True]
    os.utime(next(tmp_path.glob("*.prefix")))
    prefixes.add([4], holding(bytes(100)))
    assert held(tmp_path) == 2 * each
    assert prefixes.find([4], 1)


def test_one_that_is_too_large_costs_no_other(tmp_path: Path) -> None:
    """A prefix above the whole budget is not kept, and nothing goes for it."""
    prefixes = PrefixFolder(tmp_path, MODEL, 300)
    prefixes.add([1], holding(bytes(100)))
    before = sorted(tmp_path.iterdir())
    prefixes.add([2], holding(bytes(300)))
    assert sorted(tmp_path.iterdir()) == before and prefixes.find([2], 1) is None


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    """The same tokens are written once, and once more if another process has deleted them."""
    prefixes = keep_all(tmp_path, [1, 2])
    prefixes.add([1, 2], fail)
    for file in tmp_path.iterdir():
        file.unlink()
    prefixes.add([1, 2], holding(b"again"))
    found = prefixes.find([1, 2], 2)
    assert found and found[0].read_bytes() == b"again"


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A write that fails leaves nothing behind and is no error, only a warning."""
    prefixes = PrefixFolder(tmp_path, MODEL, BUDGET)
    prefixes.add([1], fail)
    assert list(tmp_path.iterdir()) == [] and "No space left" in caplog.text


def test_no_folder_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a file is in the folder's place, nothing is found and nothing kept."""
    (tmp_path / "file").write_bytes(b"mine")
    prefixes = PrefixFolder(tmp_path / "file", MODEL, BUDGET)
    prefixes.add([1], holding(b"kv"))
    assert prefixes.find([1], 1) is None and "not kept" in caplog.text
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A folder that is used for something else as well loses nothing of that."""
    (tmp_path / "thesis.tokens").write_bytes(bytes(1000))
    (tmp_path / "sub").mkdir()
    PrefixFolder(tmp_path, MODEL, 0)
    PrefixFolder(tmp_path, MODEL, 400).add([1], holding(bytes(100)))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_write_cut_short_goes_with_time(tmp_path: Path) -> None:
    """What a process that died while writing has left counts, and goes like all that is old."""
    prefixes = keep_all(tmp_path, [1])
    [file] = tmp_path.glob("*.prefix")
    left = file.with_suffix(".new1").with_stem("0" * 16 + file.stem[16:])
    left.write_bytes(bytes(1000))
    os.utime(left, (0, 0))
    prefixes = PrefixFolder(tmp_path, MODEL, 1000)
    assert not left.exists() and prefixes.find([1], 1)


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=4), st.booleans()
        ),
        max_size=15,
    )
)
def test_two_processes(steps: list[tuple[int, list[int], bool]]) -> None:
    """Whatever two of them do in turn, the budget holds and what is found is right."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = [PrefixFolder(folder, MODEL, 300) for _ in range(2)]
        for which, tokens, add in steps:
            if add:
                both[which].add(tokens, holding(bytes(tokens) * 20))
                assert held(folder) <= 300
            elif found := both[which].find(tokens, len(tokens)):
                path, stored = found
                assert path.read_bytes() == bytes(stored) * 20
                assert stored[0] == tokens[0]
