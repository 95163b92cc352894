"""Prefixes of models whose memory cannot be cut: sliding windows and recurrent layers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest import approx

from lmx.backends import Prefilled, Sequence, TokenEvent
from lmx.backends.borders import borders
from lmx.backends.gguf import GGUFBackend
from lmx.config import EngineSettings
from lmx.generation import SamplingParams

from .models import PLENTY, Tensor, encode, tiny_metadata, write_gguf

HIDDEN = 64
WINDOW = 64


def windowed() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Gemma 3's architecture: all layers but the sixth see the last 64 tokens only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(6):
        block = f"blk.{i}."
        norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        shapes |= {f"{block}{name}.weight": (HIDDEN,) for name in norms}
        shapes |= {f"{block}{name}.weight": (16,) for name in ("attn_q_norm", "attn_k_norm")}
        shapes |= {f"{block}{name}.weight": (32, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"{block}{name}.weight": (HIDDEN, 64) for name in ("attn_q", "attn_output")}
        shapes |= {f"{block}{name}.weight": (128, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"{block}ffn_down.weight"] = (HIDDEN, 128)
    return _model("gemma3", shapes, {"attention.sliding_window": WINDOW, "block_count": 6})


def recurrent() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Mamba's: a state and no KV cache."""
    inner, state, rank = 128, 16, 4
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        block = f"blk.{i}."
        shapes |= {
            f"{block}attn_norm.weight": (HIDDEN,),
            f"{block}ssm_in.weight": (2 * inner, HIDDEN),
            f"{block}ssm_conv1d.weight": (inner, 4),
            f"{block}ssm_conv1d.bias": (inner,),
            f"{block}ssm_x.weight": (rank + 2 * state, inner),
            f"{block}ssm_dt.weight": (inner, rank),
            f"{block}ssm_dt.bias": (inner,),
            f"{block}ssm_a": (inner, state),
            f"{block}ssm_d": (inner,),
            f"{block}ssm_out.weight": (HIDDEN, inner),
        }
    sizes = {"conv_kernel": 4, "inner_size": inner, "state_size": state, "time_step_rank": rank}
    return _model("mamba", shapes, {f"ssm.{name}": size for name, size in sizes.items()})


def _model(
    architecture: str, shapes: dict[str, tuple[int, ...]], more: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata = {
        key.replace("llama.", f"{architecture}."): value for key, value in tiny_metadata().items()
    }
    metadata |= {f"{architecture}.{key}": value for key, value in more.items()}
    metadata["general.architecture"] = architecture
    shapes |= {"token_embd.weight": (49152, HIDDEN), "output_norm.weight": (HIDDEN,)}
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        array = random.standard_normal(shape, np.float32)
        if name.endswith("ssm_a"):
            array = -np.abs(array)
        elif "norm" in name:
            array = array / np.float32(8) + np.float32(1)
        else:
            array = array / np.float32(shape[-1] ** 0.5)
        tensors[name] = encode(array, "F32")
    return metadata, tensors


@pytest.fixture(scope="module", params=[windowed, recurrent], ids=lambda make: make.__name__)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GGUFBackend]:
    make: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]] = request.param
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path, *make())
    backend = load(path)
    yield backend
    backend.close()


def load(path: Path, **settings: Any) -> GGUFBackend:
    return GGUFBackend(path, EngineSettings(context_length=1024, parallel=4, **settings), PLENTY)


@pytest.fixture
def backend(loaded: GGUFBackend) -> GGUFBackend:
    loaded.use(loaded._able)
    return loaded


Answer = list[tuple[int, float]]
"""Tokens and their logprobs."""


def ask(backend: GGUFBackend, *prompts: list[int], tokens: int = 12) -> list[tuple[int, Answer]]:
    """Of each prompt, all together: how many tokens of it were cached, and its answer."""
    params = SamplingParams(temperature=0, logprobs=2)
    cached = dict.fromkeys(range(len(prompts)), 0)
    answers: dict[int, Answer] = {uid: [] for uid in cached}
    for uid, prompt in enumerate(prompts):
        backend.add(Sequence(uid, prompt, tokens, params))
    while backend._running or backend._waiting:
        for event in backend.step():
            if isinstance(event, Prefilled):
                cached[event.uid] = event.cached_tokens
            if isinstance(event, TokenEvent):
                assert event.logprobs
                answers[event.uid].append((event.token, event.logprobs.logprob))
    return [(cached[uid], answers[uid]) for uid in cached]


