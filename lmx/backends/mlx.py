"""MLX models through mlx-lm's `BatchGenerator`: continuous batching, one sync a step.

The process's main thread loads, steps and frees the model: MLX streams and compiled functions
belong to a thread. What is known to bite in mlx-lm 0.32 is handled where a comment says so.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer

from ..chat_template import ChatTemplate, own_template
from ..config import EngineSettings
from ..errors import GenerationFailed, InsufficientMemory, ModelLoadFailed
from ..generation import SamplingParams
from ..kv_cache import mlx_kv_cache
from ..mlx_folder import read_folder
from . import (
    SLICE_TOKENS,
    BackendBroken,
    Memory,
    PrefillRate,
    Sequence,
    SequenceFailed,
    StepEvent,
    Template,
    TokenEvent,
    Vocabulary,
)
from .mlx_batch import Batches, OneAtATime
from .mlx_sampling import Drawing, Sampler

FALLBACK_CONTEXT_LENGTH: Final = 8192
"""For a config.json that names no length."""

PREFILL_ROWS: Final = 8
"""Short prompts prefilled together."""

GROWTH_TOKENS: Final = 64
"""What a sequence must find free beyond its tokens to join others: with less it would soon have to
leave again, and every return costs a prefill."""

# mlx-lm wires the recommended working set whenever a generator is made, with no way to opt out, and
# wiring is the best-supported trigger of macOS kernel panics (ml-explore/mlx#3186). The package
# exports a function of the same name as this module, hence sys.modules.
_mlx_lm_generate = sys.modules["mlx_lm.generate"]
if not hasattr(_mlx_lm_generate, "maybe_set_recommended_wired_limit"):
    raise ImportError("mlx-lm wires memory in a new way: lmx.backends.mlx must learn to prevent it")
_mlx_lm_generate.maybe_set_recommended_wired_limit = lambda: None  # type: ignore[attr-defined]


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence with what it needs to be put back after the batch was lost."""

    sequence: Sequence
    sampler: Sampler
    answer: list[int] = field(default_factory=list)
    drawing: Drawing | None = None
    """Once it is in the batch."""

    @property
    def tokens(self) -> int:
        return len(self.sequence.prompt) + len(self.answer)

    def draw(self) -> Drawing:
        """How it goes on from where it is."""
        s = self.sequence
        self.drawing = Drawing(self.sampler, s.params, s.prompt, self.answer, s.constraint)
        return self.drawing


