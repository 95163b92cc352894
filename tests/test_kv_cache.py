"""The sizes computed from configurations, against what both engines really allocate."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from lmx.gguf_header import read_header
from lmx.kv_cache import (
    DEFAULTS,
    EXPANDED_MLA,
    ROTATING,
    UNKNOWN,
    KVCacheSize,
    gguf_kv_cache,
    mlx_kv_cache,
)

from .families import ALTERNATING, BASE, FAMILIES, WINDOW, random_model
from .models import Tensor, encode, smollm2_gguf, write_gguf

MODELS = Path(mlx_lm.__file__).parent / "models"
TOKENS = 300


def allocated(config: dict[str, Any], dtype: mx.Dtype) -> int:
    """What a model of random weights holds after a prompt of TOKENS, the last one alone."""
    model = random_model(config, dtype)
    cache = make_prompt_cache(model)
    prompt = mx.arange(TOKENS)[None] % 64
    for part in (prompt[:, :-1], prompt[:, -1:]):
        mx.eval(model(part, cache=cache), [layer.state for layer in cache])
    return sum(layer.nbytes for layer in cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_holds_what_is_computed(family: str) -> None:
    """The size equals the bytes of mlx-lm's own cache after 300 tokens."""
    config = BASE | FAMILIES[family] | {"model_type": family}
    wide = "experts" in str(config)  # MLX multiplies experts on the CPU in float32 only
    truth = allocated(config, mx.float32 if wide else mx.bfloat16)
    size = mlx_kv_cache(config, 4 if wide else 2).bytes(TOKENS)
    assert size == truth


def sources() -> dict[str, str]:
    return {file.stem: file.read_text() for file in MODELS.glob("*.py")}


def test_the_tables_agree_with_mlx_lm() -> None:
    """Which families keep a window, or full heads of MLA, is what mlx-lm's code says today."""
    code = {n: s for n, s in sources().items() if n not in ("cache", "base", "mla")}
    rotating = {name for name, source in code.items() if "RotatingKVCache(" in source}
    over = {"gear", "recurrent_gemma", "baichuan_m1", "iquestloopcoder"}  # counted as full
    assert rotating - over == ROTATING
    mla = {name for name, source in code.items() if "self.kv_lora_rank" in source}
    latent = {name for name in mla if re.search(r"update_and_fetch\((kv|k)_latent", code[name])}
    assert mla - latent == EXPANDED_MLA


@pytest.mark.parametrize("name", ["gemma3_text", "gemma4_text"])
def test_defaults_are_mlx_lms(name: str) -> None:
    """What a configuration leaves out is taken as mlx-lm takes it."""
    args = importlib.import_module(f"mlx_lm.models.{name}").ModelArgs
    for key, value in DEFAULTS[name].items():
        assert getattr(args, key) == value


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_gemma4_by_all_its_names(name: str) -> None:
    """The text model within is always the same."""
    inner = BASE | ALTERNATING | {"model_type": f"{name}_text"}
    size = mlx_kv_cache({"model_type": name, "text_config": inner}, 2)
    assert size.layers == ((2 * 2 * 16 * 2, 256), (2 * 2 * 512 * 2, None)) * 2


def test_gemma3_without_heads_in_its_configuration() -> None:
    """Gemma 3's published text_config leaves out heads, which mlx-lm fills in."""
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    size = mlx_kv_cache({"model_type": "gemma3", "text_config": inner | WINDOW}, 2)
    assert size.layers.count((4 * 2 * 256 * 2, None)) == 34 // 6
    assert size.layers.count((4 * 2 * 256 * 2, 256)) == 34 - 34 // 6


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        BASE | {"num_attention_heads": 0, "head_dim": None},
        BASE | {"num_hidden_layers": 10**12},
        BASE | {"num_key_value_heads": "2"},
        BASE | {"num_key_value_heads": -2},
        BASE | {"num_hidden_layers": True},
        BASE | {"linear_attn_config": [1]},
        BASE | {"linear_attn_config": {"kda_layers": 1}},
        BASE | {"block_configs": [1]},
    ],
    ids=str,
)
def test_an_odd_configuration_counts_as_much(config: dict[str, Any]) -> None:
    """What cannot be computed is not zero, and is no error."""
    assert mlx_kv_cache(config, 2) == UNKNOWN
    assert UNKNOWN.bytes(1) == 256 * 2**20