def same(a: Answer, b: Answer) -> bool:
    """The same tokens from about the same logits."""
    equal = [token for token, _ in a] == [token for token, _ in b]
    return equal and [lp for _, lp in a] == approx([lp for _, lp in b], abs=1e-4)


def chat(backend: GGUFBackend, *messages: str) -> list[int]:
    """System prompt and turns, waiting for the assistant's."""
    written = "".join(f"<|im_start|>{message}<|im_end|>\n" for message in messages)
    return backend.tokenize(f"{written}<|im_start|>assistant\n")


SYSTEM = "system\n" + "You are a helpful assistant, and patient. " * 10
SEA = "user\n" + "Why is the sea blue, and why is it salty? " * 5
CAT = "user\n" + "What does a cat dream of? " * 5


def test_the_next_turn_computes_what_is_new(backend: GGUFBackend) -> None:
    """It goes on where the answer ended, and writes what it would have written without."""
    prompt = chat(backend, SYSTEM, SEA)
    [(_, answer)] = ask(backend, prompt)
    written = [token for token, _ in answer]
    turn = prompt + written + chat(backend, CAT)
    [(cached, after)] = ask(backend, turn)
    assert cached == len(prompt) + len(written) - 1
    backend.use(frozenset())
    [(cached, fresh)] = ask(backend, turn)
    assert cached == 0 and same(after, fresh)


def test_another_conversation_shares_the_system_prompt(backend: GGUFBackend) -> None:
    """A second question to the same assistant, and the first one asked again."""
    prompts = [chat(backend, SYSTEM, question) for question in (SEA, CAT)]
    backend.use(frozenset())
    fresh = [ask(backend, prompt)[0][1] for prompt in prompts]
    backend.use(backend._able)
    system, messages = borders(prompts[0], backend.vocabulary.control)
    for nth, expected in ((0, 0), (1, system), (0, messages)):
        [(cached, answer)] = ask(backend, prompts[nth])
        assert cached == expected and same(answer, fresh[nth])


def test_one_waits_for_another(backend: GGUFBackend) -> None:
    """Together, what both begin with is computed once, up to where they part."""
    prompts = [chat(backend, SYSTEM, SEA), chat(backend, SYSTEM, CAT)]
    backend.use(frozenset())
    alone = [ask(backend, prompt)[0][1] for prompt in prompts]
    backend.use(backend._able)
    (first, one), (second, other) = ask(backend, *prompts)
    parts = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    assert (first, second) == (0, parts)
    assert same(one, alone[0]) and same(other, alone[1])


def test_a_state_that_cannot_be_read_leaves_nothing(backend: GGUFBackend) -> None:
    """Of one cut short some layers were read; the prompt is computed as if it was not there."""
    ask(backend, chat(backend, SYSTEM, SEA))
    tree = backend._snapshots._tree
    [(tokens, _, state)] = tree.paths()
    assert state
    turn = tokens + chat(backend, CAT)
    backend.use(frozenset())
    [(_, fresh)] = ask(backend, turn)
    backend.use(backend._able)
    short = (ctypes.c_uint8 * (len(state) - 1)).from_buffer_copy(state)
    tree.put(tokens, 0, len(tokens), short)
    [(cached, answer)] = ask(backend, turn)
    assert cached == 0 and same(answer, fresh)


def test_the_budget_holds(loaded: GGUFBackend) -> None:
    """However many prompts come, no more is kept; what does not fit alone is not kept at all."""
    backend = load(Path(loaded._model.name.partition("\n")[0]), prefix_cache_bytes=100_000)
    for topic in ("sea", "cat", "moon", "rain"):
        ask(backend, chat(backend, f"system\nYou know all of the {topic}. " * 4, SEA), tokens=2)
        assert backend._snapshots.bytes <= 100_000
    backend.close()


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], []), ([20], []), ([20, 5], [20]), ([20, 30, 5], [20, 50]),
        ([20, 30, 40, 5], [20, 50, 90]), ([20, 30, 40, 50, 5], [20, 90, 140]),
        ([3, 4, 5, 40, 5], [52]), ([3, 5, 8, 5], [16]),
    ],
)  # fmt: skip
def test_borders(messages: list[int], expected: list[int]) -> None:
    """After the system prompt, before the last message and behind it, none that is hardly worth it;
    other control tokens do not matter."""
    tokens = [token for length in messages for token in ([1] + [9] * (length - 1))]
    assert borders(tokens, frozenset({1, 2})) == expected
