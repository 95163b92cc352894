from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import MODEL_REMAPPING

from lmx import catalog, inventory
from lmx.catalog import Model, find_models, named, remove
from lmx.config import ModelSettings
from lmx.errors import ModelLoadFailed
from lmx.kv_cache import KVCacheSize

from .folders import (
    CONFIG,
    config,
    gguf_file,
    home,
    ids,
    mlx_folder,
    put,
    safetensors_file,
)

__all__ = ["home"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mlx-community/Qwen2-VL-7B-Instruct-4bit"], ["qwen2-vl-7b-instruct"]),
        (["lmstudio-community/Qwen3.8-27B-MLX-8bit"], ["qwen3.8-27b-mlx"]),
        (["jedisct1/Ornith-1.0-35B-MLX-oQ8"], ["ornith-1.0-35b-mlx-oq8"]),
        (["mlx-community/MiniMax-M3-4bit"], ["minimax-m3"]),
        (["l/X-GGUF/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"], ["meta-llama-3.1-8b-instruct"]),
        (["a/b/SmolLM2-135M-Instruct.Q4_1.gguf"], ["smollm2-135m-instruct"]),
        (["a/b/x-IQ4_XS.gguf", "a/b/mmproj-x-f16.gguf"], ["x"]),
        (["a/b/x-Q8_0-00001-of-00002.gguf", "a/b/x-Q8_0-00002-of-00002.gguf"], ["x"]),
        (["a/b/Q8_0/x-Q8_0.gguf"], ["x"]),
        (["a/b/x-Q4_K_M.gguf", "a/b/x-Q8_0.gguf"], ["x", "x@q8_0"]),
        (["p/m-4bit", "p/m-8bit"], ["m", "m@8bit"]),
        (["p/m-4bit", "a/m-GGUF/m-Q4_K_M.gguf"], ["m", "m@q4_k_m"]),
        (["p/m-4bit", "q/m-4bit", "r/m-4bit"], ["m", "m@4bit", "r/m-4bit/m-4bit"]),
        (["p/m", "q/m/m.gguf", "r/m/m.gguf"], ["m", "m@gguf", "r/m/m.gguf"]),
    ],
    ids=str,
)
def test_ids_follow_lm_studio(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    """Lower case, no quantization, `-mlx` kept; a clash adds the quantization; MLX comes first."""
    assert ids(put(tmp_path, *names)) == sorted(expected)


def test_ids_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    """The same files have the same ids, in whatever order they came."""
    names = ["p/m-4bit", "q/m-4bit", "r/m-4bit", "a/m/m-Q8_0.gguf", "b/m/m-Q8_0.gguf", "p/n"]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(names)
        root = put(tmp_path / str(seed), *names)
        models = find_models(config(root))
        found.append({model.id: str(model.path.relative_to(root)) for model in models})
    assert found[0] == found[1] == found[2] and len(found[0]) == len(names)


@pytest.mark.parametrize(
    "files",
    [
        ["a/b/config.json"],
        ["a/b/model.safetensors"],
        ["a/b/readme.md", "a/x.gguf", ".cache/b/x.gguf", "a/.b/x.gguf", "a/b/.x.gguf"],
        ["a/b/downloading_x.gguf.part", "a/b/config.json", "a/b/downloading_m.safetensors.part"],
        ["a/b/x-00002-of-00003.gguf"],
    ],
    ids=str,
)
def test_what_is_no_model_is_not_listed(tmp_path: Path, files: list[str]) -> None:
    """Half a model, a file in the wrong place or a partial download is not offered."""
    for name in ["o/own/own.gguf", *files]:
        gguf_file(tmp_path / name)
    assert ids(tmp_path) == ["own"]


def test_the_embedded_model_stands_in_for_an_empty_folder(tmp_path: Path) -> None:
    """With no models of one's own there is SmolLM2, to be converted to MLX beside the folder."""
    [model] = find_models(config(tmp_path / "models"))
    assert (model.id, model.format) == ("smollm2-135m-instruct", "mlx")
    assert model.convert_from is not None and model.convert_from.suffix == ".gguf"
    assert model.path.parent == tmp_path / "embedded"
    mlx_folder(model.path)  # as if it had been converted
    [converted] = find_models(config(tmp_path / "models"))
    assert (converted.id, converted.size_bytes, converted.error) == (model.id, 128, None)
    assert ids(put(tmp_path / "models", "a/own")) == ["own"]


def test_facts_of_an_mlx_model(tmp_path: Path) -> None:
    """Kind, sizes and context come from config.json and the headers of the weights."""
    folder = mlx_folder(tmp_path / "p" / "m-4bit", quantization={"bits": 4, "group_size": 64})
    tensors = {"a.weight": ("U32", (8, 8), 256), "a.scales": ("F16", (8, 1), 16)}
    safetensors_file(folder / "model-2.safetensors", tensors)
    [model] = find_models(config(tmp_path))
    assert model == Model(
        id="m",
        path=folder,
        format="mlx",
        publisher="p",
        repo="m-4bit",
        quantization="4bit",
        created=int(folder.stat().st_mtime),
        architecture="llama",
        size_bytes=128 + 272,
        parameters=64 + 8 * 64,
        context_length=2048,
        kv_cache=KVCacheSize(((2 * 2 * 16 * 2, None),) * 2),
        removable=True,
    )


def test_facts_of_a_gguf_model(tmp_path: Path) -> None:
    """Kind, sizes and context come from the header; the sizes are of all parts."""
    parts = [gguf_file(tmp_path / f"p/m/m-Q8_0-0000{i}-of-00002.gguf") for i in (1, 2)]
    [model] = find_models(config(tmp_path))
    assert (model.id, model.path, model.quantization, model.error) == ("m", parts[0], "q8_0", None)
    assert model.size_bytes == sum(part.stat().st_size for part in parts)
    assert (model.parameters, model.context_length, model.architecture) == (128, 2048, "llama")
    assert model.kv_cache and model.kv_cache.layers == ((128, None),) * 2


def test_heads_of_each_layer_are_read(tmp_path: Path) -> None:
    """Arrays that matter for the KV cache are read though vocabularies are skipped."""
    key = "llama__attention__head_count_kv"
    gguf_file(tmp_path / "p/m/m.gguf", **{key: [2, 1], "tokenizer__ggml__tokens": ["a", "b"]})
    [model] = find_models(config(tmp_path))
    assert model.kv_cache and model.kv_cache.layers == ((128, None), (64, None))


Damage = Callable[[Path], object]


def settings(**values: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | values))


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def header(length: int) -> Damage:
    data = struct.pack("<Q", length) + b"{}"
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (settings(model_type="xlstm"), "mlx-lm knows no model_type 'xlstm'"),
        (settings(model_type="../../evil"), "mlx-lm knows no model_type"),
        (settings(model_type=None), "mlx-lm knows no model_type"),
        (settings(model_type="modernbert"), "of type modernbert are not supported"),
        (settings(model_type="bert", position_embedding_type="alibi"), "alibi"),
        (text("modules.json", '[{"type": "x.Dense", "path": "2_Dense"}]'), "a module Dense"),
        (text("modules.json", "[]"), None),
        (settings(model_type="bert"), None),
        (settings(model_file="evil.py"), "which LMX never does"),
        (text("config.json", "[]"), "not a JSON object"),
        (text("config.json", "1"), "not a JSON object"),
        (text("config.json", "NaN"), "not a JSON object"),
        (text("config.json", "[" * 100_000), "config.json"),
        (text("config.json", "\ud800".encode(errors="surrogatepass").decode("latin1")), "config"),
        (text("model.safetensors", "{}"), "model.safetensors"),
        (header(2**63), "longer than the file"),
        (header(0), "model.safetensors"),
        (text("model.safetensors.index.json", "[" * 100_000), "index.json"),
        (text("model.safetensors.index.json", '{"weight_map": {"a": 1}}'), "index.json"),
        (text("model.safetensors.index.json", '{"weight_map": {"a": "b"}}'), "missing, but named"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors"),
            "no model",
        ),
        (lambda folder: os.mkfifo(folder / "model-2.safetensors"), "not a file"),
        (lambda folder: (folder / "model-2.safetensors").mkdir(), "not a file"),
        (settings(quantization={"bits": 0}), None),
        (settings(quantization=[1]), None),
        (settings(model_type="mistral"), None),
        (settings(hidden_size="x", num_attention_heads=0, num_hidden_layers=10**15), None),
    ],
)
def test_an_mlx_model_that_cannot_be_loaded_says_why(
    tmp_path: Path, damage: Damage, error: str | None
) -> None:
    """Whatever is wrong with a folder, it is listed, with the reason."""
    folder = mlx_folder(tmp_path / "p" / "m")
    damage(folder)
    [model] = find_models(config(tmp_path))
    assert (model.error is None) == (error is None) and (error or "") in (model.error or "")
    assert model.usable == (error is None)


