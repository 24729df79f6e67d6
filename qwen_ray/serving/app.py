"""The HTTP side: OpenAI's routes, lm-eval's tokenizer routes and ``/v1/score``, over any service.

:func:`create_app` knows a service only by ``call`` and ``stream``: a Ray Serve handle in production, the
service itself in tests. Cross-origin requests are not allowed, and nothing here reads files.
"""

# No `from __future__ import annotations`: FastAPI resolves the annotations of the routes below, which are
# local functions.
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ray import __version__
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ScoreRequest,
    TokenizeRequest,
)

MAX_BODY_BYTES = 32 * 2**20


class Client(Protocol):
    """What the routes need; see :class:`qwen_ray.serving.service.Service` for the envelopes."""

    def call(self, method: str, body: Any = None) -> Awaitable[dict[str, Any]]: ...

    def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]: ...


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = {404: "not_found_error", 503: "overloaded_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = {404: "model_not_found"}.get(status)
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def create_app(client: Client) -> FastAPI:
    """The ASGI application over ``client``."""
    app = FastAPI(title="qwen-ray", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # With a union every member reports; the deepest location is the one that says what is wrong.
        first = max(error.errors(), key=lambda e: len(e["loc"]))
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = {"extra_forbidden": "unknown field, or one that this server does not implement"}.get(
            first["type"], first["msg"]
        )
        return error_response(400, f"{param or 'body'}: {message}", param)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the server failed on this request; its log says why")

    app.add_middleware(_BodyLimit)

    async def answer(method: str, body: Any = None) -> JSONResponse:
        envelope = await client.call(method, body)
        if (error := envelope.get("error")) is not None:
            return error_response(error["status"], error["message"])
        return JSONResponse(envelope["ok"])

    async def answer_or_stream(method: str, body: CompletionRequest | ChatRequest) -> Response:
        if not body.stream:
            return await answer(method, body)
        chunks = client.stream(method, body)
        # Wait for the first token, so that what fails before it is an HTTP error and not a broken stream.
        first = await anext(chunks, {"ok": None})
        if (error := first.get("error")) is not None:
            return error_response(error["status"], error["message"])
        return StreamingResponse(_events(first, chunks), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> Response:
        return await answer("health")

    @app.get("/v1/models")
    async def models() -> Response:
        return await answer("models")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return await answer_or_stream("completion", body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        return await answer_or_stream("chat", body)

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> Response:
        return await answer("score", body)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> Response:
        return await answer("embeddings", body)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return await answer("tokenize", body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        return await answer("detokenize", body)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return await answer("tokenizer_info")

    return app


class _BodyLimit:
    """Refuses bodies above :data:`MAX_BODY_BYTES`, whether their length is announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > MAX_BODY_BYTES:
            too_large = f"the request is larger than {MAX_BODY_BYTES >> 20} MiB; send it in parts"
            await error_response(413, too_large)(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, "the request is too large; send it in parts")
            return message

        await self._app(scope, counted, send)


async def _events(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events; an error after the first token is an event too, as OpenAI sends it."""
    try:
        if first["ok"] is not None:
            yield _event(first["ok"])
        async for envelope in chunks:
            if (error := envelope.get("error")) is not None:
                yield _event({"error": {"message": error["message"], "type": "server_error"}})
                return
            yield _event(envelope["ok"])
        yield "data: [DONE]\n\n"
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
