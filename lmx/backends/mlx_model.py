"""An MLX model and what its tokenizer knows, loaded with mlx-lm's code."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import mlx_lm
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer

from ..chat_template import ChatTemplate, own_template
from ..config import EngineSettings
from ..errors import ModelLoadFailed
from ..kv_cache import mlx_kv_cache
from ..mlx_folder import read_folder
from . import Template, Vocabulary

FALLBACK_CONTEXT_LENGTH: Final = 8192
"""For a config.json that names no length."""

ENGINE: Final = f"mlx-lm {mlx_lm.__version__}"


class MLXModel:
    def __init__(self, path: Path, settings: EngineSettings) -> None:
        """
        Raises:
            ModelLoadFailed: which file, and why.
        """
        folder = read_folder(path)
        self.kv_cache = mlx_kv_cache(folder.config, folder.element_bytes)
        try:
            self.network, config = load_model(path)
            tokenizer = load_tokenizer(
                path, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id")
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            # Everything a malformed config, tokenizer or weight file was seen to raise.
            raise ModelLoadFailed(f"{path}: {type(error).__name__}: {error}") from error
        backend_tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend_tokenizer, Tokenizer):
            raise ModelLoadFailed(f"{path / 'tokenizer.json'}: missing, and no other kind is known")
        self.tokenizer = backend_tokenizer
        self.vocabulary = vocabulary(self.tokenizer, tokenizer.eos_token_ids)
        self.chat_template = template(tokenizer, settings)
        parser = tokenizer.init_kwargs.get("tool_parser_type")
        self.tool_parser = parser if isinstance(parser, str) else None
        own = folder.context_length or FALLBACK_CONTEXT_LENGTH
        self.context_length = min(own, settings.context_length or own)
        files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
        changed = " ".join(f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        self.name = f"{path.resolve()}\n{ENGINE} {changed}"
        """The path, and what KV caches of it depend on."""


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


def template(tokenizer: Any, settings: EngineSettings) -> Template | None:
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
