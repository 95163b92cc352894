"""How much memory a model's KV cache takes, from its configuration alone.

Rather too much than too little: what is not known to be smaller counts as full attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

STEP_TOKENS: Final = 256
"""By which both engines' caches grow (mlx-lm's KVCache.step, llama.cpp's padding)."""


def whole_steps(tokens: int) -> int:
    """The cells that so many tokens take."""
    return -(-tokens // STEP_TOKENS) * STEP_TOKENS


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    layers: tuple[tuple[int, int | None], ...]
    """Of each layer: bytes per token, and tokens of its sliding window (None: all)."""
    state_bytes: int = 0
    """Per sequence, whatever its length: linear attention and SSM layers."""
    window_spare: int = 0
    """Tokens that a windowed layer holds beside the windows of all sequences."""

    def bytes(self, tokens: int, sequences: int = 1) -> int:
        """Of `sequences` with `tokens` in all. While a prompt is read, layers with a window hold
        up to one slice of it more."""
        total = self.state_bytes * sequences
        for per_token, window in self.layers:
            most = tokens if window is None else window * sequences + self.window_spare
            total += per_token * whole_steps(min(tokens, most))
        return total


UNKNOWN: Final = KVCacheSize(((2**20, None),))
"""Where the configuration does not tell: more than a dense model of 400 billion weights takes."""
UBATCH_TOKENS: Final = 512
MAX_LAYERS: Final = 1000
# Of these mlx-lm keeps the window only; of others that have one (gemma2, phi3) it keeps all.
ROTATING: Final = set(
    "afmoe cohere2 exaone4 exaone_moe gemma3_text gemma3n gemma4_text gpt_oss laguna llama mellum"
    " mimo_v2_flash ministral3 muse_glimmer muse_spark olmo3 plamo3 spark2_5 step3p5".split()
)
# Of these mlx-lm keeps full heads; of all others with `kv_lora_rank`, the latent.
EXPANDED_MLA: Final = {"deepseek_v2", "minicpm3", "youtu_llm"}
# mlx-lm's own, where published configurations leave them out.
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3_text": {"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6},
    "gemma4_text": {"global_head_dim": 512},
}
# What reading odd values raises.
_ODD: Final = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
_KINDS: Final = {
    "sliding_attention": "window", "L": "window", "1": "window", "linear_attention": "state",
    "mamba": "state", "M": "state", "conv": "state", "mlp": "", "moe": "", "-": "", "E": "",
}  # fmt: skip
# Each n-th layer has no window, in llama.cpp where the metadata do not say which.
_GGUF_PERIODS: Final = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2}


def mlx_kv_cache(config: dict[str, Any], element_bytes: int) -> KVCacheSize:
    """What mlx-lm keeps for the model of this config.json."""
    inner = config.get("text_config")
    c = config | inner if isinstance(inner, dict) else config
    types = {str(config.get("model_type")), str(c.get("model_type"))}
    types |= {f"{name.removesuffix('_unified')}_text" for name in types}  # Gemma's
    for name in types:
        c = DEFAULTS.get(name, {}) | c
    try:
        kinds = _kinds(c)
        layers = [
            _layer(c, kind, types, element_bytes) for kind in kinds if kind not in ("", "state")
        ]
        states = len(kinds) if "falcon_h1" in types else kinds.count("state")
        return KVCacheSize(tuple(layers), states and states * _state_bytes(c, element_bytes))
    except _ODD:
        return UNKNOWN


def gguf_encoder_buffers(metadata: dict[str, Any]) -> KVCacheSize:
    """What llama.cpp takes to compute the longest input of an encoder, all of it at once: an upper
    bound, for an encoder keeps no KV cache."""
    prefix = f"{metadata.get('general.architecture')}."
    c = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    try:
        width = _int(c, "feed_forward_length") + 3 * _int(c, "embedding_length")
        return KVCacheSize(((4 * width + 2 * _int(c, "context_length"), None),))
    except _ODD:
        return UNKNOWN


def gguf_kv_cache(metadata: dict[str, Any]) -> KVCacheSize:
    """What llama.cpp reserves at load for all cells and sequences: KV in 2 bytes, states in 4."""
    name = str(metadata.get("general.architecture"))
    c = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    try:
        count = _count(c, "block_count") - _int(c, "attention.shared_kv_layers", default=0)
        layers = [_gguf_layer(c, i, _GGUF_PERIODS.get(name, 1)) for i in range(count)]
        rows, width = _int(c, "ssm.state_size", default=0), _int(c, "ssm.inner_size", default=0)
        inputs = width + 2 * rows * _int(c, "ssm.group_count", default=0)
        state = inputs * max(0, _int(c, "ssm.conv_kernel", default=0) - 1) + width * rows
        state += _int(c, "embedding_length") * max(0, _int(c, "shortconv.l_cache", default=0) - 1)
        states = layers.count(None) or count  # Falcon H1 has both in every layer
        return KVCacheSize(tuple(filter(None, layers)), states * state * 4, UBATCH_TOKENS)
    except _ODD:
        return UNKNOWN


