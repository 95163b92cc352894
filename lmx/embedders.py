"""Which models embed text, and how an MLX one makes its vector: told from their files alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .errors import ModelLoadFailed
from .mlx_folder import read_json

BERT: Final = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Encoders that the MLX backend has code for."""
# By mlx-lm's kind of name and llama.cpp's.
ENCODERS: Final = BERT | frozenset(
    "nomic_bert nomic-bert nomic-bert-moe modernbert modern-bert eurobert neobert neo-bert"
    " jina-bert-v2 jina-bert-v3 distilbert mpnet gemma-embedding".split()
)
# Conversions of decoders seldom keep the files of sentence-transformers.
_NAME: Final = re.compile(r"embedding|(?<![a-z0-9])(embed|e5|gte|bge)(?![a-z0-9])", re.IGNORECASE)
_RANK: Final = 4
"""llama.cpp's pooling type of rerankers."""
_BOTH_WAYS: Final = {"use_bidirectional_attention": True, "is_causal": False}
_POOLINGS: Final[dict[str, Literal["cls", "mean", "max", "last"]]] = {
    "cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "max_tokens": "max",
    "max": "max", "lasttoken": "last",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pooling:
    """From the hidden states of an input to one vector."""

    kind: Literal["cls", "mean", "max", "last"]
    normalize: bool = True


def mlx_embeds(path: Path, config: dict[str, Any]) -> bool:
    # Hugging Face's cache: models--publisher--repo/snapshots/commit.
    name = path.parents[1].name if path.parent.name == "snapshots" else path.name
    files = ("modules.json", "1_Pooling/config.json")
    return (
        config.get("model_type") in ENCODERS
        or any(os.path.exists(path / file) for file in files)
        or _NAME.search(name) is not None
    )


def gguf_embeds(path: Path, metadata: dict[str, Any]) -> bool:
    architecture = metadata.get("general.architecture")
    return (
        architecture in ENCODERS
        or bool(metadata.get(f"{architecture}.pooling_type"))
        or _NAME.search(path.name) is not None
    )


def check_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """
    Raises:
        ModelLoadFailed: it makes no vectors.
    """
    if metadata.get(f"{metadata.get('general.architecture')}.pooling_type") == _RANK:
        raise _refused(path, "a reranker, which makes no vectors")


def mlx_pooling(path: Path, config: dict[str, Any]) -> Pooling:
    """What modules.json says, which is sentence-transformers'; without it, what is usual.

    Raises:
        ModelLoadFailed: the MLX backend cannot serve this model, and why.
    """
    kind = config.get("model_type")
    if kind in ENCODERS - BERT:
        raise _refused(path, f"embedding models of type {kind} are not supported with MLX")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise _refused(path, f"position_embedding_type {config['position_embedding_type']!r:.50}")
    if kind not in ENCODERS and any(config.get(k) is value for k, value in _BOTH_WAYS.items()):
        raise _refused(path, "a decoder that attends both ways, which mlx-lm's code does not")
    if "ForSequenceClassification" in str(config.get("architectures")):
        raise _refused(path, "a classifier or reranker, which makes no vectors")
    file, normalize = path / "1_Pooling" / "config.json", True
    if os.path.exists(index := path / "modules.json"):
        try:
            modules = {m["type"].rpartition(".")[2]: str(m["path"]) for m in read_json(index)}
        except (LookupError, TypeError, AttributeError) as error:
            raise _refused(index, f"{type(error).__name__}: {error}") from error
        if strange := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise _refused(path, f"it has a module {min(strange)}, which is not supported")
        file = path / modules.get("Pooling", "1_Pooling") / "config.json"
        normalize = "Normalize" in modules
    if os.path.exists(file):
        return Pooling(_pooling_kind(file), normalize)
    return Pooling("mean" if kind in ENCODERS else "last", normalize)


def _pooling_kind(file: Path) -> Literal["cls", "mean", "max", "last"]:
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise _refused(file, "not a JSON object")
    prefix = "pooling_mode_"
    modes = [key for key, value in settings.items() if key.startswith(prefix) and value is True]
    chosen = [key.removeprefix(prefix) for key in modes]
    mode = settings.get("pooling_mode", chosen[0] if len(chosen) == 1 else chosen)
    if not isinstance(mode, str) or mode not in _POOLINGS:
        raise _refused(file, f"pooling by {mode!r:.100} is not supported")
    return _POOLINGS[mode]


def _refused(path: Path, reason: str) -> ModelLoadFailed:
    return ModelLoadFailed(f"{path}: {reason}")
