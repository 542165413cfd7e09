"""What goes wrong, in the shape of OpenAI's errors: ``{"error": {message, type, param, code}}``.

One table says what each of Headway's exceptions is in HTTP; whatever it does not list is our bug
and becomes a 500 that tells the client nothing more. Messages quote what the client sent, so they
are cut to a length that can be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
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
from headway.server.answers import ErrorBody

__all__ = ["INVALID_REQUEST", "ApiError", "add_error_handlers", "to_api_error"]

#: OpenAI's type of every error that the client can mend.
INVALID_REQUEST: Final = "invalid_request_error"

_OVERLOADED: Final = "server_overloaded"
_SERVER_ERROR: Final = "server_error"

#: Status, type and code; of an exception's classes the most derived one counts.
_TABLE: Final[Mapping[type[Exception], tuple[int, str, str | None]]] = {
    InvalidRequest: (400, INVALID_REQUEST, None),
    RequestTooLong: (400, INVALID_REQUEST, "context_length_exceeded"),
    UnknownRequest: (404, INVALID_REQUEST, "request_not_found"),
    DuplicateRequest: (409, INVALID_REQUEST, "duplicate_request_id"),
    QueueFull: (503, _OVERLOADED, "queue_full"),
    QueueTimeout: (503, _OVERLOADED, "queue_timeout"),
    # What the model lacks, a chat template for one, other requests can do without.
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
        self.param = None if param is None else _cut(param, _MAX_QUOTE)
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
    """What an exception is to a client; one that is unexpected says nothing about itself."""
    if isinstance(error, ApiError):
        return error
    for cls in type(error).__mro__:
        if cls in _TABLE:
            status, kind, code = _TABLE[cls]
            headers = None
            if isinstance(error, Overloaded):
                headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(status, str(error), kind, code=code, headers=headers)
    return ApiError(500, "the server has failed; its log says why", _SERVER_ERROR)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error, including those of the framework, in OpenAI's shape."""
    app.add_exception_handler(ApiError, _on_error)
    for cls in _TABLE:
        app.add_exception_handler(cls, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    # Goes on to the HTTP server, which logs it, after this has answered.
    app.add_exception_handler(Exception, _on_error)


async def _on_error(_: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    first = errors[0]
    source, *loc = first["loc"]
    param = None
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {loc[0]}"
    elif isinstance(error.body, bytes):  # of a type that is not parsed
        found = request.headers.get("content-type", "missing")
        message = f"Content-Type is {_cut(found, _MAX_QUOTE)}, must be application/json"
    else:
        param = _field(loc, error.body) if source == "body" else str(loc[-1])
        message = f"{param or 'the body'}: {first['msg']}"
        if first["type"] != "missing":
            message += f", got {_cut(repr(first['input']), _MAX_QUOTE)}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return ApiError(400, message, param=param).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {_cut(request.url.path, _MAX_QUOTE)}"
    match error.status_code, error.__cause__:
        case 404, _:
            message = f"there is no {where}"
        case 405, _:
            message = f"{where} is not allowed"
        case 400, UnicodeDecodeError() as cause:
            message = f"the body is not UTF-8 at byte {cause.start}"
        case 400, RecursionError():
            message = "the body is nested too deeply"
        case 400, ValueError() as cause:
            message = f"the body is not JSON: {cause}"
        case _:
            message = str(error.detail)
    code = HTTPStatus(error.status_code).name.lower()
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def _field(loc: Sequence[int | str], value: Any) -> str | None:
    """Where in the body it is, as ``messages[0].content``; None: the body itself.

    ``loc`` also names alternatives of a type, which are no fields, so it is followed along what
    was sent; a field that is missing is the last of it.
    """
    path = ""
    for number, part in enumerate(loc, 1):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path += f"[{part}]"
            value = value[part]
        elif isinstance(value, dict) and (part in value or number == len(loc)):
            path += f".{part}"
            value = value.get(part)
    return path.removeprefix(".") or None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
