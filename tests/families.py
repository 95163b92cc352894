"""Model families of mlx-lm's, each as a configuration of a few small layers."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes

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


def random_model(config: dict[str, Any], dtype: mx.Dtype) -> Any:
    """With random weights."""
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model
