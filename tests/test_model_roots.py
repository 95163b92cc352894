"""Where models are looked for: LM Studio's folder, Hugging Face's cache, links."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lmx.catalog import find_models

from .folders import config, gguf_file, home, ids, mlx_folder, put

__all__ = ["home"]


# LM Studio's folder


def index(home: Path, *entries: object) -> None:
    folder = home / ".internal"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-index-cache.json").write_text(json.dumps({"models": entries}))


def entry(path: Path, id: object) -> dict[str, Any]:
    return {
        "defaultIdentifier": id,
        "entryPoint": {"absPath": str(path)},
        "containingDirAbsolutePath": str(path if path.is_dir() else path.parent),
    }


@pytest.mark.parametrize("place", [".lmstudio", ".cache/lm-studio", "elsewhere"])
def test_lm_studios_home_is_found(tmp_path: Path, home: Path, place: str) -> None:
    """In its usual place, the old one, or where the pointer file says."""
    put(home / ".lmstudio" / "models", "p/usual")
    put(home / place / "models", f"p/{Path(place).name.strip('.')}")
    if place == "elsewhere":
        (home / ".lmstudio-home-pointer").write_text(f"{home / place}\n")
    [model] = [m for m in find_models(config(tmp_path / "none", "lmstudio")) if m.repo != "usual"]
    assert model.path.is_relative_to(home / place) and not model.removable


def test_lm_studios_folder_may_have_moved(tmp_path: Path, home: Path) -> None:
    """`downloadsFolder` of its settings is where its models are."""
    put(tmp_path / "big disk", "p/m")
    (home / ".lmstudio").mkdir()
    moved = {"downloadsFolder": str(tmp_path / "big disk")}
    (home / ".lmstudio" / "settings.json").write_text(json.dumps(moved))
    assert ids(tmp_path / "none", "lmstudio") == ["m"]


def test_lm_studios_own_ids_win(tmp_path: Path, home: Path) -> None:
    """Its index names its models exactly."""
    root = put(home / ".lmstudio" / "models", "p/m-4bit", "p/g/g-Q8_0.gguf", "p/g/g-Q4_0.gguf")
    put(root, "p/e/e.gguf", "p/new")
    index(
        home / ".lmstudio",
        entry(root / "p/m-4bit", "qwen/m"),
        entry(root / "p/g/g-Q8_0.gguf", "shared"),
        entry(root / "p/g/g-Q4_0.gguf", "shared"),
        entry(root / "p/e/e.gguf", "text-embedding-e"),
        entry(root / "p/gone.gguf", "gone"),
    )
    own = put(tmp_path / "own", "x/shared", "y/new")
    models = {m.id: m for m in find_models(config(own, "lmstudio"))}
    assert models["qwen/m"].repo == "m-4bit" and models["shared"].quantization == "q4_0"
    assert models["g"].quantization == "q8_0"
    assert models["text-embedding-e"].path == root / "p/e/e.gguf"
    assert models["shared@mlx"].path == own / "x/shared"
    assert models["new"].path == own / "y/new" and models["new@mlx"].path == root / "p/new"
    assert len(models) == 7


def test_lm_studios_folder_may_be_lmxs_own(tmp_path: Path, home: Path) -> None:
    """One folder in both roles: each model once, removable, under LM Studio's id."""
    root = put(home / ".lmstudio" / "models", "p/m-4bit")
    index(home / ".lmstudio", entry(root / "p/m-4bit", "exact"))
    [model] = find_models(config(root, "lmstudio", root))
    assert model.id == "exact" and model.removable


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"models": 5}',
        '{"models": [5, null, {}, {"entryPoint": {"absPath": 5}}]}',
        '{"models": [{"entryPoint": {"absPath": "a\\u0000.gguf"}, "defaultIdentifier": "x"}]}',
        '{"models": [{"entryPoint": "x", "defaultIdentifier": "x"}]}',
    ],
)
def test_a_damaged_index_means_derived_ids(tmp_path: Path, home: Path, content: str) -> None:
    """LM Studio's index is another program's private file: anything may be in it."""
    put(home / ".lmstudio" / "models", "p/m-4bit")
    (home / ".lmstudio" / ".internal").mkdir()
    (home / ".lmstudio" / ".internal" / "model-index-cache.json").write_text(content)
    (home / ".lmstudio" / "settings.json").write_text(content)
    assert ids(tmp_path / "none", "lmstudio") == ["m"]


@pytest.mark.parametrize("id", ["", 5, None, "\ud800", "a\nb"])
def test_an_odd_id_in_the_index_is_ignored(tmp_path: Path, home: Path, id: object) -> None:
    """What is no printable name is not taken for one."""
    root = put(home / ".lmstudio" / "models", "p/m-4bit")
    index(home / ".lmstudio", entry(root / "p/m-4bit", id))
    assert ids(tmp_path / "none", "lmstudio") == ["m"]


