"""What server and runner say to each other over the runner's stdin and stdout.

A frame is a 4-byte big-endian length and a msgpack body. The server sends one `Command` a frame;
the runner sends a list of `Event`s a frame, one frame a step for all sequences together. For each
`Generate` the runner answers `Accepted` or `Refused` first, and after `Accepted` any number of
`Delta`s and exactly one of `Finished` and `Failed`; an `Embed` has `Embedded`s instead. `Refused`
and `LoadFailed` are final.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from .config import EngineSettings
from .errors import LMXError, by_name
from .generation import (
    EmbeddingRequest,
    FinishReason,
    GenerationRequest,
    Part,
    TokenLogprob,
)

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
_LENGTH: Final = struct.Struct(">I")


class Error(msgspec.Struct, array_like=True):
    """An `LMXError` on its way through the pipe."""

    name: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: LMXError) -> Error:
        return cls(type(error).__name__, error.message, error.param)

    def exception(self) -> LMXError:
        return by_name(self.name)(self.message, param=self.param)


class Command(msgspec.Struct, array_like=True, tag=True):
    pass


class Load(Command):
    path: str
    """An MLX model folder or a GGUF file (the first, of a split one)."""
    format: str
    """`mlx` or `gguf`."""
    settings: EngineSettings
    kv_bytes: int
    """What the KV cache may take until the first `Grant`."""
    features: list[str] | None
    """What `backends.Feature`s have passed their test with this model before. None: test now."""
    turn: str
    """The file whose lock is the right to use the GPU, shared by all runners."""


class Generate(Command):
    id: int
    request: GenerationRequest


class Embed(Command):
    id: int
    request: EmbeddingRequest


class Cancel(Command):
    id: int


class Grant(Command):
    """Let the KV cache take so much from now on; answered with `Report`.

    Below what it takes already, nothing is thrown away, but it does not grow.
    """

    kv_bytes: int


class Stop(Command):
    """Free the model and exit; sequences still running are cancelled."""


class Event(msgspec.Struct, array_like=True, tag=True):
    pass


class Loaded(Event):
    context_length: int
    parallel: int
    """How many sequences decode together; 1 where the model's cache cannot be batched."""
    engine: str
    """Engine and version, for logs and the system fingerprint, such as `mlx-lm 0.32.2`."""
    features: list[str]
    """`backends.Feature`s in use."""
    problems: list[str] = []
    """Why others are not, where that was tested now."""


class Report(Event):
    engine_bytes: int
    """The most the engine has held since the last report, KV cache included."""
    kv_bytes: int
    """What the KV cache may take: the grant, or what it takes already if that is more."""
    kv_used_bytes: int
    padding: float = 0.0
    """The largest share of a batch's KV cells that held nothing, since the last report."""


class LoadFailed(Event):
    error: Error


class Accepted(Event):
    id: int
    prompt_tokens: int


class Refused(Event):
    id: int
    error: Error


class Delta(Event):
    """What one answer has gained in one step."""

    id: int
    index: int
    """Which of the request's answers."""
    parts: list[Part]
    tokens: int
    """Of this answer so far, those whose text is held back included."""
    logprobs: list[TokenLogprob] = []
    """Of tokens whose text is content, sent with that text."""
    finish: FinishReason | None = None
    """Set in the last one of this answer."""


class Embedded(Event):
    id: int
    index: int
    """Which of the inputs."""
    vector: bytes
    """float32, little endian."""


class Finished(Event):
    """All answers of the request have ended."""

    id: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those whose KV cache was there already."""
    drafted_tokens: int = 0
    """Guessed ahead."""
    accepted_tokens: int = 0
    """Of these, the ones that were right."""
    cancelled: bool = False


class Failed(Event):
    id: int
    error: Error


AnyCommand = Load | Generate | Embed | Cancel | Grant | Stop
AnyEvent = Loaded | Report | LoadFailed | Accepted | Refused | Delta | Embedded | Finished | Failed

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[AnyCommand] = msgspec.msgpack.Decoder(AnyCommand)
_events_decoder = msgspec.msgpack.Decoder(list[AnyEvent])


def _frame(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def encode_command(command: AnyCommand) -> bytes:
    return _frame(_encoder.encode(command))


def encode_events(events: list[AnyEvent]) -> bytes:
    return _frame(_encoder.encode(events))


def decode_command(body: bytes) -> AnyCommand:
    return _command_decoder.decode(body)


def decode_events(body: bytes) -> list[AnyEvent]:
    return _events_decoder.decode(body)


class FrameReader:
    """Cuts a byte stream into frame bodies. Sans-I/O: feed bytes, get whole bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes.

        Raises:
            ValueError: a length above MAX_FRAME_BYTES; the stream is not ours or out of step.
        """
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
