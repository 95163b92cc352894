"""The GGUF backend with a real model: SmolLM2-135M-Instruct, Q4_1."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from pytest import approx

from lmx.backends import (
    BackendBroken,
    Prefilled,
    PrefillRate,
    Sequence,
    SequenceFailed,
    TokenEvent,
    gguf_rows,
)
from lmx.backends.gguf import GGUFBackend
from lmx.config import EngineSettings
from lmx.errors import ModelLoadFailed
from lmx.generation import SamplingParams

from .fakes import Only
from .models import PLENTY, smollm2_gguf

GREEDY = SamplingParams(temperature=0)
ENDLESS = {0: -100.0, 2: -100.0}
"""No end tokens."""
TOPICS = (
    "the sea,a cat,Paris,bread,the moon,chess,rain,a robot,tea,mountains,the piano,a bicycle,gold,"
    "an owl,snow,a library"
).split(",")


@pytest.fixture(scope="module")
def loaded() -> Iterator[GGUFBackend]:
    backend = GGUFBackend(smollm2_gguf(), EngineSettings(context_length=2048), PLENTY)
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: GGUFBackend) -> Iterator[GGUFBackend]:
    """The shared backend; whatever a test did, it must leave no cell in use but for prefixes."""
    for row in [*loaded._running, *loaded._waiting]:
        loaded.remove(row.uid)  # of a test that has failed
    loaded.use(loaded.features)
    yield loaded
    assert_idle(loaded)
    loaded.use(loaded.features)
    assert_empty(loaded)


def assert_idle(backend: GGUFBackend) -> None:
    assert backend.step() == []
    assert backend._cells.held(backend._cells.parked) == backend._cells.used


def assert_empty(backend: GGUFBackend) -> None:
    cells = backend._cells
    cache = llama_cpp.llama_get_memory(backend._model.context)
    assert not cells.used and not cells.parked
    assert sorted(cells.free_ids) == list(range(backend._model.seq_ids))
    for seq_id in cells.free_ids:
        assert llama_cpp.llama_memory_seq_pos_max(cache, seq_id) == -1


def question(backend: GGUFBackend, text: str) -> list[int]:
    return backend.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def drain(backend: GGUFBackend, uids: set[int]) -> dict[int, list[TokenEvent]]:
    """Step until the sequences have finished; every one ends with its only terminal event."""
    events: dict[int, list[TokenEvent]] = {uid: [] for uid in uids}
    unfinished = set(uids)
    while unfinished:
        for event in backend.step():
            assert event.uid in unfinished
            if isinstance(event, Prefilled):
                assert not events[event.uid]
            if not isinstance(event, TokenEvent):
                continue
            events[event.uid].append(event)
            if event.finish:
                unfinished.remove(event.uid)
    return events


def generate(
    backend: GGUFBackend,
    prompts: Mapping[int, list[int]],
    max_tokens: int,
    params: SamplingParams | Mapping[int, SamplingParams] = GREEDY,
) -> dict[int, list[int]]:
    """The answers' tokens, all prompts in one batch."""
    for uid, prompt in prompts.items():
        chosen = params if isinstance(params, SamplingParams) else params[uid]
        backend.add(Sequence(uid, prompt, max_tokens, chosen))
    rows = {row.uid: row for row in backend._waiting}
    drain(backend, set(prompts))
    return {uid: rows[uid].tokens[len(prompt) :] for uid, prompt in prompts.items()}


def texts(backend: GGUFBackend, events: list[TokenEvent]) -> list[bytes]:
    return [backend.vocabulary.tokens[event.token] for event in events]


def answer(
    backend: GGUFBackend, prompt: list[int], max_tokens: int, params: SamplingParams = GREEDY
) -> list[int]:
    return generate(backend, {0: prompt}, max_tokens, params)[0]


def top_two_gap(backend: GGUFBackend, tokens: list[int]) -> float:
    backend.add(Sequence(0, tokens, 1, GREEDY))
    drain(backend, {0})
    logits = llama_cpp.llama_get_logits_ith(backend._context, -1)
    second, first = sorted(logits[: len(backend.vocabulary.tokens)])[-2:]
    return float(first - second)