class MLXBackend:
    dimensions = 0

    def __init__(self, path: Path, settings: EngineSettings, kv_bytes: int) -> None:
        mx.set_cache_limit(settings.mlx_cache_bytes)
        if settings.wired_bytes:
            mx.set_wired_limit(settings.wired_bytes)
        folder = read_folder(path)
        self._kv_cache = mlx_kv_cache(folder.config, folder.element_bytes)
        self._kv_bytes = kv_bytes
        self._kv_peak = 0
        """The most the KV cache has taken since the last report."""
        try:
            self._model, config = load_model(path)
            tokenizer = load_tokenizer(
                path, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            # Everything a malformed config, tokenizer or weight file was seen to raise.
            raise ModelLoadFailed(f"{path}: {type(error).__name__}: {error}") from error
        backend_tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend_tokenizer, Tokenizer):
            raise ModelLoadFailed(f"{path / 'tokenizer.json'}: missing, and no other kind is known")
        self._tokenizer = backend_tokenizer
        self.vocabulary = vocabulary(self._tokenizer, tokenizer.eos_token_ids)
        self.chat_template = _template(tokenizer, settings)
        parser = tokenizer.init_kwargs.get("tool_parser_type")
        self.tool_parser = parser if isinstance(parser, str) else None
        own = folder.context_length or FALLBACK_CONTEXT_LENGTH
        self.context_length = min(own, settings.context_length or own)
        self._batchable = all(map(_has_merge, make_prompt_cache(self._model)))
        self.parallel = settings.parallel if self._batchable else 1
        self.engine = f"mlx-lm {mlx_lm.__version__}"
        self._stop_tokens = [[token] for token in sorted(self.vocabulary.end)]
        self._rate = PrefillRate(settings.prefill_slice_seconds)
        self._samplers: dict[tuple[float, int, float, float], Sampler] = {}
        self._waiting: deque[_Row] = deque()
        self._rows: dict[int, _Row] = {}
        """Rows inside the generator, by its uid."""
        self._prefilling: set[int] = set()
        self._failed: list[StepEvent] = []
        """To be told by the next step."""
        self._generator = self._new_generator()

    def _new_generator(self) -> Batches | OneAtATime:
        if not self._batchable:
            return OneAtATime(self._model, self._stop_tokens, SLICE_TOKENS[1])
        return Batches(
            self._model,
            stop_tokens=self._stop_tokens,
            completion_batch_size=self.parallel,
            prefill_batch_size=min(PREFILL_ROWS, self.parallel),
            # The bound of one evaluation; `step` sets how much of a prompt is taken at a time.
            prefill_step_size=SLICE_TOKENS[1],
        )

    def tokenize(self, text: str, *, raw: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=raw).ids
        return ids

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(_Row(sequence, self._sampler(sequence.params)))

    def _sampler(self, params: SamplingParams) -> Sampler:
        """The sampler for these parameters. Rows that share the object are sampled in one call."""
        if params.temperature == 0:
            key = (0.0, 0, 1.0, 0.0)
        else:
            key = (params.temperature, params.top_k, params.top_p, params.min_p)
            if params.seed is not None:
                return Sampler(*key, seed=params.seed)
        return self._samplers.setdefault(key, Sampler(*key))

    def remove(self, uid: int) -> None:
        for row in self._waiting:
            if row.sequence.uid == uid:
                self._waiting.remove(row)
                return
        for inner, row in self._rows.items():
            if row.sequence.uid == uid:
                self._withdraw(inner)
                return

    def _withdraw(self, inner: int) -> None:
        """Take a row out of the generator; those that wait for its prompt's cache wait anew."""
        drawing = self._rows[inner].drawing
        assert drawing is not None
        for follower, _, _ in reversed(drawing.followers):
            self._waiting.appendleft(self._rows[follower])
            self._forget(follower)
        for row in self._rows.values():
            if row.drawing and inner in self._prefilling:
                row.drawing.followers = [f for f in row.drawing.followers if f[0] != inner]
        self._generator.remove([inner])
        self._forget(inner)

    def _forget(self, inner: int) -> None:
        self._prefilling.discard(inner)
        del self._rows[inner]
        if not self._rows:
            self._samplers.clear()

    def step(self) -> list[StepEvent]:
        self._give_way()
        self._admit()
        self._kv_peak = max(self._kv_peak, self._kv_size(self._rows.values()))
        failed, self._failed = self._failed, []
        return failed + (self._generate() if self._rows else [])

    def _generate(self) -> list[StepEvent]:
        try:
            if self._prefilling:
                with self._generator.stats() as stats:
                    prefilled, generated = self._generator.next()
                self._rate.measured(stats.prompt_tokens, stats.prompt_time)
            else:
                prefilled, generated = self._generator.next()
        except Exception as error:
            if "[METAL]" in str(error):
                raise BackendBroken(str(error)) from error
            return self._recover(error)
        for progress in prefilled:
            if progress.end_of_prompt:
                prompt = self._rows[progress.uid].sequence.prompt
                followers = {
                    inner
                    for inner in self._prefilling
                    if self._rows[inner].sequence.prompt is prompt and not self._rows[inner].answer
                }
                self._prefilling -= {progress.uid, *followers}
        return [self._token_event(response) for response in generated]

    def _admit(self) -> None:
        """Start waiting prompts: one at a time, or several that fit in one slice together.

        Each slice runs between two decode steps, so all running streams wait for it.
        """
        slice_tokens = self._rate.slice_tokens(decoding=len(self._rows) > len(self._prefilling))
        self._generator.prefill_step_size = slice_tokens
        if self._prefilling:
            return
        longest = prompts = 0
        leader: _Row | None = None
        while self._waiting and len(self._rows) < self.parallel:
            row = self._waiting[0]
            if self._kv_size([*self._rows.values(), row], GROWTH_TOKENS) > self._kv_bytes:
                if self._rows:
                    break
                if self._kv_size([row]) > self._kv_bytes:
                    self._waiting.popleft()
                    self._fail_for_memory(row)
                    continue
            if leader and leader.sequence.prompt is row.sequence.prompt and not row.answer:
                self._follow(leader, self._waiting.popleft())
                continue
            longest = max(longest, row.tokens)
            prompts += 1
            if prompts > 1 and (prompts > PREFILL_ROWS or prompts * longest > slice_tokens):
                break
            self._insert(self._waiting.popleft())
            leader = row if self._batchable and not row.answer else None

    def _kv_size(self, rows: Collection[_Row], growth: int = 1) -> int:
        """What their KV cache takes with `growth` more tokens each: padded to the longest."""
        longest = max((row.tokens for row in rows), default=0)
        return len(rows) * self._kv_cache.bytes(min(longest + growth, self.context_length))

    def _give_way(self) -> None:
        """Before the KV cache outgrows its grant, the youngest goes back to the queue."""
        while self._rows and self._kv_size(self._rows.values()) > self._kv_bytes:
            inner, row = list(self._rows.items())[-1]
            self._withdraw(inner)
            if self._rows:
                self._waiting.appendleft(row)
            else:
                self._fail_for_memory(row)

    def _fail_for_memory(self, row: _Row) -> None:
        needed, granted = (n / 2**30 for n in (self._kv_size([row]), self._kv_bytes))
        error = InsufficientMemory(
            f"The KV cache of {row.tokens + 1} tokens takes {needed:.2f} GB, and the memory limit "
            f"leaves this model {granted:.2f} GB for it."
        )
        self._failed.append(SequenceFailed(row.sequence.uid, error))

    def _insert(self, row: _Row) -> None:
        sequence = row.sequence
        [inner] = self._generator.insert(
            [sequence.prompt + row.answer],
            max_tokens=[sequence.max_tokens - len(row.answer)],
            samplers=[row.draw()],
        )
        self._rows[inner] = row
        self._prefilling.add(inner)

    def _follow(self, leader: _Row, row: _Row) -> None:
        """Let a row begin with a copy of the leader's cache, once that has its prompt."""
        assert leader.drawing and isinstance(self._generator, Batches)
        inner = self._generator.new_uid()
        leader.drawing.followers.append((inner, row.draw(), row.sequence.max_tokens))
        self._rows[inner] = row
        self._prefilling.add(inner)

    def _token_event(self, response: Any) -> StepEvent:
        row = self._rows[response.uid]
        row.answer.append(response.token)
        if response.finish_reason is not None:
            self._forget(response.uid)
        logprobs = None
        if response.logprobs is not None:
            report, at = response.logprobs
            logprobs = report[at, row.sequence.params.logprobs]
        return TokenEvent(row.sequence.uid, response.token, response.finish_reason, logprobs)

    def _recover(self, error: Exception) -> list[StepEvent]:
        """After a failure the generator is unusable for every row (mlx-lm keeps no transaction).

        What was being prefilled is the suspect and fails; the others are prefilled again and go on
        where they were. With no suspect, all fail.
        """
        suspects = self._prefilling or set(self._rows)
        survivors = [row for inner, row in self._rows.items() if inner not in suspects]
        failed = [self._rows[inner].sequence.uid for inner in suspects]
        self._rows.clear()
        self._prefilling.clear()
        self._generator.close()
        self._generator = self._new_generator()
        self._waiting.extendleft(reversed(survivors))
        mx.clear_cache()
        reason = GenerationFailed(f"The engine failed: {error}")
        return [SequenceFailed(uid, reason) for uid in failed]

    def grant(self, kv_bytes: int) -> Memory:
        kept = self._kv_size(self._rows.values(), growth=0)
        if self._rows:
            # Nobody makes way for the oldest: with less it could only fail in mid-answer.
            oldest = next(iter(self._rows.values())).sequence
            end = self._kv_cache.bytes(len(oldest.prompt) + oldest.max_tokens)
            kept = max(kept, min(self._kv_bytes, end))
        self._kv_bytes = max(kv_bytes, kept)
        used, self._kv_peak = self._kv_peak, 0
        held: int = mx.get_active_memory() + mx.get_cache_memory()
        held = max(held, mx.get_peak_memory())
        mx.reset_peak_memory()
        return Memory(held, self._kv_bytes, used)

    def close(self) -> None:
        self._generator.close()
        self._rows.clear()
        self._waiting.clear()
        del self._generator, self._model
        gc.collect()
        mx.clear_cache()


