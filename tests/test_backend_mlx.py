from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from lmx.backends import (
    BackendBroken,
    Drafted,
    Prefilled,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    TokenEvent,
    Vocabulary,
)
from lmx.backends.mlx import MLXBackend
from lmx.backends.mlx_batch import Batch
from lmx.backends.mlx_model import template, vocabulary
from lmx.backends.mlx_sampling import Adjustments, Sampler
from lmx.config import EngineSettings
from lmx.errors import InsufficientMemory, ModelLoadFailed
from lmx.generation import SamplingParams

from . import models
from .models import PLENTY

GREEDY = SamplingParams(temperature=0)
NEAR_TIE = 0.05
"""Logits; kernels for different batch shapes add in different orders."""

BEGINNINGS = [
    "The capital of France is",
    "Water is made of",
    "Once upon a time",
    "The largest planet is",
    "To make pancakes, you need",
    "Photosynthesis is",
    "Two plus two equals",
    "Hamlet was written by",
    "In the year 1969,",
    "A triangle has",
    "Hello, my name is",
    "Python is a programming",
    "The sky is blue because",
    "Three fruits: apple,",
    "The opposite of hot is",
    "My favourite colour",
]


@pytest.fixture(scope="module")
def smollm2() -> MLXBackend:
    return MLXBackend(models.smollm2_mlx(), EngineSettings(), PLENTY)


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    return models.tiny_mlx(tmp_path / "tiny")


@pytest.fixture
def tiny(tiny_path: Path) -> MLXBackend:
    return MLXBackend(tiny_path, EngineSettings(), PLENTY)


def chat(backend: MLXBackend, question: str) -> list[int]:
    return backend.tokenize(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def sequence(
    backend: MLXBackend, uid: int, text: str, max_tokens: int = 8, params: SamplingParams = GREEDY
) -> Sequence:
    return Sequence(uid, backend.tokenize(text), max_tokens, params)


def text_of(backend: MLXBackend, events: list[StepEvent], uid: int = 1) -> str:
    """What a sequence's tokens stand for; its end token is nothing."""
    known = backend.vocabulary
    tokens = [e.token for e in events if isinstance(e, TokenEvent) and e.uid == uid]
    return b"".join(known.tokens[t] for t in tokens if t not in known.end).decode(errors="replace")


def complete(
    backend: MLXBackend,
    sequences: list[Sequence],
    each_step: Callable[[list[StepEvent]], None] = lambda events: None,
) -> dict[int, str]:
    """All sequences run together to their ends: their texts."""
    for one in sequences:
        backend.add(one)
    seen: list[StepEvent] = []
    running = {one.uid for one in sequences}
    while running:
        events = backend.step()
        each_step(events)
        seen += events
        for event in events:
            if isinstance(event, SequenceFailed) or (
                isinstance(event, TokenEvent) and event.finish
            ):
                running.discard(event.uid)
    return {one.uid: text_of(backend, seen, one.uid) for one in sequences}


def test_mlx_lm_never_wires_memory(tiny: MLXBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, nothing that runs a model may call set_wired_limit, as mlx-lm's generators do."""
    calls: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**30})
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    complete(tiny, [sequence(tiny, 1, "a b c")])
    assert calls == []


def test_a_greedy_answer_does_not_depend_on_its_neighbours(smollm2: MLXBackend) -> None:
    """Alone and among 15 others the text is the same, or first differs at a near-tie."""
    sequences = [sequence(smollm2, n, text, 8) for n, text in enumerate(BEGINNINGS[:6])]
    alone = {s.uid: complete(smollm2, [s])[s.uid] for s in sequences}
    together = complete(smollm2, sequences)
    assert alone[0].startswith(" Paris")
    for one in sequences:
        if alone[one.uid] != together[one.uid]:
            gap = gap_where_they_part(smollm2, one.prompt, alone[one.uid], together[one.uid])
            sys.stdout.write(f"{BEGINNINGS[one.uid]}: differs at a top-two gap of {gap:.4f}\n")
            assert gap < NEAR_TIE


