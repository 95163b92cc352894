"""BERT and its like in MLX, which mlx-lm has no code for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn

_ACTIVATIONS: Final[dict[str, Callable[[mx.array], mx.array]]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}
# Heads for other tasks, and numbers that are no weights.
_UNUSED: Final = ("pooler.", "cls.", "lm_head.", "classifier.", "embeddings.position_ids")


def load_bert(path: Path, config: dict[str, Any]) -> tuple[_Bert, int]:
    """The model, and the longest input.

    Raises whatever a malformed file makes the library raise; a missing, superfluous or misshapen
    weight is named.
    """
    # RoBERTa numbers positions from there (fairseq's make_positions).
    first = 0 if config["model_type"] == "bert" else config.get("pad_token_id", 1) + 1
    model = _Bert(config, first)
    weights = {}
    for name, weight in _read(path).items():
        for prefix in ("bert.", "roberta."):
            name = name.removeprefix(prefix)
        # As TensorFlow's checkpoints have it.
        name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        if not name.startswith(_UNUSED):
            weights[name] = weight
    if quantization := config.get("quantization"):
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda name, _: (
                f"{name}.scales" in weights and quantization.get(name, True)
            ),
        )
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model, int(config["max_position_embeddings"]) - first


def _read(path: Path) -> dict[str, mx.array]:
    files: list[Any] = [mx.load(str(file)) for file in sorted(path.glob("model*.safetensors"))]
    return {name: weight for file in files for name, weight in file.items()}


def _parts(**parts: Any) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class _Bert(nn.Module):  # type: ignore[misc]
    """https://arxiv.org/abs/1810.04805; the parts are named as in the published weights."""

    def __init__(self, config: dict[str, Any], first_position: int) -> None:
        super().__init__()
        size, inner = config["hidden_size"], config["intermediate_size"]

        def norm() -> nn.Module:
            return nn.LayerNorm(size, eps=config.get("layer_norm_eps", 1e-12))

        self.embeddings = _parts(
            word_embeddings=nn.Embedding(config["vocab_size"], size),
            position_embeddings=nn.Embedding(config["max_position_embeddings"], size),
            token_type_embeddings=nn.Embedding(config.get("type_vocab_size", 2), size),
            LayerNorm=norm(),
        )
        self.encoder = _parts(
            layer=[
                _parts(
                    attention=_parts(
                        self=_parts(
                            **{k: nn.Linear(size, size) for k in ("query", "key", "value")}
                        ),
                        output=_parts(dense=nn.Linear(size, size), LayerNorm=norm()),
                    ),
                    intermediate=_parts(dense=nn.Linear(size, inner)),
                    output=_parts(dense=nn.Linear(inner, size), LayerNorm=norm()),
                )
                for _ in range(config["num_hidden_layers"])
            ]
        )
        self._heads = config["num_attention_heads"]
        self._activation = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        self._first_position = first_position

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        rows, count = tokens.shape
        table = self.embeddings
        positions = mx.arange(count)
        x: mx.array = table.word_embeddings(tokens)
        x = x + table.position_embeddings(positions + self._first_position)
        x = table.LayerNorm(x + table.token_type_embeddings(mx.zeros_like(tokens)))
        inside = (positions < lengths[:, None])[:, None, None]

        def heads(y: mx.array) -> mx.array:
            return y.reshape(rows, count, self._heads, -1).swapaxes(1, 2)

        for layer in self.encoder.layer:
            own, output = layer.attention.self, layer.attention.output
            queries = heads(own.query(x))
            y = mx.fast.scaled_dot_product_attention(
                queries,
                heads(own.key(x)),
                heads(own.value(x)),
                scale=queries.shape[-1] ** -0.5,
                mask=inside,
            )
            y = y.swapaxes(1, 2).reshape(rows, count, -1)
            x = output.LayerNorm(x + output.dense(y))
            y = layer.output.dense(self._activation(layer.intermediate.dense(x)))
            x = layer.output.LayerNorm(x + y)
        return x
