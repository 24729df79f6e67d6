"""The HTTP side, over any service: OpenAI's routes, lm-eval's tokenizer routes, ``/v1/score``, ``/metrics``.

:func:`create_app` knows a service only by ``call`` and ``stream``: a Ray Serve handle in production, the
service itself in tests. Nothing here reads files but the keys'.
"""

# No `from __future__ import annotations`: FastAPI resolves the annotations of the routes below, which are
# local functions.
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Path, Request
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from qwen_ray import __version__
from qwen_ray.serving import openapi
from qwen_ray.serving.auth import KeyFile, check_origins
from qwen_ray.serving.gate import METRICS, RECORD, Gate, Record
from qwen_ray.serving.hosts import check_hosts
from qwen_ray.serving.http_errors import (
    MODEL_NOT_FOUND,
    add_error_handlers,
    error_body,
    error_response,
    json_only,
)
from qwen_ray.serving.limits import Admission, Limits
from qwen_ray.serving.metrics import CONTENT_TYPE, Metrics
from qwen_ray.serving.playground import add_playground
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ModelRequest,
    ScoreRequest,
    TokenizeRequest,
)
from qwen_ray.serving.usage import failed, prompts, usages

_METRICS_SECONDS = 1.0  # waited for a replica's own figures

Envelope = dict[str, Any]


class Client(Protocol):
    """What the routes need; see :class:`qwen_ray.serving.service.Service` for the envelopes. A call that is
    cancelled and a stream that is closed stop the work for them."""

    def call(self, method: str, body: Any = None) -> Awaitable[Envelope]: ...

    def stream(self, method: str, body: Any) -> AsyncIterator[Envelope]: ...