def gap_where_they_part(backend: MLXBackend, prompt: list[int], one: str, other: str) -> float:
    tokens = [backend.tokenize(text) for text in (one, other)]
    common = next(
        (n for n, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b),
        min(map(len, tokens)),
    )
    logits = backend._network(mx.array([prompt + tokens[0][:common]]))[0, -1]
    top = mx.sort(mx.topk(logits, 2))
    return cast(float, (top[1] - top[0]).item())


def test_text_is_an_exact_continuation(smollm2: MLXBackend) -> None:
    """The first token keeps its space: prompt and answer join to what the model meant."""
    [text] = complete(smollm2, [sequence(smollm2, 1, "The capital of France is", 3)]).values()
    assert text.startswith(" ")


def test_the_end_token_ends_an_answer(smollm2: MLXBackend) -> None:
    """An end-of-sequence token finishes with `stop` and adds no text."""
    events: list[StepEvent] = []
    texts = complete(smollm2, [Sequence(1, chat(smollm2, "Say hi."), 60, GREEDY)], events.extend)
    assert texts[1] and "<|im_end|>" not in texts[1]
    [end] = smollm2.tokenize("<|im_end|>")
    assert events[-1] == TokenEvent(1, end, "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_is_exact(tiny: MLXBackend, max_tokens: int) -> None:
    """The last token's text is there and the finish says `length`."""
    events: list[StepEvent] = []
    forever = SamplingParams(temperature=0, logit_bias={0: -100, 2: -100})  # the two end tokens
    complete(tiny, [sequence(tiny, 1, "once upon", max_tokens, forever)], events.extend)
    assert sum(isinstance(event, TokenEvent) for event in events) == max_tokens
    assert isinstance(events[-1], TokenEvent) and events[-1].finish == "length"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=2, top_k=1),
        SamplingParams(temperature=2, top_p=1e-9),
        SamplingParams(temperature=2, min_p=1.0),
        SamplingParams(temperature=1e-6),
    ],
    ids=["top_k=1", "top_p=0", "min_p=1", "temperature=0+"],
)
def test_filters_that_leave_one_token_are_greedy(
    smollm2: MLXBackend, params: SamplingParams
) -> None:
    """Each filter at its extreme keeps the likeliest token only."""
    prompt = "The three primary colours are"
    [greedy] = complete(smollm2, [sequence(smollm2, 1, prompt, 6)]).values()
    [filtered] = complete(smollm2, [sequence(smollm2, 1, prompt, 6, params)]).values()
    assert filtered == greedy


def test_a_seed_repeats_its_answer_in_any_company(smollm2: MLXBackend) -> None:
    """Same seed, same text, alone or among busy neighbours; another seed, another text."""
    seeded = SamplingParams(temperature=1.5, seed=42, top_k=50, top_p=0.99)
    one = sequence(smollm2, 1, "Tell me a story.", 12, seeded)
    other = Sequence(2, one.prompt, 12, SamplingParams(temperature=1.5, seed=43))
    noise = [sequence(smollm2, n, BEGINNINGS[n], 4 + n, SamplingParams()) for n in range(3, 7)]
    alone = complete(smollm2, [one])[1]
    together = complete(smollm2, [*noise, one, other])
    assert together[1] == alone
    assert together[2] != alone
    assert complete(smollm2, [other])[2] != alone


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_64_bit_seed_works(tiny: MLXBackend, seed: int) -> None:
    """Extreme seeds are seeds like others."""
    one = sequence(tiny, 1, "x", 4, SamplingParams(seed=seed))
    assert complete(tiny, [one]) == complete(tiny, [one])


def test_mixed_parameters_share_a_batch(tiny: MLXBackend) -> None:
    """Rows with and without processors, seeds and filters step together."""
    several = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(frequency_penalty=1, logit_bias={5: -100}),
        SamplingParams(temperature=0, repetition_penalty=1.3),
    ]
    sequences = [sequence(tiny, n, "mixed " * (n + 1), 5, p) for n, p in enumerate(several)]
    assert len(complete(tiny, sequences)) == len(several)


def draw(sampler: Sampler, logits: list[float], times: int = 300) -> set[int]:
    row = mx.log(mx.softmax(mx.array([logits])))
    return {cast(int, sampler(row).item()) for _ in range(times)}


