"""Every exception on its way to a client becomes an error as OpenAI's, the framework's too."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from headway.server.protocol.errors import API_ERRORS, ApiError, quote, to_api_error

__all__ = ["add_error_handlers"]


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error, including those of the framework, in OpenAI's shape."""
    app.add_exception_handler(ApiError, _on_error)
    for cls in API_ERRORS:
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
        message = f"Content-Type is {quote(found)}, must be application/json"
    else:
        param = _field(loc, error.body) if source == "body" else str(loc[-1])
        message = f"{param or 'the body'}: {first['msg']}"
        if first["type"] != "missing":
            message += f", got {quote(repr(first['input']))}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return ApiError(400, message, param=param).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {quote(request.url.path)}"
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