@pytest.mark.parametrize(
    ("name", "metadata", "error"),
    [
        ("x.gguf", {"llama__pooling_type": 4}, "a reranker"),
        ("x.gguf", {"general__architecture": 7}, "general.architecture is 7"),
        ("x-00001-of-00003.gguf", {}, "of 3 parts there are 1"),
        ("x-00001-of-99999.gguf", {}, "of 99999 parts there are 1"),
    ],
)
def test_a_gguf_model_that_cannot_be_loaded_says_why(
    tmp_path: Path, name: str, metadata: dict[str, Any], error: str
) -> None:
    """Rerankers, missing parts and damaged headers are named."""
    gguf_file(tmp_path / "p/m" / name, **metadata)
    [model] = find_models(config(tmp_path))
    assert error in (model.error or "") and not model.usable
    assert (model.id, model.kind) == ("x", "chat")


@pytest.mark.parametrize(
    ("name", "facts", "embeds"),
    [
        ("p/x/x.gguf", {"general__architecture": "bert"}, True),
        ("p/x/x.gguf", {"general__architecture": "nomic-bert"}, True),
        ("p/x/x.gguf", {"llama__pooling_type": 1}, True),
        ("p/x/x.gguf", {"llama__pooling_type": 0}, False),
        ("p/x/Qwen3-Embedding-0.6B-Q8_0.gguf", {}, True),
        ("p/x-embedding/x.gguf", {}, False),
        ("p/x", {"model_type": "xlm-roberta"}, True),
        ("p/x", {}, False),
        ("p/Qwen3-Embedding-0.6B-4bit-DWQ", {}, True),
        ("p/e5-mistral-7b-instruct-4bit", {}, True),
        ("p/gte-Qwen2-1.5B-instruct-4bit", {}, True),
        ("p/Linq-Embed-Mistral", {}, True),
        ("p/SmolLM2-1.7B-gte5-Instruct", {}, False),
        ("p/Embedded-Coder-7B", {}, False),
    ],
)
def test_embedding_models_are_known(
    tmp_path: Path, name: str, facts: dict[str, Any], embeds: bool
) -> None:
    """By architecture, pooling or name, which their ids then tell; MLX keeps no KV of them."""
    make = gguf_file if name.endswith(".gguf") else mlx_folder
    make(tmp_path / name, **facts)
    [model] = find_models(config(tmp_path))
    assert (model.kind, model.error) == ("embedding" if embeds else "chat", None)
    assert model.id.startswith("text-embedding-") == embeds
    assert (model.kv_cache is None) == (embeds and model.format == "mlx")


