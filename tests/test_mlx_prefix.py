"""What makes the MLX backend faster, and must not change its answers: past prompts' KV caches, in
memory and on disk, rows without padding, and guesses."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy as shallow
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from lmx.backends import Drafted, Prefilled, PrefillRate, Sequence, StepEvent, TokenEvent
from lmx.backends.mlx import MLXBackend
from lmx.backends.mlx_batch import MAX_PADDING, Row, fit, place
from lmx.backends.mlx_cache import part, ragged, state
from lmx.backends.mlx_prefill import (
    KEPT_TOKENS,
    TAIL_TOKENS,
    Prompt,
    choose,
    prefill,
    prefill_together,
)
from lmx.backends.mlx_sampling import Sampler
from lmx.config import EngineSettings
from lmx.errors import ModelLoadFailed
from lmx.generation import SamplingParams
from lmx.selftest import check

from . import models
from .fakes import Always
from .models import PLENTY

FOREVER = SamplingParams(temperature=0, logit_bias={0: -100.0, 2: -100.0})
GREEDY = SamplingParams(temperature=0)

WINDOW = {
    "model_type": "gemma3_text",
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
}
HYBRID = {
    "model_type": "lfm2",
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}


def run(backend: MLXBackend, *sequences: Sequence) -> tuple[dict[int, list[int]], list[StepEvent]]:
    """All of them together: the tokens of each, and everything that happened."""
    for sequence in sequences:
        backend.add(sequence)
    seen: list[StepEvent] = []
    while backend._rows or backend._waiting:
        seen += backend.step()
    answers: dict[int, list[int]] = {sequence.uid: [] for sequence in sequences}
    for event in seen:
        assert isinstance(event, Prefilled | TokenEvent | Drafted), event
        if isinstance(event, TokenEvent):
            answers.setdefault(event.uid, []).append(event.token)
    return answers, seen


def cached(events: list[StepEvent]) -> dict[int, int]:
    return {e.uid: e.cached_tokens for e in events if isinstance(e, Prefilled)}


def words(count: int, start: int = 1000) -> list[int]:
    """A prompt of tokens that do not repeat."""
    return list(range(start, start + count))


@pytest.fixture(params=[{}, WINDOW, HYBRID], ids=["full", "window", "hybrid"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model whose layers keep all tokens, or some a window only, or some a state."""
    return of_kind(tmp_path / "tiny", request.param)


def of_kind(folder: Path, config: dict[str, Any]) -> Path:
    models.tiny_mlx(folder)
    if config:
        import mlx_lm.utils

        merged = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(merged))
        mx.random.seed(1)
        network, args = mlx_lm.utils._get_classes(merged)
        from mlx.utils import tree_flatten, tree_map

        made = network(args.from_dict(merged))
        weights = tree_map(lambda a: mx.random.normal(a.shape) * 0.3, made.parameters())
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)))
    return folder


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_a_prompt_that_was_seen_is_computed_but_for_its_last_token(path: Path, length: int) -> None:
    """The same prompt again finds all that can be kept, and gets the same answer; a state, which
    cannot be cut, lies a few tokens before its end."""
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    prompt = words(length)
    first, events = run(backend, Sequence(1, prompt, 6, FOREVER))
    assert cached(events) == {1: 0}
    again, events = run(backend, Sequence(1, list(prompt), 6, FOREVER))
    kept = length - TAIL_TOKENS if length > KEPT_TOKENS else 0
    known = length - 1 if backend._prefixes.whole else kept
    assert cached(events) == {1: known} and again == first


def test_the_next_turn_goes_on_from_the_last(path: Path) -> None:
    """A prompt that begins with an earlier prompt and its answer finds both in the cache."""
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    [answer] = run(backend, Sequence(1, words(90), 20, FOREVER))[0].values()
    turn = [*words(90), *answer, *words(30, 3000)]
    texts, events = run(backend, Sequence(2, turn, 8, FOREVER))
    assert cached(events) == {2: 90 + 20}
    fresh = MLXBackend(path, EngineSettings(prefix_cache_bytes=0), PLENTY)
    assert run(fresh, Sequence(2, turn, 8, FOREVER))[0] == texts