class _PythonTemplate:
    """mlx-lm's own code, where a model comes without a template (DeepSeek V3.2)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    source: str | None = None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **(kwargs or {})
        )
        return text


def _template(tokenizer: Any, settings: EngineSettings) -> Template | None:
    source = own_template(settings) or tokenizer.chat_template
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if source is not None:
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        return ChatTemplate(source, bos_token=bos, eos_token=eos)
    return _PythonTemplate(tokenizer) if tokenizer.has_chat_template else None


def vocabulary(tokenizer: Tokenizer, end: Collection[int]) -> Vocabulary:
    """What each token id stands for.

    Text is made of bytes and not by the tokenizer's own decoders: those drop the space before a
    first word, and their stream fails on bytes that are no UTF-8 ("Invalid prefix encountered").
    """
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
    if "ByteLevel" in json.dumps(decoder):
        # GPT-2's alphabet: a byte that is no printable character is written as one from 256 on.
        # https://github.com/openai/gpt-2/blob/master/src/encoder.py
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = (byte for byte in range(256) if byte not in printable)
        alphabet = {chr(256 + n): byte for n, byte in enumerate(others)}
        alphabet |= {chr(byte): byte for byte in printable}

        def encode(token: str) -> bytes:
            return bytes(alphabet[c] for c in token if c in alphabet)
    else:  # SentencePiece's conventions

        def encode(token: str) -> bytes:
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()

    ids = tokenizer.get_vocab(False)
    added = tokenizer.get_added_tokens_decoder()
    tokens = [b""] * (max([*ids.values(), *added], default=-1) + 1)
    for token, id in ids.items():
        tokens[id] = encode(token)
    for id, entry in added.items():
        tokens[id] = entry.content.encode()
    control = {id for id, entry in added.items() if entry.special}
    return Vocabulary(tokens, frozenset(control), frozenset(end))


def _has_merge(cache: Any) -> bool:
    return hasattr(cache, "merge") and all(map(_has_merge, getattr(cache, "caches", ())))