def test_sentence_transformers_files_make_a_decoder_an_embedder(tmp_path: Path) -> None:
    """Whatever its name."""
    (mlx_folder(tmp_path / "p" / "x") / "1_Pooling").mkdir()
    (tmp_path / "p/x/1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    [model] = find_models(config(tmp_path))
    assert (model.kind, model.error) == ("embedding", None)


def test_a_name_in_hugging_faces_cache_is_the_repositorys(tmp_path: Path, home: Path) -> None:
    """The folder of the files has a commit's."""
    hub = home / ".cache/huggingface/hub"
    mlx_folder(hub / "models--p--Qwen3-Embedding-0.6B-4bit/snapshots/c0ffee")
    [model] = find_models(config(tmp_path / "none", "huggingface"))
    assert (model.id, model.kind) == ("text-embedding-qwen3-embedding-0.6b", "embedding")


def test_a_damaged_part_is_found(tmp_path: Path) -> None:
    """All parts of a split model are read."""
    for i in (1, 2):
        gguf_file(tmp_path / f"p/m/m-0000{i}-of-00002.gguf")
    (tmp_path / "p/m/m-00002-of-00002.gguf").write_bytes(b"GGUF")
    [model] = find_models(config(tmp_path))
    assert model.error and "m-00002-of-00002.gguf: not a usable GGUF file" in model.error


def test_the_remapped_types_are_mlx_lms() -> None:
    """The model types served with the code of another are those of the installed mlx-lm."""
    assert catalog.REMAPPED == set(MODEL_REMAPPING)


def test_mlx_lm_is_not_imported(tmp_path: Path) -> None:
    """The server finds out what mlx-lm can load without importing it."""
    put(tmp_path, "p/m")
    code = (
        "import sys; from lmx.catalog import find_models; from lmx.config import Config;"
        f"[m] = find_models(Config(models_dir={str(tmp_path)!r}, model_roots=()));"
        "print(m.error, sys.modules.keys() & {'mlx', 'mlx_lm', 'numpy', 'llama_cpp'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("None set()\n", "")


def test_ids_are_unique_over_all_roots(tmp_path: Path) -> None:
    """Copies of one model in several places have ids of their own; LMX's folder comes first."""
    roots = [put(tmp_path / name, "p/m-4bit", "p/g/g.gguf") for name in "abcde"]
    models = {model.id: model for model in find_models(config(*roots))}
    assert models["m"].path == roots[0] / "p/m-4bit" and models["m"].removable
    assert sorted(models) == sorted(
        "m m@4bit p/m-4bit/m-4bit p/m-4bit/m-4bit:2 p/m-4bit/m-4bit:3"
        " g g@gguf p/g/g.gguf p/g/g.gguf:2 p/g/g.gguf:3".split()
    )


# Fallbacks


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("q/M-8B-4bit", True),
        ("q/M-8B-MLX-8bit", True),
        ("q/m-8b", True),
        ("q/M-8B-Instruct-4bit", False),
        ("q/M-8B-6bit-MLX", False),
    ],
)
def test_a_gguf_twin_is_the_fallback(tmp_path: Path, name: str, twin: bool) -> None:
    """Of the same name but for format and quantization; the first that can be loaded."""
    put(tmp_path, name, "p/M-8B-GGUF/M-8B-Q8_0.gguf", "p/M-8B-GGUF/M-8B-IQ3_XS.gguf")
    (tmp_path / "p/M-8B-GGUF/M-8B-IQ3_XS.gguf").write_bytes(b"")
    [model] = [m for m in find_models(config(tmp_path)) if m.format == "mlx"]
    path = tmp_path / "p/M-8B-GGUF/M-8B-Q8_0.gguf"
    assert (model.fallback.path if model.fallback else None) == (path if twin else None)


