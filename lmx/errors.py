"""Every error a client can see: its HTTP status, OpenAI type and code, in one place.

Raise these anywhere; only `lmx.app` turns them into responses, and only `lmx.streaming` into
in-band error events. They know no HTTP framework.
"""

from __future__ import annotations

from typing import Any, ClassVar


class LMXError(Exception):
    """An error with a place in the OpenAI error object `{message, type, param, code}`."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        """Seconds after which trying again makes sense; becomes the Retry-After header."""

    def to_body(self) -> dict[str, Any]:
        return error_body(self.message, type=self.type, param=self.param, code=self.code)


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The OpenAI error object; shape from https://platform.openai.com/docs/guides/error-codes."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


class InvalidRequest(LMXError):
    status = 400
    type = "invalid_request_error"


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class UnsupportedParameter(InvalidRequest):
    """Correct, but not built: refused, because an answer that ignores it would be wrong."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(LMXError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class QueueFull(LMXError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class ModelLoadFailed(LMXError):
    """The model's files are there but do not load: names the file and the reason."""

    code = "model_load_failed"


class GenerationFailed(LMXError):
    """The engine failed while it worked on this request; other requests go on."""

    code = "generation_failed"


class RunnerDied(LMXError):
    """The model's process ended under the request; the next request loads the model again."""

    status = 503
    type = "service_unavailable_error"
    code = "runner_died"


class ServerStopping(LMXError):
    status = 503
    type = "service_unavailable_error"
    code = "server_stopping"


class ConfigError(Exception):
    """The configuration or the command line cannot be used; the program ends with exit code 2."""


def _subclasses(cls: type[LMXError]) -> list[type[LMXError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in _subclasses(c))]


def by_name(name: str) -> type[LMXError]:
    """The error class called `name`: how an error crosses the pipe between runner and server."""
    return {cls.__name__: cls for cls in _subclasses(LMXError)}[name]
