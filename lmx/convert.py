"""An MLX model folder from a llama-architecture GGUF file whose tensors MLX reads natively.

One file then serves both engines. Whatever cannot be carried over exactly is refused.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError, ModelLoadFailed
from .gguf_header import Header, read_header
from .gguf_tokenizer import build_tokenizer, end_token_ids, token_id, tokenizer_config

# What mx.load gives for each tensor type: packed integers with scales and biases, or floats (for
# BF16 and Q6_K float16). MLX 0.32.4 reads Q4_K too, but wrongly, and Q2_K.
_PACKED_BITS: Final = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_FLOATS: Final = ("F32", "F16")
_MATRICES: Final = (*_FLOATS, *_PACKED_BITS, "BF16", "Q6_K")
_GROUP_SIZE: Final = 32

# Any other key of `llama.*` may change the arithmetic, so it is refused.
_KNOWN_KEYS: Final = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count", "context_length",
    "embedding_length", "expert_count", "expert_used_count", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type",
    "tensor_data_layout", "vocab_size",
}  # fmt: skip


def convert(source: Path, target: Path, *, keep_quantized: bool | None = None) -> None:
    """Write the model in `source` to the folder `target`, all of it or nothing.

    With `keep_quantized`, 4 and 8 bit weights stay as they are; without, all weights become
    float32, which MLX's CPU build multiplies some 50 times faster. None: quantized if on Metal.

    Raises:
        ModelLoadFailed: the file is damaged, or something in it has no exact counterpart.
        ConfigError: `target` is not free.
    """
    import mlx.core as mx

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder")
    if keep_quantized is None:
        keep_quantized = mx.metal.is_available()
    header = read_header(source)
    config = _model_config(header)
    names = _tensor_names(header, config)
    tokenizer = build_tokenizer(header)
    weights = _weights(header, names, config, keep_quantized)

    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lmx-convert-", dir=parent) as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            _write_json(folder / "config.json", config)
            _write_json(folder / "tokenizer_config.json", tokenizer_config(header))
            tokenizer.save(str(folder / "tokenizer.json"))
            mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
            folder.rename(target)
    except (OSError, RuntimeError) as error:  # RuntimeError is how MLX says that it cannot write
        raise ModelLoadFailed(f"cannot write {target}: {error}") from error


def _model_config(header: Header) -> dict[str, Any]:
    """config.json for mlx_lm.models.llama, without the quantization."""
    if (architecture := header.get("general.architecture", str)) != "llama":
        header.fail(f"its architecture is {architecture}; only llama can be converted")
    for key in header.metadata:
        if key.startswith("llama.") and key.removeprefix("llama.") not in _KNOWN_KEYS:
            header.fail(f"it sets {key}, which MLX's llama does not know")
    if header.metadata.get("llama.expert_count"):
        header.fail("it is a mixture of experts, which cannot be converted")
    if header.metadata.get("split.count", 1) not in (0, 1):
        header.fail("it is one part of a split model; join the parts first")
    heads = _positive(header, "llama.attention.head_count")
    hidden = _positive(header, "llama.embedding_length")
    head_dim = _positive(header, "llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _positive(header, key, head_dim) != head_dim or head_dim % 2:
            header.fail(f"{key} is not the head dimension {head_dim}, or that is odd")
    if not 0 < (rope_theta := header.get("llama.rope.freq_base", float, 10000.0)) < math.inf:
        header.fail(f"llama.rope.freq_base is {rope_theta}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": _positive(header, "llama.block_count"),
        "intermediate_size": _positive(header, "llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _positive(header, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": header.get("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(header, head_dim, rope_theta),
        "max_position_embeddings": _positive(header, "llama.context_length"),
        "vocab_size": len(header.get("tokenizer.ggml.tokens", list)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": token_id(header, "bos"),
        "eos_token_id": end_token_ids(header),
    }


def _positive(header: Header, key: str, default: int | None = None) -> int:
    if (value := header.get(key, int, default)) <= 0:
        header.fail(f"{key} is {value}")
    return value


def _rope_scaling(header: Header, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = header.get("llama.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        header.fail(f"its RoPE scaling is {kind}; only linear and Llama 3's can be converted")
    legacy = header.get("llama.rope.scale_linear", float, 0.0)
    factor = header.get("llama.rope.scaling.factor", float, legacy)
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if (info := header.tensors.get("rope_freqs.weight")) is None:
        return {"rope_type": "linear", "factor": factor} if linear else None
    if linear or info.type != "F32" or info.shape != (head_dim // 2,):
        header.fail("its rope_freqs.weight is of an unknown kind")
    with header.path.open("rb") as file:
        file.seek(info.offset)
        divisors = struct.unpack(f"<{head_dim // 2}f", file.read(info.size_bytes))
    return _llama3_scaling(header, theta, divisors)


def _llama3_scaling(
    header: Header, theta: float, divisors: tuple[float, ...]
) -> dict[str, Any] | None:
    """The parameters behind a file's frequency divisors. llama.cpp keeps only the divisors; Llama
    3.1 to 3.3 share all parameters but the factor, so recompute the divisors with these and compare
    (`generate_extra_tensors` in llama.cpp's conversion/llama.py has the formula)."""
    factor, low, high, context = max(divisors), 1.0, 4.0, 8192
    for i, divisor in enumerate(divisors):
        turns = context / (2 * math.pi * theta ** (i / len(divisors)))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        inverse = (1 - smooth) / factor + smooth if factor >= 1 else 0.0
        if not math.isclose(divisor * inverse, 1, rel_tol=1e-4):
            header.fail("its RoPE frequencies (rope_freqs.weight) are not those of Llama 3")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _tensor_names(header: Header, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name to MLX module of every tensor, each of them there, readable and of its shape."""
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    if (layers := config["num_hidden_layers"]) > len(header.tensors):
        header.fail(f"it has {len(header.tensors)} tensors for {layers} layers")
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
    for name in header.tensors:
        if name.removesuffix(".weight") not in expected and name != "rope_freqs.weight":
            header.fail(f"MLX's llama has no place for tensor {name}")
    for name, (_, shape) in expected.items():
        if (info := header.tensors.get(f"{name}.weight")) is None:
            header.fail(f"it lacks tensor {name}.weight")
        if info.type not in (readable := _MATRICES if len(shape) == 2 else _FLOATS):
            known = ", ".join(readable)
            header.fail(f"tensor {name}.weight is {info.type}; can be converted: {known}")
        if info.shape != shape:
            header.fail(f"tensor {name}.weight has shape {info.shape}, expected {shape}")
    return {name: module for name, (module, _) in expected.items()}


def _weights(
    header: Header, names: dict[str, str], config: dict[str, Any], keep_quantized: bool
) -> dict[str, Any]:
    """The MLX arrays by name; adds `quantization` to `config` where weights stay quantized."""
    import mlx.core as mx

    try:
        arrays: Any = mx.load(str(header.path), format="gguf")
    except (RuntimeError, ValueError) as error:
        header.fail(str(error))
    # One dtype for all that is not packed, that of the embeddings: a single float32 norm among
    # float16 weights would turn every activation after it into float32.
    embeddings = arrays.get("token_embd.scales", arrays["token_embd.weight"])
    dtype = embeddings.dtype if keep_quantized else mx.float32
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, Any] = {}
    packed: dict[str, int] = {}
    for name, module in names.items():
        kind = header.tensors[f"{name}.weight"].type
        bits = _PACKED_BITS.get(kind)
        parts = ("weight", "scales", "biases") if bits else ("weight",)
        weight, *scaling = (arrays.pop(f"{name}.{part}") for part in parts)
        if kind == "BF16" and not mx.isfinite(weight).all():
            header.fail(f"tensor {name}.weight does not fit in float16, as which MLX reads it")
        if (role := name.rpartition(".")[2]) in heads:
            weight, *scaling = (_unpermute(array, heads[role]) for array in (weight, *scaling))
        scaling = [array.astype(dtype) for array in scaling]
        if bits is None:
            weight = weight.astype(dtype)
        elif keep_quantized:
            packed[module] = bits
        else:
            scales, biases = scaling
            weight, scaling = mx.dequantize(weight, scales, biases, _GROUP_SIZE, bits), []
        for part, array in zip(parts, (weight, *scaling), strict=False):
            weights[f"{module}.{part}"] = array
    if packed:
        common = Counter(packed.values()).most_common(1)[0][0]
        config["quantization"] = {"group_size": _GROUP_SIZE, "bits": common} | {
            module: {"group_size": _GROUP_SIZE, "bits": bits}
            for module, bits in packed.items()
            if bits != common
        }
    return weights


def _unpermute(array: Any, heads: int) -> Any:
    """Rows of q and k as MLX wants them. llama.cpp rotates neighbouring pairs, so its converter
    interleaves the two halves of every head (`LlamaModel.permute` in conversion/llama.py); a row
    keeps its own scales and biases, so these move alike."""
    interleaved = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return interleaved.swapaxes(1, 2).reshape(array.shape)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
