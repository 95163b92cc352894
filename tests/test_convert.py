from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from lmx.convert import convert
from lmx.errors import ConfigError, ModelLoadFailed
from lmx.gguf_header import read_header
from tests.models import (
    TINY,
    Floats,
    Tensor,
    encode,
    smollm2_gguf,
    smollm2_mlx,
    tiny_gguf,
    tiny_metadata,
    tiny_mlx,
    tiny_tensors,
    write_gguf,
)

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n <",
    "Once upon a time, there was a",
    "The three primary colors are red,",
    "1, 2, 3, 4, 5, 6,",
    "Water boils at a temperature of",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "Paris est la capitale de la",
    "SELECT name FROM users WHERE",
]


PROMPT = [504, 3575, 282, 4649, 314]


def weights(folder: Path) -> dict[str, Any]:
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    return dict(arrays)


def load(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    return model, tokenizer


def llama_cpp_model(path: Path) -> llama_cpp.Llama:
    # One thread: several wait for each other by spinning, which is slow on a busy machine.
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def greedy(llama: llama_cpp.Llama, prompt: list[int], count: int) -> list[int]:
    tokens = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
    return [int(token) for token, _ in zip(tokens, range(count), strict=False)]


def logits(model: Any, tokens: list[int]) -> Floats:
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def assert_same_choice(model: Any, prompt: list[int], answer: list[int], near: float) -> None:
    """`model` would choose every token of `answer` too, or one whose logit is `near` to it:
    llama.cpp's CPU kernels round activations to 8 bits, which moves all logits a little."""
    rows = logits(model, prompt + answer[:-1])[len(prompt) - 1 :]
    behind = rows.max(1) - rows[range(len(answer)), answer]
    assert behind.max() < near, behind


@cache
def smollm2() -> tuple[Any, Any]:
    return load(smollm2_mlx())


@pytest.fixture(scope="module")
def smollm2_llama() -> llama_cpp.Llama:
    return llama_cpp_model(smollm2_gguf())


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_smollm2_continues_as_llama_cpp_does(prompt: str, smollm2_llama: llama_cpp.Llama) -> None:
    """The converted model has the same tokens for a prompt, and the same greedy answer.

    (llama.cpp's own logits move by up to 2 when it runs these weights as float32 instead of Q4_1;
    then all 80 tokens are the same.)"""
    model, tokenizer = smollm2()
    ids = smollm2_llama.tokenize(prompt.encode(), add_bos=False, special=True)
    assert tokenizer.encode(prompt, add_special_tokens=False) == ids
    assert_same_choice(model, ids, greedy(smollm2_llama, ids, 8), 1.0)


def test_smollm2_template_and_end_tokens() -> None:
    """mlx-lm finds the chat template, and the tokens that end an answer."""
    _, tokenizer = smollm2()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.eos_token_ids == {0, 2}


def test_tensors_go_where_they_belong(tmp_path: Path) -> None:
    """A GGUF with known weights, q and k in llama.cpp's order, becomes exactly the MLX model."""
    convert(tiny_gguf(tmp_path), tmp_path / "converted", keep_quantized=False)
    expected = weights(tiny_mlx(tmp_path / "tiny"))
    found = weights(tmp_path / "converted")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == mx.float32 and mx.array_equal(found[name], array), name
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["rms_norm_eps"] == pytest.approx(TINY["rms_norm_eps"])
    assert config | {"rms_norm_eps": TINY["rms_norm_eps"]} == config | TINY
    assert "quantization" not in config


def test_tiny_models_agree(tmp_path: Path) -> None:
    """llama.cpp and mlx-lm load the tiny models as the tests make them, and they answer alike."""
    model, tokenizer = load(tiny_mlx(tmp_path / "mlx"))
    prompt = tokenizer.encode("One prompt for both engines", add_special_tokens=False)
    answer = greedy(llama_cpp_model(tiny_gguf(tmp_path)), prompt, 12)
    assert len(set(answer)) > 9
    assert_same_choice(model, prompt, answer, 0.05)


def test_tiny_models_are_always_the_same(tmp_path: Path) -> None:
    """Made again, a tiny model has the same weights; overrides reach its configuration."""
    one, other = tiny_mlx(tmp_path / "one"), tiny_mlx(tmp_path / "other", rope_theta=500.0)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert load(other)[0].args.rope_theta == 500.0


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_kept_and_expanded_weights_agree(tmp_path: Path, kind: str) -> None:
    """Quantized or expanded to float32, the model is the same, and llama.cpp agrees."""
    source = tiny_gguf(tmp_path, kind)
    convert(source, tmp_path / "kept", keep_quantized=True)
    convert(source, tmp_path / "expanded", keep_quantized=False)
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}.get(kind)
    assert config.get("quantization") == (bits and {"group_size": 32, "bits": bits})
    kept, expanded = load(tmp_path / "kept")[0], load(tmp_path / "expanded")[0]
    one, other = logits(kept, PROMPT), logits(expanded, PROMPT)
    assert np.abs(one - other).max() < 0.25  # of some 8, in float16
    answer = greedy(llama_cpp_model(source), PROMPT, 8)
    assert_same_choice(expanded, PROMPT, answer, 0.5)


