"""Errors as JSON, in the shape of OpenAI's API on every route.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula import errors

# error -> status and code; the first match counts. Statuses: RFC 9110, RFC 4918 (507). Codes: OpenAI's where it exists
_TABLE: tuple[tuple[type[errors.EngineError], int, str], ...] = (
    (errors.ContextOverflow, 400, "context_length_exceeded"),
    (errors.SessionNotFound, 404, "session_not_found"),
    (errors.SessionExists, 409, "session_exists"),
    (errors.InvalidArgument, 400, "invalid_value"),
    (errors.SessionBusy, 409, "session_busy"),
    (errors.EngineBusy, 503, "engine_busy"),
    (errors.ModelNotFound, 404, "model_not_found"),
    (errors.TemplateError, 400, "template_error"),
    (errors.Unsupported, 400, "unsupported"),
    (errors.OutOfMemory, 503, "out_of_memory"),
    (errors.DeviceError, 500, "device_failed"),
    (errors.StoreFull, 507, "store_full"),
    (errors.StoreReadOnly, 507, "store_read_only"),
    (errors.StoreCorrupt, 500, "store_corrupt"),
    (errors.StoreError, 500, "store_error"),
    (errors.NonFinite, 500, "model_damaged"),
    (errors.EngineError, 500, "engine_error"),
)
RETRY_AFTER_S = 2  # when the queue is full: about the time an answer takes


class ApiError(Exception):
    """Fails a request with a status and a JSON error.

    Attributes:
        status: HTTP status.
        code: for programs.
        message: for people: what is wrong, where, and what to do.
        param: the field at fault; None if no field is.
        retry_after: seconds until a retry may work; None: no header.
        is_final: whether clients must not retry by themselves, as they do after some statuses.
        details: further fields of the error object.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        is_final: bool = False,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after, self.is_final, self.details = retry_after, is_final, details

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 404:
            return "not_found_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        about = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": about | self.details}

    def headers(self) -> Mapping[str, str]:
        """Headers of the response."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.is_final:
            headers["x-should-retry"] = "false"  # which OpenAI's and Anthropic's clients follow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def of_engine(error: errors.EngineError) -> ApiError:
    """Converts an error of the engine to an ApiError."""
    status, code = next((status, code) for kind, status, code in _TABLE if isinstance(error, kind))
    details: dict[str, Any] = {}
    if isinstance(error, errors.ContextOverflow):
        details = {"n_tokens": error.n_tokens, "context": error.context}
    param = None
    if code == "invalid_value":  # the messages of settings begin with the setting's name
        first = error.message.split(" ", 1)[0]
        param = first if (first.isidentifier() and "_" in first) or first in _PLAIN_NAMES else None
    message = error.message
    if isinstance(error, (errors.StoreError, errors.ModelFileError)) and not isinstance(error, errors.TemplateError):
        message = f"{code.replace('_', ' ')}; the server's log says where"  # clients do not see paths
    return ApiError(status, code, message, param=param, retry_after=RETRY_AFTER_S if status == 503 else None, **details)


_PLAIN_NAMES = frozenset({"temperature", "seed", "stop", "chain", "n", "position", "title", "timeout"})


def refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 about a field."""
    return ApiError(400, code, f"{param} {message}", param=param)


def not_found(what: str, name: str) -> ApiError:
    """404 for a session, stream or model that does not exist or belongs to another key."""
    return ApiError(404, f"{what}_not_found", f"there is no {what} {name[:128]!r}")


def stopped() -> ApiError:
    """503 for an answer that the stop of the server ended; another try may find it running again."""
    message = "the server was stopped before the answer was complete"
    return ApiError(503, "stopped", message, retry_after=RETRY_AFTER_S)


def ended_early(reason: str | None) -> ApiError | None:
    """The error for an answer's finish reason; None if the answer is complete, or as long as it was asked to be."""
    if reason == "timeout":
        message = "the answer took longer than the server's answer_s; ask for fewer tokens"
        return ApiError(504, "timeout", message, is_final=True)
    if reason == "cancelled":
        message = "the answer was stopped, or its session deleted, before it was complete"
        return ApiError(409, "cancelled", message, is_final=True)
    return None


INTERNAL = ApiError(500, "internal_error", "the server failed; its log has the cause under this request's id")
