"""Secrets by reference: a job names them, and each node of the cluster has the values.

A job's environment is part of what everybody who may list jobs can read. So a value comes from the
environment in which the node's Ray was started, or from the file of that name in a folder of secrets
(``$QWEN_RAY_SECRETS``, default ``/run/secrets``), as Kubernetes and Docker mount them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_ray.errors import UserError

NAMES = "QWEN_RAY_JOB_SECRETS"
"""Environment variable of a job: the names of its secrets, with commas between."""
HOOK = "qwen_ray.jobs.secrets.load"
"""What Ray calls in each process of a job when it starts."""


def folder() -> Path:
    """Where files of secrets are on this node."""
    return Path(os.environ.get("QWEN_RAY_SECRETS", "/run/secrets"))


def load() -> list[str]:
    """Put what is in files into this process's environment; returns the names that are nowhere."""
    missing = []
    for name in filter(None, os.environ.get(NAMES, "").split(",")):
        if os.environ.get(name):
            continue
        try:
            value = (folder() / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            value = ""
        if value:
            os.environ[name] = value
        else:
            missing.append(name)
    return missing


def check_names(names: Sequence[str]) -> None:
    """:class:`UserError` for a name of ``--env`` that carries its value."""
    for name in names:
        if "=" in name:
            raise UserError(
                "a value given here could be read by everybody who may list the cluster's jobs",
                where=f"--env {name.partition('=')[0]}=...",
                fix=f"--env {name.partition('=')[0]}, with the value on the nodes; or --send-env for what is "
                "no secret",
            )
        if not name.isidentifier():
            raise UserError(f"'{name}' is no name of an environment variable", where="--env")


def sent(settings: Sequence[str]) -> dict[str, str]:
    """What ``--send-env`` asks to send: ``NAME=VALUE``, or ``NAME`` with the value that it has here."""
    values = {}
    for setting in settings:
        name, given, value = setting.partition("=")
        if not name.isidentifier():
            raise UserError(f"'{name}' is no name of an environment variable", where="--send-env")
        if not given and name not in os.environ:
            raise UserError(f"{name} is not set here", where="--send-env", fix=f"{name}=VALUE")
        values[name] = value if given else os.environ[name]
    return values
