"""The description at ``/openapi.json``: what FastAPI derives, with the errors and the key that are ours."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from qwen_ray.serving.gate import OPEN
from qwen_ray.serving.http_errors import ErrorResponse

Responses = dict[int | str, dict[str, Any]]


def _errors(**described: str) -> Responses:
    return {
        int(status[1:]): {"model": ErrorResponse, "description": text} for status, text in described.items()
    }


EVERYWHERE = _errors(
    _403="Not a host name by which this server is asked",
    _500="The server failed; its log says why",
    _503="The replica ended, or what it needs is not to be had now; send the request again",
    _504="The request took longer than the server allows",
)
GUARDED = EVERYWHERE | _errors(
    _401="No API key, or not a valid one",
    _429="Too many requests; Retry-After says in how many seconds there may be room",
)
TAKES_BODY = GUARDED | _errors(
    _400="Not valid",
    _408="The body took too long to arrive",
    _413="More than the server takes at once; send it in parts",
    _415="The body is not application/json",
)
NO_MODEL = _errors(_404="No such model")
FOR_A_MODEL = (
    TAKES_BODY | NO_MODEL | _errors(_409="The adapter cannot be served: damaged, or of another base model")
)
STREAMED: Responses = FOR_A_MODEL | {
    200: {
        "description": "The answer; with stream, in server-sent events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


def describe(app: FastAPI, *, secured: bool) -> None:
    """Make ``app.openapi()`` true. ``secured``: whether routes ask for a key."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = derive()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
                if secured and path not in OPEN:
                    operation["security"] = [{"key": []}]
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if secured:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
