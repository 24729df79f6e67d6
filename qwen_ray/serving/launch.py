"""The server on Ray Serve: an HTTP ingress in front of replicas that each hold the model.

``serve run qwen_ray.serving.launch:build model=tiny`` and Serve config files use :func:`build`; the command
line uses :func:`start` and :func:`stop`.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.serving.hosts import LOCAL, check_hosts
from qwen_ray.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

APP = "qwen-ray"
_READY_SECONDS = 600.0  # loading a large model from a cold disk takes minutes
# Serve holds back requests above this per replica (5 by default); ours queues and batches them itself.
_ONGOING = 1000
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_ROUTING = {
    "request_router_class": "qwen_ray.serving.affinity:AdapterRouter",
    "request_routing_stats_period_s": 2.0,  # a router knows of a loaded adapter after at most so long
}


def build(args: Mapping[str, Any]) -> Application:
    """The Serve application. ``args``: those of :class:`~qwen_ray.serving.settings.ServeSettings`; only the
    model is needed.

    Raises :class:`UserError` for an unknown argument, model, adapter or file before anything is deployed.
    """
    from ray import serve

    from qwen_ray.serving import replicas

    settings = _checked(ServeSettings.of(args))
    common = {"max_ongoing_requests": _ONGOING, "logging_config": _QUIET}
    resources = {"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica}
    scaling = settings.autoscaling
    engine = serve.deployment(
        replicas.EngineReplica,
        name="engine",
        num_replicas=settings.replicas if scaling is None else None,
        autoscaling_config=None if scaling is None else scaling.model_dump(),
        ray_actor_options=resources,
        request_router_config=_ROUTING,
        **common,
    )
    ingress = serve.deployment(
        serve.ingress()(replicas.Ingress), name="ingress", ray_actor_options={"num_cpus": 0}, **common
    )
    assistant = None
    if settings.assisted:
        assistant = serve.deployment(
            replicas.AssistantReplica, name="assistant", ray_actor_options={"num_cpus": 0}, **common
        ).bind(settings)
    return ingress.bind(engine.bind(settings, assistant), settings)


def _checked(settings: ServeSettings) -> ServeSettings:
    """With what replicas will look for looked for here, as far as this machine can tell."""
    from qwen_ray import models
    from qwen_ray.registry import Registry
    from qwen_ray.serving.auth import KeyFile, check_origins
    from qwen_ray.serving.catalog import Catalog
    from qwen_ray.serving.model_id import parse

    ref = models.resolve(settings.model)
    catalog = Catalog(
        registry=Registry(settings.registry) if settings.registry else None, folders=settings.adapters
    )
    for name in settings.pinned:
        model = parse(f"{ref.id}:{name}")
        try:
            catalog.look_up(str(model.adapter), model.at)
        except UserError as e:
            if e.status != 503:  # a registry that this machine does not have, or not now
                raise UserError(e.what, where="pinned", fix=e.fix) from None
    if settings.keys:
        KeyFile(settings.keys)
    check_origins(settings.cors)
    check_hosts(settings.hosts)
    if settings.router:
        from qwen_ray.routing.router import Router

        Router.load(settings.router)
    # An alias or hub id is passed on as it is; a folder by its full path, as replicas start elsewhere.
    folder = Path(settings.model).expanduser().is_dir()
    return settings.model_copy(
        update={"model": ref.location if folder else settings.model, "adapters": catalog.folders}
    )


def start(model: str, *, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> str:
    """Serve ``model`` on the connected Ray cluster; returns the base URL once ``/health`` answers.

    ``settings``: the other arguments of :func:`build`. ``port`` 0 takes a free one. Raises
    :class:`UserError` if the port is taken or a setting is wrong.
    """
    from ray import serve

    from qwen_ray.serving.auth import is_loopback

    if is_loopback(host) and not settings.get("keys"):
        settings = {"hosts": sorted({*LOCAL, _in_url(host)}), **settings}
    app = build({"model": model, **settings})
    port = free_port(host, port)
    if serve.status().proxies:
        raise UserError("a server already runs on this Ray cluster", fix="stop it first (`serve shutdown`)")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
    try:
        serve.run(app, name=APP, route_prefix="/")
        url = f"http://{_in_url('127.0.0.1' if host == '0.0.0.0' else host)}:{port}"
        _wait_until_healthy(url)
    except BaseException as e:
        refusal = _refusal() if isinstance(e, RuntimeError) else None
        stop()
        if refusal is not None:
            raise refusal from None
        raise
    return url


def _in_url(host: str) -> str:
    return f"[{host.strip('[]')}]" if ":" in host else host


def _refusal() -> UserError | None:
    """Why a replica could not start, where that is the user's to mend. Serve keeps the text only."""
    from ray import serve

    application = serve.status().applications.get(APP)
    for deployment in application.deployments.values() if application else ():
        found = re.search(r"errors\.UserError: (.+)(?:\n\s+fix: (.+))?", deployment.message)
        if found:
            return UserError(found[1], fix=found[2] or "")
    return None


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