def count_equal(
    backend: GGUFBackend,
    prompts: Mapping[int, list[int]],
    alone: Mapping[int, list[int]],
    batch: Mapping[int, list[int]],
) -> int:
    """How many answers are equal; the others must part where two tokens are nearly as likely."""
    equal = 0
    for uid, prompt in prompts.items():
        if alone[uid] == batch[uid]:
            equal += 1
            continue
        pairs = zip(alone[uid], batch[uid], strict=False)
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        gap = top_two_gap(backend, prompt + alone[uid][:first])
        message = f"prompt {uid} differs from token {first} on; top two logits {gap:.3f} apart"
        print(message)  # noqa: T201
        assert gap < 0.5, message
    return equal


def test_greedy_answers_do_not_depend_on_the_batch(backend: GGUFBackend) -> None:
    """Prompts of different length answer alone as they do in a full batch."""
    prompts = {
        i: question(backend, f"Explain in detail{' and with care' * (i % 5)} why we like {topic}")
        for i, topic in enumerate(TOPICS)
    }
    batch = generate(backend, prompts, 64)
    some = {uid: prompts[uid] for uid in (0, 3, 6, 9, 14)}
    alone = {uid: answer(backend, prompt, 64) for uid, prompt in some.items()}
    equal = count_equal(backend, some, alone, batch)
    # On the CPU rows are bit-equal (see `_make_context`); where a GPU computes, they are not.
    assert equal == len(some) or llama_cpp.llama_supports_gpu_offload()


def test_ended_sequences_are_parked_until_their_cells_are_needed(backend: GGUFBackend) -> None:
    """Their ids and cells are no loss: whoever comes takes them, the oldest first."""
    params = SamplingParams(temperature=0, logit_bias=ENDLESS)
    backend.add(Sequence(0, backend.tokenize("word " * 40), 400, params))
    for uid in range(1, 100):
        backend.add(Sequence(uid, backend.tokenize(f"{uid} words " * 10), 2, GREEDY))
    ended, parked, used, cells = 0, 0, 0, backend._cells
    while ended < 99:
        events = [event for event in backend.step() if isinstance(event, TokenEvent)]
        ended += sum(event.finish is not None for event in events)
        parked, used = max(parked, len(cells.parked)), max(used, cells.used)
        assert cells.used <= cells.size
    assert parked > backend.parallel
    assert used > 0.75 * cells.size  # of which the dead take some, until all is moved
    assert cells.room(cells.size) == cells.size - backend._running[0].cached
    assert not cells.parked
    backend.remove(0)