def test_unknown_kinds_of_layers_count_as_full_attention() -> None:
    """A layer type that nobody knows yet is not counted as less."""
    config = BASE | {"model_type": "llama", "layer_types": ["full_attention", "new"] * 2}
    assert mlx_kv_cache(config, 2) == mlx_kv_cache(BASE | {"model_type": "llama"}, 2)


def test_deepseek_41_counts_a_latent_per_layer() -> None:
    """The size bounds that of layers which share a compressed latent, without being absurd."""
    config = BASE | {"compress_ratios": [0, 4, 4, 4], "head_dim": 64, "index_head_dim": 32}
    assert mlx_kv_cache(config, 2).layers == ((192, None),) * 4


@pytest.mark.parametrize(
    ("tokens", "sequences", "expected"),
    [
        (0, 1, 7),
        (1, 1, 256 * 3 + 7),
        (256, 1, 256 * 3 + 7),
        (257, 1, 512 + 256 * 2 + 7),
        (1000, 1, 1024 + 256 * 2 + 7),
        (1000, 2, 1024 + 512 * 2 + 14),
    ],
)
def test_bytes(tokens: int, sequences: int, expected: int) -> None:
    """Whole steps of 256 tokens; a window holds no more than itself, a state does not grow."""
    size = KVCacheSize(((1, None), (2, 100)), state_bytes=7, window_spare=100)
    assert size.bytes(tokens, sequences) == expected


HIDDEN, LAYERS = 256, 6


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        f"{name.replace('__', '.')}.weight": encode(np.zeros(shape, np.float32), "F32")
        for name, shape in shapes.items()
    }


