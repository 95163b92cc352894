"""Both embedding backends with a real model, all-MiniLM-L6-v2, and MLX's with tiny random ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lmx import backends
from lmx.backends import Backend, Sequence, VectorEvent
from lmx.config import EngineSettings
from lmx.embedders import Pooling, mlx_pooling
from lmx.errors import ModelLoadFailed
from lmx.generation import SamplingParams

from .models import minilm_gguf, minilm_mlx, tiny_metadata, tiny_mlx, tiny_tensors, write_gguf

# The cosines are sentence-transformers' 6.2.0 (torch 2.13.0, CPU), from the package's own
# `load_model()` and `encode`.
PAIRS = [
    ("A man is playing a guitar.", "Someone plays an instrument.", 0.667446),
    ("A man is playing a guitar.", "The stock market fell sharply today.", -0.054027),
    ("How do I reset my password?", "I forgot my login and need a new password.", 0.780102),
    ("The cat sat on the mat.", "The cat did not sit on the mat.", 0.800459),
    ("Paris is the capital of France.", "Berlin is the capital of Germany.", 0.348131),
    ("Water boils at 100 degrees Celsius.", "L'eau bout à 100 degrés Celsius.", 0.487181),
    ("def add(a, b): return a + b", "A function that sums two numbers.", 0.463122),
    ("naïve café 🎉", "NAIVE CAFE", 0.907650),
    ("東京は日本の首都です。", "Tokyo is the capital of Japan.", 0.486267),
    ("Yes.", "The quick brown fox jumps over the lazy dog. " * 3, 0.156619),
]
TINY: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "vocab_size": 103,
}
WORDS = [f"w{i}" for i in range(100)]


def load(path: Path, format: str = "mlx", **settings: Any) -> Backend:
    return backends.load(path, format, EngineSettings(**settings), 0)


@pytest.fixture(scope="module", params=["mlx", "gguf"])
def minilm(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = load(minilm_mlx() if request.param == "mlx" else minilm_gguf(), request.param)
    yield backend
    backend.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Backend]]:
    """`load`, and everything is closed at the end."""
    loaded: list[Backend] = []

    def open(path: Path, format: str = "mlx", **settings: Any) -> Backend:
        loaded.append(load(path, format, **settings))
        return loaded[-1]

    yield open
    for backend in loaded:
        backend.close()


def add(backend: Backend, inputs: list[list[int]]) -> None:
    for uid, tokens in enumerate(inputs):
        backend.add(Sequence(uid, tokens, 1, SamplingParams()))


def steps(backend: Backend) -> Iterator[dict[int, list[float]]]:
    """The vectors of each step, until there is nothing left to do."""
    while events := backend.step():
        assert all(isinstance(event, VectorEvent) for event in events)
        yield {event.uid: event.vector for event in events if isinstance(event, VectorEvent)}


def embed(backend: Backend, inputs: list[list[int]]) -> list[list[float]]:
    add(backend, inputs)
    vectors: dict[int, list[float]] = {}
    for step in steps(backend):
        assert not vectors.keys() & step.keys()
        vectors |= step
    return [vectors[uid] for uid in range(len(inputs))]


def texts(backend: Backend, inputs: list[str]) -> list[list[float]]:
    return embed(backend, [backend.tokenize(text, raw=True) for text in inputs])


def far(one: list[float], other: list[float]) -> float:
    """The largest difference of two numbers in the same place."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


# A real model