def create_app(
    client: Client,
    *,
    keys: KeyFile | None = None,
    limits: Limits | None = None,
    cors: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """The ASGI application over ``client``.

    ``keys``: who may use it; None: everybody (see :func:`qwen_ray.serving.auth.check_exposure`). ``cors``:
    origins, such as ``https://notes.example``, whose pages may use it. ``hosts``: names under which it may
    be asked; none: any. :class:`UserError` for what is not an origin, or not a host's name.
    """
    check_origins(cors)
    check_hosts(hosts)
    limits = limits or Limits()
    admission = Admission(limits)
    metrics = Metrics(in_flight=lambda: admission.running)
    routes = _Routes(client, limits, metrics)
    app = FastAPI(
        title="qwen-ray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    add_error_handlers(app)
    _add_routes(app, routes)
    add_playground(app)
    openapi.describe(app, secured=keys is not None)
    app.add_middleware(
        Gate,
        keys=keys,
        limits=limits,
        admission=admission,
        metrics=metrics,
        routes={getattr(route, "path", "") for route in app.routes},
        hosts=hosts,
    )
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


class _Routes:
    """Requests to the client's envelopes, and these to responses."""

    def __init__(self, client: Client, limits: Limits, metrics: Metrics) -> None:
        self._client, self._limits, self._metrics = client, limits, metrics

    async def answer(self, request: Request, method: str, body: BaseModel | None = None) -> Response:
        """The answer to one request."""
        self._check(body)
        envelope = await self._in_time(self._client.call(method, body), self._until())
        self._metrics.heard(envelope)
        record: Record = request.scope[RECORD]
        if "error" in envelope:
            return self._failure(envelope["error"], record)
        record.answered, record.prompts = usages(body, envelope["ok"]), prompts(envelope["ok"])
        return JSONResponse(envelope["ok"])

    async def answer_or_stream(
        self, request: Request, method: str, body: CompletionRequest | ChatRequest
    ) -> Response:
        if not body.stream:
            return await self.answer(request, method, body)
        self._check(body)
        told = body.stream_options.include_usage
        body.stream_options.include_usage = True  # for metrics and the key's limits
        chunks, until = self._client.stream(method, body), self._until()
        # Wait for the first token, so that what fails before it is an HTTP error and not a broken stream.
        first = await self._in_time(anext(chunks, None), until)
        record: Record = request.scope[RECORD]
        if first is not None and "error" in first:
            return self._failure(first["error"], record)
        self._metrics.first_token(record.route, time.monotonic() - record.started)
        events = self._events(record, body, first, chunks, until=until, tell_usage=told)
        return StreamingResponse(events, media_type="text/event-stream")

    async def metrics(self) -> bytes:
        """Prometheus's text, after asking a replica how it is: one that is idle says nothing by itself."""
        with contextlib.suppress(Exception):  # figures are wanted most when replicas fail
            async with asyncio.timeout(_METRICS_SECONDS):
                self._metrics.heard(await self._client.call("health"))
        return self._metrics.text()

    def _check(self, body: BaseModel | None) -> None:
        if body is not None:
            self._limits.check(body)

    def _until(self) -> float:
        return asyncio.get_running_loop().time() + self._limits.timeout_seconds

    async def _in_time(self, coming: Awaitable[Any], until: float) -> Any:
        """The envelope that is coming, or that of a time-out."""
        try:
            async with asyncio.timeout_at(until):
                return await coming
        except TimeoutError:
            seconds = self._limits.timeout_seconds
            return {"error": {"status": 504, "message": f"the request took longer than {seconds:g} s"}}

    def _failure(self, error: dict[str, Any], record: Record) -> Response:
        status = error["status"]
        record.answered, record.prompts = failed(error), prompts(error)
        if status == 429:
            self._metrics.rejected("engine")
        code = MODEL_NOT_FOUND if status == 404 else None
        return error_response(status, error["message"], code=code, retry_after=error.get("retry_after"))

    async def _events(
        self,
        record: Record,
        body: BaseModel,
        first: Envelope | None,
        chunks: AsyncIterator[Envelope],
        *,
        until: float,
        tell_usage: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first token is an event too, as OpenAI sends it."""
        envelope, sent = first, 0
        answer: Envelope = {}
        try:
            while envelope is not None:
                self._metrics.heard(envelope)
                if (error := envelope.get("error")) is not None:
                    record.status = error["status"]
                    yield _event(error_body(error["status"], error["message"]))
                    return
                chunk = envelope["ok"]
                answer |= {key: chunk[key] for key in ("qwen_ray", "usage") if key in chunk}
                if tell_usage or chunk["choices"]:
                    sent += 1
                    yield _event(chunk)
                envelope = await self._in_time(anext(chunks, None), until)
            yield "data: [DONE]\n\n"
        finally:
            # A client that leaves early has used what it was sent: about a token a chunk.
            record.answered = usages(body, {"usage": {"completion_tokens": sent}} | answer)
            record.prompts = prompts(answer)
            if (close := getattr(chunks, "aclose", None)) is not None:
                await close()


def _add_routes(app: FastAPI, routes: _Routes) -> None:
    takes_json = [Depends(json_only)]

    @app.get("/health", responses=openapi.EVERYWHERE)
    async def health(request: Request) -> Response:
        return await routes.answer(request, "health")

    @app.get(METRICS, response_class=PlainTextResponse, responses=openapi.GUARDED)
    async def metrics() -> Response:
        return Response(await routes.metrics(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", responses=openapi.GUARDED)
    async def models(request: Request) -> Response:
        return await routes.answer(request, "models")

    # Any path: an id holds ':', '@' and '+', and one with '/' is just unknown.
    @app.get("/v1/models/{model:path}", responses=openapi.GUARDED | openapi.NO_MODEL)
    async def model(request: Request, model: Annotated[str, Path(max_length=200)]) -> Response:
        return await routes.answer(request, "model", ModelRequest(model=model))

    @app.post("/v1/completions", responses=openapi.STREAMED, dependencies=takes_json)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await routes.answer_or_stream(request, "completion", body)

    @app.post("/v1/chat/completions", responses=openapi.STREAMED, dependencies=takes_json)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await routes.answer_or_stream(request, "chat", body)

    @app.post("/v1/score", responses=openapi.FOR_A_MODEL, dependencies=takes_json)
    async def score(request: Request, body: ScoreRequest) -> Response:
        return await routes.answer(request, "score", body)

    @app.post("/v1/embeddings", responses=openapi.FOR_A_MODEL, dependencies=takes_json)
    async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
        return await routes.answer(request, "embeddings", body)

    @app.post("/tokenize", responses=openapi.TAKES_BODY, dependencies=takes_json)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        return await routes.answer(request, "tokenize", body)

    @app.post("/detokenize", responses=openapi.TAKES_BODY, dependencies=takes_json)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        return await routes.answer(request, "detokenize", body)

    @app.get("/tokenizer_info", responses=openapi.GUARDED)
    async def tokenizer_info(request: Request) -> Response:
        return await routes.answer(request, "tokenizer_info")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