def blocks(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    tensors = zeros(token_embd=(64, HIDDEN), output_norm=(HIDDEN,), output=(64, HIDDEN))
    for i in range(LAYERS):
        tensors |= zeros(**{f"blk__{i}__{name}": shape for name, shape in shapes.items()})
    return tensors


def attention() -> dict[str, Tensor]:
    return blocks(
        attn_norm=(HIDDEN,),
        attn_q=(HIDDEN, HIDDEN),
        attn_k=(HIDDEN // 2, HIDDEN),
        attn_v=(HIDDEN // 2, HIDDEN),
        attn_output=(HIDDEN, HIDDEN),
        attn_q_norm=(64,),
        attn_k_norm=(64,),
        post_attention_norm=(HIDDEN,),
        ffn_norm=(HIDDEN,),
        ffn_gate=(64, HIDDEN),
        ffn_up=(64, HIDDEN),
        ffn_down=(HIDDEN, 64),
        post_ffw_norm=(HIDDEN,),
    )


def latent() -> dict[str, Tensor]:
    return blocks(
        attn_norm=(HIDDEN,),
        attn_q_a=(32, HIDDEN),
        attn_q_a_norm=(32,),
        attn_q_b=(128, 32),
        attn_kv_a_mqa=(48, HIDDEN),
        attn_kv_a_norm=(32,),
        attn_k_b=(4, 32, 16),
        attn_v_b=(4, 16, 32),
        attn_output=(HIDDEN, 64),
        ffn_norm=(HIDDEN,),
        ffn_gate=(64, HIDDEN),
        ffn_up=(64, HIDDEN),
        ffn_down=(HIDDEN, 64),
    )


def recurrent() -> dict[str, Tensor]:
    tensors = blocks(
        attn_norm=(HIDDEN,),
        ssm_in=(1024, HIDDEN),
        ssm_conv1d=(512, 4),
        ssm_x=(48, 512),
        ssm_dt=(512, 16),
        ssm_out=(HIDDEN, 512),
    )
    for i in range(LAYERS):
        for name, shape in {
            "conv1d.bias": (512,),
            "dt.bias": (512,),
            "a": (512, 16),
            "d": (512,),
        }.items():
            tensors[f"blk.{i}.ssm_{name}"] = encode(np.zeros(shape, np.float32), "F32")
    return tensors


GGUF: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "gemma3": (
        attention,
        {
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.sliding_window": 128,
        },
    ),
    "deepseek2": (
        latent,
        {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": 32,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 48,
            "attention.value_length": 32,
            "attention.key_length_mla": 32,
            "attention.value_length_mla": 16,
            "rope.dimension_count": 16,
            "leading_dense_block_count": LAYERS,
            "expert_count": 0,
            "expert_feed_forward_length": 64,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "expert_gating_func": 2,
        },
    ),
    "mamba": (
        recurrent,
        {
            "attention.head_count": 0,
            "attention.head_count_kv": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 512,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 16,
        },
    ),
}

_log: list[str] = []
_keep = llama_cpp.llama_log_callback(lambda _level, text, _data: _log.append(text.decode()))


def reserved(path: Path, tokens: int, sequences: int) -> float:
    """The MiB of cache that llama.cpp reports for a context."""
    llama_cpp.llama_log_set(_keep, None)
    _log.clear()
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(path), llama_cpp.llama_model_default_params()
    )
    assert model, "".join(_log)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.swa_full = (
        tokens,
        sequences,
        True,
        False,
    )
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "".join(_log)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    sizes = re.findall(r"(?:KV|RS) buffer size =\s*([\d.]+) MiB", "".join(_log))
    return sum(map(float, sizes))


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("name", [*GGUF, "smollm2"])
def test_llama_cpp_reserves_what_is_computed(tmp_path: Path, name: str, sequences: int) -> None:
    """For the cells of the whole context and the states of all sequences, as llama.cpp logs it."""
    path = smollm2_gguf()
    if name != "smollm2":
        path = tmp_path / "tiny.gguf"
        tensors, own = GGUF[name]
        common = {
            "vocab_size": 64,
            "block_count": LAYERS,
            "embedding_length": HIDDEN,
            "context_length": 4096,
            "feed_forward_length": 64,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        metadata = {f"{name}.{key}": value for key, value in (common | own).items()}
        base = {"general.architecture": name, "tokenizer.ggml.model": "no_vocab"}
        write_gguf(path, base | metadata, tensors())
    size = gguf_kv_cache(read_header(path).metadata)
    truth = reserved(path, 4096, sequences)
    assert size.bytes(4096, sequences) / 2**20 == pytest.approx(truth, abs=0.011)


def metadata(name: str, **own: Any) -> dict[str, Any]:
    values = {"block_count": 4, "embedding_length": 64, "attention.head_count": 4}
    values |= {key.replace("__", "."): value for key, value in own.items()}
    return {"general.architecture": name} | {f"{name}.{k}": v for k, v in values.items()}


@pytest.mark.parametrize(
    ("values", "layers", "states"),
    [
        (metadata("llama"), [(256, None)] * 4, 0),
        (
            metadata("deci", attention__head_count_kv=[4, 2, 1, 1]),
            [(256, None), (128, None), (64, None), (64, None)],
            0,
        ),
        (metadata("phi3", attention__sliding_window=9), [(256, None)] * 4, 0),
        (metadata("gpt-oss", attention__sliding_window=9), [(256, 9), (256, None)] * 2, 0),
        (
            metadata(
                "gemma4",
                attention__sliding_window=9,
                attention__sliding_window_pattern=[True, False, True, True],
                attention__key_length=32,
                attention__value_length=32,
                attention__key_length_swa=8,
                attention__value_length_swa=8,
                attention__shared_kv_layers=1,
            ),
            [(128, 9), (512, None), (128, 9)],
            0,
        ),
        (
            metadata(
                "jamba",
                attention__head_count_kv=[0, 0, 2, 0],
                ssm__inner_size=10,
                ssm__state_size=3,
            ),
            [(128, None)],
            3 * 30 * 4,
        ),
        (
            metadata("qwen3next", full_attention_interval=4, ssm__inner_size=10, ssm__state_size=3),
            [(256, None)],
            3 * 30 * 4,
        ),
        (
            metadata("falcon-h1", ssm__inner_size=10, ssm__state_size=3),
            [(256, None)] * 4,
            4 * 30 * 4,
        ),
        (
            metadata("lfm2", attention__head_count_kv=[0, 2, 0, 2], shortconv__l_cache=3),
            [(128, None)] * 2,
            2 * 2 * 64 * 4,
        ),
    ],
    ids=lambda value: value.get("general.architecture") if isinstance(value, dict) else "",
)
def test_gguf_metadata(
    values: dict[str, Any], layers: list[tuple[int, int | None]], states: int
) -> None:
    """Heads per layer, windows, shared layers and states, by the keys that llama.cpp reads."""
    size = gguf_kv_cache(values)
    assert (list(size.layers), size.state_bytes) == (layers, states)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"general.architecture": 5},
        metadata("llama", block_count=2**31),
        metadata("llama", attention__head_count=[]),
        metadata("llama", embedding_length="x"),
    ],
    ids=str,
)
def test_odd_metadata_count_as_much(values: dict[str, Any]) -> None:
    """A damaged GGUF file's cache is not zero, and no error."""
    assert gguf_kv_cache(values) == UNKNOWN