@pytest.mark.parametrize(
    ("filters", "drawn"),
    [
        ((1.0, 0, 1.0, 0.0), {0, 1, 2, 3}),
        ((1.0, 2, 1.0, 0.0), {1, 3}),
        ((1.0, 9, 1.0, 0.0), {0, 1, 2, 3}),
        ((1.0, 0, 0.7, 0.0), {1, 3}),  # 0.5 alone does not reach 0.7
        ((1.0, 0, 0.4, 0.0), {1}),
        ((1.0, 3, 0.9, 0.0), {0, 1, 3}),  # of the three that are left, 0.84 is not yet 0.9
        ((1.0, 0, 1.0, 0.3), {0, 1, 3}),
        ((1.0, 0, 1.0, 0.5), {1, 3}),
        ((1.0, 3, 0.95, 0.5), {1, 3}),
        ((0.0, 0, 1.0, 0.0), {1}),
    ],
    ids=str,
)
def test_sampler_filters(filters: tuple[float, int, float, float], drawn: set[int]) -> None:
    """temperature, top_k, top_p, min_p on the distribution 0.15, 0.5, 0.05, 0.3."""
    logits = [math.log(p) for p in (0.16, 0.5, 0.04, 0.3)]
    assert draw(Sampler(*filters), logits) == drawn


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(logit_bias={0: 5.0, 3: -100.0}), [6.0, 2.0, -3.0, -96.0]),
        (SamplingParams(repetition_penalty=2.0), [0.5, 1.0, -3.0, 4.0]),
        (SamplingParams(presence_penalty=0.5), [1.0, 1.5, -3.0, 4.0]),
        (SamplingParams(frequency_penalty=0.5), [1.0, 1.0, -3.0, 4.0]),
        (SamplingParams(presence_penalty=-1.0, frequency_penalty=0.5), [1.0, 2.0, -3.0, 4.0]),
    ],
    ids=["logit_bias", "repetition", "presence", "frequency", "both"],
)
def test_adjustments(params: SamplingParams, expected: list[float]) -> None:
    """Token 0 is in the prompt, token 1 twice in the answer; repetition counts both, the others
    the answer only."""
    logits = mx.array([[1.0, 2.0, -3.0, 4.0]])
    steps = Adjustments(params, [0, 0], [])
    steps(mx.array([0]), logits)
    steps(mx.array([1]), logits)
    assert steps(mx.array([1]), logits).tolist() == [expected]
    resumed = Adjustments(params, [0, 0], [1, 1])
    assert resumed(mx.array([1]), logits).tolist() == [expected]


def test_repetition_penalty_lowers_negative_logits() -> None:
    """The paper's rule: a negative logit is multiplied, so that it falls too."""
    adjust = Adjustments(SamplingParams(repetition_penalty=2.0), [1], [])
    assert adjust(mx.array([1]), mx.array([[1.0, -2.0]])).tolist() == [[1.0, -4.0]]


@pytest.mark.parametrize(
    ("bias", "text"), [({1000: 100.0}, True), ({1000: 100.0, 1001: 100.5}, False)]
)
def test_logit_bias_forces_a_token(tiny: MLXBackend, bias: dict[int, float], text: bool) -> None:
    """+100 makes a token certain, and the larger bias wins."""
    wanted = tiny._tokenizer.decode([1000])
    params = SamplingParams(temperature=0, logit_bias=bias)
    [answer] = complete(tiny, [sequence(tiny, 1, "a", 3, params)]).values()
    assert (answer == wanted * 3) is text


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x3FFFF), max_size=40))
def test_the_bytes_of_tokens_are_their_text(text: str) -> None:
    """Whatever is tokenized comes back, byte for byte, control tokens apart."""
    tokenizer, known = smollm2_vocabulary()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    data = b"".join(known.tokens[id] for id in ids)
    # SmolLM2 has no token for some bytes, which its tokenizer drops.
    bytes_known = {byte for piece in known.tokens for byte in piece}
    assert data == bytes(byte for byte in text.encode() if byte in bytes_known)


@cache
def smollm2_vocabulary() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer.from_file(str(models.smollm2_mlx() / "tokenizer.json"))
    return tokenizer, vocabulary(tokenizer, [2])


