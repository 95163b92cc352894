"""Every error a client can see: its HTTP status, OpenAI type and code, in one place.

Raise these anywhere; only `lmx.app` turns them into responses, and only `lmx.streaming` into
in-band error events. They know no HTTP framework.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final


class LMXError(Exception):
    """An error with a place in the OpenAI error object `{message, type, param, code}`."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    should_retry: ClassVar[bool] = True
    """False: trying again cannot help, though the status says so (`x-should-retry`, as OpenAI's
    clients understand it)."""

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


class InsufficientMemory(LMXError):
    """A load or a prompt does not fit below the memory limit; the message has every number."""

    status = 503
    type = "service_unavailable_error"
    code = "insufficient_memory"


class NeverFits(InsufficientMemory):
    """Not even with everything unloaded that may be."""

    should_retry = False


class ModelUnloaded(LMXError):
    """Somebody unloaded the model under the request, by force."""

    status = 503
    type = "service_unavailable_error"
    code = "model_unloaded"


UNLOADED: Final = "The model was unloaded."
INTERNAL: Final = "The server had an internal error."


class Conflict(LMXError):
    """Not in this state of the model; says what to do first."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Forbidden(LMXError):
    """The admin API is not for this peer, page or host name."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class Unauthorized(LMXError):
    status = 401
    type = "authentication_error"
    code = "invalid_admin_key"


class RunnerDied(LMXError):
    """The model's process ended under the request; the next request loads the model again."""

    status = 503
    type = "service_unavailable_error"
    code = "runner_died"


class ServerStopping(LMXError):
    status = 503
    type = "service_unavailable_error"
    code = "server_stopping"


class ModelCorrupt(LMXError):
    """Files are not what was verified, or not what the hub promised: names file and hashes."""

    code = "model_corrupt"


class RepoNotFound(LMXError):
    """The hub has no such repo or revision, or does not show it to this token."""

    status = 404
    type = "invalid_request_error"
    code = "repo_not_found"


class GatedRepo(LMXError):
    """The hub wants the repo's terms accepted by the owner of the token first."""

    status = 403
    type = "permission_error"
    code = "gated_repo"


class HubUnreachable(LMXError):
    """The hub does not answer, answers nonsense, or must not be asked."""

    status = 502
    code = "hub_unreachable"


class DownloadFailed(LMXError):
    """What has come so far is kept: the same download, started again, goes on there."""

    code = "download_failed"


class DiskFull(DownloadFailed):
    status = 507
    code = "disk_full"


class JobNotFound(LMXError):
    status = 404
    type = "invalid_request_error"
    code = "job_not_found"


class InstallFailed(LMXError):
    """The daemon cannot be installed, removed or started: names what is in the way."""


class Unreachable(LMXError):
    """No server answers the command line, or not to the end."""


class ConfigError(Exception):
    """The configuration or the command line cannot be used; the program ends with exit code 2."""


def _subclasses(cls: type[LMXError]) -> list[type[LMXError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in _subclasses(c))]


def by_name(name: str) -> type[LMXError]:
    """The error class called `name`: how an error crosses the pipe between runner and server."""
    return {cls.__name__: cls for cls in _subclasses(LMXError)}[name]
