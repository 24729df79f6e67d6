"""Replicas behind Serve's handles: the engine as the app's client, the assistant as an engine's assistant.

What is asked changes nothing in a replica, so what was asked of one that ended is asked once more of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.serving.assistant import Assistant, Embedded, Passage, Route

_LOST = UserError("the replica with this request ended", fix="send it again", status=503, retry_after=1.0)


async def asked(method: Any, *args: Any, **kwargs: Any) -> Any:
    """The answer of a handle's method. :class:`UserError` (503) if the second replica ended as well."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    for _ in range(2):
        response = method.remote(*args, **kwargs)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayActorError:
            continue
        except DeploymentUnavailableError:
            break
    raise _LOST


class HandleClient:
    """The ingress's view of the replicas; see :class:`qwen_ray.serving.service.Service` for the envelopes."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._streams = handle, handle.options(stream=True)

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        try:
            return dict(await asked(self._handle.call, method, body))
        except UserError:
            return _lost()

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        for _ in range(2):
            chunks = self._streams.stream.remote(method, body)
            begun = False
            try:
                async for envelope in chunks:
                    begun = True
                    yield envelope
                return
            except (RayActorError, DeploymentUnavailableError):
                if begun:
                    break
            finally:
                chunks.cancel()  # nothing, if it has ended; else the client went away
        yield _lost()


class HandleAssistant(Assistant):
    """The assistant deployment, as replicas use it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def embed(self, texts: Sequence[str]) -> Embedded:
        found: Embedded = await self._ask("embed", texts)
        return found

    async def route(self, questions: Sequence[str]) -> list[Route]:
        found: list[Route] = await self._ask("route", questions)
        return found

    async def retrieve(
        self, questions: Sequence[str], domain: str | None = None, *, only: bool = False
    ) -> list[list[Passage]]:
        found: list[list[Passage]] = await self._ask("retrieve", questions, domain, only=only)
        return found

    async def describe(self) -> dict[str, Any]:
        return dict(await self._ask("describe"))

    async def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        value, error = await asked(self._handle.call, method, *args, **kwargs)
        if error is not None:
            raise error
        return value


def _lost() -> dict[str, Any]:
    message = f"{_LOST.what}; {_LOST.fix}"
    return {"error": {"status": _LOST.status, "message": message, "retry_after": _LOST.retry_after}}
