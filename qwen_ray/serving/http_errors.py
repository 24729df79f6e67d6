"""Errors over HTTP, all in OpenAI's shape."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qwen_ray.errors import UserError

_TYPES = {
    401: "authentication_error",  # as litellm expects it; the clients of OpenAI go by the status
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
MODEL_NOT_FOUND = "model_not_found"


class ErrorDetail(BaseModel):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code or _CODES.get(status),
        }
    }


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: float | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error. ``retry_after``: seconds, told as a whole number of at least 1."""
    told = dict(headers or {})
    if retry_after is not None:
        told["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if status == 401:
        told["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param=param, code=code), status, told)


def user_error_response(error: UserError) -> JSONResponse:
    """What a :class:`UserError` says, without a file's name."""
    message = error.what + (f" ({error.fix})" if error.fix else "")
    return error_response(error.status, message, retry_after=error.retry_after)


def add_error_handlers(app: FastAPI) -> None:
    """Give what FastAPI and Starlette refuse, and what fails, the same shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # With a union every member reports; the deepest location is the one that says what is wrong.
        first = max(error.errors(), key=lambda e: len(e["loc"]))
        param = ".".join(filter(_named, map(str, first["loc"][1:]))) or None
        message = {"extra_forbidden": "unknown field, or one that this server does not implement"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        return error_response(400, f"{param or 'body'}: {message}", param=param)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        return user_error_response(error)

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the server failed on this request; its log says why")


async def json_only(request: Request) -> None:
    """A route's dependency: 415 for other content types, which FastAPI leaves unread. A page elsewhere may
    send those without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind.startswith("application/") and kind.endswith(("/json", "+json"))):
        raise HTTPException(415, "send JSON, with the header 'Content-Type: application/json'")


def _named(part: str) -> bool:
    """Whether a part of a location is a field or an index, and not pydantic's name of a union's member."""
    return part != "str" and not part.startswith("constrained-") and "[" not in part