def test_preempted_sequences_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that outgrow the pool give the answers they give alone."""
    backend = GGUFBackend(smollm2_gguf(), EngineSettings(context_length=128, parallel=8), PLENTY)
    monkeypatch.setattr(gguf_rows, "GROWTH_CELLS", 8)
    backend._cells.size = 128  # llama.cpp rounds up to 256
    preempt, preempted = backend._preempt_youngest, []

    def count() -> None:
        preempted.append(backend._running[-1].uid)
        preempt()

    monkeypatch.setattr(backend, "_preempt_youngest", count)
    prompts = {i: backend.tokenize(f"Once upon a time, {TOPICS[i]}") for i in range(6)}
    params = {i: GREEDY if i % 2 else SamplingParams(top_p=0.0, seed=i) for i in prompts}
    alone = {i: answer(backend, prompt, 32, params[i]) for i, prompt in prompts.items()}
    batch = generate(backend, prompts, 32, params)
    assert preempted and 0 not in preempted
    count_equal(backend, prompts, alone, batch)
    assert_idle(backend)
    backend.close()


def test_logit_bias(backend: GGUFBackend) -> None:
    """+100 forces a token, -100 forbids it, and an unknown token is no matter."""
    prompt = question(backend, "Where is Paris?")
    [forced] = backend.tokenize(" owl")
    params = SamplingParams(logit_bias={forced: 100.0, 10**6: 100.0, -1: 100.0}, temperature=1.0)
    assert answer(backend, prompt, 5, params) == [forced] * 5
    first, *_ = answer(backend, prompt, 1)
    params = SamplingParams(logit_bias={first: -100.0}, temperature=0)
    assert first not in answer(backend, prompt, 8, params)


def test_repetition_penalty_counts_prompt_and_answer(backend: GGUFBackend) -> None:
    """It keeps a token of the prompt from being the first of the answer."""
    prompt = backend.tokenize("one two one two one two one two one")
    [two] = backend.tokenize(" two")
    assert answer(backend, prompt, 3)[0] == two
    tokens = answer(backend, prompt, 24, SamplingParams(temperature=0, repetition_penalty=50.0))
    assert not set(tokens) & set(prompt) and len(set(tokens)) == len(tokens)


@pytest.mark.parametrize(
    "penalty",
    [
        SamplingParams(temperature=0, presence_penalty=100.0),
        SamplingParams(temperature=0, frequency_penalty=100.0),
    ],
    ids=["presence", "frequency"],
)
def test_presence_and_frequency_penalty_count_the_answer(
    backend: GGUFBackend, penalty: SamplingParams
) -> None:
    """The prompt's tokens stay as likely as they were, the answer's do not come again."""
    prompt = backend.tokenize("one two one two one two one two one")
    plain = answer(backend, prompt, 24)
    penalised = answer(backend, prompt, 24, penalty)
    assert penalised[0] == plain[0] and penalised[0] in prompt
    assert len(set(plain)) < len(set(penalised)) == 24


def test_presence_counts_once_and_frequency_every_time(backend: GGUFBackend) -> None:
    """A forced token can outweigh its presence, but not its ever growing frequency."""
    prompt = question(backend, "Where is Paris?")
    [forced] = backend.tokenize(" owl")
    presence = SamplingParams(temperature=0, logit_bias={forced: 100.0}, presence_penalty=20.0)
    frequency = SamplingParams(temperature=0, logit_bias={forced: 100.0}, frequency_penalty=20.0)
    assert set(answer(backend, prompt, 12, presence)) == {forced}
    assert set(answer(backend, prompt, 12, frequency)) > {forced}


@pytest.mark.parametrize(
    "params",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0, "top_k": 3}],
    ids=lambda params: next(iter(params)),
)
def test_narrow_sampling_equals_greedy(backend: GGUFBackend, params: dict[str, Any]) -> None:
    """Each filter at its narrowest leaves the likeliest token only."""
    prompt = question(backend, "Tell me about the sea.")
    sampling = SamplingParams(**({"temperature": 1.5, "seed": 7} | params))
    assert answer(backend, prompt, 24, sampling) == answer(backend, prompt, 24)


def test_temperature_and_seed(backend: GGUFBackend) -> None:
    """Different seeds, or none, give different answers; any 64-bit seed works."""
    prompt = question(backend, "Tell me about the sea.")
    seeds = [0, 1, -1, 2**33 + 5, 2**63 - 1, None, None]
    prompts = dict.fromkeys(range(len(seeds)), prompt)
    params = {
        i: SamplingParams(temperature=1.5, seed=seed, logit_bias=ENDLESS)
        for i, seed in enumerate(seeds)
    }
    answers = [tuple(tokens) for tokens in generate(backend, prompts, 24, params).values()]
    assert len(set(answers)) == len(seeds)
    again = [tuple(tokens) for tokens in generate(backend, prompts, 24, params).values()]
    assert [a == b for a, b in zip(answers, again, strict=True)] == [
        seed is not None for seed in seeds
    ]


def test_seed_gives_the_same_answer_in_a_busy_batch(backend: GGUFBackend) -> None:
    """A seeded answer repeats among other sequences that sample differently."""
    prompt = question(backend, "Tell me about the sea.")
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=42)
    alone = answer(backend, prompt, 32, seeded)
    prompts = {i: question(backend, f"What is {topic}?") for i, topic in enumerate(TOPICS[:6])}
    params = {i: SamplingParams(temperature=1.0 + i / 10, logit_bias=ENDLESS) for i in prompts}
    assert generate(backend, prompts | {9: prompt}, 32, params | {9: seeded})[9] == alone


def test_finish_reasons(backend: GGUFBackend) -> None:
    """The end token finishes with stop and without text, max_tokens with length and with text."""
    prompt = question(backend, "What is the capital of France?")
    for uid, max_tokens in enumerate([40, 3, 1]):
        backend.add(Sequence(uid, prompt, max_tokens, GREEDY))
    events = drain(backend, {0, 1, 2})
    said = b"The capital of France is Paris.<|im_end|>"
    assert b"".join(texts(backend, events[0])) == said
    assert events[0][-1].finish == "stop" and events[0][-1].token in backend.vocabulary.end
    assert texts(backend, events[1]) == [b"The", b" capital", b" of"]
    assert [event.finish for event in events[1]] == [None, None, "length"]
    assert texts(backend, events[2]) == [b"The"] and events[2][0].finish == "length"


def test_text_is_an_exact_continuation(backend: GGUFBackend) -> None:
    """The space before the first word is part of the answer."""
    backend.add(Sequence(0, backend.tokenize("The capital of France is"), 1, GREEDY))
    assert texts(backend, drain(backend, {0})[0]) == [b" Paris"]


def test_more_sequences_than_fit_wait_in_order(backend: GGUFBackend) -> None:
    """The seventeenth sequence starts when another has finished."""
    prompt = backend.tokenize("One two three")
    for uid in range(18):
        backend.add(Sequence(uid, prompt, 2 if uid == 5 else 4, GREEDY))
    assert backend.step() == []  # the prompt, all but its last token
    for _ in range(2):
        assert {event.uid for event in backend.step()} == set(range(16))
    assert {event.uid for event in backend.step()} == set(range(17)) - {5}
    drain(backend, set(range(18)) - {5})


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding"])
def test_remove(backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A removed sequence gives its cells back at once, and no event follows."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)
    backend.add(Sequence(1, backend.tokenize("word " * 80), 100, GREEDY))
    if stage != "waiting":
        backend.step()
        assert backend._cells.used == 32
    while stage == "decoding" and backend._running[0].pending > 1:
        backend.step()
    backend.remove(1)
    backend.remove(1)


def test_long_prompt_does_not_hold_up_decoding(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt is prefilled in slices, every step still decodes."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)
    backend.add(Sequence(1, backend.tokenize("The sea is"), 100, GREEDY))
    backend.step()
    backend.add(Sequence(2, backend.tokenize("word " * 200), 100, GREEDY))
    seen = []
    while 2 not in seen:
        seen = [event.uid for event in backend.step()]
        assert 1 in seen
    backend.remove(1)
    backend.remove(2)


def decode_returning(monkeypatch: pytest.MonkeyPatch, code: Callable[[int], int]) -> None:
    """llama_decode fails with `code(number of tokens)` unless that is 0."""
    real = llama_cpp.llama_decode

    def decode(context: Any, batch: Any) -> int:
        return code(batch.n_tokens) or real(context, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", decode)


def test_no_slot_halves_the_slice_and_preempts(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where llama.cpp finds no cells, less is asked of it, and the answers stay the same."""
    prompts = {i: question(backend, f"What is {topic}?") for i, topic in enumerate(TOPICS[:4])}
    alone = generate(backend, prompts, 8)
    with monkeypatch.context() as patch:
        decode_returning(patch, lambda count: 1 if count > 10 or count in (3, 4) else 0)
        batch = generate(backend, prompts, 8)
    count_equal(backend, prompts, alone, batch)


