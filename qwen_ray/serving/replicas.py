"""What runs in Serve's replicas: the ingress, the engine and the assistant."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.serving.handles import HandleAssistant, HandleClient
from qwen_ray.serving.heap import trim
from qwen_ray.serving.settings import ServeSettings

if TYPE_CHECKING:
    from qwen_ray.serving.service import Service


class _Replica:
    def check_health(self) -> None:
        """Called by Serve every 10 s, which replaces a replica that raises."""
        trim()


class EngineReplica(_Replica):
    """A replica with the model; the methods are those of :class:`qwen_ray.serving.service.Service`."""

    def __init__(self, settings: ServeSettings, assistant: Any = None) -> None:
        """``assistant``: handle of an :class:`AssistantReplica`."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from ray import serve
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._service = _service(settings, assistant)
        self._service.store.pin(settings.pinned)

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        """The service's envelope, with facts of this replica in it."""
        return await self._service.call(method, body) | {"replica": self._facts()}

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """The service's envelopes, with facts of this replica in the first."""
        facts: dict[str, Any] = {"replica": self._facts()}
        async for envelope in self._service.stream(method, body):
            yield envelope | facts
            facts = {}

    def check_health(self) -> None:
        super().check_health()
        if not self._service.scheduler.alive:
            raise RuntimeError("the model's thread has ended")

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve, which shows it to its routers; see :mod:`qwen_ray.serving.affinity`."""
        return {"adapters": sorted({name.partition("@")[0] for name in self._adapters()})}

    def _facts(self) -> dict[str, Any]:
        return {"id": self._id, "load": self._service.scheduler.load, "adapters": self._adapters()}

    def _adapters(self) -> list[str]:
        return [str(used.name) for used in self._service.store.resident]


class AssistantReplica(_Replica):
    """Router, knowledge bases and their embedder, shared by all replicas of the engine."""

    def __init__(self, settings: ServeSettings) -> None:
        from qwen_ray.serving.assistants import LocalAssistant

        self._assistant = LocalAssistant.load(
            embedder=settings.embedder,
            router=str(settings.router) if settings.router else None,
            knowledge=settings.knowledge,
            passages=settings.passages,
        )

    async def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, UserError | None]:
        """What a method of :class:`~qwen_ray.serving.assistant.Assistant` returns, or its refusal."""
        try:
            return await getattr(self._assistant, method)(*args, **kwargs), None
        except UserError as e:
            return None, e


class Ingress(_Replica):
    """Routes HTTP to the replicas."""

    def __init__(self, engine: Any, settings: ServeSettings) -> None:
        self._client, self._settings = HandleClient(engine), settings

    def __serve_build_asgi_app__(self) -> Any:
        from qwen_ray.serving.app import create_app
        from qwen_ray.serving.auth import KeyFile

        settings = self._settings
        keys = KeyFile(settings.keys) if settings.keys else None
        return create_app(
            self._client, keys=keys, limits=settings.limits, cors=settings.cors, hosts=settings.hosts
        )


def _service(settings: ServeSettings, assistant: Any) -> Service:
    from qwen_ray import models
    from qwen_ray.serving.service import Service

    ref = models.resolve(settings.model)
    engine: Any
    if uses_vllm(settings):
        from qwen_ray.serving.engines.vllm import VllmEngine

        engine = VllmEngine.load(
            ref,
            gpus=settings.gpus_per_replica,
            threads=settings.threads,
            max_adapters=settings.max_adapters,
            max_rank=settings.max_rank,
        )
    else:
        from qwen_ray.serving.engines.torch import TorchEngine

        engine = TorchEngine.load(ref, threads=settings.threads, prefix_bytes=settings.prefix_bytes)
    return Service(
        engine,
        registry=settings.registry,
        adapters=settings.adapters,
        adapter_bytes=settings.adapter_bytes,
        assistant=None if assistant is None else HandleAssistant(assistant),
        notes_template=settings.notes_template,
        max_waiting_tokens=settings.max_waiting_tokens,
    )


def uses_vllm(settings: ServeSettings) -> bool:
    """Whether vLLM is the engine. ``auto`` is decided where the replica runs, by what is installed there."""
    from importlib.util import find_spec

    if settings.engine == "auto":
        return bool(settings.gpus_per_replica) and find_spec("vllm") is not None
    return settings.engine == "vllm"
