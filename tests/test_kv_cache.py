"""The sizes computed from configurations, against what both engines really allocate."""

from __future__ import annotations

import copy
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
from mlx_lm.utils import _get_classes

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

from .models import Tensor, encode, smollm2_gguf, write_gguf

MODELS = Path(mlx_lm.__file__).parent / "models"
TOKENS = 300

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
}
MLA = EXPERTS | {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
}
MAMBA2 = {
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "conv_kernel": 4,
    "mamba_d_conv": 4,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_d_ssm": 128,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": [0.0, 100.0],
}
WINDOW = {"sliding_window": 256}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2} | WINDOW
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "phi3": WINDOW,
    "gemma2": WINDOW | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "qwen2": {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4} | WINDOW,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | DELTA_NET,
    "qwen3_5": {"text_config": BASE | DELTA_NET | {"model_type": "qwen3_5_text"}},
    "qwen3_vl": {"text_config": BASE | {"model_type": "qwen3_vl_text"}},
    "gemma3_text": WINDOW | {"num_hidden_layers": 7},
    "gemma3n": {
        "text_config": BASE
        | WINDOW
        | {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "intermediate_size": [96] * 6,
            "vocab_size_per_layer_input": 64,
            "activation_sparsity_pattern": [0.0] * 6,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 4,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
            "rope_local_base_freq": 1e4,
            "final_logit_softcapping": 30.0,
            "rope_scaling": None,
        }
    },
    "gemma4": {
        "text_config": BASE
        | ALTERNATING
        | {
            "model_type": "gemma4_text",
            "num_kv_shared_layers": 0,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        }
    },
    "gpt_oss": EXPERTS | ALTERNATING,
    "ministral3": ALTERNATING
    | {
        "rope_parameters": {
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral3": {"text_config": BASE | {"model_type": "mistral"}},
    "olmo3": ALTERNATING | {"attention_bias": False},
    "exaone4": WINDOW
    | {"sliding_window_pattern": "LLLG", "rope_scaling": {"rope_type": "default", "factor": 1.0}},
    "cohere2": WINDOW
    | {
        "sliding_window_pattern": 4,
        "layer_norm_eps": 1e-5,
        "logit_scale": 1.0,
        "attention_bias": False,
        "layer_norm_bias": False,
    },
    "mimo_v2_flash": MLA
    | {
        "kv_lora_rank": None,
        "v_head_dim": 8,
        "hybrid_layer_pattern": [0, 1, 1, 0],
        "sliding_window_size": 256,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_bias": False,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "layernorm_epsilon": 1e-5,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "deepseek_v2": MLA
    | {
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v3": MLA,
    "deepseek_v32": MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 512},
    "kimi_k25": {"text_config": BASE | MLA | {"model_type": "kimi_k2"}},
    "kimi_linear": MLA
    | {
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 4096,
    },
    "minicpm3": MLA
    | {
        "dim_model_base": 64,
        "scale_depth": 1.0,
        "scale_emb": 1.0,
        "rope_scaling": {
            "long_factor": [1.0] * 4,
            "short_factor": [1.0] * 4,
            "original_max_position_embeddings": 4096,
        },
    },
    "glm4_moe": EXPERTS
    | {"partial_rotary_factor": 0.5, "attention_bias": False, "rope_scaling": None},
    "minimax": EXPERTS | {"rotary_dim": 16},
    "mamba2": MAMBA2
    | {
        "num_heads": 8,
        "state_size": 16,
        "time_step_rank": 4,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "chunk_size": 256,
        "rms_norm": True,
        "intermediate_size": 128,
    },
    "nemotron_h": MAMBA2 | {"hybrid_override_pattern": "M-M*-M", "num_hidden_layers": 6},
    "falcon_h1": MAMBA2,
    "granitemoehybrid": EXPERTS
    | MAMBA2
    | {
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "position_embedding_type": "nope",
    },
    "jamba": {
        "head_dim": None,
        "attn_layer_offset": 1,
        "attn_layer_period": 4,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 96,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "longcat_flash": MLA
    | {
        "num_hidden_layers": None,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
        "attention_method": "MLA",
    },
}


def allocated(config: dict[str, Any], dtype: mx.Dtype) -> int:
    """What a model of random weights holds after a prompt of TOKENS, the last one alone."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
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
