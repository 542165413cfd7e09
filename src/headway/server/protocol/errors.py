"""What goes wrong, in the shape of OpenAI's errors: ``{"error": {message, type, param, code}}``.

One table says what each of Headway's exceptions is in HTTP; whatever it does not list is our bug
and becomes a 500 that tells the client nothing more. Messages quote what the client sent, so they
are cut to a length that can be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final

from starlette.responses import Response

from headway.core.errors import (
    DuplicateRequest,
    EngineStopped,
    InvalidRequest,
    Overloaded,
    QueueFull,
    QueueTimeout,
    RequestTooLong,
    SlowReader,
    UnknownRequest,
    UnsupportedModel,
)
from headway.server.protocol.response_types import ErrorBody

__all__ = ["API_ERRORS", "INVALID_REQUEST", "ApiError", "quote", "to_api_error"]

#: OpenAI's type of every error that the client can mend.
INVALID_REQUEST: Final = "invalid_request_error"

_OVERLOADED: Final = "server_overloaded"
_SERVER_ERROR: Final = "server_error"

#: Status, type and code; of an exception's classes the most derived one counts.
API_ERRORS: Final[Mapping[type[Exception], tuple[int, str, str | None]]] = {
    InvalidRequest: (400, INVALID_REQUEST, None),
    RequestTooLong: (400, INVALID_REQUEST, "context_length_exceeded"),
    UnknownRequest: (404, INVALID_REQUEST, "request_not_found"),
    DuplicateRequest: (409, INVALID_REQUEST, "duplicate_request_id"),
    QueueFull: (503, _OVERLOADED, "queue_full"),
    QueueTimeout: (503, _OVERLOADED, "queue_timeout"),
    # The model lacks what this request needs, such as a chat template.
    UnsupportedModel: (400, INVALID_REQUEST, "unsupported_by_model"),
    EngineStopped: (503, _SERVER_ERROR, "engine_stopped"),
    SlowReader: (503, _SERVER_ERROR, "slow_reader"),
}

_MAX_MESSAGE: Final = 500
_MAX_QUOTE: Final = 80


class ApiError(Exception):
    """An error as the client sees it.

    Attributes:
        status: of the HTTP response.
        message: one line; names the value and the limit it broke.
        type: OpenAI's coarse class of errors.
        param: the field of the request that is to blame, as ``messages[0].content``.
        code: for programs.
        headers: of the HTTP response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _cut(message, _MAX_MESSAGE)
        self.type = type
        self.param = None if param is None else quote(param)
        self.code = code
        self.headers = headers

    def body(self) -> ErrorBody:
        """The error as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The error as a response; also an ASGI application."""
        # What is quoted may hold half a surrogate pair, which JSON can escape and UTF-8 not say.
        content = json.dumps(self.body(), ensure_ascii=False).encode(errors="backslashreplace")
        return Response(content, self.status, self.headers, "application/json")


def to_api_error(error: BaseException) -> ApiError:
    """What an exception is to a client, who learns nothing about an unexpected exception."""
    if isinstance(error, ApiError):
        return error
    for cls in type(error).__mro__:
        if cls in API_ERRORS:
            status, kind, code = API_ERRORS[cls]
            headers = None
            if isinstance(error, Overloaded):
                headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(status, str(error), kind, code=code, headers=headers)
    return ApiError(500, "the server has failed; its log says why", _SERVER_ERROR)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def quote(text: str) -> str:
    """What a client sent, cut to a length that can be read."""
    return _cut(text, _MAX_QUOTE)
