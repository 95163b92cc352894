"""Whose cells are whose, against llama.cpp's own cache of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lmx.backends import Sequence, TokenEvent, llama
from lmx.backends.gguf import GGUFBackend
from lmx.backends.gguf_cells import CHUNK, LEAST, Cells, common
from lmx.config import EngineSettings
from lmx.generation import SamplingParams

from .models import PLENTY, tiny_gguf

SIZE = 1024
IDS = 6
RUNS = st.builds(
    lambda few, token, many: few + [token] * many,
    st.lists(st.sampled_from([5, 6]), min_size=1, max_size=3),
    st.sampled_from([5, 6]),
    st.integers(0, 400),
)
"""Tokens: sequences that often begin alike."""


class _Context:
    def __init__(self, path: Path) -> None:
        self.model = llama.load_model(path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = SIZE, IDS + 1, True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.cache: Any = llama_cpp.llama_get_memory(self.context)
        self.batch = llama.Batch(self.context)

    def decode(self, seq_id: int, position: int, tokens: list[int]) -> int:
        self.batch.clear()
        self.batch.add(seq_id, position, tokens)
        return self.batch.decode()

    def close(self) -> None:
        self.batch.free()
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Context]:
    context = _Context(tiny_gguf(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1))
    yield context
    context.close()


class _Machine(RuleBasedStateMachine):
    """Sequences as lists of (token, cell), every cell a number of its own."""

    context: _Context
    keep = SIZE
    ordered = False

    def __init__(self) -> None:
        super().__init__()
        llama_cpp.llama_memory_clear(self.context.cache, False)
        self.cells = Cells(self.context.context, SIZE, IDS, self.keep, ordered=self.ordered)
        self.running: dict[int, list[tuple[int, int]]] = {}
        self.parked: dict[int, list[tuple[int, int]]] = {}
        self.made = 0

    def pick(self, data: st.DataObject, *, parked: bool = False) -> int:
        names = [*self.running, *(self.parked if parked else ())]
        seq_id: int = data.draw(st.sampled_from(names))
        return seq_id

    def sync(self) -> None:
        """What was taken from parked sequences is seen by their tokens, and must be their ends."""
        for seq_id in list(self.parked):
            if seq_id in self.cells.parked and seq_id not in self.running:
                left = len(self.cells.parked[seq_id])
                assert left <= len(self.parked[seq_id])
                del self.parked[seq_id][left:]
            else:
                del self.parked[seq_id]

    @precondition(lambda self: len(self.running) < IDS)
    @rule()
    def take(self) -> None:
        oldest = next(iter(self.parked), None)
        free = bool(self.cells.free_ids)
        seq_id = self.cells.take()
        assert free or seq_id == oldest
        self.running[seq_id] = []
        self.sync()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=RUNS)
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        seq_id = self.pick(data)
        room = self.cells.room(len(tokens))
        self.sync()
        tokens = tokens[:room]
        if tokens:
            assert self.context.decode(seq_id, len(self.running[seq_id]), tokens) == 0
            self.cells.grow(seq_id, len(tokens))
            numbers = range(self.made, self.made + len(tokens))
            self.running[seq_id] += zip(tokens, numbers, strict=True)
            self.made += len(tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def overfill(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        tokens = [5] * (SIZE - self.cells.used - self.cells.dead + 1)
        if len(tokens) <= self.context.batch.size:
            assert self.context.decode(seq_id, len(self.running[seq_id]), tokens) == llama.NO_SLOT

    @precondition(lambda self: len(self.running) > 1)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        empty = [seq_id for seq_id, cells in self.running.items() if not cells]
        source = self.pick(data, parked=True)
        cells = (self.running | self.parked)[source]
        if empty and source != empty[0] and cells:
            length = data.draw(st.integers(1, len(cells)))
            self.cells.copy(source, empty[0], length)
            self.running[empty[0]] = cells[:length]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        length = data.draw(st.integers(0, len(self.running[seq_id])))
        self.cells.cut(seq_id, length)
        del self.running[seq_id][length:]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kept=st.booleans())
    def end(self, data: st.DataObject, kept: bool) -> None:
        seq_id = self.pick(data)
        cells = self.running.pop(seq_id)
        if kept:
            self.cells.park(seq_id, [token for token, _ in cells])
            tokens = [token for token, _ in cells]
            for other, theirs in list(self.parked.items()):
                if len(cells) >= LEAST and [t for t, _ in theirs[: len(cells)]] == tokens:
                    self.parked[other] = self.parked.pop(other)
                    break
            self.parked[seq_id] = cells
            self.sync()
            assert self.cells.used - self.cells.held(self.running) <= self.keep
        else:
            self.cells.release(seq_id)

    @rule(tokens=RUNS)
    def find(self, tokens: list[int]) -> None:
        seq_id, length = self.cells.find(np.array(tokens, np.int32))
        lengths = []
        for cells in self.parked.values():
            same = [a == b for a, (b, _) in zip(tokens, cells, strict=False)]
            lengths.append(([*same, False]).index(False))
        assert length == max(lengths, default=0)
        if length:
            assert lengths[list(self.parked).index(seq_id)] == length
            self.parked[seq_id] = self.parked.pop(seq_id)

    @invariant()
    def counts_are_true(self) -> None:
        every = self.running | self.parked
        assert list(self.cells.parked) == list(self.parked)
        assert self.cells.used == len({cell for cells in every.values() for cell in cells})
        running = {cell for cells in self.running.values() for cell in cells}
        assert self.cells.held(self.running) == len(running)
        assert sorted([*every, *self.cells.free_ids]) == list(range(IDS))
        for seq_id in range(IDS):
            last = llama_cpp.llama_memory_seq_pos_max(self.context.cache, seq_id)
            assert last == len(every.get(seq_id, [])) - 1
        kept = [[token for token, _ in cells] for cells in self.parked.values()]
        assert [ids.tolist() for ids in self.cells.parked.values()] == kept


@pytest.mark.parametrize("ordered", [False, True], ids=["holes", "order"])
@pytest.mark.parametrize("keep", [SIZE, 300], ids=["all", "some"])
def test_the_mirror_agrees_with_llama_cpp(context: _Context, keep: int, ordered: bool) -> None:
    """However sequences grow, share, shrink and end, what is counted as free is free, and no more;
    parked ones give way from their ends, the least recently used first."""
    machine = type("Machine", (_Machine,), {"context": context, "keep": keep, "ordered": ordered})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def park(context: _Context, cells: Cells, tokens: list[int]) -> int:
    seq_id = cells.take()
    assert context.decode(seq_id, 0, tokens) == 0
    cells.grow(seq_id, len(tokens))
    cells.park(seq_id, tokens)
    return seq_id


def test_what_another_begins_with_is_not_kept_twice(context: _Context) -> None:
    """A parked sequence that is the beginning of a longer one goes, whichever was first."""
    llama_cpp.llama_memory_clear(context.cache, False)
    cells = Cells(context.context, SIZE, IDS, SIZE, ordered=True)
    park(context, cells, [5] * 20)
    long = park(context, cells, [5] * 40)
    park(context, cells, [5] * 30)
    assert list(cells.parked) == [long] and cells.used == 40
    cells.drop_parked()


def test_the_oldest_gives_its_end_first(context: _Context) -> None:
    """Of a parked sequence the beginning is worth most, and of several the last one used."""
    llama_cpp.llama_memory_clear(context.cache, False)
    cells = Cells(context.context, SIZE, IDS, SIZE, ordered=True)
    long = park(context, cells, [5] * 500)
    short = park(context, cells, [6] * 500)
    assert cells.find(np.array([5, 5], np.int32)) == (long, 2)
    assert cells.room(100) == SIZE - 1000 + CHUNK and not cells.dead
    assert len(cells.parked[long]) == 500 and len(cells.parked[short]) == 500 - CHUNK
    assert cells.room(SIZE - 500) == SIZE - 500 and list(cells.parked) == [long]
    cells.drop_parked()


def test_what_was_shared_is_not_taken_for_free(context: _Context) -> None:
    """The newest cells go at once, unless another that had them too has gone before."""
    llama_cpp.llama_memory_clear(context.cache, False)
    cells = Cells(context.context, SIZE, IDS, SIZE, ordered=True)
    stays, leader, follower = (cells.take() for _ in range(3))
    for seq_id, length in ((stays, 100), (leader, 200)):
        assert context.decode(seq_id, 0, [5] * length) == 0
        cells.grow(seq_id, length)
    cells.copy(leader, follower, 200)
    cells.release(follower)
    cells.release(leader)
    room = cells.room(SIZE)
    assert room == SIZE - 100 and context.decode(stays, 100, [5] * room) == 0
    cells.release(stays)


def test_a_batch_takes_a_token_of_each_sequence(tmp_path: Path) -> None:
    """However short the context is."""
    path = tiny_gguf(tmp_path, num_hidden_layers=1)
    backend = GGUFBackend(path, EngineSettings(context_length=16, parallel=64), PLENTY)
    for uid in range(64):
        backend.add(Sequence(uid, [uid + 5], 1, SamplingParams()))
    finished = [event.uid for event in backend.step() if isinstance(event, TokenEvent)]
    assert finished == list(range(64))
    backend.close()


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3, 2], 1), ([2], [1], 0)],
)
def test_common(a: list[int], b: list[int], length: int) -> None:
    """Tokens before the first difference."""
    assert common(np.array(a, np.int32), np.array(b, np.int32)) == length
