from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.errors import ModelLoadFailed
from lmx.gguf_header import read_header
from lmx.gguf_tokenizer import WORDS, build_tokenizer, end_token_ids, tokenizer_config
from tests.models import smollm2_gguf, write_gguf

PIECES = """
Hello world the quick brown fox don't I'm WE'RE they'LL it's 'tis O'Neill a_b snake_case camelCase
1 12 123 4567 3.14 1,000,000 0x1F ½ ² ٣ Ⅷ def f(x): return x+1; != == === ... --- { } [ ] <b> \\n
e\u0301 é ñ ß \u017f Ǆ ﬁ Straße naïve 中文 日本語 한국어 ไทย नमस्ते עברית العربية Ελληνικά русский
😀 👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇩🇪 👍🏽 — “quoted” ¿qué? €5 $x ▁ Ġ <s> </s> <unk> <|im_start
<|im_start|> <|im_end|> <|endoftext|> <repo_name> https://a.b/c?d=e&f#g C:\\dir "q" #!/bin/sh
aaaa bbbbbbbbb ======== ######## user@example.com
""".split()
SPACES = [
    " ",
    "  ",
    "   ",
    "        ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2028",
]


def corpus(count: int) -> list[str]:
    """Every piece alone, then `count` random sequences of them with all kinds of space between."""
    chance = random.Random(0)
    parts = [*PIECES, *SPACES, *SPACES, ""]
    mixed = ["".join(chance.choices(parts, k=chance.randint(2, 12))) for _ in range(count)]
    return [*PIECES, *SPACES, "", "\x00\x01\x7f\ufeff\u200b\ufffd", *mixed]


class Judge:
    """llama.cpp's tokenizer and ours of the same file."""

    def __init__(self, path: Path) -> None:
        self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.ours = build_tokenizer(read_header(path))

    def agree(self, text: str, add_special: bool = False) -> None:
        theirs = self.llama.tokenize(text.encode(), add_bos=add_special, special=True)
        assert self.ours.encode(text, add_special_tokens=add_special).ids == theirs, repr(text)


@cache
def smollm2() -> Judge:
    return Judge(smollm2_gguf())


def write_vocabulary(path: Path, **changes: Any) -> Path:
    """SmolLM2's vocabulary alone; `changes` to `tokenizer.ggml.*`, None removes."""
    metadata = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = read_header(smollm2_gguf()).metadata | metadata
    write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, {})
    return path


def test_smollm2_agrees_with_llama_cpp() -> None:
    """Words, digits, code, white space, scripts, emoji and control tokens: the same token ids."""
    for text in corpus(400):
        smollm2().agree(text)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF)))
@settings(max_examples=300, deadline=None)
def test_smollm2_agrees_on_any_text(text: str) -> None:
    """So they are for any characters whose bytes all have tokens. SmolLM2 has none for some control
    bytes and 0xF1: both tokenizers drop these, but only ours then merges their neighbours."""
    smollm2().agree(text)


def test_decoding_gives_the_text_back() -> None:
    """Tokens become the text they came from, special ones included."""
    for text in corpus(100):
        ids = smollm2().ours.encode(text).ids
        assert smollm2().ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", WORDS)
def test_pre_tokenizers_agree_with_llama_cpp(tmp_path: Path, pre: str) -> None:
    """Each known way of cutting words does what llama.cpp does by that name, BOS included."""
    judge = Judge(write_vocabulary(tmp_path / "x.gguf", pre=pre, add_bos_token=None))
    for text in corpus(300):
        judge.agree(text, add_special=True)


def test_no_pre_tokenizer_is_the_default_one(tmp_path: Path) -> None:
    """Old files do not name theirs."""
    judge = Judge(write_vocabulary(tmp_path / "x.gguf", pre=None))
    for text in corpus(100):
        judge.agree(text)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True)])
def test_tokens_added_to_every_text(tmp_path: Path, bos: bool, eos: bool) -> None:
    """BOS and EOS are added where the file says so, and only when asked for special tokens."""
    path = write_vocabulary(tmp_path / "x.gguf", add_bos_token=bos, add_eos_token=eos)
    tokenizer = build_tokenizer(read_header(path))
    plain = tokenizer.encode("Hello", add_special_tokens=False).ids
    assert tokenizer.encode("Hello").ids == [1] * bos + plain + [2] * eos


