from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmx.errors import GatedRepo, HubUnreachable, InvalidRequest, LMXError, RepoNotFound
from lmx.hub import check_paths, check_repo, choose, resolve
from lmx.inventory import Entry, Manifest

from .fake_hub import TOKEN, FakeHub, fake_hub

MLX = ["config.json", "model.safetensors", "tokenizer.json"]
SMALL = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NOISE = [
    ".gitattributes", "README.md", "modeling_x.py", "tokenizer.py", "tokenizer.bin", "x.npy",
    "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "1/config.json",
]  # fmt: skip
SPLIT = [f"Q8_0/x-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def gguf(*quantizations: str) -> list[str]:
    return [f"x-{quantization}.gguf" for quantization in quantizations]


@pytest.mark.parametrize(
    ("paths", "quant", "chosen"),
    [
        (MLX, None, MLX),
        (SMALL + SHARDS + NOISE, None, SMALL + SHARDS),
        (MLX + gguf("Q4_K_M"), None, MLX),
        (MLX + gguf("Q4_K_M"), "q4_k_m", gguf("Q4_K_M")),
        (["config.json", "consolidated.safetensors", *gguf("F16")], None, gguf("F16")),
        (["model.safetensors", *gguf("F16")], None, gguf("F16")),
        (gguf("Q2_K", "Q8_0", "Q4_K_M", "IQ4_XS"), None, gguf("Q4_K_M")),
        (gguf("Q2_K", "Q8_0", "F16"), None, gguf("Q8_0")),
        (gguf("UD-Q4_K_M", "Q4_K_M"), None, gguf("Q4_K_M")),
        (gguf("UD-Q4_K_M", "Q4_K_M"), "UD-Q4_K_M", gguf("UD-Q4_K_M")),
        (gguf("UD-Q4_K_XL", "BF16"), None, gguf("UD-Q4_K_XL")),
        (gguf("Q4_K_M", "Q4_K_S"), "Q4_K_S", gguf("Q4_K_S")),
        (["x.Q5_K_M.gguf", "x.Q6_K.gguf"], "q6_k", ["x.Q6_K.gguf"]),
        (["gpt-oss-20b-mxfp4.gguf"], None, ["gpt-oss-20b-mxfp4.gguf"]),
        (["x.gguf"], None, ["x.gguf"]),
        (["mmproj-Q4_K_M.gguf", "x-mmproj-F16.gguf", "imatrix.gguf", "x.gguf"], None, ["x.gguf"]),
        (SPLIT + gguf("Q6_K"), "Q8_0", SPLIT),
        (SPLIT, None, SPLIT),
        ([*SPLIT, "README.md", "config.json"], None, SPLIT),
    ],
    ids=str,
)
def test_choice(paths: list[str], quant: str | None, chosen: list[str]) -> None:
    """MLX with all small files before GGUF, one quantization with all parts, and nothing else."""
    assert sorted(choose(paths, None, quant)) == sorted(chosen)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["*.gguf"], [*SPLIT, "mmproj-F16.gguf", "x-Q4_K_M.gguf"]),
        (["m*.gguf"], ["mmproj-F16.gguf"]),
        (["x-*", "config.json"], ["config.json", "x-Q4_K_M.gguf"]),
        (["Q8_0/*"], SPLIT),
    ],
    ids=str,
)
def test_choice_by_pattern(files: list[str], chosen: list[str]) -> None:
    """Patterns replace the choice."""
    there = [*SPLIT, "config.json", "mmproj-F16.gguf", "x-Q4_K_M.gguf"]
    assert choose(there, files) == [path for path in there if path in chosen]