# Hugging Face's cache


def hub_model(hub: Path, repo: str, commit: str, ref: str | None, **values: Any) -> Path:
    """A snapshot whose files are links to blobs, as huggingface_hub makes it."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = mlx_folder(folder / "snapshots" / commit, **values)
    (folder / "blobs").mkdir(exist_ok=True)
    for path in list(snapshot.iterdir()):
        blob = folder / "blobs" / f"{commit}-{path.name}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(ref)
    return snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", None])
def test_the_hugging_face_cache(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    """Its place is Hugging Face's own choice; its links into itself are right."""
    hub = home / ".cache/huggingface/hub"
    if variable is not None:
        hub = tmp_path / "hf" / "hub"
        monkeypatch.setenv(variable, str(hub if variable == "HF_HUB_CACHE" else hub.parent))
    snapshot = hub_model(hub, "org/M-x-4bit", "abc", "abc")
    [model] = find_models(config(tmp_path / "none", "huggingface"))
    assert (model.publisher, model.repo, model.path) == ("org", "M-x-4bit", snapshot)
    assert (model.id, model.error, model.removable) == ("m-x", None, False)


def test_the_current_snapshot_is_used(tmp_path: Path, home: Path) -> None:
    """What refs/main names, and the newest where it names nothing that is there."""
    hub = home / ".cache/huggingface/hub"
    for repo, ref in (("o/a", "old"), ("o/b", "../../.."), ("o/c", None), ("o/d", "\0")):
        for age, commit in enumerate(("new", "old")):
            os.utime(hub_model(hub, repo, commit, ref), (1e9 - age, 1e9 - age))
    found = {m.repo: m.path.name for m in find_models(config(tmp_path / "none", "huggingface"))}
    assert found == {"a": "old", "b": "new", "c": "new", "d": "new"}


def test_other_things_in_the_cache_are_left_out(tmp_path: Path, home: Path) -> None:
    """A cache also holds data sets, speech and image models: they are no broken language models."""
    hub = home / ".cache/huggingface/hub"
    hub_model(hub, "o/good", "c", "c")
    hub_model(hub, "o/broken", "c", "c", model_file="x.py")
    hub_model(hub, "o/whisper", "c", "c", model_type="whisper")
    hub_model(hub, "o/no-type", "c", "c", model_type=None)
    hub_model(hub, "o/minilm", "c", "c", model_type="bert")
    snapshot = hub_model(hub, "o/vae", "c", "c")
    (snapshot / "model.safetensors").rename(snapshot / "diffusion.safetensors")
    gguf_file(hub / "models--o--gguf/snapshots/c/Q8_0/g-Q8_0.gguf")
    (hub / "models--o--empty").mkdir()
    (hub / "models--o--file").write_text("")
    mlx_folder(hub / "datasets--o--data" / "snapshots" / "c")
    mlx_folder(hub / "o" / "flat")
    assert ids(tmp_path / "none", "huggingface") == ["broken", "g", "good", "text-embedding-minilm"]


# Several roots


def test_a_link_out_of_its_root_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders, files and weights that are elsewhere in truth are not served; one line says so."""
    secret = put(tmp_path / "elsewhere", "p/m", "p/g/g.gguf")
    root = put(tmp_path / "models", "p/own", "p/weights", "p/parts/x-00001-of-00002.gguf")
    (root / "linked").symlink_to(secret / "p")
    (root / "p" / "m").symlink_to(secret / "p" / "m")
    (root / "p" / "own" / "g.gguf").symlink_to(secret / "p/g/g.gguf")
    (root / "p/parts/x-00002-of-00002.gguf").symlink_to(secret / "p/g/g.gguf")
    (root / "p" / "weights" / "model.safetensors").unlink()
    (root / "p" / "weights" / "model.safetensors").symlink_to(secret / "p/m/model.safetensors")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            models = {model.id: model.error for model in find_models(config(root))}
    assert list(models) == ["own", "x"] and models["own"] is None
    assert len(caplog.messages) == 5
    assert all("a link to outside of" in message for message in caplog.messages)


def test_a_link_within_its_root_is_followed(tmp_path: Path) -> None:
    """The same files under two names are one model."""
    root = put(tmp_path / "models", "p/m")
    (root / "q").symlink_to(root / "p")
    (root / "p" / "again").symlink_to(root / "p" / "m")
    (root / "p" / "up").symlink_to(root)
    (tmp_path / "linked").symlink_to(root)
    assert ids(tmp_path / "linked", root, tmp_path / "nowhere") == ["again"]
