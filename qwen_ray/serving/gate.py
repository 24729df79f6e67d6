"""What stands before every route: the host's name, the key, the limits, the body's size, the counting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ray.errors import UserError
from qwen_ray.serving.auth import KeyFile
from qwen_ray.serving.hosts import allowed
from qwen_ray.serving.http_errors import error_response, user_error_response
from qwen_ray.serving.limits import Admission, Limits, Rates
from qwen_ray.serving.metrics import Metrics
from qwen_ray.serving.usage import NONE, UNKNOWN, Usage

OPEN = ("/", "/health")
"""Routes that need no key and are never too many; with them the page's parts, below :data:`PAGE`."""
PAGE = "/page/"
METRICS = "/metrics"
_OF_MODELS = ("/v1/completions", "/v1/chat/completions", "/v1/score")
_EVERYBODY = "everybody"  # whose account requests without a key share
_OTHER_HOST = (
    "this server is not asked by that host name; if it should be, add the name to its setting `hosts`"
)
_CLIENT_GONE = 499  # as proxies log it; nobody reads it


@dataclass
class Record:
    """What is learnt of a request while it is answered. In its ASGI scope as :data:`RECORD`."""

    route: str
    started: float
    status: int | None = None
    answered: list[Usage] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """What the response says of each prompt, an error's too if that much was known."""


RECORD = "qwen_ray.record"


class Gate:
    """ASGI middleware over the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyFile | None,
        limits: Limits,
        admission: Admission,
        metrics: Metrics,
        routes: Collection[str],
        hosts: Sequence[str] = (),
    ) -> None:
        """``routes``: the paths that metrics may name. ``hosts``: see :mod:`qwen_ray.serving.hosts`; none:
        any name will do."""
        self._app, self._keys, self._limits, self._routes = app, keys, limits, routes
        self._admission, self._metrics, self._hosts = admission, metrics, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # As Starlette finds the route: below the prefix that the application is served under.
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        record = scope[RECORD] = Record(self._label(path), time.monotonic())

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and record.status is None:
                record.status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, watched, record)
        except asyncio.CancelledError:
            record.status = record.status or _CLIENT_GONE
            raise
        finally:
            seconds = time.monotonic() - record.started
            answered = record.answered or [Usage(UNKNOWN if record.route in _OF_MODELS else NONE)]
            self._metrics.finished(
                record.route, record.status or 500, seconds, answered, prompts=record.prompts
            )

    async def _admit(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        """Answer the request, or say why not."""
        headers = Headers(scope=scope)
        if self._hosts and not allowed(headers.get("host"), self._hosts):
            await error_response(403, _OTHER_HOST)(scope, receive, send)
            return
        if record.route in OPEN or record.route == PAGE:
            await self._app(scope, receive, send)
            return
        name, rates = _EVERYBODY, Rates()
        if self._keys is not None:
            try:
                key = self._keys.check(headers.get("authorization"))
            except UserError as e:
                await user_error_response(e)(scope, receive, send)
                return
            name, rates = key.name, key.limits
        if record.route == METRICS:  # readable when nothing else gets in any more
            await self._app(scope, receive, send)
            return
        if (refusal := self._admission.enter(name, rates)) is not None:
            self._metrics.rejected(refusal.reason)
            response = error_response(429, refusal.message, retry_after=refusal.retry_after)
            await response(scope, receive, send)
            return
        try:
            await self._within(headers, scope, receive, send)
        finally:
            self._admission.leave(name, sum(usage.total for usage in record.answered))

    async def _within(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on unless its body is too large or too slow, its length announced or not."""
        most = self._limits.body_bytes
        too_large = f"the request is larger than {most} bytes; send it in parts"
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > most:
            await error_response(413, too_large)(scope, receive, send)
            return
        until = asyncio.get_running_loop().time() + self._limits.timeout_seconds
        read, whole = 0, False

        async def counted() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is the news that the client went away
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request took too long to arrive") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > most:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)

    def _label(self, path: str) -> str:
        if path.startswith(PAGE):
            return PAGE
        return path if path in self._routes else "other"
