"""The pipe between server and runner: messages survive it, however the bytes arrive."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx import errors
from lmx.config import EngineSettings
from lmx.errors import LMXError
from lmx.generation import (
    Chat,
    ChatMessage,
    EmbeddingRequest,
    GenerationRequest,
    Grammar,
    Part,
    SamplingParams,
    TokenLogprob,
    Tool,
    ToolCall,
)
from lmx.messages import (
    MAX_FRAME_BYTES,
    Accepted,
    AnyCommand,
    AnyEvent,
    Cancel,
    Delta,
    Embed,
    Embedded,
    Error,
    Failed,
    Finished,
    FrameReader,
    Generate,
    Grant,
    Load,
    Loaded,
    LoadFailed,
    Refused,
    Report,
    Stop,
    decode_command,
    decode_events,
    encode_command,
    encode_events,
)

ERROR = Error("InvalidRequest", "nein: ü", "messages")
PARAMS = SamplingParams(
    logit_bias={5: -100.0},
    repetition_penalty=1.1,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    temperature=0.0,
    seed=2**63 - 1,
    max_tokens=1,
    stop=("\n\n", "</s>"),
    logprobs=0,
)
CHAT = Chat(
    messages=[
        ChatMessage("user", "Grüße 👋\0"),
        ChatMessage("assistant", "", (ToolCall("1", "f", "{}"),), reasoning="hm"),
        ChatMessage("tool", "", tool_call_id="1", name="f"),
    ],
    tools=[Tool("f", None, {"type": "object", "properties": {"a": {"enum": [1, None]}}}, True)],
    callable=["f"],
    required=True,
    parallel=False,
    template_kwargs={"enable_thinking": False},
)
COMMANDS: list[AnyCommand] = [
    Load("/models/a b", "mlx", EngineSettings(context_length=4096), 1 << 30, None, "/tmp/turn"),
    Load("/models/c.gguf", "gguf", EngineSettings(), 0, ["batch"], "/tmp/turn"),
    Generate(1, GenerationRequest(CHAT, PARAMS, 3, Grammar("regex", "a|b"))),
    Generate(2, GenerationRequest(["a", [1, 2]], SamplingParams())),
    Embed(3, EmbeddingRequest(["ü", [7]], 64)),
    Cancel(2**40),
    Grant(2**40),
    Stop(),
]
EVENTS: list[AnyEvent] = [
    Loaded(4096, 16, "mlx-lm 0.32.2", ["batch", "prefix"], ["draft: it differs"]),
    Report(2**40, 2**33, 0, 0.25),
    LoadFailed(ERROR),
    Accepted(1, 10),
    Refused(1, ERROR),
    Delta(1, 0, [Part("call", "f", "id"), Part("arguments", "👋")], 3),
    Delta(1, 1, [], 4, [TokenLogprob(b"\xf0", -1.5, [(b"a", -0.5)])], "length"),
    Embedded(1, 0, b"\0\0\x80?"),
    Finished(1, 7, 2, 5, 4, 3, True),
    Failed(1, ERROR),
]


def bodies(data: bytes) -> list[bytes]:
    return FrameReader().feed(data)


def test_tables_are_complete() -> None:
    """Every command and event is in the tables above."""
    assert {type(command) for command in COMMANDS} == set(get_args(AnyCommand))
    assert {type(event) for event in EVENTS} == set(get_args(AnyEvent))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_command(command: AnyCommand) -> None:
    """A command arrives in the runner as it left the server."""
    (body,) = bodies(encode_command(command))
    assert decode_command(body) == command


@pytest.mark.parametrize("events", [[], *[[e] for e in EVENTS], EVENTS], ids=len)
def test_events(events: list[AnyEvent]) -> None:
    """The events of a step arrive in the server as they left the runner, in order, in one frame."""
    (body,) = bodies(encode_events(events))
    assert decode_events(body) == events


@pytest.mark.parametrize(
    "cls",
    [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LMXError)],
)
@pytest.mark.parametrize("param", [None, "messages"])
def test_error(cls: type[LMXError], param: str | None) -> None:
    """An error keeps its class, its message and its param on the way through the pipe."""
    (body,) = bodies(encode_events([Failed(1, Error.of(cls("what is wrong", param=param)))]))
    (failed,) = decode_events(body)
    assert isinstance(failed, Failed)
    error = failed.error.exception()
    assert (type(error), error.message, error.param) == (cls, "what is wrong", param)


@pytest.mark.parametrize("body", [b"", b"\x90", b"\xc1", b"nonsense"])
def test_nonsense(body: bytes) -> None:
    """A body that is no message is an error, not a guess."""
    with pytest.raises(msgspec.DecodeError):
        decode_command(body)


@given(
    sent=st.lists(st.binary(max_size=20), max_size=8),
    cuts=st.lists(st.integers(0, 200)),
    tail=st.integers(0, 3),
)
def test_frames(sent: list[bytes], cuts: list[int], tail: int) -> None:
    """However the stream is cut, each body comes out once, whole, in order, and not before."""
    stream = b"".join(struct.pack(">I", len(body)) + body for body in sent) + b"\0" * tail
    reader = FrameReader()
    received: list[bytes] = []
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for start, end in pairwise(ends):
        received += reader.feed(stream[start:end])
        complete = 0
        position = 0
        for body in sent:
            position += 4 + len(body)
            complete += position <= end
        assert received == sent[:complete]


def test_frame_too_large() -> None:
    """A length no frame of ours has ends the reading before anything is kept for it."""
    assert FrameReader().feed(struct.pack(">I", MAX_FRAME_BYTES)) == []
    with pytest.raises(ValueError, match=f"frame of {MAX_FRAME_BYTES + 1} bytes"):
        FrameReader().feed(struct.pack(">I", MAX_FRAME_BYTES + 1))
