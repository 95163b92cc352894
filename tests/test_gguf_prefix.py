"""Prefixes that are never computed twice, and who is prefilled first: SmolLM2-135M-Instruct."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lmx.backends import Prefilled, PrefillRate, Sequence, TokenEvent
from lmx.backends.gguf import GGUFBackend
from lmx.config import EngineSettings
from lmx.generation import SamplingParams

from .models import PLENTY, smollm2_gguf

GREEDY = SamplingParams(temperature=0)
SYSTEM = "system\n" + "You are a helpful assistant, and a patient one. " * 8
SEA, CAT = "user\nWhy is the sea so very blue?", "user\nWhat does a cat dream of?"


def load(**settings: Any) -> GGUFBackend:
    chosen = EngineSettings(**({"context_length": 1024, "draft_tokens": 0} | settings))
    return GGUFBackend(smollm2_gguf(), chosen, PLENTY)


@pytest.fixture(scope="module")
def loaded() -> Iterator[GGUFBackend]:
    backend = load()
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: GGUFBackend) -> GGUFBackend:
    loaded.use(loaded._able)
    return loaded


@dataclass
class Told:
    """What was heard of a sequence."""

    cached: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def run(backend: GGUFBackend, steps: int | None = None) -> dict[int, Told]:
    told: dict[int, Told] = {}
    while (steps is None and (backend._running or backend._waiting)) or steps:
        steps = steps and steps - 1
        for event in backend.step():
            heard = told.setdefault(event.uid, Told())
            if isinstance(event, Prefilled):
                assert not heard.tokens
                heard.cached.append(event.cached_tokens)
            if isinstance(event, TokenEvent):
                heard.tokens.append(event.token)
    return told


def ask(backend: GGUFBackend, prompt: list[int], tokens: int = 16, **params: Any) -> Told:
    backend.add(Sequence(0, prompt, tokens, SamplingParams(**({"temperature": 0} | params))))
    return run(backend)[0]


def chat(backend: GGUFBackend, *messages: str) -> list[int]:
    written = "".join(f"<|im_start|>{message}<|im_end|>\n" for message in messages)
    return backend.tokenize(f"{written}<|im_start|>assistant\n")


def test_a_conversation_is_computed_once(backend: GGUFBackend) -> None:
    """The next turn goes on behind the last answer, an edited one where it was edited, and the same
    one again computes its last token; all say what they say with nothing cached."""
    first = chat(backend, SYSTEM, SEA)
    answer = ask(backend, first)
    turn = first + answer.tokens + chat(backend, CAT)
    edited = chat(backend, SYSTEM, CAT)
    parts = next(i for i, (a, b) in enumerate(zip(first, edited, strict=False)) if a != b)
    expected = {
        len(first) + len(answer.tokens) - 1: turn,
        parts: edited,
        len(first) - 1: first,
    }
    told = {cached: ask(backend, prompt) for cached, prompt in expected.items()}
    assert [heard.cached for heard in told.values()] == [[cached] for cached in expected]
    for cached, prompt in expected.items():
        backend.use(frozenset())
        fresh = ask(backend, prompt)
        assert fresh.cached == [0] and fresh.tokens == told[cached].tokens


def test_a_seeded_answer_stays_the_same(backend: GGUFBackend) -> None:
    """Random tokens are the same ones after a prefix was found."""
    prompt = chat(backend, SYSTEM, SEA)
    fresh, again = (ask(backend, prompt, 32, temperature=1.0, seed=3) for _ in range(2))
    assert fresh.cached == [0] and again.cached == [len(prompt) - 1]
    assert fresh.tokens == again.tokens


def test_what_runs_is_shared_too(backend: GGUFBackend) -> None:
    """A sequence begins with what another one, still running, has computed."""
    prompt = chat(backend, SYSTEM, SEA)
    backend.add(Sequence(1, prompt, 30, GREEDY))
    run(backend, 3)
    backend.add(Sequence(2, list(prompt), 5, GREEDY))
    assert run(backend)[2].cached == [len(prompt) - 1]


def test_one_prompt_waits_for_another(backend: GGUFBackend) -> None:
    """Of prompts that come together, what they begin with is computed and kept once."""
    prompts = [chat(backend, SYSTEM, question) for question in (SEA, CAT, SEA)]
    for uid, prompt in enumerate(prompts):
        backend.add(Sequence(uid, prompt, 1, GREEDY))
    told = run(backend)
    shared = next(i for i, (a, b) in enumerate(zip(*prompts[:2], strict=False)) if a != b)
    assert [told[uid].cached for uid in range(3)] == [[0], [shared], [len(prompts[2]) - 1]]
    assert backend._cells.used == len(prompts[0]) + len(prompts[1]) - shared


def test_several_answers_count_their_prompt_once(backend: GGUFBackend) -> None:
    """What they found cached is told by the first, and none of them found what it waited for."""
    prompt = chat(backend, SYSTEM, SEA)
    for expected in ([0, 0, 0], [len(prompt) - 1, 0, 0]):
        for uid in range(3):
            backend.add(Sequence(uid, prompt, 3, GREEDY))
        told = run(backend)
        assert [told[uid].cached for uid in range(3)] == [[cached] for cached in expected]


def test_a_preempted_prompt_is_prefilled_once_for_the_client() -> None:
    """When it comes back it has been told of already."""
    backend = load(context_length=256, parallel=4)
    params = SamplingParams(temperature=0, logit_bias={0: -100.0, 2: -100.0})
    for uid in range(4):
        backend.add(Sequence(uid, backend.tokenize(f"{uid} " * 20), 80, params))
    told = run(backend)
    assert all(told[uid].cached == [0] and len(told[uid].tokens) == 80 for uid in range(4))
    backend.close()


@pytest.mark.parametrize(("bytes", "kept"), [(0, 0), (100 * 23040, 100), (None, 200)])
def test_the_budget_of_prefixes(bytes: int | None, kept: int) -> None:
    """No more than the settings say stays when sequences have ended; 0 is nothing, and no hit."""
    backend = load(prefix_cache_bytes=bytes)
    assert backend._model.cell_bytes == 23040
    assert ("prefix" in backend.features) == (bytes != 0)
    prompt = list(range(100, 300))
    for expected in (0, min(kept, 199)):
        told = ask(backend, prompt, 1)
        assert told.cached == [expected]
        assert backend._cells.used <= kept
    backend.close()


@pytest.mark.parametrize("features", [frozenset(), frozenset({"batch"})], ids=["none", "batch"])
def test_without_prefixes_nothing_stays(backend: GGUFBackend, features: Any) -> None:
    """When nothing runs any more, the next request finds the first cell free."""
    backend.use(features)
    backend.add(Sequence(1, chat(backend, SYSTEM, SEA), 4, GREEDY))
    backend.add(Sequence(2, chat(backend, SYSTEM, SEA), 4, GREEDY))
    backend.step()
    assert len(backend._running) == len(features) + 1
    assert all(heard.cached == [0] for heard in run(backend).values() if heard.cached)
    assert backend._cells.used == 0


def test_prefixes_outlive_the_model(tmp_path: Path) -> None:
    """What was cached when the model was closed is read back by its next load, and says the same;
    a damaged file is not."""
    kept = {"prefix_disk_bytes": 10**8, "prefix_disk_dir": str(tmp_path / "prefixes")}
    backend = load(**kept)
    prompt = chat(backend, SYSTEM, SEA)
    answer = ask(backend, prompt)
    turn = prompt + answer.tokens + chat(backend, CAT)
    backend.close()
    backend = load()
    fresh = ask(backend, turn)
    backend.close()
    backend = load(**kept)
    told = ask(backend, turn)
    assert told.cached == [len(prompt) + len(answer.tokens) - 1] and told.tokens == fresh.tokens
    backend.close()
    for path in (tmp_path / "prefixes").glob("*.prefix"):
        path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    backend = load(**kept)
    told = ask(backend, turn)
    assert told.cached == [0] and told.tokens == fresh.tokens
    backend.close()


def test_the_disk_keeps_what_was_used_last(tmp_path: Path) -> None:
    """Where not all prefixes fit, the last ones do."""
    prompts = [list(range(first, first + 40)) for first in (100, 200, 300)]
    kept = {"prefix_disk_bytes": 2 * 10**6, "prefix_disk_dir": str(tmp_path)}
    backend = load(**kept)
    for prompt in prompts:
        ask(backend, prompt, 1)
    backend.close()
    backend = load(**kept)
    assert [ask(backend, prompt, 1).cached for prompt in prompts] == [[0], [39], [39]]
    backend.close()


def on_disk(folder: Path, prompt: list[int]) -> dict[str, Any]:
    """The settings that find the prompt there."""
    kept = {"prefix_disk_bytes": 2 * 10**7, "prefix_disk_dir": str(folder)}
    backend = load(**kept)
    ask(backend, prompt, 1)
    backend.close()
    return kept


def test_what_is_too_long_for_the_disk_spares_the_others(tmp_path: Path) -> None:
    """The last prefix alone is beyond the budget; the one before is written."""
    kept = {"prefix_disk_bytes": 2 * 10**6, "prefix_disk_dir": str(tmp_path)}
    backend = load(**kept)
    ask(backend, list(range(100, 140)), 1)
    ask(backend, list(range(200, 400)), 1)
    backend.close()
    backend = load(**kept)
    assert ask(backend, list(range(100, 140)), 1).cached == [39]
    backend.close()


def test_the_disk_is_a_part_of_the_feature(tmp_path: Path) -> None:
    """Without prefixes nothing is read back."""
    prompt = list(range(100, 200))
    backend = load(**on_disk(tmp_path, prompt))
    backend.use(backend.features - {"prefix"})
    assert ask(backend, prompt, 1).cached == [0]
    backend.close()


def test_what_the_pool_cannot_hold_is_not_read(tmp_path: Path) -> None:
    """A file of a longer context, and what is cached stays."""
    prompt = list(range(100, 500))
    backend = load(context_length=256, **on_disk(tmp_path, prompt))
    ask(backend, list(range(1000, 1020)), 1)
    assert ask(backend, prompt[:210], 1).cached == [0]
    assert len(backend._cells.parked) == 2
    backend.close()


def test_nobody_waits_for_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three that wait for each other the first one goes, and the second one begins with more
    than the third one waited for."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)
    prompt = list(range(100, 500))
    backend = load(**on_disk(tmp_path, prompt))
    for uid, other in enumerate([[*prompt[:100], *[9] * 100], prompt, [*prompt[:200], 9, 9]]):
        backend.add(Sequence(uid, other, 8, SamplingParams(logit_bias={0: -100.0, 2: -100.0})))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_restore", lambda row: None)
        backend.step()
    first, second, third = backend._running
    assert third.leader is second and second.leader is first
    backend.remove(0)
    assert second.cached == len(prompt) - 1 and third.cached == 200
    assert set(run(backend, 2)) == {1, 2}
    run(backend)
    backend.close()


def test_a_full_pool_changes_nothing() -> None:
    """Prefixes are found and given up, cells are used again, and every answer stays the same."""
    backend = load(context_length=256, parallel=2)
    prompts = [chat(backend, f"system\nBe {how}." * 6, what) for how in ("kind", "brief")
               for what in (SEA, CAT, SEA, CAT)]  # fmt: skip
    backend.use(frozenset())
    fresh = [ask(backend, prompt, 24).tokens for prompt in prompts[:2] + prompts[4:6]]
    backend.use(backend._able)
    cached = 0
    for nth, prompt in enumerate(prompts * 2):
        told = ask(backend, prompt, 24)
        cached += told.cached[0]
        assert told.tokens == fresh[nth % 2 + nth // 4 % 2 * 2]
    assert cached > 400 and backend._model.ordered
    backend.close()


def test_nothing_reaches_the_disk_unasked(tmp_path: Path) -> None:
    """By default prompts stay in memory."""
    backend = load(prefix_disk_dir=str(tmp_path))
    ask(backend, chat(backend, SYSTEM, SEA))
    backend.close()
    assert list(tmp_path.iterdir()) == []


def test_short_prompts_pass_long_ones(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that fit into a slice go first, but the one that came first has every other slice."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 32)
    computed: list[list[int]] = []
    decode = backend._decode

    def listen(batch: list[tuple[Any, int]], guess: list[int] | None = None) -> int:
        computed.append([row.uid for row, _ in batch])
        return decode(batch, guess)

    monkeypatch.setattr(backend, "_decode", listen)
    for uid, length in enumerate([90, 200, 30, 20, 12]):
        backend.add(Sequence(uid, [uid + 20] * length, 1, GREEDY))
    told: dict[int, Told] = {}
    while backend._running or backend._waiting:
        told |= run(backend, 1)
    assert computed[:5] == [[4, 3], [0], [2, 0], [0], [0, 1]]
    assert list(told) == [4, 3, 2, 0, 1]


def test_what_a_short_prompt_waits_for_comes_early(
    backend: GGUFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares a little with a long prompt that comes behind another long one, and does not wait
    for that other."""
    monkeypatch.setattr(PrefillRate, "slice_tokens", lambda self, context, *, decoding: 64)
    system = [20] * 40
    for uid, prompt in enumerate([[21] * 400, system + [22] * 400, [*system, 23, 23]]):
        backend.add(Sequence(uid, prompt, 1, GREEDY))
    told: dict[int, Told] = {}
    steps = 0
    while 2 not in told:
        told |= run(backend, 1)
        steps += 1
    assert told[2].cached == [40] and steps <= 3
    run(backend)