def test_each_tensor_may_have_its_own_type(tmp_path: Path) -> None:
    """Types may be mixed; mlx-lm learns the bits of each layer, and which are not quantized."""
    tensors = tiny_tensors("Q4_0")
    tensors["token_embd.weight"] = tiny_tensors("Q8_0")["token_embd.weight"]
    tensors["blk.0.ffn_up.weight"] = tiny_tensors("F16")["blk.0.ffn_up.weight"]
    tensors["blk.1.attn_k.weight"] = tiny_tensors("Q4_1")["blk.1.attn_k.weight"]
    source = tmp_path / "mixed.gguf"
    write_gguf(source, tiny_metadata(), tensors)
    convert(source, tmp_path / "kept", keep_quantized=True)
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    model, _ = load(tmp_path / "kept")
    assert model.model.embed_tokens.bits == 8 and model.lm_head.bits == 4
    assert model.model.layers[0].mlp.up_proj.weight.dtype == mx.float16
    kinds = {array.dtype for array in weights(tmp_path / "kept").values()}
    assert kinds == {mx.float16, mx.uint32}
    convert(source, tmp_path / "expanded", keep_quantized=False)
    expanded, _ = load(tmp_path / "expanded")
    assert np.abs(logits(model, PROMPT) - logits(expanded, PROMPT)).max() < 0.25


def test_q6_k_output(tmp_path: Path) -> None:
    """A Q6_K output layer, usual in Q4_0 files, is read as float16; llama.cpp agrees with it."""
    shape = {"hidden_size": 256, "head_dim": 64, "vocab_size": 49152}
    blocks = np.random.default_rng(3).integers(0, 256, (49152, 210), np.uint8)
    blocks[:, 192:208] %= 64  # scales
    blocks[:, 208:] = np.array([1 / 512], np.float16).view(np.uint8)
    tensors = tiny_tensors("Q8_0", **shape)
    tensors["output.weight"] = ("Q6_K", (49152, 256), blocks.tobytes())
    source = tmp_path / "q6.gguf"
    write_gguf(source, tiny_metadata(**shape), tensors)
    convert(source, tmp_path / "out", keep_quantized=False)
    answer = greedy(llama_cpp_model(source), PROMPT, 8)
    assert_same_choice(load(tmp_path / "out")[0], PROMPT, answer, 1.5)


def test_tied_embeddings(tmp_path: Path) -> None:
    """Without an output tensor the embeddings serve as one."""
    convert(tiny_gguf(tmp_path, tie_word_embeddings=True), tmp_path / "out")
    model, _ = load(tmp_path / "out")
    assert model.args.tie_word_embeddings


def llama3_divisors(factor: float, high: float = 4.0) -> Tensor:
    """`rope_freqs.weight` as llama.cpp's converter makes it for Llama 3.1."""
    divisors = []
    for i in range(0, 16, 2):
        wavelength = 2 * math.pi * TINY["rope_theta"] ** (i / 16)
        smooth = (8192 / wavelength - 1) / (high - 1)
        divisors.append(1 / ((1 - (s := min(max(smooth, 0), 1))) / factor + s))
    return encode(np.array(divisors, np.float32), "F32")