def _gguf_layer(c: dict[str, Any], i: int, period: int) -> tuple[int, int | None] | None:
    """None: it has a constant state instead."""
    own = {k: v[i % len(v)] if isinstance(v, list) else v for k, v in c.items() if "atten" in k}
    heads = _int(own, "attention.head_count", default=0)
    kv_heads = _int(own, "attention.head_count_kv", default=heads)
    if not kv_heads or (i + 1) % _int(c, "full_attention_interval", default=1):
        return None
    window = _int(c, "attention.sliding_window", default=0) or None
    pattern = own.get("attention.sliding_window_pattern", period)
    listed = isinstance(c.get("attention.sliding_window_pattern"), list)
    if not (pattern if listed else (i + 1) % pattern):
        window = None
    suffix = "_swa" if window and "attention.key_length_swa" in c else ""
    head_dim = _int(c, "embedding_length") // heads
    keys = _int(c, f"attention.key_length{suffix}", default=head_dim)
    values = _int(c, f"attention.value_length{suffix}", default=head_dim)
    if "attention.key_length_mla" in c:
        values = 0  # a part of the keys
    return kv_heads * (keys + values) * 2, window


def _int(c: dict[str, Any], *names: str, default: int | None = None) -> int:
    value = next((c[name] for name in names if c.get(name) is not None), default)
    if type(value) is not int or value < 0:
        raise ValueError(names[0])
    return value


def _count(c: dict[str, Any], *names: str, default: int | None = None) -> int:
    if not 0 < (count := _int(c, *names, default=default)) <= MAX_LAYERS:
        raise ValueError(names[0])
    return count


def _kinds(c: dict[str, Any]) -> list[str]:
    """Of each layer: full, window, state, or nothing for one that keeps nothing."""
    lists = ("layer_types", "layers_block_type", "hybrid_override_pattern", "hybrid_layer_pattern",
             "sliding_window_pattern")  # fmt: skip
    named = next((c[key] for key in lists if isinstance(c.get(key), list | str) and c[key]), "")
    count = _count(c, "num_hidden_layers", "num_layers", "n_layers", "n_layer", default=len(named))
    if c.get("model_type") in ("mamba", "mamba2", "falcon_mamba", "rwkv7"):
        return ["state"] * count
    if named:
        kinds = [_KINDS.get(str(named[i % len(named)]), "full") for i in range(count)]
    elif linear := c.get("linear_attn_config"):
        kinds = ["state" if i + 1 in linear["kda_layers"] else "full" for i in range(count)]
    else:
        periods = ("full_attention_interval", "layer_group_size", "attn_layer_period")
        period = _int(c, *periods, "sliding_window_pattern", default=1)
        rest = "window" if period == c.get("sliding_window_pattern") else "state"
        tail = count // period * period if rest == "state" else count  # which may be full, too
        kinds = ["full" if (i + 1) % period == 0 or i >= tail else rest for i in range(count)]
    return kinds[: count - _int(c, "num_kv_shared_layers", default=0)]


def _layer(
    c: dict[str, Any], kind: str, types: set[str], element_bytes: int
) -> tuple[int, int | None]:
    window = None
    if kind == "window" and types & ROTATING:
        window = _int(c, "sliding_window", "sliding_window_size", "window_size")
        c = c | {key.removeprefix("swa_"): c[key] for key in c if key.startswith("swa_")}
    else:
        names = ("global_head_dim", "num_global_key_value_heads")
        c = c | {key.replace("global_", ""): c[key] for key in names if c.get(key)}
    heads = _int(c, "num_attention_heads", "n_heads", "n_head")
    head_dim = _int(c, "head_dim", default=_int(c, "hidden_size", "n_embd", "d_model") // heads)
    blocks = [block["attention"] for block in c.get("block_configs") or ()]  # Nemotron NAS
    group = min(filter(None, (block.get("n_heads_in_group") for block in blocks)), default=1)
    kv_heads = _int(c, "num_key_value_heads", "num_attention_groups", default=heads // group)
    values = _int(c, "v_head_dim", default=head_dim)
    index = _int(c, "index_head_dim", default=0)
    elements = kv_heads * (head_dim + values) + index
    if "compress_ratios" in c:  # DeepSeek 4.1: one latent, in fact only of some layers
        elements = head_dim + index
    elif rank := _int(c, "kv_lora_rank", default=0):
        rope = _int(c, "qk_rope_head_dim")
        elements = rank + rope + 2 * index
        if types & EXPANDED_MLA:
            elements = heads * (_int(c, "qk_nope_head_dim") + rope + values)
        elif "num_layers" in c:  # LongCat attends twice in a layer
            elements *= 2
    return elements * element_bytes, window


def _state_bytes(c: dict[str, Any], element_bytes: int) -> int:
    """Of a layer: the last inputs of its convolution, and a state in float32."""
    c = c | (c.get("linear_attn_config") or {})
    kernel = _int(c, "linear_conv_kernel_dim", "short_conv_kernel_size", "conv_kernel",
                  "mamba_d_conv", "conv_L_cache", default=1)  # fmt: skip
    if "conv_L_cache" in c:
        return (kernel - 1) * _int(c, "hidden_size") * element_bytes
    rows = _int(
        c, "linear_key_head_dim", "ssm_state_size", "mamba_d_state", "state_size", "head_dim"
    )
    heads = _int(c, "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads", "num_heads",
                 default=0)  # fmt: skip
    dims = ("linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "head_dim")
    width = heads * _int(c, *dims, default=0)
    width = width or _int(c, "mamba_expand", default=0) * _int(c, "hidden_size")
    width = width or _int(c, "intermediate_size")
    groups = _int(c, "linear_num_key_heads", "n_groups", "mamba_n_groups", default=heads)
    return (kernel - 1) * (width + 2 * rows * groups) * element_bytes + width * rows * 4