def test_similarities_are_sentence_transformers(minilm: Backend) -> None:
    """The cosines of ten pairs of sentences are the reference's to three digits."""
    vectors = texts(minilm, [text for first, second, _ in PAIRS for text in (first, second)])
    assert {len(vector) for vector in vectors} == {384}
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1] * len(vectors))
    found = [dot(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    assert found == pytest.approx([cosine for *_, cosine in PAIRS], abs=1e-3)


def test_a_text_gets_the_tokens_the_model_was_trained_with(minilm: Backend) -> None:
    """[CLS] and [SEP] around a client's text, nothing is cut or filled up, and ids are BERT's."""
    assert minilm.tokenize("Hello world", raw=True) == [101, 7592, 2088, 102]
    assert minilm.tokenize("Hello world") == [7592, 2088]
    assert minilm.tokenize("", raw=True) == [101, 102]
    assert len(minilm.tokenize("word " * 1000, raw=True)) == 1002
    assert len(minilm.vocabulary.tokens) == 30522
    assert {0, 100, 101, 102, 103} <= minilm.vocabulary.control


def test_an_input_may_be_as_long_as_the_model_has_positions(minilm: Backend) -> None:
    """512, though sentence-transformers cuts at 256."""
    assert (minilm.context_length, minilm.dimensions, minilm.chat_template) == (512, 384, None)


def test_llama_cpp_takes_the_longest_input(opened: Callable[..., Backend]) -> None:
    """An encoder needs all of it at once; the next ones wait for their own batch."""
    backend = opened(minilm_gguf(), "gguf", context_length=256)
    assert backend.context_length == 256
    add(backend, [[101, *[7592] * 254, 102], [101, 102], [101, 7592, 102]])
    assert [list(step) for step in steps(backend)] == [[0], [1, 2]]


def test_batches_change_nothing(minilm: Backend) -> None:
    """An input's vector is the same alone and among others, whatever their lengths."""
    some = [minilm.tokenize("word " * n, raw=True) for n in (1, 30, 2, 9, 1, 17, 3)]
    together = embed(minilm, some)
    assert max(far(embed(minilm, [i])[0], v) for i, v in zip(some, together, strict=True)) < 1e-4


def test_removed_inputs_are_not_embedded(minilm: Backend) -> None:
    """Only those that are left come out, and unknown ones are ignored."""
    add(minilm, [[101, 7592, 102]] * 5)
    for uid in (0, 3, 99):
        minilm.remove(uid)
    assert sorted(uid for step in steps(minilm) for uid in step) == [1, 2, 4]
    assert minilm.step() == []


# Tiny models


Weights = dict[str, mx.array]


@cache
def bert_weights() -> Weights:
    """Of TINY, large enough that every part of the model shows in its vectors."""
    size, inner = TINY["hidden_size"], TINY["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (TINY["vocab_size"], size),
        "embeddings.position_embeddings.weight": (TINY["max_position_embeddings"], size),
        "embeddings.token_type_embeddings.weight": (TINY["type_vocab_size"], size),
    }
    norms = ["embeddings"]
    for n in range(TINY["num_hidden_layers"]):
        layer = f"encoder.layer.{n}."
        norms += [f"{layer}attention.output", f"{layer}output"]
        for name, shape in {
            "attention.self.query": (size, size),
            "attention.self.key": (size, size),
            "attention.self.value": (size, size),
            "attention.output.dense": (size, size),
            "intermediate.dense": (inner, size),
            "output.dense": (size, inner),
        }.items():
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = shape, shape[:1]
    for name in norms:
        shapes |= {f"{name}.LayerNorm.{part}": (size,) for part in ("weight", "bias")}
    mx.random.seed(0)
    weights = {name: mx.random.normal(shape) / 8 for name, shape in shapes.items()}
    return {n: 1 + w if n.endswith("Norm.weight") else w for n, w in weights.items()}


def tiny_bert(folder: Path, weights: Weights | None = None, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    saved = bert_weights() if weights is None else weights
    mx.save_safetensors(str(folder / "model.safetensors"), saved)
    vocabulary = {word: id for id, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def modules(folder: Path, names: list[str], **pooling: Any) -> Path:
    """The files of sentence-transformers."""
    kinds = [f"sentence_transformers.models.{name}" for name in names]
    entries = [{"path": f"{n}_{name}", "type": kinds[n]} for n, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


INPUT = [1, 50, 3, 77, 20, 9, 2]


def test_hundreds_of_inputs(tmp_path: Path, opened: Callable[..., Backend]) -> None:
    """300 of mixed lengths: each its own vector, like alone, and many in a step."""
    backend = opened(tiny_bert(tmp_path / "m"))
    chance = random.Random(0)
    lengths = [chance.choice([1, 2, 8, 20, 60, 126]) for _ in range(300)]
    inputs = [[1, *chance.choices(range(3, 103), k=length), 2] for length in lengths]
    assert max(map(len, inputs)) == backend.context_length
    add(backend, inputs)
    found = list(steps(backend))
    assert len(found) < 200 and min(found[0]) == 0
    vectors = {uid: vector for step in found for uid, vector in step.items()}
    assert sorted(vectors) == list(range(300))
    for uid in range(0, 300, 5):
        [alone] = embed(backend, [inputs[uid]])
        assert far(alone, vectors[uid]) < 1e-4


@pytest.mark.parametrize("prefix", ["", "roberta."])
@pytest.mark.parametrize("pad", [0, 1])
def test_roberta_numbers_its_positions_behind_the_padding(
    tmp_path: Path, opened: Callable[..., Backend], prefix: str, pad: int
) -> None:
    """The first token has position pad id + 1, and the model is that much shorter."""
    weights = {f"{prefix}{name}": weight for name, weight in bert_weights().items()}
    table = f"{prefix}embeddings.position_embeddings.weight"
    rows = 128 + pad + 1
    weights[table] = mx.concatenate([mx.full((pad + 1, 64), 9.0), weights[table]])
    changes = {"model_type": "xlm-roberta", "max_position_embeddings": rows, "pad_token_id": pad}
    roberta = opened(tiny_bert(tmp_path / "r", weights, **changes))
    bert = opened(tiny_bert(tmp_path / "b"))
    assert roberta.context_length == bert.context_length == 128
    [one], [other] = embed(roberta, [INPUT]), embed(bert, [INPUT])
    assert far(one, other) < 1e-6


def test_other_names_of_weights(tmp_path: Path, opened: Callable[..., Backend]) -> None:
    """Prefix, TensorFlow's names and heads for other tasks make no difference."""
    odd = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): w
        for name, w in bert_weights().items()
    }
    odd |= {"bert.pooler.dense.weight": mx.zeros(3), "cls.predictions.bias": mx.zeros(3)}
    one, other = opened(tiny_bert(tmp_path / "odd", odd)), opened(tiny_bert(tmp_path / "b"))
    assert far(*embed(one, [INPUT]), *embed(other, [INPUT])) < 1e-6


def test_quantized_weights(tmp_path: Path, opened: Callable[..., Backend]) -> None:
    """Those that have scales are unpacked, as many as there are."""
    packed: Weights = {}
    plain: Weights = {}
    for name, weight in bert_weights().items():
        if weight.ndim == 2 and "position" not in name:
            parts = mx.quantize(weight, 32, 8)
            names = (name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases"))
            packed |= zip(names, parts, strict=True)
            plain[name] = mx.dequantize(*parts, 32, 8)
        else:
            packed[name] = plain[name] = weight
    settings = {"group_size": 32, "bits": 8}
    one = opened(tiny_bert(tmp_path / "q", packed, quantization=settings))
    other = opened(tiny_bert(tmp_path / "p", plain))
    assert far(*embed(one, [INPUT]), *embed(other, [INPUT])) < 1e-4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, "encoder.layer.1.output.dense.bias"),
        ({"embeddings.LayerNorm.bias": mx.zeros(5)}, "embeddings.LayerNorm.bias"),
        ({"encoder.layer.0.adapter.weight": mx.zeros(5)}, "encoder.layer.0.adapter.weight"),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, mx.array | None], expected: str
) -> None:
    """Missing, misshapen and unknown ones."""
    weights = {name: w for name, w in (bert_weights() | changes).items() if w is not None}
    with pytest.raises(ModelLoadFailed, match=expected):
        load(tiny_bert(tmp_path / "m", weights))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "snake"}, "snake"),
        ({"hidden_size": "x"}, "ValueError|TypeError"),
        ({"num_hidden_layers": None}, "TypeError"),
        ({"vocab_size": 50}, "shape|tokens"),
        ({"model_type": "modernbert"}, "type modernbert are not supported"),
        ({"position_embedding_type": "alibi"}, "alibi"),
        ({"architectures": ["BertForSequenceClassification"]}, "reranker"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_served(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    """Refused with the reason."""
    with pytest.raises(ModelLoadFailed, match=expected):
        load(tiny_bert(tmp_path / "m", **changes))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "x"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    """Whatever the library makes of it."""
    folder = tiny_bert(tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadFailed, match=r"tokenizer\.json"):
        load(folder)


# Decoders


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_decoders_vector_is_its_last_tokens(
    tmp_path: Path, opened: Callable[..., Backend], prefix: str
) -> None:
    """The final hidden state, made a unit vector, with and without the head in the file."""
    folder = tiny_mlx(tmp_path / "Tiny-Embedding")
    reference, _ = load_model(folder)
    inputs = [[5, 6, 7, 8], [9, 10], [11] * 40, [12, 13, 14, 15]]
    expected = [reference.model(mx.array([tokens]))[0, -1] for tokens in inputs]
    if not prefix:  # as sentence-transformers saves a model
        weights: Any = mx.load(str(folder / "model.safetensors"))
        kept = {n.removeprefix("model."): w for n, w in weights.items() if "lm_head" not in n}
        mx.eval(kept)
        mx.save_safetensors(str(folder / "model.safetensors"), kept)
    backend = opened(folder)
    found = embed(backend, inputs)
    for vector, hidden in zip(found, expected, strict=True):
        assert far(vector, (hidden / mx.linalg.norm(hidden)).tolist()) < 1e-4


def test_a_decoders_input_ends_with_its_end_token(
    tmp_path: Path, opened: Callable[..., Backend]
) -> None:
    """What is pooled is the end token, whether the tokenizer adds one or not."""
    folder = tiny_mlx(tmp_path / "Tiny-Embedding", eos_token_id=[2, 0])
    backend = opened(folder)
    plain = backend.tokenize("Hello world")
    assert backend.tokenize("Hello world", raw=True) == [*plain, 2]
    assert backend.tokenize("Hello world<|im_end|>", raw=True) == [*plain, 2]
    assert backend.dimensions and backend.context_length == 2048


def test_a_gguf_decoder_embeds_too(tmp_path: Path, opened: Callable[..., Backend]) -> None:
    """Its pooling is the file's; the vectors are MLX's."""
    metadata = tiny_metadata() | {"llama.pooling_type": 3}
    write_gguf(tmp_path / "m.gguf", metadata, tiny_tensors())
    inputs = [[5, 6, 7, 8], [9, 10], [11] * 40, [12, 13, 14, 15]]
    found = embed(opened(tmp_path / "m.gguf", "gguf", parallel=2), inputs)
    expected = embed(opened(tiny_mlx(tmp_path / "Tiny-Embedding")), inputs)
    assert [dot(*pair) for pair in zip(found, expected, strict=True)] == pytest.approx(
        [1] * 4, abs=1e-3
    )


def test_a_gguf_reranker_is_refused(tmp_path: Path) -> None:
    """It makes no vectors."""
    write_gguf(tmp_path / "m.gguf", tiny_metadata() | {"llama.pooling_type": 4}, tiny_tensors())
    with pytest.raises(ModelLoadFailed, match="reranker"):
        load(tmp_path / "m.gguf", "gguf")


# Pooling


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_is_the_models(
    tmp_path: Path, opened: Callable[..., Backend], settings: dict[str, Any], kind: Any
) -> None:
    """As 1_Pooling says, over the input alone and not its padding; unnormalized where it is not."""
    tables = {name: w for name, w in bert_weights().items() if name.startswith("embeddings.")}
    folder = tiny_bert(tmp_path / "m", tables, num_hidden_layers=0)
    modules(folder, ["Transformer", "Pooling"], **settings)
    assert mlx_pooling(folder, TINY) == Pooling(kind, normalize=False)
    word, position, type, norm, bias = (
        tables[f"embeddings.{name}"]
        for name in (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
    )
    hidden = mx.fast.layer_norm(
        word[mx.array(INPUT)] + position[: len(INPUT)] + type[0], norm, bias, 1e-12
    )
    expected: dict[str, Any] = {
        "cls": hidden[0],
        "mean": hidden.mean(0),
        "max": hidden.max(0),
        "last": hidden[-1],
    }
    [vector, _] = embed(opened(folder), [INPUT, [1] * 30])
    assert far(vector, expected[kind].tolist()) < 1e-5


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (["Transformer", "Pooling", "Dense", "Normalize"], {}, "a module Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            "cls_token",
        ),
        (["Transformer", "Pooling"], {}, "pooling by"),
    ],
)
def test_modules_that_are_not_known_are_refused(
    tmp_path: Path, names: list[str], settings: dict[str, Any], expected: str
) -> None:
    """Another vector than the model's own would be wrong."""
    folder = modules(tiny_bert(tmp_path / "m"), names, **settings)
    with pytest.raises(ModelLoadFailed, match=expected):
        load(folder)


@pytest.mark.parametrize("content", ["", "5", "[1]", '[{"type": 5}]', '[{"type": "a.Pooling"}]'])
def test_damaged_modules_are_refused(tmp_path: Path, content: str) -> None:
    """Anything may be in a file."""
    folder = tiny_bert(tmp_path / "m")
    (folder / "modules.json").write_text(content)
    with pytest.raises(ModelLoadFailed, match=r"modules\.json"):
        load(folder)