def test_the_bytes_of_sentencepiece_tokens() -> None:
    """Byte tokens are bytes, the low line is a space, control tokens have their name."""
    ids = {"<s>": 0, "<0xF0>": 1, "\u2581cat": 2, "é": 3, "<tool>": 4, "<0xg0>": 5}
    tokenizer = Tokenizer(BPE(ids, []))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<tool>"])
    known = vocabulary(tokenizer, {0})
    assert known.tokens == [b"<s>", b"\xf0", b" cat", "é".encode(), b"<tool>", b"<0xg0>"]
    assert known.control == known.end == {0}


def narrow_slices(path: Path, monkeypatch: pytest.MonkeyPatch) -> MLXBackend:
    """A backend that takes 32 tokens of a prompt at a time, as if it were very slow."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)
    return MLXBackend(path, EngineSettings(), PLENTY)


@pytest.mark.parametrize("steps", [0, 1, 2, 5], ids=["waiting", "prefilling", "first", "decoding"])
def test_a_sequence_can_be_removed_at_any_time(
    tiny_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stage it is in, its row is free and its neighbour's text is what it is alone."""
    backend = narrow_slices(tiny_path, monkeypatch)
    neighbour = sequence(backend, 1, "a neighbour that stays", 12)
    alone = complete(backend, [neighbour])
    backend.add(neighbour)
    while not any(isinstance(event, TokenEvent) for event in backend.step()):
        pass
    backend.add(sequence(backend, 2, "word " * 100, 50))
    events: list[StepEvent] = []
    for _ in range(steps):
        events += backend.step()
    backend.remove(2)
    backend.remove(2)
    backend.remove(77)
    assert [row.sequence.uid for row in backend._rows.values()] == [1]
    done = False
    while not done:
        for event in backend.step():
            assert isinstance(event, Prefilled | TokenEvent | Drafted) and event.uid == 1
            events.append(event)
            done = isinstance(event, TokenEvent) and event.finish is not None
    assert alone[1].endswith(text_of(backend, events))
    assert not backend._rows and not backend._waiting


