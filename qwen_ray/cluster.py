"""Joining a Ray cluster, or starting one on this machine, with settings that are set in one place."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from qwen_ray.errors import UserError

# Set before Ray is imported. Without the first, identical lines of different ranks are swallowed; the
# second stops Ray Train from printing every worker line twice; the third bounds how long `report` waits.
_ENVIRONMENT = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_FIX = "start one with `ray start --head`, or leave the address out to start one here"
_started_here = False


def started_here() -> bool:
    """Whether the connected cluster is one that :func:`connect` started: it will not grow."""
    return _started_here


def prepare(address: str | None = None) -> str:
    """Set what Ray reads when it is imported; returns the address that :func:`connect` will join."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":  # nobody announces that this machine goes away: a process less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if "ray" not in sys.modules and (address == "local" or _has_token()):
        # A new local cluster has a token anyway; `ray start` asks for one if it finds one, but a client
        # that joins does not send it unless told.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return address


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Join the cluster at ``address`` (or $RAY_ADDRESS), else start one on this machine.

    ``num_cpus`` is the number of logical CPUs of a cluster started here: Ray lends none, so a run that
    trains and serves at once needs one for each worker and replica. Does nothing if already connected.
    """
    address = prepare(address)
    local = address == "local"
    import ray

    if ray.is_initialized():
        return
    if not local:
        _check_reachable(address)
    # Ray's own handlers end the process with a stack trace; ours stop what is running and say so.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=address,
            num_cpus=max(num_cpus or 0, os.cpu_count() or 1) if local else None,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except ConnectionError as e:
        raise UserError(
            f"no Ray cluster answers: {str(e).splitlines()[0]}",
            where=address,
            fix=_FIX,
        ) from e
    global _started_here  # noqa: PLW0603 - Ray's connection is as global
    _started_here = local
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Ray would try for minutes. Only ``host:port`` can be tried; ``ray://`` and ``auto`` are Ray's."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as e:
        raise UserError(f"no Ray cluster answers ({e.strerror or e})", where=address, fix=_FIX) from e


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").is_file()


def check_room(each: Mapping[str, float], count: int, what: str, *, where: str) -> None:
    """Raise :class:`UserError` where the cluster cannot hold ``count`` of ``what`` with resources ``each``:
    Ray would wait for them for ever."""
    import ray

    have = ray.cluster_resources()
    for name, amount in each.items():
        if have.get(name, 0) < amount * count:
            raise UserError(
                f"{count} {what} with {amount:g} {name} each need {amount * count:g}; the cluster has "
                f"{have.get(name, 0):g}",
                where=where,
                fix=f"ask for fewer {what} or less for each, or add nodes",
            )


def disconnect() -> None:
    """Leave the cluster; one that :func:`connect` started ends. Only ``ray.init`` or :func:`connect` joins
    one again: not the next call of a thread that Ctrl-C has left in the middle of its work."""
    import ray
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False  # what RAY_ENABLE_AUTO_CONNECT=0 sets, of this process alone
    if ray.is_initialized():
        ray.shutdown()
