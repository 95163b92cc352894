"""An MLX model folder from a llama-architecture GGUF file whose tensors MLX reads natively.

One file then serves both engines: the tests' model on Linux, and on a Mac a GGUF that MLX runs
faster than llama.cpp does. Whatever cannot be carried over exactly is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from .errors import ConfigError, ModelLoadFailed
from .gguf_header import Header, read_header

T = TypeVar("T")

_BITS: Final = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_READABLE: Final = {"F32": 32, "F16": 16, **_BITS}.keys()
_GROUP_SIZE: Final = 32
_MODEL: Final = "tokenizer.ggml.model"

# Keys of `llama.*` that change nothing for a dense model, or are checked in another way. A key that
# is neither here nor read below may change the arithmetic, so it is refused.
_HARMLESS_KEYS: Final = {
    "llama.vocab_size", "llama.expert_count", "llama.expert_used_count", "llama.tensor_data_layout",
    "llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned",
}  # fmt: skip

# How text is split into words before the merges: `regex_exprs` in llama.cpp's llama-vocab.cpp,
# applied one after another.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3: Final = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: Final = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace("{1,3}", "")],
}
_IGNORE_MERGES: Final = {"llama-bpe"}
_BOS_BY_DEFAULT: Final = {"llama-bpe"}

# Token types of `tokenizer.ggml.token_type` (llama.h, `enum llama_token_type`).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# llama.cpp ends a generation at these too, because many files name only one end token.
_END_OF_TURN: Final = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_turn>", "</s>",
}  # fmt: skip


def convert(source: Path, target: Path, *, keep_quantized: bool | None = None) -> None:
    """Write the model in `source` to the folder `target`, all of it or nothing.

    With `keep_quantized` 4 and 8 bit weights stay as they are; without, all weights become float32,
    which MLX's CPU build multiplies some 50 times faster. None: quantized where there is Metal.

    Raises:
        ModelLoadFailed: the file is damaged, or holds something that has no exact counterpart.
        ConfigError: `target` exists and is not an empty folder.
    """
    import mlx.core as mx

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder")
    if keep_quantized is None:
        keep_quantized = mx.metal.is_available()
    gguf = _GGUF(source, read_header(source))
    config = _model_config(gguf)
    names = _tensor_names(gguf, config)
    tokenizer = _tokenizer(gguf)
    weights = _weights(gguf, names, config, keep_quantized)

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", config)
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(gguf))
        tokenizer.save(str(partial / "tokenizer.json"))
        mx.save_safetensors(str(partial / "model.safetensors"), weights, {"format": "mlx"})
        partial.rename(target)
    except OSError as error:
        raise ModelLoadFailed(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _GGUF:
    """A source file: its header, the keys asked for so far, and its name for error messages."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.metadata = header.metadata
        self.tensors = header.tensors
        self.keys_read = set(_HARMLESS_KEYS)

    def fail(self, reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{self.path} cannot be converted to MLX: {reason}")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        self.keys_read.add(key)
        value = self.metadata.get(key, default)
        if value is None:
            self.fail(f"it lacks {key}")
        if type(value) is not kind:
            self.fail(f"{key} is {value!r:.40}, expected {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        if (value := self.get(key, int, default)) <= 0:
            self.fail(f"{key} is {value}")
        return value

    def token_id(self, name: str, default: int = -1) -> int | None:
        """The id of the `bos`, `eos`... token; like llama.cpp, none where it is out of range."""
        token_id = self.get(f"tokenizer.ggml.{name}_token_id", int, default)
        return token_id if 0 <= token_id < len(self.get("tokenizer.ggml.tokens", list)) else None


def _model_config(gguf: _GGUF) -> dict[str, Any]:
    """config.json for mlx_lm.models.llama, without the quantization."""
    if (architecture := gguf.get("general.architecture", str)) != "llama":
        gguf.fail(f"its architecture is {architecture}, only llama is supported")
    if gguf.metadata.get("llama.expert_count"):
        gguf.fail("it is a mixture of experts")
    if gguf.metadata.get("split.count", 1) not in (0, 1):
        gguf.fail("it is one part of a split model")
    heads = gguf.positive("llama.attention.head_count")
    hidden = gguf.positive("llama.embedding_length")
    head_dim = gguf.positive("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if gguf.positive(key, head_dim) != head_dim or head_dim % 2:
            gguf.fail(f"{key} is not the even head dimension, {head_dim}")
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    rope_theta = gguf.get("llama.rope.freq_base", float, 10000.0)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": gguf.positive("llama.block_count"),
        "intermediate_size": gguf.positive("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.positive("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": gguf.get("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(gguf, head_dim, rope_theta),
        "max_position_embeddings": gguf.positive("llama.context_length"),
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.token_id("bos"),
        "eos_token_id": _end_ids(gguf, tokens),
    }
    for key in gguf.metadata:
        if key.startswith("llama.") and key not in gguf.keys_read:
            gguf.fail(f"it sets {key}, which MLX's llama has no place for")
    return config


def _end_ids(gguf: _GGUF, tokens: list[str]) -> list[int]:
    ids = {gguf.token_id("eos", 2 if gguf.metadata.get(_MODEL) == "llama" else -1)}
    ids |= {gguf.token_id("eot"), gguf.token_id("eom")}
    ids |= {i for i, token in enumerate(tokens) if token in _END_OF_TURN}
    if not (known := sorted(i for i in ids if i is not None)):
        gguf.fail("it names no token that ends an answer")
    return known


def _rope_scaling(gguf: _GGUF, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = gguf.get("llama.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        gguf.fail(f"its RoPE scaling is {kind}")
    legacy = gguf.get("llama.rope.scale_linear", float, 0.0)
    factor = gguf.get("llama.rope.scaling.factor", float, legacy)
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if info := gguf.tensors.get("rope_freqs.weight"):
        if linear or info.type != "F32" or info.shape != (head_dim // 2,):
            gguf.fail(f"unexpected rope_freqs.weight, {info.type} {info.shape}")
        with gguf.path.open("rb") as file:
            file.seek(info.offset)
            divisors = struct.unpack(f"<{head_dim // 2}f", file.read(info.size_bytes))
        return _llama3_scaling(gguf, theta, divisors)
    return {"rope_type": "linear", "factor": factor} if linear else None


def _llama3_scaling(
    gguf: _GGUF, theta: float, divisors: tuple[float, ...]
) -> dict[str, Any] | None:
    """The parameters behind a file's frequency divisors. llama.cpp stores only the divisors; every
    Llama 3.1 to 3.3 was made with the values here and a factor of its own, so recompute and compare
    (the formula: `generate_extra_tensors` in llama.cpp's conversion/llama.py)."""
    factor, low, high, context = max(divisors), 1.0, 4.0, 8192
    for i, divisor in enumerate(divisors):
        turns = context / (2 * math.pi * theta ** (i / len(divisors)))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            gguf.fail("its RoPE frequencies (rope_freqs.weight) are not those of Llama 3")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _tensor_names(gguf: _GGUF, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name to MLX module of every tensor, each of them there, readable and of its shape."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    if (layers := config["num_hidden_layers"]) > len(gguf.tensors):
        gguf.fail(f"it has {len(gguf.tensors)} tensors for {layers} layers")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("model.embed_tokens", (vocab, hidden)),
        "output_norm": ("model.norm", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        expected["output"] = ("lm_head", (vocab, hidden))
    for i in range(layers):
        expected |= {
            f"blk.{i}.{name}": (f"model.layers.{i}.{module}", shape)
            for name, module, shape in (
                ("attn_norm", "input_layernorm", (hidden,)),
                ("attn_q", "self_attn.q_proj", (queries, hidden)),
                ("attn_k", "self_attn.k_proj", (keys, hidden)),
                ("attn_v", "self_attn.v_proj", (keys, hidden)),
                ("attn_output", "self_attn.o_proj", (hidden, queries)),
                ("ffn_norm", "post_attention_layernorm", (hidden,)),
                ("ffn_gate", "mlp.gate_proj", (inner, hidden)),
                ("ffn_up", "mlp.up_proj", (inner, hidden)),
                ("ffn_down", "mlp.down_proj", (hidden, inner)),
            )
        }
    for name in gguf.tensors:
        if name.removesuffix(".weight") not in expected and name != "rope_freqs.weight":
            gguf.fail(f"MLX's llama has no place for tensor {name}")
    for name, (_, shape) in expected.items():
        if (info := gguf.tensors.get(f"{name}.weight")) is None:
            gguf.fail(f"it lacks tensor {name}.weight")
        if info.type not in (_READABLE if len(shape) == 2 else _READABLE - _BITS.keys()):
            gguf.fail(f"tensor {name}.weight is {info.type}; MLX reads {', '.join(_READABLE)}")
        if info.shape != shape:
            gguf.fail(f"tensor {name}.weight has shape {info.shape}, expected {shape}")
    return {name: module for name, (module, _) in expected.items()}


def _weights(
    gguf: _GGUF, names: dict[str, str], config: dict[str, Any], keep_quantized: bool
) -> dict[str, Any]:
    """The MLX arrays by name; adds `quantization` to `config` where weights stay quantized."""
    import mlx.core as mx

    try:
        arrays: Any = mx.load(str(gguf.path), format="gguf")
    except (RuntimeError, ValueError) as error:
        gguf.fail(str(error))
    # One dtype for all that is not quantized: a float32 norm would turn every activation into
    # float32. MLX computes in the dtype of the embeddings.
    embeddings = arrays.get("token_embd.scales", arrays["token_embd.weight"])
    dtype = embeddings.dtype if keep_quantized else mx.float32
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, Any] = {}
    quantized: dict[str, int] = {}
    for name, module in names.items():
        parts = {
            part: arrays.pop(f"{name}.{part}")
            for part in ("weight", "scales", "biases")
            if f"{name}.{part}" in arrays
        }
        if (kind := name.rpartition(".")[2]) in heads:
            parts = {part: _unpermute(array, heads[kind]) for part, array in parts.items()}
        if bits := _BITS.get(gguf.tensors[f"{name}.weight"].type):
            if keep_quantized:
                quantized[module] = bits
            else:
                scales, biases = (parts[part].astype(dtype) for part in ("scales", "biases"))
                parts = {
                    "weight": mx.dequantize(parts["weight"], scales, biases, _GROUP_SIZE, bits)
                }
        for part, array in parts.items():
            packed = array.dtype == mx.uint32
            weights[f"{module}.{part}"] = array if packed else array.astype(dtype)
    if quantized:
        common = Counter(quantized.values()).most_common(1)[0][0]
        config["quantization"] = {"group_size": _GROUP_SIZE, "bits": common} | {
            module: {"group_size": _GROUP_SIZE, "bits": bits}
            for module, bits in quantized.items()
            if bits != common
        }
    return weights


def _unpermute(array: Any, heads: int) -> Any:
    """Rows of q and k as MLX wants them. llama.cpp rotates neighbouring pairs, so its converter
    interleaves the two halves of every head (`LlamaModel.permute` in conversion/llama.py); a row
    keeps its own scales and biases, so these move alike."""
    interleaved = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return interleaved.swapaxes(1, 2).reshape(array.shape)


def _tokenizer(gguf: _GGUF) -> Any:
    import tokenizers as hf

    model = gguf.get(_MODEL, str)
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    types = gguf.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        gguf.fail("its vocabulary repeats tokens, or has not one type for each")
    if model == "gpt2":
        tokenizer = _byte_level_bpe(gguf, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece_bpe(gguf, tokens)
    else:
        gguf.fail(f"its tokenizer is {model}, known are gpt2 and llama")
    added = [
        hf.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in _END_OF_TURN
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _byte_level_bpe(gguf: _GGUF, tokens: list[str]) -> Any:
    import tokenizers as hf

    pre = gguf.get("tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        gguf.fail(f"its pre-tokenizer is {pre}, known are {', '.join(_PRE_TOKENIZERS)}")
    merges = []
    for merge in gguf.get("tokenizer.ggml.merges", list):
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
    bpe = hf.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre in _IGNORE_MERGES,
    )
    tokenizer = hf.Tokenizer(bpe)
    splits = [hf.pre_tokenizers.Split(hf.Regex(r), "isolated") for r in _PRE_TOKENIZERS[pre]]
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = hf.decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(gguf: _GGUF, tokens: list[str]) -> Any:
    """SentencePiece joins the neighbours whose joint token has the best score; a merge list ranked
    by score does the same."""
    import tokenizers as hf

    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = gguf.get("tokenizer.ggml.scores", list)
    merges = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    bpe = hf.models.BPE(
        vocab=vocabulary,
        merges=[(tokens[left], tokens[right]) for _, left, right in sorted(merges)],
        unk_token=tokens[gguf.token_id("unknown", 0) or 0],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = hf.Tokenizer(bpe)
    prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁")] * prefix + [hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        + [hf.decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer


def _tokenizer_config(gguf: _GGUF) -> dict[str, Any]:
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": gguf.positive("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := gguf.token_id(key)) is not None:
            config[f"{name}_token"] = tokens[token_id]
    if template := gguf.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    return config


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