def test_a_long_prompt_is_prefilled_in_slices(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one prompt is prefilled, the running stream gets a token in every step."""
    backend = narrow_slices(tiny_path, monkeypatch)
    running = sequence(backend, 1, "go", 400, SamplingParams(logit_bias={0: -100, 2: -100}))
    backend.add(running)
    tokens = 0
    while tokens < 2:
        tokens += sum(isinstance(event, TokenEvent) for event in backend.step())
    backend.add(sequence(backend, 2, "word " * 600, 1))
    steps = 0
    while 2 not in (uids := [event.uid for event in backend.step()]):
        assert uids == [1]
        steps += 1
    assert steps >= 600 // 32


def test_more_sequences_than_rows_wait_their_turn(tiny_path: Path) -> None:
    """`parallel` bounds the batch, and everybody is served."""
    backend = MLXBackend(tiny_path, EngineSettings(parallel=3), PLENTY)
    rows = []
    texts = complete(
        backend,
        [sequence(backend, n, f"prompt {n}", 4) for n in range(10)],
        lambda events: rows.append(len(backend._rows)),
    )
    assert len(texts) == 10 and max(rows) <= 3


NOTHING_KEPT = EngineSettings(prefix_cache_bytes=0)
STEP_BYTES = 256 * 2 * 2 * 2 * 16 * 4
"""The tiny model's KV cache grows by 256 tokens: 2 layers, K and V of 2 heads of 16 float32."""


@pytest.mark.parametrize(
    ("steps", "length", "tokens", "rows"),
    [(2, 20, 8, 2), (3, 20, 8, 3), (2, 188, 80, 2), (4, 300, 8, 2), (2, 300, 8, 1)],
    ids=["two fit", "three fit", "two until they grow", "two of two steps", "one of two steps"],
)
def test_the_kv_cache_stays_within_its_grant(
    tiny_path: Path, steps: int, length: int, tokens: int, rows: int
) -> None:
    """What does not fit waits, the youngest gives way, and every text is what it is alone."""
    backend = MLXBackend(tiny_path, NOTHING_KEPT, steps * STEP_BYTES)
    text = "a b " * (length // 2)
    sequences = [sequence(backend, n, f"{n} {text}", tokens) for n in range(5)]
    most = 0

    def look(events: list[StepEvent]) -> None:
        nonlocal most
        most = max(most, len(backend._rows))
        memory = backend.grant(steps * STEP_BYTES)
        assert memory.kv_used_bytes <= memory.kv_bytes == steps * STEP_BYTES

    together = complete(backend, sequences, look)
    assert most == rows
    free = MLXBackend(tiny_path, NOTHING_KEPT, PLENTY)
    assert together == {s.uid: complete(free, [s])[s.uid] for s in sequences}


def test_the_estimate_of_the_kv_cache_is_what_mlx_takes(tiny_path: Path) -> None:
    """What a batch is said to take is what its caches really hold."""
    backend = MLXBackend(tiny_path, NOTHING_KEPT, PLENTY)
    for n in range(3):
        backend.add(sequence(backend, n, f"{n} " + "a b " * 70, 200))
    while len(backend.step()) < 3:
        pass
    held = sum(layer.nbytes for group in backend._batch._groups for layer in group.cache)
    assert backend.grant(PLENTY).kv_used_bytes == held


def test_a_sequence_that_never_fits_fails(tiny_path: Path) -> None:
    """Alone it is refused with the numbers, at its prompt or when it has grown too long; the
    others go on, and with a larger grant it would have run."""
    backend = MLXBackend(tiny_path, EngineSettings(), STEP_BYTES)
    failed: list[SequenceFailed] = []

    def look(events: list[StepEvent]) -> None:
        failed.extend(event for event in events if isinstance(event, SequenceFailed))

    long, grows, short = (
        sequence(backend, n, "a " * length, 200) for n, length in enumerate((300, 100, 20))
    )
    texts = complete(backend, [long, grows], look)
    texts |= complete(backend, [short], look)
    assert [event.uid for event in failed] == [0, 1]
    assert all(isinstance(event.error, InsufficientMemory) for event in failed)
    assert "0.00 GB" in failed[0].error.message and texts[0] == "" and texts[1] and texts[2]
    assert backend.grant(2 * STEP_BYTES).kv_bytes == 2 * STEP_BYTES
    complete(backend, [long, grows], look)
    assert len(failed) == 2


def test_a_smaller_grant_throws_nothing_away(tiny_path: Path) -> None:
    """What runs may end; what it takes is reported until it has."""
    backend = MLXBackend(tiny_path, NOTHING_KEPT, PLENTY)
    sequences = [sequence(backend, n, f"{n} a b", 8) for n in range(4)]
    reports = []
    complete(backend, sequences, lambda events: reports.append(backend.grant(STEP_BYTES)))
    assert reports[0].kv_bytes == reports[0].kv_used_bytes == 4 * STEP_BYTES
    assert reports[-1].kv_bytes == STEP_BYTES
    assert backend.grant(STEP_BYTES).kv_used_bytes == 0


def test_a_smaller_grant_ends_no_answer(tiny_path: Path) -> None:
    """The oldest sequence may go on to its end; the others make way for it and come back."""
    backend = MLXBackend(tiny_path, NOTHING_KEPT, 2 * STEP_BYTES)
    sequences = [sequence(backend, n, f"{n} " + "a b " * 94, 80) for n in range(2)]

    def shrink(events: list[StepEvent]) -> None:
        backend.grant(STEP_BYTES)

    texts = complete(backend, sequences, shrink)
    free = MLXBackend(tiny_path, NOTHING_KEPT, PLENTY)
    assert texts[0] == complete(free, sequences[:1])[0]


def test_a_cache_that_cannot_be_batched_runs_one_at_a_time(
    tiny: MLXBackend, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mlx-lm cannot merge KV caches, sequences follow one another, with the same texts."""
    several = [
        sequence(tiny, 0, "one", 6),
        sequence(tiny, 1, "and two", 6, SamplingParams(seed=5, presence_penalty=0.5)),
        sequence(tiny, 2, "x", 1),
    ]
    together = complete(tiny, several)
    monkeypatch.setattr("lmx.backends.mlx.can_merge", lambda cache: False)
    serial = MLXBackend(tiny_path, EngineSettings(), PLENTY)
    assert serial.parallel == 1
    serial.add(sequence(serial, 9, "gone", 99))
    serial.step()
    serial.remove(9)
    assert complete(serial, several) == together


def test_a_failed_step_fails_the_newcomer_only(
    tiny: MLXBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence being prefilled is the suspect; the others go on with the same text."""
    survivor = sequence(tiny, 1, "a survivor", 10)
    alone = complete(tiny, [survivor])[1]
    events: list[StepEvent] = []
    tiny.add(survivor)
    while len(events) < 3:
        events += tiny.step()
    tiny.add(sequence(tiny, 2, "the suspect", 10))

    def fail(*args: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr("lmx.backends.mlx.prefill", fail)
        [failed, *others] = tiny.step()
    events += others
    assert isinstance(failed, SequenceFailed) and failed.uid == 2
    assert "Unable to allocate" in failed.error.message
    while not (isinstance(events[-1], TokenEvent) and events[-1].finish):
        events += tiny.step()
    assert text_of(tiny, events) == alone


def test_a_failed_step_without_a_suspect_fails_all(
    tiny: MLXBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When only running rows can be to blame, they fail, and the next sequence works."""
    for uid in (1, 2):
        tiny.add(sequence(tiny, uid, "x", 50, SamplingParams(logit_bias={0: -100, 2: -100})))
    tiny.step()

    def fail(self: Any) -> None:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", fail)
        assert {event.uid for event in tiny.step()} == {1, 2}
    assert complete(tiny, [sequence(tiny, 3, "y", 2)])


def test_a_metal_error_breaks_the_backend(
    tiny: MLXBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a Metal error nothing this process computes can be trusted."""

    def fail(self: Any) -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")

    monkeypatch.setattr(Batch, "step", fail)
    tiny.add(sequence(tiny, 1, "x"))
    with pytest.raises(BackendBroken, match="Impacting Interactivity"):
        for _ in range(2):  # the first token comes of the prompt
            tiny.step()


def test_the_context_length_is_the_models_or_less(tiny_path: Path) -> None:
    """A configured length shortens the model's own and never lengthens it."""
    own = MLXBackend(tiny_path, EngineSettings(), PLENTY).context_length
    assert MLXBackend(tiny_path, EngineSettings(context_length=100), PLENTY).context_length == 100
    assert (
        MLXBackend(tiny_path, EngineSettings(context_length=own * 2), PLENTY).context_length == own
    )


def change(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(edit((folder / file).read_bytes()))

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    return change("config.json", lambda raw: json.dumps(json.loads(raw) | changes).encode())


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (change("config.json", lambda raw: raw[:40]), "config.json"),
        (change("config.json", lambda raw: b"[]"), "config.json"),
        (config(model_type="no_such_model"), "no_such_model"),
        (config(model_type="../../etc"), "tiny"),
        (config(model_file="evil.py"), "model_file"),
        (config(hidden_size=32), "tiny"),
        (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        (change("model.safetensors", lambda raw: raw[:-1]), "model.safetensors"),
        (change("model.safetensors", lambda raw: raw[:5]), "model.safetensors"),
        (change("model.safetensors", lambda raw: b"\xff" * 8 + raw[8:]), "model.safetensors"),
        (change("model.safetensors", lambda raw: raw[:8] + b"!" + raw[9:]), "model.safetensors"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            ),
            "model-00001-of-00002.safetensors",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "tiny"),
        (change("tokenizer.json", lambda raw: raw[:1000]), "tokenizer.json"),
    ],
)
def test_a_damaged_folder_is_refused(
    tiny_path: Path, damage: Callable[[Path], None], names: str
) -> None:
    """Whatever is missing, truncated or made up: one clear error that names it."""
    damage(tiny_path)
    with pytest.raises(ModelLoadFailed, match=names):
        MLXBackend(tiny_path, EngineSettings(), PLENTY)


def test_code_in_a_model_folder_is_not_run(tiny_path: Path) -> None:
    """`auto_map`, which many sound models carry, is ignored and runs nothing."""
    canary = tiny_path / "canary"
    (tiny_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config(auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]})(tiny_path)
    backend = MLXBackend(tiny_path, EngineSettings(), PLENTY)
    complete(backend, [sequence(backend, 1, "x", 2)])
    assert not canary.exists()


def test_close_gives_the_memory_back(tiny_path: Path) -> None:
    """After close MLX holds no more than before the load."""
    before = mx.get_active_memory()
    backend = MLXBackend(tiny_path, EngineSettings(), PLENTY)
    complete(backend, [sequence(backend, 1, "x", 2)])
    assert backend.grant(0).engine_bytes > before
    backend.close()
    del backend
    assert mx.get_active_memory() <= before + 1024


def test_mlx_lm_renders_where_a_model_has_no_template() -> None:
    """A template by name, several of them, none, or mlx-lm's own code."""
    said = SimpleNamespace(
        chat_template=None,
        has_chat_template=True,
        bos_token=None,
        eos_token=None,
        apply_chat_template=lambda messages, tools, tokenize, add_generation_prompt: str(messages),
    )
    message = {"role": "user", "content": "x"}
    rendered = template(said, EngineSettings())
    assert rendered and rendered.render([message]) == str([message])
    said.chat_template = {"tool_use": "no", "default": "yes"}
    rendered = template(said, EngineSettings())
    assert rendered and rendered.render([message]) == "yes"
    said.chat_template, said.has_chat_template = None, False
    assert template(said, EngineSettings()) is None


def reference(backend: MLXBackend, tokens: list[int]) -> mx.array:
    """Log-probabilities after these tokens, straight from the model."""
    logits: mx.array = backend._network(mx.array([tokens]))[0, -1].astype(mx.float32)
    return logits - mx.logsumexp(logits)


def test_logprobs_are_the_models(smollm2: MLXBackend) -> None:
    """Of each greedy token and the likeliest, in a batch with others: what the model alone gives,
    whatever bias, penalty or grammar did to the choice."""
    biased = SamplingParams(temperature=0, logprobs=2, logit_bias={9: 100.0})
    several = [
        sequence(smollm2, 1, BEGINNINGS[0], 4, SamplingParams(temperature=0, logprobs=5)),
        sequence(smollm2, 2, BEGINNINGS[1], 2, GREEDY),
        sequence(smollm2, 3, BEGINNINGS[2], 2, biased),
        sequence(smollm2, 4, BEGINNINGS[3], 2, SamplingParams(logprobs=0)),
    ]
    events: list[StepEvent] = []
    complete(smollm2, several, events.extend)
    for one in several:
        tokens = list(one.prompt)
        for event in events:
            if not isinstance(event, TokenEvent) or event.uid != one.uid:
                continue
            if one.params.logprobs is None:
                assert event.logprobs is None
                continue
            assert event.logprobs is not None
            expected = reference(smollm2, tokens)
            assert event.logprobs.logprob == approx(expected[event.token].item(), abs=1e-3)
            top = event.logprobs.top
            assert len(top) == one.params.logprobs
            assert [lp for _, lp in top] == sorted((lp for _, lp in top), reverse=True)
            assert all(lp == approx(expected[id].item(), abs=1e-3) for id, lp in top)
            tokens.append(event.token)


def test_answers_to_one_prompt_share_its_prefill(
    smollm2: MLXBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is computed once for all of them, and each text is what it is alone."""
    computed = 0
    call = type(smollm2._network).__call__

    def count(self: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        nonlocal computed
        computed += inputs.size
        return call(self, inputs, *args, **kwargs)

    prompt = chat(smollm2, "Name three colours, and then tell me a story about each of them.")
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4)]
    several = [Sequence(uid, prompt, 5, p) for uid, p in enumerate(params)]
    smollm2.use(smollm2.features - {"prefix"})
    alone = [complete(smollm2, [one])[one.uid] for one in several]
    monkeypatch.setattr(type(smollm2._network), "__call__", count)
    neighbour = sequence(smollm2, 9, "The sea", 6)
    together = complete(smollm2, [*several, neighbour])
    assert [together[n] for n in range(4)] == alone and len(set(alone)) > 1
    decoded = 4 * 5 + 6
    # One token a row is drawn in vain at the end: mlx-lm decodes a step ahead.
    assert len(prompt) + decoded <= computed <= len(prompt) + decoded + 5 * 8
    smollm2.use(smollm2.features | {"prefix"})


def test_an_answer_that_came_back_is_not_shared(tiny_path: Path) -> None:
    """One that made way in mid-answer and one to the same prompt that has not begun go on apart."""
    settings = EngineSettings(prefix_cache_bytes=0, parallel=2)
    backend = MLXBackend(tiny_path, settings, 2 * STEP_BYTES)
    prompt = backend.tokenize("a b " * 90)
    forever = SamplingParams(temperature=0, logit_bias={0: -100.0, 2: -100.0})
    one, other = (Sequence(n, prompt, 90, forever) for n in (1, 2))
    for each in (Sequence(0, backend.tokenize("c d " * 90), 90, forever), one, other):
        backend.add(each)
    events = backend.step()
    while len(backend._waiting) < 2:
        events += backend.step()
    backend.remove(0)
    backend.grant(PLENTY)
    while backend._rows or backend._waiting:
        events += backend.step()
    [alone] = complete(MLXBackend(tiny_path, NOTHING_KEPT, PLENTY), [one]).values()
    assert text_of(backend, events, 1) == text_of(backend, events, 2) == alone


@pytest.mark.parametrize("gone", [0, 1, 3], ids=["leader", "follower", "last"])
@pytest.mark.parametrize("steps", [0, 2, 9])
def test_one_of_the_answers_can_leave(
    tiny_path: Path, gone: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed while the common prompt is prefilled or later, it does not change the others."""
    backend = narrow_slices(tiny_path, monkeypatch)
    prompt = backend.tokenize("word " * 70)
    forever = {0: -100.0, 2: -100.0}
    several = [
        Sequence(n, prompt, 12, SamplingParams(seed=n, logit_bias=forever)) for n in range(4)
    ]
    alone = {s.uid: complete(backend, [s])[s.uid] for s in several}
    for one in several:
        backend.add(one)
    events = [event for _ in range(steps) for event in backend.step()]
    backend.remove(gone)
    while backend._rows or backend._waiting:
        events += backend.step()
    assert {n: text_of(backend, events, n) for n in range(4) if n != gone} == {
        n: alone[n] for n in range(4) if n != gone
    }


class Only:
    """A constraint to these tokens in turn, then to the end token."""

    def __init__(self, backend: MLXBackend, tokens: list[int]) -> None:
        self._size = len(backend.vocabulary.tokens)
        self._tokens = [*tokens, min(backend.vocabulary.end)]
        self._at = 0

    def restart(self, answer: list[int]) -> None:
        self._at = len(answer)

    def accept(self, token: int) -> None:
        assert token == self._tokens[self._at]
        self._at += 1

    def mask(self) -> bytes | None:
        if self._at >= len(self._tokens):
            return None
        mask = bytearray(-(-self._size // 32) * 4)
        token = self._tokens[self._at]
        mask[token // 8] |= 1 << token % 8
        return bytes(mask)


def test_a_constraint_holds_its_row_and_no_other(tiny: MLXBackend) -> None:
    """Greedy, hot and penalized rows write what they are forced to, beside free ones that write
    what they write alone."""
    free = sequence(tiny, 1, "free as a bird", 8, SamplingParams(seed=3))
    alone = complete(tiny, [free])[1]
    wanted = " exactly this, and no more"
    forced = [
        Sequence(n, tiny.tokenize(f"{n} x"), 50, params, Only(tiny, tiny.tokenize(wanted)))
        for n, params in enumerate(
            [
                GREEDY,
                SamplingParams(temperature=1.5),
                SamplingParams(seed=1, top_k=3, min_p=0.1),
                SamplingParams(repetition_penalty=1.5, logprobs=1),
            ],
            start=2,
        )
    ]
    texts = complete(tiny, [forced[0], free, *forced[1:]])
    assert texts == {1: alone, 2: wanted, 3: wanted, 4: wanted, 5: wanted}


def test_a_constrained_row_survives_its_return_to_the_queue(tiny_path: Path) -> None:
    """When it comes back the constraint goes on where it was."""
    backend = MLXBackend(tiny_path, EngineSettings(), STEP_BYTES)
    tokens = backend.tokenize("a b c d e f g h " * 12)
    several = [
        Sequence(n, backend.tokenize(f"{n} " + "a " * 180), 200, GREEDY, Only(backend, tokens))
        for n in range(2)
    ]
    backend.grant(2 * STEP_BYTES)
    shrunk = False

    def shrink(events: list[StepEvent]) -> None:
        nonlocal shrunk
        shrunk = shrunk or backend.grant(STEP_BYTES).kv_bytes == 0

    texts = complete(backend, several, shrink)
    assert texts[0] == "a b c d e f g h " * 12