def test_a_fallback_makes_a_model_usable(tmp_path: Path) -> None:
    """What mlx-lm does not know is still offered where llama.cpp can serve it."""
    mlx_folder(tmp_path / "p" / "m", model_type="xlstm")
    put(tmp_path, "q/m/m-Q8_0.gguf")
    model = named("m", find_models(config(tmp_path)))
    assert model and model.error and model.usable and model.format == "mlx"


def test_embedding_models_fall_back_to_their_own_kind(tmp_path: Path) -> None:
    """What MLX cannot embed llama.cpp does; a chat model of that name is another model."""
    mlx_folder(tmp_path / "p" / "m", model_type="modernbert")
    gguf_file(tmp_path / "q/m/m-Q4_0.gguf")
    gguf_file(tmp_path / "q/m/m-Q8_0.gguf", general__architecture="modern-bert")
    model = named("text-embedding-m", find_models(config(tmp_path)))
    assert model and model.format == "mlx" and model.error and model.usable
    assert model.fallback and model.fallback.path.name == "m-Q8_0.gguf"


def test_the_configuration_chooses_the_weights(tmp_path: Path) -> None:
    """`backend` takes one format and no other, under the same id."""
    put(tmp_path, "p/m-4bit", "q/m/m-Q8_0.gguf", "p/alone", "p/g/g.gguf")

    def chosen(backend: Any) -> dict[str, Model]:
        settings = ModelSettings(backend=backend)
        models = find_models(config(tmp_path, m=settings, alone=settings, g=settings))
        assert [m.id for m in models] == ["alone", "g", "m", "m@q8_0"]
        return {model.id: model for model in models}

    both, mlx, gguf = chosen(None), chosen("mlx"), chosen("gguf")
    twin = both["m@q8_0"]
    assert both["m"].fallback == twin
    assert mlx["m"].format == "mlx" and mlx["m"].fallback is None
    assert gguf["m"].path == twin.path and (gguf["m"].format, gguf["m"].fallback) == ("gguf", None)
    assert mlx["alone"].usable and gguf["g"].usable
    assert "gguf" in (gguf["alone"].error or "") and "mlx" in (mlx["g"].error or "")


# Anything on disk


def test_an_unchanged_disk_is_not_read_again(tmp_path: Path) -> None:
    """The second scan looks at sizes and times only; a change of either is seen."""
    put(tmp_path, "p/m", "q/g/g.gguf")
    first = find_models(config(tmp_path))
    files = [tmp_path / "p/m/model.safetensors", tmp_path / "q/g/g.gguf"]
    sound = [path.read_bytes() for path in files]
    for path in files:
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert find_models(config(tmp_path)) == first
    for path in files:
        os.utime(path, ns=(0, 0))
    broken = find_models(config(tmp_path))
    assert all(model.error for model in broken)
    for path, data in zip(files, sound, strict=True):
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
    assert [m.error for m in find_models(config(tmp_path))] == [m.error for m in broken]