@pytest.mark.parametrize(
    ("metadata", "tensors", "scaling"),
    [
        ({}, {}, None),
        ({"llama.rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {}, None),
        ({}, {"rope_freqs.weight": llama3_divisors(1)}, None),
        (
            {},
            {"rope_freqs.weight": llama3_divisors(32)},
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rope_scaling(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor], scaling: Any
) -> None:
    """Linear scaling and Llama 3's frequencies mean the same to both engines."""
    source = tmp_path / "rope.gguf"
    write_gguf(source, tiny_metadata() | metadata, tiny_tensors() | tensors)
    convert(source, tmp_path / "out", keep_quantized=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == scaling
    prompt = list(range(1000, 1200))
    answer = greedy(llama_cpp_model(source), prompt, 6)
    assert_same_choice(load(tmp_path / "out")[0], prompt, answer, 0.05)


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


NORM = "blk.1.attn_norm.weight"
GATE = "blk.0.ffn_gate.weight"


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.architecture": "qwen2"}, {}, "its architecture is qwen2"),
        (without("general.architecture"), {}, "lacks general.architecture"),
        ({"llama.expert_count": 8}, {}, "mixture of experts"),
        ({"split.count": 2}, {}, "one part of a split model"),
        ({"llama.attention.scale": 0.5}, {}, "it sets llama.attention.scale"),
        (without("llama.block_count"), {}, "lacks llama.block_count"),
        ({"llama.block_count": 0}, {}, "llama.block_count is 0"),
        ({"llama.block_count": 3}, {}, "lacks tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, {}, "no place for tensor blk.1.attn_norm.weight"),
        ({"llama.block_count": 1 << 31}, {}, "21 tensors for 2147483648 layers"),
        ({"llama.embedding_length": "64"}, {}, "llama.embedding_length is '64', not int"),
        ({"llama.attention.head_count": [4, 4]}, {}, r"head_count is \[4, 4\], not int"),
        ({"llama.attention.head_count": 0}, {}, "head_count is 0"),
        ({"llama.attention.value_length": 32}, {}, "value_length is not the head dimension 16"),
        ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count is not the head dimension"),
        ({"llama.feed_forward_length": 96}, {}, r"has shape \(128, 64\), expected \(96, 64\)"),
        ({"llama.rope.freq_base": 0.0}, {}, "freq_base is 0.0"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "RoPE scaling is yarn"),
        ({"tokenizer.ggml.model": "t5"}, {}, "its tokenizer is t5"),
        ({}, without(NORM), f"lacks tensor {NORM}"),
        ({}, {"blk.0.attn_q.bias": ("F32", (64,), bytes(256))}, "tensor blk.0.attn_q.bias"),
        ({}, {GATE: ("Q5_0", (128, 64), bytes(128 * 44))}, f"{GATE} is Q5_0; can be converted"),
        ({}, {NORM: ("Q8_0", (64,), bytes(68))}, f"{NORM} is Q8_0; can be converted: F32, F16"),
        ({}, {NORM: ("F32", (1, 64), bytes(256))}, r"has shape \(1, 64\), expected \(64,\)"),
        ({}, {GATE: ("BF16", (128, 64), b"\x80\x7e" * 8192)}, "does not fit in float16"),
        ({}, {"rope_freqs.weight": llama3_divisors(8, high=2.0)}, "not those of Llama 3"),
        ({}, {"rope_freqs.weight": ("F32", (8,), bytes(32))}, "not those of Llama 3"),
        ({}, {"rope_freqs.weight": ("F32", (4,), bytes(16))}, "of an unknown kind"),
        (
            {"llama.rope.scaling.factor": 2.0},
            {"rope_freqs.weight": llama3_divisors(8)},
            "of an unknown kind",
        ),
    ],
)
def test_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    """What has no exact counterpart is an error naming file and reason, and nothing is written."""
    source = tmp_path / "x.gguf"
    write_gguf(
        source,
        {k: v for k, v in (tiny_metadata() | metadata).items() if v is not None},
        {k: v for k, v in (tiny_tensors() | tensors).items() if v is not None},
    )
    with pytest.raises(ModelLoadFailed, match=f"x.gguf: .*{message}"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_damaged_file(tmp_path: Path) -> None:
    """A file cut short is an error before MLX sees it, which would crash."""
    source = tiny_gguf(tmp_path)
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 64)
    with pytest.raises(ModelLoadFailed, match="does not lie within it"):
        convert(source, tmp_path / "out")


def test_target_in_use(tmp_path: Path) -> None:
    """A target with something in it is refused and left alone; an empty folder will do."""
    source = tiny_gguf(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            convert(source, target)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(source, tmp_path / "new" / "deep")
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A conversion that fails or is interrupted while it writes leaves nothing behind."""

    def fail(path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(mx, "save_safetensors", fail)
    expected: Callable[..., Any] = type(error) if error.args == () else ModelLoadFailed
    with pytest.raises(expected):  # type: ignore[call-overload]
        convert(tiny_gguf(tmp_path / "source"), tmp_path / "target" / "model")
    assert list((tmp_path / "target").iterdir()) == []


def test_header_survives() -> None:
    """The model's dimensions are those in the GGUF's own header."""
    config = json.loads((smollm2_mlx() / "config.json").read_text())
    metadata = read_header(smollm2_gguf(), arrays=False).metadata
    assert config["hidden_size"] == metadata["llama.embedding_length"] == 576
    assert config["max_position_embeddings"] == metadata["llama.context_length"] == 8192
    assert config["tie_word_embeddings"] is True


def test_import_is_cheap() -> None:
    """Importing the module loads neither MLX nor the tokenizers."""
    code = "import sys, lmx.convert; print(sys.modules.keys() & {'mlx', 'tokenizers', 'numpy'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