def test_no_slot_for_one_token_alone_fails_the_sequence(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an error instead of waiting for ever."""
    for prompt in ([1], [1, 2, 3]):
        backend.add(Sequence(1, prompt, 8, GREEDY))
        with monkeypatch.context() as patch:
            decode_returning(patch, lambda _: 1)
            [event] = backend.step()
        assert isinstance(event, SequenceFailed) and event.uid == 1


def test_a_bad_sequence_fails_alone(backend: GGUFBackend) -> None:
    """A token that is not in the vocabulary ends its sequence; the others go on."""
    backend.add(Sequence(1, backend.tokenize("The sea"), 8, GREEDY))
    backend.step()
    for uid, bad in ((2, [5, 10**6]), (3, [5, 6]), (4, [5, 10**6, 7])):
        backend.add(Sequence(uid, bad, 8, GREEDY))
    events = [event for _ in range(12) for event in backend.step()]
    failed = [event for event in events if isinstance(event, SequenceFailed)]
    assert [event.uid for event in failed] == [2, 4]
    assert "invalid token" in failed[0].error.message
    finished = [event.uid for event in events if isinstance(event, TokenEvent) and event.finish]
    assert finished == [1, 3]


def test_fatal_return_code(backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below -1 the context cannot be trusted."""
    backend.add(Sequence(1, [1, 2, 3], 8, GREEDY))
    with monkeypatch.context() as patch:
        decode_returning(patch, lambda _: -3)
        with pytest.raises(BackendBroken, match="-3"):
            backend.step()
    backend.remove(1)


def test_tokenize(backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control tokens count as such; the beginning token is added where asked for and missing."""
    tokens = backend.tokenize("<|im_start|>user")
    assert tokens[0] == 1 and len(tokens) == 2
    assert backend.tokenize("") == [] and backend.tokenize("a\0b\ud800")
    monkeypatch.setattr(backend._model, "_bos", (1, "<|im_start|>"))
    assert backend.tokenize("<|im_start|>user") == tokens
    assert backend.tokenize("user") == tokens


def test_what_a_loaded_model_says_of_itself(backend: GGUFBackend) -> None:
    """Context, vocabulary, engine, template, and memory: the weights, the KV cache, buffers."""
    assert (backend.context_length, len(backend.vocabulary.tokens)) == (2048, 49152)
    assert backend.engine.startswith("llama.cpp (llama-cpp-python 0.")
    assert backend.chat_template is not None
    kv_bytes = 2 * 2 * 2048 * 30 * 3 * 64
    assert 1.0 < backend.grant(0).engine_bytes / (92.1 * 2**20 + kv_bytes) < 1.5


def gguf_file(architecture: bytes) -> bytes:
    """A GGUF file with nothing but the name of its architecture."""
    key = b"general.architecture"
    return (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", len(key)) + key
        + struct.pack("<IQ", 8, len(architecture)) + architecture
    )  # fmt: skip


MODEL = smollm2_gguf().read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        None, b"", b"GGUF", b"PK\x03\x04" + bytes(500), MODEL[:1000], MODEL[:1_000_000],
        MODEL[:50_000_000], MODEL[:-1], MODEL.replace(b"llama", b"lllll", 1),
        MODEL.replace(b"llama.block_count", b"llama.black_count", 1), gguf_file(b"clip"),
        gguf_file(b"llama"), gguf_file(b"bert"), gguf_file(b"t5"),
    ],
    ids=[
        "missing", "empty", "magic only", "zip", "truncated metadata", "truncated vocabulary",
        "truncated tensors", "one byte short", "unknown architecture", "no block count", "clip",
        "llama without tensors", "bert without tensors", "t5 without tensors",
    ],
)  # fmt: skip
def test_load_errors(tmp_path: Path, data: bytes | None) -> None:
    """Every file that cannot be used is named, with the reason."""
    path = tmp_path / "model.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ModelLoadFailed) as failed:
        GGUFBackend(path, EngineSettings(), PLENTY)
    assert str(path) in failed.value.message
    assert "no reason given" not in failed.value.message


def test_logprobs_are_the_models(backend: GGUFBackend) -> None:
    """Of each greedy token and the likeliest: the log-softmax of llama.cpp's own logits, whatever
    bias and temperature did to the choice."""
    prompt = backend.tokenize("The capital of France is")
    size = len(backend.vocabulary.tokens)
    for params in (
        SamplingParams(temperature=0, logprobs=5),
        SamplingParams(temperature=0, logprobs=0, logit_bias={9: 100.0}),
    ):
        backend.add(Sequence(0, prompt, 4, params))
        finished = False
        while not finished:
            for event in backend.step():
                if isinstance(event, Prefilled):
                    continue
                assert isinstance(event, TokenEvent) and event.logprobs
                logits = np.ctypeslib.as_array(
                    llama_cpp.llama_get_logits_ith(backend._context, -1), (size,)
                ).astype(np.float64)
                expected = logits - np.log(np.exp(logits).sum())
                assert event.logprobs.logprob == approx(expected[event.token], abs=1e-3)
                top = event.logprobs.top
                assert len(top) == params.logprobs
                assert [id for id, _ in top] == list(np.argsort(-expected)[: len(top)])
                assert [lp for _, lp in top] == approx(
                    np.sort(-expected)[: len(top)] * -1, abs=1e-3
                )
                finished = event.finish is not None


def test_answers_to_one_prompt_share_its_prefill(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is computed once and kept once for all, and each answer is what it is alone."""
    prompt = question(backend, "Name three colours, and then tell me a story about each of them.")
    params = {uid: SamplingParams(temperature=1.0, seed=uid) for uid in range(4)}
    alone = {uid: answer(backend, prompt, 8, params[uid]) for uid in params}
    backend.use(backend.features)
    computed, most_used = 0, 0
    decode = backend._decode

    def count(batch: list[tuple[Any, int]], guess: list[int] | None = None) -> int:
        nonlocal computed, most_used
        computed += sum(tokens for _, tokens in batch)
        code = decode(batch, guess)
        most_used = max(most_used, backend._cells.used)
        return code

    monkeypatch.setattr(backend, "_decode", count)
    together = generate(backend, dict.fromkeys(params, prompt), 8, params)
    assert together == alone and len({tuple(tokens) for tokens in alone.values()}) > 1
    # The last token of the prompt is computed for each.
    assert computed == most_used == len(prompt) - 1 + 4 * 8
    one_token = prompt[:1]
    assert len(generate(backend, dict.fromkeys(params, one_token), 2, params)[3]) == 2


@pytest.mark.parametrize("gone", [0, 2], ids=["leader", "follower"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_one_of_the_answers_can_leave(backend: GGUFBackend, gone: int, steps: int) -> None:
    """Removed before the common prompt is computed or later, it does not change the others."""
    prompt = backend.tokenize("word " * 40)
    for uid in range(3):
        backend.add(Sequence(uid, prompt, 8, GREEDY))
    rows = list(backend._waiting)
    for _ in range(steps):
        backend.step()
    backend.remove(gone)
    drain(backend, {0, 1, 2} - {gone})
    expected = answer(backend, prompt, 8)
    assert all(row.tokens[len(prompt) :] == expected for row in rows if row.uid != gone)


def test_a_common_prompt_counts_once_for_admission() -> None:
    """Three answers to a prompt of half the context run together; three such prompts would not."""
    backend = GGUFBackend(smollm2_gguf(), EngineSettings(context_length=256, parallel=8), PLENTY)
    prompt = backend.tokenize("word " * 130)
    params = SamplingParams(temperature=0, logit_bias=ENDLESS)
    for uid in range(3):
        backend.add(Sequence(uid, prompt, 20, params))
    while len(backend.step()) < 3:
        assert len(backend._running) == 3
    drain(backend, {0, 1, 2})
    backend.use(frozenset({"batch"}))
    for uid in range(3):
        backend.add(Sequence(uid, list(prompt), 20, params))
    backend.step()
    assert len(backend._running) == 1
    drain(backend, {0, 1, 2})
    assert_idle(backend)
    backend.close()


def test_a_constraint_holds_its_row_and_no_other(backend: GGUFBackend) -> None:
    """Greedy, hot and penalized rows write what they are forced to, beside a free one."""
    prompt = question(backend, "What is the capital of France?")
    alone = answer(backend, prompt, 8)
    wanted = " exactly this, and no more"
    several = [GREEDY, SamplingParams(temperature=1.5, seed=3, top_k=2), SamplingParams(min_p=0.5)]
    backend.add(Sequence(0, list(prompt), 8, GREEDY))
    row = backend._waiting[0]
    for uid, params in enumerate(several, start=1):
        backend.add(
            Sequence(uid, list(prompt), 50, params, Only(backend, backend.tokenize(wanted)))
        )
    events = drain(backend, {0, 1, 2, 3})
    for uid in (1, 2, 3):
        assert b"".join(texts(backend, events[uid][:-1])).decode() == wanted
        assert events[uid][-1].finish == "stop"
    assert row.tokens[len(prompt) :] == alone