def test_a_disk_that_fails_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read for reasons of the system's is no lasting error of the model."""
    put(tmp_path, "q/g/g.gguf")

    def fail(path: Path, *, arrays: bool) -> None:
        raise ModelLoadFailed(f"cannot read {path}") from OSError("I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "read_header", fail)
        [model] = find_models(config(tmp_path))
        assert model.error and "cannot read" in model.error
    [model] = find_models(config(tmp_path))
    assert model.error is None


def test_a_scan_survives_anything(tmp_path: Path) -> None:
    """No file, folder, link or name stops the models beside it from being found."""
    root = put(tmp_path / "models", "p/good", "z/good2/g.gguf")
    folder = root / "p" / "odd"
    folder.mkdir()
    (folder / "dangling.gguf").symlink_to("nowhere.gguf")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (root / "loop").symlink_to(root / "loop")
    (folder / "inner").symlink_to(folder)
    os.mkfifo(folder / "pipe.gguf")
    os.mkfifo(folder / "config.json")
    (folder / "folder.gguf").mkdir()
    (folder / "model.safetensors").mkdir()
    with (folder / "huge.gguf").open("wb") as file:
        file.truncate(10 * 2**30)
    with (folder / "lying.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"\xff" * 100)
        file.truncate(10 * 2**30)
    for name in (b"\xff\xfe", b"\xff.gguf", b"x\xff"):
        os.mkdir(os.path.join(os.fsencode(folder), name))
        (Path(os.fsdecode(os.path.join(os.fsencode(folder), name))) / "x.gguf").write_bytes(b"")
    os.mkdir(os.path.join(os.fsencode(root), b"\xff"))
    (folder / "\u202e\n.gguf").write_bytes(b"GGUF")
    closed = root / "closed"
    put(closed, "m")
    closed.chmod(0)
    try:
        models = find_models(config(root, root / "p" / "good" / "config.json", "\0", "~nobody/x"))
    finally:
        closed.chmod(0o700)
    assert {"good", "g", "huge", "lying"} <= {model.id for model in models}
    assert all(model.id.encode() for model in models)
    assert [m.id for m in models if m.usable and m.publisher != "closed"] == ["g", "good"]


def test_files_may_vanish_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that goes away while it is looked at is left out."""
    root = put(tmp_path, "p/m", "p/g/g.gguf", "p/stays")
    real = os.listdir

    def list_then_delete(path: Any) -> list[str]:
        names = real(path)
        if Path(path).name in ("m", "g"):
            for name in names:
                (Path(path) / name).unlink()
        return names

    monkeypatch.setattr(os, "listdir", list_then_delete)
    assert ids(root) == ["stays"]


# Names and removal


@pytest.mark.parametrize("name", ["m", "M", "pub/M-4bit", "PUB/m-4BIT", "M-4bit", "pub/m"])
def test_models_are_named_in_any_case(tmp_path: Path, name: str) -> None:
    """By id, publisher/repo, repo or publisher/id."""
    model = named(name, find_models(config(put(tmp_path, "pub/M-4bit"))))
    assert model and model.id == "m"
    assert named("pub", [model]) is None


def test_removing_a_model_removes_its_folder(tmp_path: Path) -> None:
    """And the publisher's, once that is empty."""
    root = put(tmp_path / "models", "p/m", "p/g/Q8_0/g-Q8_0.gguf")
    for id, left in (("m", ["p"]), ("g", [])):
        model = named(id, find_models(config(root)))
        assert model is not None
        remove(model)
        assert [path.name for path in root.iterdir()] == left
    assert root.exists()


def test_removing_a_model_leaves_others_in_its_folder(tmp_path: Path) -> None:
    """Only its own parts go, from the manifest too."""
    parts = [f"p/g/g-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    root = put(tmp_path / "models", "p/g", "p/g/g-Q4_0.gguf", "p/g/mmproj.gguf", *parts)
    folder = root / "p" / "g"
    files = {path.name: inventory.Entry(1, None) for path in folder.iterdir()}
    inventory.write(folder, inventory.Manifest("p/g", "0" * 40, files))
    models = {model.quantization or model.format: model for model in find_models(config(root))}
    remove(models["q8_0"])
    manifest = inventory.read(folder)
    kept = {"config.json", "g-Q4_0.gguf", "mmproj.gguf", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} - {inventory.NAME} == kept
    assert manifest and set(manifest.files) == kept
    remove(models["mlx"])
    assert [model.quantization for model in find_models(config(root))] == ["q4_0"]
    remove(models["q4_0"])
    assert not folder.exists()