def test_user_defined_tokens_are_not_special(tmp_path: Path) -> None:
    """They are found in a text like control tokens, and shown like ordinary ones."""
    types = [3] * 17 + [1] * (49152 - 17)
    types[3] = 4
    judge = Judge(write_vocabulary(tmp_path / "x.gguf", token_type=types))
    text = "a<repo_name>b<reponame>"
    judge.agree(text)
    assert judge.ours.decode(judge.ours.encode(text).ids) == "a<repo_name>b"


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A vocabulary of all bytes, a few letters, and random words of these with random scores."""
    chance = random.Random(1)
    letters = ["▁", "a", "b", "c", "é", "中"]
    words = {"".join(chance.choices(letters, k=chance.randint(2, 5))) for _ in range(400)}
    control = ["<unk>", "<s>", "</s>", "<|x|>"]
    tokens = [*control, *(f"<0x{i:02X}>" for i in range(256)), *letters, *sorted(words)]
    ordinary = len(tokens) - 260
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 260 + [float(-i) for i in chance.sample(range(ordinary), ordinary)],
        "token_type": [2, 3, 3, 4] + [6] * 256 + [1] * ordinary,
    } | changes
    values = {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}
    return {"general.architecture": "llama"} | values


@pytest.mark.parametrize("changes", [{}, {"add_space_prefix": False}, {"add_bos_token": False}])
def test_sentencepiece_agrees_with_llama_cpp(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Score for score and byte for byte, with the space before a text and after control tokens."""
    write_gguf(tmp_path / "x.gguf", sentencepiece_metadata(**changes), {})
    judge = Judge(tmp_path / "x.gguf")
    chance = random.Random(2)
    parts = ["a", "b", "c", "é", "中", " ", "  ", "aa", "ab", "X", "😀", "\n", "<s>", "<|x|>", "▁"]
    for _ in range(3000):
        judge.agree("".join(chance.choices(parts, k=chance.randint(0, 30))), add_special=True)


def test_sentencepiece_decodes(tmp_path: Path) -> None:
    """Bytes join to characters, and the added space goes again."""
    write_gguf(tmp_path / "x.gguf", sentencepiece_metadata(), {})
    tokenizer = build_tokenizer(read_header(tmp_path / "x.gguf"))
    for text in ("abc", " a b", "é😀\n", "a  c"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_configuration() -> None:
    """tokenizer_config.json names the tokens and holds the chat template."""
    header = read_header(smollm2_gguf())
    config = tokenizer_config(header)
    assert config["chat_template"] == header.metadata["tokenizer.chat_template"]
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (config["unk_token"], config["pad_token"]) == ("<|endoftext|>", "<|im_end|>")


def test_end_tokens() -> None:
    """The file's own end token and <|endoftext|> end an answer, as they do in llama.cpp."""
    ids = end_token_ids(read_header(smollm2_gguf()))
    assert ids == [0, 2]
    vocabulary = llama_cpp.llama_model_get_vocab(smollm2().llama.model)
    assert all(llama_cpp.llama_vocab_is_eog(vocabulary, i) for i in ids)


def test_special_tokens_out_of_range_are_ignored(tmp_path: Path) -> None:
    """As llama.cpp does; but a model whose answers cannot end is refused."""
    header = read_header(write_vocabulary(tmp_path / "x.gguf", bos_token_id=1 << 31))
    assert "bos_token" not in tokenizer_config(header)
    metadata = sentencepiece_metadata(eos_token_id=1 << 31)
    metadata["tokenizer.ggml.tokens"][2] = "<2>"
    write_gguf(tmp_path / "y.gguf", metadata, {})
    with pytest.raises(ModelLoadFailed, match="no token that ends an answer"):
        end_token_ids(read_header(tmp_path / "y.gguf"))


def gpt2(**changes: Any) -> dict[str, Any]:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    return {f"tokenizer.ggml.{k}": v for k, v in (values | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda: gpt2(model="bert", pre="bge"), "tokenizer is bert with pre-tokenizer bge"),
        (lambda: gpt2(pre="kimi-k2"), "tokenizer is gpt2 with pre-tokenizer kimi-k2"),
        (lambda: gpt2(model=None), "lacks tokenizer.ggml.model"),
        (lambda: gpt2(tokens=None), "lacks tokenizer.ggml.tokens"),
        (lambda: gpt2(tokens=[1, 2]), "tokens is not text"),
        (lambda: gpt2(tokens=["a", "b", "a"]), "repeats a token"),
        (lambda: gpt2(token_type=[1]), "one type for each"),
        (lambda: gpt2(merges=None), "lacks tokenizer.ggml.merges"),
        (lambda: gpt2(merges=[1]), "merges is not text"),
        (lambda: gpt2(merges=["a c"]), "cannot be built"),
        (lambda: gpt2(merges=[""]), "cannot be built"),
        (lambda: gpt2(add_bos_token=True), "adds a bos token to every text but names none"),
        (lambda: gpt2(add_bos_token=1), "add_bos_token is 1, not bool"),
        (lambda: sentencepiece_metadata(scores=None), "lacks tokenizer.ggml.scores"),
        (lambda: sentencepiece_metadata(scores=[0.0]), "1 scores for"),
    ],
)
def test_refused(tmp_path: Path, metadata: Callable[[], dict[str, Any]], message: str) -> None:
    """What is not known to come out the same is an error that says what it is."""
    write_gguf(tmp_path / "x.gguf", metadata(), {})
    with pytest.raises(ModelLoadFailed, match=f"x.gguf: .*{message}"):
        build_tokenizer(read_header(tmp_path / "x.gguf"))