def test_a_branch_takes_what_it_shares(tmp_path: Path) -> None:
    """Where every layer keeps every token, any common beginning is used, however it goes on."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    run(backend, Sequence(1, [*words(70), *words(50, 2000)], 4, FOREVER))
    branch = [*words(70), *words(40, 4000)]
    texts, events = run(backend, Sequence(2, branch, 4, FOREVER))
    assert cached(events) == {2: 70}
    backend.use(frozenset())
    assert run(backend, Sequence(2, branch, 4, FOREVER))[0] == texts


@pytest.mark.parametrize("config", [WINDOW, HYBRID], ids=["window", "hybrid"])
def test_states_are_kept_where_messages_begin(tmp_path: Path, config: dict[str, Any]) -> None:
    """An edited last message and another user's first find the messages before them."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", config), EngineSettings(), PLENTY)
    begin = next(iter(backend.vocabulary.control))
    system, question = [begin, *words(300)], [begin, *words(300, 2000)]
    one = [*system, *question, begin, 6000, 6001]
    run(backend, Sequence(1, one, 4, FOREVER))
    _, events = run(
        backend, Sequence(2, [*system, begin, *words(20, 5000), begin, 6000], 4, FOREVER)
    )
    assert cached(events) == {2: len(system)}
    _, events = run(backend, Sequence(3, [*system, *question, begin, 6002, 6001], 4, FOREVER))
    assert cached(events) == {3: len(system + question)}


def test_requests_that_begin_alike_wait_for_one_of_them(tmp_path: Path) -> None:
    """What several prompts share is computed once, although they come together."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    prompts = [[*words(600), *words(9 + n, 3000 + 100 * n)] for n in range(4)]
    sequences = [Sequence(n, prompt, 5, FOREVER) for n, prompt in enumerate(prompts)]
    texts, events = run(backend, *sequences)
    assert cached(events) == {0: 0, 1: 600, 2: 600, 3: 600}
    backend.use(frozenset())
    assert {n: run(backend, s)[0][n] for n, s in enumerate(sequences)} == texts


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 tokens of a prompt a step."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)


@pytest.mark.usefixtures("slowly")
def test_nobody_waits_for_more_than_is_shared(path: Path) -> None:
    """A short prompt goes on as soon as the long one has computed what both begin with, and says
    what it says alone."""
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    short = Sequence(1, [*words(100), *words(20, 9000)], 4, FOREVER)
    backend.add(Sequence(0, words(1600), 4, FOREVER))
    backend.step()
    texts, events = run(backend, short)
    assert [e.uid for e in events if isinstance(e, Prefilled)] == [1, 0]
    assert cached(events) == {0: 0, 1: 100}
    backend.use(frozenset())
    assert run(backend, short)[0][1] == texts[1]


@pytest.mark.usefixtures("slowly")
def test_one_that_comes_late_takes_what_is_there(tmp_path: Path) -> None:
    """What another prompt has computed already is shared at once, where a cache can be cut."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    backend.add(Sequence(0, words(1600), 4, FOREVER))
    for _ in range(6):
        backend.step()
    _, events = run(backend, Sequence(1, [*words(100), *words(20, 9000)], 4, FOREVER))
    assert [e.uid for e in events if isinstance(e, Prefilled)] == [1, 0]
    assert cached(events)[1] == 100


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("gone", [0, 1])
def test_who_waited_goes_on_when_the_first_is_removed(path: Path, gone: int) -> None:
    """One of the others then computes what they share, once."""
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    for n in range(4):
        backend.add(Sequence(n, [*words(300), *words(9, 3000 + 100 * n)], 4, FOREVER))
    for _ in range(3):
        backend.step()
    backend.remove(gone)
    found = cached(run(backend)[1])
    assert sorted(found.values()) == [0, 300, 300] and gone not in found