@pytest.mark.parametrize(
    ("paths", "files", "quant", "message"),
    [
        ([], None, None, r"no GGUF file and no config\.json with model\*\.safetensors.*: none$"),
        (["config.json", "pytorch_model.bin"], None, None, r"\*\.bin and \*\.pt are never loaded"),
        (["model.safetensors", "x.md"], None, None, r"there are: model\.safetensors, x\.md$"),
        (["mmproj-x.gguf"], None, None, "no GGUF file"),
        (MLX, None, "Q4_K_M", "no GGUF file; there are"),
        (gguf("Q1_X", "Q2_X"), None, None, r"choose .* quant or files: x-Q1_X\.gguf, x-Q2_X\.gguf"),
        (gguf("Q4_K_M"), None, "Q4", r"choose .*: x-Q4_K_M\.gguf$"),
        (gguf("Q4_K_M"), None, "K_M", "choose"),
        (gguf("Q4_K_M"), None, ".*", "choose"),
        (SPLIT[1:], None, None, r"Q8_0/x-Q8_0\.gguf should have 3 parts"),
        (["x-Q8_0-00001-of-00000.gguf"], None, None, "should have 0 parts"),
        (MLX, ["*.gguf"], None, r"no file matches; there are: config\.json, model"),
        (MLX, [], None, "no file matches"),
        (["x.bin", "tokenizer.py", ".a.json", "b/.c/d.gguf"], ["*"], None, "there are: none$"),
        (gguf(*(f"Q{n}_X" for n in range(30))), None, None, r"Q27_X\.gguf and 10 more$"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_no_choice(
    paths: list[str], files: list[str] | None, quant: str | None, message: str
) -> None:
    """Where nothing can be loaded, or it is not clear what is meant, the error lists what is."""
    with pytest.raises(InvalidRequest, match=message):
        choose(paths, files, quant)


names = st.text(string.ascii_letters + string.digits + "._-", max_size=100)


@given(names | st.text(), names | st.text())
@example("a", "..")
@example("..", "a")
@example("a", "b\n")
@example("a--b", "c")
@example("é", "a")
@example("a" * 97, "a")
@example("a/b", "c")
def test_repo_names(org: str, name: str) -> None:
    """A name that passes is a plain folder within a plain folder, and no two share a job."""
    repo = f"{org}/{name}"
    with suppress(InvalidRequest):
        check_repo(repo)
        path = PurePosixPath("/models", repo)
        assert path.parts == ("/", "models", org, name)
        assert ".." not in repo and repo.isascii() and repo.isprintable()
        assert not org.startswith(".") and not name.startswith(".")
        assert len(repo.replace("/", "--")) < 255 and repo.replace("/", "--").count("--") == 1
        return
    assert not (org.isalnum() and name.isalnum() and repo.isascii() and len(repo) < 90)


segments = st.sampled_from(["..", ".", "", "a", ".git", "C:", "~", "x.gguf"]) | st.text(max_size=5)


@given(st.lists(segments, min_size=1, max_size=4), st.sampled_from("/\\\0"))
@example(["", "etc", "x.gguf"], "/")
@example(["a", "..", "..", "x.gguf"], "/")
@example(["..", "x.gguf"], "\\")
@example(["\ud800.gguf"], "/")
def test_paths(parts: list[str], separator: str) -> None:
    """A path that passes stays within its folder, on any system."""
    path = separator.join(parts)
    with suppress(InvalidRequest):
        check_paths([path])
        assert not PurePosixPath(path).is_absolute()
        assert PurePosixPath(path).parts == tuple(path.split("/"))
        assert not {"..", "."} & set(path.split("/"))
        windows = PureWindowsPath(path)
        assert not windows.drive and not windows.root
        assert not set(path) & {"\\", "\0", "\n"}
        path.encode()
        return
    assert not path.isalnum()


files = st.lists(
    st.sampled_from(MLX + SHARDS + NOISE + SPLIT + gguf("Q4_K_M", "Q8_0", "F16", "Q4_X"))
    | st.builds(str.__add__, st.text(max_size=6), st.sampled_from([".json", ".gguf", ".bin", ""])),
    unique=True,
    max_size=20,
)


@given(
    files,
    st.none() | st.lists(st.sampled_from(["*", "*.bin", "*.gguf", "[", "?"])),
    st.none() | st.sampled_from(["Q8_0", "q4_x", "\\", "("]),
)
def test_any_choice(paths: list[str], globs: list[str] | None, quant: str | None) -> None:
    """Whatever a repo holds, what is chosen is there, no code and no pickle; or it is refused."""
    with suppress(InvalidRequest):
        chosen = choose(paths, globs, quant)
        assert chosen and set(chosen) <= set(paths) and len(set(chosen)) == len(chosen)
        assert not any(path.endswith((".bin", ".py", ".npy", ".md")) for path in chosen)
        assert not any(part.startswith(".") for path in chosen for part in path.split("/"))
        if globs is None:
            kinds = {path.rpartition(".")[2] for path in chosen}
            assert kinds == {"gguf"} or ("safetensors" in kinds and "gguf" not in kinds)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub({"org/m": {path: path.encode() for path in MLX + NOISE}}) as hub:
        yield hub


def ask(hub: FakeHub, repo: str = "org/m", revision: str | None = None) -> Manifest:
    return resolve(repo, revision, None, None, hub.endpoint, 10)


def test_resolve(hub: FakeHub) -> None:
    """The commit that a name stands for now, and size and hash of what to fetch of it."""
    [commit] = hub.commits["org/m"]
    hub.push("org/m", {})
    manifest = ask(hub, revision=commit)
    assert (manifest.repo, manifest.commit) == ("org/m", commit)
    # sha256sum and git hash-object of files that hold their name.
    assert manifest.files == {
        "model.safetensors": Entry(
            17, "sha256:9d75c1098fc54a1f7bd270f148884f599765d894639c9c4ee891396968c60df2"
        ),
        "config.json": Entry(11, "git-sha1:0cffcb348ff9cec9cd41492a9e5c5a41d86ce96e"),
        "tokenizer.json": Entry(14, "git-sha1:6c58b0694b62f2cfb205acaca22d3c23085a5348"),
    }


@pytest.mark.parametrize(
    ("repo", "revision", "error", "message"),
    [
        ("org/other", None, RepoNotFound, "shows no repo org/other$"),
        ("org/m", "v2", RepoNotFound, "shows no repo org/m with revision v2$"),
        ("org/m", "../../x", RepoNotFound, "with revision"),
        ("org", None, InvalidRequest, "org/name"),
        ("org/../m", None, InvalidRequest, "org/name"),
        ("org/m.git", None, RepoNotFound, "no repo org/m.git"),
    ],
)
def test_resolve_refuses(
    hub: FakeHub, repo: str, revision: str | None, error: type[LMXError], message: str
) -> None:
    """A repo, a revision or a name that is none is the client's error."""
    with pytest.raises(error, match=message):
        ask(hub, repo, revision)


def test_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated repo opens with the right token; without it the error says what to do."""
    hub.gated.add("org/m")
    assert ask(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(GatedRepo, match=r"accept its terms at http://.*/org/m and set HF_TOKEN"):
        ask(hub)


@pytest.mark.parametrize(
    "edit",
    [
        lambda listing: listing.clear(),
        lambda listing: listing.update(sha="main"),
        lambda listing: listing.update(sha=None),
        lambda listing: listing.update(siblings=["x"]),
        lambda listing: listing.pop("siblings"),
        lambda listing: [file.update(size=-1) for file in listing["siblings"]],
        lambda listing: [file.update(lfs=[1]) for file in listing["siblings"]],
    ],
)
def test_nonsense_of_the_hub(hub: FakeHub, edit: Callable[[dict[str, Any]], None]) -> None:
    """An answer that is no listing of a repo is the hub's error."""
    hub.edit_listing = edit
    with pytest.raises(HubUnreachable, match="does not answer like a hub"):
        ask(hub)


def test_no_size(hub: FakeHub) -> None:
    """A file of unknown size matters only where it is to be fetched."""
    hub.edit_listing = lambda listing: listing["siblings"][0].pop("size")
    assert ask(hub)
    hub.edit_listing = lambda listing: listing["siblings"][1].pop("size")
    with pytest.raises(HubUnreachable, match=r"no size of config\.json"):
        ask(hub)


def test_a_hostile_path(hub: FakeHub) -> None:
    """A repo with a path out of its folder is refused as a whole."""
    hub.edit_listing = lambda listing: listing["siblings"][0].update(rfilename="../../x.json")
    with pytest.raises(InvalidRequest, match="unsafe path"):
        ask(hub)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "ftp://127.0.0.1", "http://[", "x"])
def test_no_hub(endpoint: str) -> None:
    """Where no hub answers, the error says where it was looked for."""
    with pytest.raises(HubUnreachable) as error:
        resolve("org/m", None, None, None, endpoint, 5)
    assert error.value.message.startswith(endpoint)
