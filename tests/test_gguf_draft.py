"""Guessing ahead changes how fast a text comes, and not the text: SmolLM2-135M-Instruct."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmx.backends import Drafted, Sequence, TokenEvent
from lmx.backends.gguf import GGUFBackend
from lmx.backends.gguf_draft import CATCH_UP_TOKENS, DraftModel, Repeats
from lmx.config import EngineSettings
from lmx.errors import ModelLoadFailed
from lmx.generation import SamplingParams

from .fakes import Always, Only
from .models import PLENTY, smollm2_gguf, tiny_gguf, tiny_metadata, tiny_tensors, write_gguf

GREEDY = SamplingParams(temperature=0)


def load(**settings: Any) -> GGUFBackend:
    return GGUFBackend(smollm2_gguf(), EngineSettings(context_length=1024, **settings), PLENTY)


@pytest.fixture(scope="module")
def loaded() -> Iterator[GGUFBackend]:
    backend = load()
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: GGUFBackend) -> GGUFBackend:
    loaded.use(loaded._able)
    loaded._pays = Always()
    return loaded


def run(backend: GGUFBackend, *sequences: Sequence) -> tuple[list[TokenEvent], list[Drafted], int]:
    """All tokens, all guesses, and how many steps it took."""
    for sequence in sequences:
        backend.add(sequence)
    events, steps = [], 0
    while backend._running or backend._waiting:
        events += backend.step()
        steps += 1
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    return tokens, [event for event in events if isinstance(event, Drafted)], steps


def question(backend: GGUFBackend, text: str) -> list[int]:
    return backend.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


CODE = "def add(a, b):\n    return a + b\n\n"
TEXTS = ["Why is the sea blue?", f"Copy this code:\n{CODE * 4}", "Count: 1, 2, 3, 1, 2, 3, 1, 2,"]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.9, top_p=0.95, seed=7),
        SamplingParams(temperature=0, frequency_penalty=0.4, logprobs=3),
    ],
    ids=["greedy", "seeded", "penalized"],
)
def test_guesses_change_nothing(backend: GGUFBackend, params: SamplingParams) -> None:
    """Tokens, their logprobs and the end are those of plain decoding, to the bit on a CPU."""
    accepted = 0
    for text in TEXTS:
        prompt = question(backend, text)
        guessed, drafts, steps = run(backend, Sequence(1, prompt, 48, params))
        backend.use(backend._able - {"draft"})
        plain, none, plain_steps = run(backend, Sequence(1, prompt, 48, params))
        backend.use(backend._able)
        backend._pays = Always()
        assert guessed == plain and none == []
        right = sum(draft.accepted for draft in drafts)
        assert plain_steps - steps in (right, right - 1)  # the end itself may have been guessed
        accepted += right
    assert accepted


def test_a_constraint_holds_at_every_place(backend: GGUFBackend) -> None:
    """What is guessed is masked token by token, and what was forced is guessed as well."""
    wanted = backend.tokenize(" one two three" * 10)
    only = Only(backend, wanted)
    tokens, drafts, _ = run(backend, Sequence(1, wanted[:3], 60, GREEDY, only))
    assert [event.token for event in tokens[:-1]] == wanted and tokens[-1].finish == "stop"
    assert sum(draft.accepted for draft in drafts) > len(wanted) / 2


def test_nothing_is_guessed_beside_others(backend: GGUFBackend) -> None:
    """With two sequences there is no guess, and with the last one alone there is again."""
    prompt = question(backend, f"Copy this code:\n{CODE * 4}")
    _, drafts, _ = run(backend, Sequence(1, prompt, 40, GREEDY), Sequence(2, prompt, 8, GREEDY))
    assert {draft.uid for draft in drafts} == {1}
    assert sum(draft.accepted for draft in drafts) <= 40 - 8


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_limit_holds(backend: GGUFBackend, most: int) -> None:
    """No more tokens come than were asked for, though more were guessed."""
    prompt = backend.tokenize("word " * 30)
    tokens, _, _ = run(backend, Sequence(1, prompt, most, GREEDY))
    assert len(tokens) == most and tokens[-1].finish == "length"


def test_a_guess_is_not_kept_as_a_prefix(backend: GGUFBackend) -> None:
    """What was guessed wrong is no part of the sequence that stays cached."""
    prompt = question(backend, TEXTS[0])
    tokens, drafts, _ = run(backend, Sequence(1, prompt, 24, GREEDY))
    assert any(draft.accepted < draft.tokens for draft in drafts)
    [kept] = backend._cells.parked.values()
    written = prompt + [event.token for event in tokens]
    assert kept.tolist() in (written[:-1], written) and backend._cells.used == len(kept)


def test_repeats_follow_the_text() -> None:
    """Guesses are from the text as it grows, and from another one when that comes."""
    repeats, text = Repeats(), [1, 2, 3, 4, 1, 2, 3]
    assert repeats.propose(text, 2) == [4, 1]
    text += [5, 1, 2, 3]
    assert repeats.propose(text, 2) == [5, 1]
    assert repeats.propose([1, 2, 3, 4, 1, 2, 3], 1) == [4]
    assert repeats.propose([1, 2], 4) == []


def test_a_draft_model_guesses() -> None:
    """The model itself as its own draft is always right, and the texts may change under it."""
    backend = load(draft_model=str(smollm2_gguf()), draft_tokens=4)
    backend._pays = Always()
    assert backend.grant(0).engine_bytes > 1.5 * backend._model.engine_bytes
    for text in (TEXTS[0], TEXTS[2], TEXTS[0]):
        tokens, drafts, steps = run(backend, Sequence(1, question(backend, text), 21, GREEDY))
        drawn = len(tokens)
        assert sum(draft.accepted for draft in drafts) >= drawn - steps
        assert steps <= 1 + -(-drawn // 5) + 2
    backend.close()


def test_a_draft_model_reads_a_long_text_in_parts(tmp_path: Path) -> None:
    """A step is not held up until it has read all."""
    vocabulary = (backend := load()).vocabulary
    backend.close()
    draft = DraftModel(tiny_gguf(tmp_path), vocabulary, 1024)
    text = [5, 6, 7] * 200
    silent = 0
    while not (guess := draft.propose(text, 3)):
        silent += 1
    assert silent == len(text) // CATCH_UP_TOKENS and len(guess) == 3
    assert draft.propose([*text, guess[0]], 2) == guess[1:]
    draft.close()


def test_a_draft_model_must_speak_the_same_language(tmp_path: Path) -> None:
    """Another vocabulary is refused at load, with the file and the reason."""
    metadata = tiny_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    other = {"tokenizer.ggml.tokens": [*tokens[:100], tokens[101], tokens[100], *tokens[102:]]}
    write_gguf(tmp_path / "other.gguf", metadata | other, tiny_tensors())
    for path, reason in (("other.gguf", "other tokens"), ("none.gguf", "none.gguf")):
        with pytest.raises(ModelLoadFailed, match=reason) as failed:
            load(draft_model=str(tmp_path / path))
        assert str(tmp_path / path) in failed.value.message
