"""What all that is done with llama.cpp needs: its log, a model's weights, its vocabulary."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt
import psutil

from ..errors import ModelLoadFailed
from . import BackendBroken, Vocabulary

Ids = npt.NDArray[np.int32]

ENGINE: Final = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

# What llama_decode returns, beside 0 and what is fatal.
NO_SLOT: Final = 1
BAD_BATCH: Final = -1

_LOG_INFO: Final = 2
_LOG_ERROR: Final = 4

# llama.cpp has one log per process. Its lines say why a load or a step failed, and how large its
# buffers are, which the C API does not tell. ctypes needs the callback kept alive.
log: Final[deque[tuple[int, str]]] = deque(maxlen=1000)


def _keep(level: int, text: bytes, _: object) -> None:
    if _LOG_INFO <= level <= _LOG_ERROR:
        log.append((level, text.decode("utf-8", "replace").strip()))


_log_callback: Final = llama_cpp.llama_log_callback(_keep)


def errors() -> str:
    lines = dict.fromkeys(text for level, text in log if level == _LOG_ERROR)
    return "; ".join(lines) or "no reason given"


def load_model(path: Path) -> Any:
    """
    Raises:
        ModelLoadFailed: llama.cpp cannot load it.
    """
    llama_cpp.llama_log_set(_log_callback, None)
    llama_cpp.llama_backend_init()
    log.clear()
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(path), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise ModelLoadFailed(f"{path}: {errors()}")
    return model


def by_cell(model: Any) -> bool:
    """Its memory is by the cell: a sequence can be cut anywhere, and its id costs nothing."""
    return not (
        llama_cpp.llama_model_is_recurrent(model)
        or llama_cpp.llama_model_is_hybrid(model)
        or llama_cpp.llama_model_n_swa(model) > 0
    )


def buffer_bytes(model: Any) -> int:
    """What model and context have taken, right after both were made."""
    sizes = (re.search(r"buffer size =\s*([\d.]+) MiB", text) for _, text in log)
    logged = int(sum(float(size[1]) for size in sizes if size) * 2**20)
    weights: int = llama_cpp.llama_model_size(model)
    return max(logged, weights)


def cell_bytes(cells: int) -> int:
    """What a cell of the KV cache takes, right after its context was made."""
    sizes = (re.search(r" KV buffer size =\s*([\d.]+) MiB", text) for _, text in log)
    return max(1, int(sum(float(size[1]) for size in sizes if size) * 2**20) // cells)


class Batch:
    """Tokens for one call of llama.cpp."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.size: int = llama_cpp.llama_n_batch(context)
        self._native = llama_cpp.llama_batch_init(self.size, 0, 1)
        for i in range(self.size):
            self._native.n_seq_id[i] = 1
        self._seq_ids = [self._native.seq_id[i] for i in range(self.size)]

    def clear(self) -> None:
        self._native.n_tokens = 0

    def add(self, seq_id: int, position: int, tokens: list[int]) -> None:
        native, first = self._native, self._native.n_tokens
        for i, token in enumerate(tokens, first):
            native.token[i] = token
            native.pos[i] = position + i - first
            self._seq_ids[i][0] = seq_id
            native.logits[i] = 0
        native.n_tokens += len(tokens)

    def want(self, rows: int) -> None:
        """Logits after each of the last so many tokens added."""
        for i in range(self._native.n_tokens - rows, self._native.n_tokens):
            self._native.logits[i] = 1

    def decode(self) -> int:
        """0, or NO_SLOT or BAD_BATCH, which change nothing.

        Raises:
            BackendBroken: anything else.
        """
        log.clear()
        code: int = llama_cpp.llama_decode(self._context, self._native)
        if code not in (0, NO_SLOT, BAD_BATCH):
            raise BackendBroken(f"llama_decode returned {code}: {errors()}")
        return code

    def free(self) -> None:
        llama_cpp.llama_batch_free(self._native)


def state_bytes(context: Any, seq_id: int) -> int:
    size: int = llama_cpp.llama_state_seq_get_size(context, seq_id)
    return size


def save(context: Any, seq_id: int, tokens: Ids, path: Path) -> None:
    """Write a sequence's KV cache to a file.

    Raises:
        OSError: it cannot be written.
    """
    pointer = tokens.ctypes.data_as(llama_cpp.llama_token_p)
    if not llama_cpp.llama_state_seq_save_file(
        context, os.fsencode(path), seq_id, pointer, len(tokens)
    ):
        raise OSError(f"{path}: {errors()}")


def restore(context: Any, path: Path, seq_id: int, tokens: int) -> bool:
    """Whether the file was read into the sequence, which is empty if not."""
    buffer, count = (ctypes.c_int32 * tokens)(), ctypes.c_size_t()
    read: int = llama_cpp.llama_state_seq_load_file(
        context, os.fsencode(path), seq_id, buffer, tokens, ctypes.byref(count)
    )
    return read > 0 and count.value == tokens


def threads() -> int:
    """Two threads on one core only hinder each other."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        return min(cores, len(os.sched_getaffinity(0)))
    return cores


def read_vocabulary(vocab: Any) -> Vocabulary:
    ids = range(llama_cpp.llama_vocab_n_tokens(vocab))
    piece = ctypes.create_string_buffer(256)
    # User-defined tokens such as <tool_call> are text, as llama.cpp itself has it.
    hidden = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
    return Vocabulary(
        tokens=[_token_bytes(vocab, id, piece) for id in ids],
        control=frozenset(id for id in ids if llama_cpp.llama_vocab_get_attr(vocab, id) & hidden),
        end=frozenset(id for id in ids if llama_cpp.llama_vocab_is_eog(vocab, id)),
    )


def _token_bytes(vocab: Any, token: int, piece: Any) -> bytes:
    """The space before a first word is kept."""
    count: int = llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)
    if count < 0:
        return _token_bytes(vocab, token, ctypes.create_string_buffer(-count))
    data: bytes = piece.raw[:count]
    return data


def tokenize(vocab: Any, text: str, *, add_special: bool) -> list[int]:
    """`add_special`: with the tokens that the vocabulary says begin and end every input."""
    data = text.encode("utf-8", "replace")
    size = len(data) + 2
    while True:
        buffer = (ctypes.c_int32 * size)()
        count: int = llama_cpp.llama_tokenize(
            vocab, data, len(data), buffer, size, add_special, True
        )
        if count >= 0:
            return buffer[:count]
        size = -count
