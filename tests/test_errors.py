"""Errors: each one's place in HTTP and in the OpenAI error object."""

from __future__ import annotations

import inspect

import pytest

from lmx import errors
from lmx.errors import LMXError, by_name, error_body

TABLE = [
    (errors.LMXError, 500, "server_error", None),
    (errors.InvalidRequest, 400, "invalid_request_error", None),
    (errors.MissingParameter, 400, "invalid_request_error", "missing_required_parameter"),
    (errors.UnsupportedParameter, 400, "invalid_request_error", "unsupported_parameter"),
    (errors.ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (errors.ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    (errors.QueueFull, 429, "rate_limit_error", "queue_full"),
    (errors.ModelLoadFailed, 500, "server_error", "model_load_failed"),
    (errors.GenerationFailed, 500, "server_error", "generation_failed"),
    (errors.InsufficientMemory, 503, "service_unavailable_error", "insufficient_memory"),
    (errors.NeverFits, 503, "service_unavailable_error", "insufficient_memory"),
    (errors.ModelUnloaded, 503, "service_unavailable_error", "model_unloaded"),
    (errors.Conflict, 409, "invalid_request_error", "conflict"),
    (errors.Forbidden, 403, "permission_error", "forbidden"),
    (errors.Unauthorized, 401, "authentication_error", "invalid_admin_key"),
    (errors.ModelCorrupt, 500, "server_error", "model_corrupt"),
    (errors.RepoNotFound, 404, "invalid_request_error", "repo_not_found"),
    (errors.GatedRepo, 403, "permission_error", "gated_repo"),
    (errors.HubUnreachable, 502, "server_error", "hub_unreachable"),
    (errors.DownloadFailed, 500, "server_error", "download_failed"),
    (errors.DiskFull, 507, "server_error", "disk_full"),
    (errors.JobNotFound, 404, "invalid_request_error", "job_not_found"),
    (errors.RunnerDied, 503, "service_unavailable_error", "runner_died"),
    (errors.ServerStopping, 503, "service_unavailable_error", "server_stopping"),
    (errors.InstallFailed, 500, "server_error", None),
    (errors.Unreachable, 500, "server_error", None),
]


def test_table_is_complete() -> None:
    """Every error that a client can see is in the table above."""
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, LMXError)}
    assert {row[0] for row in TABLE} == classes


@pytest.mark.parametrize(("cls", "status", "type", "code"), TABLE, ids=lambda v: str(v)[-30:])
def test_error(cls: type[LMXError], status: int, type: str, code: str | None) -> None:
    """An error has the status, type and code that OpenAI's clients act on, and keeps its words."""
    error = cls("what is wrong", param="messages", retry_after=3)
    assert (error.status, error.retry_after, str(error)) == (status, 3, "what is wrong")
    assert error.to_body() == {
        "error": {"message": "what is wrong", "type": type, "param": "messages", "code": code}
    }


@pytest.mark.parametrize("cls", [row[0] for row in TABLE])
def test_by_name(cls: type[LMXError]) -> None:
    """An error class is found again by its name."""
    assert by_name(cls.__name__) is cls


def test_unknown_name() -> None:
    """A name that is no error class is refused, not guessed."""
    with pytest.raises(KeyError):
        by_name("ConfigError")


def test_error_body_of_no_class() -> None:
    """Errors without a class of ours, such as a 404 for a path, have the same shape."""
    assert error_body("no such path", type="invalid_request_error") == {
        "error": {
            "message": "no such path",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
