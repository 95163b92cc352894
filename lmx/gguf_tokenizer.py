"""A Hugging Face tokenizer from a GGUF file's vocabulary, giving the same tokens as llama.cpp."""

from __future__ import annotations

from typing import Any, Final

from .gguf_header import Header

# How text is cut into words before tokens are merged: `regex_exprs` in llama.cpp's llama-vocab.cpp,
# applied one after another, by `tokenizer.ggml.pre`.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2: Final = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
)
_LLAMA3: Final = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*")
)
WORDS: Final = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "falcon3": [_LLAMA3],
    "gpt-2": [_GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_QWEN2],
    "smollm": [r"\p{N}", _GPT2],
    "tekken": [_TEKKEN],
}
_LLAMA3_LIKE: Final = {"falcon3", "llama-bpe", "tekken"}
"""These take a word that is a token as it is, without merging, and begin every text with BOS."""

# Values of `tokenizer.ggml.token_type` (llama.h, `enum llama_token_type`).
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

# Where a file names one end token of several, llama.cpp finds the others by their text.
_END_TOKENS: Final = {
    "</s>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<|eom_id|>",
    "<|eot_id|>", "<|im_end|>",
}  # fmt: skip


def token_id(header: Header, name: str) -> int | None:
    """The id of the token called `bos`, `eos`... None where the file has none, or one out of range,
    which llama.cpp ignores too."""
    default = -1
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        default = {"unknown": 0, "bos": 1, "eos": 2}.get(name, -1)
    found = header.get(f"tokenizer.ggml.{name}_token_id", int, default)
    return found if 0 <= found < len(_tokens(header)) else None


def end_token_ids(header: Header) -> list[int]:
    """Every token that ends an answer."""
    ids = {token_id(header, name) for name in ("eos", "eot", "eom")} - {None}
    ids |= {i for i, token in enumerate(_tokens(header)) if token in _END_TOKENS}
    if not ids:
        header.fail("it names no token that ends an answer")
    return sorted(i for i in ids if i is not None)


def tokenizer_config(header: Header) -> dict[str, Any]:
    """tokenizer_config.json: the chat template, and the tokens it may name."""
    tokens = _tokens(header)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (found := token_id(header, key)) is not None:
            config[f"{name}_token"] = tokens[found]
    if template := header.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    return config


def build_tokenizer(header: Header) -> Any:
    """The `tokenizers.Tokenizer` to be saved as tokenizer.json.

    Raises:
        ModelLoadFailed: a kind of tokenizer that is not known to come out the same.
    """
    import tokenizers as hf

    tokens = _tokens(header)
    types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        header.fail("its vocabulary repeats a token, or does not have one type for each")
    model = header.get("tokenizer.ggml.model", str)
    pre = header.get("tokenizer.ggml.pre", str, "default")
    if model == "llama":
        tokenizer = _sentencepiece(header, tokens)
    elif model == "gpt2" and pre in WORDS:
        tokenizer = _byte_level(header, tokens, pre)
    else:
        header.fail(f"its tokenizer is {model} with pre-tokenizer {pre}, which is not known here")
    tokenizer.add_tokens(
        [
            hf.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in _END_TOKENS
        ]
    )
    before = _added(header, "bos", model == "llama" or pre in _LLAMA3_LIKE)
    after = _added(header, "eos", False)
    if before or after:
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {*before, *after}],
        )
    return tokenizer


def _tokens(header: Header) -> list[str]:
    return _strings(header, "tokenizer.ggml.tokens")


def _strings(header: Header, key: str) -> list[str]:
    values = header.get(key, list)
    if not all(isinstance(value, str) for value in values):
        header.fail(f"{key} is not text")
    return values


def _added(header: Header, name: str, default: bool) -> list[str]:
    if not header.get(f"tokenizer.ggml.add_{name}_token", bool, default):
        return []
    if (found := token_id(header, name)) is None:
        header.fail(f"it adds a {name} token to every text but names none")
    return [_tokens(header)[found]]


def _byte_level(header: Header, tokens: list[str], pre: str) -> Any:
    import tokenizers as hf

    # Only a space after the first character separates (`word.find(' ', 1)` in llama-vocab.cpp).
    cuts = [(m[:1], *m[1:].partition(" ")) for m in _strings(header, "tokenizer.ggml.merges")]
    merges = [(first + left, right) for first, left, _, right in cuts]
    tokenizer = _bpe(header, tokens, merges, ignore_merges=pre in _LLAMA3_LIKE)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Split(hf.Regex(words), "isolated") for words in WORDS[pre]]
        + [hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = hf.decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header, tokens: list[str]) -> Any:
    """SentencePiece joins the neighbours whose joint token has the best score. A merge list in
    order of score does the same: every way to cut a token in two is one merge."""
    import tokenizers as hf

    ids = {token: i for i, token in enumerate(tokens)}
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        header.fail(f"it has {len(scores)} scores for {len(tokens)} tokens")
    merges = sorted(
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    unknown = token_id(header, "unknown")
    tokenizer = _bpe(
        header,
        tokens,
        [(tokens[left], tokens[right]) for _, left, right in merges],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁")] * prefix + [hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        + [hf.decoders.Strip(" ", 1, 0)] * prefix
    )
    return tokenizer


def _bpe(header: Header, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    import tokenizers as hf

    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # tokenizers raises nothing more specific
        header.fail(f"its tokenizer cannot be built: {error}")