def test_a_prefix_that_cannot_be_kept_fails_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory for a copy the answer is what it was, and the next one is computed again."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    expected, _ = run(backend, Sequence(1, words(50), 4, FOREVER))
    backend.use(backend.features)

    def fail(*args: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr("lmx.backends.mlx_prefix.piece", fail)
    for _ in range(2):
        answers, events = run(backend, Sequence(1, words(50), 4, FOREVER))
        assert answers == expected and cached(events) == {1: 0}


def test_a_state_keeps_no_more_than_its_window(tmp_path: Path) -> None:
    """However long a slice of the prompt was, and what follows is the same."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", WINDOW), EngineSettings(), PLENTY)
    network = backend._network
    cache = make_prompt_cache(network)
    prefill(backend._head, cache, words(500))
    [copy] = state(cache)
    assert copy.keys.shape[2] == 64 < 500 == cache[0].keys.shape[2]
    assert type(cache[0]) is not KVCache
    other = [copy, *map(shallow, cache[1:])]
    for tokens in (words(3, 600), words(1, 700), words(1, 800)):
        one, two = (network(mx.array([tokens]), cache=c) for c in (cache, other))
        assert mx.allclose(one, two, atol=1e-4)


def test_the_test_at_load_tests_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts differ enough in length for several groups, and short ones are read together."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    used: set[str] = set()

    def spy(place: str, name: str, call: Callable[..., Any]) -> None:
        def called(*args: Any) -> Any:
            used.add(name)
            return call(*args)

        monkeypatch.setattr(f"lmx.backends.{place}.{name}", called)

    spy("mlx_batch", "ragged", ragged)
    spy("mlx_batch", "part", part)
    spy("mlx", "prefill_together", prefill_together)
    assert check(backend) == (backend.features, [])
    assert used == {"ragged", "part", "prefill_together"}


def test_past_prompts_make_way_for_running_ones(tmp_path: Path) -> None:
    """They take what the grant leaves, and a smaller grant is obeyed at once."""
    step = 256 * 2 * 2 * 2 * 16 * 4
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), 4 * step)
    for n in range(6):
        run(backend, Sequence(n, words(200, 300 * n), 4, FOREVER))
        memory = backend.grant(4 * step)
        assert memory.kv_used_bytes <= 4 * step == memory.kv_bytes
    assert backend._prefixes.bytes > step
    run(backend, Sequence(9, words(700, 9000), 4, FOREVER))
    assert backend.grant(4 * step).kv_used_bytes <= 4 * step
    backend.grant(step)
    assert backend._prefixes.bytes <= step


def test_a_limit_of_the_prefix_cache_is_kept(tmp_path: Path) -> None:
    """prefix_cache_bytes bounds it however much memory there is."""
    folder = of_kind(tmp_path / "tiny", {})
    backend = MLXBackend(folder, EngineSettings(prefix_cache_bytes=150_000), PLENTY)
    for n in range(6):
        run(backend, Sequence(n, words(80, 300 * n), 4, FOREVER))
        assert 0 < backend._prefixes.bytes <= 150_000


def test_prefixes_come_back_from_disk(path: Path, tmp_path: Path) -> None:
    """After an unload and a load, the answer is the same and little is computed."""
    settings = EngineSettings(prefix_disk_bytes=2**24, prefix_disk_dir=str(tmp_path / "disk"))
    backend = MLXBackend(path, settings, PLENTY)
    prompt = words(100)
    first, _ = run(backend, Sequence(1, prompt, 6, FOREVER))
    turn = [*prompt, *first[1], 77, 78]
    backend.close()
    assert not any(p.stat().st_mode & 0o077 for p in (tmp_path / "disk").rglob("*"))
    reloaded = MLXBackend(path, settings, PLENTY)
    texts, events = run(reloaded, Sequence(2, turn, 6, FOREVER))
    assert cached(events) == {2: 106}
    fresh = MLXBackend(path, EngineSettings(prefix_cache_bytes=0), PLENTY)
    assert run(fresh, Sequence(2, turn, 6, FOREVER))[0] == texts


def test_what_was_used_last_reaches_the_disk(tmp_path: Path) -> None:
    """Where there is room for one only, it is that one; and one that is too large for the grant is
    not even read."""
    folder = of_kind(tmp_path / "tiny", {})
    settings = EngineSettings(prefix_disk_bytes=50_000, prefix_disk_dir=str(tmp_path / "disk"))
    backend = MLXBackend(folder, settings, PLENTY)
    for n in range(4):
        run(backend, Sequence(n, words(60, 1000 * n), 4, FOREVER))
    backend.close()
    found = []
    for kv_bytes in (PLENTY, 256 * 2 * 2 * 2 * 16 * 4):
        backend = MLXBackend(folder, settings, kv_bytes)
        events = [run(backend, Sequence(n, words(60, 1000 * n), 4, FOREVER))[1] for n in range(4)]
        found.append([cached(e)[n] for n, e in enumerate(events)])
    assert found == [[0, 0, 0, 59], [0, 0, 0, 0]]


def test_another_configuration_computes_anew(tmp_path: Path) -> None:
    """What was written for other positions is not found, although the weights are the same."""
    folder = of_kind(tmp_path / "tiny", {})
    settings = EngineSettings(prefix_disk_bytes=2**24, prefix_disk_dir=str(tmp_path / "disk"))
    backend = MLXBackend(folder, settings, PLENTY)
    run(backend, Sequence(1, words(60), 4, FOREVER))
    backend.close()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    _, events = run(MLXBackend(folder, settings, PLENTY), Sequence(1, words(60), 4, FOREVER))
    assert cached(events) == {1: 0}


def test_no_prompt_reaches_the_disk_unasked(tmp_path: Path) -> None:
    """By default nothing is written."""
    folder = of_kind(tmp_path / "tiny", {})
    disk = tmp_path / "disk"
    backend = MLXBackend(folder, EngineSettings(prefix_disk_dir=str(disk)), PLENTY)
    run(backend, Sequence(1, words(100), 6, FOREVER))
    backend.close()
    assert not disk.exists()


def test_rows_of_different_length_share_a_step_without_padding(path: Path) -> None:
    """Prompts of 30, 300 and 1,500 tokens write what they write alone, and the padding stays
    under its bound."""
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    sequences = [
        Sequence(n, words(length, 100 * n), 12, FOREVER)
        for n, length in enumerate([30, 1500, 300, 31, 320, 1400])
    ]
    texts, _ = run(backend, *sequences)
    assert backend.grant(PLENTY).padding <= MAX_PADDING
    backend.use(frozenset())
    assert {s.uid: run(backend, s)[0][s.uid] for s in sequences} == texts
    backend.use(frozenset({"batch"}))
    assert run(backend, *sequences)[0] == texts
    assert backend.grant(PLENTY).padding > 0.4


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([30, 250, 3], [[30, 250, 3]]),
        ([30, 300, 3000], [[30], [300], [3000]]),
        ([1000, 900, 10, 950, 20], [[1000, 900, 950], [10, 20]]),
        ([400, 500, 600, 900], [[400, 500, 600], [900]]),
    ],
)
def test_rows_go_where_they_need_the_least_padding(
    lengths: list[int], groups: list[list[int]]
) -> None:
    """Short ones together; the others with those they fit with, or by themselves."""
    made: list[list[int]] = []
    for length in lengths:
        place(made, length, split=True)
    assert made == groups and all(map(fit, made))
    together: list[list[int]] = []
    for length in lengths:
        place(together, length, split=False)
    assert together == [lengths]


@pytest.mark.usefixtures("slowly")
def test_a_short_prompt_passes_a_long_one(tmp_path: Path) -> None:
    """It is answered while the long one is read, which goes on every other step."""
    backend = MLXBackend(of_kind(tmp_path / "tiny", {}), EngineSettings(), PLENTY)
    backend.add(Sequence(1, words(1600), 4, FOREVER))
    backend.step()
    for n in range(2, 8):
        backend.add(Sequence(n, words(90, 2000 + 100 * n), 4, FOREVER))
    order: list[int] = []
    while backend._rows:
        order += [event.uid for event in backend.step() if isinstance(event, Prefilled)]
    assert order == [2, 3, 4, 5, 6, 7, 1]


@pytest.mark.parametrize(
    ("lengths", "budget", "passed", "chosen"),
    [
        ([18, 13, 12], 60, False, [12, 13, 18]),
        ([18, 13, 12], 60, True, [18, 12, 13]),
        ([18, 13, 12], 40, True, [18, 12]),
        ([900, 13, 12], 60, False, [12, 13]),
        ([900, 13, 12], 60, True, [900]),
        ([900, 13, 12], 2048, True, [900]),
    ],
)
def test_who_is_read_next(lengths: list[int], budget: int, passed: bool, chosen: list[int]) -> None:
    """The shortest, or the oldest in its turn, with others while all fit into a slice."""
    sampler = Sampler(1.0, 0, 1.0, 0.0)
    rows = [
        Row(Sequence(n, words(length), 4, FOREVER), sampler) for n, length in enumerate(lengths)
    ]
    found = choose([Prompt(row) for row in rows], budget, passed=passed, whole=True)
    assert [prompt.left for prompt in found] == chosen


def test_a_slice_has_no_crumbs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt leaves of it is too little for a forward pass, which costs the same."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda *_, **__: 40)
    backend = MLXBackend(path, EngineSettings(), PLENTY)
    for n in range(2):
        backend.add(Sequence(n, words(30, 100 * n), 4, FOREVER))
    backend.step()
    assert [prompt.done for prompt in backend._prompts] == [0]
    backend.step()  # the others' turn
    backend.step()
    assert not backend._prompts


@pytest.fixture(scope="module")
def real() -> MLXBackend:
    return MLXBackend(models.smollm2_mlx(), EngineSettings(), PLENTY)


def repetitive(backend: MLXBackend) -> list[int]:
    return backend.tokenize("one two three four five six seven. " * 8)


@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(seed=3, temperature=0.7), SamplingParams(seed=4, top_k=5, top_p=0.9)],
    ids=["greedy", "seeded", "filtered"],
)
def test_guessing_changes_nothing_but_the_number_of_steps(
    real: MLXBackend, params: SamplingParams
) -> None:
    """With the real model: the same tokens with and without, greedy or drawn."""
    real.use(frozenset({"draft"}))
    real._pays = Always()
    sequence = Sequence(1, repetitive(real), 20, params)
    texts, events = run(real, sequence)
    guesses = [event for event in events if isinstance(event, Drafted)]
    real.use(frozenset())
    plain, events = run(real, sequence)
    assert texts == plain
    assert not any(isinstance(event, Drafted) for event in events)
    if params == GREEDY:
        assert sum(guess.accepted for guess in guesses) >= 10


def test_a_draft_model_guesses(tmp_path: Path) -> None:
    """With itself as its draft, every guess is right; with another vocabulary it is refused."""
    folder = of_kind(tmp_path / "tiny", {})
    settings = EngineSettings(draft_model=str(folder), draft_tokens=4)
    backend = MLXBackend(folder, settings, PLENTY)
    backend._pays = Always()
    sequence = Sequence(1, words(300), 30, GREEDY)
    texts, events = run(backend, sequence)
    guesses = [event for event in events if isinstance(event, Drafted)]
    assert guesses and all(guess.accepted == guess.tokens for guess in guesses)
    plain = MLXBackend(folder, EngineSettings(draft_tokens=0), PLENTY)
    assert run(plain, sequence)[0] == texts

    other = tmp_path / "other"
    of_kind(other, {})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 49152, "content": "<x>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelLoadFailed, match="vocabulary"):
        MLXBackend(folder, EngineSettings(draft_model=str(other)), PLENTY)


def test_a_draft_model_costs_no_answer(tmp_path: Path) -> None:
    """What it has read is counted, and goes before anybody makes way or fails for memory."""
    folder = of_kind(tmp_path / "tiny", {})
    settings = EngineSettings(draft_model=str(folder), prefix_cache_bytes=0)
    step = 256 * 2 * 2 * 2 * 16 * 4
    plain = MLXBackend(folder, EngineSettings(draft_tokens=0), PLENTY)
    [expected] = run(plain, Sequence(1, words(900), 130, GREEDY))[0].values()
    backend = MLXBackend(folder, settings, 10 * step)
    backend._pays = Always()
    assert backend._draft
    for prompt in (words(900), words(20, 5000)):
        run(backend, Sequence(2, prompt, 20, GREEDY))
        held = sum(layer.nbytes for layer in backend._draft._cache)
        assert backend._draft.kv_bytes == held == 4 * step
    assert backend.grant(step).kv_bytes == step and backend._draft.kv_bytes == 0
    backend.grant(10 * step)
    run(backend, Sequence(3, words(900, 2000), 20, GREEDY))
    backend._kv_bytes = 5 * step
    tight, events = run(backend, Sequence(4, words(900), 130, GREEDY))
    assert tight == {4: expected}
    assert not any(isinstance(event, Drafted) for event in events)


@pytest.mark.parametrize("ending", ["removed", "stopped", "cut"])
def test_a_guess_ends_with_its_row(tmp_path: Path, ending: str) -> None:
    """Max tokens and end tokens inside a guess end the answer there; a removed row leaves none."""
    folder = of_kind(tmp_path / "tiny", {})
    backend = MLXBackend(folder, EngineSettings(draft_model=str(folder)), PLENTY)
    backend._pays = Always()
    sequence = Sequence(1, words(20), 1000, GREEDY)
    whole = MLXBackend(folder, EngineSettings(draft_tokens=0), PLENTY)
    if ending == "cut":
        sequence = Sequence(1, words(20), 7, GREEDY)
    [expected] = run(whole, Sequence(1, words(20), 60, GREEDY))[0].values()
    if ending == "removed":
        backend.add(sequence)
        while not any(isinstance(event, Drafted) for event in backend.step()):
            pass
        backend.remove(1)
        assert not backend._rows and not backend.step()
        sequence = Sequence(2, words(20), 30, GREEDY)
    if ending == "stopped":
        end = expected[9]
        for one in (backend, whole):
            one.vocabulary = type(one.vocabulary)(
                one.vocabulary.tokens, one.vocabulary.control, frozenset({end})
            )
        expected = expected[: expected.index(end) + 1]
    [tokens] = run(backend, sequence)[0].values()
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == {"removed": 30, "cut": 7}.get(ending, len(expected))
