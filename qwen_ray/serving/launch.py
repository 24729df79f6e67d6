"""The server on Ray Serve: an HTTP ingress in front of replicas that each hold the model.

``serve run qwen_ray.serving.launch:build model=tiny`` and Serve config files use :func:`build`; the command
line uses :func:`start` and :func:`stop`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ray.serve import Application

APP = "qwen-ray"
_READY_SECONDS = 600.0  # loading a large model from a cold disk takes minutes
# Serve holds back requests above this per replica (5 by default); ours queues and batches them itself.
_ONGOING = 1000
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_REPLICA_LOST = {"error": {"status": 503, "message": "the replica with this request ended; send it again"}}
_ARGS: dict[str, Any] = {
    "model": None,
    "registry": None,
    "adapters": {},
    "replicas": 1,
    "cpus_per_replica": 0.5,
    "gpus_per_replica": 0.0,
    "threads": 1,
    "adapter_bytes": 2 * 2**30,
}


class EngineReplica:
    """A replica with the model; the methods are those of :class:`qwen_ray.serving.service.Service`."""

    def __init__(self, model: str, threads: int, settings: dict[str, Any]) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers.utils.logging import disable_progress_bar

        from qwen_ray.serving.service import Service

        disable_progress_bar()

        self._service = Service.load(model, threads=threads, **settings)

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        return await self._service.call(method, body)

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        async for envelope in self._service.stream(method, body):
            yield envelope

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._service.scheduler.alive:
            raise RuntimeError("the model's thread has ended")


class _HandleClient:
    """The ingress's view of the replicas."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._streams = handle, handle.options(stream=True)

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        from ray.exceptions import RayActorError

        try:
            return dict(await self._handle.call.remote(method, body))
        except RayActorError:
            return _REPLICA_LOST

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        from ray.exceptions import RayActorError

        chunks = self._streams.stream.remote(method, body)
        try:
            async for envelope in chunks:
                yield envelope
        except RayActorError:
            yield _REPLICA_LOST
        finally:
            chunks.cancel()  # nothing, if it has ended; else the client went away


class Ingress:
    """Routes HTTP to the replicas."""

    def __init__(self, engine: Any) -> None:
        self._client = _HandleClient(engine)

    def __serve_build_asgi_app__(self) -> Any:
        from qwen_ray.serving.app import create_app

        return create_app(self._client)


def build(args: Mapping[str, Any]) -> Application:
    """The Serve application. ``args``: ``model``, and optionally those of :func:`start` by name.

    Raises :class:`UserError` for an unknown argument, model or folder before anything is deployed.
    """
    from ray import serve

    from qwen_ray import models
    from qwen_ray.serving.adapters import checked_folder

    for key in args:
        if key not in _ARGS:
            raise UserError(f"unknown argument '{key}'", where="serve", fix=did_you_mean(key, _ARGS))
    values = _ARGS | dict(args)
    if not values["model"]:
        raise UserError("no model is named", where="serve", fix="model: tiny")
    ref = models.resolve(str(values["model"]))
    adapters = {
        name: checked_folder(name, Path(folder)) for name, folder in (values["adapters"] or {}).items()
    }
    registry = values["registry"]
    settings = {
        "registry": None if registry is None else Path(registry).expanduser().resolve(),
        "adapters": adapters,
        "adapter_bytes": int(values["adapter_bytes"]),
    }
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=int(values["replicas"]),
        max_ongoing_requests=_ONGOING,
        logging_config=_QUIET,
        ray_actor_options={
            "num_cpus": float(values["cpus_per_replica"]),
            "num_gpus": float(values["gpus_per_replica"]),
        },
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=_ONGOING,
        logging_config=_QUIET,
        ray_actor_options={"num_cpus": 0},
    )
    # An alias or hub id is passed on as it is; a folder by its full path, as replicas start elsewhere.
    name = ref.location if Path(str(values["model"])).expanduser().is_dir() else str(values["model"])
    return ingress.bind(engine.bind(name, int(values["threads"]), settings))


def start(
    model: str,
    *,
    registry: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    cpus_per_replica: float = 0.5,
    gpus_per_replica: float = 0.0,
    threads: int = 1,
) -> str:
    """Serve ``model`` on the connected Ray cluster; returns the base URL once ``/health`` answers.

    ``registry``: adapters by name and version. ``adapters``: PEFT folders by name, without versions.
    ``cpus_per_replica``, ``gpus_per_replica``: reserved in Ray; a replica that has a GPU computes on it.
    ``threads``: torch threads of each replica.
    ``port`` 0 takes a free one. Raises :class:`UserError` if the port is taken or the model is unknown.
    """
    from ray import serve

    app = build(
        {
            "model": model,
            "registry": registry,
            "adapters": dict(adapters or {}),
            "replicas": replicas,
            "cpus_per_replica": cpus_per_replica,
            "gpus_per_replica": gpus_per_replica,
            "threads": threads,
        }
    )
    port = free_port(host, port)
    if serve.status().proxies:
        raise UserError("a server already runs on this Ray cluster", fix="stop it first (`serve shutdown`)")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
    try:
        serve.run(app, name=APP, route_prefix="/")
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        _wait_until_healthy(url)
    except BaseException:
        stop()
        raise
    return url


def stop() -> None:
    """Take the server down; the Ray cluster stays."""
    from ray import serve

    serve.shutdown()


def free_port(host: str, port: int) -> int:
    """Check that ``port`` can be listened on and return it; 0 finds a free one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as e:
            raise UserError(
                f"port {port} on {host} cannot be used ({getattr(e, 'strerror', None) or e})",
                fix=f"stop what listens there, or choose another with --port (such as {port % 65000 + 1})",
            ) from None
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str) -> None:
    import httpx

    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            reply = httpx.get(f"{url}/health", timeout=10)
            if reply.is_success:
                return
            reason = f"HTTP {reply.status_code}"
        except httpx.TransportError as e:
            reason = type(e).__name__
        if time.monotonic() > deadline:
            raise UserError(
                f"the server did not come up ({reason})", where=url, fix="see the Serve log of the replica"
            )
        time.sleep(0.1)
